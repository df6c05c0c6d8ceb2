"""A table in blocks of rows: what a lookup, a linear head with its cross-entropy, and their gradients do with one block, without the rest.

The walk of `cross_entropy` over a whole table is `cross_entropy_begin`, `cross_entropy_rows_` for each block in order, `cross_entropy_end`, and
gives the same bits where blocks are multiples of ROWS rows. The gradients are rows of the whole ones, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mebp_compile.kernels.cross_entropy import ROWS, Answer, Sums, begin, end, head_gradient, tile

NOBODY = -(2**62)  # stands for an ignored target, where targets are counted from a block's first row
SUMS = "Tensor(a!) top, Tensor(b!) rest, Tensor(c!) aim, Tensor(d!) aimed, Tensor(e!) pulled"
_LIBRARY: Any = torch.library.Library("mebp", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("cross_entropy_begin(Tensor x) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
_LIBRARY.define(f"cross_entropy_rows_(Tensor x, Tensor weight, Tensor target, int start, {SUMS}) -> ()")
_LIBRARY.define(
    "cross_entropy_end(Tensor target, int vocabulary, int reduction, int ignore_index, Tensor top, Tensor rest, Tensor aim, Tensor aimed, "
    "Tensor pulled) -> (Tensor loss, Tensor count, Tensor direction, Tensor softmax)"
)
_LIBRARY.define(
    "head_rows_gradient(Tensor grad, Tensor x, Tensor weight, Tensor target, Tensor softmax, Tensor count, int reduction, int ignore_index, "
    "int start) -> Tensor"
)
_LIBRARY.define("embedding_rows_gradient(Tensor grad, Tensor ids, int start, int rows, int padding_idx) -> Tensor")


def cross_entropy_rows_(
    x: Tensor, weight: Tensor, target: Tensor, start: int, top: Tensor, rest: Tensor, aim: Tensor, aimed: Tensor, pulled: Tensor
) -> None:
    """Take rows [start, start + len(weight)) of the head into the sums of `cross_entropy.begin`."""
    for first in range(0, weight.shape[0], ROWS):
        part = weight[first : first + ROWS]
        logits = torch.mm(x, part.t())
        tile(logits, part, target, start + first, top, rest, aim, aimed, pulled)
        pulled.add_(torch.mm(logits, part))


def cross_entropy_end(target: Tensor, vocabulary: int, reduction: int, ignore_index: int, *sums: Tensor) -> Answer:
    """The answer of `linear_cross_entropy` from the sums, which stay as they are."""
    top, rest, aim, aimed, pulled = sums
    return end(target, vocabulary, reduction, ignore_index, top, rest, aim, aimed, pulled.clone())


def head_rows_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, target: Tensor, softmax: Tensor, count: Tensor, reduction: int, ignore_index: int, start: int
) -> Tensor:
    """Rows [start, start + len(weight)) of `head_gradient`: `weight` has those rows of the head."""
    here = torch.where(target == ignore_index, NOBODY, target - start)
    return head_gradient(grad, x, weight, here, softmax, count, reduction, NOBODY)


def embedding_rows_gradient(grad: Tensor, ids: Tensor, start: int, rows: int, padding_idx: int) -> Tensor:
    """Rows [start, start + rows) of `aten.embedding_dense_backward`: [rows, features], like grad [*ids.shape, features].

    Each row adds up its tokens in their order, as the whole does.
    """
    flat, grads = ids.reshape(-1), grad.reshape(-1, grad.shape[-1])
    here = ((flat >= start) & (flat < start + rows) & (flat != padding_idx)).nonzero().squeeze(1)
    return torch.ops.aten.embedding_dense_backward(grads[here], flat[here] - start, rows, -1, False)


def _sums_shapes(x: Tensor) -> Sums:
    row = x.new_empty((x.shape[0],), dtype=torch.float32)
    return row, torch.empty_like(row), torch.empty_like(row), torch.empty_like(x), x.new_empty(x.shape, dtype=torch.float32)


def _answer_shapes(target: Tensor, vocabulary: int, reduction: int, ignore_index: int, *sums: Tensor) -> Answer:
    scalar, pulled = sums[0].new_empty(()), sums[-1]
    return scalar, torch.empty_like(scalar), torch.empty_like(pulled), pulled.new_empty((2, pulled.shape[0]))


for _name, _function, _shapes in (
    ("cross_entropy_begin", begin, _sums_shapes),
    ("cross_entropy_rows_", cross_entropy_rows_, lambda *_: None),
    ("cross_entropy_end", cross_entropy_end, _answer_shapes),
    ("head_rows_gradient", head_rows_gradient, lambda grad, x, weight, *_: torch.empty_like(weight)),
    ("embedding_rows_gradient", embedding_rows_gradient, lambda grad, ids, start, rows, _: grad.new_empty((rows, grad.shape[-1]))),
):
    _LIBRARY.impl(_name, _function, "CPU")
    _LIBRARY.impl(_name, _shapes, "Meta")
