"""The C kernels and the torch reference against the independent definition, bit for bit, on every path here."""

from __future__ import annotations

import logging
import shutil

import numpy as np
import pytest
import torch
from quant_definitions import bits_of, dense_bits
from torch import Tensor

from mebp_compile.errors import OptionError
from mebp_compile.quant import (
    SCHEMES,
    Packed,
    columns_maker,
    dequantise,
    dequantise_columns,
    dequantise_rows,
    embedding_rows,
    native,
    reference,
    rows_maker,
)
from mebp_compile.quant.native import available_paths

NAMES = sorted(SCHEMES)
DTYPES = [torch.bfloat16, torch.float32]
PATHS = ["reference", *available_paths()]
SENTINEL = 77.0


def run_path(path: str, packed: Packed, out: Tensor) -> None:
    scheme = SCHEMES[packed.scheme]
    if path == "reference":
        reference.dequantise_matrix(scheme, packed.codes, packed.scales, out)
    else:
        native.dequantise_matrix(scheme, packed.codes, packed.scales, out, path=path)


def random_packed(name: str, rows: int, columns: int, seed: int = 0) -> Packed:
    """Any codes with any scale bits: NaN, Inf, subnormals and negative scales included."""
    generator = torch.Generator().manual_seed(seed)
    record = SCHEMES[name].format.record((rows, columns))
    codes = torch.randint(0, 256, (rows, record.code_row_bytes), dtype=torch.uint8, generator=generator)
    scale_bytes = torch.randint(0, 256, (rows, record.scale_row_bytes), dtype=torch.uint8, generator=generator)
    return Packed(name, (rows, columns), codes, scale_bytes.view(SCHEMES[name].scale_dtype))


def test_the_kernels_are_built_where_there_is_a_compiler() -> None:
    """A machine with a C compiler has the library: an optional build must not vanish unseen."""
    if shutil.which("cc") or shutil.which("gcc"):
        assert "scalar" in available_paths()
    else:
        assert native.library() is None or "scalar" in available_paths()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["int4", "nf4"])
def test_every_bf16_scale_with_every_code(name: str, dtype: torch.dtype, path: str) -> None:
    """All 65,536 scale bit patterns times all 16 codes give the bits of the independent definition."""
    bits = torch.from_numpy(np.arange(65536, dtype=np.uint16).view(np.int16).copy()).view(256, 256)
    codes = torch.tensor([(j % 16) | ((15 - j % 16) << 4) for j in range(32)], dtype=torch.uint8).repeat(256, 256)
    packed = Packed(name, (256, 256 * 64), codes, bits.view(torch.bfloat16))
    out = torch.full((256, 256 * 64), SENTINEL, dtype=dtype)
    run_path(path, packed, out)
    assert np.array_equal(bits_of(out), dense_bits(name, packed.codes, packed.scales, dtype))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [32, 37, 64, 271])
def test_int8_on_random_and_special_scales(columns: int, dtype: torch.dtype, path: str) -> None:
    """Random codes (-128 too) with random, NaN, Inf, subnormal and overflowing scales, at widths with vector tails."""
    packed = random_packed("int8", 600, columns)
    special = [float("nan"), -float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, 1e-38, 3e38, -3e38, 1 / 127]
    packed.scales[: len(special), 0] = torch.tensor(special)
    out = torch.full((600, columns), SENTINEL, dtype=dtype)
    run_path(path, packed, out)
    assert np.array_equal(bits_of(out), dense_bits("int8", packed.codes, packed.scales, dtype))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_written_outside_out(name: str, path: str) -> None:
    """The elements before and after `out` in its storage keep their values, and so do the gaps between strided rows."""
    packed = random_packed(name, 3, 192)
    for dtype in DTYPES:
        frame = torch.full((5, 256), SENTINEL, dtype=dtype)
        run_path(path, packed, frame[1:4, 32:224])
        assert np.array_equal(
            bits_of(frame[1:4, 32:224].contiguous()), dense_bits(name, packed.codes, packed.scales, dtype)
        )
        frame[1:4, 32:224] = SENTINEL
        assert bool((frame == SENTINEL).all())


