"""The transfer thread: order, partial and failing system calls, errors that reach somebody, and no way to hang."""

from __future__ import annotations

import errno
import gc
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from mebp_compile.errors import DiskError, MeasureError, StoreError
from mebp_compile.measure import file_io
from mebp_compile.measure.disk import scratch_file
from mebp_compile.measure.file_io import TransferClosed
from mebp_compile.measure.memory import memory_of
from mebp_compile.measure.transfer import DiskThread

CHUNK = 100
Fault = Callable[[int], int | OSError | None]


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    with scratch_file(tmp_path, 10_000) as descriptor:
        yield descriptor


class Faulty:
    """os.pwrite and os.preadv that misbehave at one call: a returned number limits the bytes, an error is raised."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, fault: int | OSError) -> None:
        self.calls, self.at, self.fault = 0, at, fault
        self.pwrite, self.preadv = os.pwrite, os.preadv
        monkeypatch.setattr(os, "pwrite", self.write)
        monkeypatch.setattr(os, "preadv", self.read)

    def limit(self, size: int) -> int:
        self.calls += 1
        if self.calls != self.at:
            return size
        if isinstance(self.fault, OSError):
            raise self.fault
        return self.fault

    def write(self, fd: int, view: memoryview, offset: int) -> int:
        limit = self.limit(view.nbytes)
        return self.pwrite(fd, view[:limit], offset) if limit else 0

    def read(self, fd: int, views: list[memoryview], offset: int) -> int:
        limit = self.limit(views[0].nbytes)
        return self.preadv(fd, [views[0][:limit]], offset) if limit else 0


def round_trip(fd: int) -> list[DiskError]:
    """Three writes of several chunks and three reads; the errors met. Data must be right where there was no error."""
    sources = [bytes([number]) * 250 for number in (1, 2, 3)]
    targets = [bytearray(250) for _ in sources]
    errors = []
    with DiskThread(queue_length=2) as thread:
        tickets = [thread.submit_write(fd, 250 * i, memoryview(source)) for i, source in enumerate(sources)]
        tickets += [thread.submit_read(fd, 250 * i, memoryview(target)) for i, target in enumerate(targets)]
        for ticket in tickets:
            try:
                ticket.wait()
            except DiskError as error:
                errors.append(error)
                with pytest.raises(DiskError):
                    ticket.wait()
    if not errors:
        assert targets == sources
    return errors


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 900), st.integers(0, 100)), max_size=40), st.integers(1, 5))
def test_transfers_happen_in_order(moves: list[tuple[bool, int, int]], queue_length: int) -> None:
    """Overlapping writes and reads submitted without waiting give what a byte array gives when they run in order."""
    fd = os.memfd_create("order")
    model, reads = bytearray(1000), []
    os.pwrite(fd, bytes(model), 0)
    with DiskThread(queue_length) as thread:
        for number, (write, offset, size) in enumerate(moves):
            if write:
                data = bytes([number + 1]) * size
                model[offset : offset + size] = data
                thread.submit_write(fd, offset, memoryview(data))
            else:
                target = bytearray(size)
                thread.submit_read(fd, offset, memoryview(target))
                reads.append((target, bytes(model[offset : offset + size])))
    os.close(fd)
    assert all(target == expected for target, expected in reads)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_failure_at_every_call_is_reported_once(monkeypatch: pytest.MonkeyPatch, fd: int, code: int) -> None:
    """For N = 1, 2, ... until a run passes: the N-th system call fails, exactly one ticket raises, and nothing
    hangs.
    """
    monkeypatch.setattr(file_io, "CHUNK_BYTES", CHUNK)
    for at in range(1, 100):
        with monkeypatch.context() as patch:
            faulty = Faulty(patch, at, OSError(code, os.strerror(code)))
            errors = round_trip(fd)
        if not errors:
            break
        assert len(errors) == 1
        assert isinstance(errors[0].__cause__, DiskError)
        if code in (errno.ENOSPC, errno.EDQUOT):
            assert "disk full" in errors[0].message
            assert f"{250 - 100 * ((at - 1) % 3)} bytes" in errors[0].message
        else:
            assert "EIO" in errors[0].message
    assert at == faulty.calls + 1 == 19


@pytest.mark.parametrize("fault", [1, 99, InterruptedError(errno.EINTR, "interrupted")])
def test_partial_and_interrupted_calls_go_on(monkeypatch: pytest.MonkeyPatch, fd: int, fault: int | OSError) -> None:
    """A short write or read, or an interrupted one, at any call changes nothing but the number of calls."""
    monkeypatch.setattr(file_io, "CHUNK_BYTES", CHUNK)
    for at in range(1, 19):
        with monkeypatch.context() as patch:
            Faulty(patch, at, fault)
            assert round_trip(fd) == []


def test_calls_that_move_nothing_are_errors(monkeypatch: pytest.MonkeyPatch, fd: int) -> None:
    """A write that takes no byte and a read that gives none end in an error and not in an endless loop."""
    monkeypatch.setattr(file_io, "CHUNK_BYTES", CHUNK)
    for at in range(1, 19):
        with monkeypatch.context() as patch:
            Faulty(patch, at, 0)
            assert len(round_trip(fd)) == 1


def test_read_beyond_the_end(fd: int) -> None:
    """A read of bytes that the file doesn't have says how many are missing."""
    with DiskThread() as thread:
        ticket = thread.submit_read(fd, 9_900, memoryview(bytearray(300)))
        with pytest.raises(DiskError, match="ends at byte 10000, 200 bytes before"):
            ticket.wait()


