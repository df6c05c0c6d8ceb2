"""solvers.improve: what is taken back makes a plan faster, never larger than the budget."""

from solvers.check import replay
from solvers.decode import Decisions, Tables
from solvers.evict import State
from solvers.greedy import evaluate, first_decisions
from solvers.improve import refill
from solvers.problem import Choice, Op, Problem, Storage
from solvers.schedule import Run
from solvers.solve import solve

DENSE, TILED = 0, 1


def two_readers(budget_bytes: int, tiled_us: int = 30) -> Problem:
    """A weight dequantised in 40 us for two products of 10 us each, which may make it tile by tile instead, in `tiled_us`; what lies between them
    leaves it no room below 200 bytes."""
    storages = (
        Storage("packed", 10, persistent=True, movable=False), Storage("dense", 80, movable=False), Storage("y", 10), Storage("wide", 110),
        Storage("z", 10), Storage("end", 10, output=True),
    )  # fmt: skip
    product = lambda read: (Choice((1, *read), time_us=10), Choice((0, *read), workspace_bytes=20, time_us=tiled_us, trips=4))  # noqa: E731
    ops = (
        Op("dequantise", (Choice((0,), time_us=40),), (1,), optional=True),
        Op("first", product(()), (2,)),
        Op("wide", (Choice((2,), time_us=10),), (3,)),
        Op("narrow", (Choice((3,), time_us=10),), (4,)),
        Op("second", product((4,)), (5,)),
    )
    return Problem(ops, storages, budget_bytes, can_offload=False)


def ways(problem: Problem) -> list[int]:
    """In which way the products run."""
    return [step.choice for step in solve(problem, "fast").schedule.steps if isinstance(step, Run) and step.op in (1, 4)]


def test_a_weight_is_shared_where_it_can_stay() -> None:
    """Made once for both it takes 40 + 10 + 10, tile by tile 30 + 30."""
    assert ways(two_readers(1000)) == [DENSE, DENSE]


def test_a_weight_that_serves_one_reader_at_a_time_is_made_in_tiles() -> None:
    """Freed between them it would be made twice: 100 us; in tiles they take 60."""
    problem = two_readers(150)
    assert ways(problem) == [TILED, TILED]
    assert replay(problem, solve(problem, "fast").schedule).time_us == 80


def test_tiles_that_take_longer_are_left_alone() -> None:
    """More than making it for that reader takes."""
    assert ways(two_readers(150, tiled_us=51)) == [DENSE, DENSE]


def test_all_readers_of_one_copy_change_or_none() -> None:
    """One reader alone would still leave the weight to be made for the other."""
    problem = two_readers(1000, tiled_us=29)
    tables = Tables(problem)
    state = evaluate(tables, Decisions([0, DENSE, 0, 0, DENSE]))
    better: State = refill(tables, state, 0.5)
    assert better.decisions.choice[1] == better.decisions.choice[4] == TILED
    assert first_decisions(tables).choice[1] == first_decisions(tables).choice[4]
