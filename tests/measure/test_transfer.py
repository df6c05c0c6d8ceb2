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
from mebp_compile.measure import cached_read, file_io
from mebp_compile.measure.cached_read import Span, is_cached, moves_at_once, read_cached
from mebp_compile.measure.disk import scratch_file
from mebp_compile.measure.file_io import TransferClosed
from mebp_compile.measure.memory import memory_of, place_in
from mebp_compile.measure.transfer import DiskThread

CHUNK = 100
Fault = Callable[[int], int | OSError | None]


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    with scratch_file(tmp_path, 10_000) as descriptor:
        yield descriptor


def span_of(fd: int, offset: int, buffer: bytearray | memoryview) -> Span:
    place = place_in(memoryview(buffer))
    return Span(fd, offset, place.nbytes, place.address)


class Faulty:
    """os.pwrite and os.preadv that misbehave at one call: a returned number limits the bytes, an error is raised."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, fault: int | BaseException) -> None:
        self.calls, self.at, self.fault = 0, at, fault
        self.pwrite, self.preadv = os.pwrite, os.preadv
        monkeypatch.setattr(os, "pwrite", self.write)
        monkeypatch.setattr(os, "preadv", self.read)

    def limit(self, size: int) -> int:
        self.calls += 1
        if self.calls != self.at:
            return size
        if isinstance(self.fault, BaseException):
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


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 900), st.integers(0, 100)), max_size=40), st.integers(1, 5), st.booleans())
def test_transfers_happen_in_order(moves: list[tuple[bool, int, int]], queue_length: int, at_once: bool) -> None:
    """Overlapping writes and reads submitted without waiting give what a byte array gives when they run in order."""
    fd = os.open(Path(__file__).parent, os.O_TMPFILE | os.O_RDWR)
    model, reads = bytearray(1000), []
    os.pwrite(fd, bytes(model), 0)
    with DiskThread(queue_length, at_once=at_once) as thread:
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


# --- at once ---


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """In the page cache, and not in memory alone, where the system says of no byte whether it is there."""
    with scratch_file(tmp_path, 1 << 20) as descriptor:
        os.pwrite(descriptor, bytes(range(256)) * 4096, 0)
        if not is_cached(Span(descriptor, 0, 1 << 20, 0)):
            pytest.skip("no C compiler, or files that lie in memory")
        yield descriptor


def test_a_write_is_over_when_it_is_submitted_and_a_read_waits_to_be_waited_for(file: int) -> None:
    """Neither needs the thread; a read that is left for later is nobody's meanwhile."""
    target = bytearray(300)
    with DiskThread(at_once=True) as thread:
        written = thread.submit_write(file, 100, memoryview(b"x" * 50))
        assert os.pread(file, 50, 100) == b"x" * 50
        read = thread.submit_read(file, 0, memoryview(target))
        assert (thread._state.submitted, thread._state.later, read.done) == (0, [read], True)
        assert not any(target)
        read.wait()
        written.wait()
    assert target == bytes(range(100)) + b"x" * 50 + bytes(range(150, 256)) + bytes(range(44))


def test_what_is_about_to_be_written_is_read_first(file: int) -> None:
    """A write reads what overlaps with it and leaves the rest for later; a call, of which nobody knows what it does, and drain leave nothing."""
    targets = [bytearray(100) for _ in range(3)]
    with DiskThread(at_once=True) as thread:
        reads = [thread.submit_read(file, 100 * number, memoryview(target)) for number, target in enumerate(targets)]
        thread.submit_write(file, 150, memoryview(bytes(100)))
        assert thread._state.later == reads[:1]
        thread.submit(lambda: None).wait()
        assert thread._state.later == []
        thread.submit_read(file, 0, memoryview(targets[0]))
        thread.drain()
        assert thread._state.later == []
    assert b"".join(targets) == (bytes(range(256)) * 2)[:300]


def test_what_the_page_cache_does_not_hold_is_the_threads(file: int) -> None:
    """Such a read waits for a disk; a submitted call that only reads is left for later like a read, a write behind the thread's work queues too."""
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    target = bytearray(1 << 16)
    span = span_of(file, 4096, target)
    if is_cached(span):
        pytest.skip("the page cache keeps what it is asked to drop")
    assert not read_cached(span)
    gate, called = threading.Event(), []
    with DiskThread(at_once=True) as thread:
        thread.submit_read(file, 4096, memoryview(target)).wait()
        assert thread._state.submitted == 1
        assert target == bytes(range(256)) * 256
        thread.drain()
        thread.submit(lambda: called.append(1), reads=span).wait()
        assert not called  # C has read it
        thread.submit(gate.wait)
        thread.submit_write(file, 0, memoryview(b"later"))
        assert os.pread(file, 5, 0) == bytes(range(5))
        gate.set()
        thread.drain()
    assert os.pread(file, 5, 0) == b"later"


def test_a_read_of_several_threads(file: int) -> None:
    """At any offset, of any size around the one from which on more threads read, bytes and what lies around them are right."""
    content = bytes(range(256)) * 4096
    for size in (1, 4095, 4097, (256 << 10) - 1, 256 << 10, (256 << 10) + 4097, 700_001):
        memory = bytearray(size + 2)
        assert read_cached(span_of(file, 123, memoryview(memory)[1:-1]))
        assert memory == b"\0" + content[123 : 123 + size] + b"\0"
    assert not read_cached(span_of(file, (1 << 20) - 10, bytearray(20)))  # beyond the end


def test_what_goes_wrong_at_once_is_said_by_wait(monkeypatch: pytest.MonkeyPatch, file: int) -> None:
    """A file that was cut, a full disk and a closed thread: typed errors, raised by `wait` and nowhere else; Ctrl-C goes through."""
    thread = DiskThread(at_once=True)
    cut, unread = (thread.submit_read(file, (1 << 20) - 100, memoryview(bytearray(100))) for _ in range(2))
    os.ftruncate(file, (1 << 20) - 50)
    with pytest.raises(DiskError, match="ends at byte 1048526, 50 bytes before"):
        cut.wait()
    with monkeypatch.context() as patch:
        Faulty(patch, 1, OSError(errno.ENOSPC, "no space"))
        full = thread.submit_write(file, 0, memoryview(b"lost"))
    with monkeypatch.context() as patch:
        Faulty(patch, 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            thread.submit_write(file, 0, memoryview(b"lost"))
    with pytest.raises(DiskError, match="disk full"):
        full.wait()
    thread.close()
    with pytest.raises(TransferClosed, match="closed before"):
        unread.wait()
    with pytest.raises(TransferClosed, match="is closed"):
        thread.submit_write(file, 0, memoryview(b"lost"))


def test_moving_at_once_needs_memory_to_spare_and_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """With less available memory than files may need, or without the library, the thread moves everything."""
    monkeypatch.setattr(cached_read, "library", lambda: object())
    monkeypatch.setattr(cached_read, "available_memory_bytes", lambda: cached_read.CACHE_BYTES)
    assert moves_at_once()
    monkeypatch.setattr(cached_read, "available_memory_bytes", lambda: cached_read.CACHE_BYTES - 1)
    assert not moves_at_once()
    monkeypatch.setattr(cached_read, "available_memory_bytes", lambda: cached_read.CACHE_BYTES)
    monkeypatch.setattr(cached_read, "library", lambda: None)
    assert not moves_at_once()


# --- ends ---


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
