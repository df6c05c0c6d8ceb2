"""Linear programs, some of whose variables may be whole numbers, and HiGHS, which solves them through MathOpt.

Columns are numbers and rows are lists, handed to MathOpt all at once. A program of MathOpt's own objects takes three to four times as long to build,
longer than HiGHS takes to solve it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ortools.math_opt.model_pb2 import ModelProto


class Variable(int):
    """A column of a program, by its number."""

    __slots__ = ()


@dataclass(slots=True)
class Expression:
    """A linear expression: coefficients and a constant."""

    terms: dict[Variable, float] = field(default_factory=dict)
    constant: float = 0.0

    def add(self, other: Variable | float | Expression, factor: float = 1.0) -> Expression:
        if isinstance(other, Variable):
            self.terms[other] = self.terms.get(other, 0.0) + factor
        elif isinstance(other, Expression):
            for variable, value in other.terms.items():
                self.terms[variable] = self.terms.get(variable, 0.0) + factor * value
            self.constant += factor * other.constant
        else:
            self.constant += factor * other
        return self

    def scaled(self, factor: float) -> Expression:
        """The expression times the factor."""
        return Expression({variable: factor * value for variable, value in self.terms.items()}, factor * self.constant)


def total(variables: Iterable[Variable]) -> Expression:
    """The sum of the variables."""
    result = Expression()
    for variable in variables:
        result.add(variable)
    return result


@dataclass(frozen=True, slots=True)
class Answer:
    """What the solver says. optimal: objective and bound are as near as was asked for. objective, and the value of each variable: of the best
    solution, infinite and empty without one. bound: no solution has a lower objective. prices: reduced costs, where no variable was whole."""

    optimal: bool
    objective: float
    bound: float
    values: Sequence[float]
    prices: Sequence[float]


class LinearProgram:
    """minimise an expression, subject to rows: least <= expression <= most. lower and upper, by variable, may be changed between two answers.
    binaries: the shares that a schedule gives in whole numbers; an answer has them so only where it is asked to."""

    def __init__(self) -> None:
        self.lower: list[float] = []
        self.upper: list[float] = []
        self.binaries: list[Variable] = []
        self._least: list[float] = []
        self._most: list[float] = []
        self._row: list[int] = []
        self._column: list[int] = []
        self._value: list[float] = []
        self._objective: list[tuple[Variable, float]] = []

    def variable(self, lower: float = 0.0, upper: float = math.inf) -> Variable:
        """A new one."""
        self.lower.append(lower)
        self.upper.append(upper)
        return Variable(len(self.lower) - 1)

    def share(self) -> Variable:
        """A new one between 0 and 1."""
        return self.variable(0.0, 1.0)

    def binary(self) -> Variable:
        """A new share, one of the binaries."""
        self.binaries.append(self.share())
        return self.binaries[-1]

    def row(self, expression: Expression, least: float = -math.inf, most: float = math.inf) -> None:
        """least <= expression <= most."""
        terms = _in_order(expression)
        self._row += [len(self._least)] * len(terms)
        self._column += [variable for variable, _ in terms]
        self._value += [value for _, value in terms]
        self._least.append(least - expression.constant)
        self._most.append(most - expression.constant)

    def minimise(self, expression: Expression) -> None:
        """The expression's constant is left out."""
        self._objective = _in_order(expression)

    def answer(self, seconds: float, gap: float | None = None, whole: Iterable[Variable] = ()) -> Answer | None:
        """What HiGHS finds in so many seconds, with some variables in whole numbers until solution and bound are within the gap; None where it
        fails. MathOpt reports some failures of the solver as an AttributeError."""
        from ortools.math_opt.python import mathopt

        parameters = mathopt.SolveParameters(time_limit=timedelta(seconds=seconds), relative_gap_tolerance=gap)
        integer = set(whole)
        model = mathopt.Model.from_model_proto(self._proto(integer))
        try:
            result = mathopt.solve(model, mathopt.SolverType.HIGHS, params=parameters)
        except (AttributeError, RuntimeError, ValueError):
            return None
        found, optimal = result.has_primal_feasible_solution(), result.termination.reason == mathopt.TerminationReason.OPTIMAL
        columns = list(model.variables()) if found else []
        return Answer(
            optimal,
            result.objective_value() if found else math.inf,
            result.best_objective_bound(),
            result.variable_values(columns) if found else [],
            result.reduced_costs(columns) if optimal and not integer else [],
        )

    def _proto(self, integer: set[Variable]) -> ModelProto:
        from ortools.math_opt import model_pb2

        proto, columns, rows = model_pb2.ModelProto(), range(len(self.lower)), range(len(self._least))
        proto.variables.ids.extend(columns)
        proto.variables.lower_bounds.extend(self.lower)
        proto.variables.upper_bounds.extend(self.upper)
        proto.variables.integers.extend(column in integer for column in columns)
        proto.linear_constraints.ids.extend(rows)
        proto.linear_constraints.lower_bounds.extend(self._least)
        proto.linear_constraints.upper_bounds.extend(self._most)
        proto.linear_constraint_matrix.row_ids.extend(self._row)
        proto.linear_constraint_matrix.column_ids.extend(self._column)
        proto.linear_constraint_matrix.coefficients.extend(self._value)
        proto.objective.linear_coefficients.ids.extend(variable for variable, _ in self._objective)
        proto.objective.linear_coefficients.values.extend(value for _, value in self._objective)
        return proto


def _in_order(expression: Expression) -> list[tuple[Variable, float]]:
    """Its terms by variable, without those that cancelled."""
    return sorted((variable, value) for variable, value in expression.terms.items() if value)
