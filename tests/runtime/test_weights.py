"""The weight store: what the builders write, what reads return, what is refused, what an error leaves behind."""

from __future__ import annotations

import json
import os
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from threads import one_thread
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mebp_compile.errors import DiskError, MebpError, OptionError, StoreError
from mebp_compile.quant import SCHEMES, dequantise, manifest
from mebp_compile.quant.safetensors_file import MAX_HEADER_BYTES
from mebp_compile.runtime.weights import WeightStore

SCHEME_NAMES = sorted(SCHEMES)


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with one_thread():
        yield


class Block(nn.Module):
    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.up = nn.Linear(width, 96, bias=True, dtype=dtype)
        self.down = nn.Linear(96, width, bias=False, dtype=dtype)  # 96 columns: no multiple of 64
        self.norm = nn.LayerNorm(width, dtype=dtype)


class Model(nn.Module):
    """Embedding and head tied, two blocks."""

    def __init__(self, width: int = 128, vocabulary: int = 40, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width, dtype=dtype)
        self.layers = nn.ModuleList(Block(width, dtype) for _ in range(2))
        self.head = nn.Linear(width, vocabulary, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight


def frozen_model(**options: Any) -> Model:
    torch.manual_seed(0)
    return Model(**options).requires_grad_(False)


def all_parameters(name: str, parameter: Tensor) -> bool:
    return True


@pytest.fixture
def store(tmp_path: Path) -> Any:
    """A small int4 store of every parameter of the model: quantised matrices, int8 fallbacks, plain vectors."""
    with WeightStore.from_module(frozen_model(), tmp_path / "store", "int4", all_parameters) as opened:
        yield opened


def expected(weight: Tensor, scheme: str) -> Tensor:
    """What the store should hold for a weight: itself, or its packed form dequantised."""
    return weight if scheme == "none" else dequantise(SCHEMES[scheme].pack(weight), torch.float32).to(weight.dtype)


# ---- builders ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("scheme", [*SCHEME_NAMES, "none"])
def test_from_module_round_trip(scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Every parameter comes back as packing and dequantising it directly gives it; vectors come back as they were."""
    model = frozen_model(dtype=dtype)
    with WeightStore.from_module(model, tmp_path / "store", scheme, all_parameters) as store:
        for name, parameter in model.named_parameters():
            entry = store.entry(name)
            want = (
                "none" if parameter.dim() < 2 else "int8" if scheme != "none" and parameter.shape[1] == 96 else scheme
            )
            assert entry.scheme == want
            assert entry.dtype == str(dtype).removeprefix("torch.")
            assert torch.equal(store.dense(name), expected(parameter, want))
            assert store.dense(name, torch.float32).dtype == torch.float32
        store.verify()


def test_from_module_takes_frozen_matrices_by_default(tmp_path: Path) -> None:
    """Trainable parameters and vectors are left out; `select` overrides that."""
    model = frozen_model()
    model.layers[0].up.weight.requires_grad_(True)
    with WeightStore.from_module(model, tmp_path / "store", "nf4") as store:
        assert set(store.names) == {
            "embed.weight",
            "layers.0.down.weight",
            "layers.1.up.weight",
            "layers.1.down.weight",
        }
    with WeightStore.from_module(model, tmp_path / "other", "nf4", lambda name, _: name.endswith("up.weight")) as store:
        assert set(store.names) == {"layers.0.up.weight", "layers.1.up.weight"}


def test_tied_parameters_are_stored_once(store: WeightStore) -> None:
    """The head is an alias of the embedding: one record, both names readable."""
    assert "head.weight" not in store.names
    assert dict(store.aliases) == {"head.weight": "embed.weight"}
    assert "head.weight" in store
    assert store.entry("head.weight") is store.entry("embed.weight")
    assert torch.equal(store.dense("head.weight"), store.dense("embed.weight"))


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    """A Hugging Face folder: one file, or shards and their index."""
    folder.mkdir()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def checkpoint_tensors() -> dict[str, Tensor]:
    tensors = {name: parameter.clone() for name, parameter in frozen_model().named_parameters()}
    more = {"position_ids": torch.arange(70).view(1, 70), "scalar": torch.tensor(3.0), "empty": torch.ones(0, 64)}
    return {**tensors, **more, "mask": torch.tensor([True, False, True])}


@pytest.mark.parametrize("shards", [1, 3])
def test_from_checkpoint_round_trip(shards: int, tmp_path: Path) -> None:
    """Every tensor of a checkpoint folder, sharded or not, is stored under its name, whatever its dtype and shape."""
    tensors = checkpoint_tensors()
    write_checkpoint(tmp_path / "checkpoint", tensors, shards)
    with WeightStore.from_checkpoint(tmp_path / "checkpoint", tmp_path / "store", "nf4") as store:
        assert set(store.names) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(store.dense(name), expected(tensor, store.entry(name).scheme)), name
        assert store.entry("embed.weight").scheme == "nf4"
        assert store.manifest.model_id == "checkpoint"


def test_from_checkpoint_and_from_module_write_the_same_bytes(tmp_path: Path) -> None:
    """The same weights give the same data file whichever builder read them."""
    model = nn.ModuleDict({"a": nn.Linear(128, 16), "b": nn.Linear(64, 16)}).requires_grad_(False)
    tensors = {name: parameter.data for name, parameter in model.named_parameters()}
    write_checkpoint(tmp_path / "checkpoint", tensors, 1)
    with (
        WeightStore.from_checkpoint(tmp_path / "checkpoint", tmp_path / "one", "int4") as one,
        WeightStore.from_module(model, tmp_path / "two", "int4", all_parameters) as two,
    ):
        assert {name: one.dense(name).tolist() for name in one.names} == {
            name: two.dense(name).tolist() for name in two.names
        }


def test_from_config_is_random_and_reproducible(tmp_path: Path) -> None:
    """A meta model gives normal weights of deviation 0.02, decided by seed and name; norms are ones, biases zeros."""
    with torch.device("meta"):
        model = Model(width=512, vocabulary=1200)
    stores = [WeightStore.from_config(model, tmp_path / str(i), "int8", seed) for i, seed in enumerate((1, 1, 2))]
    first, same, other = (store.dense("embed.weight", torch.float32) for store in stores)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert abs(first.mean().item()) < 1e-3
    assert abs(first.std().item() - 0.02) < 5e-4
    assert not torch.equal(stores[0].dense("layers.0.up.weight"), stores[0].dense("layers.1.up.weight"))
    assert bool((stores[0].dense("layers.0.norm.weight") == 1).all())
    assert bool((stores[0].dense("layers.0.up.bias") == 0).all())
    for store in stores:
        store.close()


def test_progress_counts_up_to_the_total(tmp_path: Path) -> None:
    """The callback names every stored tensor once, with rising byte counts that never pass the total."""
    calls: list[tuple[str, int, int]] = []
    path = tmp_path / "store"
    WeightStore.from_module(frozen_model(), path, "int4", progress=lambda *call: calls.append(call)).close()
    with WeightStore.open(path) as store:
        assert [name for name, _, _ in calls] == list(store.names)
    done = [done_bytes for _, done_bytes, _ in calls]
    assert done == sorted(done)
    assert 0 < done[-1] <= calls[-1][2]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensor storages made inside it that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size_bytes = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live_bytes += size_bytes
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self._drop, key, size_bytes)

    def _drop(self, key: int, size_bytes: int) -> None:
        self._known.discard(key)
        self.live_bytes -= size_bytes


def test_building_holds_a_chunk_at_a_time(tmp_path: Path) -> None:
    """Building a store of two 16 MiB tables never has 4 MiB of tensors alive; the meter sees a table made whole."""
    with torch.device("meta"):
        model = nn.ModuleList(nn.Embedding(8192, 512) for _ in range(2))
    with LiveBytes() as meter:
        WeightStore.from_config(model, tmp_path / "store", "int4", seed=0).close()
    assert 1 << 18 < meter.peak_bytes < 4 << 20
    with LiveBytes() as meter, WeightStore.open(tmp_path / "store") as store:
        store.dense("0.weight")
    assert meter.peak_bytes > 16 << 20


# ---- the files ----


@pytest.mark.parametrize("scheme", [*SCHEME_NAMES, "none"])
def test_files_are_safetensors_and_aligned(scheme: str, tmp_path: Path) -> None:
    """The safetensors library reads the codes and scales; layers lie on 4096 bytes, side by side, and records on 64."""
    with WeightStore.from_module(frozen_model(), tmp_path / "store", scheme, all_parameters) as store:
        with safe_open(tmp_path / "store" / "weights-00000.safetensors", "pt") as file:
            for name in store.names:
                entry = store.entry(name)
                buffer = torch.empty(entry.length, dtype=torch.uint8)
                store.read_into(name, buffer)
                if entry.scheme == "none":
                    assert torch.equal(file.get_tensor(name), store.plain(name, buffer))
                else:
                    assert torch.equal(file.get_tensor(f"{name}.codes"), store.packed(name, buffer).codes)
                    assert torch.equal(file.get_tensor(f"{name}.scales"), store.packed(name, buffer).scales)
        for layer in store.manifest.layers:
            assert layer.offset % 4096 == 0
            assert all(
                entry.offset % 64 == 0 and entry.scale_offset % 64 == 0
                for entry in layer.entries
                if entry.scheme != "none"
            )
            assert all(layer.offset <= entry.offset < layer.offset + layer.length for entry in layer.entries)
        assert [layer.name for layer in store.manifest.layers] == ["embed", "layers.0", "layers.1"]


def test_large_stores_take_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file ends before a layer that would pass the size limit, and the store reads the same."""
    monkeypatch.setattr("mebp_compile.quant.build.MAX_FILE_BYTES", 16 << 10)
    model = frozen_model()
    with WeightStore.from_module(model, tmp_path / "store", "int4") as store:
        assert len(store.manifest.files) == 3
        store.verify()
        assert torch.equal(store.dense("layers.1.up.weight"), expected(model.layers[1].up.weight, "int4"))


# ---- reading ----


def test_read_into_fills_any_buffer_and_nothing_beyond(store: WeightStore) -> None:
    """Tensors, memoryviews and bytearrays get the same record; bytes behind it keep their value."""
    for name in store.names:
        length = store.entry(name).length
        buffers = [torch.full((length + 64,), 7, dtype=torch.uint8), bytearray(b"\7" * (length + 64))]
        for buffer in [*buffers, memoryview(bytearray(b"\7" * (length + 64)))]:
            assert store.read_into(name, buffer) == length
            assert bytes(memoryview(buffer.numpy() if isinstance(buffer, Tensor) else buffer)[length:]) == b"\7" * 64
            if store.entry(name).scheme != "none":
                assert torch.equal(dequantise(store.packed(name, buffer), torch.bfloat16), store.dense(name))
            else:
                assert torch.equal(store.plain(name, buffer), store.dense(name))


def test_unsuitable_buffers_and_names_are_refused(store: WeightStore) -> None:
    """Buffers that are too small, read-only or not u8, unknown names, and the wrong kind of view raise OptionError."""
    name = "layers.0.up.weight"
    length = store.entry(name).length
    small: list[Any] = [torch.empty(length - 1, dtype=torch.uint8), bytearray(length - 1), memoryview(bytes(length))]
    for buffer in [*small, torch.empty(length), torch.empty(2 * length, dtype=torch.uint8)[::2]]:
        with pytest.raises(OptionError, match="buffer must be"):
            store.read_into(name, buffer)
    with pytest.raises(OptionError, match="has no tensor"):
        store.entry("layers.9.up.weight")
    with pytest.raises(OptionError, match=r"store\.plain"):
        store.packed("layers.0.up.bias", bytearray(4096))
    with pytest.raises(OptionError, match=r"store\.packed"):
        store.plain(name, bytearray(length))


@pytest.mark.parametrize("scheme", [*SCHEME_NAMES, "none"])
def test_row_reads_equal_rows_of_the_whole(scheme: str, tmp_path: Path) -> None:
    """Row ranges and selected rows, repeated and unordered ones too, give the rows of the dense weight."""
    with WeightStore.from_module(frozen_model(), tmp_path / "store", scheme) as store:
        whole = store.dense("embed.weight")
        picks = [[0], [39, 3, 4, 5, 5, 0], [], list(range(40))]
        for rows in [list(range(0, 40)), list(range(7, 9)), *picks]:
            buffer = torch.empty(store.rows_bytes("embed.weight", len(rows)), dtype=torch.uint8)
            if rows == list(range(7, 9)):
                filled = store.read_rows_into("embed.weight", 7, 9, buffer)
            else:
                filled = store.read_selected_rows_into("embed.weight", torch.tensor(rows, dtype=torch.int64), buffer)
            assert filled == buffer.numel()
            if not rows:
                continue
            if scheme == "none":
                part = store.plain("embed.weight", buffer, rows=len(rows))
            else:
                part = dequantise(store.packed("embed.weight", buffer, rows=len(rows)), torch.bfloat16)
            assert torch.equal(part, whole[rows])
        for r0, r1 in ((-1, 2), (39, 41), (5, 4)):
            with pytest.raises(OptionError, match="rows outside"):
                store.read_rows_into("embed.weight", r0, r1, bytearray(1 << 16))
        with pytest.raises(OptionError, match="rows outside"):
            store.read_selected_rows_into("embed.weight", [40], bytearray(1 << 16))


def test_a_whole_record_is_one_read_and_rows_are_two(store: WeightStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first touch, read_into asks the kernel once, read_rows_into twice."""
    store.verify()
    store.dense("embed.weight")
    calls = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: calls.append(args) or real(*args))
    store.read_into("embed.weight", bytearray(1 << 16))
    assert len(calls) == 1
    store.read_rows_into("embed.weight", 3, 30, bytearray(1 << 16))
    assert len(calls) == 3


def test_short_reads_are_continued(store: WeightStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that returns at most 100 bytes a read gives the same weights."""
    want = {name: store.dense(name) for name in store.names}
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: real(fd, [views[0][:100]], at))
    with WeightStore.open(store.path) as again:
        assert all(torch.equal(again.dense(name), tensor) for name, tensor in want.items())


def test_a_read_error_is_a_disk_error(store: WeightStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """EIO from the kernel surfaces as DiskError, and the store works again once the disk does."""

    def fail(*args: Any) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(DiskError, match="Input/output"):
            store.dense("embed.weight")
    store.dense("embed.weight")


def test_dropping_the_cache_changes_nothing(store: WeightStore) -> None:
    """A store opened with drop_cache reads the same bytes."""
    with WeightStore.open(store.path, drop_cache=True) as other:
        assert all(torch.equal(other.dense(name), store.dense(name)) for name in store.names)


def test_reading_from_several_threads(store: WeightStore) -> None:
    """Eight threads reading all tensors of a fresh store at once, first touch included, get the right bytes."""
    want = {name: store.dense(name) for name in store.names}
    wrong: list[str] = []
    with WeightStore.open(store.path) as shared:

        def read_all(seed: int) -> None:
            for name in random.Random(seed).sample(list(shared.names), len(shared.names)):
                if not torch.equal(shared.dense(name), want[name]):
                    wrong.append(name)

        threads = [threading.Thread(target=read_all, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_a_closed_store_says_so(store: WeightStore) -> None:
    """Reading after close raises StoreError; closing twice is fine."""
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.dense("embed.weight")


def test_the_digest_is_checked_on_first_touch_only(store: WeightStore) -> None:
    """A fresh store refuses a damaged layer and reads the others; verify finds damage done after the first touch."""
    store.dense("layers.0.up.weight")
    flip(store.path / "weights-00000.safetensors", store.entry("layers.0.up.weight").offset + 5, 1)
    store.read_into("layers.0.up.weight", bytearray(1 << 16))
    with pytest.raises(StoreError, match=r"layers\.0"):
        store.verify()
    with WeightStore.open(store.path) as fresh:
        for read in (fresh.dense, lambda name: fresh.read_rows_into(name, 0, 1, bytearray(4096))):
            with pytest.raises(StoreError, match=r"layer layers\.0 .* damaged"):
                read("layers.0.up.weight")
        fresh.dense("layers.1.up.weight")


# ---- damage ----


def flip(path: Path, offset: int, mask: int) -> None:
    """XOR one byte of a file with `mask`."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


def is_found(path: Path) -> bool:
    """True when opening and verifying the store raises StoreError; any other error is a failure."""
    try:
        with WeightStore.open(path) as store:
            store.verify()
    except StoreError:
        return True
    return False


def test_flipped_bytes_of_manifest_and_header_are_found(store: WeightStore) -> None:
    """No byte of the manifest, nor of a header's length and text, can change unseen; its padding is sampled."""
    data = store.path / "weights-00000.safetensors"
    header = data.read_bytes()[: store.manifest.files[0].header_bytes]
    text_bytes = len(header.rstrip(b" "))
    places = [(store.path / "manifest.json", i) for i in range((store.path / "manifest.json").stat().st_size)]
    places += [(data, i) for i in [*range(text_bytes), *range(text_bytes, len(header), 97), len(header) - 1]]
    draw = random.Random(0)
    for file, offset in places:
        mask = 1 << draw.randrange(8)
        flip(file, offset, mask)
        with pytest.raises(StoreError):
            WeightStore.open(store.path).close()
        flip(file, offset, mask)
    assert not is_found(store.path)


def test_flipped_payload_bits_are_found(store: WeightStore) -> None:
    """Random single-bit flips anywhere behind the header, padding included, are found."""
    file = store.path / "weights-00000.safetensors"
    draw = random.Random(1)
    for _ in range(300):
        offset, mask = draw.randrange(store.manifest.files[0].header_bytes, file.stat().st_size), 1 << draw.randrange(8)
        flip(file, offset, mask)
        assert is_found(store.path)
        flip(file, offset, mask)
    assert not is_found(store.path)


@pytest.mark.parametrize("name", ["manifest.json", "weights-00000.safetensors"])
def test_truncation_and_growth_are_found(name: str, store: WeightStore) -> None:
    """Cutting a file at any of many places, emptying it, removing it, or adding a byte is found on opening."""
    file = store.path / name
    raw = file.read_bytes()
    for length in [0, 1, 7, 8, *range(64, len(raw), max(1, len(raw) // 100)), len(raw) - 1]:
        file.write_bytes(raw[:length])
        with pytest.raises(StoreError):
            WeightStore.open(store.path)
    file.write_bytes(raw + b" ")
    assert is_found(store.path)
    file.unlink()
    assert is_found(store.path)
    file.write_bytes(raw)
    assert not is_found(store.path)


def test_swapped_layers_are_found(store: WeightStore) -> None:
    """Exchanging the bytes of two layers of one size is found."""
    first, second = (layer for layer in store.manifest.layers if layer.name.startswith("layers."))
    assert first.length == second.length
    file = store.path / "weights-00000.safetensors"
    raw = bytearray(file.read_bytes())
    one, two = (slice(layer.offset, layer.offset + layer.length) for layer in (first, second))
    raw[one], raw[two] = raw[two], raw[one]
    file.write_bytes(raw)
    assert is_found(store.path)


def test_a_file_that_shrinks_while_open_is_found(store: WeightStore) -> None:
    """Reading past a truncation that happened after opening raises StoreError, not garbage."""
    store.verify()
    store.dense("layers.1.up.weight")
    os.truncate(store.path / "weights-00000.safetensors", 4096)
    with pytest.raises(StoreError, match="shorter"):
        store.dense("layers.1.up.weight")


# ---- hostile manifests ----


def resign(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and give it a valid digest and form, so that only the checks of its content can refuse it."""
    document = json.loads((path / "manifest.json").read_bytes())
    change(document)
    document["digest"] = manifest._digest_of(document)
    (path / "manifest.json").write_bytes(manifest._encode(document))


def entry_of(document: dict[str, Any]) -> dict[str, Any]:
    return document["layers"][1]["entries"][0]


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "parent folder": lambda d: d["files"][0].update(name="../store/weights-00000.safetensors"),
    "absolute path": lambda d: d["files"][0].update(name="/etc/passwd"),
    "NUL in name": lambda d: d["files"][0].update(name="weights-00000.safetensors\0"),
    "newline in name": lambda d: d["files"][0].update(name="weights-00000.safetensors\n"),
    "case": lambda d: d["files"][0].update(name="Weights-00000.safetensors"),
    "file twice": lambda d: d["files"].append(d["files"][0]),
    "unknown file": lambda d: d["layers"][0].update(file="weights-00001.safetensors"),
    "no files": lambda d: d.update(files=[]),
    "huge header": lambda d: d["files"][0].update(header_bytes=MAX_HEADER_BYTES + 4096),
    "header off grid": lambda d: d["files"][0].update(header_bytes=4000),
    "size": lambda d: d["files"][0].update(size_bytes=d["files"][0]["size_bytes"] + 4096),
    "negative offset": lambda d: d["layers"][0].update(offset=-4096),
    "offset past 2^63": lambda d: d["layers"][0].update(offset=1 << 64),
    "offset is a bool": lambda d: d["layers"][0].update(offset=True),
    "offset is a float": lambda d: d["layers"][0].update(offset=4096.0),
    "layer twice": lambda d: d["layers"].append(d["layers"][0]),
    "layers overlap": lambda d: d["layers"][1].update(offset=d["layers"][0]["offset"]),
    "layer missing": lambda d: d["layers"].pop(),
    "tensor outside its layer": lambda d: entry_of(d).update(offset=1 << 30),
    "tensor before its layer": lambda d: entry_of(d).update(offset=0),
    "tensor off grid": lambda d: entry_of(d).update(offset=entry_of(d)["offset"] + 1),
    "tensor twice": lambda d: d["layers"][1]["entries"].append(d["layers"][1]["entries"][-1]),
    "tensor name with ..": lambda d: entry_of(d).update(name="a..b"),
    "tensor name of 1 MB": lambda d: entry_of(d).update(name="a" * (1 << 20)),
    "tensor name empty": lambda d: entry_of(d).update(name=""),
    "tensor name absolute": lambda d: entry_of(d).update(name="/a"),
    "wrong shape": lambda d: entry_of(d).update(shape=[128, 96]),
    "shape overflows": lambda d: entry_of(d).update(shape=[1 << 40, 1 << 40]),
    "negative shape": lambda d: entry_of(d).update(shape=[-1, -64]),
    "shape of strings": lambda d: entry_of(d).update(shape=["128"]),
    "long shape": lambda d: entry_of(d).update(shape=[1] * 9),
    "wrong dtype": lambda d: entry_of(d).update(dtype="Tensor"),
    "wrong scheme": lambda d: entry_of(d).update(scheme="int8"),
    "unknown scheme": lambda d: entry_of(d).update(scheme="int3"),
    "unsupported shape": lambda d: entry_of(d).update(shape=[96, 100]),
    "wrong code bytes": lambda d: entry_of(d).update(code_bytes=64),
    "wrong scale offset": lambda d: entry_of(d).update(scale_offset=0),
    "extra field": lambda d: entry_of(d).update(more=1),
    "missing field": lambda d: entry_of(d).pop("dtype"),
    "alias to nothing": lambda d: d.update(aliases={"head.weight": "nothing"}),
    "alias hides a tensor": lambda d: d.update(aliases={"layers.0.up.weight": "embed.weight"}),
    "alias of a list": lambda d: d.update(aliases={"head.weight": ["embed.weight"]}),
    "version": lambda d: d.update(version=2),
    "format": lambda d: d.update(format="other"),
    "digest name": lambda d: d.update(digest_name="crc32"),
    "bad digest": lambda d: d["layers"][0].update(digest="0"),
    "entries is a dict": lambda d: d["layers"][0].update(entries={}),
    "layer is a list": lambda d: d["layers"].__setitem__(0, []),
}


@pytest.mark.parametrize("what", sorted(HOSTILE))
def test_hostile_manifests_are_refused(what: str, store: WeightStore) -> None:
    """Opening raises StoreError though the manifest's own digest is right."""
    resign(store.path, HOSTILE[what])
    with pytest.raises(StoreError) as caught:
        WeightStore.open(store.path)
    assert caught.value.fix
    assert "its digest does not match its content" not in str(caught.value)


def test_an_untouched_manifest_survives_resigning(store: WeightStore) -> None:
    """The helper of the test above makes manifests that open when nothing was changed."""
    resign(store.path, lambda document: None)
    assert not is_found(store.path)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xff\xfe",
        b'{"version": NaN}',
        b"1" * 10_000,
        b" " * (17 << 20),
    ],
    ids=["empty", "null", "list", "cut", "deep list", "deep object", "not text", "NaN", "huge integer", "huge file"],
)
def test_manifests_that_are_no_manifest_are_refused(raw: bytes, store: WeightStore) -> None:
    """Malformed, deep and oversized JSON raises StoreError."""
    (store.path / "manifest.json").write_bytes(raw)
    with pytest.raises(StoreError):
        WeightStore.open(store.path)


@pytest.mark.parametrize("name", ["manifest.json", "weights-00000.safetensors"])
@pytest.mark.parametrize("kind", ["symlink", "fifo", "folder", "dangling"])
def test_files_that_are_not_regular_are_refused(kind: str, name: str, store: WeightStore, tmp_path: Path) -> None:
    """A link (even to the right bytes), a FIFO or a folder in place of a file raises StoreError and never blocks."""
    file, moved = store.path / name, tmp_path / "moved"
    file.rename(moved)
    make: dict[str, Callable[[], Any]] = {
        "symlink": lambda: file.symlink_to(moved),
        "fifo": lambda: os.mkfifo(file),
        "folder": file.mkdir,
        "dangling": lambda: file.symlink_to(tmp_path / "nothing"),
    }
    make[kind]()
    with pytest.raises(StoreError):
        WeightStore.open(store.path)


def test_opening_what_is_no_store(tmp_path: Path) -> None:
    """A missing path, a file and an empty folder raise StoreError."""
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for name in ("nothing", "file", "folder"):
        with pytest.raises(StoreError):
            WeightStore.open(tmp_path / name)


def test_a_refused_store_leaks_no_descriptors(store: WeightStore) -> None:
    """Opening a damaged store over and over leaves no file open."""
    flip(store.path / "weights-00000.safetensors", 20, 1)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(StoreError):
            WeightStore.open(store.path)
    assert len(os.listdir("/proc/self/fd")) == before


# ---- errors while building ----


@pytest.mark.parametrize("call", ["write", "fsync", "rename", "open", "close"])
def test_a_failure_at_any_system_call_leaves_nothing_behind(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The N-th call failing, for every N: a typed error, and no trace or (after the rename) a whole store."""
    model, real, tries = frozen_model(), getattr(os, call), 0
    for failing in range(1, 1000):
        folder, count = tmp_path / f"{failing}", 0
        folder.mkdir()

        def counted(*args: Any, number: int = failing, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                if call == "close":
                    real(*args, **kwargs)
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, counted)
            try:
                WeightStore.from_module(model, folder / "store", "int4").close()
            except MebpError:
                pass
        if count < failing:
            break
        tries += 1
        assert {item.name for item in folder.iterdir()} <= {"store"}
        if (folder / "store").exists():
            assert not is_found(folder / "store")
    assert tries > 0


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that takes at most 999 bytes a write gives a whole store."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:999]))
    with WeightStore.from_module(frozen_model(), tmp_path / "store", "int4") as store:
        store.verify()


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    """An exception of the progress callback, KeyboardInterrupt included, comes through and the folder stays empty."""

    def stop(name: str, done_bytes: int, total_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        WeightStore.from_module(frozen_model(), tmp_path / "store", "int4", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store larger than the free space raises DiskError before a byte is written."""
    usage = os.statvfs(tmp_path)
    assert usage.f_bavail > 0
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(DiskError, match="1000 free"):
        WeightStore.from_module(frozen_model(), tmp_path / "store", "int4")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_store_is_never_overwritten(store: WeightStore) -> None:
    """Building onto a path that holds something raises StoreError and changes nothing; an empty folder is taken."""
    with pytest.raises(StoreError, match="exists"):
        WeightStore.from_module(frozen_model(), store.path, "nf4")
    assert not is_found(store.path)
    (store.path.parent / "empty").mkdir()
    WeightStore.from_module(frozen_model(), store.path.parent / "empty", "nf4").close()


def test_weights_that_cannot_be_stored_are_named(tmp_path: Path) -> None:
    """NaN weights, meta parameters, odd dtypes and names, and unknown schemes raise a typed error; nothing is left."""
    sick = frozen_model()
    sick.layers[1].up.weight[3, 5] = float("nan")
    with torch.device("meta"):
        meta = frozen_model()
    odd = nn.Module()
    odd.register_parameter("a/b", nn.Parameter(torch.ones(2, 64), requires_grad=False))
    cases: list[tuple[nn.Module, str, str]] = [
        (sick, "int4", r"layers\.1\.up\.weight"), (meta, "int4", "on meta"), (odd, "int4", "a/b"),
        (frozen_model(), "int3", "unknown scheme"),
        (nn.Linear(64, 2, dtype=torch.complex64).requires_grad_(False), "int4", "complex64"),
    ]  # fmt: skip
    for module, scheme, message in cases:
        with pytest.raises((StoreError, OptionError), match=message):
            WeightStore.from_module(module, tmp_path / "store", scheme)
    assert list(tmp_path.iterdir()) == []


# ---- damaged checkpoints ----


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    """Missing, truncated, pickled-only, quantised and hostile checkpoint folders raise StoreError; nothing is left."""
    source = tmp_path / "checkpoint"
    write_checkpoint(source, checkpoint_tensors(), 2)
    index, shard = source / "model.safetensors.index.json", source / "model-00001-of-00002.safetensors"
    good_index, good_shard = index.read_text(), shard.read_bytes()

    def refused() -> None:
        with pytest.raises(StoreError):
            WeightStore.from_checkpoint(source, tmp_path / "store", "int4")
        assert not (tmp_path / "store").exists()
        index.write_text(good_index)
        shard.write_bytes(good_shard)

    for name in ("../x.safetensors", "/etc/passwd", "missing.safetensors", "model.bin"):
        index.write_text(json.dumps({"weight_map": {"embed.weight": name}}))
        refused()
    for text in ("", "{}", '{"weight_map": []}', '{"weight_map": {"embed.weight": 3}}'):
        index.write_text(text)
        refused()
    index.write_text(json.dumps({"weight_map": {"nothing": shard.name}}))
    refused()
    for length in (0, 4, 100, len(good_shard) - 1):
        shard.write_bytes(good_shard[:length])
        refused()
    shard.write_bytes((1 << 62).to_bytes(8, "little") + good_shard[8:])
    refused()
    (source / "config.json").write_text('{"quantization_config": {"quant_method": "bitsandbytes"}}')
    refused()
    (source / "config.json").unlink()
    index.unlink()
    with pytest.raises(StoreError, match="neither"):
        WeightStore.from_checkpoint(source, tmp_path / "store", "int4")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["checkpoint"]
