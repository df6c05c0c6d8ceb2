"""Linear expressions over MathOpt variables: a dictionary and a constant, much faster to build than MathOpt's own; and HiGHS."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ortools.math_opt.python.mathopt import Model, SolveResult, Variable

Terms = dict["Variable", float]


@dataclass(slots=True)
class Expression:
    """A linear expression: coefficients and a constant."""

    terms: Terms = field(default_factory=dict)
    constant: float = 0.0

    def add(self, other: Variable | float | Expression, factor: float = 1.0) -> Expression:
        if isinstance(other, Expression):
            for variable, value in other.terms.items():
                self.terms[variable] = self.terms.get(variable, 0.0) + factor * value
            self.constant += factor * other.constant
        elif isinstance(other, (int, float)):
            self.constant += factor * other
        else:
            self.terms[other] = self.terms.get(other, 0.0) + factor
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


def mathopt_sum(expression: Expression) -> object:
    """MathOpt's form of the expression, without its constant."""
    from ortools.math_opt.python import mathopt

    return mathopt.LinearSum([mathopt.LinearTerm(variable, value) for variable, value in expression.terms.items()])


def highs(model: Model, seconds: float, gap: float | None = None) -> SolveResult | None:
    """What HiGHS says of the model in so many seconds, in whole numbers until solution and bound are within the gap; None where it fails. MathOpt
    reports some failures of the solver as an AttributeError."""
    from ortools.math_opt.python import mathopt

    parameters = mathopt.SolveParameters(time_limit=timedelta(seconds=seconds), relative_gap_tolerance=gap)
    try:
        return mathopt.solve(model, mathopt.SolverType.HIGHS, params=parameters)
    except (AttributeError, RuntimeError, ValueError):
        return None
