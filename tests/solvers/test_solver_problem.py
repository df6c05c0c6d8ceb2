"""solvers.problem and solvers.schedule: validation, versions, JSON and text."""

from dataclasses import replace

import pytest
from generators import layered, small, transformer

from solvers.problem import Choice, Op, Problem, ProblemError, Storage, creators, final_versions, used_versions
from solvers.schedule import Free, Offload, Prefetch, Run, Schedule, Wait, format, format_bytes
from solvers.solve import smallest


def good() -> Problem:
    """w is updated by its own product."""
    ops = (
        Op("make", (Choice((0,), 5, 10), Choice((), 0, 20)), (1,)),
        Op("update", (Choice((1,), 0, 3),), (), (0,), phase="update"),
    )
    return Problem(ops, (Storage("w", 10, persistent=True), Storage("x", 20)), 100)


def with_op(index: int, **changes: object) -> Problem:
    problem = good()
    ops = list(problem.ops)
    ops[index] = replace(ops[index], **changes)  # type: ignore[arg-type]
    return replace(problem, ops=tuple(ops))


@pytest.mark.parametrize(
    ("problem", "named"),
    [
        (with_op(0, choices=()), "op make"),
        (with_op(0, choices=(Choice((9,)),)), "op make"),
        (with_op(0, choices=(Choice((0, 0)),)), "w"),
        (with_op(0, choices=(Choice((1,)),)), "op make"),
        (with_op(0, choices=(Choice((), -1),)), "workspace_bytes"),
        (with_op(0, choices=(Choice((), 0, 1.5),)), "time_us"),  # type: ignore[arg-type]
        (with_op(0, creates=(0,), choices=(Choice(()),)), "persistent storage w"),
        (with_op(0, creates=()), "storage x"),
        (with_op(0, writes=(1,)), "op make"),
        (with_op(1, creates=(1,), choices=(Choice(()),)), "as make does"),
        (with_op(0, choices=(Choice(()),), writes=(2,)), "does not exist"),
        (replace(good(), storages=(Storage("w", -1, True), Storage("x", 2))), "storage w"),
        (replace(good(), storages=(Storage("w", 1, True, output=True), Storage("x", 2))), "storage w"),
        (replace(good(), budget_bytes=-5), "budget_bytes"),
        (replace(good(), read_bytes_per_us=0.0), "read_bytes_per_us"),
        (replace(good(), ops=tuple(reversed(good().ops))), "before it is created"),
    ],
)
def test_bad_problems_are_refused_by_name(problem: Problem, named: str) -> None:
    """Every rule of validate() names the op, storage or field that breaks it."""
    with pytest.raises(ProblemError, match=named):
        problem.validate()


def test_versions_follow_the_base_order() -> None:
    """Persistent storages start at 0, creation gives 1, each write adds 1."""
    problem = good()
    assert used_versions(problem) == ({0: 0}, {1: 1, 0: 0})
    assert final_versions(problem) == (1, 1)
    assert creators(problem) == (-1, 0)


@pytest.mark.parametrize("problem", [small(3), layered(1), transformer(1)], ids=lambda p: p.name)
def test_problem_json_round_trip(problem: Problem) -> None:
    """A problem comes back equal from its JSON, and its text is stable."""
    text = problem.to_json()
    assert Problem.from_json(text) == problem
    assert Problem.from_json(text).to_json() == text


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"ops": 3, "storages": []}', '{"format": 99, "ops": [], "storages": []}']
)
def test_bad_json_is_refused(text: str) -> None:
    """Anything that isn't a problem in JSON raises ProblemError."""
    with pytest.raises(ProblemError):
        Problem.from_json(text)


def test_schedule_json_round_trip() -> None:
    """A schedule comes back equal from its JSON, all five kinds of steps included."""
    steps = (Run(0), Run(1, 2), Free(3), Offload(4), Wait(4), Prefetch(4))
    schedule = Schedule(steps, frozenset({5, 1}))
    assert Schedule.from_json(schedule.to_json()) == schedule
    _, found = smallest(layered(2, 20))
    assert Schedule.from_json(found.to_json()) == found
    for text in ("{}", "[]", '{"resident": [], "steps": [["jump", 1]]}'):
        with pytest.raises(ValueError):
            Schedule.from_json(text)


def test_schedule_prints_one_step_a_line_with_names() -> None:
    """Text names ops, storages, sizes, residents, and the choice where there is one."""
    lines = format(Schedule((Run(0, 1), Free(1)), frozenset({0})), good()).splitlines()
    assert lines == ["resident: w", "run      make (choice 1)", "free     x  # 20 B"]
    assert [format_bytes(n) for n in (5, 1536, 3 << 20, 5 << 30)] == ["5 B", "1.5 KiB", "3.0 MiB", "5.00 GiB"]
