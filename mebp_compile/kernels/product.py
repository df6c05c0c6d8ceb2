"""Products of bf16 matrices where the processor has no instructions for them: `mebp::mm(x, weight)`, `mebp::addmm(bias, x, weight)`.

Without AVX-512 torch multiplies bf16 matrices without its library, many times slower than fp32 ones. Here blocks of both are widened to
fp32, multiplied and rounded once: the same real function, sums in fp32 in both, in another order. Tier "reassociate". Elsewhere, and for
other dtypes, it is torch.mm. Source: the blocks of Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", section 4,
with torch's fp32 product as the kernel. Workspace: 2 MiB.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mebp_compile import torch_private

ROWS, INNER, COLUMNS = 256, 512, 512  # of a block

_LIBRARY: Any = torch.library.Library("mebp", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("mm(Tensor x, Tensor weight) -> Tensor")
_LIBRARY.define("mm.out(Tensor x, Tensor weight, *, Tensor(a!) out) -> Tensor(a!)")
_LIBRARY.define("addmm(Tensor bias, Tensor x, Tensor weight) -> Tensor")
_LIBRARY.define("addmm.out(Tensor bias, Tensor x, Tensor weight, *, Tensor(a!) out) -> Tensor(a!)")


def widened(x: Tensor) -> bool:
    """Whether products of this tensor are computed in blocks of fp32 on this machine."""
    return x.dtype == torch.bfloat16 and not torch_private.multiplies_bfloat16()


def mm(x: Tensor, weight: Tensor) -> Tensor:
    """x [m, k] times weight [k, n], of one dtype."""
    return mm_out(x, weight, out=_result(x, weight))


def mm_out(x: Tensor, weight: Tensor, *, out: Tensor) -> Tensor:
    """The same into `out` [m, n]."""
    return _in_blocks(None, x, weight, out) if widened(x) else torch.mm(x, weight, out=out)


def addmm(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The same and bias [n], rounded once."""
    return addmm_out(bias, x, weight, out=_result(x, weight))


def addmm_out(bias: Tensor, x: Tensor, weight: Tensor, *, out: Tensor) -> Tensor:
    """The same into `out`."""
    return _in_blocks(bias, x, weight, out) if widened(x) else torch.addmm(bias, x, weight, out=out)


def _in_blocks(bias: Tensor | None, x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    for top in range(0, x.shape[0], ROWS):
        for left in range(0, weight.shape[1], COLUMNS):
            rows, columns = x[top : top + ROWS], weight[:, left : left + COLUMNS]
            total = torch.zeros(rows.shape[0], columns.shape[1])
            if bias is not None:
                total += bias[left : left + COLUMNS]
            for deep in range(0, x.shape[1], INNER):
                total.addmm_(rows[:, deep : deep + INNER].float(), columns[deep : deep + INNER].float())
            out[top : top + ROWS, left : left + COLUMNS] = total
    return out


def _result(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


for _name, _made, _written in (("mm", mm, mm_out), ("addmm", addmm, addmm_out)):
    _LIBRARY.impl(_name, _made, "CPU")
    _LIBRARY.impl(f"{_name}.out", _written, "CPU")
    _LIBRARY.impl(_name, lambda *tensors: _result(*tensors[-2:]), "Meta")
