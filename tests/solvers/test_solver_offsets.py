"""solvers.offsets: placements never overlap, are close to the maximum load, and the checker finds every overlap."""

import random

import pytest
from generators import layered, transformer

from solvers import arrange
from solvers.arrange import Arranged, Blocks
from solvers.baselines import keep_all
from solvers.check import replay
from solvers.library import load_library
from solvers.offsets import Lifespan, OffsetError, Placement, blocks_of, check_offsets, lifespans, max_load_bytes, place
from solvers.solve import smallest


def spans(seed: int, count: int) -> list[Lifespan]:
    draw = random.Random(seed)
    starts = [draw.randrange(200) for _ in range(count)]
    return [Lifespan(k, s, s + draw.randint(0, 60), draw.randint(0, 5000)) for k, s in enumerate(starts)]


def overlap(a: Lifespan, b: Lifespan, x: int, y: int) -> bool:
    """Both live at some step and sharing a byte: by definition, pair by pair."""
    together = max(a.start, b.start) < min(a.end, b.end)
    return together and max(x, y) < min(x + a.size_bytes, y + b.size_bytes)


@pytest.mark.parametrize("seed", range(20))
def test_fixed_ones_stay_and_others_go_around_them(seed: int) -> None:
    """Pair by pair again; a block that is away for a while leaves its bytes to others."""
    items = spans(seed, 60)
    alone = place(items[:10])
    fixed = {k: offset + 640 for k, offset in enumerate(alone.offsets)}
    placement = place(items, fixed=fixed)
    assert list(placement.offsets[:10]) == list(fixed.values())
    for k, a in enumerate(items):
        assert not any(overlap(a, items[j], placement.offsets[k], placement.offsets[j]) for j in range(k))
    back = [Lifespan(0, 0, 2, 640), Lifespan(0, 5, 9, 640), Lifespan(1, 2, 5, 640), Lifespan(2, 1, 3, 64)]
    assert place(back, fixed={0: 0, 1: 0}).offsets == (0, 0, 0, 640)
    with pytest.raises(OffsetError, match="overlap"):
        place(items[:2] + [Lifespan(5, 0, 300, 9), Lifespan(6, 0, 300, 9)], fixed={2: 0, 3: 0})


@pytest.mark.parametrize("seed", range(20))
def test_no_two_lifespans_overlap(seed: int) -> None:
    """Checked pair by pair; offsets are aligned, inside the arena, and the arena isn't below the maximum load."""
    items = spans(seed, 60)
    placement = place(items)
    for k, a in enumerate(items):
        assert placement.offsets[k] % 64 == 0
        assert placement.offsets[k] + a.size_bytes <= placement.arena_bytes
        for j in range(k):
            assert not overlap(a, items[j], placement.offsets[k], placement.offsets[j])
    assert max_load_bytes(items) == placement.lower_bound_bytes <= placement.arena_bytes
    assert placement.arena_bytes <= 1.3 * placement.lower_bound_bytes


@pytest.mark.parametrize("seed", range(200))
def test_the_checker_agrees_with_pairwise_comparison(seed: int) -> None:
    """Random offsets: check_offsets rejects exactly those with a pair that overlaps."""
    draw = random.Random(seed)
    items = spans(seed, draw.randint(2, 12))
    offsets = tuple(64 * draw.randrange(800) for _ in items)
    bad = any(
        overlap(a, b, x, y)
        for k, (a, x) in enumerate(zip(items, offsets, strict=True))
        for b, y in list(zip(items, offsets, strict=True))[:k]
    )
    placement = Placement(offsets, 64 * 1000, 0)
    if bad:
        with pytest.raises(OffsetError, match="overlap"):
            check_offsets(items, placement)
    else:
        check_offsets(items, placement)


def test_bad_lifespans_and_placements_are_refused() -> None:
    """Backwards lifespans, odd alignments, misaligned offsets, small arenas and missing offsets raise."""
    item = Lifespan(0, 0, 4, 100)
    for wrong in (Lifespan(0, 4, 0, 100), Lifespan(0, 0, 4, 100, 48), Lifespan(0, 0, 4, -1)):
        with pytest.raises(OffsetError):
            place([wrong])
    for placement in (
        Placement((32,), 999, 0),
        Placement((0,), 99, 0),
        Placement((), 999, 0),
        Placement((-64,), 99, 0),
    ):
        with pytest.raises(OffsetError):
            check_offsets([item], placement)
    assert place([]) == Placement((), 0, 0)


