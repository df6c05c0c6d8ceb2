"""Slots in host memory and the copies of an accelerator, on a fake one: any legal order of its streams gives the same bytes."""

from __future__ import annotations

import functools
import gc

import pytest
import torch
from fake_accelerator import COMPUTE, FakeAccelerator
from hypothesis import given
from hypothesis import strategies as st

from mebp_compile.errors import DiskError, MeasureError, OutOfMemory
from mebp_compile.measure.accelerator import READ, WRITE, Accelerator
from mebp_compile.measure.memory import flat_bytes
from mebp_compile.runtime.engine import Engine
from mebp_compile.runtime.host_slots import ALIGN, HostSlots
from mebp_compile.runtime.memory import memory_errors
from mebp_compile.runtime.slots import Slot, slots_of

SIZES = {"a": 400, "b": 200, "c": 64}


def slots_on(accelerator: FakeAccelerator) -> HostSlots:
    slots, capacity_bytes = slots_of(SIZES, ALIGN)
    return HostSlots(capacity_bytes, slots, accelerator)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=30), st.booleans())
def test_what_comes_back_is_what_was_offloaded(moves: list[tuple[str, bool]], late: bool) -> None:
    """Any order of offloads and prefetches returns each slot's latest bytes; what a transfer was waited for may be overwritten at once."""
    latest: dict[str, torch.Tensor] = {}
    with slots_on(FakeAccelerator(late)) as store:
        for number, (name, write) in enumerate(moves):
            elements = SIZES[name] // 2
            if write or name not in latest:
                latest[name] = torch.full((elements,), number + 0.5, dtype=torch.bfloat16)
                tensor = latest[name].clone()
                store.offload(name, tensor)
                store.wait(name)
                tensor.zero_()
            else:
                buffer = torch.empty(elements, dtype=torch.bfloat16)
                store.prefetch(name, buffer)
                store.wait(name)
                assert torch.equal(buffer, latest[name])


@pytest.mark.parametrize("late", [False, True])
def test_only_a_wait_makes_it_so(late: bool) -> None:
    """Between `offload` and `wait` a late copy reads what is written over it; between `prefetch` and `wait` the buffer is not there yet: the fake
    punishes both."""
    with slots_on(FakeAccelerator(late)) as store:
        tensor, buffer = torch.ones(100), torch.zeros(100)
        store.offload("a", tensor)
        tensor.zero_()
        store.wait("a")
        store.prefetch("a", buffer)
        before = buffer.clone()
        store.wait("a")
        assert bool((buffer == (0.0 if late else 1.0)).all())
        assert torch.equal(before, torch.zeros(100) if late else buffer)


def test_the_edges_between_streams() -> None:
    """Each copy waits for the compute stream, and the compute stream for each copy that is waited for. The host waits for nothing."""
    accelerator = FakeAccelerator(late=True)
    store = slots_on(accelerator)
    store.offload("a", torch.ones(100))
    store.wait("a")
    store.prefetch("a", torch.empty(100))
    store.wait("a")
    assert accelerator.module.log == [
        (WRITE, "waits for", COMPUTE), (WRITE, "copies", 400), (COMPUTE, "waits for", WRITE),
        (READ, "waits for", COMPUTE), (READ, "copies", 400), (COMPUTE, "waits for", READ),
    ]  # fmt: skip


def test_an_ended_copy_lets_go_of_its_ends() -> None:
    """Not before: their memory would be given to others while it is read."""
    accelerator = FakeAccelerator(late=True)
    copy = accelerator.copy(WRITE, torch.empty(8, dtype=torch.uint8), torch.ones(8, dtype=torch.uint8))
    assert not copy.done
    assert len(copy._ends) == 2
    copy.wait()
    assert copy.done
    assert copy._ends == ()


def test_wrong_orders_are_refused() -> None:
    """As on disk: a slot that holds nothing, a second transfer of one, another size, no slot, a closed store."""
    store = slots_on(FakeAccelerator(late=True))
    with pytest.raises(DiskError, match="never written"):
        store.prefetch("a", torch.empty(100))
    store.offload("a", torch.ones(100))
    with pytest.raises(DiskError, match="a write of its slot is still on its way"):
        store.prefetch("a", torch.empty(100))
    with pytest.raises(DiskError, match="its slot 200"):
        store.offload("b", torch.ones(3))
    with pytest.raises(DiskError, match="no slot"):
        store.offload("z", torch.ones(3))
    with pytest.raises(MeasureError, match="gaps"):
        store.offload("c", torch.ones(32)[::2])
    store.close()
    assert store.pending == ()
    with pytest.raises(DiskError, match="closed"):
        store.offload("a", torch.ones(100))
    with pytest.raises(DiskError, match="outside"):
        HostSlots(10, {"a": Slot(0, 11)}, FakeAccelerator(late=True))


