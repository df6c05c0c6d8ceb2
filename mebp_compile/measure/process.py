"""What the operating system says this process holds: RSS, its peak, malloc's thresholds, and a hard limit.
Torch-free, Linux.

`VmHWM` is the peak of anonymous *and* file pages: importing a library or reading a mapped file raises it. Budgets are
about anonymous memory, whose peak the kernel does not keep, so `PeakRss` reports both: the kernel's exact VmHWM and a
sampled anonymous peak.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType

from mebp_compile.errors import MeasureError

M_TRIM_THRESHOLD = -1  # <malloc.h>
M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8
PR_SET_THP_DISABLE = 41  # <linux/prctl.h>
RESET_PEAK = b"5"  # proc(5), clear_refs: reset the peak resident set size to the current one
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
SMALL_HEAP = {"glibc.malloc.tcache_count": 0, "glibc.malloc.mxfast": 0}
LINUX_FIX = "run on Linux with /proc mounted, or use the StorageMeter, which needs neither"


@dataclass(frozen=True)
class Rss:
    """Bytes from /proc/self/status: RssAnon, RssFile, VmHWM (peak of both together) and VmData (what RLIMIT_DATA
    limits).
    """

    anon_bytes: int
    file_bytes: int
    peak_bytes: int
    data_bytes: int


def rss() -> Rss:
    """This process's memory now. Raises MeasureError where /proc/self/status can't be read or lacks a field."""
    wanted = ("RssAnon", "RssFile", "VmHWM", "VmData")
    try:
        with open("/proc/self/status") as status:
            fields = dict(line.split(":", 1) for line in status)
        return Rss(*(int(fields[name].split()[0]) * 1024 for name in wanted))
    except (OSError, KeyError, ValueError, IndexError) as error:
        raise MeasureError(f"/proc/self/status does not give {', '.join(wanted)}: {error!r}", LINUX_FIX) from error


def available_memory_bytes() -> int:
    """What the system could give without swapping (MemAvailable); 0 where that can't be told."""
    try:
        with open("/proc/meminfo") as info:
            return next((int(line.split()[1]) * 1024 for line in info if line.startswith("MemAvailable:")), 0)
    except (OSError, ValueError, IndexError):
        return 0


def reset_peak() -> bool:
    """Set VmHWM to what is resident now; False where the kernel or the container doesn't allow it."""
    try:
        with open("/proc/self/clear_refs", "wb") as clear_refs:
            clear_refs.write(RESET_PEAK)
    except OSError:
        return False
    return True


class PeakRss:
    """Peak memory of this process while the context is active.

    After the exit: `before` and `after` (Rss), `peak_rss_bytes` (VmHWM: exact, includes file pages; None where it
    can't be reset) and `peak_anon_bytes` (the largest of samples every `interval_s`: a shorter spike can be missed,
    so it is a lower bound).
    """

    def __init__(self, interval_s: float = 0.001) -> None:
        self.interval_s = interval_s
        self.peak_anon_bytes = 0
        self.peak_rss_bytes: int | None = None
        self._stop = threading.Event()

    def __enter__(self) -> PeakRss:
        if self._stop.is_set():
            raise MeasureError("this PeakRss was used before", "make a new one for each measurement")
        self._reset = reset_peak()
        self.before = rss()
        self.peak_anon_bytes = self.before.anon_bytes
        self._thread = threading.Thread(target=self._sample, name="mebp-rss", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.after = rss()
        self.peak_anon_bytes = max(self.peak_anon_bytes, self.after.anon_bytes)
        self.peak_rss_bytes = self.after.peak_bytes if self._reset else None

    def _sample(self) -> None:
        """Sample until told to stop."""
        file = os.open("/proc/self/statm", os.O_RDONLY)
        try:
            while not self._stop.wait(self.interval_s):
                self.peak_anon_bytes = max(self.peak_anon_bytes, anon_bytes(file))
        finally:
            os.close(file)


def set_malloc_thresholds(mmap_bytes: int = 65536, trim_bytes: int = 65536) -> bool:
    """Make glibc map blocks of `mmap_bytes` and more on their own and give free heap above `trim_bytes` back at once.

    RSS then follows the bytes in use, at the price of page faults (capture.md: 112 MB of RSS instead of 217 for a
    tensor peak of 112). It also stops glibc from raising the threshold by itself. False where the C library has no
    mallopt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, mmap_bytes)) and bool(mallopt(M_TRIM_THRESHOLD, trim_bytes))


def small_heap(environment: Mapping[str, str]) -> dict[str, str]:
    """The variable of a process in which glibc keeps no thread caches and no fast bins; what the environment says of either stays. What an aligned
    allocation cuts off in front of it would lie there, and keep the free space around it from joining: blocks of 0.1 to 4 MiB, a few MB at a time,
    spread over 20 to 70 MB (decisions/0024)."""
    present = environment.get("GLIBC_TUNABLES", "")
    wanted = [f"{name}={value}" for name, value in SMALL_HEAP.items() if name not in present]
    return {"GLIBC_TUNABLES": ":".join(filter(None, (present, *wanted)))}


def restart_with_small_heap() -> None:
    """Start this process anew with `small_heap`, once: glibc reads it when a process begins. Does nothing with another C library."""
    wanted = small_heap(os.environ)
    if "CS_GNU_LIBC_VERSION" in os.confstr_names and wanted["GLIBC_TUNABLES"] != os.environ.get("GLIBC_TUNABLES"):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **wanted})


def spare_memory() -> None:
    """For the rest of this process: one malloc arena for all threads, and no huge pages, of which a few used bytes would charge 2 MiB.

    Works best before the first thread starts. Silently does what the C library and the kernel allow.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(M_ARENA_MAX, 1)
    if hasattr(library, "prctl"):
        library.prctl(PR_SET_THP_DISABLE, *map(ctypes.c_ulong, (1, 0, 0, 0)))


def anon_bytes(statm: int) -> int:
    """Anonymous memory of this process now; `statm` is a descriptor of /proc/self/statm, whose resident minus shared pages is RssAnon. One
    pread of a kept file is the cheapest way to ask."""
    resident, shared = os.pread(statm, 256, 0).split()[1:3]
    return (int(resident) - int(shared)) * PAGE_BYTES


def malloc_trim() -> bool:
    """Give malloc's free pages back to the system; True if any were, False otherwise or where the C library can't."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and bool(trim(ctypes.c_size_t(0)))


@contextlib.contextmanager
def limit_data(limit_bytes: int) -> Iterator[None]:
    """RLIMIT_DATA at `limit_bytes` inside the context: an allocation that takes VmData above it fails cleanly, in
    torch as a RuntimeError.

    VmData is more than RssAnon (reserved thread stacks count): warm up, then pass `rss().data_bytes + headroom`.
    Raises MeasureError where the limit is below what is used already (the kernel would accept that, and the next
    malloc would fail).
    """
    used_bytes = rss().data_bytes
    if limit_bytes < used_bytes:
        raise MeasureError(
            f"a limit of {limit_bytes} bytes is below the {used_bytes} in use", "pass rss().data_bytes + headroom"
        )
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard not in (resource.RLIM_INFINITY, -1) and limit_bytes > hard:
        raise MeasureError(
            f"a limit of {limit_bytes} bytes is above the hard limit of {hard}", "raise it with `ulimit -Hd`"
        )
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
