"""The state of a step in a folder: `state.json` (what there is, and param groups) beside safetensors files with the tensors.

A saved step has all of its state there; a checkpoint of it has what the step changes, in the same form.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mebp_compile.errors import DiskError, LeanError, StoreError
from mebp_compile.runtime.tensor_file import DAMAGED, Geometry, TensorFile, write_tensors
from mebp_compile.whole_file import write_whole

FORMAT_VERSION = 1
INDEX, TENSORS = "state.json", "state.safetensors"
GENERATOR = "generator"  # the "source" of the state of torch's generator
PLAIN = (bool, int, float, str, type(None))
Groups = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: file, its name there, and its geometry."""

    file: str
    name: str
    geometry: Geometry


@dataclass(frozen=True)
class SavedState:
    """An index: places by source, the digest of each file, and param groups without their tensors."""

    folder: Path
    places: dict[str, Place]
    digests: dict[str, str]
    groups: Groups

    def tensors(self, but: frozenset[str] = frozenset()) -> Iterator[tuple[str, torch.Tensor]]:
        """(source, tensor) of everything but the sources `but`, one at a time, each in memory of its own. Checks the digests first."""
        for name, digest in self.digests.items():
            with TensorFile(self.folder / name, digest) as file:
                for source, place in self.places.items():
                    if place.file == name and source not in but:
                        yield source, file.read(place.name, place.geometry)


def write_state(
    folder: Path,
    files: Mapping[str, Mapping[str, str]],
    geometries: Mapping[str, Geometry],
    give: Callable[[str], torch.Tensor],
    groups: Groups,
    by_rows: str = "",
) -> None:
    """Write `files` (file -> source -> name in it), then the index. `give` is asked for each source in turn. Raises DiskError, StoreError.

    In the file `by_rows`, which is for other readers, tensors have their own shapes whatever their strides; the index then takes those that
    are contiguous.
    """
    places: dict[str, list[Any]] = {}
    digests = {}
    for file, names in files.items():
        sources = {name: source for source, name in names.items()}
        told = {name: geometries[source].by_rows() if file == by_rows else geometries[source] for name, source in sources.items()}
        digests[file] = write_tensors(folder / file, told, _giver(give, sources, file == by_rows))
        for source, name in names.items():
            if file != by_rows or geometries[source].contiguous:
                places[source] = [file, name, geometries[source].to_data()]
    write_json(folder / INDEX, {"format": FORMAT_VERSION, "files": digests, "tensors": places, "groups": groups})


def _giver(give: Callable[[str], torch.Tensor], sources: Mapping[str, str], by_rows: bool) -> Callable[[str], torch.Tensor]:
    """What gives the tensor of a name in a file."""
    return lambda name: give(sources[name]).contiguous() if by_rows else give(sources[name])


def read_state(folder: Path) -> SavedState:
    """The index of a folder. Raises LeanError where there is none, StoreError for a damaged one."""
    data = read_json(folder / INDEX)
    try:
        if data["format"] != FORMAT_VERSION:
            raise StoreError(f"{folder / INDEX} has another format than {FORMAT_VERSION}", DAMAGED)
        places = {source: Place(file, name, Geometry.from_data(geometry)) for source, (file, name, geometry) in data["tensors"].items()}
        if any(place.file not in data["files"] or os.path.basename(place.file) != place.file for place in places.values()):
            raise StoreError(f"{folder / INDEX} names files that it does not have", DAMAGED)
        return SavedState(folder, places, dict(data["files"]), dict(data["groups"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{folder / INDEX} can't be read: {error!r}", DAMAGED) from error


def plain_groups(optimizers: Mapping[str, Any]) -> Groups:
    """The param groups of optimizers by name, as JSON holds them: numbers, text, and tuples or lists of them; parameters and tensors are left
    out."""
    return {
        root: [{key: _plain(value) for key, value in group.items() if key != "params" and _is_plain(value)} for group in optimizer.param_groups]
        for root, optimizer in optimizers.items()
    }


def _is_plain(value: Any) -> bool:
    return isinstance(value, PLAIN) or (isinstance(value, (list, tuple)) and all(_is_plain(part) for part in value))


def _plain(value: Any) -> Any:
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def write_json(path: Path, data: Any) -> None:
    """The file whole or not at all. Raises DiskError."""
    try:
        write_whole(path, json.dumps(data, separators=(",", ":")))
    except OSError as error:
        raise DiskError(f"can't write {path}: {error.strerror}", "give a folder that can be written") from error


def read_json(path: Path) -> Any:
    """Raises LeanError where there is no such file, StoreError where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LeanError(f"{path.parent} has no {path.name}", "give a folder written by `step.save(folder)` or `mebp plan --out`") from error
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} can't be read: {error}", DAMAGED) from error
