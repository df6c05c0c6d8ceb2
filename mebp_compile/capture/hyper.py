"""Live hyper-parameters: numbers of an optimizer's param groups that stay inputs of the captured step.

While the step is traced every float in `param_groups` is replaced by a `LiveFloat`: a stand-in that remembers the expression that made it,
so that `1 - lr * weight_decay` stays that expression, also when an optimizer computes it in plain Python. By the time it reaches an op it
is a bare double, so its *bits* identify it: stand-ins are salted to be unmistakable, and the lowering looks each constant of the graph up
in `HyperTable.expressions`. What Python decides on (`if weight_decay != 0`) is decided on the true value and recorded as a guard. A
conversion that this can't follow (numpy, C code) would leave a salted number behind; `lost.lost_number` finds it by tracing with two salts.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from mebp_compile import torch_private
from mebp_compile.graph import Guard

Number = int | float
FOLLOWED = ("sqrt", "exp", "log", "log1p", "expm1", "log2", "log10", "cos", "sin", "tan", "tanh", "pow", "fabs")
DECIDED = ("floor", "ceil", "trunc", "isnan", "isinf", "isfinite", "isclose")


class HyperTable:
    """Expressions by the exact double that stands for them, and the guards that Python's decisions left."""

    def __init__(self, salt: str = "") -> None:
        self.salt = salt
        self.expressions: dict[float, str] = {}
        self.guards: dict[str, Guard] = {}

    def live(self, value: float, expression: str) -> Number:
        """A stand-in for a hyper-parameter: of its sign and magnitude, and equal to no other number by accident. 0 and 1 stay themselves,
        guarded.
        """
        if value in (0.0, 1.0) or not math.isfinite(value):
            self.guard(expression, value)
            return value
        digest = hashlib.sha256(f"{self.salt}{expression}{value.hex()}".encode()).digest()
        part = int.from_bytes(digest[:6], "big") / 2**48
        return self.remember(value * (0.75 + part / 5), value, expression)

    def remember(self, bare: float, true: float, expression: str) -> LiveFloat:
        number = LiveFloat(bare)
        number.true, number.expression, number.table = true, expression, self
        self.expressions[bare] = expression
        return number

    def guard(self, expression: str, outcome: Any) -> Any:
        self.guards[expression] = Guard("hyper", expression, outcome)
        return outcome

    def expression_of(self, constant: torch.Tensor) -> str | None:
        """The expression behind a one-element constant tensor that was made from a live number, or None."""
        if constant.numel() != 1 or constant.dtype not in (torch.float32, torch.float64):
            return None
        found = {text for number, text in self.expressions.items() if torch.tensor(number, dtype=constant.dtype).item() == constant.item()}
        return found.pop() if len(found) == 1 else None


class LiveFloat(float):
    """A float that knows its true value, and the expression over hyper-parameters that it stands for."""

    __slots__ = ("expression", "table", "true")
    true: float
    expression: str
    table: HyperTable

    def __hash__(self) -> int:
        return float.__hash__(self)

    def __bool__(self) -> bool:
        return bool(self.table.guard(f"bool({self.expression})", self.true != 0.0))

    def __int__(self) -> int:
        return int(self.table.guard(f"int({self.expression})", int(self.true)))

    def __round__(self, digits: int | None = None) -> Any:
        return self.table.guard(f"round({self.expression}, {digits})", round(self.true, digits))

    def __float__(self) -> float:
        return stand_in(self)

    def __neg__(self) -> LiveFloat:
        return self.table.remember(-stand_in(self), -self.true, f"(-{self.expression})")

    def __pos__(self) -> LiveFloat:
        return self

    def __abs__(self) -> LiveFloat:
        return self.table.remember(abs(stand_in(self)), abs(self.true), f"abs({self.expression})")

    def __reduce__(self) -> Any:
        return (float, (self.true,))

    def __deepcopy__(self, memo: dict[int, Any]) -> LiveFloat:
        return self


def stand_in(number: Any) -> Any:
    """The bare number that a trace holds for a live one; any other number as it is."""
    return float.__add__(number, 0.0) if isinstance(number, LiveFloat) else number


def _true(number: Any) -> Any:
    return number.true if isinstance(number, LiveFloat) else number


