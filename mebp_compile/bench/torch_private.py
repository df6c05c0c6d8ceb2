"""The private torch APIs that the peers of `mebp bench` need, for torch 2.13: torch.compile's memory options, and the profiler's record of
allocations. `tests/test_bench.py` fails when one of them moves.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def compile_errors() -> tuple[type[Exception], ...]:
    """What torch.compile raises where it can't compile: graph breaks, backends that fail, no C++ compiler."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    return (TorchDynamoException, CppCompileError, InvalidCxxCompiler)


def set_activation_memory_budget(share: float) -> None:
    """What torch.compile may keep of a forward from now on: 0 is full recompute, 1 is its default."""
    import torch._functorch.config

    torch._functorch.config.activation_memory_budget = share


def trace_backward(remat: bool) -> None:
    """From now on torch.compile takes forward, loss and backward as one graph where a function calls torch.autograd.grad; with `remat` its pass
    `remat_using_tags_for_fwd_loss_bwd_graph` recomputes what is tagged by a checkpoint right before the backward op that reads it."""
    import torch._dynamo.config
    import torch._functorch.config

    torch._dynamo.config.trace_autograd_ops = True
    torch._functorch.config.remat_using_tags_for_fwd_loss_bwd_graph = remat


def allocated_peak(call: Callable[[], Any]) -> int:
    """The most bytes above the start that torch's CPU allocator had handed out at once during the call.

    For steps under torch.compile: a dispatch mode such as `StorageMeter` would switch compiled code off.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    assert record.profiler is not None
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((int(event.nbytes()) for event in events), initial=0))


def is_random(op: Any) -> bool:
    """Whether torch says that an op may draw random numbers. Attention carries that tag with and without dropout."""
    return torch.Tag.nondeterministic_seeded in getattr(op, "tags", ())
