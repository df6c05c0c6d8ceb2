"""Lowering: storages, views, order, dead ops, split updates, and out= kernels that give the same bits."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from models import FAMILIES, OPTIMIZERS, Recipe
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mebp_compile.capture import Traced, capture, find_state
from mebp_compile.errors import Unsupported
from mebp_compile.graph import PERSISTENT, Graph, inputs_of, versions
from mebp_compile.lower import _Lowering, lower
from mebp_compile.lower.naming import Namer
from mebp_compile.lower.order import early_updates, predecessors, without_dead_ops
from mebp_compile.lower.out_kernels import out_kernel

RECIPES = {
    **{family: Recipe(family, dropout=0.1) for family in FAMILIES},
    "clip": Recipe("gpt2", clip=1.0, zero="first", optimizer="adamw-foreach"),
    "lora": Recipe("llama", lora="float32", lora_dropout=0.1, optimizer="sgd-momentum"),
    "micro": Recipe("gpt2", micro_batches=2, zero="never", optimizer="sgd"),
}


@cache
def traced(name: str) -> Traced:
    training = RECIPES[name].build()
    return capture(training.step, find_state(training.step), training.batch(0), {})


@cache
def raw(name: str) -> Graph:
    """As filed, before dead ops go and updates move."""
    return _Lowering(traced(name), "step").graph()


@cache
def lowered(name: str) -> Graph:
    return lower(traced(name))


def small(step: Any, *batch: torch.Tensor) -> Graph:
    return lower(capture(step, find_state(step), batch, {}))


# --- order ---


@pytest.mark.parametrize("name", RECIPES)
def test_moving_updates_keeps_every_dependency(name: str) -> None:
    """After the reordering each op reads the very versions of storages that it read before, and draws come in the same order."""
    before, after = without_dead_ops(raw(name)), lowered(name)
    assert sorted(op.name for op in before.ops) == sorted(op.name for op in after.ops)
    old = {op.name: seen for op, seen in zip(before.ops, versions(before)[0], strict=True)}
    new = {op.name: seen for op, seen in zip(after.ops, versions(after)[0], strict=True)}
    assert old == new
    assert versions(before)[1] == versions(after)[1]
    assert [op.name for op in before.ops if op.rng] == [op.name for op in after.ops if op.rng]


@pytest.mark.parametrize("name", ["qwen2", "lora", "resnet"])
def test_updates_run_as_soon_as_their_gradient_is_there(name: str) -> None:
    """Without clipping, updates begin before the backward pass ends; nothing but updates moved."""
    graph, before = lowered(name), without_dead_ops(raw(name))
    phases = [op.phase for op in graph.ops]
    last_backward = max(index for index, phase in enumerate(phases) if phase == "backward")
    assert "update" in phases[:last_backward]
    still = [op.name for op in before.ops if op.phase != "update"]
    assert [op.name for op in graph.ops if op.phase != "update"] == still


def test_clipping_holds_updates_back() -> None:
    """With clip_grad_norm_ the last write of every parameter waits for the norm of all gradients (its weight decay need not)."""
    graph = lowered("clip")
    before = predecessors(graph)
    writers = {s: index for index, op in enumerate(graph.ops) for s in op.writes if graph.storages[s].role == "parameter"}
    norm = max(index for index, op in enumerate(graph.ops) if "linalg_vector_norm" in op.target)
    reach: list[set[int]] = []
    for needs in before:
        reach.append(needs | {far for need in needs for far in reach[need]})
    assert all(norm in reach[index] for index in writers.values())


def test_early_updates_is_idempotent() -> None:
    """Doing it twice changes nothing more."""
    graph = lowered("qwen2")
    assert early_updates(graph) == graph


# --- dead ops, storages, views ---


@pytest.mark.parametrize("name", RECIPES)
def test_everything_left_is_needed(name: str) -> None:
    """Every op of the graph serves a result or writes something that outlives the step; every view is used."""
    graph = lowered(name)
    assert without_dead_ops(graph) == graph
    used = {value for op in (*graph.ops, *graph.views) for value in inputs_of(op)} | {value for _, value in graph.results}
    assert all(used & {output for output in view.outputs if output} for view in graph.views)


def test_dead_ops_go() -> None:
    """A computation that nothing uses, and what only it used, is not in the graph; a draw of random numbers stays."""

    def step(x: torch.Tensor) -> torch.Tensor:
        _ = (x * 3).sin()
        torch.rand(2)
        return x + 1

    assert [op.target for op in small(step, torch.ones(2)).ops if not op.rng] == ["aten.add.Tensor"]


def test_views_share_the_storage_of_their_base() -> None:
    """split, unbind, select, expand and transposes are views of one storage; a write through a view is a write to it."""

    def step(x: torch.Tensor) -> Any:
        base = x * 2
        left, right = base.split(2, dim=1)
        rows = right.unbind(0)
        rows[0].add_(1)
        return base.t(), left.expand(2, 4, 2).sum(), rows[1]

    graph = small(step, torch.ones(4, 4))
    base = graph.storage_of(dict(graph.results)["return:0"])
    assert graph.storage_of(dict(graph.results)["return:2"]) == base
    assert [op.target for op in graph.ops if base in op.writes] == ["aten.add_.Tensor"]


def test_results_of_lists_never_share_a_name() -> None:
    """The third part of the first split and the third split are different values."""

    def step(x: torch.Tensor) -> Any:
        parts = [(x * number).split(2) for number in range(4)]
        return [piece.sum() for pieces in parts for piece in pieces]

    graph = small(step, torch.ones(6))
    assert len({value.name for value in graph.values}) == len(graph.values)
    assert len([value for value in graph.values if value.name in graph.view]) == 12


def test_replacing_a_storage_is_refused() -> None:
    """`set_` and `resize_` change what a storage is."""

    def step(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y.resize_(1)
        return y

    with pytest.raises(Unsupported, match="copy_"):
        small(step, torch.ones(4))


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "foreach" in name or "fused" in name])
def test_multi_tensor_updates_become_one_op_per_parameter(name: str) -> None:
    """Foreach and fused kernels are split, so that each update can run as soon as its gradient is complete."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    own = OPTIMIZERS[name](net.parameters())

    def step(x: torch.Tensor) -> None:
        net(x).sum().backward()
        own.step()

    graph = small(step, torch.ones(2, 3))
    parameters = {index for index, storage in enumerate(graph.storages) if storage.role == "parameter"}
    for op in graph.ops:
        assert len(parameters & set(op.writes)) <= 1, op.target
    assert sum(len(parameters & set(op.writes)) > 0 for op in graph.ops) >= 4


