"""Faults to put into a running step: system calls and allocations that fail at the N-th call, waits that are interrupted; and what must
not be left behind: threads, descriptors, files.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import functools
import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode

from mebp_compile.measure import transfer_queue
from mebp_compile.measure.transfer import Ticket
from mebp_compile.runtime import arena

READS, WRITES = ("preadv",), ("pwrite",)
TRANSFERS = READS + WRITES  # what a step asks of the system
HANG_S, ENDING_S = 60, 10
NO_MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate {} bytes. Error code 12 (Cannot allocate memory)"


# --- system calls ---


@dataclass(frozen=True)
class Fault:
    """What happens to a system call. error: it fails with this number. share: it moves only this part of its bytes (0: none, the end of
    the file). sticky: so do all calls after it, as on a disk that is gone. deadly: after it the process is killed."""

    name: str
    calls: tuple[str, ...] = TRANSFERS
    error: int = 0
    share: float = 1.0
    sticky: bool = False
    deadly: bool = False


BROKEN = Fault("EIO", error=errno.EIO)
GONE = Fault("EIO from there on", error=errno.EIO, sticky=True)
FULL = Fault("ENOSPC", WRITES, error=errno.ENOSPC)
CUT = Fault("end of file", READS, share=0.0)
SHORT = Fault("short", share=0.3)
ALWAYS_SHORT = Fault("short from there on", share=0.3, sticky=True)
INTERRUPTED = Fault("EINTR", error=errno.EINTR)
READ_BROKEN = Fault("EIO", READS, error=errno.EIO)
READYING = Fault("ENOSPC or EIO", (*TRANSFERS, "posix_fallocate"), error=errno.ENOSPC)
KILLED = Fault("SIGKILL", WRITES, share=0.5, deadly=True)

MAKING, LOOKING = ("write", "fsync", "mkdir", "rename"), ("pread", "fstat")  # how a weight store is made and opened
BUILDING = Fault("ENOSPC", MAKING + LOOKING, error=errno.ENOSPC)
ALWAYS_SHORT_BUILDING = Fault("short from there on", ("write", "pread"), share=0.3, sticky=True)
KILLED_BUILDING = Fault("SIGKILL", MAKING, share=0.5, deadly=True)
OPENING = Fault("EIO", ("open", *LOOKING), error=errno.EIO)
OPENING_SHORT = Fault("short", ("pread",), share=0.3)
OPENING_INTERRUPTED = Fault("EINTR", ("pread",), error=errno.EINTR)


class Calls:
    """Inside, calls of os.<name> are counted in `count`; the N-th and, where the fault is sticky, those after it get the fault. Every read is such
    a call: what C reads from the page cache it fails to, and the same is read again."""

    def __init__(self, fault: Fault, at: int = 0) -> None:
        self.fault, self.at, self.count = fault, at, 0
        self._lock = threading.Lock()  # the transfer thread and the caller may call at the same time

    def __enter__(self) -> Calls:
        self._patches = contextlib.ExitStack()
        for name in self.fault.calls:
            self._patches.enter_context(mock.patch.object(os, name, self._faulty(name, getattr(os, name))))
        if "preadv" in self.fault.calls:
            self._patches.enter_context(mock.patch.object(transfer_queue, "read_cached", return_value=False))
        return self

    def __exit__(self, *error: object) -> None:
        self._patches.close()

    def _faulty(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def faulty(*args: Any, **kwargs: Any) -> Any:
            if not self._hit():
                return call(*args, **kwargs)
            if self.fault.error:
                raise OSError(self.fault.error, os.strerror(self.fault.error))
            try:
                return SHORTENED[name](call, self.fault.share, *args) if name in SHORTENED else call(*args, **kwargs)
            finally:
                if self.fault.deadly:
                    os.kill(os.getpid(), signal.SIGKILL)

        return faulty

    def _hit(self) -> bool:
        with self._lock:
            self.count += 1
            return self.count == self.at or (self.fault.sticky and 0 < self.at < self.count)


def _part(size: int, share: float) -> int:
    return max(1, int(size * share)) if share else 0


def _short_preadv(call: Callable[..., int], share: float, fd: int, views: list[memoryview], offset: int) -> int:
    size = _part(len(views[0]), share)
    return call(fd, [views[0][:size]], offset) if size else 0


def _short_pwrite(call: Callable[..., int], share: float, fd: int, data: memoryview, offset: int) -> int:
    size = _part(len(data), share)
    return call(fd, data[:size], offset) if size else 0


def _short_pread(call: Callable[..., bytes], share: float, fd: int, size: int, offset: int) -> bytes:
    return call(fd, _part(size, share), offset) if share else b""


def _short_write(call: Callable[..., int], share: float, fd: int, data: memoryview) -> int:
    return call(fd, data[: _part(len(data), share)])


SHORTENED = {"preadv": _short_preadv, "pwrite": _short_pwrite, "pread": _short_pread, "write": _short_write}


# --- memory ---


class Allocations(TorchDispatchMode):  # type: ignore[misc, no-untyped-call]
    """Inside, ops of this thread that take memory from the allocator, and arenas that are mapped, are counted in `count`; the N-th and, if
    `sticky`, those after it fail as torch or the system fails when there is no memory.
    """

    def __init__(self, at: int = 0, sticky: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.at, self.sticky, self.count = at, sticky, 0
        self.mapping = mock.patch.object(arena, "_mapped", functools.partial(self._map, arena._mapped))

    def __enter__(self) -> Any:
        self.mapping.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.mapping.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if allocates(func) and self._fails():
            raise RuntimeError(NO_MEMORY.format(1 << 40))
        return func(*args, **(kwargs or {}))

    def _map(self, mapped: Callable[[int], Any], size_bytes: int) -> Any:
        if self._fails():
            raise MemoryError(f"can't map {size_bytes} bytes")
        return mapped(size_bytes)

    def _fails(self) -> bool:
        self.count += 1
        return self.count == self.at or (self.sticky and 0 < self.at < self.count)


def allocates(op: Any) -> bool:
    """Whether an op returns memory of its own: neither a view nor something that it was given."""
    return bool(op._schema.returns) and all(part.alias_info is None for part in op._schema.returns)


# --- interrupts ---


class Waits:
    """Inside, waits for transfers are counted in `count`; at the N-th comes Ctrl-C, while the transfer is still under way."""

    def __init__(self, at: int = 0) -> None:
        self.at, self.count = at, 0

    def __enter__(self) -> Waits:
        real = Ticket.wait

        def wait(ticket: Ticket) -> None:
            self.count += 1
            if self.count == self.at:
                raise KeyboardInterrupt
            real(ticket)

        self._patch = mock.patch.object(Ticket, "wait", wait)
        self._patch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._patch.stop()


# --- death ---


def killed(work: Callable[[], Any]) -> bool:
    """Whether a fork that does the work dies of SIGKILL. Only for processes in which torch has one thread and none of ours runs."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


