"""Whole reads and writes from partial system calls, and the typed errors of those that fail."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from mebp_compile.errors import DiskError

CHUNK_BYTES = 8 << 20
FULL = (errno.ENOSPC, errno.EDQUOT)
CLOSED_FIX = "keep the DiskThread open until every ticket has been waited for"


class TransferClosed(DiskError):
    """The thread was closed before this transfer was over."""


def write_all(fd: int, offset: int, view: memoryview, stopped: Callable[[], bool] = lambda: False) -> None:
    """pwrite until every byte is written, at most CHUNK_BYTES a call. DiskError if the disk is full, fails, or
    `stopped()` turns true.
    """
    done = 0
    while done < view.nbytes:
        _check_stopped(stopped, "write")
        try:
            count = os.pwrite(fd, view[done : done + CHUNK_BYTES], offset + done)
        except InterruptedError:
            continue
        except OSError as error:
            raise disk_error(error, "write", view.nbytes - done, offset + done) from error
        if count == 0:
            raise DiskError(
                f"the disk took none of {view.nbytes - done} bytes at offset {offset + done}", "check the disk"
            )
        done += count


def read_all(fd: int, offset: int, view: memoryview, stopped: Callable[[], bool] = lambda: False) -> None:
    """preadv until the view is full, at most CHUNK_BYTES a call. DiskError if the file ends first, on failure, or if
    `stopped()`.
    """
    done = 0
    while done < view.nbytes:
        _check_stopped(stopped, "read")
        try:
            count = os.preadv(fd, [view[done : done + CHUNK_BYTES]], offset + done)
        except InterruptedError:
            continue
        except OSError as error:
            raise disk_error(error, "read", view.nbytes - done, offset + done) from error
        if count == 0:
            raise DiskError(
                f"the file ends at byte {offset + done}, {view.nbytes - done} bytes before the end of a read",
                "the file was truncated: make it again",
            )
        done += count


def disk_error(error: OSError, kind: str, size_bytes: int, offset: int) -> DiskError:
    """The typed error for a failed system call."""
    if error.errno in FULL:
        return DiskError(
            f"disk full: {size_bytes} bytes more are needed at offset {offset} ({error.strerror})",
            "free space on it, or name a folder on another disk",
        )
    name = errno.errorcode.get(error.errno or 0, "unknown error")
    return DiskError(
        f"a {kind} of {size_bytes} bytes at offset {offset} failed: {name} ({error.strerror})", "check the disk"
    )


def _check_stopped(stopped: Callable[[], bool], kind: str) -> None:
    if stopped():
        raise TransferClosed(f"the transfer thread was closed during a {kind}", CLOSED_FIX)