def test_nobody_waits_and_still_the_error_is_raised(monkeypatch: pytest.MonkeyPatch, fd: int) -> None:
    """An error on a ticket that was dropped comes out of drain, of close, and of the end of the context."""
    for end in ("drain", "close", "exit"):
        thread = DiskThread()
        with monkeypatch.context() as patch:
            Faulty(patch, 1, OSError(errno.EIO, "bad sector"))
            ticket = thread.submit_write(fd, 0, memoryview(b"lost"))
            while not ticket.done:
                pass
        del ticket
        with pytest.raises(DiskError, match="bad sector"):
            thread.__exit__(None, None, None) if end == "exit" else getattr(thread, end)()
        thread.close()
        assert thread.closed


def test_the_error_under_way_is_the_one_shown(fd: int) -> None:
    """A context left by an exception shows that exception, not the one of a forgotten ticket."""

    def fail_with_a_forgotten_ticket() -> None:
        with DiskThread() as thread:
            thread.submit_read(fd, 50_000, memoryview(bytearray(1)))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_with_a_forgotten_ticket()


def test_submitted_functions_run_in_turn() -> None:
    """Functions keep the order; a MebpError comes out as it is, anything else, a system exit too, as a DiskError."""
    seen: list[int] = []

    def damaged() -> None:
        raise StoreError("a bad checksum", "pack again")

    with DiskThread() as thread:
        thread.submit(lambda: seen.append(1))
        store = thread.submit(damaged)
        leave = thread.submit(lambda: exec("raise SystemExit(3)"))
        thread.submit(lambda: seen.append(2))
        with pytest.raises(StoreError, match="bad checksum"):
            store.wait()
        with pytest.raises(DiskError, match="SystemExit"):
            leave.wait()
    assert seen == [1, 2]


def test_close_fails_what_is_pending() -> None:
    """Closing with a stuck transfer running gives it up; it, the queued one and later submissions fail, none hangs."""
    gate, started = threading.Event(), threading.Event()
    thread = DiskThread()
    running = thread.submit(lambda: (started.set(), gate.wait(60)))
    queued = thread.submit(lambda: None)
    started.wait()
    with pytest.raises(DiskError, match=r"did not end in 0\.01 s"):
        thread.close(timeout_s=0.01)
    with pytest.raises(DiskError, match="did not end"):
        running.wait()
    with pytest.raises(TransferClosed, match="closed before"):
        queued.wait()
    with pytest.raises(TransferClosed, match="is closed"):
        thread.submit(lambda: None)
    gate.set()
    thread.close()


def test_close_stops_between_chunks(monkeypatch: pytest.MonkeyPatch, fd: int) -> None:
    """A long write is stopped after the chunk under way when the thread is closed meanwhile."""
    monkeypatch.setattr(file_io, "CHUNK_BYTES", CHUNK)
    thread, calls, real = DiskThread(), [], os.pwrite

    def close_at_second(fd: int, view: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) == 2:
            thread._state.stop()
        return real(fd, view, offset)

    monkeypatch.setattr(os, "pwrite", close_at_second)
    ticket = thread.submit_write(fd, 0, memoryview(bytes(1000)))
    with pytest.raises(TransferClosed, match="during a write"):
        ticket.wait()
    assert calls == [0, 100]


def test_the_queue_is_bounded() -> None:
    """With one running and one queued, a third submission blocks until the first is over."""
    gate, started, order = threading.Event(), threading.Event(), []
    with DiskThread(queue_length=1) as thread:
        thread.submit(lambda: (started.set(), gate.wait(60), order.append("first")))
        started.wait()
        thread.submit(lambda: order.append("second"))
        third = threading.Thread(target=lambda: thread.submit(lambda: order.append("third")))
        third.start()
        third.join(0.05)
        assert third.is_alive()
        gate.set()
        third.join()
        thread.drain()
        assert order == ["first", "second", "third"]
        assert thread.stall_us > 0


