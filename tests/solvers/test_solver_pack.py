"""solvers.pack: packings where there are any, proofs where there are none, the same answer each time."""

import itertools
import random

import numpy as np
import pytest

from solvers import offsets, pack
from solvers.__main__ import main
from solvers.library import load_library
from solvers.offsets import Lifespan, check_offsets, max_load_bytes, place

needs_library = pytest.mark.skipif(load_library("pack") is None, reason="pack.c is not built (no C compiler)")
Block = tuple[int, int, int]


def cut_rectangle(seed: int, count: int, steps: int = 400, height: int = 100_000) -> list[Block]:
    """Blocks (start, end, size) that fill a rectangle of time and bytes without a hole."""
    draw = random.Random(seed)
    parts = [(0, steps, height)]
    while len(parts) < count:
        begin, end, size = parts.pop(max(range(len(parts)), key=lambda k: (parts[k][1] - parts[k][0]) * parts[k][2] * draw.random()))
        if end - begin > 1 and draw.random() < 0.5:
            middle = draw.randrange(begin + 1, end)
            parts += [(begin, middle, size), (middle, end, size)]
        elif size > 1:
            part = draw.randrange(1, size)
            parts += [(begin, end, part), (begin, end, size - part)]
        else:
            parts.append((begin, end, size))
    draw.shuffle(parts)
    return parts


def tried(blocks: list[Block], height: int, work: int = 1 << 30) -> pack.Packing:
    starts, ends, sizes = (np.array(column, dtype=np.int64) for column in zip(*blocks, strict=True))
    return pack.pack(starts, ends, sizes, height, work)


def smallest_height(blocks: list[Block]) -> int:
    """By trying every order, each block on top of those before it that it meets."""
    least = sum(size for *_, size in blocks)
    for order in itertools.permutations(blocks):
        placed: list[tuple[int, int, int]] = []
        for start, end, size in order:
            placed.append((start, end, size + max((top for a, b, top in placed if a < end and start < b), default=0)))
        least = min(least, max(top for *_, top in placed))
    return least


@needs_library
@pytest.mark.parametrize("seed", range(60))
def test_the_smallest_height_is_found_and_proven(seed: int) -> None:
    """Of up to seven blocks: a packing at the smallest height, as every order says, and a proof that one less is too little."""
    draw = random.Random(seed)
    blocks = []
    for _ in range(draw.randint(1, 7)):
        start = draw.randrange(8)
        blocks.append((start, start + draw.randint(1, 5), draw.randint(1, 6)))
    height = smallest_height(blocks)
    found, refused = tried(blocks, height), tried(blocks, height - 1)
    assert found.offsets is not None
    items = [Lifespan(k, *block, align=1) for k, block in enumerate(blocks)]
    check_offsets(items, offsets.Placement(tuple(found.offsets.tolist()), height, 0))
    assert refused == pack.Packing(None, proven=True)


@needs_library
def test_rectangles_without_holes() -> None:
    """A hundred blocks that fill their arena exactly: placed at the maximum load, to which no first fit comes."""
    gained = 0
    for seed in range(8):
        items = [Lifespan(k, *block, align=1) for k, block in enumerate(cut_rectangle(seed, 100))]
        placement = place(items)
        assert placement.arena_bytes == placement.lower_bound_bytes == max_load_bytes(items)
        gained += place(items, work=0).arena_bytes > placement.arena_bytes
    assert gained == 8


@needs_library
def test_work_ends_the_search_and_repeats() -> None:
    """With next to no work there is no answer; the same work gives the same offsets."""
    blocks = cut_rectangle(3, 120)
    assert tried(blocks, 100_000, work=1) == pack.Packing(None, proven=False)
    first, second = tried(blocks, 100_000), tried(blocks, 100_000)
    assert first.offsets is not None
    assert np.array_equal(first.offsets, second.offsets)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """First fit and local search alone: a placement all the same."""
    monkeypatch.setattr(pack, "load_library", lambda name: None)
    items = [Lifespan(k, *block) for k, block in enumerate(cut_rectangle(0, 60))]
    assert place(items).arena_bytes >= max_load_bytes(items)


def test_the_command_packs_a_file(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    """Columns by name; another file is an error in a line."""
    path = tmp_path / "blocks.csv"
    path.write_text("id,lower,upper,size\n0,0,2,5\n1,1,3,4\n2,2,4,5\n")
    assert main(["pack", str(path)]) == 0
    assert capsys.readouterr().out.startswith("3 blocks in 9 bytes; none need less than 9; ")
    path.write_text("a,b\n1,2\n")
    assert main(["pack", str(path)]) == 1
    assert "has no columns lower, upper and size" in capsys.readouterr().err
