"""Fused elementwise ops against the formula in float64: no further from it than the chain of ops that each replaces, in C and in torch, out= too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from mebp_compile import torch_private
from mebp_compile.kernels import fused, gated

DTYPES = (torch.bfloat16, torch.float32)
SLACK = 1.1  # a bound of one rounding is met by a random sample only about
OPS = torch.ops.mebp
needs_library = pytest.mark.skipif(fused.library() is None, reason="the fused kernels are not built (no C compiler)")
twins = pytest.mark.parametrize("native", [pytest.param(True, marks=needs_library), False], ids=["C", "torch"])
drawn = settings(max_examples=25, deadline=None)
dtypes = st.sampled_from(DTYPES)


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def distance(got: Tensor, want: Tensor) -> float:
    """Relative, of the whole."""
    return float((got.double() - want).norm() / (want.norm() + 1e-30))


def no_worse(got: Tensor, chain: Tensor, want: Tensor) -> None:
    """As near to the float64 result as the chain of ops, or as one rounding to the result's dtype."""
    assert got.dtype == chain.dtype
    assert got.shape == want.shape
    rounding = distance(want.to(got.dtype), want)
    assert distance(got, want) <= SLACK * max(distance(chain, want), rounding) + 4e-7


def both(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Any]:
    """The same function on the arguments as they are, and in float64."""
    wide = [argument.double() if isinstance(argument, Tensor) else argument for argument in arguments]
    return function(*arguments), function(*wide)


