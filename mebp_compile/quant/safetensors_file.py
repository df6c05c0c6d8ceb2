"""Headers of safetensors files, read and written. Torch-free; payload bytes are moved by the caller, never mapped.

A file is: header length (u64, little-endian), header (JSON, may end in spaces), payload. Tensors cover the payload
without holes, so gaps between aligned tensors are filled by dummy `__pad__` tensors. Format:
https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from mebp_compile.errors import StoreError
from mebp_compile.quant.layout import ITEM_BYTES, align_up

MAX_HEADER_BYTES = 16 << 20
PAD_PREFIX = "__pad__."
RESERVED_NAME = "__metadata__"
TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
FILE_NAMES = {torch_name: name for name, torch_name in TORCH_NAMES.items()}
_DAMAGED = "fetch or write this file again"


@dataclass(frozen=True)
class FileTensor:
    """One tensor of a safetensors file; `offset` counts from the start of the payload, `dtype` is torch's name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def end(self) -> int:
        return self.offset + self.size_bytes


def fill_holes(tensors: Sequence[FileTensor], payload_bytes: int) -> list[FileTensor]:
    """`tensors`, in offset order, with pad tensors in between and behind so that they cover `payload_bytes` exactly."""
    filled: list[FileTensor] = []
    position = 0
    for tensor in [*tensors, FileTensor("", "uint8", (0,), payload_bytes)]:
        if tensor.offset > position:
            filled.append(FileTensor(f"{PAD_PREFIX}{len(filled)}", "uint8", (tensor.offset - position,), position))
        if tensor.name:
            filled.append(tensor)
        position = tensor.end
    return filled


def encode_header(tensors: Sequence[FileTensor], align_bytes: int) -> bytes:
    """Length and header of a file holding `tensors`, padded with spaces to a multiple of `align_bytes`.

    Raises StoreError for two tensors of one name or a header that readers would refuse.
    """
    document: dict[str, Any] = {RESERVED_NAME: {"format": "pt"}}
    for tensor in tensors:
        if tensor.name in document:
            raise StoreError(f"two stored tensors are called {tensor.name!r}", fix="rename one of them")
        offsets = [tensor.offset, tensor.end]
        document[tensor.name] = {
            "dtype": FILE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
    text = json.dumps(document, separators=(",", ":")).encode()
    total_bytes = align_up(8 + len(text), align_bytes)
    if total_bytes > MAX_HEADER_BYTES:
        raise StoreError(f"the header of one file would take {total_bytes} bytes", fix="store fewer tensors in a file")
    return (total_bytes - 8).to_bytes(8, "little") + text.ljust(total_bytes - 8)


def read_header(fd: int, what: str) -> tuple[int, dict[str, FileTensor]]:
    """(payload offset in the file, tensors by name) of an open file. `what` names it in errors.

    Raises StoreError unless the header is well formed, its tensors lie inside the file and don't overlap.
    """
    file_bytes = os.fstat(fd).st_size
    length = int.from_bytes(read_bytes(fd, 8, 0), "little")
    if file_bytes < 8 or length > MAX_HEADER_BYTES or 8 + length > file_bytes:
        raise StoreError(f"{what}: {file_bytes} bytes can't hold a header of {length}", fix=_DAMAGED)
    document = parse_json(read_bytes(fd, length, 8), what)
    if not isinstance(document, dict):
        raise StoreError(f"{what}: the header is not an object", fix=_DAMAGED)
    tensors = {name: _file_tensor(name, value, what) for name, value in document.items() if name != RESERVED_NAME}
    _check_cover(tensors, file_bytes - 8 - length, what)
    return 8 + length, tensors


def read_bytes(fd: int, size_bytes: int, offset: int) -> bytes:
    """Bytes of a file, however many reads that takes; fewer only where it ends. Raises OSError."""
    parts: list[bytes] = []
    while size_bytes > 0:
        try:
            part = os.pread(fd, size_bytes, offset)
        except InterruptedError:
            continue
        if not part:
            break
        parts.append(part)
        size_bytes, offset = size_bytes - len(part), offset + len(part)
    return b"".join(parts)


def parse_json(raw: bytes, what: str) -> Any:
    """Parse JSON from a file nobody vouches for. Raises StoreError for anything malformed, too deep or with a key
    given twice.
    """
    try:
        return json.loads(raw, object_pairs_hook=_object_without_duplicates, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{what}: not valid JSON ({str(error)[:200]})", fix=_DAMAGED) from error


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is given twice")
    return result


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _are_sizes(value: Any, shortest: int, longest: int) -> TypeGuard[list[int]]:
    """A list of plausible sizes, of a plausible length."""
    if not isinstance(value, list) or not shortest <= len(value) <= longest:
        return False
    return all(type(number) is int and 0 <= number < 1 << 53 for number in value)


def _file_tensor(name: str, value: Any, what: str) -> FileTensor:
    """One header entry, checked. Raises StoreError."""
    entry = value if isinstance(value, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in TORCH_NAMES:
        raise StoreError(
            f"{what}: tensor {name[:200]!r} has dtype {str(dtype)[:20]!r}", fix="convert it to bf16, fp16 or fp32"
        )
    if not _are_sizes(shape, 0, 8) or not _are_sizes(offsets, 2, 2):
        raise StoreError(f"{what}: tensor {name[:200]!r} has a malformed shape or offsets", fix=_DAMAGED)
    tensor = FileTensor(name, TORCH_NAMES[dtype], tuple(shape), offsets[0])
    if tensor.end != offsets[1]:
        raise StoreError(f"{what}: tensor {name[:200]!r} does not fill its offsets", fix=_DAMAGED)
    return tensor


def _check_cover(tensors: dict[str, FileTensor], payload_bytes: int, what: str) -> None:
    """Raises StoreError unless the tensors cover the payload without overlap or hole."""
    position = 0
    for tensor in sorted(tensors.values(), key=lambda item: (item.offset, item.end)):
        if tensor.offset != position:
            raise StoreError(f"{what}: tensor {tensor.name[:200]!r} overlaps another or leaves a hole", fix=_DAMAGED)
        position = tensor.end
    if position != payload_bytes:
        raise StoreError(f"{what}: tensors take {position} bytes, the file has {payload_bytes}", fix=_DAMAGED)
