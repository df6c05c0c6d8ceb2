"""Bit-equality of two ways to compute the same, measured in a child interpreter on inputs drawn from one seed."""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from mebp_compile.errors import MeasureError
from mebp_compile.measure.memory import memory_of
from mebp_compile.measure.requests import decode, find_op
from mebp_compile.openmp import one_thread

PART_BYTES = 16 << 20  # compared at a time

Json = dict[str, Any]


def _compare_programs(request: Json) -> Json:
    """Run both on the same inputs; outputs, and inputs they changed, must agree in every byte, shape and dtype. "alone": the second by one thread.

    At the shapes of a real vocabulary the inputs are what takes memory, so only one set of them exists at a time: the second program
    gets new ones, drawn from the same seed, and of what the programs left of them only digests are compared.
    """
    left, left_inputs = _run_program(request["first"], request["inputs"])
    with one_thread() if request.get("alone") else nullcontext():
        right, right_inputs = _run_program(request["second"], request["inputs"])
    if len(left) != len(right):
        return {"equal": False, "difference": f"{len(left)} against {len(right)} tensors"}
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        if difference := _difference(a, b):
            return {"equal": False, "difference": f"tensor {index}: {difference}"}
    changed = [name for name, digest in left_inputs.items() if digest != right_inputs[name]]
    return {"equal": not changed, "difference": f"the programs leave {', '.join(changed)} differently" if changed else ""}


def _compare_blocks(request: Json) -> Json:
    """An op on all rows against the same op on so many rows at a time, for each of "lengths": {"equal": [bool]}.

    "places" gives for each argument the dimension of its rows, or None; "made" the results compared, as (index, dimension of its rows). "over" is
    (position of an argument, keyword): the block's result is written over its block of that argument.
    """
    op, args = find_op(request["target"]), [decode(arg) for arg in request["args"]]
    kwargs = {key: decode(arg) for key, arg in request["kwargs"].items()}
    over, keyword = request["over"] or (None, "")
    own = {} if over is None else {keyword: torch.empty_like(args[over])}
    whole = _several(op(*args, **kwargs, **own))

    def same(start: int, rows: int) -> bool:
        taken = [arg if place is None else arg.narrow(place, start, rows) for arg, place in zip(args, request["places"], strict=True)]
        if over is not None:
            taken[over] = taken[over].clone()
        part = _several(op(*taken, **kwargs, **({} if over is None else {keyword: taken[over]})))
        return not any(_difference(whole[index].narrow(place, start, rows), part[index]) for index, place in request["made"])

    return {"equal": [all(same(*block) for block in _blocks(request["tokens"], rows)) for rows in request["lengths"]]}


def _compare_product(request: Json) -> Json:
    """x @ w, or x @ w.t() where "transposed", against the same by "tiles" of columns and so many rows at a time, for each of "lengths"; "alone": by
    one thread."""
    x, w, transposed = decode(request["x"]), decode(request["w"]), request["transposed"]
    whole = torch.mm(x, w.t() if transposed else w)

    def same(rows: int) -> bool:
        for first, last in request["tiles"]:
            tile = w[first:last].t() if transposed else w[:, first:last].contiguous()
            for start, count in _blocks(x.shape[0], rows):
                part = whole[start : start + count, first:last]
                if _difference(part, torch.mm(x[start : start + count], tile)):
                    return False
        return True

    with one_thread() if request["alone"] else nullcontext():
        return {"equal": [same(rows) for rows in request["lengths"]]}


def _blocks(whole: int, length: int) -> list[tuple[int, int]]:
    """(start, length) of each part."""
    return [(start, min(length, whole - start)) for start in range(0, whole, length)]


def _several(made: Any) -> tuple[Any, ...]:
    return tuple(made) if isinstance(made, (tuple, list)) else (made,)


def _run_program(source: str, arguments: Mapping[str, Any]) -> tuple[list[torch.Tensor], dict[str, str]]:
    """The tensors a function body returns, and a digest of each input tensor as it left it. The source is this package's own text."""
    scope: Json = {}
    exec(
        compile(f"def program(torch, inputs):\n{textwrap.indent(textwrap.dedent(source), '    ')}", "<equal>", "exec"),
        scope,
    )
    torch.manual_seed(0)
    inputs = {name: decode(value) for name, value in arguments.items()}
    result = scope["program"](torch, inputs)
    if result is None:
        raise MeasureError("a program returned nothing", "end its source with `return`")
    given = {tensor.untyped_storage()._cdata for tensor in inputs.values() if isinstance(tensor, torch.Tensor)}
    outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    outputs = [leaf.clone() if leaf.untyped_storage()._cdata in given else leaf for leaf in outputs]
    return outputs, {name: _digest(tensor) for name, tensor in inputs.items() if isinstance(tensor, torch.Tensor)}


def _digest(tensor: torch.Tensor) -> str:
    """Of the raw bytes of a tensor's whole storage, without a copy."""
    return hashlib.blake2b(memory_of(tensor.untyped_storage())).hexdigest()


def _difference(left: torch.Tensor, right: torch.Tensor) -> str:
    """ "" if equal in shape, dtype and raw bytes (NaN and -0.0 included), else what differs."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return f"{left.dtype} {list(left.shape)} against {right.dtype} {list(right.shape)}"
    a, b = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right))
    parts = zip(a.split(PART_BYTES), b.split(PART_BYTES), strict=True)
    unequal = sum(int((x != y).sum()) for x, y in parts)
    return f"{unequal} of {a.numel()} bytes differ" if unequal else ""


COMPARISONS: dict[str, Callable[[Json], Json]] = {
    "equal": _compare_programs,
    "equal_blocks": _compare_blocks,
    "equal_product": _compare_product,
}
