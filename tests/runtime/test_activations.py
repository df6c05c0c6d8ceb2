"""The activation store: round trips, wrong orders, failing disks, and nothing left behind."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mebp_compile.errors import DiskError, MeasureError
from mebp_compile.measure import disk
from mebp_compile.measure.transfer import DiskThread
from mebp_compile.runtime.activations import ActivationStore, Slot

APART = {"a": Slot(0, 400), "b": Slot(512, 200), "c": Slot(1024, 64)}


@pytest.fixture
def thread() -> Iterator[DiskThread]:
    disk_thread = DiskThread()
    yield disk_thread
    disk_thread.close()


def store_in(folder: Path, thread: DiskThread, slots: dict[str, Slot] = APART, **options: bool) -> ActivationStore:
    return ActivationStore(folder, 2048, slots, thread, allow_tmpfs=True, **options)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=30), st.booleans())
def test_what_comes_back_is_what_was_offloaded(tmp_path: Path, moves: list[tuple[str, bool]], drop_cache: bool) -> None:
    """Any order of offloads and prefetches of three slots returns each slot's latest bytes, and nothing has a name."""
    latest: dict[str, torch.Tensor] = {}
    with DiskThread() as thread, store_in(tmp_path, thread, drop_cache=drop_cache) as store:
        assert os.listdir(tmp_path) == []
        for number, (name, write) in enumerate(moves):
            elements = APART[name].size_bytes // 2
            if name in store.pending:
                store.wait(name)
            if write or name not in latest:
                latest[name] = torch.full((elements,), number + 0.5, dtype=torch.bfloat16)
                store.offload(name, latest[name])
            else:
                buffer = torch.empty(elements, dtype=torch.bfloat16)
                store.prefetch(name, buffer)
                store.wait(name)
                assert torch.equal(buffer.view(torch.uint8), latest[name].view(torch.uint8))


def test_two_transfers_of_one_slot_are_refused(tmp_path: Path, thread: DiskThread) -> None:
    """While a slot's transfer is pending a second one, in either direction, is an error that names the first."""
    tensor = torch.zeros(100)
    with store_in(tmp_path, thread) as store:
        store.offload("a", tensor)
        with pytest.raises(DiskError, match="a write of its slot is still on its way"):
            store.offload("a", tensor)
        with pytest.raises(DiskError, match="still on its way"):
            store.prefetch("a", tensor)
        store.wait("a")
        store.prefetch("a", tensor)
        with pytest.raises(DiskError, match="a read of its slot"):
            store.prefetch("a", tensor)
        assert store.pending == ("a",)


def test_wrong_orders_and_sizes_are_refused(tmp_path: Path, thread: DiskThread) -> None:
    """A wait without a transfer, a prefetch before any offload, unknown names, wrong sizes and gaps are errors."""
    with store_in(tmp_path, thread) as store:
        with pytest.raises(DiskError, match="wait for a: no transfer"):
            store.wait("a")
        with pytest.raises(DiskError, match="never written"):
            store.prefetch("a", torch.zeros(100))
        with pytest.raises(DiskError, match="no slot"):
            store.offload("z", torch.zeros(100))
        with pytest.raises(DiskError, match="404 bytes and its slot 400"):
            store.offload("a", torch.zeros(101))
        with pytest.raises(MeasureError, match="gaps"):
            store.offload("a", torch.zeros(100, 2)[:, 0])
        assert store.pending == ()
    with pytest.raises(DiskError, match="is closed"):
        store.offload("a", torch.zeros(100))
    store.close()


def test_a_slot_written_over_by_another_cannot_be_read(tmp_path: Path, thread: DiskThread) -> None:
    """Slots may share bytes: a read submitted before the other's write gives the old bytes, one after it is refused."""
    slots = {"a": Slot(0, 400), "b": Slot(200, 400), "next to b": Slot(600, 4), "empty": Slot(100, 0)}
    a, b, back = torch.ones(100), torch.full((100,), 2.0), torch.empty(100)
    with store_in(tmp_path, thread, slots) as store:
        store.offload("next to b", torch.zeros(1))
        store.offload("a", a)
        store.wait("a")
        store.prefetch("a", back)
        store.offload("b", b)
        store.wait("a")
        assert torch.equal(back, a)
        with pytest.raises(DiskError, match="another storage was written over it"):
            store.prefetch("a", back)
        store.wait("b")
        store.prefetch("b", back)
        store.wait("b")
        assert torch.equal(back, b)
        store.wait("next to b")
        store.prefetch("next to b", torch.zeros(1))


