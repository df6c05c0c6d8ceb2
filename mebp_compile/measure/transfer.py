"""One background thread that moves bytes between memory and files, in the order they were submitted.

Order is the whole protocol: a read submitted after a write of the same bytes sees them, so callers need no locks.
Errors are kept on the ticket and raised by whoever waits for it; one that nobody waited for is raised by `drain` or
`close`. Nothing here can wait for ever: a closed thread fails every ticket that it did not serve.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

from mebp_compile.errors import DiskError, MeasureError, MebpError
from mebp_compile.measure.cached_read import Span
from mebp_compile.measure.file_io import CLOSED_FIX, TransferClosed, read_all, write_all
from mebp_compile.measure.memory import Place, place_in
from mebp_compile.measure.transfer_queue import Ticket, Transfer, TransferQueue, serve

__all__ = ["DiskThread", "Ticket", "Transfer", "ending", "settle"]

QUEUE_LENGTH = 16
CLOSE_TIMEOUT_S = 30.0


class DiskThread:
    """A bounded first-in-first-out queue of transfers served by one daemon thread.

    `submit_*` blocks while `queue_length` transfers wait. `transfers` lists the finished ones if `record`; `stall_us`
    adds up the time that callers were blocked in `Ticket.wait` or by a full queue. A context manager: the exit drains
    it and closes it; on the way out of an exception it only closes it.

    `at_once`: files are in the page cache (`moves_at_once`), where a transfer is a copy and waits for no disk. Then the caller's own threads copy: a
    write as it is submitted, a read as it is waited for, since nothing is gained by an earlier one. What the page cache does not hold is read by the
    thread. One caller at a time.
    """

    def __init__(self, queue_length: int = QUEUE_LENGTH, record: bool = False, at_once: bool = False) -> None:
        if queue_length < 1:
            raise MeasureError(f"a queue of {queue_length} transfers", "give 1 or more")
        self._state = TransferQueue(queue_length, record, at_once)
        self._thread = threading.Thread(target=serve, args=(self._state,), name="mebp-disk", daemon=True)
        self._state.thread = self._thread
        try:
            self._thread.start()
        except RuntimeError as error:
            raise MeasureError(f"can't start the transfer thread: {error}", "free memory, or end other threads") from error
        self._finaliser = weakref.finalize(self, _give_up, self._state)

    def submit_write(self, fd: int, offset: int, buffer: memoryview | Place) -> Ticket:
        """Write all of `buffer` to `fd` at `offset`."""
        place = buffer if isinstance(buffer, Place) else place_in(buffer)
        return self._put("write", place.nbytes, lambda stopped: write_all(fd, offset, place.view, stopped), _span(fd, offset, place))

    def submit_read(self, fd: int, offset: int, buffer: memoryview | Place) -> Ticket:
        """Fill `buffer` from `fd` at `offset`; a file that ends earlier is an error."""
        place = buffer if isinstance(buffer, Place) else place_in(buffer)
        if place.address == 0 and place.nbytes:
            raise DiskError("the buffer of a read is read-only", "pass the memory of a tensor or a bytearray")
        return self._put("read", place.nbytes, lambda stopped: read_all(fd, offset, place.view, stopped), _span(fd, offset, place))

    def submit(self, function: Callable[[], object], size_bytes: int = 0, reads: Span | None = None) -> Ticket:
        """Call `function` in its turn. Its result is dropped; what it raises comes out of `wait` as a DiskError (a
        MebpError as it is). `reads`: all that it does is to read this.
        """

        def work(stopped: Callable[[], bool]) -> None:
            function()

        return self._put("call", size_bytes, work, reads)

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
            running.finish(
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

    def _put(self, kind: str, size_bytes: int, work: Callable[[Callable[[], bool]], None], span: Span | None) -> Ticket:
        ticket = Ticket(kind, size_bytes, work, self._state, span)
        self._state.put(ticket)
        return ticket


def _give_up(state: TransferQueue) -> None:
    if os.getpid() != state.process:  # a fork's finaliser: the lock may have been held when it was copied
        return
    for ticket in state.stop():
        ticket.finish(TransferClosed(f"the transfer thread was closed before this {ticket.kind}", CLOSED_FIX))


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


def _span(fd: int, offset: int, place: Place) -> Span:
    return Span(fd, offset, place.nbytes, place.address)
