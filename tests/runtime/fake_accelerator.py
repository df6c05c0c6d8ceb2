"""An accelerator made of CPU memory, to run programs for one where there is none: the class under test with a module in torch.cuda's place whose
streams keep to the rules of real ones and use all the freedom that the rules leave.

What is computed runs at once, which is one legal order. A copy may run as early as its stream allows (`late` False), so that one issued too early
overwrites what is still read, or as late as possible (`late` True: only when something that was told to wait for it is given more to do), so that
one that nobody waits for comes too late. `log` is what was asked for, in order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mebp_compile.measure.accelerator import READ, WRITE, Accelerator

COMPUTE = "compute"


class Stream:
    """A queue of work. The compute stream's is always empty: its work is done when it is given."""

    def __init__(self, module: Module, name: str) -> None:
        self.module, self.name = module, name
        self.queue: list[Callable[[], None]] = []
        self.done = 0  # of all that it was ever given

    @property
    def given(self) -> int:
        return self.done + len(self.queue)

    def give(self, work: Callable[[], None]) -> None:
        self.queue.append(work)
        if not self.module.late or self.name == COMPUTE:
            self.run_until(self.given)

    def run_until(self, position: int) -> None:
        while self.done < position:
            self.queue[0]()
            del self.queue[0]
            self.done += 1

    def wait_stream(self, other: Stream) -> None:
        self.module.log.append((self.name, "waits for", other.name))
        position = other.given
        self.give(lambda: other.run_until(position))

    def wait_event(self, event: Event) -> None:
        assert event.stream is not None, "an event that was never recorded"
        self.module.log.append((self.name, "waits for", event.stream.name))
        stream, position = event.stream, event.position
        self.give(lambda: stream.run_until(position))


class Event:
    def __init__(self) -> None:
        self.stream: Stream | None = None
        self.position = 0

    def record(self, stream: Stream) -> None:
        self.stream, self.position = stream, stream.given

    def query(self) -> bool:
        return self.stream is None or self.stream.done >= self.position


class _OntoStream(TorchDispatchMode):
    """Copies inside go to the stream's queue."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is torch.ops.aten.copy_.default, f"{func} on a copy stream"
        to, source = args[0], args[1]
        module = self.stream.module
        module.log.append((self.stream.name, "copies", to.numel()))

        def work() -> None:
            torch.ops.aten.copy_.default(to, source)

        self.stream.give(work)
        return to


class Module:
    """What the class under test asks of torch.cuda."""

    Event = Event

    def __init__(self, late: bool) -> None:
        self.late = late
        self.log: list[tuple[Any, ...]] = []
        self.compute = Stream(self, COMPUTE)
        self.streams: list[Stream] = []
        self.state = torch.arange(16, dtype=torch.uint8)

    def Stream(self, device: Any) -> Stream:
        self.streams.append(Stream(self, f"stream {len(self.streams)}"))
        return self.streams[-1]

    def current_stream(self, device: Any) -> Stream:
        return self.compute

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        with _OntoStream(stream):
            yield

    def synchronize(self, device: Any) -> None:
        for stream in self.streams:
            stream.run_until(stream.given)

    def get_rng_state(self, device: Any) -> torch.Tensor:
        return self.state.clone()

    def set_rng_state(self, state: torch.Tensor, device: Any) -> None:
        self.state = state.clone()

    def get_device_name(self, device: Any) -> str:
        return "a fake accelerator"

    def memory_allocated(self, device: Any) -> int:
        return 0

    def max_memory_allocated(self, device: Any) -> int:
        return 0

    def reset_peak_memory_stats(self, device: Any) -> None: ...


class FakeAccelerator(Accelerator):
    """The real class on CPU memory."""

    def __init__(self, late: bool) -> None:
        self.device = torch.device("cpu")
        self.module = Module(late)
        self._streams = {kind: self.module.Stream(self.device) for kind in (READ, WRITE)}
        for kind, stream in self._streams.items():
            stream.name = kind
        self.pinned_bytes: list[int] = []

    def pinned(self, size_bytes: int) -> torch.Tensor:
        self.pinned_bytes.append(size_bytes)
        return torch.full((size_bytes,), 0xFF, dtype=torch.uint8)