def test_slots_outside_the_file_are_refused(tmp_path: Path, thread: DiskThread) -> None:
    """A slot that ends beyond the file, or begins before it, is refused when the store is made."""
    for slot in (Slot(2000, 49), Slot(-1, 4), Slot(0, -4)):
        with pytest.raises(DiskError, match="outside the file of 2048"):
            store_in(tmp_path, thread, {"x": slot})


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failure_at_every_call_reaches_its_wait(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, thread: DiskThread, code: int
) -> None:
    """For N = 1, 2, ... until a run passes: the N-th system call fails, its wait raises, and a failed slot is not
    read.
    """
    real_write, real_read = os.pwrite, os.preadv
    for at in range(1, 20):
        calls = []

        def count(at: int = at, calls: list[int] = calls) -> None:
            calls.append(1)
            if len(calls) == at:
                raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch, store_in(tmp_path, thread) as store:
            patch.setattr(os, "pwrite", lambda *args, count=count: (count(), real_write(*args))[1])
            patch.setattr(os, "preadv", lambda *args, count=count: (count(), real_read(*args))[1])
            failed = [name for name in APART if not round_trip(store, name)]
        if not failed:
            break
        assert failed == ["abc"[(at - 1) // 2]]
    assert at == 7


def round_trip(store: ActivationStore, name: str) -> bool:
    """True if the slot's bytes came back; False if a wait raised. A slot whose write failed must refuse to be read."""
    tensor = torch.ones(APART[name].size_bytes, dtype=torch.uint8)
    buffer = torch.zeros_like(tensor)
    store.offload(name, tensor)
    try:
        store.wait(name)
    except DiskError:
        with pytest.raises(DiskError, match="never written"):
            store.prefetch(name, buffer)
        return False
    store.prefetch(name, buffer)
    try:
        store.wait(name)
    except DiskError:
        return False
    assert torch.equal(tensor, buffer)
    return True


def test_close_raises_a_pending_error_and_gives_the_file_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, thread: DiskThread
) -> None:
    """An error that nobody waited for comes out of close, after the descriptor was closed."""

    def fail(*args: object) -> int:
        raise OSError(errno.EIO, "bad sector")

    open_before = set(os.listdir("/proc/self/fd"))
    store = store_in(tmp_path, thread)
    monkeypatch.setattr(os, "pwrite", fail)
    store.offload("a", torch.zeros(100))
    with pytest.raises(DiskError, match="bad sector"):
        store.close()
    assert set(os.listdir("/proc/self/fd")) == open_before
    store.close()


def test_a_closed_thread_is_an_error_and_not_a_hang(tmp_path: Path) -> None:
    """Offloading through a closed thread raises; the slot then counts as never written and close still works."""
    thread = DiskThread()
    store = store_in(tmp_path, thread)
    thread.close()
    with pytest.raises(DiskError, match="thread is closed"):
        store.offload("a", torch.zeros(100))
    assert store.pending == ()
    with pytest.raises(DiskError, match="never written"):
        store.prefetch("a", torch.zeros(100))
    store.close()


def test_a_forgotten_store_closes_its_file(tmp_path: Path, thread: DiskThread) -> None:
    """Dropping the last reference gives the disk space back."""
    open_before = set(os.listdir("/proc/self/fd"))
    store = store_in(tmp_path, thread)
    assert set(os.listdir("/proc/self/fd")) != open_before
    del store
    assert set(os.listdir("/proc/self/fd")) == open_before


def test_memory_is_no_disk_and_space_must_suffice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, thread: DiskThread
) -> None:
    """tmpfs is refused unless allowed, and a file that the disk can't hold is refused with both sizes."""
    monkeypatch.setattr(disk, "filesystem_type", lambda path: "tmpfs")
    with pytest.raises(DiskError, match="which is memory and not a disk"):
        ActivationStore(tmp_path, 2048, APART, thread)
    store_in(tmp_path, thread).close()
    with pytest.raises(DiskError, match=r"disk full: \d+ bytes are needed .* available"):
        ActivationStore(tmp_path, 1 << 60, APART, thread, allow_tmpfs=True)