def gradients(function: Callable[..., Tensor], grad: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
    leaves = [argument.detach().clone().requires_grad_() for argument in arguments]
    return torch.autograd.grad(function(*leaves), leaves, grad)


@pytest.fixture(autouse=True)
def library_or_not(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `native` False the ops find no library."""
    if "native" in request.fixturenames and not request.getfixturevalue("native"):
        monkeypatch.setattr(fused, "takes", lambda *tensors: False)


# hypothesis calls a test many times within one set of fixtures, which only choose the library
def checked(test: Callable[..., None]) -> Callable[..., None]:
    return twins(drawn(test))


@checked
@given(rows=st.integers(1, 70), columns=st.integers(1, 600), rank=st.integers(1, 64), dtype=dtypes, factors=dtypes, turned=st.booleans(),
       alpha=st.sampled_from([2.0, -0.3]), more=st.booleans())  # fmt: skip
def test_the_sum_with_a_low_rank_product(
    native: bool, rows: int, columns: int, rank: int, dtype: torch.dtype, factors: torch.dtype, turned: bool, alpha: float, more: bool
) -> None:
    """base + alpha a b, b stored either way, factors in another dtype; other is added to what that is rounded to."""
    base, a = numbers(1, rows, columns, dtype=dtype), numbers(rows, rank, dtype=factors, seed=1)
    b = numbers(columns, rank, dtype=factors, seed=2).t() if turned else numbers(rank, columns, dtype=factors, seed=2)
    other = numbers(1, rows, columns, dtype=dtype, seed=3) if more else None

    narrow, want = both(lambda base, a, b: (base + torch.mm(a, b).view(base.shape) * alpha).to(base.dtype), base, a, b)
    total = OPS.add_low_rank(base, a, b, alpha, None)
    no_worse(total, narrow, want)
    assert torch.equal(OPS.add_low_rank(base, a, b, alpha, other), total if other is None else total + other)
    out = torch.empty_like(base)
    assert OPS.add_low_rank.out(base, a, b, alpha, other, out=out) is out
    assert torch.equal(out, OPS.add_low_rank(base, a, b, alpha, other))


@twins
def test_a_product_too_small_to_see_decides_no_tie(native: bool) -> None:
    """Of the sums of two bf16 numbers many lie halfway between two others: a product below the rounding of base leaves them as they are."""
    base, other = (numbers(64, 200, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    a, b = numbers(64, 8, dtype=torch.bfloat16, seed=3), numbers(8, 200, dtype=torch.bfloat16, seed=4)
    wide = base.double() + other.double()
    lies_between = (wide - 1e-5).bfloat16() != (wide + 1e-5).bfloat16()
    assert lies_between.float().mean() > 0.1
    assert (OPS.add_low_rank(base, a, b, 1e-6, other) != base + other).float().mean() < 0.005


ACTS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


@checked
@given(count=st.integers(1, 40_000), dtype=dtypes, act=st.sampled_from(gated.KINDS), scale=st.sampled_from([0.01, 1.0, 8.0]))
def test_gated_units(native: bool, count: int, dtype: torch.dtype, act: str, scale: float) -> None:
    """SwiGLU and GeGLU, forward and both gradients."""
    gate, up, grad = (numbers(count, dtype=dtype, seed=seed, scale=scale if not seed else 1.0) for seed in range(3))
    function = lambda gate, up: ACTS[act](gate) * up  # noqa: E731
    narrow, want = both(function, gate, up)
    no_worse(OPS.gated(gate, up, act), narrow, want)
    narrow, want = both(lambda grad, *rest: gradients(function, grad, *rest), grad, gate, up)
    made, out = OPS.gated_backward(grad, gate, up, act), (torch.empty_like(gate), torch.empty_like(up))
    OPS.gated_backward.out(grad, gate, up, act, to_gate=out[0], to_up=out[1])
    for got, same, chain, exact in zip(made, out, narrow, want, strict=True):
        no_worse(got, chain, exact)
        assert torch.equal(got, same)


@twins
@pytest.mark.parametrize("act", gated.KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_units_at_the_ends(native: bool, act: str, dtype: torch.dtype) -> None:
    """Where the activation is 0 or the identity to rounding, and for NaN."""
    gate = torch.tensor([0.0, -0.0, 1e-30, 90.0, 1e4, -90.0, -1e4, float("nan")], dtype=dtype)
    one = torch.ones_like(gate)
    got, want = OPS.gated(gate, one, act), ACTS[act](gate.double())
    assert torch.allclose(got.double(), want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-12, equal_nan=True)
    slope = OPS.gated_backward(one, gate, one, act)[0].double()
    assert torch.allclose(slope[:-1], torch.tensor([0.5, 0.5, 0.5, 1, 1, 0, 0]).double(), atol=1e-12)
    assert slope[-1].isnan()


@checked
@given(rows=st.integers(1, 40), columns=st.integers(2, 1000), dtype=dtypes, wide=st.booleans(), more=st.booleans(),
       scale=st.sampled_from([1e-3, 1.0, 100.0]))  # fmt: skip
def test_rms_norm(native: bool, rows: int, columns: int, dtype: torch.dtype, wide: bool, more: bool, scale: float) -> None:
    """Forward, and the gradient of x with and without the one that goes past the norm; the weight in the dtype of x, or fp32."""
    x, grad, other = (numbers(1, rows, columns, dtype=dtype, seed=seed, scale=scale if not seed else 1.0) for seed in range(3))
    weight = 1 + numbers(columns, dtype=torch.float32 if wide else dtype, seed=3, scale=0.1)

    def plainly(x: Tensor, weight: Tensor) -> Tensor:
        wider = x if x.dtype == torch.float64 else x.float()
        normed = wider * torch.rsqrt(wider.square().mean(-1, keepdim=True) + 1e-6)
        return (normed * weight).to(x.dtype) if wide else normed.to(x.dtype) * weight

    narrow, want = both(plainly, x, weight)
    got, r = OPS.rms_norm(x, weight, 1e-6)
    no_worse(got, narrow, want)

    def backward(grad: Tensor, x: Tensor, weight: Tensor, other: Tensor) -> Tensor:
        made = gradients(lambda x: plainly(x, weight), grad, x)[0]
        return made + other if more else made

    narrow, want = both(backward, grad, x, weight, other)
    beside = other if more else None
    got = OPS.rms_norm_backward(grad, x, weight, r, beside)
    no_worse(got, narrow, want)
    assert torch.equal(OPS.rms_norm_backward.out(grad, x, weight, r, beside, out=torch.empty_like(x)), got)


@checked
@given(batch=st.integers(1, 2), heads=st.integers(1, 5), tokens=st.integers(1, 40), middle=st.integers(1, 40), dtype=dtypes,
       shared=st.booleans(), dense=st.booleans())  # fmt: skip
def test_rope(native: bool, batch: int, heads: int, tokens: int, middle: int, dtype: torch.dtype, shared: bool, dense: bool) -> None:
    """Forward and backward, of heads in a token's row or apart, with angles for each sequence or for all."""
    size = 2 * middle
    x, grad = (numbers(batch, tokens, heads, size, dtype=dtype, seed=seed).transpose(1, 2) for seed in range(2))
    x, grad = (x.contiguous(), grad.contiguous()) if dense else (x, grad)
    cos, sin = (numbers(1 if shared else batch, 1, tokens, size, dtype=dtype, seed=seed) for seed in (2, 3))

    def plainly(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x * cos + torch.cat((-x[..., middle:], x[..., :middle]), -1) * sin

    narrow, want = both(plainly, x, cos, sin)
    no_worse(OPS.rope(x, cos, sin, False, False), narrow, want)
    narrow, want = both(lambda grad, x, *turn: gradients(lambda x: plainly(x, *turn), grad, x)[0], grad, x, cos, sin)
    no_worse(OPS.rope(grad, cos, sin, True, True), narrow, want)
    assert OPS.rope(x, cos, sin, False, False).stride() == x.stride()
    assert OPS.rope(x, cos, sin, False, True).is_contiguous()


CALLS: dict[str, tuple[Any, ...]] = {
    "add_low_rank": (torch.ones(2, 3, 40), torch.ones(6, 4), torch.ones(4, 40), 2.0, None),
    "gated": (torch.ones(3, 8), torch.ones(3, 8), "silu"),
    "gated_backward": (torch.ones(3, 8), torch.ones(3, 8), torch.ones(3, 8), "silu"),
    "rms_norm": (torch.ones(2, 3, 8), torch.ones(8), 1e-6),
    "rms_norm_backward": (torch.ones(2, 3, 8), torch.ones(2, 3, 8), torch.ones(8), torch.ones(2, 3, 1), None),
    "rope": (torch.ones(1, 4, 2, 8).transpose(1, 2), torch.ones(1, 1, 4, 8), torch.ones(1, 1, 4, 8), True, False),
}


@pytest.mark.parametrize("name", CALLS)
def test_fakes_and_out_forms(name: str) -> None:
    """Fake tensors get the geometry of real ones, and the plan may give each op its buffers."""
    op = getattr(OPS, name).default
    real = op(*CALLS[name])
    with torch_private.fake_mode() as mode:
        fakes = [mode.from_tensor(argument) if isinstance(argument, Tensor) else argument for argument in CALLS[name]]
        fake = op(*fakes)
    for a, b in zip(*((made if isinstance(made, tuple) else (made,)) for made in (real, fake)), strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
    assert torch_private.native_out_overload(op) is not None


@needs_library
def test_threads_change_no_bit() -> None:
    """Each number is computed by one thread, in an order of its own."""
    threads = torch.get_num_threads()
    x, grad = numbers(64, 1024, dtype=torch.bfloat16), numbers(64, 1024, dtype=torch.bfloat16, seed=1)
    made = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            product = OPS.add_low_rank(x, grad[:, :8], grad[:8], 2.0, None)
            made.append((product, *OPS.gated_backward(grad, x, x, "silu"), OPS.rms_norm(x, grad[0], 1e-6)[0]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in made[1:] for a, b in zip(made[0], other, strict=True))


@needs_library
def test_strided_tensors_are_taken() -> None:
    """What is not contiguous gives what its copy gives."""
    x = numbers(40, 33, dtype=torch.bfloat16).t()
    assert torch.equal(OPS.gated(x, x, "silu"), OPS.gated(x.contiguous(), x.contiguous(), "silu"))
    assert torch.equal(OPS.add_low_rank(x, x[:, :4], x[:4], 1.0, None), OPS.add_low_rank(x.contiguous(), x[:, :4], x[:4], 1.0, None))
