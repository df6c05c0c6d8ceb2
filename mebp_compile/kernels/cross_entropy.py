"""Cross-entropy of a linear head in one walk over tiles of the vocabulary: neither the logits nor their gradient ever exist whole.

**What is computed.** With logits z = x W^T, soft-capping y = cap tanh(z / cap) with slope s = dy / dz = 1 - tanh^2(z / cap) (no cap: y = z,
s = 1), V words, target t, smoothing e and the rows that count (t != ignore_index), the loss of a row and its gradient are

    lse(y) - (1 - e) y_t - e / V sum_v y_v        and        sum_v (p_v - e / V) s_v W_v - (1 - e) s_t W_t,    p = softmax(y),

summed over the rows (divided by their number for the mean). Both come out of one walk, as attention's output does out of one walk over the
keys (online softmax: Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135).

**What is summed.** p_v = exp(y_v - m) / total is known only at the end, but its denominator is one number a row, so sums of exp(y_v - m) s_v W_v
will do, rescaled when the running maximum m grows; the slope belongs to the column and enters where it is at hand. For each row:

    top     m, the largest y so far              rest    sum_(v != t) exp(y_v - m)        pulled   sum_(v != t) exp(y_v - m) s_v W_v
    aim     z_t                                  aimed   W_t                              flat     sum_v (y_v - m)
    spread  sum_v s_v W_v, only with smoothing; without a cap this is the same row for every token, sum_v W_v

    total = rest + exp(y_t - m),    p_t - 1 = -rest / total,    loss = (1 - e) (m - y_t) + log(total) - e / V flat,
    gradient = pulled / total + (p_t - 1 + e) s_t W_t - e / V spread

The smoothing's part of the gradient can't share the sum `pulled`: there every term is divided by `total`, here by V. With both smoothing and a
cap `spread` takes a third product of the tile (slopes times rows); with smoothing alone it is a sum over the tile's rows.

**Why so.** The target's own column is left out of `rest` and `pulled`, so that a token that is predicted well (p_t near 1) keeps a gradient of
full relative precision. Distances to m are summed instead of logits, so that a large common offset costs `flat` no digits. Smoothing pulls every
p_v towards e / V, where its gradient is a small difference too: a tile's product is made of exp(y_v - m) - mean, rounded after the subtraction,
and the mean times the tile's part of `spread` is added in fp32, so that `pulled` is the same sum with errors of the size of the differences.

Tier "reassociate": the same real function. Capping, slopes and all sums are fp32; the terms of a tile's product are rounded to the dtype of x,
as eager rounds the whole gradient of the logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mebp_compile.kernels import native, product

_LIBRARY: Any = torch.library.Library("mebp", "FRAGMENT")  # type: ignore[no-untyped-call]
_FORM = "int reduction, int ignore_index, float smoothing, float cap"
_LIBRARY.define(
    f"linear_cross_entropy(Tensor x, Tensor weight, Tensor target, {_FORM}, int rows) "
    "-> (Tensor loss, Tensor count, Tensor direction, Tensor softmax)"
)
_LIBRARY.define(f"head_gradient(Tensor grad, Tensor x, Tensor weight, Tensor target, Tensor softmax, Tensor count, {_FORM}, int rows) -> Tensor")
MEAN, SUM = 1, 2  # reductions, as aten numbers them
ROWS = 2048  # of the weight in a tile, where it is in memory anyway


class Sums(NamedTuple):
    """What the walk carries from tile to tile, all fp32 but `aimed`; see the module's docstring."""

    top: Tensor  # [tokens]
    rest: Tensor  # [tokens]
    aim: Tensor  # [tokens]
    flat: Tensor  # [tokens]
    aimed: Tensor  # like x
    spread: Tensor  # [tokens with a cap, 1 without, 0 without smoothing; features]
    pulled: Tensor  # [tokens, features]


Answer = tuple[Tensor, Tensor, Tensor, Tensor]


def linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, reduction: int, ignore_index: int, smoothing: float, cap: float, rows: int = ROWS
) -> Answer:
    """(loss [], number of valid targets [], d loss / d x [tokens, features], softmax [3, tokens]: m, total, p_t - 1 + e), all fp32.

    x: [tokens, features]; weight: [vocabulary, features] of the same dtype; target: int64 [tokens]; smoothing: 0 for none, up to 1;
    cap: 0 for none; rows: of the weight, in a tile.
    """
    sums = begin(x, smoothing, cap)
    walk(x, weight, target, 0, cap, sums, rows)
    return end(target, weight.shape[0], reduction, ignore_index, smoothing, cap, *sums)


def begin(x: Tensor, smoothing: float, cap: float) -> Sums:
    """The sums of no tile yet."""
    tokens, features = x.shape
    top = torch.full((tokens,), -torch.inf)
    spread = torch.zeros((tokens if cap else 1) if smoothing else 0, features)
    return Sums(top, torch.zeros_like(top), top.clone(), torch.zeros_like(top), torch.zeros_like(x), spread, torch.zeros(tokens, features))


def walk(x: Tensor, weight: Tensor, target: Tensor, start: int, cap: float, sums: Sums, rows: int = ROWS) -> None:
    """Take in the whole of `weight`, which is rows [start, start + len(weight)) of the head, by tiles of so many rows."""
    for first in range(0, weight.shape[0], rows):
        part = weight[first : first + rows]
        logits = product.mm(x, part.t())
        tile(logits, part, target, start + first, cap, *sums)
        sums.pulled.add_(product.mm(logits, part))


def tile(logits: Tensor, rows: Tensor, target: Tensor, start: int, cap: float, *carried: Tensor) -> None:
    """Take in one tile: rows `start` to `start + len(rows)` of the weight and their logits [tokens, rows]; carried: the `Sums`.

    The logits become what, multiplied by the rows, is to be added to `pulled`; what was summed before is rescaled to the new top.
    """
    sums = Sums(*carried)
    here, column = _targets_in(target, start, rows.shape[0])
    sums.aimed[here] = rows[column]
    smooth = sums.spread.shape[0] > 0
    even = torch.empty_like(sums.top) if smooth else None
    slopes = torch.empty(logits.shape, dtype=logits.dtype) if cap and smooth else None
    if native.takes(logits):
        keep = native.cross_entropy_tile(logits, slopes, even, target - start, start, cap, sums.top, sums.rest, sums.aim, sums.flat)
    else:
        sums.aim[here] = logits[here, column].float()
        keep = _tile_in_torch(logits, slopes, even, here, column, start, cap, sums)
    sums.pulled.mul_(keep.unsqueeze(1))
    if even is not None:
        spread = rows.float().sum(0, keepdim=True) if slopes is None else product.mm(slopes, rows)
        sums.spread.add_(spread)
        sums.pulled.addcmul_(even.unsqueeze(1), spread)


def _tile_in_torch(
    logits: Tensor, slopes: Tensor | None, even: Tensor | None, here: Tensor, column: Tensor, start: int, cap: float, sums: Sums
) -> Tensor:
    """The twin of the C kernel. Returns by what earlier sums are to be multiplied, [tokens]."""
    capped, slope = _capped(logits, cap)
    higher = torch.maximum(sums.top, capped.amax(1))
    keep = torch.exp(sums.top - higher)
    share = capped.sub_(higher.unsqueeze(1))
    sums.flat.add_(share.sum(1))
    if start:
        sums.flat.add_((sums.top - higher).mul_(start))
    share.exp_()
    share[here, column] = 0.0
    sums.rest.mul_(keep).add_(share.sum(1))
    if even is not None:
        share.sub_(torch.mean(share, 1, out=even).unsqueeze(1))
    logits.copy_(share if slope is None else share.mul_(slope))
    if slopes is not None and slope is not None:
        slopes.copy_(slope)
    sums.top.copy_(higher)
    return keep


