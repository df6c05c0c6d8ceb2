"""A table in blocks of rows gives the bits of the whole table."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mebp_compile.kernels import tables
from mebp_compile.kernels.cross_entropy import ROWS, head_gradient, linear_cross_entropy

TOKENS, FEATURES, VOCABULARY, IGNORED = 24, 32, 2 * ROWS + 700, -100
BLOCKS = [(start, min(ROWS, VOCABULARY - start)) for start in range(0, VOCABULARY, ROWS)]


def head(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and targets, one of them ignored; one is so near a block's start that counting from the block gives the ignored number."""
    torch.manual_seed(0)
    target = torch.randint(0, VOCABULARY, (TOKENS,))
    target[3], target[4] = IGNORED, ROWS + IGNORED
    return torch.randn(TOKENS, FEATURES).to(dtype), torch.randn(VOCABULARY, FEATURES).to(dtype), target


def same(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("reduction", "cap"), [(1, 0.0), (2, 0.0), (1, 30.0)])
def test_the_walk_in_blocks_is_the_walk(dtype: torch.dtype, reduction: int, cap: float) -> None:
    """Begin, every block, end: loss, count, direction and softmax are those of the op on the whole head."""
    x, weight, target = head(dtype)
    sums = torch.ops.mebp.cross_entropy_begin(x)
    for start, rows in BLOCKS:
        torch.ops.mebp.cross_entropy_rows_(x, weight[start : start + rows], target, start, cap, *sums)
    answer = torch.ops.mebp.cross_entropy_end(target, VOCABULARY, reduction, IGNORED, cap, *sums)
    assert same(answer, linear_cross_entropy(x, weight, target, reduction, IGNORED, 0.0, cap))
    assert same(answer, torch.ops.mebp.cross_entropy_end(target, VOCABULARY, reduction, IGNORED, cap, *sums))  # the sums are as they were


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("reduction", "cap"), [(1, 0.0), (2, 0.0), (1, 30.0)])
def test_the_head_gradient_in_blocks_is_the_head_gradient(dtype: torch.dtype, reduction: int, cap: float) -> None:
    """Each block's gradient is its rows of the whole gradient."""
    x, weight, target = head(dtype)
    _, count, _, softmax = linear_cross_entropy(x, weight, target, reduction, IGNORED, 0.0, cap)
    grad = torch.tensor(0.7)
    whole = head_gradient(grad, x, weight, target, softmax, count, reduction, IGNORED, 0.0, cap)
    for start, rows in BLOCKS:
        part = weight[start : start + rows]
        block = torch.ops.mebp.head_rows_gradient(grad, x, part, target, softmax, count, reduction, IGNORED, cap, start)
        assert torch.equal(block, whole[start : start + rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("padding", [-1, 5])
def test_the_lookup_gradient_in_blocks_is_the_lookup_gradient(dtype: torch.dtype, padding: int) -> None:
    """Ids that come several times, a padding id, a block without any: each block is its rows of the whole."""
    torch.manual_seed(1)
    ids = torch.randint(0, 40, (2, 50))
    grad = torch.randn(2, 50, FEATURES).to(dtype)
    whole = torch.ops.aten.embedding_dense_backward(grad, ids, 100, padding, False)
    for start, rows in ((0, 16), (16, 32), (48, 52)):
        assert torch.equal(torch.ops.mebp.embedding_rows_gradient(grad, ids, start, rows, padding), whole[start : start + rows])


@pytest.mark.parametrize("name", ["cross_entropy_begin", "cross_entropy_end", "head_rows_gradient", "embedding_rows_gradient"])
def test_fake_tensors_have_the_shapes_of_real_ones(name: str) -> None:
    """What the ops say of shapes and dtypes without data is what they give."""
    x, weight, target = head(torch.bfloat16)
    sums = tables.cross_entropy_begin(x)
    given = {
        "cross_entropy_begin": (x,),
        "cross_entropy_end": (target, VOCABULARY, 1, IGNORED, 0.0, *sums),
        "head_rows_gradient": (torch.ones(()), x, weight, target, torch.ones(3, TOKENS), torch.ones(()), 1, IGNORED, 0.0, 0),
        "embedding_rows_gradient": (torch.randn(TOKENS, FEATURES), target.clamp_min(0), 0, 64, -1),
    }[name]
    op = getattr(torch.ops.mebp, name)
    real, fake = op(*given), op(*(item.to("meta") if isinstance(item, Tensor) else item for item in given))
    for one, other in zip(*((part,) if isinstance(part, Tensor) else part for part in (real, fake)), strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
