"""The attention kernel against the formula in float64: no further from it than torch's own, on any number of threads the same bits, out= too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mebp_compile import torch_private
from mebp_compile.kernels import attention

OPS, aten = torch.ops.mebp, torch.ops.aten
FORWARD, BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention_for_cpu_backward
SLACK = 1.1  # one rounding of a random sample is met only about
FEW = 8  # tokens
FP32 = 2.0**-24  # the share of a number that its rounding to fp32 may change
needs_library = pytest.mark.skipif(attention.library() is None, reason="the attention kernel is not built (no C compiler)")
twins = pytest.mark.parametrize("native", [pytest.param(True, marks=needs_library), False], ids=["C", "torch"])


@pytest.fixture(autouse=True)
def library_or_not(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `native` False the ops find no library."""
    if "native" in request.fixturenames and not request.getfixturevalue("native"):
        monkeypatch.setattr(attention, "library", lambda: None)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def heads(count: int, tokens: int, size: int, dtype: torch.dtype, seed: int, batch: int = 2, scale: float = 1.0) -> Tensor:
    """[batch, count, tokens, size], tokens outermost in memory, as a projection gives them."""
    made = scale * torch.randn((batch, tokens, count, size), generator=torch.Generator().manual_seed(seed))
    return made.to(dtype).transpose(1, 2)


def in_float64(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, causal: bool, scale: float) -> tuple[Tensor, ...]:
    """(out, sums, gradients of q, k, v)."""
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in wide[1:])
    scores = wide[0] @ keys.mT * scale
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    out = scores.softmax(-1) @ values
    return out.detach(), scores.detach().logsumexp(-1), *torch.autograd.grad(out, wide, grad.double())


def moved_by_rounding(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, causal: bool, scale: float, of_out: float) -> tuple[float, ...]:
    """How far (out, sums, gradients of q, k, v) may move, in the first order. Each score, its gradient and each sum of a row is rounded once to fp32:
    a weight exp(score - sum) changes by the share FP32 * (|score| + |sum|), which large scores make large. of_out: the share of each number of `out`
    that may be missing when the backward reads it."""
    together = q.shape[1] // k.shape[1]
    queries, slopes = q.double(), grad.double()
    keys, values = (x.double().repeat_interleave(together, 1) for x in (k, v))
    scores = queries @ keys.mT * scale
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    sums, weights = scores.logsumexp(-1, keepdim=True), scores.softmax(-1)
    share = FP32 * (scores.where(weights > 0, 0.0).abs() + sums.abs()) * weights
    out = weights @ values
    along = (slopes @ values.mT - (out * slopes).sum(-1, keepdim=True)).abs()
    roundings = FP32 * (slopes.abs() @ values.abs().mT) + of_out * (out * slopes).abs().sum(-1, keepdim=True)
    pull = scale * (share * along + weights * roundings)
    moved = [share @ values.abs() + share.sum(-1, keepdim=True) * out.abs(), share.sum(-1), pull @ keys.abs()]
    moved += [(part.mT @ other.abs()).unflatten(1, (-1, together)).sum(2) for part, other in ((pull, queries), (share, slopes))]
    return tuple(float(each.norm()) for each in moved)


def ours(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, causal: bool, scale: float) -> tuple[Tensor, ...]:
    out, sums = OPS.attention(q, k, v, causal, scale)
    return out, sums, *OPS.attention_backward(grad, q, k, v, out, sums, causal, scale)


def torchs(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, causal: bool, scale: float) -> tuple[Tensor, ...]:
    out, sums = FORWARD(q, k, v, 0.0, causal, scale=scale)
    return out, sums, *BACKWARD(grad, q, k, v, out, sums, 0.0, causal, scale=scale)


def distance(got: Tensor, want: Tensor, floor: float = 1e-30) -> float:
    """Relative, of the whole. floor: in the place of a norm that is smaller, where numbers cancel."""
    return float((got.double() - want).norm() / max(float(want.norm()), floor))


