"""StorageMeter against bytes counted by hand."""

from __future__ import annotations

import gc

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from mebp_compile.measure.meter import StorageMeter

ACTIONS = st.lists(
    st.tuples(st.sampled_from(["new", "view", "add", "inplace", "drop"]), st.integers(0, 9)), max_size=30
)


@settings(max_examples=60, deadline=None)
@given(ACTIONS)
def test_random_programs_match_a_model(actions: list[tuple[str, int]]) -> None:
    """Live and peak equal a model that counts each storage once while any of its views is held."""
    held: list[tuple[torch.Tensor, int]] = []
    sizes: dict[int, int] = {}
    peak = 0
    with StorageMeter() as meter:
        for action, number in actions:
            if action == "new" or not held:
                sizes[len(sizes)] = 40 * (number + 1)
                held.append((torch.zeros(10 * (number + 1)), len(sizes) - 1))
            elif action == "drop":
                held.pop(number % len(held))
            else:
                tensor, owner = held[number % len(held)]
                if action == "view":
                    held.append((tensor[1:] if tensor.numel() > 1 else tensor.view(-1), owner))
                elif action == "inplace":
                    tensor.mul_(2)
                else:
                    result = tensor.contiguous().add(1)
                    sizes[len(sizes)] = 4 * tensor.numel()
                    held.append((result, len(sizes) - 1))
                    del result
                del tensor
            live = sum(sizes[owner] for owner in {owner for _, owner in held})
            peak = max(peak, live)
            assert meter.live_bytes == live
    assert meter.peak_bytes == peak
    held.clear()
    assert meter.live_bytes == 0


def test_outside_tensors_count_only_when_watched() -> None:
    """In-place and out= writes to a tensor made before do not count it; watching counts it once and until it is
    freed.
    """
    outside, buffer = torch.zeros(100), torch.empty(100)
    with StorageMeter() as meter:
        outside.add_(1)
        torch.add(outside, 1, out=buffer)
        assert meter.live_bytes == 0
        meter.watch(outside, outside[10:], buffer)
        torch.add(outside, 1, out=buffer)
        assert meter.live_bytes == 800
        del buffer
        assert meter.live_bytes == 400
    assert meter.peak_bytes == 800


def test_out_buffer_that_grows_is_counted_at_its_new_size() -> None:
    """An out= buffer made empty inside the meter counts the bytes that the op gives it."""
    with StorageMeter() as meter:
        buffer = torch.empty(0)
        torch.add(torch.zeros(50), 1, out=buffer)
        assert meter.live_bytes == 200
        buffer.untyped_storage().resize_(0)
        meter.refresh()
        assert meter.live_bytes == 0


def test_adopt_timeline_and_peak_op() -> None:
    """Adopted bytes add to everything, and the timeline holds one event per op with the bytes live after it."""
    with StorageMeter(timeline=True) as meter:
        meter.adopt(1000)
        a = torch.ones(25)
        b = a * 2
        del a
        c = b + 1
        del b
    events = meter.events or []
    assert [(event.index, event.live_bytes) for event in events] == [(0, 1100), (1, 1200), (2, 1200)]
    assert [event.op for event in events] == ["aten.ones.default", "aten.mul.Tensor", "aten.add.Tensor"]
    assert (meter.peak_bytes, meter.peak_op, meter.live_bytes) == (1200, "aten.mul.Tensor", 1100)
    assert meter.reset_peak() == 1100 == meter.peak_bytes
    del c
    assert meter.live_bytes == 1000


def test_training_step_leaves_exactly_its_state() -> None:
    """After an AdamW step in the meter live is parameters, gradients, two moments and the step counters."""
    with StorageMeter() as meter:
        model = torch.nn.Linear(16, 16)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(3, 16)).sum().backward()
        optimizer.step()
        gc.collect()
        assert meter.live_bytes == 4 * (16 * 17) * 4 + 2 * 4
        optimizer.zero_grad()
        assert meter.live_bytes == 3 * (16 * 17) * 4 + 2 * 4


def test_constants_count_and_fakes_do_not() -> None:
    """torch.tensor makes its storage unseen but counts; meta and fake tensors have no bytes."""
    with StorageMeter() as meter:
        constant = torch.tensor([1.0, 2.0])
        with FakeTensorMode():
            fake = torch.zeros(1000)
        meta = torch.zeros(1000, device="meta")
        assert meter.live_bytes == 8
        assert fake.numel() == meta.numel() == 1000
    del constant
    assert meter.live_bytes == 0