def _capped(logits: Tensor, cap: float) -> tuple[Tensor, Tensor | None]:
    """(y, s) in fp32: what the softmax sees of the logits, and its slope (None for 1). The first may be written into."""
    if not cap:
        return logits.to(torch.float32, copy=True), None
    part = logits.float() / cap
    slope = torch.cosh(part).square_().reciprocal_()  # 1 - tanh^2, with its relative precision where tanh is near 1
    return part.tanh_().mul_(cap), slope


def _targets_in(target: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """The tokens whose target lies in the tile, and its column there."""
    here = ((target >= start) & (target < start + size)).nonzero().squeeze(1)
    return here, target[here] - start


def end(target: Tensor, vocabulary: int, reduction: int, ignore_index: int, smoothing: float, cap: float, *carried: Tensor) -> Answer:
    """The answer of `linear_cross_entropy` from the sums of all tiles (`Sums`). `pulled` becomes the gradient.

    Raises IndexError for a target outside the vocabulary, as torch does.
    """
    sums, valid = Sums(*carried), target != ignore_index
    if bool((valid & ((target < 0) | (target >= vocabulary))).any()):
        raise IndexError(f"a target is out of bounds: not in 0..{vocabulary - 1} and not {ignore_index}, which is ignored")
    aim, slope = _capped(sums.aim, cap)
    exact_total = sums.rest.double() + torch.exp(aim - sums.top)
    own = (smoothing - sums.rest / exact_total).float()  # p_t - 1 + e, precise also where p_t is near 1 - e
    total = exact_total.float()
    each = (1.0 - smoothing) * (sums.top - aim) + total.log()
    pulled = sums.pulled.div_(total.unsqueeze(1)).addcmul_(sums.aimed, (own if slope is None else own * slope).unsqueeze(1))
    if smoothing:
        each -= smoothing / vocabulary * sums.flat
        pulled.sub_(sums.spread, alpha=smoothing / vocabulary)
    count = valid.sum().float()
    scale = 1.0 / count if reduction == MEAN else torch.ones(())
    pulled.mul_(torch.where(valid, scale, torch.zeros(())).unsqueeze(1))
    loss = each.where(valid, torch.zeros(())).sum() * scale
    return loss, count, pulled, torch.stack((sums.top, total, own))


def head_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, target: Tensor, softmax: Tensor, count: Tensor,
    reduction: int, ignore_index: int, smoothing: float, cap: float, rows: int = ROWS,
) -> Tensor:  # fmt: skip
    """d loss / d weight [vocabulary, features], like the weight: a second walk, whose tiles know the softmax.

    Each tile's gradient of the logits, (p - e / V - (1 - e) one_hot(target)) s grad / count, is made from x and the tile's rows, and never kept.
    """
    result = torch.empty_like(weight)
    top, total, own = softmax
    even = smoothing / weight.shape[0]
    valid = target != ignore_index
    scale = torch.where(valid, grad / count if reduction == MEAN else grad, torch.zeros(()))
    for start in range(0, weight.shape[0], rows):
        part = weight[start : start + rows]
        logits = product.mm(x, part.t())
        here, column = _targets_in(target, start, part.shape[0])
        share, slope = _capped(logits, cap)
        share.sub_(top.unsqueeze(1)).exp_().div_(total.unsqueeze(1)).sub_(even)
        share[here, column] = own[here] - even
        if slope is not None:
            share.mul_(slope)
        logits.copy_(share.mul_(scale.unsqueeze(1)))
        product.mm_out(logits.t(), x, out=result[start : start + rows])
    return result


def _answer_shapes(x: Tensor, *_: Any) -> Answer:
    scalar, softmax = x.new_empty((), dtype=torch.float32), x.new_empty((3, x.shape[0]), dtype=torch.float32)
    return scalar, torch.empty_like(scalar), x.new_empty(x.shape, dtype=torch.float32), softmax


def _head_shape(grad: Tensor, x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(weight)


_LIBRARY.impl("linear_cross_entropy", linear_cross_entropy, "CPU")
_LIBRARY.impl("linear_cross_entropy", _answer_shapes, "Meta")
_LIBRARY.impl("head_gradient", head_gradient, "CPU")
_LIBRARY.impl("head_gradient", _head_shape, "Meta")
