"""Products in blocks of fp32: as near to float64 as fp32 sums and one rounding allow, in any layout and any blocks; torch's own elsewhere."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mebp_compile import torch_private
from mebp_compile.kernels import product

BF16 = torch.bfloat16
UNIT = 2.0**-8  # half the distance of neighbours in bf16, relative
FP32_UNIT = 2.0**-24
sizes = st.integers(1, 70)


def matrix(rows: int, columns: int, turned: bool, seed: int, dtype: torch.dtype = BF16) -> Tensor:
    shape = (columns, rows) if turned else (rows, columns)
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return drawn.t() if turned else drawn


def narrow() -> Any:
    """A machine whose processor does not multiply bf16."""
    return mock.patch.object(torch_private, "multiplies_bfloat16", return_value=False)


@given(m=sizes, k=sizes, n=sizes, turned=st.tuples(st.booleans(), st.booleans()), block=st.tuples(sizes, sizes, sizes), bias=st.booleans())
def test_within_one_rounding(m: int, k: int, n: int, turned: tuple[bool, bool], block: tuple[int, int, int], bias: bool) -> None:
    """Each entry is that of float64, but for k roundings of its fp32 sum and one to bf16; written where it belongs, nothing else."""
    x, weight = matrix(m, k, turned[0], 1), matrix(k, n, turned[1], 2)
    exact, terms = x.double() @ weight.double(), x.double().abs() @ weight.double().abs()
    added = matrix(1, n, False, 3)
    out = torch.full((m, n), torch.nan, dtype=BF16)
    with narrow(), mock.patch.multiple(product, ROWS=block[0], INNER=block[1], COLUMNS=block[2]):
        made = product.addmm_out(added[0], x, weight, out=out) if bias else product.mm_out(x, weight, out=out)
    assert made is out
    if bias:
        exact, terms = exact + added.double(), terms + added.double().abs()
    summed = (k + 1) * FP32_UNIT * terms
    assert bool(((out.double() - exact).abs() <= summed + UNIT * (exact.abs() + summed)).all())


@pytest.mark.parametrize(("dtype", "native"), [(BF16, True), (torch.float32, False), (torch.float64, False)])
def test_elsewhere_it_is_torchs(dtype: torch.dtype, native: bool) -> None:
    """Where the processor multiplies bf16, and for other dtypes."""
    x, weight = matrix(33, 65, False, 1, dtype), matrix(65, 40, True, 2, dtype)
    with mock.patch.object(torch_private, "multiplies_bfloat16", return_value=native):
        assert torch.equal(product.mm(x, weight), torch.mm(x, weight))
        assert torch.equal(product.addmm(weight[0], x, weight), torch.addmm(weight[0], x, weight))


@pytest.mark.parametrize(("m", "k", "n"), [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_nothing_to_multiply(m: int, k: int, n: int) -> None:
    with narrow():
        assert torch.equal(product.mm(torch.ones(m, k, dtype=BF16), torch.ones(k, n, dtype=BF16)), torch.zeros(m, n, dtype=BF16))


def test_a_fake_product_has_its_shape() -> None:
    with narrow(), torch.device("meta"):
        made = torch.ops.mebp.mm.default(torch.empty(2, 3, dtype=BF16), torch.empty(3, 5, dtype=BF16))
    assert (made.shape, made.dtype, made.is_contiguous()) == ((2, 5), BF16, True)
