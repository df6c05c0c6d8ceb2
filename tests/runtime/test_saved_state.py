"""State in files: tensors of any geometry come back as they were, damage is found, and memory is given back under pressure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mebp_compile.errors import DiskError, LeanError, StoreError
from mebp_compile.measure.child import run_child
from mebp_compile.runtime import pressure
from mebp_compile.runtime.pressure import CALLS_BETWEEN, REGROWTH_BYTES, Pressure
from mebp_compile.runtime.saved_state import plain_groups, read_state, write_state
from mebp_compile.runtime.tensor_file import Geometry, TensorFile, write_tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.int8, torch.bool)


def bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Dtype, shape, strides and elements."""
    return tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.tolist()


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Tensors of up to four dimensions, empty ones too; permuted, sliced, expanded, or views in the middle of a larger storage."""
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    raw = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 999))))
    tensor = (raw * 3 - 1).to(draw(st.sampled_from(DTYPES)))
    kind = draw(st.sampled_from(["plain", "permuted", "sliced", "expanded", "inner"]))
    if kind == "permuted":
        return tensor.permute(draw(st.permutations(range(tensor.dim()))))
    if kind == "sliced" and tensor.dim():
        return tensor[draw(st.integers(0, 1)) :: draw(st.integers(1, 3))]
    if kind == "expanded":
        return tensor.unsqueeze(0).expand(3, *shape)
    if kind == "inner":
        return torch.cat([tensor.flatten()] * 3)[tensor.numel() : 2 * tensor.numel()].view(shape)
    return tensor


@settings(max_examples=120, deadline=None)
@given(st.lists(tensors(), max_size=5))
def test_tensors_come_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, written: list[torch.Tensor]) -> None:
    """Whatever shape, strides and dtype: the same bits with the same strides, from memory that starts where torch's own does."""
    path = tmp_path_factory.mktemp("tensors") / "file.safetensors"
    named = {f"tensor {number}": tensor for number, tensor in enumerate(written)}
    geometries = {name: Geometry.of(tensor) for name, tensor in named.items()}
    digest = write_tensors(path, geometries, named.__getitem__)
    with TensorFile(path, digest) as file:
        for name, tensor in named.items():
            found = file.read(name, Geometry.from_data(geometries[name].to_data()))
            assert bits(found) == bits(tensor)
            assert found.storage_offset() == 0
            assert found.data_ptr() % 64 == 0


