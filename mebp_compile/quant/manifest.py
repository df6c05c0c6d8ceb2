"""The manifest of a weight store: what lies where, and its digests. Torch-free.

`manifest.json` is the truth about a store; the safetensors headers only let other tools open the data files. It is
refused unless its bytes are exactly what `to_json` writes for its content, digest included, so any changed byte is
found. Digests are SHA-256 (hardware does about 1.7 GB/s of it). Every file is: header (whole multiple of 4096), then
its layers back to back, each padded to a multiple of 4096.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mebp_compile.errors import OptionError, StoreError
from mebp_compile.quant.layout import FORMATS, ITEM_BYTES, PLAIN, TENSOR_ALIGN_BYTES, Record, record_of
from mebp_compile.quant.safetensors_file import MAX_HEADER_BYTES, PAD_PREFIX, RESERVED_NAME, parse_json

FORMAT_NAME, FORMAT_VERSION = "mebp-weights", 1
DIGEST_NAME = "sha256"
LAYER_ALIGN_BYTES = 4096
MAX_MANIFEST_BYTES = 16 << 20
MAX_BYTES = 1 << 48  # of a file, and of a tensor
_FILE_NAME = re.compile(r"weights-\d{5}\.safetensors")
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:+=@\-]{0,511}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_REBUILD = "build the store again"
_DOCUMENT_FIELDS = {
    "format": str, "version": int, "model_id": str, "scheme": str, "digest_name": str,
    "aliases": dict, "files": list, "layers": list, "digest": str,
}  # fmt: skip
_ENTRY_FIELDS = {
    "name": str, "shape": list, "dtype": str, "scheme": str,
    "offset": int, "length": int, "code_bytes": int, "scale_offset": int,
}  # fmt: skip


def new_digest() -> hashlib._Hash:
    """An empty digest of the kind the manifest names."""
    return hashlib.sha256()


def check_tensor_name(name: str) -> str:
    """`name`, if a store can hold a tensor of that name. Raises StoreError."""
    if not _TENSOR_NAME.fullmatch(name) or ".." in name or name.startswith(PAD_PREFIX) or name == RESERVED_NAME:
        raise StoreError(
            f"{name[:200]!r} can't be the name of a stored tensor", fix="rename it to letters, digits and _.:+=@-"
        )
    return name


@dataclass(frozen=True)
class Entry:
    """One stored tensor: dense `shape` and original `dtype` (torch's name), its `scheme` ("none": as it was), where
    its record lies.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    scheme: str
    layer: str
    file: str
    offset: int  # of the record, from the start of the file

    @property
    def record(self) -> Record:
        return record_of(self.scheme, self.shape, self.dtype)

    @property
    def length(self) -> int:
        """Bytes of the record: codes, padding to 64, scales."""
        return self.record.size_bytes

    @property
    def code_bytes(self) -> int:
        return self.record.code_bytes

    @property
    def scale_offset(self) -> int:
        """Where the scales start, from the start of the record; `length` for a plain tensor."""
        return self.record.scale_offset


@dataclass(frozen=True)
class Layer:
    """Tensors that lie side by side and share a digest, which covers their padding too."""

    name: str
    file: str
    offset: int
    length: int
    digest: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class DataFile:
    """One safetensors file of the store."""

    name: str
    size_bytes: int
    header_bytes: int
    header_digest: str


@dataclass(frozen=True)
class Manifest:
    """A whole store. `aliases` maps the further names of tied tensors to the stored one."""

    model_id: str
    scheme: str
    files: tuple[DataFile, ...]
    layers: tuple[Layer, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)

    def entries(self) -> Iterator[Entry]:
        for layer in self.layers:
            yield from layer.entries

    def to_json(self) -> bytes:
        """The bytes of manifest.json."""
        document = {
            "format": FORMAT_NAME, "version": FORMAT_VERSION, "model_id": self.model_id, "scheme": self.scheme,
            "digest_name": DIGEST_NAME, "aliases": dict(self.aliases), "files": [vars(file) for file in self.files],
            "layers": [_layer_document(layer) for layer in self.layers],
        }  # fmt: skip
        return _encode({**document, "digest": _digest_of(document)})

    @staticmethod
    def from_json(raw: bytes) -> Manifest:
        """Parse and check everything that can be checked without the data files. Raises StoreError."""
        document = _fields(parse_json(raw, "manifest"), "manifest", **_DOCUMENT_FIELDS)
        _check_document(document, raw)
        files = tuple(_parse_file(item) for item in document["files"])
        manifest = Manifest(document["model_id"], document["scheme"], files,
                            tuple(_parse_layer(item) for item in document["layers"]), document["aliases"])  # fmt: skip
        _check_cover(manifest)
        _check_names(manifest)
        return manifest


def _encode(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()


def _digest_of(document: Mapping[str, Any]) -> str:
    """Digest of everything but the "digest" field, in its most compact form."""
    content = {key: value for key, value in document.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, separators=(",", ":"), sort_keys=True).encode()).hexdigest()


def _layer_document(layer: Layer) -> dict[str, Any]:
    return {**vars(layer), "entries": [_entry_document(entry) for entry in layer.entries]}


def _entry_document(entry: Entry) -> dict[str, Any]:
    values = {name: getattr(entry, name) for name in _ENTRY_FIELDS}
    return {**values, "shape": list(entry.shape)}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise StoreError(f"manifest: {message}", fix=_REBUILD)


def _fields(value: Any, what: str, **types: type) -> dict[str, Any]:
    """`value` as an object with exactly these fields of exactly these types."""
    _require(type(value) is dict and set(value) == set(types), f"{what} must have the fields {', '.join(types)}")
    for name, kind in types.items():
        _require(type(value[name]) is kind, f"{what}: {name} must be {kind.__name__}")
        _require(kind is not int or 0 <= value[name] <= MAX_BYTES, f"{what}: {name} is out of range")
    return dict(value)


def _check_document(document: dict[str, Any], raw: bytes) -> None:
    """Format, version, own digest, and that `raw` is the one way to write this content."""
    known = (document["format"], document["version"], document["digest_name"]) == (
        FORMAT_NAME,
        FORMAT_VERSION,
        DIGEST_NAME,
    )
    if not known:
        raise StoreError(
            f"manifest: not a {FORMAT_NAME} store of version {FORMAT_VERSION} with {DIGEST_NAME} digests",
            fix="build the store again with this version of mebp_compile",
        )
    _require(document["scheme"] in (*FORMATS, PLAIN), "unknown scheme")
    _require(document["digest"] == _digest_of(document), "its digest does not match its content")
    _require(raw == _encode(document), "its bytes are not in the form in which it was written")


def _parse_file(value: Any) -> DataFile:
    fields = _fields(value, "a file", name=str, size_bytes=int, header_bytes=int, header_digest=str)
    file = DataFile(**fields)
    _require(bool(_FILE_NAME.fullmatch(file.name)), f"file name {file.name[:200]!r} is not allowed")
    _require(bool(_DIGEST.fullmatch(file.header_digest)), "a header digest is malformed")
    _require(
        file.header_bytes % LAYER_ALIGN_BYTES == 0 and 0 < file.header_bytes <= MAX_HEADER_BYTES,
        "a header size is not allowed",
    )
    return file


def _parse_layer(value: Any) -> Layer:
    fields = _fields(value, "a layer", name=str, file=str, offset=int, length=int, digest=str, entries=list)
    _require(bool(_DIGEST.fullmatch(fields["digest"])), "a layer digest is malformed")
    aligned = fields["offset"] % LAYER_ALIGN_BYTES == 0 and fields["length"] % LAYER_ALIGN_BYTES == 0
    _require(aligned, f"layer {fields['name'][:200]!r} is not aligned to {LAYER_ALIGN_BYTES}")
    entries = tuple(_parse_entry(item, fields["name"], fields["file"]) for item in fields.pop("entries"))
    layer = Layer(**fields, entries=entries)
    position = layer.offset
    for entry in entries:
        _require(
            entry.offset >= position and entry.offset % TENSOR_ALIGN_BYTES == 0,
            f"tensor {entry.name!r} overlaps or is misaligned",
        )
        position = entry.offset + entry.length
    _require(position <= layer.offset + layer.length, f"layer {layer.name[:200]!r} is shorter than its tensors")
    return layer


def _parse_entry(value: Any, layer: str, file: str) -> Entry:
    fields = _fields(value, "a tensor", **_ENTRY_FIELDS)
    name, shape = check_tensor_name(fields["name"]), fields["shape"]
    sizes = len(shape) <= 8 and all(type(size) is int and 0 <= size <= MAX_BYTES for size in shape)
    _require(sizes and math.prod(shape) <= MAX_BYTES, f"tensor {name!r} has a malformed shape")
    _require(fields["dtype"] in ITEM_BYTES, f"tensor {name!r} has an unknown dtype")
    entry = Entry(name, tuple(shape), fields["dtype"], fields["scheme"], layer, file, fields["offset"])
    try:
        layout = (entry.length, entry.code_bytes, entry.scale_offset)
    except OptionError as error:
        raise StoreError(f"manifest: tensor {name!r}: {error.message}", fix=_REBUILD) from error
    _require(
        layout == (fields["length"], fields["code_bytes"], fields["scale_offset"]),
        f"tensor {name!r} has the wrong sizes",
    )
    return entry


def _check_cover(manifest: Manifest) -> None:
    """The layers of a file follow its header, and each other, without a gap, up to its end."""
    position = {file.name: file.header_bytes for file in manifest.files}
    _require(len(position) == len(manifest.files), "a file is listed twice")
    for layer in manifest.layers:
        _require(
            position.get(layer.file) == layer.offset, f"layer {layer.name[:200]!r} does not follow the layer before it"
        )
        position[layer.file] = layer.offset + layer.length
    _require(all(position[file.name] == file.size_bytes for file in manifest.files), "layers don't fill their file")


def _check_names(manifest: Manifest) -> None:
    """No layer or tensor is named twice; aliases are new names for stored tensors."""
    _require(len({layer.name for layer in manifest.layers}) == len(manifest.layers), "a layer is listed twice")
    names = [entry.name for entry in manifest.entries()]
    stored = set(names)
    _require(len(stored) == len(names), "a tensor is listed twice")
    for alias, target in manifest.aliases.items():
        _require(
            type(target) is str and target in stored and check_tensor_name(alias) not in stored,
            f"bad alias {alias[:200]!r}",
        )
