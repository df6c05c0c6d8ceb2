"""Exact live and peak bytes of torch storages, from torch's own dispatcher. The other meters are re-exported here.

Which meter for what: `StorageMeter` counts storages to the byte and names the op; `MallocMeter` adds workspaces and
malloc's rounding; `PeakRss` is what the operating system charges. Checked against each other in tests/measure.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from mebp_compile.measure.malloc_meter import MallocMeter, preload_environment
from mebp_compile.measure.process import PeakRss, Rss, limit_data, malloc_trim, reset_peak, rss, set_malloc_thresholds

__all__ = [
    "Event",
    "MallocMeter",
    "PeakRss",
    "Rss",
    "StorageMeter",
    "limit_data",
    "malloc_trim",
    "preload_environment",
    "reset_peak",
    "rss",
    "set_malloc_thresholds",
]

ALWAYS_NEW = (
    torch.ops.aten.lift_fresh.default,
)  # torch.tensor(...) makes its storage unseen and then passes it through here


@dataclass(frozen=True)
class Event:
    """After the op at `index` (counted from 0) the live storages held `live_bytes`."""

    index: int
    op: str
    live_bytes: int


class StorageMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that ops create while the context is active, each once however many views it has, until it
    is freed.

    `live_bytes`, `peak_bytes` and, with `timeline=True`, `events`: one Event per op. A storage freed after the exit
    is still taken off. A tensor made outside counts only if `watch`ed, also when an op writes to it; state known by
    its size alone is `adopt`ed. Granularity is the op: workspaces freed inside one op are malloc's to see. Meta and
    fake tensors hold no bytes and are ignored. A storage resized through `untyped_storage().resize_` is noticed at
    the next op that touches it, or by `refresh()`.
    """

    def __init__(self, timeline: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak_bytes = 0
        self.peak_op = ""
        self.op_count = 0
        self.events: list[Event] | None = [] if timeline else None
        self._sizes: dict[int, int] = {}
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._lock = threading.RLock()  # a finaliser may run inside any allocation, in any thread

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = list(_storages((args, kwargs)))
        outputs = func(*args, **(kwargs or {}))
        known = set() if func in ALWAYS_NEW else {storage._cdata for storage in inputs}
        with self._lock:
            for storage in inputs:
                if storage._cdata in self._sizes:
                    self._count(storage)
            for storage in _storages(outputs):
                if storage._cdata in self._sizes or storage._cdata not in known:
                    self._count(storage)
            self._raise_peak(str(func))
            if self.events is not None:
                self.events.append(Event(self.op_count, str(func), self.live_bytes))
            self.op_count += 1
        return outputs

    def watch(self, *tensors: torch.Tensor) -> None:
        """Count these tensors' storages (once each, however often watched) from now until they are freed."""
        with self._lock:
            for storage in _storages(tensors):
                self._count(storage)
            self._raise_peak("watch")

    def adopt(self, storage_bytes: int) -> None:
        """Add bytes that are known to be live throughout, such as an arena or a library's buffers; negative takes
        them off.
        """
        with self._lock:
            self.live_bytes += storage_bytes
            self._raise_peak("adopt")

    def refresh(self) -> None:
        """Look at the present size of every counted storage."""
        with self._lock:
            for reference in list(self._storages.values()):
                storage = reference()
                if storage is not None:
                    self._count(storage)
            self._raise_peak("refresh")

    def reset_peak(self) -> int:
        """Set the peak to the bytes live now, and return them."""
        with self._lock:
            self.peak_bytes, self.peak_op = self.live_bytes, ""
            return self.live_bytes

    def _raise_peak(self, op: str) -> None:
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes, self.peak_op = self.live_bytes, op

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size_bytes = storage._cdata, storage.nbytes()
        if key not in self._sizes:
            # torch keeps one Python object for a storage's whole life, so this fires when the bytes are freed
            weakref.finalize(storage, self._forget, key).atexit = False
            self._storages[key] = weakref.ref(storage)
        self.live_bytes += size_bytes - self._sizes.get(key, 0)
        self._sizes[key] = size_bytes

    def _forget(self, key: int) -> None:
        with self._lock:
            self.live_bytes -= self._sizes.pop(key)
            self._storages.pop(key)


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    """The storages with bytes of all tensors in a pytree; those inside wrapper subclasses too."""
    for leaf in tree_leaves(tree):
        if not isinstance(leaf, torch.Tensor):
            continue
        if is_traceable_wrapper_subclass(leaf):
            names, _ = leaf.__tensor_flatten__()
            yield from _storages([getattr(leaf, name) for name in names])
        elif (
            leaf.layout is torch.strided and leaf.device.type != "meta" and leaf.untyped_storage().device.type != "meta"
        ):
            yield leaf.untyped_storage()
