"""The tiled loss against the textbook in float64: value, gradients, precision, whatever the tiles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mebp_compile.kernels import cross_entropy, native
from mebp_compile.kernels.cross_entropy import MEAN, SUM, head_gradient, linear_cross_entropy

TOKENS, FEATURES, VOCABULARY = 24, 64, 500


def problem(dtype: torch.dtype, sharp: float = 1.0, ignored: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and targets. sharp: scales the logits; ignored: how many targets are -100."""
    draw = torch.Generator().manual_seed(0)
    x = (sharp * torch.randn(TOKENS, FEATURES, generator=draw)).to(dtype)
    weight = (torch.randn(VOCABULARY, FEATURES, generator=draw) / FEATURES**0.5).to(dtype)
    target = torch.randint(0, VOCABULARY, (TOKENS,), generator=draw)
    target[:ignored] = -100
    return x, weight, target


def truth(x: Tensor, weight: Tensor, target: Tensor, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, d / d x and d / d weight in float64."""
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(x @ weight.t(), target, reduction=reduction)
    loss.backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert weight.grad is not None
    return loss.detach(), x.grad, weight.grad


def eager(x: Tensor, weight: Tensor, target: Tensor, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    """The same as a model computes it: logits in the model's dtype, softmax in fp32."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy((x @ weight.t()).float(), target, reduction=reduction)
    loss.backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert weight.grad is not None
    return loss.detach(), x.grad, weight.grad


def tiled(x: Tensor, weight: Tensor, target: Tensor, reduction: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    loss, count, direction, softmax = linear_cross_entropy(x, weight, target, reduction, -100, rows)
    return loss, direction, head_gradient(torch.ones(()), x, weight, target, softmax, count, reduction, -100, rows)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.fixture(params=[64, 96, VOCABULARY, 4096])
def rows(request: pytest.FixtureRequest) -> int:
    """Rows of a tile: even, with a remainder, one tile, more than there are."""
    return int(request.param)


@pytest.fixture(params=["native", "torch"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The C kernel, and the torch code that runs without a compiler."""
    if request.param == "native" and native.library() is None:
        pytest.skip("the cross-entropy kernel is not built (no compiler)")
    if request.param == "torch":
        monkeypatch.setattr(native, "takes", lambda logits: False)
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("reduction", "name"), [(MEAN, "mean"), (SUM, "sum")])
@pytest.mark.parametrize("ignored", [0, 7])
def test_as_near_to_float64_as_eager_is(dtype: torch.dtype, reduction: int, name: str, ignored: int, rows: int) -> None:
    """Loss and both gradients: an error of at most 1.5 times eager's own."""
    x, weight, target = problem(dtype, ignored=ignored)
    want, own, ours = truth(x, weight, target, name), eager(x, weight, target, name), tiled(x, weight, target, reduction, rows)
    for exact, theirs, mine in zip(want, own, ours, strict=True):
        assert error(mine.to(theirs.dtype), exact) <= 1.5 * error(theirs, exact) + 1e-6


def test_a_token_that_is_predicted_well_keeps_its_gradient(rows: int) -> None:
    """With p(target) near 1 the gradient is a small difference: every row is as precise as eager's, not only their sum."""
    x, weight, target = problem(torch.bfloat16)
    x[:] = 30 * weight[target]
    want, own, ours = truth(x, weight, target, "mean"), eager(x, weight, target, "mean"), tiled(x, weight, target, MEAN, rows)
    assert float(torch.softmax(x.double() @ weight.double().t(), 1).gather(1, target[:, None]).median()) > 0.999
    for row in range(TOKENS):
        assert error(ours[1][row].bfloat16(), want[1][row]) <= 3 * error(own[1][row], want[1][row]) + 0.01


def test_large_logits_do_not_overflow(rows: int) -> None:
    """Logits of thousands, whose exponentials no float holds."""
    x, weight, target = problem(torch.float32, sharp=1000.0)
    want, ours = truth(x, weight, target, "mean"), tiled(x, weight, target, MEAN, rows)
    assert error(ours[0], want[0]) < 1e-5
    assert error(ours[1], want[1]) < 1e-4


def test_no_valid_target_gives_what_eager_gives() -> None:
    """Mean over nothing: a loss of NaN, and gradients of zero."""
    x, weight, target = problem(torch.float32, ignored=TOKENS)
    own, ours = eager(x, weight, target, "mean"), tiled(x, weight, target, MEAN, 64)
    assert torch.isnan(own[0])
    assert torch.isnan(ours[0])
    assert torch.equal(own[1], ours[1])
    assert torch.equal(own[1], torch.zeros_like(x))


def test_a_target_outside_the_vocabulary_is_an_error() -> None:
    """As in torch: never a loss of garbage."""
    x, weight, target = problem(torch.float32)
    for wrong in (VOCABULARY, -1):
        target[3] = wrong
        with pytest.raises(IndexError, match="out of bounds"):
            linear_cross_entropy(x, weight, target, MEAN, -100, 64)


def test_traced_shapes_are_the_real_ones() -> None:
    """Shapes and dtypes on meta tensors as on real ones."""
    x, weight, target = problem(torch.bfloat16)
    real = torch.ops.mebp.linear_cross_entropy(x, weight, target, MEAN, -100, 64)
    meta = torch.ops.mebp.linear_cross_entropy(x.to("meta"), weight.to("meta"), target.to("meta"), MEAN, -100, 64)
    assert [(a.shape, a.dtype) for a in real] == [(a.shape, a.dtype) for a in meta]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 100])
def test_the_kernel_is_its_twin(dtype: torch.dtype, columns: int, path: str) -> None:
    """One tile, target inside or not, a first tile or a later one: within rounding of float64, NaN and infinities as in torch."""
    draw = torch.Generator().manual_seed(columns)
    logits = (8 * torch.randn(6, columns, generator=draw)).to(dtype)
    logits[2] = -torch.inf
    logits[3, 0] = torch.nan
    rows, target = torch.zeros(columns, 4, dtype=dtype), torch.tensor([0, columns - 1, -100, 0, columns, 0])
    top, rest, aim, aimed, pulled = cross_entropy.begin(torch.zeros(6, 4, dtype=dtype))
    top[4:], rest[4:], pulled[:] = 30.0, 2.0, 1.0
    want = logits.double()
    own = torch.zeros_like(want, dtype=torch.bool)
    own[[0, 1, 3, 5], [0, columns - 1, 0, 0]] = True
    cross_entropy.tile(logits, rows, target, 0, top, rest, aim, aimed, pulled)
    regular = [0, 1, 4, 5]
    higher = torch.maximum(want.amax(1), torch.tensor([-torch.inf] * 4 + [30.0] * 2, dtype=torch.float64))
    share = torch.exp(want - higher[:, None]).masked_fill(own, 0.0)
    keep = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64) * torch.exp(30.0 - higher)
    assert torch.allclose(top.double()[regular], higher[regular])
    assert torch.allclose(rest.double()[regular], (share.sum(1) + 2.0 * keep)[regular], rtol=1e-5, atol=1e-30)
    assert torch.allclose(logits.double()[regular], share[regular], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-35)
    assert torch.allclose(aim[[0, 1, 5]].double(), want[own][[0, 1, 3]])
    assert torch.equal(pulled[regular, 0].double(), keep[regular])
    assert torch.isnan(logits[3, 1:]).sum() == 0 if columns == 1 else not torch.isfinite(rest[3]) or torch.isnan(aim[3])
