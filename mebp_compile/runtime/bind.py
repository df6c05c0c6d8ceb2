"""Bind a weight store to the user's modules: which parameters are streamed, and the real tensors of those that are not."""

from __future__ import annotations

import contextlib
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mebp_compile import torch_private
from mebp_compile.capture import State
from mebp_compile.config import SCHEMES, cache_dir
from mebp_compile.errors import OptionError, StoreError
from mebp_compile.lower.stream import Record
from mebp_compile.quant.build import disk_errors
from mebp_compile.quant.schemes import scheme_named
from mebp_compile.runtime.weights import WeightStore


@dataclass(frozen=True)
class Streamed:
    """A store, the name in it of each streamed parameter's source, and the record of each for the graph. `temporary`: the store's folder goes
    when nobody uses it any more."""

    store: WeightStore
    names: dict[str, str]
    records: dict[str, Record]
    temporary: bool = False


def bind_weights(state: State, weights: str | WeightStore | None, folder: Path | None) -> Streamed | None:
    """Take frozen parameters that the store holds in few bits out of memory (they become meta, their objects stay), and fill those on meta
    that it holds as they are. A scheme's name first quantises the modules' frozen weights into a store under `folder`.
    """
    if weights is None:
        _check_none_on_meta(state)
        return None
    store = _quantise(state, weights, folder) if isinstance(weights, str) else weights
    if not isinstance(store, WeightStore):
        raise OptionError(f"weights is a {type(weights).__name__}", 'give "int4", "nf4", "int8" or a WeightStore')
    names, records, plain, streamed = {}, {}, {}, []
    for root, path, parameter in state.parameters():
        name, source = _name_in(store, path), f"parameter:{root}:{path}"
        if name is None or parameter.requires_grad:
            continue
        _check_shape(store, name, path, parameter)
        if store.entry(name).scheme == "none":
            plain[source] = (name, parameter)
        else:
            names[source], records[source] = name, _record(store, name)
            streamed.append(parameter)
    _check_none_on_meta(state, names.keys() | plain.keys())
    for name, parameter in plain.values():
        _materialise(store, name, parameter)
    become_meta(streamed)  # last: whatever was refused or failed, the weights are still there
    return Streamed(store, names, records, isinstance(weights, str))


def _quantise(state: State, scheme: str, folder: Path | None) -> WeightStore:
    if scheme not in SCHEMES:
        raise OptionError(f"weights={scheme!r} is unknown", f"use one of {', '.join(map(repr, SCHEMES))}, or a WeightStore")
    if len(state.modules) != 1:
        raise OptionError(f"the step uses {len(state.modules)} modules", "build the store with WeightStore.from_module and pass it")
    module = next(iter(state.modules.values()))
    parent = (folder or cache_dir()) / "weights"
    with disk_errors(f"making a folder for quantised weights in {parent}"):
        parent.mkdir(parents=True, exist_ok=True)
        own = tempfile.TemporaryDirectory(prefix=f"{type(module).__name__}-{scheme}-", dir=parent, ignore_cleanup_errors=True)
    try:
        store = WeightStore.from_module(module, Path(own.name) / "store", scheme)
    except BaseException:
        own.cleanup()
        raise
    weakref.finalize(store, own.cleanup)  # a store that the caller did not ask for by name goes with its last user
    return store


def _name_in(store: WeightStore, path: str) -> str | None:
    """The store's name of a module's parameter: its path, or its path before PEFT wrapped the model."""
    plain = path.removeprefix("base_model.model.").replace(".base_layer.", ".")
    for name in (path, plain):
        if name in store:
            return store.entry(name).name
    return None


def _record(store: WeightStore, name: str) -> Record:
    entry = store.entry(name)
    layout, scheme = entry.record, scheme_named(entry.scheme)
    scales = (layout.rows, layout.scale_row_bytes // scheme.format.scale_bytes)
    return Record(entry.scheme, entry.length, (layout.rows, layout.code_row_bytes), scales, str(scheme.scale_dtype).removeprefix("torch."))


def _check_shape(store: WeightStore, name: str, path: str, parameter: torch.Tensor) -> None:
    if tuple(store.entry(name).shape) != tuple(parameter.shape):
        raise StoreError(
            f"the store's {name} has shape {list(store.entry(name).shape)}, the model's {path} {list(parameter.shape)}",
            "build the store from this model or its checkpoint",
        )


def _check_none_on_meta(state: State, streamed: Any = ()) -> None:
    for root, path, parameter in state.parameters():
        if parameter.device.type == "meta" and f"parameter:{root}:{path}" not in streamed:
            raise StoreError(
                f"{root}.{path} is on meta and no store holds it", "pass weights=a WeightStore of the model, or load its weights"
            )


def become_meta(parameters: Iterable[nn.Parameter]) -> None:
    """Give up the memory of parameters, of all or (where that fails) of none; the objects, their shapes and dtypes stay."""
    real = [parameter for parameter in parameters if parameter.device.type != "meta"]
    hollow = [nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad) for parameter in real]
    for parameter, other in zip(real, hollow, strict=True):
        torch_private.exchange(parameter, other)


def _materialise(store: WeightStore, name: str, parameter: nn.Parameter) -> None:
    """Fill a parameter on meta that is stored as it is."""
    if parameter.device.type == "meta":
        torch_private.exchange(parameter, nn.Parameter(store.dense(name, parameter.dtype), parameter.requires_grad))


@contextlib.contextmanager
def dense_weights(state: State, streamed: Streamed | None) -> Iterator[None]:
    """Inside, streamed parameters hold their dequantised weights, so that the user's own step can run."""
    held = list(_made_dense(state, streamed)) if streamed is not None else []
    try:
        yield
    finally:
        become_meta(held)


def give_back(state: State, streamed: Streamed | None) -> None:
    """Before a store that was made for one step goes with it: streamed parameters hold their dequantised weights again, in memory."""
    if streamed is not None and streamed.temporary:
        list(_made_dense(state, streamed))


def _made_dense(state: State, streamed: Streamed) -> Iterator[nn.Parameter]:
    """The streamed parameters, each filled with its dequantised weight."""
    for root, path, parameter in state.parameters():
        name = streamed.names.get(f"parameter:{root}:{path}")
        if name is not None:
            torch_private.exchange(parameter, nn.Parameter(streamed.store.dense(name, parameter.dtype), requires_grad=False))
            yield parameter
