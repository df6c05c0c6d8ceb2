"""The state of a step as plain data: tensors by source and param groups as numbers, where no module, optimizer or model class exists.

`DataState` is to a lean process what `LiveState` is to the user's objects, and `DataHomes` what `Homes` is.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from mebp_compile.errors import GraphError
from mebp_compile.measure.cached_read import moves_at_once
from mebp_compile.measure.transfer import DiskThread
from mebp_compile.runtime.arena import with_own_pages
from mebp_compile.runtime.home_store import HomeStore
from mebp_compile.runtime.state import Getter, evaluate

Groups = dict[str, list[dict[str, Any]]]


class DataState:
    """Tensors by source ("parameter:model:layers.0.weight", ...). `optimizers` maps names to objects that have `param_groups` and nothing else."""

    def __init__(self, tensors: dict[str, torch.Tensor], groups: Groups) -> None:
        self.tensors = tensors
        self.optimizers = {root: SimpleNamespace(param_groups=parts) for root, parts in groups.items()}

    def getter(self, source: str) -> Getter:
        """A function that gives the tensor at `source` as it is now."""
        tensors = self.tensors

        def get() -> torch.Tensor:
            if source not in tensors:
                raise GraphError(f"the saved step has no state {source!r}, or it lies on disk", "save the step again")
            return tensors[source]

        return get

    def put(self, path: str, tensor: torch.Tensor | None) -> None:
        """Bind a result that outlives the step: a gradient, a replaced buffer."""
        assert tensor is not None
        self.tensors[path] = tensor

    def forget(self, path: str) -> None:
        """Take away a gradient or an entry of optimizer state."""
        self.tensors.pop(path, None)

    def hyper(self, expression: str) -> Any:
        """The value now of an expression over param groups."""
        return evaluate(expression, self.optimizers)


class _Geometry:
    """Shape, strides and dtype of a tensor that is elsewhere."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.shape, self.stride, self.dtype = tuple(tensor.shape), tensor.stride(), tensor.dtype

    def empty(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype)


class DataHomes:
    """Which tensors of a DataState lie on disk: see `Homes`, whose rules hold here."""

    def __init__(self, live: DataState, directory: Path) -> None:
        self.live = live
        self.thread = DiskThread(at_once=moves_at_once())
        self.store = HomeStore(directory, self.thread)
        self._away: dict[str, _Geometry] = {}
        self._out: dict[str, _Geometry] = {}

    @property
    def away(self) -> frozenset[str]:
        """Sources of what lies on disk now."""
        return frozenset(self._away)

    def arrange(self, away: frozenset[str], moving: frozenset[str] = frozenset()) -> None:
        """Put exactly the sources `away` on disk and everything else in memory; what leaves goes first. Runs between steps.

        `moving`: what is in memory and leaves it in mid-step. No blocks of tables: steps that have any are not saved for a lean process.
        """
        for source in sorted(away - self._away.keys()):
            self.leave(source, self.live.tensors[source])
        for source in sorted(self._away.keys() - away):
            self.live.tensors[source] = self.load(source)
            del self._away[source]
        for source in sorted(moving):
            self.live.tensors[source] = with_own_pages(self.live.tensors[source])

    def materialise(self) -> None:
        """Bring everything into memory."""
        self.arrange(frozenset())

    def leave(self, source: str, tensor: torch.Tensor) -> None:
        """Write a tensor to disk as the value of `source`, which is in memory no longer."""
        try:
            self.store.write(source, tensor)
            self.store.wait(source)
        except BaseException:
            self.store.abandon()
            raise
        self.store.commit()
        self._away[source] = _Geometry(tensor)
        self.live.tensors.pop(source, None)

    def load(self, source: str) -> torch.Tensor:
        """A copy of what lies on disk: the last committed generation."""
        buffer = self._away[source].empty()
        self.store.read(source, buffer)
        self.store.wait(source)
        return buffer

    def release(self, source: str) -> None:
        """In a step: a tensor at home in memory leaves it for a while (its bytes are in the step's own scratch file)."""
        self._out[source] = _Geometry(self.live.tensors.pop(source))

    def adopt(self, source: str, buffer: torch.Tensor) -> None:
        """In a step: the tensor is back, in `buffer`, which becomes its memory."""
        del self._out[source]
        self.live.tensors[source] = buffer

    def abandon(self) -> None:
        """After a failed step. What was out of memory has lost its value: it gets zeros."""
        self.store.abandon()
        for source, geometry in list(self._out.items()):
            self.adopt(source, geometry.empty().zero_())
