"""Notice Python state that the traced call changed: tracing runs the step's Python once, and the compiled step will never run it again."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from mebp_compile.capture.facts import SCALARS, Place, fact, places
from mebp_compile.capture.find import State
from mebp_compile.errors import ClosureChanged

SCHEDULER_FIX = "call scheduler.step() outside the step, after it returns; the new learning rate is picked up at the next call"
DRAW_FIX = "draw the numbers before the step and pass them in the batch, or use torch's generator"
Change = tuple[str, str]
StandIns = dict[int, tuple[Any, Any]]


@contextlib.contextmanager
def python_state_kept(step_fn: Callable[..., Any], state: State, settling: bool = False) -> Iterator[list[Callable[[], None]]]:
    """Inside, run the step once; then raise ClosureChanged, with everything put back, where Python state is not what it was.

    With `settling`, plain attributes of modules and configurations may change (a library fills them in at its first call): they keep their
    new values, and the list that is yielded then holds functions that would undo this.
    """
    randoms = _random_states()
    objects = {name: (item, copy.deepcopy(_state_of(item))) for name, item in state.others.items()}
    values = [(place, place.read(), _shallow_copy(place.read()), fact(place.read())) for place in places(state)]
    modes = {(root, path): (module, module.training) for root, top in state.modules.items() for path, module in top.named_modules()}
    torch_rng = torch.get_rng_state()
    settled: list[Callable[[], None]] = []
    try:
        yield settled
    finally:
        if settling:
            settled += [functools.partial(place.write, value) for place, value, _, text in values if _has_settled(place, value, text)]
            values = [entry for entry in values if not _has_settled(entry[0], entry[1], entry[3])]
        changed = _restore_randoms(randoms) + _restore_objects(objects) + _restore_modes(modes) + _restore_values(values, state.stand_ins)
        state.stand_ins = {}
        if not torch.equal(torch.get_rng_state(), torch_rng):
            torch.set_rng_state(torch_rng)
            changed.append(("moved torch's generator by other means than its ops", "seed outside the step"))
    if changed:
        for undo in settled:
            undo()
        what, fix = changed[0]
        raise ClosureChanged(f"running the step once {what}; a compiled step would not do that again ({where(step_fn)})", fix)


def _has_settled(place: Place, value: Any, text: str) -> bool:
    now = place.read()
    return place.settles and isinstance(now, SCALARS) and isinstance(value, SCALARS) and fact(now) != text


def where(step_fn: Callable[..., Any]) -> str:
    """`file:line` of the step's definition."""
    function = inspect.unwrap(getattr(step_fn, "func", step_fn))
    code = getattr(function, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(step_fn)


def _random_states() -> dict[str, Any]:
    states: dict[str, Any] = {"random": random.getstate()}
    if "numpy" in sys.modules:
        states["numpy.random"] = sys.modules["numpy"].random.get_state(legacy=False)
    return states


def _restore_randoms(before: dict[str, Any]) -> list[Change]:
    changed = [
        (f"drew from Python's `{name}`", DRAW_FIX)
        for name, now in _random_states().items()
        if name in before and not _same(now, before[name])
    ]
    random.setstate(before["random"])
    if "numpy.random" in before:
        sys.modules["numpy"].random.set_state(before["numpy.random"])
    return changed


def _state_of(item: Any) -> Any:
    """What a stateful object says of its state: state_dict(), random.Random's getstate(), or a numpy generator's bit_generator.state."""
    if callable(getattr(item, "state_dict", None)):
        return item.state_dict()
    return item.getstate() if hasattr(item, "getstate") else item.bit_generator.state


def _put_state(item: Any, state: Any) -> None:
    if callable(getattr(item, "load_state_dict", None)):
        item.load_state_dict(state)
    elif hasattr(item, "setstate"):
        item.setstate(state)
    elif hasattr(item, "bit_generator"):
        item.bit_generator.state = state


def _restore_objects(before: dict[str, tuple[Any, Any]]) -> list[Change]:
    changed = []
    for name, (item, old) in before.items():
        if _same(_state_of(item), old):
            continue
        _put_state(item, old)
        kind = type(item).__name__
        if hasattr(item, "get_last_lr"):
            changed.append((f"stepped the scheduler `{name}` ({kind})", SCHEDULER_FIX))
        elif callable(getattr(item, "state_dict", None)):
            changed.append((f"changed `{name}` ({kind})", f"change `{name}` outside the step"))
        else:
            changed.append((f"drew from `{name}` ({kind})", DRAW_FIX))
    return changed


def _restore_modes(before: dict[tuple[str, str], tuple[Any, bool]]) -> list[Change]:
    changed = []
    for (root, path), (module, training) in before.items():
        if module.training != training:
            module.training = training
            changed.append(
                (f"switched {'.'.join(filter(None, (root, path)))} between train() and eval()", "call train() or eval() before the step")
            )
    return changed[:1]


def _shallow_copy(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, (list, set, dict)) else value


def _restore_values(before: list[tuple[Place, Any, Any, str]], stand_ins: StandIns) -> list[Change]:
    """Put back cells, globals, attributes and the content of containers; tell which had changed."""
    changed = []
    for place, value, content, _ in before:
        now = place.read()
        differs = _differs(now, content, stand_ins)
        if now is value and not differs:
            continue
        if isinstance(value, list):
            value[:] = content
        elif isinstance(value, (set, dict)):
            value.clear()
            value.update(content)
        if now is not value:
            place.write(value)
        if differs:
            name = place.name.split(": ")[-1]
            changed.append((f"changed `{name}`{_values(value, now)}", "keep counters and logs outside the step, using what it returns"))
    return changed


def _differs(now: Any, content: Any, stand_ins: StandIns) -> bool:
    """Whether a value, or what a container holds, is another than it was: tensors by identity (a stand-in counts as what it stands for,
    since modules that list their own weights list them again when they are swapped), all else by what it is.
    """
    if isinstance(now, dict) and isinstance(content, dict):
        return list(now) != list(content) or any(_differs(now[key], content[key], stand_ins) for key in content)
    if isinstance(now, (list, tuple)) and isinstance(content, (list, tuple)):
        return len(now) != len(content) or any(_differs(new, old, stand_ins) for new, old in zip(now, content, strict=True))
    if isinstance(now, torch.Tensor) or isinstance(content, torch.Tensor):
        return stand_ins.get(id(now), (now, now))[1] is not content
    return now is not content and fact(now) != fact(content)


def _values(old: Any, new: Any) -> str:
    plain = isinstance(old, (bool, int, float, str)) and isinstance(new, (bool, int, float, str))
    return f" from {old!r} to {new!r}" if plain else ""


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor) or isinstance(right, torch.Tensor):
        return isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor) and torch.equal(left, right)
    if hasattr(left, "tobytes") and hasattr(right, "tobytes"):
        return bool(left.tobytes() == right.tobytes())
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(_same, left, right))
    try:
        return bool(left == right) or repr(left) == repr(right)
    except Exception:
        return left is right
