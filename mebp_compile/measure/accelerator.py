"""An accelerator as a step uses it: its memory, pinned host memory, and copies between the two on streams of their own.

What the program computes goes, in its order, to the stream that is current when the step is called; copies go to two more, one for each
direction, so that they overlap with it. Three edges order everything:

    a copy begins after all that the compute stream had been given when it was issued
    what the compute stream is given after `wait` begins after the copy
    copies of one direction come one after the other

So host memory may be reused as soon as the schedule says so, and the accelerator's as soon as a copy was waited for: both uses are ordered
through the compute stream. The Python thread blocks nowhere in a step. torch.cuda has streams, events and generators; any device whose
module has the same names works.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch

READ, WRITE = "read", "write"  # to the accelerator's memory, to the host's


class Copy:
    """A copy under way. It holds both its ends, so that neither is given to others before `wait`."""

    def __init__(self, kind: str, ends: tuple[torch.Tensor, torch.Tensor], event: Any, accelerator: Accelerator) -> None:
        self.kind = kind
        self._ends: tuple[torch.Tensor, ...] = ends
        self._event, self._accelerator = event, accelerator

    @property
    def done(self) -> bool:
        """Whether it is over; until then its ends must stay."""
        return bool(self._event.query())

    def wait(self) -> None:
        """What the compute stream is given from now on finds it complete. Does not block."""
        self._accelerator.compute_stream().wait_event(self._event)
        self._ends = ()


@functools.cache
def accelerator_of(place: str) -> Accelerator | None:
    """The accelerator of a place ("cuda:0"), one object for each, with its streams; nothing for the CPU."""
    return Accelerator(place) if place else None


class Accelerator:
    """One device. Raises RuntimeError where torch has no such device here."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.module: Any = torch.get_device_module(self.device)
        self._streams = {kind: self.module.Stream(self.device) for kind in (READ, WRITE)}

    @property
    def name(self) -> str:
        """What the device is called: "NVIDIA H100 80GB HBM3"."""
        return str(self.module.get_device_name(self.device))

    def compute_stream(self) -> Any:
        """The stream on which the program computes: the caller's own."""
        return self.module.current_stream(self.device)

    def empty(self, size_bytes: int) -> torch.Tensor:
        """Bytes on the device."""
        return torch.empty(size_bytes, dtype=torch.uint8, device=self.device)

    def pinned(self, size_bytes: int) -> torch.Tensor:
        """Bytes of host memory that copies may read and write while the host goes on: exactly so many. torch's own allocator of such memory rounds up
        to a power of two, so where CUDA's runtime is at hand plain memory is registered with it. Raises RuntimeError where it can't be had."""
        if not hasattr(self.module, "cudart"):
            return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
        memory, runtime = torch.empty(size_bytes, dtype=torch.uint8), self.module.cudart()
        if size_bytes:
            self.module.check_error(int(runtime.cudaHostRegister(memory.data_ptr(), size_bytes, 0)))
            weakref.finalize(memory, runtime.cudaHostUnregister, memory.data_ptr())
        return memory

    def copy(self, kind: str, to: torch.Tensor, source: torch.Tensor) -> Copy:
        """Begin to copy bytes in the given direction."""
        stream, event = self._streams[kind], self.module.Event()
        stream.wait_stream(self.compute_stream())
        with self.module.stream(stream):
            to.copy_(source, non_blocking=True)
            event.record(stream)
        return Copy(kind, (to, source), event, self)

    def finish(self) -> None:
        """Block until the device has done everything that it was given."""
        self.module.synchronize(self.device)

    def allocated_bytes(self) -> int:
        """What the device's allocator has given out now."""
        return int(self.module.memory_allocated(self.device))

    def reset_peak(self) -> int:
        """Begin to look for a peak; gives what is given out now."""
        self.module.reset_peak_memory_stats(self.device)
        return self.allocated_bytes()

    def peak_bytes(self) -> int:
        """The most that the allocator had given out since `reset_peak`."""
        return int(self.module.max_memory_allocated(self.device))

    def random_state(self) -> torch.Tensor:
        """The state of the device's default generator."""
        state: torch.Tensor = self.module.get_rng_state(self.device)
        return state

    def set_random_state(self, state: torch.Tensor) -> None:
        self.module.set_rng_state(state, self.device)
