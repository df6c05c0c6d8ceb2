"""Cross-entropy of a linear head in one walk over tiles of the vocabulary: neither the logits nor their gradient ever exist whole.

With logits z = x W^T, target t_i and the valid rows (t_i != ignore_index), the loss is  sum_i lse(z_i) - z_i,t_i  over them (divided by
their number for the mean) and its gradient  dx_i = sum_v softmax(z_i)_v W_v - W_t_i. Both come out of one walk, as attention's output does out
of one walk over the keys (online softmax: Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135): for each row a running
maximum m, rest = sum_(v != t) exp(z_v - m) and pulled = sum_(v != t) exp(z_v - m) W_v, all rescaled when m grows. The target's own column is
left out of both, and enters as (p_t - 1) W_t with p_t - 1 = -rest / (rest + exp(z_t - m)), so that a token that is predicted well keeps a
gradient of full relative precision.

Tier "reassociate": the same real function. m, rest and pulled are fp32; the terms of a tile's product are rounded to the dtype of x, as eager
rounds the whole gradient of the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mebp_compile.kernels import native

_LIBRARY: Any = torch.library.Library("mebp", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor target, int reduction, int ignore_index, int rows) "
    "-> (Tensor loss, Tensor count, Tensor direction, Tensor softmax)"
)
_LIBRARY.define(
    "head_gradient(Tensor grad, Tensor x, Tensor weight, Tensor target, Tensor softmax, Tensor count, int reduction, int ignore_index, int rows) "
    "-> Tensor"
)
MEAN, SUM = 1, 2  # reductions, as aten numbers them
ROWS = 2048  # of the weight in a tile, where it is in memory anyway


Sums = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Answer = tuple[Tensor, Tensor, Tensor, Tensor]


def linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor, reduction: int, ignore_index: int, rows: int = ROWS) -> Answer:
    """(loss [], number of valid targets [], d loss / d x [tokens, features], softmax [2, tokens]: lse and p_t - 1), all fp32.

    x: [tokens, features]; weight: [vocabulary, features] of the same dtype; target: int64 [tokens]; rows: of the weight, in a tile.
    """
    sums = begin(x)
    for start in range(0, weight.shape[0], rows):
        part = weight[start : start + rows]
        logits = torch.mm(x, part.t())
        tile(logits, part, target, start, *sums)
        sums[-1].add_(torch.mm(logits, part))
    return end(target, weight.shape[0], reduction, ignore_index, *sums)


def begin(x: Tensor) -> Sums:
    """The sums of no tile yet: top, rest and aim [tokens] in fp32, aimed like x (each target's row of the weight), pulled like x in fp32."""
    top = torch.full((x.shape[0],), -torch.inf)
    return top, torch.zeros_like(top), top.clone(), torch.zeros_like(x), torch.zeros(x.shape)


def tile(logits: Tensor, rows: Tensor, target: Tensor, start: int, top: Tensor, rest: Tensor, aim: Tensor, aimed: Tensor, pulled: Tensor) -> None:
    """Take in one tile: rows `start` to `start + len(rows)` of the weight and their logits [tokens, rows].

    The logits become exp(logits - top), zero in the target's column; what was summed before is rescaled to the new top.
    """
    here, column = _targets_in(target, start, rows.shape[0])
    aimed[here] = rows[column]
    if native.takes(logits):
        pulled.mul_(native.cross_entropy_tile(logits, target - start, top, rest, aim).unsqueeze(1))
        return
    aim[here] = logits[here, column].float()
    higher = torch.maximum(top, logits.amax(1).float())
    keep = torch.exp(top - higher)
    share = torch.sub(logits, higher.unsqueeze(1)).exp_()  # bf16 - fp32 is fp32
    share[here, column] = 0.0
    rest.mul_(keep).add_(share.sum(1))
    pulled.mul_(keep.unsqueeze(1))
    logits.copy_(share)
    top.copy_(higher)


def _targets_in(target: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """The tokens whose target lies in the tile, and its column there."""
    here = ((target >= start) & (target < start + size)).nonzero().squeeze(1)
    return here, target[here] - start


def end(
    target: Tensor, vocabulary: int, reduction: int, ignore_index: int, top: Tensor, rest: Tensor, aim: Tensor, aimed: Tensor, pulled: Tensor
) -> Answer:
    """The answer of `linear_cross_entropy` from the sums of all tiles. `pulled` becomes the gradient.

    Raises IndexError for a target outside the vocabulary, as torch does.
    """
    valid = target != ignore_index
    if bool((valid & ((target < 0) | (target >= vocabulary))).any()):
        raise IndexError(f"a target is out of bounds: not in 0..{vocabulary - 1} and not {ignore_index}, which is ignored")
    total = rest + torch.exp(aim - top)
    lse, missing = top + total.log(), -rest / total
    count = valid.sum().float()
    loss = (lse - aim).where(valid, torch.zeros(())).sum()
    scale = 1.0 / count if reduction == MEAN else torch.ones(())
    pulled.div_(total.unsqueeze(1))
    pulled.addcmul_(aimed, missing.unsqueeze(1))
    pulled.mul_(torch.where(valid, scale, torch.zeros(())).unsqueeze(1))
    return loss * scale, count, pulled, torch.stack((lse, missing))


def head_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, target: Tensor, softmax: Tensor, count: Tensor, reduction: int, ignore_index: int, rows: int = ROWS
) -> Tensor:
    """d loss / d weight [vocabulary, features], like the weight: a second walk, whose tiles know the final log-sum-exp.

    Each tile's gradient of the logits, (softmax - one_hot(target)) * grad / count, is made from x and the tile's rows, and never kept.
    """
    result = torch.empty_like(weight)
    valid = target != ignore_index
    scale = torch.where(valid, grad / count if reduction == MEAN else grad, torch.zeros(()))
    for start in range(0, weight.shape[0], rows):
        part = weight[start : start + rows]
        logits = torch.mm(x, part.t())
        here, column = _targets_in(target, start, part.shape[0])
        share = torch.sub(logits, softmax[0].unsqueeze(1)).exp_()
        share[here, column] = softmax[1, here]
        logits.copy_(share.mul_(scale.unsqueeze(1)))
        torch.mm(logits.t(), x, out=result[start : start + rows])
    return result


def _answer_shapes(x: Tensor, *_: Any) -> Answer:
    scalar, softmax = x.new_empty((), dtype=torch.float32), x.new_empty((2, x.shape[0]), dtype=torch.float32)
    return scalar, torch.empty_like(scalar), x.new_empty(x.shape, dtype=torch.float32), softmax


def _head_shape(grad: Tensor, x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(weight)


_LIBRARY.impl("linear_cross_entropy", linear_cross_entropy, "CPU")
_LIBRARY.impl("linear_cross_entropy", _answer_shapes, "Meta")
_LIBRARY.impl("head_gradient", head_gradient, "CPU")
_LIBRARY.impl("head_gradient", _head_shape, "Meta")
