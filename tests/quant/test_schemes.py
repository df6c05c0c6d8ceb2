"""Schemes: what pack writes, how large it is, what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quant_definitions import bf16_to_fp32, code_matrix, pack_group_int4, pack_group_nf4, pack_row_int8

from mebp_compile.errors import OptionError
from mebp_compile.quant import SCHEMES, choose_scheme, dequantise, scheme_named
from mebp_compile.quant.layout import TENSOR_ALIGN_BYTES

NAMES = sorted(SCHEMES)


def random_weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    weight[0] = 0
    weight[1, ::3] = -0.0
    weight[2] *= 1e-37
    weight[3] *= 1e30
    weight[4, :64] = torch.tensor([0.5, -0.5]).repeat(32)
    return weight


@pytest.mark.parametrize("name", ["int4", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_schemes_pack_as_the_loop_definition(name: str, dtype: torch.dtype) -> None:
    """Codes, nibble order and scales equal those of a definition in Python loops, special rows included."""
    weight = random_weight(8, 192).to(dtype)
    packed = SCHEMES[name].pack(weight)
    codes = code_matrix(name, packed.codes.numpy())
    scales = packed.scales.float().numpy()
    pack_group = pack_group_int4 if name == "int4" else pack_group_nf4
    for row in range(8):
        for group in range(3):
            values = weight[row, group * 64 : group * 64 + 64].float().tolist()
            want_codes, want_scale = pack_group(values)
            assert scales[row, group] == want_scale
            assert codes[row, group * 64 : group * 64 + 64].tolist() == want_codes


def test_int8_packs_as_the_loop_definition() -> None:
    """int8 codes and fp32 row scales equal those of a definition in Python loops, at a width with a tail."""
    weight = random_weight(8, 77)
    packed = SCHEMES["int8"].pack(weight)
    for row in range(8):
        want_codes, want_scale = pack_row_int8(weight[row].tolist())
        assert packed.scales[row, 0].item() == want_scale
        assert packed.codes[row].view(torch.int8).tolist() == want_codes


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 5), groups=st.integers(1, 4), power=st.integers(-30, 30))
def test_round_trip_error_is_within_one_step(seed: int, rows: int, groups: int, power: int) -> None:
    """No dequantised value is farther from its weight than the scheme's largest gap times the largest magnitude."""
    weight = torch.randn(rows, groups * 64, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    largest = weight.view(rows, groups, 64).abs().amax(-1, keepdim=True)
    for name, gap in (("int4", 1.02 / 8), ("nf4", 0.16), ("int8", 0.51 / 127)):
        error = (dequantise(SCHEMES[name].pack(weight), torch.float32) - weight).view(rows, groups, 64).abs()
        bound = largest.amax(1, keepdim=True) if name == "int8" else largest
        assert bool((error <= bound * gap).all()), name


@pytest.mark.parametrize("name", NAMES)
def test_packing_twice_changes_nothing(name: str) -> None:
    """A weight that consists of a scheme's own values (scales in the normal range) is stored without further loss."""
    first = dequantise(SCHEMES[name].pack(torch.randn(64, 128)), torch.float32)
    second = dequantise(SCHEMES[name].pack(first), torch.float32)
    assert torch.allclose(first, second, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_packed_bytes_is_the_size_of_the_record(name: str) -> None:
    """packed_bytes is codes, padding to 64 and scales, for matrices and for stacks of matrices."""
    scheme = SCHEMES[name]
    for shape in ((1, 64), (3, 64), (7, 192), (2, 5, 128)):
        packed = scheme.pack(torch.ones(shape))
        code_bytes = math.prod(shape) * scheme.bits // 8
        assert packed.codes.nbytes == code_bytes
        padded = -(-code_bytes // TENSOR_ALIGN_BYTES) * TENSOR_ALIGN_BYTES
        assert scheme.packed_bytes(shape) == padded + packed.scales.nbytes
        assert packed.scales.data_ptr() - packed.codes.data_ptr() == padded
        assert packed.shape == shape


def test_stacks_of_matrices_pack_row_by_row() -> None:
    """A 3-D weight packs as its matrix view does."""
    weight = torch.randn(3, 4, 128)
    for scheme in SCHEMES.values():
        whole, flat = scheme.pack(weight), scheme.pack(weight.view(12, 128))
        assert torch.equal(whole.codes, flat.codes)
        assert torch.equal(whole.scales, flat.scales)
        assert torch.equal(dequantise(whole).view(12, 128), dequantise(flat))


def test_large_weights_pack_as_their_parts() -> None:
    """A weight of several chunks packs as its rows do one by one."""
    weight = torch.randn(40, 16384)
    for scheme in SCHEMES.values():
        whole = scheme.pack(weight)
        for row in (0, 15, 16, 39):
            assert torch.equal(whole.codes[row], scheme.pack(weight[row : row + 1]).codes[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_weights_are_refused(name: str, bad: float) -> None:
    """A weight with one NaN or Inf raises OptionError."""
    weight = torch.ones(4, 128)
    weight[2, 70] = bad
    with pytest.raises(OptionError, match="NaN, Inf"):
        SCHEMES[name].pack(weight)


@pytest.mark.parametrize(
    ("name", "shape"), [("int4", (4, 96)), ("nf4", (64,)), ("int8", (4, 16)), ("int4", (0, 64)), ("int8", ())]
)
def test_unsupported_shapes_are_refused(name: str, shape: tuple[int, ...]) -> None:
    """Shapes that a scheme can't hold raise OptionError, and supports() says so before."""
    assert not SCHEMES[name].supports(shape)
    with pytest.raises(OptionError, match="can't hold shape"):
        SCHEMES[name].pack(torch.ones(shape))


def test_other_dtypes_and_unknown_names_are_refused() -> None:
    """float64 weights and unknown scheme names raise OptionError."""
    with pytest.raises(OptionError, match="can't pack"):
        SCHEMES["int4"].pack(torch.ones(2, 64, dtype=torch.float64))
    with pytest.raises(OptionError, match="unknown scheme"):
        scheme_named("int3")


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "want"),
    [
        ("model.layers.0.mlp.up_proj.weight", (96, 64), "bfloat16", "int4"),
        ("model.layers.0.mlp.up_proj.weight", (64, 96), "bfloat16", "int8"),
        ("model.layers.0.conv.weight", (64, 3, 4), "float32", "none"),
        ("model.layers.0.input_layernorm.weight", (64,), "bfloat16", "none"),
        ("model.layers.0.input_layernorm.weight", (1, 64), "bfloat16", "none"),
        ("model.layers.0.experts.gate_up_proj_bias", (8, 64), "bfloat16", "none"),
        ("model.position_ids", (1, 512), "int64", "none"),
        ("model.weight", (64, 64), "float64", "none"),
    ],
)
def test_choose_scheme(name: str, shape: tuple[int, ...], dtype: str, want: str) -> None:
    """Matrices take the scheme asked for, then int8; norms, biases, 1-D and other dtypes stay as they are."""
    assert choose_scheme("int4", name, shape, dtype) == want
    assert choose_scheme("none", name, shape, dtype) == "none"


def test_bf16_helper_agrees_with_torch() -> None:
    """The independent bf16 conversion used by these tests agrees with torch on every finite bf16."""
    bits = np.arange(65536, dtype=np.uint16)
    ours = bf16_to_fp32(bits)
    theirs = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    finite = np.isfinite(ours)
    assert np.array_equal(ours[finite], theirs[finite])
