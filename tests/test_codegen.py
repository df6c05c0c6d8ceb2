"""The generated program: the same text each time, lines that tracebacks show, edits that run; and calls printed in short form mean what
the overload does.
"""

from __future__ import annotations

import ast
import linecache
import traceback
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from law1 import assert_same_training, estimated_costs
from models import FAMILIES, Recipe

from mebp_compile.calls import FUNCTIONS, METHODS, NUMBERS, OPERATORS, VIEW_METHODS, argument, call
from mebp_compile.compiler import CompiledStep, optimize
from mebp_compile.errors import CaptureError, StepPoisoned
from mebp_compile.graph import Const, Op, Ref
from mebp_compile.runtime.program import load

aten = torch.ops.aten


def compiled(recipe: Recipe, budget: int = 1 << 30) -> CompiledStep:
    training = recipe.build()
    with estimated_costs():
        step = optimize(training.step, budget, effort="fast", cache=False)
        step.prepare(*training.batch(0))
    return step


@cache
def program(family: str) -> CompiledStep:
    return compiled(Recipe(family, dropout=0.1))


# --- the text ---


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "resnet"])
def test_two_captures_give_the_same_text(family: str) -> None:
    """Capture, plan and text are deterministic."""
    assert compiled(Recipe(family, dropout=0.1)).code == program(family).code


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_is_python_that_imports_torch_alone(family: str) -> None:
    """The program parses, imports nothing but math and torch, and uses no name that it does not bind."""
    tree = ast.parse(program(family).code)
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    assert imported <= {"math", "torch"}
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef))
    assert function.name == "train_step"
    assert function.args.args[0].arg == "run"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_tells_phases_modules_and_memory(family: str) -> None:
    """The header has peak and time; sections name phases and modules."""
    step = program(family)
    for words in ("peak  ", "time  ", step.graph.digest, "# ---- forward", "# ---- backward", "# ---- update", "live "):
        assert words in step.code


@pytest.mark.parametrize("family", FAMILIES)
def test_every_place_in_the_arena_is_used(family: str) -> None:
    """What the plan puts in the arena is filled there: anywhere else its bytes would come on top of the arena's."""
    step = program(family)
    assert 0 < len(step.plan.placement.offsets) == step.code.count("run.at(")


def test_values_are_deleted_when_freed() -> None:
    """No activation's name outlives its Free: the text deletes every storage that the schedule frees."""
    step = program("gpt2")
    import solvers

    frees = sum(isinstance(item, solvers.Free) for item in step.plan.schedule.steps)
    assert frees > 100
    assert step.code.count("\n    del ") >= 0.5 * frees


# --- loading, editing, tracebacks ---


def test_an_edited_program_runs(tmp_path: Path) -> None:
    """use_code runs an edited text: here the loss comes back doubled, and nothing else changes."""
    recipe = Recipe("gpt2", optimizer="sgd")
    plain, edited = recipe.build(), recipe.build()
    with estimated_costs():
        step = optimize(edited.step, "1GB", effort="fast", cache=False)
        step.prepare(*edited.batch(0))
        lines = step.code.rstrip().splitlines()
        result = lines[-1].removeprefix("    return (").removesuffix(",)")
        (tmp_path / "step.py").write_text("\n".join([*lines[:-1], f"    return ({result} * 2,)", ""]))
        step.use_code(tmp_path / "step.py")
        expected, found = plain.step(*plain.batch(0)), step(*edited.batch(0))
    assert torch.equal(expected * 2, found)
    assert all(map(torch.equal, plain.modules[0].parameters(), edited.modules[0].parameters()))


def test_tracebacks_show_generated_lines() -> None:
    """An error inside the program shows the line of its text, and the step is poisoned afterwards."""
    recipe = Recipe("gpt2", optimizer="sgd")
    training = recipe.build()
    with estimated_costs():
        step = optimize(training.step, "1GB", effort="fast", cache=False)
        program = step.prepare(*training.batch(0))
    broken = program.code.replace("# ---- backward", "raise RuntimeError('here')  # ---- backward", 1)
    program.function, filename = load(broken)
    with pytest.raises(RuntimeError, match="here") as caught:
        step(*training.batch(0))
    text = "".join(traceback.format_exception(caught.value))
    assert "raise RuntimeError('here')" in text
    assert filename in text
    assert linecache.getline(filename, 1).startswith('"""')
    with pytest.raises(StepPoisoned, match="here"):
        step(*training.batch(0))


