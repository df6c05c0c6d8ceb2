"""Tickets for transfers, and the queue that serves them in the order in which they were submitted: by a thread, or at once by the caller."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from mebp_compile.errors import DiskError, MebpError
from mebp_compile.measure.cached_read import Span, is_cached, read_cached
from mebp_compile.measure.file_io import CLOSED_FIX, TransferClosed

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
    """A submitted transfer. Its buffer must not be written (nor, for a read, looked at) until `wait` returns.

    `span`: what it reads, or writes if its kind is "write"; None for a call that may do anything.
    """

    def __init__(
        self, kind: str, size_bytes: int, work: Callable[[Callable[[], bool]], None], owner: TransferQueue, span: Span | None = None
    ) -> None:
        self.kind = kind
        self.size_bytes = size_bytes
        self.span = span
        self._work: Callable[[Callable[[], bool]], None] | None = work
        self._queue = owner
        self._finished = False
        self._under_way = threading.Lock()
        self._under_way.acquire()
        self._error: MebpError | None = None

    @property
    def done(self) -> bool:
        """True where nobody is at it any more: it was served, failed, was given up, or is left for `wait` to do."""
        return self._finished or self in self._queue.later

    def wait(self) -> None:
        """Block until the transfer is over; raises the error it met, again on every call. The time blocked is the
        thread's `stall_us`.
        """
        if not self._finished:
            self._queue.check_caller()
            start_ns = time.perf_counter_ns()
            self._queue.read_now(self)
            with self._under_way:
                pass
            self._queue.add_stall(start_ns)
        if self._error is not None:
            self._queue.collect(self)
            raise _fresh(self._error) from self._error

    def serve(self, stopped: Callable[[], bool]) -> MebpError | None:
        """Do the work; whatever it raises is given back, so no waiter can be forgotten."""
        try:
            assert self._work is not None
            self._work(stopped)
            return None
        except MebpError as raised:
            error = raised
        except BaseException as raised:  # a system exit in a submitted call must not kill the thread either
            if isinstance(raised, KeyboardInterrupt) and threading.current_thread() is not self._queue.thread:
                raise
            fix = MEMORY_FIX if isinstance(raised, MemoryError) else "see the cause above"
            error = DiskError(f"a {self.kind} in the transfer thread failed: {raised!r}", fix)
            error.__cause__ = raised
            error.add_note(f"in the transfer thread:\n{traceback.format_exc()}")
        _forget_frames(error)
        return error

    def finish(self, error: MebpError | None) -> None:
        """Set the outcome once; a later one is dropped (a transfer that ends after `close` gave it up)."""
        with self._queue.changed:
            if self._finished:
                return
            self._error = error
            self._work = self.span = None  # lets go of the buffer
            if error is not None:
                self._queue.uncollected.append(self)
            self._finished = True
            self._under_way.release()


def _fresh(error: MebpError) -> MebpError:
    """A new exception for each `wait`: raising one object again would tie the callers' frames, and their tensors, to
    the ticket.
    """
    kind = type(error) if type(error).__init__ is MebpError.__init__ else DiskError
    return kind(error.message, error.fix)


def _forget_frames(error: BaseException | None) -> None:
    """Drop the tracebacks of an error that a ticket keeps: their frames hold buffers, and may hold the DiskThread, which would never end."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