@twins
@settings(max_examples=25, deadline=None)
@example(tokens=1, sources=17, size=16, groups=3, together=1, causal=False, dtype=torch.bfloat16, large=True)
@example(tokens=1, sources=2, size=128, groups=1, together=1, causal=False, dtype=torch.float32, large=True)
@given(
    tokens=st.integers(1, 140), sources=st.integers(1, 140), size=st.sampled_from([16, 48, 64, 128, 256]), groups=st.sampled_from([1, 2, 3]),
    together=st.sampled_from([1, 4]), causal=st.booleans(), dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    large=st.booleans(),
)  # fmt: skip
def test_forward_and_backward(
    native: bool, tokens: int, sources: int, size: int, groups: int, together: int, causal: bool, dtype: torch.dtype, large: bool
) -> None:
    """Any numbers of tokens, keys and heads that share them; scores far from zero too. As near to float64 as torch's kernel, or as the
    roundings allow that both have: of scores and their gradients in fp32, and of `out` where tokens are too few to average it."""
    q, grad = (heads(groups * together, tokens, size, dtype, seed, scale=8.0 if large and not seed else 1.0) for seed in (0, 1))
    k, v = (heads(groups, sources, size, dtype, seed) for seed in (2, 3))
    scale = size**-0.5
    wanted, got, usual = (each(q, k, v, grad, causal, scale) for each in (in_float64, ours, torchs))
    moved = moved_by_rounding(q, k, v, grad, causal, scale, torch.finfo(dtype).eps / 2 if tokens < FEW else 0.0)
    for name, a, b, c, most in zip(("out", "sums", "to_q", "to_k", "to_v"), got, usual, wanted, moved, strict=True):
        assert a.dtype == b.dtype, name
        assert a.shape == b.shape, name
        floor = float(grad.norm()) if name.startswith("to_") else 1e-30
        rounding = max(distance(c.to(a.dtype), c, floor), most / max(float(c.norm()), floor))
        assert distance(a, c, floor) <= SLACK * max(distance(b, c, floor), rounding) + 2e-6, name


@twins
def test_geometry_is_that_of_torchs_kernel(native: bool) -> None:
    """What takes its place in a graph has to have the strides that later ops were traced with."""
    q, grad = (heads(4, 70, 16, torch.bfloat16, seed) for seed in (0, 1))
    k, v = (heads(2, 70, 16, torch.bfloat16, seed) for seed in (2, 3))
    with torch.device("meta"):
        meta = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) for x in (q, k, v, grad)]
    for given_tensors in ((q, k, v, grad), meta):
        pairs = zip(ours(*given_tensors, True, 0.25), torchs(*given_tensors, True, 0.25), strict=True)
        assert all(a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype for a, b in pairs)


@needs_library
@pytest.mark.parametrize(("batch", "groups"), [(1, 1), (1, 2), (2, 3)])
def test_bits_do_not_depend_on_threads(threads: None, batch: int, groups: int) -> None:
    """One walk or two, with one thread or more than there are parts."""
    q, grad = (heads(2 * groups, 200, 64, torch.bfloat16, seed, batch) for seed in (0, 1))
    k, v = (heads(groups, 200, 64, torch.bfloat16, seed, batch) for seed in (2, 3))

    def on(count: int) -> tuple[Tensor, ...]:
        torch.set_num_threads(count)
        return ours(q, k, v, grad, True, 0.125)

    first = on(1)
    for count in (2, 3, 4, 7):
        assert all(torch.equal(a, b) for a, b in zip(on(count), first, strict=True)), count


@twins
def test_out(native: bool) -> None:
    """Into given buffers the same bits, whose strides may be others; torch finds the overload."""
    q, grad = (heads(4, 70, 16, torch.float32, seed) for seed in (0, 1))
    k, v = (heads(2, 70, 16, torch.float32, seed) for seed in (2, 3))
    wanted = ours(q, k, v, grad, True, 0.25)
    made: list[Any] = [torch.full(x.shape, 7.0) for x in wanted]
    OPS.attention.out(q, k, v, True, 0.25, out=made[0], sums=made[1])
    OPS.attention_backward.out(grad, q, k, v, wanted[0], wanted[1], True, 0.25, to_q=made[2], to_k=made[3], to_v=made[4])
    assert all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True))
    for op in ("attention", "attention_backward"):
        assert torch_private.native_out_overload(getattr(OPS, op).default) is not None


def test_what_the_kernel_does_not_take() -> None:
    """Other dtypes, sizes, and heads whose numbers are apart go to the twin."""
    like = heads(2, 5, 32, torch.float32, 0)
    assert attention.takes(like, like)
    others = (like.double(), like[..., :24], heads(2, 5, 272, torch.float32, 0), like.mT.contiguous().mT, like[..., ::2])
    assert not any(attention.takes(other, other) for other in others)
    assert not attention.takes(like, like.bfloat16())
    odd = heads(2, 5, 24, torch.float32, 1)
    got = OPS.attention(odd, odd, odd, True, 0.2)[0]
    assert distance(got, in_float64(odd, odd, odd, odd, True, 0.2)[0]) < 1e-6
