"""Peers that torch.compile makes: its activation memory budget, and its pass that recomputes by tags.

Compiling happens at the first step, which is never timed. Dispatch modes switch compiled code off, so tensors are counted by the allocator's
own record.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from mebp_compile.bench import torch_private
from mebp_compile.bench.unavailable import PeerUnavailable, in_short
from mebp_compile.errors import OptionError

Step = Callable[..., torch.Tensor]
BACKENDS = ("aot_eager", "inductor")
ADVICE = " Set TORCHDYNAMO_VERBOSE"  # how to debug torch, at the end of its messages


def compiled_step(model: torch.nn.Module, step: Step, budget: str) -> Step:
    """`step` with its model compiled by inductor under activation_memory_budget = `budget`, a number from 0 to 1."""
    try:
        share = float(budget)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise OptionError(f"compile:{budget} is no activation memory budget", "write compile:0.5, with a number from 0 to 1")
    torch_private.set_activation_memory_budget(share)
    model.compile()
    return _in_words(step, "torch.compile can't run this model here")


def remat_by_tags_step(model: Any, optimizer: torch.optim.Optimizer, backend: str, remat: bool = True) -> Step:
    """A step whose forward, loss and backward torch.compile takes as one graph, recomputed by tags; the update is eager.

    Every op of a layer is tagged for recompute by transformers' gradient checkpointing, except attention: torch says of it that it draws random
    numbers, dropout or not, and the pass refuses to recompute such ops. `backend`: "aot_eager" runs the graph's own ops one by one, so that
    the pass is all that differs from eager; "inductor" fuses them, and orders them anew.
    """
    if backend not in BACKENDS:
        raise OptionError(f"remat_by_tags:{backend} names no backend", f"use one of {', '.join(BACKENDS)}")
    torch_private.trace_backward(remat)
    choose = functools.partial(create_selective_checkpoint_contexts, _policy)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False, "context_fn": choose})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    @torch.compile(backend=backend, fullgraph=True)
    def gradients(input_ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        loss = model(input_ids=input_ids, labels=labels).loss
        return loss.detach(), torch.autograd.grad(loss, trained)

    def step(input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss, found = gradients(input_ids, labels)
        for parameter, gradient in zip(trained, found, strict=True):
            parameter.grad = gradient
        del found
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return _in_words(step, "torch.compile can't take this step as one graph and recompute by tags")


def _policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if torch_private.is_random(op) else CheckpointPolicy.MUST_RECOMPUTE


def _in_words(step: Step, what: str) -> Step:
    """The step, with torch.compile's errors said in a line."""

    def told(*batch: torch.Tensor) -> torch.Tensor:
        try:
            return step(*batch)
        except torch_private.compile_errors() as error:
            raise PeerUnavailable(f"{what}: {in_short(error).partition(ADVICE)[0]}") from error

    return told
