"""One background thread that moves bytes between memory and files, in the order they were submitted.

Order is the whole protocol: a read submitted after a write of the same bytes sees them, so callers need no locks.
Errors are kept on the ticket and raised by whoever waits for it; one that nobody waited for is raised by `drain` or
`close`. Nothing here can wait for ever: a closed thread fails every ticket that it did not serve.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from mebp_compile.errors import DiskError, MeasureError, MebpError
from mebp_compile.measure.file_io import CLOSED_FIX, TransferClosed, read_all, write_all

QUEUE_LENGTH = 16
CLOSE_TIMEOUT_S = 30.0
MEMORY_FIX = "free memory: end other programs, or take a smaller budget"


@dataclass(frozen=True)
class Transfer:
    """One finished transfer, for the timeline. Times are `time.perf_counter` in microseconds; kind is "read", "write"
    or "call".
    """

    start_us: float
    end_us: float
    kind: str
    size_bytes: int


class Ticket:
    """A submitted transfer. Its buffer must not be written (nor, for a read, looked at) until `wait` returns."""

    def __init__(self, kind: str, size_bytes: int, work: Callable[[Callable[[], bool]], None], state: _State) -> None:
        self.kind = kind
        self.size_bytes = size_bytes
        self._work: Callable[[Callable[[], bool]], None] | None = work
        self._state = state
        self._finished = False
        self._under_way = threading.Lock()
        self._under_way.acquire()
        self._error: MebpError | None = None

    @property
    def done(self) -> bool:
        """True once served, failed or given up; `wait` then returns at once."""
        return self._finished

    def wait(self) -> None:
        """Block until the transfer is over; raises the error it met, again on every call. The time blocked is the
        thread's `stall_us`.
        """
        if not self._finished:
            self._state.check_caller()
            start_ns = time.perf_counter_ns()
            with self._under_way:
                pass
            self._state.add_stall(start_ns)
        if self._error is not None:
            self._state.collect(self)
            raise _fresh(self._error) from self._error

    def _finish(self, error: MebpError | None) -> None:
        """Set the outcome once; a later one is dropped (a transfer that ends after `close` gave it up)."""
        with self._state.changed:
            if self._finished:
                return
            self._error = error
            self._work = None  # lets go of the buffer
            if error is not None:
                self._state.uncollected.append(self)
            self._finished = True
            self._under_way.release()


def _fresh(error: MebpError) -> MebpError:
    """A new exception for each `wait`: raising one object again would tie the callers' frames, and their tensors, to
    the ticket.
    """
    kind = type(error) if type(error).__init__ is MebpError.__init__ else DiskError
    return kind(error.message, error.fix)


class _State:
    """What the thread and its owner share. It does not refer to the owner, so a forgotten DiskThread is closed by its
    finaliser. All but the queue is behind the lock of `changed`, which is told of changes only while somebody waits
    for one: a transfer of a few kilobytes takes no longer than what Python does about it.
    """

    def __init__(self, queue_length: int, record: bool) -> None:
        self.changed = threading.Condition(threading.RLock())  # a finaliser may come in its midst
        self.waiting = 0
        self.queue: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self.queue_length = queue_length
        self.submitted = self.served = 0
        self.running: Ticket | None = None
        self.closing = False
        self.uncollected: list[Ticket] = []
        self.transfers: list[Transfer] | None = [] if record else None
        self.stall_us = 0.0
        self.process = os.getpid()
        self.thread: threading.Thread | None = None

    def check_caller(self) -> None:
        """Refuse the two callers that would wait for ever: a forked process, which has no thread, and the thread
        itself.
        """
        if os.getpid() != self.process:
            raise DiskError(
                "this process is a fork: the transfer thread did not come along", "make a DiskThread after the fork"
            )
        if threading.current_thread() is self.thread:
            raise DiskError(
                "a function in the transfer thread waits for the transfer thread", "submit and wait outside of it"
            )

    def add_stall(self, start_ns: int) -> None:
        with self.changed:
            self.stall_us += (time.perf_counter_ns() - start_ns) / 1000

    def collect(self, ticket: Ticket) -> None:
        """Its error has been told to somebody."""
        with self.changed:
            if ticket in self.uncollected:
                self.uncollected.remove(ticket)

    def wait_until(self, true: Callable[[], bool]) -> None:
        """With the lock held."""
        self.waiting += 1
        try:
            self.changed.wait_for(true)
        finally:
            self.waiting -= 1

    def put(self, ticket: Ticket) -> None:
        self.check_caller()
        with self.changed:
            if self.queue.qsize() >= self.queue_length:
                start_ns = time.perf_counter_ns()
                self.wait_until(lambda: self.closing or self.queue.qsize() < self.queue_length)
                self.add_stall(start_ns)
            if self.closing:
                raise TransferClosed("the transfer thread is closed", CLOSED_FIX)
            self.submitted += 1
            self.queue.put(ticket)

    def take(self) -> Ticket | None:
        """The next ticket, or None when closing."""
        ticket = self.queue.get()
        self.running = ticket
        if self.waiting:
            self.tell()
        return ticket

    def tell(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def end(self) -> None:
        """The running ticket is over."""
        self.running = None
        self.served += 1
        if self.waiting:
            self.tell()

    def rest(self) -> None:
        """Block until nothing is queued or running, or until closed."""
        self.check_caller()
        with self.changed:
            self.wait_until(lambda: self.closing or self.served == self.submitted)

    def unheard(self) -> Ticket | None:
        """The first ticket that failed on its own account and whose error nobody has seen."""
        with self.changed:
            return next((ticket for ticket in self.uncollected if not isinstance(ticket._error, TransferClosed)), None)

    def stop(self) -> list[Ticket]:
        """Serve no more; returns what was waiting."""
        with self.changed:
            self.closing = True
            pending = []
            with contextlib.suppress(queue.Empty):
                while True:
                    pending.append(self.queue.get_nowait())
            self.queue.put(None)
            self.changed.notify_all()
        return [ticket for ticket in pending if ticket is not None]


class DiskThread:
    """A bounded first-in-first-out queue of transfers served by one daemon thread.

    `submit_*` blocks while `queue_length` transfers wait. `transfers` lists the finished ones if `record`; `stall_us`
    adds up the time that callers were blocked in `Ticket.wait` or by a full queue. A context manager: the exit drains
    it and closes it; on the way out of an exception it only closes it.
    """

    def __init__(self, queue_length: int = QUEUE_LENGTH, record: bool = False) -> None:
        if queue_length < 1:
            raise MeasureError(f"a queue of {queue_length} transfers", "give 1 or more")
        self._state = _State(queue_length, record)
        self._thread = threading.Thread(target=_serve, args=(self._state,), name="mebp-disk", daemon=True)
        self._state.thread = self._thread
        try:
            self._thread.start()
        except RuntimeError as error:
            raise MeasureError(f"can't start the transfer thread: {error}", "free memory, or end other threads") from error
        self._finaliser = weakref.finalize(self, _give_up, self._state)

    def submit_write(self, fd: int, offset: int, buffer: memoryview) -> Ticket:
        """Write all of `buffer` to `fd` at `offset`."""
        view = _bytes_of(buffer)
        return self._put("write", view.nbytes, lambda stopped: write_all(fd, offset, view, stopped))

    def submit_read(self, fd: int, offset: int, buffer: memoryview) -> Ticket:
        """Fill `buffer` from `fd` at `offset`; a file that ends earlier is an error."""
        view = _bytes_of(buffer)
        if view.readonly:
            raise DiskError("the buffer of a read is read-only", "pass the memory of a tensor or a bytearray")
        return self._put("read", view.nbytes, lambda stopped: read_all(fd, offset, view, stopped))

    def submit(self, function: Callable[[], object], size_bytes: int = 0) -> Ticket:
        """Call `function` in its turn. Its result is dropped; what it raises comes out of `wait` as a DiskError (a
        MebpError as it is).
        """

        def work(stopped: Callable[[], bool]) -> None:
            function()

        return self._put("call", size_bytes, work)

    @property
    def stall_us(self) -> float:
        return self._state.stall_us

    @property
    def transfers(self) -> list[Transfer]:
        """The transfers finished so far, in order; empty unless recording."""
        with self._state.changed:
            return list(self._state.transfers or [])

    @property
    def closed(self) -> bool:
        return self._state.closing

    def drain(self) -> None:
        """Block until everything submitted is over; raises the first error that no `wait` has raised."""
        self._state.rest()
        self._raise_unheard()

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Stop. The chunk being moved ends, and what was not moved fails with TransferClosed on its ticket; a chunk
        that takes longer than `timeout_s` (a dead network disk) is given up. Raises the first error that no `wait`
        has raised. Closing twice is harmless.
        """
        self._state.check_caller()
        _give_up(self._state)
        self._thread.join(timeout_s)
        running = self._state.running
        if self._thread.is_alive() and running is not None:
            running._finish(
                DiskError(f"a {running.kind} did not end in {timeout_s:g} s", "check the disk that holds the file")
            )
        self._raise_unheard()

    def _raise_unheard(self) -> None:
        ticket = self._state.unheard()
        if ticket is not None:
            ticket.wait()

    def __enter__(self) -> DiskThread:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:  # the error under way is the one to show
            with contextlib.suppress(MebpError):
                self.close()
            return
        try:
            self.drain()
        finally:
            self.close()

    def _put(self, kind: str, size_bytes: int, work: Callable[[Callable[[], bool]], None]) -> Ticket:
        ticket = Ticket(kind, size_bytes, work, self._state)
        self._state.put(ticket)
        return ticket