def test_batch_norm_writes_its_statistics() -> None:
    """The running statistics that native_batch_norm moves without saying so are written in the graph."""
    graph = lowered("resnet")
    for op in graph.ops:
        if op.target == "aten.native_batch_norm.default":
            assert [graph.storages[s].role for s in op.writes] == ["buffer", "buffer"]


@pytest.mark.parametrize("name", RECIPES)
def test_phases_and_modules(name: str) -> None:
    """Forward, backward and update are all there; most forward ops know their module and their line."""
    graph = lowered(name)
    assert {op.phase for op in graph.ops} == {"forward", "backward", "update"}
    forward = [op for op in graph.ops if op.phase == "forward"]
    assert sum(bool(op.module) for op in forward) > 0.7 * len(forward)
    assert sum(op.source.startswith('File "') for op in forward) > 0.9 * len(forward)
    parameters = {index for index, storage in enumerate(graph.storages) if storage.role == "parameter"}
    assert all(op.phase == "update" for op in graph.ops if parameters & set(op.writes))


def test_names_are_unique_identifiers() -> None:
    """Names of values can stand in a program, and no two things share one."""
    namer = Namer()
    names = [namer.unique(wish) for wish in ("weight", "weight", "a.b c", "3d", "class", "run", "torch", "")]
    assert len(set(names)) == len(names)
    assert all(name.isidentifier() for name in names)
    assert not {"class", "run", "torch"} & set(names)
    for name in RECIPES:
        assert all(value.name.isidentifier() for value in lowered(name).values)


