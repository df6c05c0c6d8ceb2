"""RSS, its peaks, malloc thresholds and the hard limit."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from mebp_compile.errors import MeasureError
from mebp_compile.measure import process
from mebp_compile.measure.child import run_child
from mebp_compile.measure.process import PeakRss, limit_data, reset_peak, rss

SIZE = 64 << 20


def test_rss_sees_an_allocation() -> None:
    """Touched anonymous memory raises RssAnon and VmData by its size and VmHWM at least to the present total."""
    before = rss()
    block = bytearray(b"x") * SIZE
    after = rss()
    assert abs(after.anon_bytes - before.anon_bytes - SIZE) < SIZE // 8
    assert after.data_bytes - before.data_bytes >= SIZE - 4096
    assert after.peak_bytes >= after.anon_bytes
    del block


def test_peak_rss_reports_both_peaks() -> None:
    """A block that is gone at the exit is in the sampled anonymous peak and in VmHWM, and not in `after`."""
    with PeakRss() as meter:
        block = bytearray(b"x") * SIZE
        give_up = time.monotonic() + 20
        while meter.peak_anon_bytes - meter.before.anon_bytes < SIZE * 3 // 4 and time.monotonic() < give_up:
            time.sleep(0.002)
        del block
    assert meter.peak_anon_bytes - meter.before.anon_bytes > SIZE * 3 // 4
    assert meter.after.anon_bytes - meter.before.anon_bytes < SIZE // 4
    total = meter.before.anon_bytes + meter.before.file_bytes
    assert meter.peak_rss_bytes is None or meter.peak_rss_bytes - total > SIZE * 3 // 4


def test_reset_peak_lowers_vmhwm() -> None:
    """Where the reset is possible, VmHWM falls below an earlier peak."""
    block = bytearray(b"x") * SIZE
    high = rss().peak_bytes
    del block
    assert (not reset_peak()) or rss().peak_bytes < high


def test_reset_peak_says_when_it_is_not_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused write gives False, and PeakRss then reports no VmHWM."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError("read-only /proc")

    monkeypatch.setattr(process, "open", refuse, raising=False)
    assert not reset_peak()
    monkeypatch.undo()
    monkeypatch.setattr(process, "reset_peak", lambda: False)
    with PeakRss() as meter:
        pass
    assert meter.peak_rss_bytes is None
    with pytest.raises(MeasureError, match="used before"):
        meter.__enter__()


def test_missing_status_is_a_typed_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the fields of /proc/self/status rss says so and names a way out."""
    lean = tmp_path / "status"
    lean.write_text("Name:\tpython\n")
    monkeypatch.setattr(process, "open", lambda *args, **kwargs: lean.open(), raising=False)
    with pytest.raises(MeasureError, match="try:"):
        rss()


def test_malloc_thresholds_give_freed_memory_back() -> None:
    """With low thresholds the RSS of 40 MB of freed blocks is gone although the last block still lives."""
    answer = run_child("measure_children", "thresholds", {"set": True})
    assert answer["accepted"]
    assert answer["full"] > 36_000_000
    assert answer["left"] < 2_000_000


def test_limit_data_fails_cleanly_and_is_lifted() -> None:
    """Inside the limit a small tensor fits and a large one raises RuntimeError; afterwards the large one fits again."""
    answer = run_child("measure_children", "limited", {"headroom": 64 << 20})
    assert answer["small"] == 16 << 20
    assert "can't allocate memory" in answer["refused"]
    assert answer["after"] == 256 << 20
    assert answer["restored"]


def test_limit_data_below_use_is_refused() -> None:
    """A limit that the process exceeds already is refused before it is set."""
    with pytest.raises(MeasureError, match="below"), limit_data(4096):
        pass


def test_a_small_heap_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process starts anew with the same arguments and the variable added to what is there; the new one does not start again, and what a
    user has said of thread caches and fast bins stands."""
    started: list[tuple[str, list[str], dict[str, str]]] = []
    monkeypatch.setattr(process.os, "execve", lambda *given: started.append(given))
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")
    process.restart_with_small_heap()
    [(program, arguments, environment)] = started
    assert (program, arguments) == (sys.executable, [sys.executable, *sys.orig_argv[1:]])
    assert environment["GLIBC_TUNABLES"] == "glibc.malloc.arena_max=2:glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
    for said in (environment["GLIBC_TUNABLES"], "glibc.malloc.mxfast=64:glibc.malloc.tcache_count=3"):
        monkeypatch.setenv("GLIBC_TUNABLES", said)
        process.restart_with_small_heap()
    assert len(started) == 1
    assert process.small_heap({}) == {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"}
    said = "glibc.malloc.tcache_count=3"
    assert process.small_heap({"GLIBC_TUNABLES": said}) == {"GLIBC_TUNABLES": f"{said}:glibc.malloc.mxfast=0"}
