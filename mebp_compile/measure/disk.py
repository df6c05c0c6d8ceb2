"""What kind of disk a folder is on, and how fast it is for the transfer thread. Torch-free, Linux."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mebp_compile.errors import DiskError
from mebp_compile.measure import cached_read
from mebp_compile.measure.file_io import FULL, disk_error
from mebp_compile.measure.transfer import DiskThread

BLOCK_BYTES = 8 << 20
SMALL_BYTES = 4096
SMALL_READS = 32
OTHER_BYTES = 24 << 20  # half of what passes through the caches between two small reads
CACHED_PASSES = 7
IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")
FOLDER_FIX = "name an existing folder on a disk that you may write to"


@dataclass(frozen=True)
class DiskSpeed:
    """Bandwidths of long transfers in 1-8 MiB blocks (bytes per microsecond = MB/s) and the latency of a small read.

    read: from the disk, after the pages were written back and evicted. write: until the bytes are on the disk (fsync).
    cached_*: the same through the page cache, which is what a scratch file much smaller than the free memory sees, by the caller's threads where
    the library for it was built; its latency is from submitting a small read to having waited for it.
    `evicted` is False where eviction did not work, so that `read_bytes_per_us` and `latency_us` are the cache's, and
    None where that can't be told.
    """

    read_bytes_per_us: float
    write_bytes_per_us: float
    latency_us: float
    cached_read_bytes_per_us: float
    cached_write_bytes_per_us: float
    cached_latency_us: float
    evicted: bool | None
    filesystem: str


def filesystem_type(path: Path) -> str:
    """The type of the file system that holds `path` ("ext4", "tmpfs"), from /proc/mounts; "unknown" without it."""
    try:
        lines = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return "unknown"
    best, found = -1, "unknown"
    real = os.path.realpath(path)
    for line in lines:
        fields = line.split()
        if len(fields) < 3:
            continue
        mount = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[1])
        inside = real == mount or real.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= best:  # of equally long ones the last mounted hides the others
            best, found = len(mount), fields[2]
    return found


def refuse_memory_disk(directory: Path) -> None:
    """Raises DiskError where the folder's file system is RAM: what is offloaded there leaves no memory free."""
    kind = filesystem_type(directory)
    if kind in IN_MEMORY:
        raise DiskError(f"{directory} is on {kind}, which is memory and not a disk", "name a folder on a disk")


@contextlib.contextmanager
def scratch_file(directory: Path, size_bytes: int, preallocate: bool = True) -> Iterator[int]:
    """The descriptor of an open, nameless file of `size_bytes` in `directory`: it is gone when closed, also after a
    crash.
    """
    fd = open_scratch(directory, size_bytes, preallocate)
    try:
        yield fd
    finally:
        os.close(fd)


def open_scratch(directory: Path, size_bytes: int, preallocate: bool = True) -> int:
    """Like `scratch_file`, for an owner who closes the descriptor. Raises DiskError: no such folder, no permission,
    no space.
    """
    _check_space(directory, size_bytes)
    fd = _open_nameless(directory)
    try:
        if preallocate and size_bytes > 0:
            _allocate(fd, size_bytes)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_space(directory: Path, size_bytes: int) -> None:
    try:
        space = os.statvfs(directory)
    except OSError as error:
        raise DiskError(f"can't use the folder {directory}: {error.strerror}", FOLDER_FIX) from error
    available_bytes = space.f_bavail * space.f_frsize
    if size_bytes > available_bytes:
        message = f"disk full: {size_bytes} bytes are needed in {directory} and {available_bytes} are available"
        raise DiskError(message, "free space on it, name a folder on another disk, or offload less")


def _open_nameless(directory: Path) -> int:
    """O_TMPFILE where the file system has it, else a named file that is unlinked at once."""
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC | os.O_EXCL, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
            raise DiskError(f"can't write in the folder {directory}: {error.strerror}", FOLDER_FIX) from error
    try:
        fd, name = tempfile.mkstemp(prefix="mebp-scratch-", dir=directory)
        os.unlink(name)
        return fd
    except OSError as error:
        raise DiskError(f"can't write in the folder {directory}: {error.strerror}", FOLDER_FIX) from error


