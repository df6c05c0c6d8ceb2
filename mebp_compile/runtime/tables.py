"""Tables in blocks of rows: a parameter, or optimizer state of its shape, whose rows lie on disk or in memory of their own, block by block.

A block's source is its tensor's with its rows: "parameter:model:embed_tokens.weight#0:4096". The user's tensor is meta meanwhile.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch

from mebp_compile.errors import MebpError
from mebp_compile.runtime.arena import mapped


class BlockStore(Protocol):
    """Where blocks lie that are not in memory."""

    def write(self, name: str, tensor: torch.Tensor) -> None: ...

    def read(self, name: str, buffer: torch.Tensor) -> None: ...

    def wait(self, name: str) -> None: ...

    def read_part(self, name: str, offset: int, buffer: torch.Tensor) -> None: ...


def parent_of(source: str) -> str:
    """The source of the whole tensor: the source itself for what is no block."""
    return source.split("#")[0]


def rows_of(source: str) -> tuple[int, int]:
    """First row of a block and the row after its last."""
    start, end = source.split("#")[1].split(":")
    return int(start), int(end)


@dataclass
class Table:
    """One tensor in blocks, in the order of their rows: those in `held` in memory, the others in the store."""

    store: BlockStore
    blocks: tuple[str, ...]
    held: dict[str, torch.Tensor] = field(default_factory=dict)

    def fill(self, tensor: torch.Tensor, held: Iterable[str]) -> None:
        """Take the rows of the whole tensor; `held` are the blocks to keep in memory. What is written is not committed yet."""
        keep = frozenset(held)
        for block in self.blocks:
            rows = tensor[slice(*rows_of(block))]
            if block in keep:
                own = mapped(tuple(rows.shape), rows.dtype) if rows.device.type == "cpu" else torch.empty_like(rows)
                self.held[block] = own.copy_(rows)
            else:
                self.store.write(block, rows)
                self.store.wait(block)

    def gather(self, tensor: torch.Tensor) -> None:
        """Put all rows into the whole tensor."""
        for block in self.blocks:
            rows = tensor[slice(*rows_of(block))]
            if block in self.held:
                rows.copy_(self.held[block])
            else:
                self.store.read(block, rows)
                self.store.wait(block)

    def look_up(self, ids: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Rows `ids` into `out` [*ids.shape, columns], as the last step left them: those on disk are read one by one.

        Raises IndexError for an id outside the table, as torch does.
        """
        unique, back = torch.unique(ids.reshape(-1), return_inverse=True)
        if len(unique) and not 0 <= int(unique[0]) <= int(unique[-1]) < rows_of(self.blocks[-1])[1]:
            raise IndexError("index out of range in self")
        rows = out.new_empty((len(unique), out.shape[-1]))
        for block, at, row in self._places(unique):
            if block in self.held:
                rows[at] = self.held[block][row]
            else:
                self.store.read_part(block, row * rows.shape[1] * rows.itemsize, rows[at])
        torch.index_select(rows, 0, back, out=out.view(-1, out.shape[-1]))
        return out

    def _places(self, unique: torch.Tensor) -> Iterator[tuple[str, int, int]]:
        """(block, position in `unique`, row in the block) of sorted ids."""
        numbers, at = unique.tolist(), 0
        for block in self.blocks:
            start, end = rows_of(block)
            while at < len(numbers) and numbers[at] < end:
                yield block, at, numbers[at] - start
                at += 1


def by_parent(sources: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The blocks of each tensor in blocks, in the order of their rows. Raises MebpError unless they make up a whole."""
    found: dict[str, list[str]] = {}
    for source in sources:
        if "#" in source:
            found.setdefault(parent_of(source), []).append(source)
    result = {parent: tuple(sorted(blocks, key=rows_of)) for parent, blocks in found.items()}
    for parent, blocks in result.items():
        bounds = [rows_of(block) for block in blocks]
        if bounds[0][0] or any(one[1] != other[0] for one, other in itertools.pairwise(bounds)):
            raise MebpError(f"the blocks of {parent} leave rows out", "plan the step again")
    return result