@pytest.mark.parametrize("problem", [layered(2, 40), transformer(2, 32, 16)], ids=["layered", "transformer"])
def test_lifespans_of_a_schedule_carry_its_memory(problem) -> None:  # type: ignore[no-untyped-def]
    """At every step the lifespans' bytes are the replay's timeline less workspace; the arena is within 20 % of them."""
    for schedule in (keep_all(problem), smallest(problem)[1]):
        report, items = replay(problem, schedule, False), lifespans(problem, schedule)
        change = [0] * (len(schedule.steps) + 1)
        for item in items:
            change[item.start] += item.size_bytes
            change[item.end] -= item.size_bytes
        load = 0
        for index, delta in enumerate(change[:-1]):
            load += delta
            step = schedule.steps[index]
            extra = problem.ops[step.op].choices[step.choice].workspace_bytes if hasattr(step, "op") else 0
            assert load + extra + problem.constant_bytes == report.timeline[index]
        assert place(items).arena_bytes <= 1.2 * max_load_bytes(items)


def test_placement_is_deterministic() -> None:
    """The same lifespans and seed give the same offsets."""
    assert place(spans(7, 200), seed=3) == place(spans(7, 200), seed=3)


def mixed(seed: int) -> list[Lifespan]:
    """300 lifespans of mixed sizes, most of them short."""
    draw, items = random.Random(seed), []
    for k in range(300):
        start = draw.randrange(400)
        items.append(Lifespan(k, start, start + 1 + int(draw.expovariate(1 / 40)), 64 * draw.choice([1, 2, 3, 7, 11, 20, 45, 200])))
    return items


@pytest.mark.skipif(load_library("pack") is None, reason="no C compiler")
@pytest.mark.parametrize("seed", [0, 6, 7])
def test_each_search_makes_the_arena_smaller(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """First-fit alone needs 0.4 to 5.8 % more than the most bytes at once; each search alone less than it, and all together just those."""
    items = mixed(seed)

    def nothing(best: Arranged, *_: object) -> Arranged:
        return best

    def without(*names: str) -> int:
        with monkeypatch.context() as patched:
            for name in names:
                patched.setattr(arrange, name, (lambda *_: None) if name == "around_the_busiest" else nothing)
            return place(items).arena_bytes

    searches = ("around_the_busiest", "_ejected", "_exact", "_grown")
    first_fit = without(*searches)
    for one in searches:
        assert without(*(name for name in searches if name != one)) < first_fit
    assert place(items).arena_bytes == max_load_bytes(items) < first_fit


@pytest.mark.parametrize("seed", range(10))
def test_what_lives_all_the_time_costs_its_bytes_and_no_more(seed: int) -> None:
    """The others are placed as if it were not there."""
    items = [item for item in mixed(seed)[:60] if item.start and item.end < 500]
    always = [Lifespan(1000 + k, 0, 500, 64 * (k + 1)) for k in range(5)]
    bottom = sum(item.size_bytes for item in always)
    alone, both = place(items), place([*always, *items, Lifespan(2000, 7, 7, 640), Lifespan(2001, 0, 500, 0)])
    assert (both.arena_bytes, both.lower_bound_bytes) == (alone.arena_bytes + bottom, alone.lower_bound_bytes + bottom)
    assert both.offsets[5:-2] == tuple(offset + bottom for offset in alone.offsets)


def test_blocks_are_the_aligned_lifespans() -> None:
    blocks = blocks_of([Lifespan(3, 1, 4, 65), Lifespan(4, 2, 6, 64), Lifespan(5, 0, 9, 7, align=8)])
    assert isinstance(blocks, Blocks)
    assert [column.tolist() for column in blocks] == [[1, 2, 0], [4, 6, 9], [128, 64, 8], [64, 64, 8]]
    assert blocks.max_load() == 200
    assert place([]).arena_bytes == 0
