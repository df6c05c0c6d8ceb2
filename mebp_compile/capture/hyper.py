"""Live hyper-parameters: numbers of an optimizer's param groups that stay inputs of the captured step.

While the step is traced every number in `param_groups` is replaced by a `LiveFloat`, a float that remembers the expression that made it:
`1 - lr * weight_decay` stays that expression, also when an optimizer computes it in plain Python. By the time it reaches an op it is a bare
double, so its *bits* identify it: the traced values are the true ones, perturbed to be unmistakable, and the lowering looks each constant
of the graph up in `HyperTable.expressions`. Comparisons (`if weight_decay != 0`) are recorded as guards.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable
from typing import Any

from mebp_compile.graph import Guard

Number = int | float


class HyperTable:
    """Expressions by the exact double that stands for them, and the guards that branches on them left."""

    def __init__(self) -> None:
        self.expressions: dict[float, str] = {}
        self.guards: dict[str, Guard] = {}

    def live(self, value: Number, expression: str) -> float:
        """A stand-in for a hyper-parameter: near `value`, and equal to no other number by accident. 0 and 1 stay themselves, guarded."""
        if isinstance(value, bool) or value in (0, 1) or isinstance(value, int):
            self.guards[expression] = Guard("hyper", expression, value)
            return value
        salt = int.from_bytes(hashlib.sha256(f"{expression}{value.hex()}".encode()).digest()[:6], "big") / 2**48
        return self.remember(value * (1 - 1e-4 * (0.25 + salt / 2)), expression)

    def remember(self, value: float, expression: str) -> LiveFloat:
        number = LiveFloat(value)
        number.expression = expression
        number.table = self
        self.expressions[float(value)] = expression
        return number

    def compare(self, expression: str, outcome: bool) -> bool:
        self.guards[expression] = Guard("hyper", expression, outcome)
        return outcome


class LiveFloat(float):
    """A float that knows the expression over hyper-parameters that it stands for."""

    __slots__ = ("expression", "table")
    expression: str
    table: HyperTable

    def __hash__(self) -> int:
        return float.__hash__(self)

    def __bool__(self) -> bool:
        return self.table.compare(f"bool({self.expression})", float(self) != 0.0)

    def __neg__(self) -> LiveFloat:
        return self.table.remember(-float(self), f"-({self.expression})")

    def __reduce__(self) -> Any:
        return (float, (float(self),))


def _text(number: Any) -> str:
    return number.expression if isinstance(number, LiveFloat) else repr(number)


def _binary(symbol: str, compute: Callable[[Any, Any], Any], swapped: bool) -> Callable[[LiveFloat, Any], Any]:
    def method(self: LiveFloat, other: Any) -> Any:
        left, right = (other, self) if swapped else (self, other)
        value = compute(_plain(left), _plain(right))
        if not isinstance(other, (int, float)):  # a symbolic number: the bare double in the trace identifies this one
            return value
        expression = f"({_text(left)} {symbol} {_text(right)})"
        return self.table.remember(value, expression) if isinstance(value, float) else value

    return method


def _comparison(symbol: str, compute: Callable[[Any, Any], bool]) -> Callable[[LiveFloat, Any], Any]:
    def method(self: LiveFloat, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        return self.table.compare(f"({_text(self)} {symbol} {_text(other)})", compute(float(self), _plain(other)))

    return method


def _plain(number: Any) -> Number:
    return float(number) if isinstance(number, LiveFloat) else number


for _name, _symbol, _compute in (
    ("add", "+", operator.add), ("sub", "-", operator.sub), ("mul", "*", operator.mul),
    ("truediv", "/", operator.truediv), ("pow", "**", operator.pow),
):  # fmt: skip
    setattr(LiveFloat, f"__{_name}__", _binary(_symbol, _compute, swapped=False))
    setattr(LiveFloat, f"__r{_name}__", _binary(_symbol, _compute, swapped=True))
for _name, _symbol, _compare in (
    ("eq", "==", operator.eq), ("ne", "!=", operator.ne), ("lt", "<", operator.lt),
    ("le", "<=", operator.le), ("gt", ">", operator.gt), ("ge", ">=", operator.ge),
):  # fmt: skip
    setattr(LiveFloat, f"__{_name}__", _comparison(_symbol, _compare))


def live_groups(optimizer: Any, root: str, table: HyperTable) -> list[dict[str, Any]]:
    """The optimizer's param groups without their parameters, every number in them replaced by a live one."""
    return [
        {key: _live(value, f"{root}.param_groups[{index}][{key!r}]", table) for key, value in group.items() if key != "params"}
        for index, group in enumerate(optimizer.param_groups)
    ]


def _live(value: Any, expression: str, table: HyperTable) -> Any:
    if isinstance(value, tuple):
        return tuple(_live(part, f"{expression}[{index}]", table) for index, part in enumerate(value))
    if isinstance(value, float) and not isinstance(value, bool):
        return table.live(value, expression)
    if isinstance(value, (bool, int, str, type(None))):
        table.guards[expression] = Guard("hyper", expression, value)
    return value
