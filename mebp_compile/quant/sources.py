"""Where the weights of a new store come from: a module, a checkpoint folder, or a random generator. Each yields rows
on demand.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mebp_compile.errors import StoreError
from mebp_compile.quant.layout import ITEM_BYTES, Record, plain_record
from mebp_compile.quant.safetensors_file import MAX_HEADER_BYTES, FileTensor, parse_json, read_header

RANDOM_STD = 0.02
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\.safetensors")
Select = Callable[[str, Tensor], bool]


@dataclass(frozen=True, eq=False)
class Source:
    """One tensor to be stored. `read_rows(r0, r1)` gives rows of its matrix view [rows, columns], in its `dtype`
    (torch's name).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    read_rows: Callable[[int, int], Tensor]
    quantise: bool = True


def dtype_name(name: str, dtype: torch.dtype) -> str:
    """torch's name of a dtype that a store can hold. Raises StoreError."""
    text = str(dtype).removeprefix("torch.")
    if text not in ITEM_BYTES:
        raise StoreError(f"{name}: a store can't hold {text}", fix="convert the tensor to bf16, fp16 or fp32")
    return text


def frozen_matrix(name: str, parameter: Tensor) -> bool:
    """The default choice for a module: frozen parameters of two or more dimensions."""
    return not parameter.requires_grad and parameter.dim() >= 2


def _distinct_parameters(module: nn.Module, select: Select) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(selected parameters by first name, further names of tied parameters -> first name)."""
    names: dict[int, str] = {}
    chosen: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not select(name, parameter):
            continue
        first = names.setdefault(id(parameter), name)
        if first == name:
            chosen[name] = parameter
        else:
            aliases[name] = first
    return chosen, aliases


def module_sources(module: nn.Module, select: Select | None) -> tuple[list[Source], dict[str, str]]:
    """Parameters of a module that holds its weights, and the aliases of tied ones. Raises StoreError for meta
    parameters.
    """
    chosen, aliases = _distinct_parameters(module, select or frozen_matrix)
    for name, parameter in chosen.items():
        if parameter.is_meta:
            raise StoreError(
                f"parameter {name} is on meta and has no values",
                fix="WeightStore.from_checkpoint or WeightStore.from_config",
            )
    return [_parameter_source(name, parameter) for name, parameter in chosen.items()], aliases


def _parameter_source(name: str, parameter: Tensor) -> Source:
    dtype, shape = dtype_name(name, parameter.dtype), tuple(parameter.shape)
    record = plain_record(shape, dtype)

    def read_rows(r0: int, r1: int) -> Tensor:
        return parameter.detach().reshape(record.rows, record.columns)[r0:r1]

    return Source(name, shape, dtype, read_rows)


def random_sources(module: nn.Module, seed: int, select: Select | None) -> tuple[list[Source], dict[str, str]]:
    """Random values for the parameters of a module on meta, decided by seed and name alone.

    Two or more dimensions: normal, standard deviation 0.02. Fewer: zeros where the name ends in "bias", else ones.
    """
    chosen, aliases = _distinct_parameters(module, select or (lambda name, parameter: True))
    return [_random_source(name, parameter, seed) for name, parameter in chosen.items()], aliases


def _random_source(name: str, parameter: Tensor, seed: int) -> Source:
    dtype, shape = parameter.dtype, tuple(parameter.shape)
    record = plain_record(shape, dtype_name(name, dtype))

    def read_rows(r0: int, r1: int) -> Tensor:
        if len(shape) < 2:
            return torch.full((r1 - r0, record.columns), 0.0 if name.endswith("bias") else 1.0, dtype=dtype)
        key = hashlib.blake2b(f"{seed}/{name}/{r0}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
        return torch.empty(r1 - r0, record.columns).normal_(0.0, RANDOM_STD, generator=generator).to(dtype)

    return Source(name, shape, dtype_name(name, dtype), read_rows)


@contextlib.contextmanager
def checkpoint_sources(folder: Path) -> Iterator[list[Source]]:
    """All tensors of a checkpoint folder (model.safetensors, or shards and their index), read by pread, never mapped.

    Raises StoreError for a missing, damaged or already quantised checkpoint. The files stay open inside the block.
    """
    _refuse_quantised(folder)
    with contextlib.ExitStack() as stack:
        files: dict[str, tuple[int, int, dict[str, FileTensor]]] = {}
        for shard in sorted(set(_weight_map(folder).values())) or ["model.safetensors"]:
            fd = os.open(folder / shard, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            files[shard] = (fd, *read_header(fd, str(folder / shard)))
        weight_map = _weight_map(folder) or dict.fromkeys(files["model.safetensors"][2], "model.safetensors")
        yield [_checkpoint_source(name, *files[shard], shard=shard) for name, shard in weight_map.items()]


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> shard file, from the index; empty where the checkpoint is one file. Raises StoreError."""
    if (folder / "model.safetensors").is_file():
        return {}
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise StoreError(
            f"{folder} holds neither model.safetensors nor model.safetensors.index.json",
            fix="save the model with save_pretrained (safetensors); pickled checkpoints are not read",
        )
    document = parse_json(_read_small(index), str(index))
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise StoreError(f"{index} has no weight_map", fix="fetch the checkpoint again")
    for shard in weight_map.values():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard) or not (folder / shard).is_file():
            raise StoreError(
                f"{index} names a shard that is missing or not allowed: {str(shard)[:200]!r}",
                fix="fetch the checkpoint again",
            )
    return weight_map


def _checkpoint_source(name: str, fd: int, payload: int, tensors: dict[str, FileTensor], shard: str) -> Source:
    if name not in tensors:
        raise StoreError(f"{shard} lacks tensor {name[:200]!r} that the index names", fix="fetch the checkpoint again")
    tensor = tensors[name]
    record = plain_record(tensor.shape, tensor.dtype)

    def read_rows(r0: int, r1: int) -> Tensor:
        return (
            read_tensor_rows(fd, payload + tensor.offset, record, r0, r1)
            .view(getattr(torch, tensor.dtype))
            .view(r1 - r0, record.columns)
        )

    return Source(name, tensor.shape, tensor.dtype, read_rows)


def read_tensor_rows(fd: int, offset: int, record: Record, r0: int, r1: int) -> Tensor:
    """Bytes of rows r0..r1 of a plain tensor at `offset`. Raises StoreError where the file ends early."""
    data = torch.empty((r1 - r0) * record.code_row_bytes, dtype=torch.uint8)
    view = data.numpy().data
    position = offset + r0 * record.code_row_bytes
    while view:
        try:
            count = os.preadv(fd, [view], position)
        except InterruptedError:
            continue
        if count == 0:
            raise StoreError("a checkpoint file became shorter while it was read", fix="fetch the checkpoint again")
        view, position = view[count:], position + count
    return data


def _refuse_quantised(folder: Path) -> None:
    """Raises StoreError for a checkpoint whose config says that it is quantised: its tensors are codes, not weights."""
    config = folder / "config.json"
    document = parse_json(_read_small(config), str(config)) if config.is_file() else {}
    if isinstance(document, dict) and document.get("quantization_config"):
        raise StoreError(f"{folder} is already quantised", fix="start from the bf16 or fp32 checkpoint")


def _read_small(path: Path) -> bytes:
    if path.stat().st_size > MAX_HEADER_BYTES:
        raise StoreError(f"{path} is larger than {MAX_HEADER_BYTES} bytes", fix="fetch the checkpoint again")
    return path.read_bytes()
