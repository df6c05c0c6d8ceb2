import pytest

from mebp_compile.lower.cuts import COLUMNS_MULTIPLE, thread_tiles, tile_size, tiles_of


def columns(tiles):
    return [column for tile in tiles for column in range(tile.start, tile.stop)]


@pytest.mark.parametrize("width", [64, 128, 896, 1000, 4864])
@pytest.mark.parametrize("trips", [1, 2, 3, 4, 7, 8, 16, 32])
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_every_column_is_in_one_tile(width, trips, threads):
    shares = thread_tiles(width, trips, threads)
    assert columns(tile for tiles in shares for tile in tiles) == list(range(width))
    assert all(tile.start % COLUMNS_MULTIPLE == 0 for tiles in shares for tile in tiles)


@pytest.mark.parametrize("width", [128, 896, 1000, 4864])
@pytest.mark.parametrize("trips", [1, 2, 3, 4, 7, 8, 16, 32])
def test_tiles_of_two_threads_are_together_no_wider_than_one(width, trips):
    shares = thread_tiles(width, trips, 2)
    assert sum(max(tile.stop - tile.start for tile in tiles) for tiles in shares) <= tile_size(width, trips)
    assert len(shares) == (2 if tile_size(width, trips) >= 2 * COLUMNS_MULTIPLE else 1)


def test_the_last_tile_may_be_narrower():
    assert tiles_of(10, 4) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert tiles_of(10, 4, 8) == [slice(8, 10)]
