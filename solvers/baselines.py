"""Fixed schedules, the same whatever the budget: what the solvers are compared with."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from solvers.check import replay
from solvers.decode import Decisions, DecodeError, Tables
from solvers.emit import emit, synchronous
from solvers.evict import State
from solvers.greedy import evaluate, first_decisions
from solvers.problem import Op, Problem
from solvers.schedule import Schedule

_LAYER = re.compile(r"(?:^|\.)((?:layers|h|blocks|block|layer)\.\d+)(?:\.|$)")
_ATTENTION = re.compile(r"scaled_dot_product|softmax")  # in an op's name: the op in the middle of attention
_ADAPTER = ".lora_"  # in a module path, after the adapted projection


def layer_of(module: str) -> str:
    """The layer that a module path belongs to: 'model.layers.3.mlp' -> 'layers.3'; '' if there is none."""
    match = _LAYER.search(module)
    return match.group(1) if match else ""


def keep_all(problem: Problem) -> Schedule:
    """Every storage is live from its creation to its last need, persistent ones always; choice 0 everywhere."""
    return one_by_one(problem, "keep_all")


def per_layer(problem: Problem) -> Schedule:
    """Only what passes from layer to layer is kept from the forward; the interior of a layer is recomputed when its
    backward begins; frozen weights are read from disk where they are used, each op runs in its fastest way
    (memory-efficient backpropagation, arXiv 2510.03425). What can't be recomputed is kept."""
    return one_by_one(problem, "per_layer")


def mebp(problem: Problem) -> Schedule:
    """As `per_layer`, and what lies outside of layers runs whole, as the released code does it: the loss from all logits at once, on the whole head.
    (`per_layer` runs it in tiles where that is fastest, which takes a third of the memory.)"""
    return one_by_one(problem, "mebp")


def mesp(problem: Problem) -> Schedule:
    """As `per_layer`, and of a layer that is run again only what its structured backward keeps stays in memory (memory-efficient
    structured backpropagation, arXiv 2602.13069, read in its released code).

    Kept between layers: each layer's input. Kept from a layer's second run to its use in the backward: what passes between the layer's
    blocks (both normalised inputs and the residual between attention and MLP), what attention makes (its output, with the softmax or the
    log-sum-exp that its backward needs), and what an MLP's adapted projections make for its own arithmetic (gate and up). Made once more
    where the backward of a block needs it: q, k and v, the activation and its product, the insides of norms. Made once more at each use:
    h = xA of every adapter, and dequantised weights. The head, which their quantised matmul reads packed, runs in the fastest way that does so.

    Not modelled: their hand-written formulas (the ops are the graph's own, so the gradients are exact), the attention matrix (whatever
    attention op the graph has is used), their full logits where the graph has a tiled loss, their cache clearing. Modules tell what is what:
    layers as in `layer_of`, adapters by "lora_" in the path; without such names it comes close to `per_layer`.
    """
    return one_by_one(problem, "mesp")


def sqrt_n(problem: Problem) -> Schedule:
    """The layers in about sqrt(n) segments of as many: only what passes from one segment to the next is kept from the forward, and a segment
    runs again when its backward begins (Chen et al., arXiv 1604.06174); frozen weights as in `per_layer`."""
    return one_by_one(problem, "sqrt_n")


def recompute_all(problem: Problem) -> Schedule:
    """Nothing made in the forward is kept for the backward, save what can't be recomputed."""
    return one_by_one(problem, "recompute_all")


def one_by_one(problem: Problem, scheme: str) -> Schedule:
    """The scheme's schedule, replayed; each transfer is waited for where it begins."""
    tables = Tables(problem)
    state = SCHEMES[scheme](tables)
    schedule = emit(tables, state.decisions, state.trace, synchronous(state.trace))
    replay(problem, schedule, enforce_budget=False)
    return schedule


def _keep_all(tables: Tables) -> State:
    return evaluate(tables, Decisions([0] * len(tables.problem.ops)))


def _per_layer(tables: Tables) -> State:
    return cut(tables, dict.fromkeys(interior(tables.problem), (border_of(tables.problem),)), stream=True)


def _mebp(tables: Tables) -> State:
    return cut(tables, dict.fromkeys(interior(tables.problem), (border_of(tables.problem),)), stream=True, outside=_whole_ways)


def _mesp(tables: Tables) -> State:
    problem, border = tables.problem, border_of(tables.problem)
    cuts = {storage: {border} for storage in interior(problem)}
    for storage, position in _structured_uses(problem):
        if storage in cuts:
            cuts[storage].add(position)
    return cut(tables, {storage: sorted(positions) for storage, positions in cuts.items()}, stream=True, outside=_packed_ways)


def _sqrt_n(tables: Tables) -> State:
    layers = list(dict.fromkeys(layer for op in tables.problem.ops if (layer := layer_of(op.module))))
    length = math.isqrt(max(len(layers) - 1, 0)) + 1
    segment = {layer: f"segment {k // length}" for k, layer in enumerate(layers)}
    inside = interior(tables.problem, lambda module: segment.get(layer_of(module), ""))
    return cut(tables, dict.fromkeys(inside, (border_of(tables.problem),)), stream=True)


def _recompute_all(tables: Tables) -> State:
    border = border_of(tables.problem)
    return cut(tables, {storage: (border,) for op in tables.problem.ops for storage in op.creates})