@pytest.mark.parametrize("text", ["def train_step(:", "x = 1", ""])
def test_texts_without_a_step_are_refused(text: str) -> None:
    """Something that is not a program."""
    with pytest.raises(CaptureError, match="train_step"):
        load(text)


def test_recomputed_draws_are_replayed() -> None:
    """A dropout that runs twice is saved before the first run, replayed before the second, and the generator is put back."""
    recipe = Recipe("gpt2", dropout=0.1, sequence=48, optimizer="sgd")
    keep_all = compiled(recipe).plan.keep_all_bytes
    step = assert_same_training(recipe.build, budget=keep_all // 2, calls=2)
    assert step.code.count("run.rng_save(") == len({line for line in step.code.splitlines() if "run.rng_save(" in line}) > 0
    assert step.code.count("run.rng_replay(") == step.code.count("run.rng_return()") >= step.code.count("run.rng_save(")
    assert "recompute" in step.code


# --- calls ---

X, Y = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)), torch.rand(4, 4, generator=torch.Generator().manual_seed(1)) + 0.5
MASK, INT = X > 0, torch.arange(16).reshape(4, 4)
BATCHED = torch.stack([X, Y])

# Samples: name -> list of (overload, arguments, keyword arguments).
FUNCTION_SAMPLES: dict[str, list[tuple[Any, tuple[Any, ...], dict[str, Any]]]] = {
    "mm": [(aten.mm.default, (X, Y), {})],
    "bmm": [(aten.bmm.default, (BATCHED, BATCHED), {})],
    "addmm": [(aten.addmm.default, (X[0], X, Y), {}), (aten.addmm.default, (X, X, Y), {"beta": 0.5, "alpha": 2.0})],
    "add": [(aten.add.Tensor, (X, Y), {}), (aten.add.Tensor, (X, 2), {}), (aten.add.Tensor, (X, Y), {"alpha": 0.5}),
            (aten.add.Scalar, (X, 0.5), {})],
    "sub": [(aten.sub.Tensor, (X, Y), {}), (aten.sub.Tensor, (X, Y), {"alpha": 2}), (aten.sub.Scalar, (X, 2), {})],
    "mul": [(aten.mul.Tensor, (X, Y), {}), (aten.mul.Tensor, (X, 0.3), {}), (aten.mul.Scalar, (INT, 3), {})],
    "div": [(aten.div.Tensor, (X, Y), {}), (aten.div.Scalar, (X, 3), {}), (aten.div.Tensor_mode, (X, Y), {"rounding_mode": "floor"})],
    "pow": [(aten.pow.Tensor_Scalar, (X, 2), {}), (aten.pow.Tensor_Tensor, (Y, X), {}), (aten.pow.Scalar, (10000.0, X), {})],
    "cat": [(aten.cat.default, ([X, Y], 1), {}), (aten.cat.default, ([X, Y],), {})],
    "stack": [(aten.stack.default, ([X, Y], 1), {})],
    "mean": [(aten.mean.dim, (X, [1], True), {}), (aten.mean.default, (X,), {}), (aten.mean.dim, (X, (0, 1)), {"dtype": torch.float64})],
    "sum": [(aten.sum.dim_IntList, (X, [0], True), {}), (aten.sum.default, (X,), {}),
            (aten.sum.dim_IntList, (MASK, [0]), {"dtype": torch.float32})],
    "where": [(aten.where.self, (MASK, X, Y), {}), (aten.where.ScalarOther, (MASK, X, 0.5), {})],
    "maximum": [(aten.maximum.default, (X, Y), {})],
    "minimum": [(aten.minimum.default, (X, Y), {})],
    "bitwise_and": [(aten.bitwise_and.Tensor, (MASK, X < 1), {}), (aten.bitwise_and.Scalar, (INT, 3), {})],
    "bitwise_or": [(aten.bitwise_or.Tensor, (MASK, X < 1), {})],
    "logical_not": [(aten.logical_not.default, (X,), {})],
}  # fmt: skip
for _name in ("neg", "rsqrt", "sqrt", "exp", "log", "sin", "cos", "tanh", "sigmoid", "abs", "reciprocal", "square", "relu"):
    FUNCTION_SAMPLES[_name] = [(getattr(aten, _name).default, (Y,), {}), (getattr(aten, _name).default, (X.t(),), {})]