def test_other_readers_read_the_file(tmp_path: Path) -> None:
    """What is contiguous is read by the safetensors library under its name, with its values."""
    from safetensors.torch import load_file

    named = {"a.weight": torch.randn(3, 4, dtype=torch.bfloat16), "b": torch.arange(5), "c": torch.tensor(1.5)}
    write_tensors(tmp_path / "file", {name: Geometry.of(tensor) for name, tensor in named.items()}, named.__getitem__)
    found = load_file(tmp_path / "file")
    assert found.keys() == named.keys()
    assert all(torch.equal(found[name], named[name]) for name in named)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_any_changed_byte_is_found(tmp_path_factory: pytest.TempPathFactory, where: int) -> None:
    """One bit flipped anywhere, or the file cut anywhere, is a StoreError when it is opened."""
    path = tmp_path_factory.mktemp("tensors") / "file"
    digest = write_tensors(path, {"x": Geometry.of(torch.ones(3, 5))}, lambda name: torch.ones(3, 5))
    raw = bytearray(path.read_bytes())
    position = where % len(raw)
    path.write_bytes(raw[:position])
    with pytest.raises(StoreError):
        TensorFile(path, digest)
    raw[position] ^= 1
    path.write_bytes(raw)
    with pytest.raises(StoreError):
        TensorFile(path, digest)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    """An exception in mid-write, a dtype without a name, and a folder that is not there leave what was there, and no other file."""
    geometry = {"x": Geometry.of(torch.ones(2))}
    digest = write_tensors(tmp_path / "file", geometry, lambda name: torch.ones(2))
    with pytest.raises(ZeroDivisionError):
        write_tensors(tmp_path / "file", geometry, lambda name: torch.ones(2 // 0))
    with pytest.raises(StoreError, match="complex64"):
        write_tensors(tmp_path / "file", {"x": Geometry.of(torch.ones(2, dtype=torch.complex64))}, lambda name: torch.ones(2))
    with pytest.raises(DiskError):
        write_tensors(tmp_path / "nowhere" / "file", geometry, lambda name: torch.ones(2))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with TensorFile(tmp_path / "file", digest) as file:
        assert file.read("x", geometry["x"]).tolist() == [1.0, 1.0]
        with pytest.raises(StoreError, match="no tensor"):
            file.read("x", Geometry.of(torch.ones(3)))


def test_a_state_is_an_index_of_files(tmp_path: Path) -> None:
    """Sources come back from whichever file has them, without those left out; a transposed one stays so beside its row-by-row copy."""
    given = {"parameter:model:a": torch.randn(2, 3), "parameter:model:b": torch.randn(3, 2).t(), "optimizer:o:model:a:step": torch.tensor(3.0)}
    names = {source: source[-1] for source in given if source.startswith("parameter")}
    groups: Any = {"o": [{"lr": 0.1, "betas": [0.9, 0.999], "foreach": None, "nan": float("inf")}]}
    geometries = {source: Geometry.of(tensor) for source, tensor in given.items()}
    rest = {source: source for source in given if source != "parameter:model:a"}
    files = {"state.safetensors": rest, "parameters.safetensors": names}
    write_state(tmp_path, files, geometries, given.__getitem__, groups, "parameters.safetensors")
    state = read_state(tmp_path)
    assert state.groups == groups
    assert {source: bits(tensor) for source, tensor in state.tensors()} == {source: bits(tensor) for source, tensor in given.items()}
    assert [source for source, _ in state.tensors(but=frozenset(rest))] == ["parameter:model:a"]


ELSEWHERE = '{"format": 1, "files": {}, "tensors": {"a": ["../b", "a", ["uint8", [], []]]}, "groups": {}}'


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 2}', ELSEWHERE])
def test_a_damaged_index_is_a_typed_error(text: str, tmp_path: Path) -> None:
    """Whatever stands in state.json, a file elsewhere included, reading it raises StoreError; where there is none, LeanError."""
    with pytest.raises(LeanError):
        read_state(tmp_path)
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(StoreError):
        read_state(tmp_path)


def test_param_groups_are_plain() -> None:
    """Numbers, text and tuples of them are kept, tuples as lists; parameters, tensors and other objects are left out."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([{"params": [weight], "lr": torch.tensor(0.5), "tag": object()}], betas=(0.8, 0.99))
    (group,) = plain_groups({"o": optimizer})["o"]
    assert group["betas"] == [0.8, 0.99]
    assert group["weight_decay"] == optimizer.param_groups[0]["weight_decay"]
    assert {"params", "lr", "tag"}.isdisjoint(group)


# --- pressure ---


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.integers(5, 35), st.integers(0, 10))
def test_trims_come_near_the_limit_and_not_in_vain(held: list[int], limit: int, tile: int) -> None:
    """A look above the limit (with the tile that comes) trims, unless less than 1 MiB has come since the last trim; below it never does."""
    unit = 2 * REGROWTH_BYTES
    now, freed = [0], []
    patch = pytest.MonkeyPatch()
    patch.setattr(pressure, "anon_bytes", lambda statm: now[0])
    patch.setattr(pressure, "malloc_trim", lambda: freed.append(now[0]))
    try:
        watch = Pressure(limit * unit, tile * unit)
        last = 0
        for size in held:
            now[0] = size * unit
            before, last = len(freed), min(last, now[0])
            watch.before_tile()
            wanted = (size + tile) > limit and now[0] > last + REGROWTH_BYTES
            assert len(freed) - before == wanted
            last = now[0] if wanted else last
        assert watch.trims == len(freed)
    finally:
        patch.undo()


def holes(request: dict[str, Any]) -> dict[str, Any]:
    """A child's function: bytes that a pressed process holds after 40 MB in blocks of which every second one lives on were freed."""
    import os

    from mebp_compile.measure.process import anon_bytes, set_malloc_thresholds

    set_malloc_thresholds(1 << 30, 1 << 30)
    statm = os.open("/proc/self/statm", os.O_RDONLY)
    before = anon_bytes(statm)
    watch = Pressure(before + (request["limit_mb"] << 20), 0)
    blocks = [torch.ones(100 << 10, dtype=torch.uint8) for _ in range(400)]
    full = anon_bytes(statm)
    del blocks[::2]
    for _ in range(CALLS_BETWEEN):
        watch.look()
    return {"full": full - before, "after": anon_bytes(statm) - before, "trims": watch.trims, "alive": len(blocks)}


@pytest.mark.parametrize(("limit_mb", "trimmed"), [(10, True), (200, False)])
def test_holes_in_the_heap_are_given_back(limit_mb: int, trimmed: bool) -> None:
    """Half of 40 MB freed in holes leaves RssAnon when the limit is below it, and stays where it is far above."""
    found = run_child(__name__, "holes", {"limit_mb": limit_mb})
    assert found["full"] > 35 << 20
    assert found["trims"] == trimmed
    assert (found["after"] < 25 << 20) == trimmed