SCHEMES: dict[str, Callable[[Tables], State]] = {
    "keep_all": _keep_all, "per_layer": _per_layer, "mebp": _mebp, "mesp": _mesp, "sqrt_n": _sqrt_n, "recompute_all": _recompute_all,
}  # fmt: skip


def border_of(problem: Problem) -> int:
    """Index of the first backward op."""
    return next((k for k, op in enumerate(problem.ops) if op.phase == "backward"), len(problem.ops))


def _reads(op: Op) -> set[int]:
    """Storages that the op reads in any of its ways."""
    return {storage for choice in op.choices for storage in choice.reads}


def interior(problem: Problem, part_of: Callable[[str], str] = layer_of) -> list[int]:
    """Storages made in a part (by default a layer) that its forward does not hand to another one, and those that optional ops make.
    part_of: the part of a module, "" for none."""
    parts = [part_of(op.module) for op in problem.ops]
    kept: set[int] = set()
    created_in = {s: parts[k] for k, op in enumerate(problem.ops) for s in op.creates}
    for k, op in enumerate(problem.ops[: border_of(problem)]):
        kept.update(s for s in _reads(op) if created_in.get(s, "") != parts[k])
    inner = [s for s, part in created_in.items() if part and s not in kept]
    made_at_will = [s for op in problem.ops if op.optional for s in op.creates]
    return list(dict.fromkeys((*inner, *made_at_will)))


# --- MeSP: what is kept of a layer that runs again ---

Block = tuple[str, str]


def _block_of(module: str) -> Block:
    """(layer, first component below it): 'model.layers.3.mlp.up_proj' -> ('layers.3', 'mlp'); ('', '') outside of layers."""
    match = _LAYER.search(module)
    return (match.group(1), module[match.end(1) :].strip(".").partition(".")[0]) if match else ("", "")


def _structured_uses(problem: Problem) -> Iterator[tuple[int, int]]:
    """(storage, op) for what is made once more: the backward op before which it is not in memory. For what adapters and
    dequantisation make, that is each reader; for the rest, the first backward op of the reader's block."""
    border = border_of(problem)
    stored = _stored(problem)
    made = {s for op in problem.ops[:border] for s in op.creates}
    at_each_use = {s for op in problem.ops[:border] if op.optional or _ADAPTER in op.module for s in op.creates}
    block, begun = ("", ""), dict[Block, int]()
    for position, op in enumerate(problem.ops[border:], border):
        if op.phase == "backward" and layer_of(op.module):  # a sum of gradients has no module of its own
            block = _block_of(op.module)
        begun.setdefault(block, position)
        for storage in _reads(op) & made:
            if storage in at_each_use:
                yield storage, position
            elif storage not in stored:
                yield storage, begun[block]


def _stored(problem: Problem) -> set[int]:
    """Storages of the forward that stay in memory from a layer's second run to their uses, see `mesp`."""
    forward = problem.ops[: border_of(problem)]
    adapted = {op.module.partition(_ADAPTER)[0] for op in forward if _ADAPTER in op.module}
    attention = {_block_of(op.module) for op in forward if _ATTENTION.search(op.name)}
    stored, attended, made_in = set[int](), set[Block](), dict[int, str]()
    for op in forward:
        block = _block_of(op.module)
        for storage in _reads(op):
            maker = made_in.get(storage, "")
            projected = maker in adapted and _block_of(maker) not in attention and not op.module.startswith(maker)
            if maker and (projected or _block_of(maker) != block):
                stored.add(storage)
        if _ATTENTION.search(op.name):
            attended.add(block)
        made_in.update((storage, op.module) for storage in op.creates)
        stored.update(op.creates if block in attended else ())
    return stored


Ways = Callable[[Problem, list[int]], list[int]]  # from the choice of each op to another


def _whole_ways(problem: Problem, choice: list[int]) -> list[int]:
    """The choice of each op; outside of layers the first, which is the whole op."""
    return [way if layer_of(op.module) else 0 for op, way in zip(problem.ops, choice, strict=True)]


def _packed_ways(problem: Problem, choice: list[int]) -> list[int]:
    """The choice of each op; outside of layers the fastest that reads no weight which an optional op dequantises, where there is one."""
    dense = {s for op in problem.ops if op.optional for s in op.creates}
    result = list(choice)
    for k, op in enumerate(problem.ops):
        packed = [(way.time_us, c) for c, way in enumerate(op.choices) if not dense.intersection(way.reads)]
        if packed and not layer_of(op.module):
            result[k] = min(packed)[1]
    return result


def cut(tables: Tables, cuts: Mapping[int, Sequence[int]], stream: bool = False, outside: Ways | None = None) -> State:
    """Cut each storage at its positions, except those storages that turn out not to be recomputable. stream: what no op
    writes has its home on disk and is read at each of the two uses, and each op runs in its fastest way, outside of layers in those of `outside`."""
    problem, border, left = tables.problem, border_of(tables.problem), dict(cuts)
    choice, frozen = [0] * len(problem.ops), set[int]()
    if stream:
        fastest = first_decisions(tables).choice
        choice = outside(problem, fastest) if outside else fastest
        frozen = {s for s, may in enumerate(tables.may_leave) if may and s not in tables.written}
    while True:
        made = {storage: list(positions) for storage, positions in left.items()}
        decisions = Decisions(list(choice), {**made, **{s: [border] for s in frozen}}, away=set(frozen))
        try:
            return evaluate(tables, decisions)
        except DecodeError as error:
            if error.storage not in left:
                return _keep_all(tables)
            del left[error.storage]