def test_close_wakes_a_blocked_submitter() -> None:
    """A caller blocked by a full queue gets TransferClosed when the thread is closed."""
    gate, caught = threading.Event(), []
    thread = DiskThread(queue_length=1)
    for _ in range(2):
        thread.submit(lambda: gate.wait(60))

    def submit() -> None:
        try:
            thread.submit(lambda: None)
        except TransferClosed as error:
            caught.append(error)

    blocked = threading.Thread(target=submit)
    blocked.start()
    thread._state.stop()
    blocked.join(30)
    gate.set()
    thread.close()
    assert len(caught) == 1


def test_callers_that_would_wait_for_ever_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function inside the thread can't wait for the thread, and a fork, which has no thread, can't either."""
    gate = threading.Event()
    with DiskThread() as thread:
        later = []
        inner = thread.submit(lambda: (gate.wait(60), later[0].wait()))
        later.append(thread.submit(lambda: None))
        gate.set()
        with pytest.raises(DiskError, match="waits for the transfer thread"):
            inner.wait()
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: -1)
            with pytest.raises(DiskError, match="is a fork"):
                thread.submit(lambda: None)
            with pytest.raises(DiskError, match="is a fork"):
                thread.drain()


def test_a_forgotten_thread_ends() -> None:
    """A DiskThread that nobody refers to any more stops its thread."""
    thread = DiskThread()
    worker = thread._thread
    del thread
    gc.collect()
    worker.join(30)
    assert not worker.is_alive()


def test_transfers_are_recorded(fd: int) -> None:
    """The record has each transfer's kind and bytes in order, and times that don't overlap."""
    with DiskThread(record=True) as thread:
        thread.submit_write(fd, 0, memoryview(bytes(300)))
        thread.submit_read(fd, 0, memoryview(bytearray(200)))
        thread.submit(lambda: None, size_bytes=7)
        thread.drain()
        record = thread.transfers
    assert [(each.kind, each.size_bytes) for each in record] == [("write", 300), ("read", 200), ("call", 7)]
    times = [time for each in record for time in (each.start_us, each.end_us)]
    assert times == sorted(times)


def test_bad_arguments(fd: int) -> None:
    """A read into read-only memory and a queue of nothing are refused at once."""
    with DiskThread() as thread, pytest.raises(DiskError, match="read-only"):
        thread.submit_read(fd, 0, memoryview(b"fixed"))
    with pytest.raises(MeasureError, match="1 or more"):
        DiskThread(queue_length=0)


def test_finished_tickets_let_go_of_their_buffers(fd: int) -> None:
    """After a transfer the ticket keeps no tensor's memory alive."""
    with DiskThread() as thread:
        buffer = bytearray(64)
        ticket = thread.submit_write(fd, 0, memoryview(buffer))
        ticket.wait()
        thread.drain()
        buffer.append(1)  # raises BufferError while a view of it exists


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_memory_of_any_dtype(fd: int, dtype: torch.dtype) -> None:
    """Every dtype's bytes make the round trip through the file, also those of a transposed slice of an arena."""
    arena = torch.randint(0, 255, (4096,), dtype=torch.uint8)
    tensor = arena[256 : 256 + 60 * dtype.itemsize].view(dtype).view(6, 10).t()
    before = arena.clone()
    with DiskThread() as thread:
        thread.submit_write(fd, 0, memory_of(tensor)).wait()
        memory_of(tensor)[:] = bytes(60 * dtype.itemsize)
        assert not arena[256 : 256 + 60 * dtype.itemsize].any()
        thread.submit_read(fd, 0, memory_of(tensor)).wait()
    assert torch.equal(arena, before)


def test_memory_of_storages_and_empty_tensors() -> None:
    """A storage gives all its bytes, an empty tensor none, and the view outlives the tensor."""
    tensor = torch.arange(5, dtype=torch.int32)
    assert memory_of(tensor[2:].untyped_storage()).nbytes == 20
    assert memory_of(tensor[2:]).nbytes == 12
    assert memory_of(torch.empty(0, 3)).nbytes == 0
    assert memory_of(torch.nn.Parameter(torch.ones(3))).nbytes == 12
    view = memory_of(tensor)
    del tensor
    gc.collect()
    assert view.cast("i").tolist() == [0, 1, 2, 3, 4]


def test_memory_of_refuses_what_has_no_range_of_bytes() -> None:
    """Gaps, repeats, meta and fake tensors are refused with a fix."""
    with FakeTensorMode():
        fake = torch.empty(3)
    bad = [torch.ones(4, 4)[:, ::2], torch.ones(4, 1).expand(4, 3), torch.ones(3, device="meta"), fake]
    for tensor in bad:
        with pytest.raises(MeasureError, match="try: pass"):
            memory_of(tensor)
