"""How a dimension is cut for a Loop: columns of a weight into tiles, tokens into blocks. All parts are of one length but the last."""

from __future__ import annotations

COLUMNS_MULTIPLE = 64  # of which a tile is a multiple
ROWS_MULTIPLE = 8  # of which a block is one


def tile_size(width: int, trips: int) -> int:
    """Output columns of each of `trips` tiles."""
    return _length(width, trips, COLUMNS_MULTIPLE)


def tiles_of(width: int, size: int, start: int = 0) -> list[slice]:
    """Tiles of `size` columns from `start` to `width`; the last one may be narrower."""
    return [slice(first, min(first + size, width)) for first in range(start, width, size)]


def thread_tiles(width: int, trips: int, threads: int) -> list[list[slice]]:
    """The tiles of a product, by the threads that make and multiply them: two threads have half of the columns each and tiles half as wide, which
    together are no wider; any other number of threads works on one tile after the other."""
    size = tile_size(width, trips)
    half, middle = size // (2 * COLUMNS_MULTIPLE) * COLUMNS_MULTIPLE, _length(width, 2, COLUMNS_MULTIPLE)
    if threads != 2 or not half or middle >= width:
        return [tiles_of(width, size)]
    return [tiles_of(middle, half), tiles_of(width, half, middle)]


def tile_places(shares: list[list[slice]]) -> dict[str, object]:
    """Where the tiles of `thread_tiles` are, and whether each is one thread's alone: what a comparison with the whole product is told."""
    return {"tiles": [[tile.start, tile.stop] for tiles in shares for tile in tiles], "alone": len(shares) > 1}


def block_rows(tokens: int, trips: int) -> int:
    """Rows of each of `trips` blocks."""
    return min(tokens, _length(tokens, trips, ROWS_MULTIPLE))


def tile_counts(width: int, wanted: tuple[int, ...]) -> tuple[int, ...]:
    """Numbers of tiles worth offering, near the wanted ones; no two of them cut alike."""
    return _counts(width, wanted, COLUMNS_MULTIPLE)


def block_counts(tokens: int, wanted: tuple[int, ...]) -> tuple[int, ...]:
    """The same for blocks."""
    return _counts(tokens, wanted, ROWS_MULTIPLE)


def _length(whole: int, parts: int, multiple: int) -> int:
    return -(-whole // (parts * multiple)) * multiple


def _counts(whole: int, wanted: tuple[int, ...], multiple: int) -> tuple[int, ...]:
    counts: dict[int, int] = {}
    for parts in wanted:
        length = _length(whole, parts, multiple)
        if length < whole:
            counts.setdefault(length, -(-whole // length))
    return tuple(counts.values())