# --- what must not be left behind ---


def transfer_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mebp-disk"]


def open_files(folder: Path) -> list[str]:
    """What this process holds open below the folder, nameless files included."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return [path for path in found if path.startswith(str(folder.resolve()))]


def names(folder: Path) -> set[str]:
    """Every file and folder below it, by relative path."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@contextlib.contextmanager
def nothing_left(folder: Path) -> Iterator[None]:
    """Whatever happened inside: afterwards there are no transfer threads, no open files, and no more names in the folder than before."""
    assert not _remaining_threads(), "a transfer thread of an earlier test is left"
    assert not open_files(folder)
    before = names(folder)
    yield
    assert not _remaining_threads(), "a transfer thread is left"
    assert not open_files(folder), "files are left open"
    assert names(folder) == before, f"left in the folder: {names(folder) ^ before}"


def _remaining_threads() -> list[threading.Thread]:
    """The transfer threads, once those that were told to end had a moment for it."""
    if transfer_threads():
        gc.collect()
    end = time.monotonic() + ENDING_S
    while transfer_threads() and time.monotonic() < end:
        time.sleep(0.001)
    return transfer_threads()


@contextlib.contextmanager
def no_hang(seconds: int = HANG_S) -> Iterator[None]:
    """Whatever waits for ever inside fails the test, with the stacks of all threads on standard error."""

    def give_up(*_: Any) -> None:
        faulthandler.dump_traceback(sys.__stderr__)
        raise AssertionError(f"still waiting after {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """A failure inside says at which call it was."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"the fault was: {what}")
        raise