def test_parts_and_filled_slots() -> None:
    """What the host put in a slot between steps can be read whole and in parts."""
    store = slots_on(FakeAccelerator(late=True))
    store.fill("a").copy_(flat_bytes(torch.arange(100, dtype=torch.float32)))
    part, whole = torch.empty(10), torch.empty(100)
    store.read_part("a", 80, part)
    store.prefetch("a", whole)
    store.wait("a")
    assert torch.equal(part, torch.arange(20.0, 30.0))
    assert torch.equal(whole, torch.arange(100.0))
    with pytest.raises(DiskError, match="can't be read now"):
        store.read_part("b", 0, part)


@pytest.mark.parametrize("shape", [(4, 6), (0,), ()])
def test_flat_bytes_of_any_order_of_dimensions(shape: tuple[int, ...]) -> None:
    """A transposed tensor's bytes are those of its memory."""
    tensor = torch.randn(shape)
    turned = tensor.t() if tensor.dim() == 2 else tensor
    assert flat_bytes(turned).numel() == tensor.nbytes
    assert torch.equal(flat_bytes(turned), flat_bytes(tensor))
    assert flat_bytes(turned).data_ptr() == tensor.data_ptr()


class Runtime:
    """CUDA's runtime, which knows what is registered."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size_bytes: int, flags: int) -> int:
        self.registered[address] = size_bytes
        return 0 if size_bytes < 1 << 20 else 2

    def cudaHostUnregister(self, address: int) -> int:
        return self.registered.pop(address) * 0


def test_pinned_memory_is_exact_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered to the byte, and no longer once its store is closed; refused, it is an error."""
    accelerator, runtime = FakeAccelerator(late=True), Runtime()
    monkeypatch.setattr(accelerator, "pinned", functools.partial(Accelerator.pinned, accelerator))
    monkeypatch.setattr(accelerator.module, "cudart", lambda: runtime, raising=False)
    monkeypatch.setattr(accelerator.module, "check_error", check_error, raising=False)
    store = slots_on(accelerator)
    assert list(runtime.registered.values()) == [slots_of(SIZES, ALIGN)[1]]
    store.close()
    gc.collect()
    assert not runtime.registered
    with pytest.raises(RuntimeError, match="code 2"):
        accelerator.pinned(1 << 20)


def check_error(code: int) -> None:
    if code:
        raise RuntimeError(f"CUDA error: out of memory, code {code}")


def test_draws_are_replayed_from_both_generators() -> None:
    """An engine on an accelerator keeps the state of the device's generator beside the CPU's."""
    accelerator = FakeAccelerator(late=True)
    engine = Engine(None, {}, 1024, random=True, accelerator=accelerator)  # type: ignore[arg-type]
    engine.begin()
    engine.rng_save("draw")
    first, on_device = torch.rand(3), accelerator.random_state()
    accelerator.set_random_state(on_device + 1)
    after = accelerator.random_state()
    engine.rng_replay("draw")
    assert torch.equal(accelerator.random_state(), on_device)
    assert torch.equal(torch.rand(3), first)
    engine.rng_return()
    assert torch.equal(accelerator.random_state(), after)
    engine.abandon()
    assert torch.equal(accelerator.random_state(), on_device)


def test_places_in_the_arena() -> None:
    """Of any dtype and geometry, in the device's memory."""
    engine = Engine(None, {}, 4096, accelerator=FakeAccelerator(late=True))  # type: ignore[arg-type]
    plain = engine.at(512, (3, 4), torch.bfloat16).fill_(1.5)
    turned = engine.at(1024, (3, 4), torch.float32, (1, 3)).fill_(2.0)
    assert plain.data_ptr() == engine.arena.data_ptr() + 512
    assert turned.stride() == (1, 3)
    assert bool((engine.arena[512:536].view(torch.bfloat16) == 1.5).all())
    assert engine.new((2,), torch.int64, (1,)).device == engine.device


@pytest.mark.parametrize("text", ["CUDA out of memory. Tried to allocate 2.00 GiB", "CUDA error: out of memory"])
def test_no_memory_left_there(text: str) -> None:
    """torch's error becomes the typed one, which says what to do."""
    with pytest.raises(OutOfMemory, match="making the arena"), memory_errors("making the arena"):
        raise RuntimeError(text)
