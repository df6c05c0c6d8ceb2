"""The preloaded malloc meter against known allocations and against the storage meter."""

from __future__ import annotations

from pathlib import Path

import pytest

from mebp_compile.errors import MeasureError
from mebp_compile.measure import malloc_meter
from mebp_compile.measure.child import run_child
from mebp_compile.measure.malloc_meter import MallocMeter, library_path, preload_environment

needs_library = pytest.mark.skipif(
    library_path() is None, reason="the malloc meter's library is not built (no compiler)"
)
NOISE_BYTES = 16384  # Python's own allocations between two readings, and malloc's rounding to a page


@needs_library
def test_every_function_of_the_family_is_counted() -> None:
    """Each way to get a block of a known size grows live by that size, and free takes all of it off."""
    size = 1_000_000
    answer = run_child("measure_children", "malloc_family", {"size": size}, preload_malloc=True)
    assert len(answer["growth"]) == 8
    for name, growth in answer["growth"].items():
        assert size <= growth < size + NOISE_BYTES, name
    assert abs(answer["left"]) < NOISE_BYTES


@needs_library
def test_tensors_of_known_size() -> None:
    """A tensor's bytes appear in live and peak and vanish when it is freed; of 512 MB churned
    by 4 threads less than 1 MiB stays (what threads keep for themselves).
    """
    size = 10_000_000
    answer = run_child("measure_children", "malloc_tensors", {"size": size}, preload_malloc=True)
    assert size <= answer["grown"] < size + NOISE_BYTES
    assert size <= answer["peak"] < size + NOISE_BYTES
    assert abs(answer["freed"]) < NOISE_BYTES
    assert abs(answer["churn_left"]) < 1 << 20
    assert abs(answer["peak_after_reset"]) < NOISE_BYTES


@needs_library
def test_malloc_and_storage_meters_agree_on_a_training_step() -> None:
    """The malloc peak of a warm AdamW step is the storage meter's peak, plus at most 1 % and 64 KiB of workspace."""
    answer = run_child(
        "measure_children", "training_step", {"width": 256, "batch": 512}, preload_malloc=True, threads=1
    )
    assert answer["storages"] <= answer["malloc"] <= 1.01 * answer["storages"] + 65536


def test_absent_meter_is_a_typed_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the preload, or without the library, the error says what to do."""
    if not MallocMeter.available():
        with pytest.raises(MeasureError, match="preload_environment"):
            MallocMeter()
    monkeypatch.setattr(malloc_meter, "__file__", str(tmp_path / "malloc_meter.py"))
    with pytest.raises(MeasureError, match="C compiler"):
        preload_environment()


def test_preload_keeps_what_is_preloaded_already(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another preloaded library stays, and the meter is named once."""
    library = tmp_path / "_malloc_meter.so"
    library.touch()
    monkeypatch.setattr(malloc_meter, "__file__", str(tmp_path / "malloc_meter.py"))
    monkeypatch.setenv("LD_PRELOAD", "libother.so")
    once = preload_environment()["LD_PRELOAD"]
    assert once.split() == [str(library), "libother.so"]
    monkeypatch.setenv("LD_PRELOAD", once)
    assert preload_environment()["LD_PRELOAD"] == once
