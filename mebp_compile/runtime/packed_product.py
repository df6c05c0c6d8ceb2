"""Products with a weight whose record is in memory: the weight is made dense a tile at a time, so that it stays in the caches until it is used."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from mebp_compile import openmp
from mebp_compile.kernels import product
from mebp_compile.lower.cuts import thread_tiles
from mebp_compile.quant import Packed, columns_maker, rows_maker


class _Tile(NamedTuple):
    """All that a tile needs, made before threads part: each view that they made would be one more turn at the interpreter to wait for."""

    make: Callable[[], object]
    dense: torch.Tensor
    part: torch.Tensor
    place: torch.Tensor


def multiply(
    x: torch.Tensor, weight: Packed, transposed: bool, trips: int, widened: bool = False, out: torch.Tensor | None = None, threads: int = 1
) -> torch.Tensor:
    """x [rows, inner] times the weight, or times its transpose, in tiles as wide as a `trips`-th of it, one at a time, or on two threads one of half
    that width on each (openmp.py). widened: by kernels/product.py."""
    inner, width = (weight.shape[1], weight.shape[0]) if transposed else weight.shape
    result = x.new_empty(x.shape[0], width) if out is None else out
    shares = thread_tiles(width, trips, threads)
    widest = shares[0][0].stop - shares[0][0].start
    scratch = x.new_empty(len(shares), widest * (inner + x.shape[0]))  # in one block: malloc's holes are fewer
    mm = product.mm_out if widened else torch.mm

    def tiles_of(share: Sequence[slice], memory: torch.Tensor) -> Iterator[_Tile]:
        maker = rows_maker if transposed else columns_maker
        for tile in share:
            columns = tile.stop - tile.start
            made, part = memory[: columns * inner].view((columns, inner) if transposed else (inner, columns)), memory[widest * inner :]
            make = maker(weight, tile.start, tile.stop, made)
            yield _Tile(make, made.t() if transposed else made, part[: x.shape[0] * columns].view(-1, columns), result[:, tile])

    def work(tiles: Sequence[_Tile]) -> None:
        for make, dense, part, place in tiles:
            make()
            mm(x, dense, out=part)
            place.copy_(part)

    openmp.together([functools.partial(work, [*tiles_of(*each)]) for each in zip(shares, scratch, strict=True)])
    return result
