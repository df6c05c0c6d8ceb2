"""Whether a region in blocks of tokens leaves the bits that it leaves whole: each op of a body on all rows is compared with the same op on block
after block, at the very shapes used. Rows of a matmul, of a softmax or of a sum over features are independent of each other in arithmetic; whether
they are in bits is a matter of the library's kernels, and is measured, not believed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mebp_compile import openmp
from mebp_compile.chunk_cost import at_blocks
from mebp_compile.graph import Graph, LoopChoice, Op, Ref, block_ops
from mebp_compile.lower.chunk_body import overwritten
from mebp_compile.lower.cuts import block_rows, thread_tiles, tile_places

Json = dict[str, Any]
COMPUTED = ("tile", "dense", "packed")  # phases of a body's ops that compute; the others only show or make what is there


def block_checks(region: Op, ask: Callable[[Graph, Op], Json | None]) -> dict[str, Json | None]:
    """By the name of each computing op of a region's body: the comparison of it on all rows with it in blocks of each length of the menu; None for
    an op that can't be compared. `ask` gives the request of an op of a graph."""
    assert region.body is not None
    body, tokens, lengths = region.body, int(region.body.name), _lengths(region)
    whole = at_blocks(body, 1)
    checks: dict[str, Json | None] = {}
    for op in body.ops:
        if op.target == "run.product":
            checks[op.name] = _product_check(body, op, tokens, lengths)
        elif op.phase in COMPUTED and op.target.startswith(("aten.", "mebp.")):
            request = ask(whole, op)
            checks[op.name] = request and _rows_check(body, op, tokens, lengths, request)
    return checks


def proven(region: Op, choice: LoopChoice, equal: Mapping[str, Sequence[bool]]) -> bool:
    """Whether every op that the choice runs was found equal in blocks of its length. `equal`: the answers of `block_checks`, by op; none where an op
    could not be compared."""
    assert region.body is not None
    index = _lengths(region).index(block_rows(int(region.body.name), choice.trips))
    return all(any(equal[op.name][index : index + 1]) for op in block_ops(region, choice) if op.name in equal)


def _lengths(region: Op) -> list[int]:
    """Numbers of rows of the blocks of a menu's choices, each once."""
    assert region.body is not None
    return sorted({block_rows(int(region.body.name), choice.trips) for choice in region.menu})


def _rows_check(body: Graph, op: Op, tokens: int, lengths: list[int], request: Json) -> Json:
    """The op on all rows, and on so many of them at a time; where its result is written over an input, it is so in blocks alone."""
    written = overwritten(op)
    return {
        "kind": "equal_blocks",
        "target": op.target,
        "args": request["args"],
        "kwargs": {key: arg for key, arg in request["kwargs"].items() if key not in op.out},
        "over": [op.args.index(Ref(written)), op.out[0]] if written else None,
        "places": [_rows_dimension(body, arg.name) if isinstance(arg, Ref) else None for arg in op.args],
        "made": [[index, _rows_dimension(body, name)] for index, name in enumerate(op.outputs) if name],
        "tokens": tokens,
        "lengths": lengths,
    }


def _rows_dimension(body: Graph, name: str) -> int | None:
    """The dimension of a body's value that counts the rows of its block; None where it is no block."""
    shape = body.value[name].shape
    return shape.index(-1) if -1 in shape else None


def _product_check(body: Graph, op: Op, tokens: int, lengths: list[int]) -> Json:
    """A matmul with a whole weight, and the same by tiles of columns and so many rows at a time."""
    weight = body.value[op.args[1]]
    shares = thread_tiles(weight.shape[0 if op.args[3] else 1], op.args[4], openmp.threads())
    x = {"shape": [tokens, body.value[op.args[0].name].shape[1]], "dtype": weight.dtype}
    return {
        "kind": "equal_product",
        "x": {"tensor": x},
        "w": {"tensor": {"shape": list(weight.shape), "dtype": weight.dtype}},
        "transposed": op.args[3],
        **tile_places(shares),
        "lengths": lengths,
    }