def _give_up(state: _State) -> None:
    if os.getpid() != state.process:  # a fork's finaliser: the lock may have been held when it was copied
        return
    for ticket in state.stop():
        ticket._finish(TransferClosed(f"the transfer thread was closed before this {ticket.kind}", CLOSED_FIX))


def _serve(state: _State) -> None:
    """The thread: one ticket after the other. Whatever is raised ends up on the ticket, so no waiter can be
    forgotten.
    """
    while (ticket := state.take()) is not None:
        start_us = time.perf_counter_ns() / 1000
        error: MebpError | None = None
        try:
            assert ticket._work is not None
            ticket._work(lambda: state.closing)
        except MebpError as raised:
            error = raised
        except BaseException as raised:  # a system exit in a submitted call must not kill the thread either
            fix = MEMORY_FIX if isinstance(raised, MemoryError) else "see the cause above"
            error = DiskError(f"a {ticket.kind} in the transfer thread failed: {raised!r}", fix)
            error.__cause__ = raised
            error.add_note(f"in the transfer thread:\n{traceback.format_exc()}")
        _forget_frames(error)
        if state.transfers is not None:
            state.transfers.append(Transfer(start_us, time.perf_counter_ns() / 1000, ticket.kind, ticket.size_bytes))
        ticket._finish(error)
        state.end()
        del ticket, error


def _forget_frames(error: BaseException | None) -> None:
    """Drop the tracebacks of an error that a ticket keeps: their frames hold buffers, and may hold the DiskThread, which would never end."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


# ---- transfers under way, by name ----


@contextlib.contextmanager
def ending(pending: dict[str, Any], name: str) -> Iterator[None]:
    """Around the wait for a transfer: it leaves `pending` once it is over, well or not; not where Ctrl-C ended the wait, for it goes on."""
    try:
        yield
    except MebpError:
        del pending[name]
        raise
    del pending[name]


def settle(pending: Mapping[str, Any], wait: Callable[[str], None]) -> None:
    """Let what is under way end, whatever becomes of it."""
    for name in tuple(pending):
        with contextlib.suppress(MebpError):
            wait(name)


def _bytes_of(buffer: memoryview) -> memoryview:
    """The buffer as flat bytes, writable if it was."""
    view = memoryview(buffer)
    return view if view.nbytes == 0 else view.cast("B")