class TransferQueue:
    """What the thread and its owner share. It does not refer to the owner, so a forgotten DiskThread is closed by its
    finaliser. All but the queue is behind the lock of `changed`, which is told of changes only while somebody waits
    for one: a transfer of a few kilobytes takes no longer than what Python does about it.
    """

    def __init__(self, length: int, record: bool, at_once: bool) -> None:
        self.changed = threading.Condition(threading.RLock())  # a finaliser may come in its midst
        self.waiting = 0
        self.queue: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self.length = length
        self.submitted = self.served = 0
        self.running: Ticket | None = None
        self.at_once = at_once
        self.later: list[Ticket] = []  # reads that the caller does as it waits for them
        self.missed = True  # the last of them, which was not in the page cache
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

    def unheard(self) -> Ticket | None:
        """The first ticket that failed on its own account and whose error nobody has seen."""
        with self.changed:
            return next((ticket for ticket in self.uncollected if not isinstance(ticket._error, TransferClosed)), None)

    # --- the caller's side ---

    def put(self, ticket: Ticket) -> None:
        self.check_caller()
        if ticket.kind == "write" or ticket.span is None:
            self._read_before(ticket.span)
        if self.at_once and self.served == self.submitted and self._serve_here(ticket):
            return
        with self.changed:
            if self.queue.qsize() >= self.length:
                start_ns = time.perf_counter_ns()
                self._wait_until(lambda: self.closing or self.queue.qsize() < self.length)
                self.add_stall(start_ns)
            self._check_open()
            self.submitted += 1
            self.queue.put(ticket)

    def rest(self) -> None:
        """Block until nothing is queued or running, or until closed."""
        self.check_caller()
        self._read_before(None)
        with self.changed:
            self._wait_until(lambda: self.closing or self.served == self.submitted)

    def _check_open(self) -> None:
        if self.closing:
            raise TransferClosed("the transfer thread is closed", CLOSED_FIX)

    def _wait_until(self, true: Callable[[], bool]) -> None:
        """With the lock held."""
        self.waiting += 1
        try:
            self.changed.wait_for(true)
        finally:
            self.waiting -= 1

    def _tell(self) -> None:
        with self.changed:
            self.changed.notify_all()

    # --- at once, where the thread has nothing to do ---

    def _serve_here(self, ticket: Ticket) -> bool:
        """Write now, or leave a read of what is in the page cache for later; False for what is the thread's."""
        self._check_open()
        if ticket.kind == "write":
            ticket.finish(ticket.serve(lambda: self.closing))
            return True
        if ticket.span is None or (self.missed and not is_cached(ticket.span)):
            return False
        self.later.append(ticket)
        return True

    def read_now(self, ticket: Ticket) -> None:
        """If it was left for later."""
        if ticket in self.later:
            assert ticket.span is not None
            self.missed = not read_cached(ticket.span)
            error = ticket.serve(lambda: self.closing) if self.missed else None
            self.later.remove(ticket)
            ticket.finish(error)

    def _read_before(self, span: Span | None) -> None:
        """What was left for later and is about to be written, or, of what nobody knows, all of it."""
        for ticket in [each for each in self.later if span is None or (each.span is not None and each.span.overlaps(span))]:
            self.read_now(ticket)

    # --- the thread ---

    def take(self) -> Ticket | None:
        """The next ticket, or None when closing."""
        ticket = self.queue.get()
        self.running = ticket
        if self.waiting:
            self._tell()
        return ticket

    def end(self) -> None:
        """The running ticket is over."""
        self.running = None
        self.served += 1
        if self.waiting:
            self._tell()

    def stop(self) -> list[Ticket]:
        """Serve no more; returns what was waiting."""
        with self.changed:
            self.closing = True
            pending, self.later = [*self.later], []
            with contextlib.suppress(queue.Empty):
                while True:
                    pending.append(self.queue.get_nowait())
            self.queue.put(None)
            self.changed.notify_all()
        return [ticket for ticket in pending if ticket is not None]


def serve(waiting: TransferQueue) -> None:
    """The thread: one ticket after the other."""
    while (ticket := waiting.take()) is not None:
        start_us = time.perf_counter_ns() / 1000
        error = ticket.serve(lambda: waiting.closing)
        if waiting.transfers is not None:
            waiting.transfers.append(Transfer(start_us, time.perf_counter_ns() / 1000, ticket.kind, ticket.size_bytes))
        ticket.finish(error)
        waiting.end()
        del ticket, error
