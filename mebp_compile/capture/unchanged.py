"""Notice Python state that the traced call changed: tracing runs the step's Python once, and the compiled step will never run it again."""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from mebp_compile.capture.find import State
from mebp_compile.errors import ClosureChanged

SCHEDULER_FIX = "call scheduler.step() outside the step, after it returns; the new learning rate is picked up at the next call"


@contextlib.contextmanager
def python_state_kept(step_fn: Callable[..., Any], state: State) -> Iterator[None]:
    """Inside, run the step once; then raise ClosureChanged, with everything put back, where Python state is not what it was."""
    randoms = _random_states()
    objects = {name: (item, copy.deepcopy(item.state_dict())) for name, item in state.others.items() if callable(getattr(item, "state_dict", None))}
    plain = _plain_values(step_fn)
    modes = {(root, path): (module, module.training) for root, top in state.modules.items() for path, module in top.named_modules()}
    torch_rng = torch.get_rng_state()
    try:
        yield
    finally:
        changed = _restore_randoms(randoms) + _restore_objects(objects) + _changed_plain(step_fn, plain) + _restore_modes(modes)
        torch.set_rng_state(torch_rng)
    if changed:
        what, fix = changed[0]
        raise ClosureChanged(f"running the step once {what}; a compiled step would not do that again ({_where(step_fn)})", fix)


def _where(step_fn: Callable[..., Any]) -> str:
    function = inspect.unwrap(getattr(step_fn, "func", step_fn))
    code = getattr(function, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(step_fn)


def _random_states() -> dict[str, Any]:
    states: dict[str, Any] = {"random": random.getstate()}
    if "numpy" in sys.modules:
        states["numpy.random"] = sys.modules["numpy"].random.get_state(legacy=False)
    return states


def _restore_randoms(before: dict[str, Any]) -> list[tuple[str, str]]:
    changed = []
    for name, now in _random_states().items():
        if name in before and repr(now) != repr(before[name]):
            fix = "draw the numbers before the step and pass them in the batch, or use torch's generator"
            changed.append((f"drew from Python's `{name}`", fix))
    random.setstate(before["random"])
    if "numpy.random" in before:
        sys.modules["numpy"].random.set_state(before["numpy.random"])
    return changed


def _restore_objects(before: dict[str, tuple[Any, Any]]) -> list[tuple[str, str]]:
    changed = []
    for name, (item, old) in before.items():
        if not _same(item.state_dict(), old):
            item.load_state_dict(old)
            scheduler = hasattr(item, "get_last_lr")
            what = f"stepped the scheduler `{name}` ({type(item).__name__})" if scheduler else f"changed `{name}` ({type(item).__name__})"
            changed.append((what, SCHEDULER_FIX if scheduler else f"change `{name}` outside the step"))
    return changed


def _restore_modes(before: dict[tuple[str, str], tuple[Any, bool]]) -> list[tuple[str, str]]:
    changed = []
    for (root, path), (module, training) in before.items():
        if module.training != training:
            module.training = training
            changed.append((f"switched {'.'.join(filter(None, (root, path)))} between train() and eval()", "call train() or eval() before the step"))
    return changed[:1]


def _plain_values(step_fn: Callable[..., Any]) -> dict[str, Any]:
    """Numbers, strings and containers that the step's own function can rebind or change: cells, globals it stores to, attributes of self."""
    values: dict[str, Any] = {}
    for name, read in _places(step_fn):
        with contextlib.suppress(Exception):
            values[name] = copy.deepcopy(read())
    return values


def _changed_plain(step_fn: Callable[..., Any], before: dict[str, Any]) -> list[tuple[str, str]]:
    changed = []
    for name, read in _places(step_fn):
        if name in before and not _same(read(), before[name]):
            changed.append((f"changed `{name}` from {before[name]!r} to {read()!r}", "keep counters and logs outside the step, using what it returns"))
    return changed


def _places(step_fn: Callable[..., Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    function = inspect.unwrap(getattr(step_fn, "func", step_fn))
    code = getattr(function, "__code__", None)
    for name, cell in zip(code.co_freevars if code else (), getattr(function, "__closure__", None) or (), strict=False):
        with contextlib.suppress(ValueError):
            if _is_plain(cell.cell_contents):
                yield name, lambda cell=cell: cell.cell_contents
    owner = getattr(function, "__self__", None)
    for name, value in (vars(owner) if hasattr(owner, "__dict__") and not isinstance(owner, torch.nn.Module) else {}).items():
        if _is_plain(value):
            yield f"self.{name}", lambda owner=owner, name=name: getattr(owner, name)
    module_globals = getattr(function, "__globals__", {})
    for name in code.co_names if code else ():
        if _is_plain(module_globals.get(name)):
            yield name, lambda name=name: module_globals[name]


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple, set)):
        return all(_is_plain(part) for part in value)
    if isinstance(value, dict):
        return all(_is_plain(part) for part in value.values())
    return isinstance(value, (bool, int, float, str, bytes))


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor) or isinstance(right, torch.Tensor):
        return isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(_same, left, right))
    try:
        return bool(left == right) or repr(left) == repr(right)
    except Exception:
        return left is right