def _text(number: Any) -> str:
    if isinstance(number, LiveFloat):
        return number.expression
    return f"({number!r})" if math.isfinite(number) else f"float({str(number)!r})"


def _binary(symbol: str, compute: Callable[[Any, Any], Any], swapped: bool) -> Callable[[LiveFloat, Any], Any]:
    def method(self: LiveFloat, other: Any) -> Any:
        other = torch_private.plain_number(other)
        if not isinstance(other, (int, float)):  # a tensor or a symbolic number: the bare double in the trace identifies this one
            return compute(other, stand_in(self)) if swapped else compute(stand_in(self), other)
        left, right = (other, self) if swapped else (self, other)
        return _followed(self.table, f"({_text(left)} {symbol} {_text(right)})", compute, left, right)

    return method


def _followed(table: HyperTable, expression: str, compute: Callable[..., Any], *numbers: Any) -> Any:
    """The live result of a computation on live and plain numbers; a result that is no float is decided by the true values, and guarded."""
    true = compute(*map(_true, numbers))
    if not isinstance(true, float):
        return table.guard(expression, true)
    return table.remember(compute(*map(stand_in, numbers)), true, expression)


def _comparison(symbol: str, compute: Callable[[Any, Any], bool]) -> Callable[[LiveFloat, Any], Any]:
    def method(self: LiveFloat, other: Any) -> Any:
        other = torch_private.plain_number(other)
        if torch_private.is_symbolic(other):
            return compute(stand_in(self), other)
        if not isinstance(other, (int, float)):
            return NotImplemented
        return self.table.guard(f"({_text(self)} {symbol} {_text(other)})", compute(self.true, _true(other)))

    return method


for _name, _symbol, _compute in (
    ("add", "+", operator.add), ("sub", "-", operator.sub), ("mul", "*", operator.mul), ("truediv", "/", operator.truediv),
    ("pow", "**", operator.pow), ("floordiv", "//", operator.floordiv), ("mod", "%", operator.mod),
):  # fmt: skip
    setattr(LiveFloat, f"__{_name}__", _binary(_symbol, _compute, swapped=False))
    setattr(LiveFloat, f"__r{_name}__", _binary(_symbol, _compute, swapped=True))
for _name, _symbol, _compare in (
    ("eq", "==", operator.eq), ("ne", "!=", operator.ne), ("lt", "<", operator.lt),
    ("le", "<=", operator.le), ("gt", ">", operator.gt), ("ge", ">=", operator.ge),
):  # fmt: skip
    setattr(LiveFloat, f"__{_name}__", _comparison(_symbol, _compare))


@contextlib.contextmanager
def followed_math() -> Iterator[None]:
    """Inside, `math.sqrt` and its kin give live results for live numbers, and `math.floor` and its kin guarded ones."""
    with contextlib.ExitStack() as stack:
        for name in (*FOLLOWED, *DECIDED):
            stack.enter_context(mock.patch.object(math, name, _math_function(name, getattr(math, name))))
        yield


def _math_function(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def function(*numbers: Any, **options: Any) -> Any:
        live = next((number for number in (*numbers, *options.values()) if isinstance(number, LiveFloat)), None)
        if live is None:
            return original(*numbers, **options)
        texts = [*map(_text, numbers), *(f"{key}={_text(number)}" for key, number in options.items())]
        keywords = {key: _true(number) for key, number in options.items()}
        return _followed(live.table, f"math.{name}({', '.join(texts)})", lambda *parts: original(*parts, **keywords), *numbers)

    return function


def live_groups(optimizer: Any, root: str, table: HyperTable) -> list[dict[str, Any]]:
    """The optimizer's param groups without their parameters, every number in them replaced by a live one."""
    return [
        {key: _live(value, f"{root}.param_groups[{index}][{key!r}]", table) for key, value in group.items() if key != "params"}
        for index, group in enumerate(optimizer.param_groups)
    ]


def _live(value: Any, expression: str, table: HyperTable) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_live(part, f"{expression}[{index}]", table) for index, part in enumerate(value))
    if isinstance(value, float):
        return table.live(value, expression)
    if isinstance(value, (bool, int, str, type(None))):
        table.guard(expression, value)
    return value
