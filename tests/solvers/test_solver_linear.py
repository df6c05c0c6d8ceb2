"""solvers.linear: programs as plain numbers, and what HiGHS says of them."""

import math

import pytest

from solvers.linear import Expression, LinearProgram, Variable, total

pytest.importorskip("ortools")


def knapsack() -> tuple[LinearProgram, list[Variable]]:
    """Worth 10, 7 and 6 at 5, 4 and 3 of room 7: the best is 13 in whole numbers, 15 with shares."""
    program = LinearProgram()
    taken = [program.share() for _ in range(3)]
    room, worth = Expression(), Expression(constant=100.0)
    for variable, size, value in zip(taken, (5.0, 4.0, 3.0), (10.0, 7.0, 6.0), strict=True):
        room.add(variable, size)
        worth.add(variable, -value)
    program.row(room, most=7.0)
    program.minimise(worth)
    return program, taken


def test_shares_and_whole_numbers() -> None:
    program, taken = knapsack()
    relaxed, whole = program.answer(10.0), program.answer(10.0, 0.0, taken)
    assert relaxed is not None
    assert whole is not None
    assert relaxed.optimal
    assert whole.optimal
    assert relaxed.objective == pytest.approx(-14.0)
    assert relaxed.bound == pytest.approx(-14.0)
    assert whole.objective == pytest.approx(-13.0)
    assert [round(whole.values[variable]) for variable in taken] == [0, 1, 1]
    assert not whole.prices


def test_prices_are_reduced_costs() -> None:
    """Room costs 2 a piece: the second is worth 7 - 8, the others pay."""
    program, taken = knapsack()
    answer = program.answer(10.0)
    assert answer is not None
    assert [answer.prices[variable] for variable in taken] == pytest.approx([0.0, 1.0, 0.0])


def test_bounds_may_change_between_answers() -> None:
    program, taken = knapsack()
    program.upper[taken[0]] = 0.0
    answer = program.answer(10.0, 0.0, taken)
    assert answer is not None
    assert answer.objective == pytest.approx(-13.0)
    program.lower[taken[0]] = program.upper[taken[0]] = 1.0
    answer = program.answer(10.0, 0.0, taken)
    assert answer is not None
    assert answer.objective == pytest.approx(-10.0)


def test_without_a_solution_there_are_no_values() -> None:
    program, taken = knapsack()
    program.row(total(taken), least=3.0)
    answer = program.answer(10.0)
    assert answer is not None
    assert not answer.optimal
    assert answer.objective == math.inf
    assert not answer.values


def test_constants_of_rows_count_and_terms_add_up() -> None:
    """2 x + 1 >= 4: x is at least 1.5, given as x + x; a variable that cancels leaves no term behind."""
    program = LinearProgram()
    x, y = program.variable(), program.variable()
    program.row(Expression(constant=1.0).add(x).add(Expression().add(x)).add(y).add(y, -1.0), least=4.0)
    program.minimise(Expression().add(x).add(y))
    answer = program.answer(10.0)
    assert answer is not None
    assert [answer.values[x], answer.values[y]] == pytest.approx([1.5, 0.0])
    assert Expression().add(x, 2.0).add(3.0).scaled(0.5) == Expression({x: 1.0}, 1.5)