@pytest.mark.parametrize("without_library", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_slices_equal_the_whole(
    name: str, dtype: torch.dtype, without_library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row ranges, column ranges and looked-up rows equal slices of the whole, with and without the C library."""
    packed = random_packed(name, 11, 320, seed=3)
    whole = bits_of(dequantise(packed, dtype))
    assert np.array_equal(whole, dense_bits(name, packed.codes, packed.scales, dtype))
    if without_library:
        monkeypatch.setattr(native, "library", lambda: None)
    for r0, r1 in ((0, 11), (3, 4), (5, 11), (4, 4)):
        out = torch.full((r1 - r0, 320), SENTINEL, dtype=dtype)
        assert np.array_equal(bits_of(dequantise_rows(packed, r0, r1, out)), whole[r0:r1])
    for c0, c1 in ((0, 320), (64, 128), (128, 320), (64, 64)):
        out = torch.full((11, c1 - c0), SENTINEL, dtype=dtype)
        assert np.array_equal(bits_of(dequantise_columns(packed, c0, c1, out)), whole[:, c0:c1])
    for ids in (
        torch.tensor([[10, 0], [3, 3]]),
        torch.tensor([7], dtype=torch.int32),
        torch.tensor([], dtype=torch.int64),
    ):
        out = torch.full((ids.numel(), 320), SENTINEL, dtype=dtype)
        assert np.array_equal(bits_of(embedding_rows(packed, ids, out)), whole[ids.flatten().long().numpy()])


@pytest.mark.parametrize("without_library", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_tiles_made_later_equal_slices_of_the_whole(
    name: str, dtype: torch.dtype, without_library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls prepared for tiles of rows and of columns, made in any order over one memory, and nothing beyond the tile is touched."""
    packed = random_packed(name, 11, 320, seed=4)
    whole = bits_of(dequantise(packed, dtype))
    if without_library:
        monkeypatch.setattr(native, "library", lambda: None)
    for by_rows, tiles in ((True, [slice(0, 4), slice(4, 8), slice(8, 11)]), (False, [slice(0, 128), slice(128, 256), slice(256, 320)])):
        out, maker, shape = torch.empty(11 * 320, dtype=dtype), *((rows_maker, (-1, 320)) if by_rows else (columns_maker, (11, -1)))
        sizes = [(tile.stop - tile.start) * (320 if by_rows else 11) for tile in tiles]
        makes = [maker(packed, tile.start, tile.stop, out[:size].view(shape)) for tile, size in zip(tiles, sizes, strict=True)]
        for tile, make in reversed(list(zip(tiles, makes, strict=True))):
            out.fill_(SENTINEL)
            make()
            expected = whole[tile] if by_rows else whole[:, tile]
            assert np.array_equal(bits_of(out[: expected.size]).reshape(expected.shape), expected)
            assert bool((out[expected.size :] == SENTINEL).all())


def test_tiles_off_the_grid_and_small_outputs_are_refused() -> None:
    """Before any call is made."""
    packed = random_packed("int4", 4, 128)
    with pytest.raises(OptionError, match="multiples of 64"):
        columns_maker(packed, 32, 96, torch.empty(4, 64))
    with pytest.raises(OptionError, match="row range"):
        rows_maker(packed, 0, 5, torch.empty(5, 128))
    with pytest.raises(OptionError, match="out must be contiguous"):
        rows_maker(packed, 0, 4, torch.empty(511))


def test_int8_takes_any_column_range() -> None:
    """int8 has no groups, so a column range may start and end anywhere."""
    packed = random_packed("int8", 5, 100)
    out = torch.empty(5, 38)
    assert np.array_equal(
        bits_of(dequantise_columns(packed, 13, 51, out)), bits_of(dequantise(packed, torch.float32))[:, 13:51]
    )


@pytest.mark.parametrize("without_library", [False, True])
@pytest.mark.parametrize("bad", [-1, 11, 2**40])
def test_ids_outside_the_table_are_refused(bad: int, without_library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An id below 0 or past the last row raises OptionError and writes nothing."""
    if without_library:
        monkeypatch.setattr(native, "library", lambda: None)
    for name in NAMES:
        out = torch.full((2, 64), SENTINEL)
        with pytest.raises(OptionError, match="outside the table"):
            embedding_rows(random_packed(name, 11, 64), torch.tensor([1, bad]), out)
        assert bool((out == SENTINEL).all())


def test_bad_ranges_and_outputs_are_refused() -> None:
    """Ranges off the group grid or outside the matrix, and unsuitable outputs, raise OptionError."""
    packed = random_packed("int4", 4, 128)
    with pytest.raises(OptionError, match="multiples of 64"):
        dequantise_columns(packed, 32, 96, torch.empty(4, 64))
    for r0, r1 in ((-1, 2), (2, 5), (3, 2)):
        with pytest.raises(OptionError, match="row range"):
            dequantise_rows(packed, r0, r1, torch.empty(max(0, r1 - r0), 128))
    for out in (
        torch.empty(4, 127),
        torch.empty(4, 128, dtype=torch.float16),
        torch.empty(128, 4).t(),
        torch.empty(512),
    ):
        with pytest.raises(OptionError, match="out must be contiguous"):
            dequantise_rows(packed, 0, 4, out)


def test_an_unknown_path_is_refused() -> None:
    """Forcing a path that this processor lacks raises OptionError instead of an illegal instruction."""
    missing = [path for path in native.PATHS if path not in ("auto", *available_paths())]
    packed = random_packed("int4", 2, 64)
    for path in missing:
        with pytest.raises(OptionError):
            native.dequantise_matrix(SCHEMES["int4"], packed.codes, packed.scales, torch.empty(2, 64), path=path)
    assert missing, "no processor has both AVX and NEON"


def test_a_missing_library_is_said_once_in_one_line(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without the built library there is one log line, no warning, and the torch path takes over."""
    monkeypatch.setattr(native, "__file__", f"{tmp_path}/native.py")
    native.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            packed = random_packed("nf4", 3, 64)
            first = dequantise(packed, torch.float32)
            assert np.array_equal(bits_of(first), dense_bits("nf4", packed.codes, packed.scales, torch.float32))
            dequantise(packed, torch.float32)
        assert len(caplog.records) == 1
        assert "\n" not in caplog.records[0].getMessage()
        assert available_paths() == ()
    finally:
        monkeypatch.undo()
        native.library.cache_clear()