def _allocate(fd: int, size_bytes: int) -> None:
    """Reserve the blocks now, so that no write of a step can find the disk full; zeros are written where it can't be
    reserved.
    """
    try:
        os.posix_fallocate(fd, 0, size_bytes)
        return
    except OSError as error:
        if error.errno in FULL or error.errno == errno.EIO:
            raise disk_error(error, "write", size_bytes, 0) from error
    zeros = memoryview(bytes(min(size_bytes, 1 << 20)))
    with DiskThread() as thread:
        for offset in range(0, size_bytes, len(zeros)):
            thread.submit_write(fd, offset, zeros[: size_bytes - offset]).wait()


# ---- speed ----


def measure_disk(directory: Path | str, size_bytes: int = 64 << 20, allow_tmpfs: bool = False) -> DiskSpeed:
    """Write and read a nameless file of `size_bytes` in `directory` through a DiskThread, in its own order and block
    size.

    Raises DiskError: no space, no folder, tmpfs (unless `allow_tmpfs`). Figures vary by tens of per cent from run to
    run.
    """
    folder = Path(directory)
    if not allow_tmpfs:
        refuse_memory_disk(folder)
    blocks = [(offset, min(BLOCK_BYTES, size_bytes - offset)) for offset in range(0, size_bytes, BLOCK_BYTES)]
    block = random.Random(0).randbytes(min(BLOCK_BYTES, max(size_bytes, SMALL_BYTES)))
    memory = memoryview(bytearray(block * len(blocks)))  # each block its own, as in a step: memory that stays in the caches is twice as fast
    at_once = cached_read.library() is not None
    with scratch_file(folder, max(size_bytes, SMALL_BYTES)) as fd, DiskThread() as thread, DiskThread(at_once=at_once) as cached:

        def write() -> None:
            _each(cached.submit_write, fd, blocks, memory)
            cached.drain()

        def write_and_sync() -> None:
            _each(thread.submit_write, fd, blocks, memory)
            thread.submit(lambda: os.fsync(fd)).wait()

        def read(through: DiskThread) -> None:
            _each(through.submit_read, fd, blocks, memory)
            through.drain()

        durable_write, cache_write = _rate(size_bytes, write_and_sync), _usual_rate(size_bytes, write)
        evicted = _evict(fd)
        cold_read, cache_read = _rate(size_bytes, lambda: read(thread)), _usual_rate(size_bytes, lambda: read(cached))
        cache_latency = _round_trip_us(cached, fd)
        _evict(fd)
        latency = _latency_us(fd, max(size_bytes, SMALL_BYTES))
    return DiskSpeed(cold_read, durable_write, latency, cache_read, cache_write, cache_latency, evicted, filesystem_type(folder))


def _each(
    submit: Callable[[int, int, memoryview], object], fd: int, blocks: list[tuple[int, int]], memory: memoryview
) -> None:
    for offset, size in blocks:
        submit(fd, offset, memory[offset : offset + size])


def _rate(size_bytes: int, work: Callable[[], object]) -> float:
    start_ns = time.perf_counter_ns()
    work()
    return size_bytes / max((time.perf_counter_ns() - start_ns) / 1000, 1.0)


def _usual_rate(size_bytes: int, work: Callable[[], object]) -> float:
    """The median of CACHED_PASSES, each of which takes a few milliseconds, or many where others use the machine."""
    return statistics.median(_rate(size_bytes, work) for _ in range(CACHED_PASSES))


def _evict(fd: int) -> bool | None:
    """Write the file back and drop its pages; True if they are gone, None if that can't be told."""
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError:
        return False
    try:
        os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def _round_trip_us(thread: DiskThread, fd: int) -> float:
    """Median time of a 4 KiB read of what the page cache holds. Between two of them other memory goes through the caches, as in a step, which
    comes back to Python's code when ops have thrown it out of them."""
    buffer, samples, other = memoryview(bytearray(SMALL_BYTES)), [], bytearray(OTHER_BYTES)
    for _ in range(SMALL_READS):
        bytes(other)
        start_ns = time.perf_counter_ns()
        thread.submit_read(fd, 0, buffer).wait()
        samples.append((time.perf_counter_ns() - start_ns) / 1000)
    return statistics.median(samples)


def _latency_us(fd: int, size_bytes: int) -> float:
    """Median time of a 4 KiB read at random places."""
    places = random.Random(0)
    buffer, samples = bytearray(SMALL_BYTES), []
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    for _ in range(SMALL_READS):
        offset = places.randrange(max(1, size_bytes // SMALL_BYTES)) * SMALL_BYTES
        start_ns = time.perf_counter_ns()
        os.preadv(fd, [buffer], offset)
        samples.append((time.perf_counter_ns() - start_ns) / 1000)
    return statistics.median(samples)