METHOD_SAMPLES: dict[str, list[tuple[Any, tuple[Any, ...], dict[str, Any]]]] = {
    "add_": [(aten.add_.Tensor, (X, Y), {"alpha": 0.5}), (aten.add_.Scalar, (X, 2), {})],
    "sub_": [(aten.sub_.Tensor, (X, Y), {"alpha": -0.5})],
    "mul_": [(aten.mul_.Tensor, (X, Y), {}), (aten.mul_.Scalar, (X, 0.9), {})],
    "div_": [(aten.div_.Tensor, (X, Y), {}), (aten.div_.Scalar, (X, 0.9), {}), (aten.div_.Tensor_mode, (X, Y), {"rounding_mode": "trunc"})],
    "lerp_": [(aten.lerp_.Scalar, (X, Y, 0.1), {}), (aten.lerp_.Tensor, (X, Y, X), {})],
    "addcmul_": [(aten.addcmul_.default, (X, Y, Y), {"value": 0.1})],
    "addcdiv_": [(aten.addcdiv_.default, (X, Y, Y), {"value": 0.1})],
    "zero_": [(aten.zero_.default, (X,), {})],
    "copy_": [(aten.copy_.default, (X, Y), {}), (aten.copy_.default, (X, INT), {})],
    "fill_": [(aten.fill_.Scalar, (X, 0.1), {}), (aten.fill_.Tensor, (X, Y[0, 0].clone()), {})],
    "bernoulli_": [(aten.bernoulli_.float, (X, 0.9), {})],
    "sqrt_": [(aten.sqrt_.default, (Y,), {})],
    "neg_": [(aten.neg_.default, (X,), {})],
    "clamp_": [(aten.clamp_.default, (X, -0.1, 0.1), {}), (aten.clamp_.default, (X, None, 0.1), {})],
    "clamp_min_": [(aten.clamp_min_.default, (X, 0.1), {})],
    "clamp_max_": [(aten.clamp_max_.default, (X, 0.1), {})],
    "masked_fill_": [(aten.masked_fill_.Scalar, (X, MASK, 0.1), {})],
    "index_fill_": [(aten.index_fill_.int_Scalar, (X, 0, torch.tensor([1, 3]), 0.1), {})],
}

VIEW_SAMPLES: dict[str, list[tuple[Any, tuple[Any, ...], dict[str, Any]]]] = {
    "t": [(aten.t.default, (X,), {})],
    "view": [(aten.view.default, (X, [2, 8]), {}), (aten.view.default, (X, [-1]), {}), (aten.view.dtype, (X, torch.int32), {})],
    "transpose": [(aten.transpose.int, (BATCHED, 1, 2), {})],
    "permute": [(aten.permute.default, (BATCHED, [2, 0, 1]), {})],
    "unsqueeze": [(aten.unsqueeze.default, (X, -1), {})],
    "expand": [(aten.expand.default, (X, [2, 4, 4]), {}), (aten.expand.default, (X[:, :1], [-1, 3]), {"implicit": True})],
    "squeeze": [(aten.squeeze.dim, (X[:1], 0), {}), (aten.squeeze.default, (X[:1],), {}), (aten.squeeze.dims, (X[:1, :1], [0, 1]), {})],
    "select": [(aten.select.int, (X, 1, 2), {}), (aten.select.int, (X, 0, -1), {})],
    "as_strided": [(aten.as_strided.default, (X, [2, 2], [4, 1], 5), {})],
    "split": [(aten.split.Tensor, (X, 2, 1), {}), (aten.split.Tensor, (X, 3), {}), (aten.split.sizes, (X, [1, 3], 1), {})],
    "unfold": [(aten.unfold.default, (X, 1, 2, 1), {})],
    "diagonal": [(aten.diagonal.default, (X,), {}), (aten.diagonal.default, (BATCHED, 0, 1, 2), {})],
}


def printed(overload: Any, args: tuple[Any, ...], kwargs: dict[str, Any], view: bool = False) -> tuple[str, Any]:
    """The text of a call, and its value when it runs; arguments are copied so that in-place ops don't spread."""
    values: dict[str, Any] = {}

    def lift(arg: Any) -> Any:
        if isinstance(arg, torch.Tensor):
            name = f"v{len(values)}"
            values[name] = torch.empty_strided(arg.shape, arg.stride(), dtype=arg.dtype).copy_(arg) if not view else arg
            return Ref(name)
        if isinstance(arg, torch.dtype):
            return Const("dtype", str(arg).removeprefix("torch."))
        return tuple(map(lift, arg)) if isinstance(arg, (list, tuple)) else arg

    lifted = tuple(map(lift, args))
    op = Op("op", str(overload), lifted, tuple((key, lift(value)) for key, value in kwargs.items()), creates=() if view else (0,))
    text = call(op, {})
    return text, eval(text, {"torch": torch, "aten": aten, **values})


