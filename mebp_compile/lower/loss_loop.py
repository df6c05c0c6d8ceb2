"""The Loop of a tiled loss whose head is a streamed weight: what one tile of the vocabulary does, one op a line."""

from __future__ import annotations

from dataclasses import replace

from mebp_compile.graph import Graph, LoopChoice, Op, Ref, Value, refs
from mebp_compile.lower.products import multiplier

TILED_LOSS = "mebp.linear_cross_entropy.default"
TRIPS = (8, 16, 32, 64, 128)
SUMS = ("top", "rest", "aim", "flat", "aimed", "spread", "pulled")  # as kernels.cross_entropy.Sums


def loss_body(op: Op, weight: Value, packed: Value) -> Graph:
    """Phases: "before" the tiles, "tile" for each of them, "after" them, where the op's own outputs are made."""
    x, _, target, *form, _ = op.args
    *_, smoothing, cap = form
    rows, logits, tile = f"{weight.name}_tile", f"{op.name}_logits", Ref("tile")
    sums = tuple(f"{op.name}_{name}" for name in SUMS)
    carried = tuple(map(Ref, sums))
    part = f"{op.name}_part"
    multiply = multiplier(weight.dtype)
    ops = (
        Op("begin", "run.cross_entropy_begin", (x, smoothing, cap), outputs=sums, phase="before"),
        Op("make", "run.rows", (weight.name, Ref(packed.name), tile), outputs=(rows,), phase="tile"),
        Op("flip", "aten.t.default", (Ref(rows),), outputs=(f"{rows}_t",), phase="tile"),
        Op("multiply", multiply, (x, Ref(f"{rows}_t")), outputs=(logits,), phase="tile"),
        Op("take", "run.cross_entropy_tile", (Ref(logits), Ref(rows), target, Ref("tile.start"), cap, *carried), phase="tile"),
        Op("pull", multiply, (Ref(logits), Ref(rows)), outputs=(part,), phase="tile"),
        Op("add", "aten.add_.Tensor", (carried[-1], Ref(part)), phase="tile"),
        Op("end", "run.cross_entropy_end", (target, weight.shape[0], *form, *carried), outputs=op.outputs, phase="after"),
    )
    return Graph(f"{weight.shape[0]}", (), (), ops, (), (*refs((x, target, *form)), packed.name), ())


def with_loss_menu(op: Op, weight: Value, packed: Value, record_bytes: int, counts: tuple[int, ...]) -> Op:
    """The op with its Loops: the packed head in memory, or read from disk tile by tile."""
    others = tuple(read for read in op.reads if read != weight.storage)
    menu = (
        *(LoopChoice(trips, (*others, packed.storage)) for trips in counts),
        *(LoopChoice(trips, others, disk_bytes=record_bytes) for trips in counts),
    )
    return replace(op, menu=menu, body=loss_body(op, weight, packed))
