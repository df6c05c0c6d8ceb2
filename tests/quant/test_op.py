"""`mebp::dequantise` as an op: captured as one node, usable on fake and meta tensors, strict about its arguments."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from mebp_compile.errors import OptionError
from mebp_compile.quant import SCHEMES, dequantise, dequantise_into

OP = torch.ops.mebp.dequantise
NAMES = sorted(SCHEMES)


def linear_of(name: str, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return x @ OP(codes, scales, name, (96, 128), x.dtype).t()


@pytest.mark.parametrize("mode", ["fake", "real"])
@pytest.mark.parametrize("name", NAMES)
def test_capture_gives_a_single_node_that_replays_exactly(name: str, mode: str) -> None:
    """make_fx records one dequantise node beside the matmul's own, and the traced graph gives the same bits."""
    packed = SCHEMES[name].pack(torch.randn(96, 128))
    x = torch.randn(5, 128).bfloat16()
    traced = make_fx(lambda *args: linear_of(name, *args), tracing_mode=mode)(x, packed.codes, packed.scales)
    targets = [str(node.target) for node in traced.graph.nodes if node.op == "call_function"]
    assert targets == ["mebp.dequantise.default", "aten.t.default", "aten.mm.default"]
    assert torch.equal(traced(x, packed.codes, packed.scales), linear_of(name, x, packed.codes, packed.scales))


def test_gradients_flow_past_the_frozen_weight() -> None:
    """A backward captured through the matmul holds the op once and no derivative of it."""
    packed = SCHEMES["int4"].pack(torch.randn(96, 128))

    def step(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(linear_of("int4", x, codes, scales).sum(), x)
        return gradient

    x = torch.randn(5, 128)
    traced = make_fx(step, tracing_mode="fake")(x, packed.codes, packed.scales)
    assert sum("mebp.dequantise" in str(node.target) for node in traced.graph.nodes) == 1
    assert torch.equal(traced(x, packed.codes, packed.scales), step(x, packed.codes, packed.scales))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    """torch's own checks of a custom op pass: schema, fake kernel against the real one, autograd registration."""
    packed = SCHEMES[name].pack(torch.randn(2, 3, 128))
    torch.library.opcheck(OP.default, (packed.codes, packed.scales, name, (2, 3, 128), dtype))
    out = torch.empty(2, 3, 128, dtype=dtype)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        OP.out, (packed.codes, packed.scales, name, (2, 3, 128), dtype), {"out": out}, test_utils=checks
    )


@pytest.mark.parametrize("name", NAMES)
def test_out_form_writes_into_the_buffer_given(name: str) -> None:
    """The out form returns the buffer itself, holding what the functional form returns."""
    packed = SCHEMES[name].pack(torch.randn(3, 4, 128))
    out = torch.empty(3, 4, 128, dtype=torch.bfloat16)
    result = dequantise_into(packed, out)
    assert result.data_ptr() == out.data_ptr()
    assert torch.equal(out, dequantise(packed))


def test_meta_tensors_give_meta_weights() -> None:
    """On meta tensors the op allocates nothing and returns the right shape and dtype."""
    codes = torch.empty(96, 64, dtype=torch.uint8, device="meta")
    scales = torch.empty(96, 2, dtype=torch.bfloat16, device="meta")
    result = OP(codes, scales, "int4", (96, 128), torch.bfloat16)
    assert result.is_meta
    assert result.shape == (96, 128)
    assert result.dtype == torch.bfloat16


def test_arguments_that_do_not_fit_together_are_refused() -> None:
    """Wrong shape, dtype, strides, scheme or output dtype raise OptionError before any kernel reads memory."""
    packed = SCHEMES["int4"].pack(torch.randn(4, 128))
    codes, scales = packed.codes, packed.scales
    good = (codes, scales, "int4", (4, 128), torch.bfloat16)
    OP(*good)
    bad = {
        "rows": (codes, scales, "int4", (8, 128), torch.bfloat16),
        "columns": (codes, scales, "int4", (4, 192), torch.bfloat16),
        "off grid": (codes, scales, "int4", (4, 100), torch.bfloat16),
        "scheme": (codes, scales, "int8", (4, 128), torch.bfloat16),
        "unknown": (codes, scales, "int5", (4, 128), torch.bfloat16),
        "dtype": (codes, scales, "int4", (4, 128), torch.float16),
        "scale dtype": (codes, scales.half(), "int4", (4, 128), torch.bfloat16),
        "strided": (codes.repeat(1, 2)[:, ::2], scales, "int4", (4, 128), torch.bfloat16),
        "few scales": (codes, scales[:, :1].contiguous(), "int4", (4, 128), torch.bfloat16),
    }
    for what, arguments in bad.items():
        with pytest.raises(OptionError) as caught:
            OP(*arguments)
        assert caught.value.fix, f"wrong {what}: the error says what to try"
    with pytest.raises(OptionError, match="same dtype"):
        OP.out(*good, out=torch.empty(4, 128))