# --- out= kernels ---


class Recorder(TorchDispatchMode):
    """Runs a step eagerly and checks every op that claims an out= kernel against it, on the very inputs that the step gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.checked: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        drawn = torch.get_rng_state()
        result = func(*args, **kwargs)
        made = list(result) if isinstance(result, (list, tuple)) else [result]
        given = {id(arg.untyped_storage()) for arg in args if isinstance(arg, torch.Tensor)}
        if (
            all(isinstance(part, torch.Tensor) for part in made)
            and not any(id(part.untyped_storage()) in given for part in made)
            and not func.is_view
        ):
            target, names = out_kernel(func, result)
            if target and not func._schema.is_mutable:
                after = torch.get_rng_state()
                torch.set_rng_state(drawn)
                self._check(func, args, kwargs, made, target, names)
                torch.set_rng_state(after)
        return result

    def _check(self, func: Any, args: Any, kwargs: Any, made: list[torch.Tensor], target: str, names: tuple[str, ...]) -> None:
        buffers = [torch.empty_strided(part.shape, part.stride(), dtype=part.dtype) for part in made]
        for buffer in buffers:
            buffer.view(-1).view(torch.uint8).fill_(0xA5) if buffer.is_contiguous() else buffer.fill_(1)
        if target in ("copy_", "zero_"):
            buffers[0].copy_(args[0]) if target == "copy_" else buffers[0].zero_()
        elif target == "fill_":
            buffers[0].fill_(args[1])
        elif target != "empty":
            packet, overload = target.removeprefix("aten.").rsplit(".", 1)
            getattr(getattr(torch.ops.aten, packet), overload)(*args, **kwargs, **dict(zip(names, buffers, strict=True)))
        for buffer, part in zip(buffers, made, strict=True):
            assert buffer.stride() == part.stride(), f"{func}: an out= kernel changed the strides of its buffer"
            if target != "empty":
                assert bytes_of(buffer) == bytes_of(part), f"{func}: its out= kernel {target} gives other bits"
        self.checked[str(func)] = self.checked.get(str(func), 0) + 1


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    "recipe",
    [*(Recipe(family, dropout=0.1, clip=1.0) for family in FAMILIES),
     Recipe("qwen2", dtype=torch.bfloat16), Recipe("gemma3", autocast=True),
     Recipe("llama", attention="eager", mask="padded", optimizer="nadam"), Recipe("resnet", autocast=True, optimizer="sgd-momentum")],
    ids=lambda recipe: f"{recipe.family}-{recipe.optimizer}-{recipe.dtype}-{recipe.autocast}",
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
def test_out_kernels_give_the_same_bits(recipe: Recipe) -> None:
    """Every op of every family that claims an out= kernel gives the same bytes through it, on the step's own inputs, into a dirty buffer.
    """
    training = recipe.build()
    with Recorder() as recorder:
        for call in range(2):
            training.step(*training.batch(call))
    assert len(recorder.checked) >= 10


def test_out_kernels_are_claimed_for_dense_results_only() -> None:
    """A result that does not fill its storage, or has no elements, comes from the allocator."""
    assert out_kernel(torch.ops.aten.add.Tensor, torch.ones(4))[0] == "aten.add.out"
    assert out_kernel(torch.ops.aten.add.Tensor, torch.ones(4)[:2]) == ("", ())
    assert out_kernel(torch.ops.aten.add.Tensor, torch.ones(0)) == ("", ())


@pytest.mark.parametrize("name", RECIPES)
def test_new_storages_have_one_maker(name: str) -> None:
    """Each activation is created by one op, before any use; everything else existed before the step."""
    graph = lowered(name)
    created = [storage for op in graph.ops for storage in op.creates]
    assert len(created) == len(set(created))
    assert all(graph.storages[storage].role not in PERSISTENT for storage in created)
