"""How one op is written in Python: `torch.mm(a, b)` where torch has that very function, `aten.name.overload(...)` otherwise.

The table is data. An op is in it only where the torch function of that name dispatches to the same overload with the same positional
arguments; everything else is called through its overload, which is always right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from mebp_compile.graph import Arg, Const, Op, Ref

# aten ops that torch.<name> calls with the same arguments.
FUNCTIONS = {
    "mm", "bmm", "addmm", "add", "sub", "mul", "div", "neg", "rsqrt", "sqrt", "exp", "log", "sin", "cos", "tanh", "sigmoid", "pow", "cat",
    "mean", "sum", "where", "maximum", "minimum", "abs", "reciprocal", "square", "relu", "bitwise_and", "bitwise_or", "logical_not", "stack",
}  # fmt: skip
# In-place ops written as methods of their first argument.
METHODS = {
    "add_", "sub_", "mul_", "div_", "lerp_", "addcmul_", "addcdiv_", "zero_", "copy_", "fill_", "bernoulli_", "sqrt_", "neg_", "clamp_",
    "masked_fill_", "clamp_min_", "clamp_max_", "index_fill_",
}  # fmt: skip
# View ops written as methods.
VIEW_METHODS = {
    "t",
    "view",
    "transpose",
    "permute",
    "unsqueeze",
    "expand",
    "squeeze",
    "select",
    "as_strided",
    "split",
    "unfold",
    "diagonal",
}
OPERATORS = {
    "py.add": "+", "py.sub": "-", "py.mul": "*", "py.truediv": "/", "py.pow": "**", "py.floordiv": "//", "py.mod": "%",
    "py.lt": "<", "py.le": "<=", "py.gt": ">", "py.ge": ">=", "py.eq": "==", "py.ne": "!=",
}  # fmt: skip
NUMBERS = {
    "py.sym_sqrt": "math.sqrt",
    "py.sym_float": "float",
    "py.sym_int": "int",
    "py.sqrt": "math.sqrt",
    "py.sym_max": "max",
    "py.sym_min": "min",
}


def call(op: Op, names: Mapping[str, str], out: tuple[str, ...] = ()) -> str:
    """The expression that runs `op`. `names` gives the variable of each value; `out` the buffers to fill."""
    args = [argument(arg, names) for arg in op.args]
    kwargs = [f"{key}={argument(arg, names)}" for key, arg in op.kwargs]
    if op.target.startswith("py."):
        return _number(op.target, args)
    name = op.target.split(".")[1]
    if op.target.startswith(("run.", "tile.", "rows.")):
        return _verb(op.target, [*args, *kwargs], out)
    if op.target == "aten._local_scalar_dense.default":
        return f"{args[0]}.item()"
    if out:
        return _filled(op, args, kwargs, out)
    if name in METHODS and op.target.startswith("aten."):
        return f"{args[0]}.{name}({', '.join([*args[1:], *kwargs])})"
    if name in VIEW_METHODS and not op.creates and op.target.startswith("aten."):
        return f"{args[0]}.{_view(name, op, args)}({', '.join([*args[1:], *kwargs])})"
    return f"{_function(op.target)}({', '.join([*args, *kwargs])})"


def _verb(target: str, args: list[str], out: tuple[str, ...]) -> str:
    """A verb of the engine, or a tile of a Loop taken from or put into a whole tensor."""
    if target == "tile.take":
        return f"{args[0]}[{args[1]}]"
    if target == "tile.put":
        return f"{args[0]}[:, {args[1]}] = {args[2]}"
    if target == "tile.free":
        return f"del {', '.join(args)}"
    if target in ("rows.take", "rows.put"):
        leading = int(args[1])
        flat = args[0] if leading == 1 else f"{args[0]}.flatten(0, {leading - 1})"
        return f"{flat}[{'None, ' * (leading - 1)}tile]" if target == "rows.take" else f"{flat}[tile] = {args[2]}"
    return f"{target}({', '.join([*args, *(f'out={buffer}' for buffer in out)])})"


def _filled(op: Op, args: list[str], kwargs: list[str], out: tuple[str, ...]) -> str:
    """The op filling a given buffer: a native out= kernel, or the in-place call that has the same effect."""
    if op.out_target == "copy_":
        return f"{out[0]}.copy_({args[0]})"
    if op.out_target == "zero_":
        return f"{out[0]}.zero_()"
    if op.out_target == "fill_":
        return f"{out[0]}.fill_({args[1]})"
    if op.out_target == "empty":
        return out[0]
    known = op.out == ("out",) and _is_function(op.target)
    function = _function(op.target) if known else _overload(op.out_target)
    outs = [f"{key}={buffer}" for key, buffer in zip(op.out, out, strict=True)]
    return f"{function}({', '.join([*args, *kwargs, *outs])})"


def _view(name: str, op: Op, args: list[str]) -> str:
    return "split_with_sizes" if name == "split" and len(args) > 1 and args[1].startswith("(") else name


def _function(target: str) -> str:
    return f"torch.{target.split('.')[1]}" if _is_function(target) else _overload(target)


def _is_function(target: str) -> bool:
    namespace, name = target.split(".")[:2]
    return namespace == "aten" and name in FUNCTIONS


def _overload(target: str) -> str:
    namespace, rest = target.split(".", 1)
    return f"aten.{rest}" if namespace == "aten" else f"torch.ops.{namespace}.{rest}"


def _number(target: str, args: list[str]) -> str:
    if target in OPERATORS:
        left, right = (f"({arg})" if arg.startswith("-") else arg for arg in args)  # -2 ** x is -(2 ** x)
        return f"{left} {OPERATORS[target]} {right}"
    if target == "py.neg":
        return f"-({args[0]})" if args[0].startswith("-") else f"-{args[0]}"
    return f"{NUMBERS.get(target, target.removeprefix('py.').removeprefix('sym_'))}({', '.join(args)})"


def argument(arg: Arg, names: Mapping[str, str]) -> str:
    """One argument as Python text."""
    if isinstance(arg, Ref):
        return names.get(arg.name, arg.name)
    if isinstance(arg, Const):
        return f"torch.device({arg.name!r})" if arg.kind == "device" else f"torch.{arg.name}"
    if isinstance(arg, tuple):
        parts = [argument(part, names) for part in arg]
        opening, closing = ("[", "]") if any(isinstance(part, Ref) for part in arg) else ("(", ")")
        return f"{opening}{', '.join(parts)}{',' if len(parts) == 1 and opening == '(' else ''}{closing}"
    if isinstance(arg, float) and not math.isfinite(arg):
        return f"float({str(arg)!r})"
    return repr(arg)
