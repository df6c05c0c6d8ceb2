"""A table in blocks of rows: what a lookup, a linear head with its cross-entropy, and their gradients do with one block, without the rest.

The walk of `cross_entropy` over a whole table is `cross_entropy_begin`, `cross_entropy_rows_` for each block in order, `cross_entropy_end`, and
gives the same bits where blocks are multiples of ROWS rows. The gradients are rows of the whole ones, bit for bit. Label smoothing, for which
every row of a gradient needs the whole table, is not among it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mebp_compile.kernels.cross_entropy import Answer, Sums, begin, end, head_gradient, walk

NOBODY = -(2**62)  # stands for an ignored target, where targets are counted from a block's first row
SUMS = "Tensor(a!) top, Tensor(b!) rest, Tensor(c!) aim, Tensor(d!) flat, Tensor(e!) aimed, Tensor(f!) pulled"
_LIBRARY: Any = torch.library.Library("mebp", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("cross_entropy_begin(Tensor x) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
_LIBRARY.define(f"cross_entropy_rows_(Tensor x, Tensor weight, Tensor target, int start, float cap, {SUMS}) -> ()")
_LIBRARY.define(
    "cross_entropy_end(Tensor target, int vocabulary, int reduction, int ignore_index, float cap, Tensor top, Tensor rest, Tensor aim, "
    "Tensor flat, Tensor aimed, Tensor pulled) -> (Tensor loss, Tensor count, Tensor direction, Tensor softmax)"
)
_LIBRARY.define(
    "head_rows_gradient(Tensor grad, Tensor x, Tensor weight, Tensor target, Tensor softmax, Tensor count, int reduction, int ignore_index, "
    "float cap, int start) -> Tensor"
)
_LIBRARY.define("embedding_rows_gradient(Tensor grad, Tensor ids, int start, int rows, int padding_idx) -> Tensor")


def cross_entropy_begin(x: Tensor) -> tuple[Tensor, ...]:
    """The sums of `cross_entropy.begin` without label smoothing: all but `spread`."""
    return _without_spread(begin(x, 0.0, 0.0))


def _without_spread(sums: Sums) -> tuple[Tensor, ...]:
    return tuple(tensor for name, tensor in sums._asdict().items() if name != "spread")


def _with_spread(carried: tuple[Tensor, ...]) -> Sums:
    *rest, pulled = carried
    return Sums(*rest, torch.zeros(0, pulled.shape[1]), pulled)


def cross_entropy_rows_(x: Tensor, weight: Tensor, target: Tensor, start: int, cap: float, *carried: Tensor) -> None:
    """Take rows [start, start + len(weight)) of the head into the sums."""
    walk(x, weight, target, start, cap, _with_spread(carried))


def cross_entropy_end(target: Tensor, vocabulary: int, reduction: int, ignore_index: int, cap: float, *carried: Tensor) -> Answer:
    """The answer of `linear_cross_entropy` from the sums, which stay as they are."""
    sums = _with_spread(carried)
    return end(target, vocabulary, reduction, ignore_index, 0.0, cap, *sums._replace(pulled=sums.pulled.clone()))


def head_rows_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, target: Tensor, softmax: Tensor, count: Tensor, reduction: int, ignore_index: int, cap: float, start: int
) -> Tensor:
    """Rows [start, start + len(weight)) of `head_gradient`: `weight` has those rows of the head."""
    here = torch.where(target == ignore_index, NOBODY, target - start)
    return head_gradient(grad, x, weight, here, softmax, count, reduction, NOBODY, 0.0, cap)


def embedding_rows_gradient(grad: Tensor, ids: Tensor, start: int, rows: int, padding_idx: int) -> Tensor:
    """Rows [start, start + rows) of `aten.embedding_dense_backward`: [rows, features], like grad [*ids.shape, features].

    Each row adds up its tokens in their order, as the whole does.
    """
    flat, grads = ids.reshape(-1), grad.reshape(-1, grad.shape[-1])
    here = ((flat >= start) & (flat < start + rows) & (flat != padding_idx)).nonzero().squeeze(1)
    return torch.ops.aten.embedding_dense_backward(grads[here], flat[here] - start, rows, -1, False)


def _sums_shapes(x: Tensor) -> tuple[Tensor, ...]:
    rows = tuple(x.new_empty((x.shape[0],), dtype=torch.float32) for _ in range(4))
    return *rows, torch.empty_like(x), x.new_empty(x.shape, dtype=torch.float32)


def _answer_shapes(target: Tensor, vocabulary: int, reduction: int, ignore_index: int, cap: float, *sums: Tensor) -> Answer:
    scalar, pulled = sums[0].new_empty(()), sums[-1]
    return scalar, torch.empty_like(scalar), torch.empty_like(pulled), pulled.new_empty((3, pulled.shape[0]))


for _name, _function, _shapes in (
    ("cross_entropy_begin", cross_entropy_begin, _sums_shapes),
    ("cross_entropy_rows_", cross_entropy_rows_, lambda *_: None),
    ("cross_entropy_end", cross_entropy_end, _answer_shapes),
    ("head_rows_gradient", head_rows_gradient, lambda grad, x, weight, *_: torch.empty_like(weight)),
    ("embedding_rows_gradient", embedding_rows_gradient, lambda grad, ids, start, rows, _: grad.new_empty((rows, grad.shape[-1]))),
):
    _LIBRARY.impl(_name, _function, "CPU")
    _LIBRARY.impl(_name, _shapes, "Meta")