def same(left: Any, right: Any) -> bool:
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    raw = [part.detach().contiguous().reshape(-1).view(torch.uint8) for part in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and left.stride() == right.stride() and torch.equal(*raw)


def _copied(arg: Any) -> Any:
    if isinstance(arg, torch.Tensor):
        return torch.empty_strided(arg.shape, arg.stride(), dtype=arg.dtype).copy_(arg)
    return [_copied(part) for part in arg] if isinstance(arg, (list, tuple)) else arg


def test_every_name_of_the_tables_has_samples() -> None:
    """No name can be added to the tables without a sample here."""
    assert set(FUNCTION_SAMPLES) == set(FUNCTIONS)
    assert set(METHOD_SAMPLES) == set(METHODS)
    assert set(VIEW_SAMPLES) == set(VIEW_METHODS)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_functions_mean_their_overload(name: str) -> None:
    """`torch.mm(a, b)` gives the bits, dtype and strides of the overload that it stands for."""
    for overload, args, kwargs in FUNCTION_SAMPLES[name]:
        text, result = printed(overload, args, kwargs)
        assert text.startswith(f"torch.{name}("), text
        assert same(result, overload(*args, **kwargs)), text


@pytest.mark.parametrize("name", sorted(METHODS))
def test_methods_mean_their_overload(name: str) -> None:
    """`a.add_(b)` changes `a` as the overload does."""
    for overload, args, kwargs in METHOD_SAMPLES[name]:
        torch.manual_seed(0)
        text, result = printed(overload, args, kwargs)
        torch.manual_seed(0)
        assert f".{name}(" in text, text
        assert same(result, overload(*map(_copied, args), **kwargs)), text


@pytest.mark.parametrize("name", sorted(VIEW_METHODS))
def test_view_methods_mean_their_overload(name: str) -> None:
    """`a.t()` is the view that the overload makes: same geometry, same memory."""
    for overload, args, kwargs in VIEW_SAMPLES[name]:
        text, result = printed(overload, args, kwargs, view=True)
        expected = overload(*args, **kwargs)
        assert same(result, expected), text
        pairs = zip(result, expected, strict=True) if isinstance(expected, (list, tuple)) else [(result, expected)]
        assert all(one.data_ptr() == other.data_ptr() for one, other in pairs), text


def test_numbers_mean_python() -> None:
    """Arithmetic on Python numbers prints as Python, with its own precedence."""
    import math
    import operator

    for target, symbol in OPERATORS.items():
        text = call(Op("n", target, (Ref("a"), Ref("b"))), {})
        assert symbol in text
        assert eval(text, {"a": 7.5, "b": 2.0}) == getattr(operator, target.removeprefix("py."))(7.5, 2.0)
        negative = call(Op("n", target, (-7.5, Ref("b"))), {})
        assert eval(negative, {"b": 2.0}) == getattr(operator, target.removeprefix("py."))(-7.5, 2.0), negative
    for target in NUMBERS:
        args = (Ref("a"), Ref("b")) if target in ("py.sym_max", "py.sym_min") else (Ref("a"),)
        eval(call(Op("n", target, args), {}), {"a": 2.25, "b": 1.0, "math": math})
    assert eval(call(Op("n", "py.neg", (Ref("a"),)), {}), {"a": -0.0}).hex() == "0x0.0p+0"


@pytest.mark.parametrize("value", [0.1, -0.0, float("inf"), float("-inf"), 1e-300, 2**70, True, None, "x", (1,), (1, (2, None)), ()])
def test_arguments_print_as_themselves(value: Any) -> None:
    """Numbers to the last bit, infinities, nested tuples."""
    text = argument(value, {})
    assert repr(eval(text)) == repr(value)


def test_constants_print_as_torch_names() -> None:
    """dtypes, devices, layouts and memory formats."""
    for kind, name in (("dtype", "float64"), ("device", "cpu"), ("layout", "strided"), ("memory_format", "contiguous_format")):
        assert str(eval(argument(Const(kind, name), {}), {"torch": torch})).endswith(name)
    assert argument((Ref("a"), Ref("b")), {"a": "x"}) == "[x, b]"
