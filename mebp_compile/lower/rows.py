"""Dimension analysis: which ops go row by row along the tokens, so that a block of rows of their results needs only that block of their inputs.

A step has one number of tokens (batch times sequence). A tensor is *rows* if its memory is that many equal rows, one after another, and its
leading dimensions count them: [tokens, features], [batch, sequence, features]. Its transpose is *columns*. From the shapes and strides alone
follows, for each op, which of its inputs a block of rows needs only a block of, and whether each of its results is rows or a sum over them
(the gradient of a weight).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from mebp_compile.graph import Graph, Op, Ref, Value, inputs_of
from mebp_compile.lower.products import MATMULS
from mebp_compile.lower.tables import itemsize

POINTWISE = {
    "add", "sub", "mul", "div", "neg", "pow", "rsqrt", "sqrt", "exp", "log", "sin", "cos", "tanh", "sigmoid", "erf", "silu", "gelu", "relu",
    "abs", "square", "reciprocal", "maximum", "minimum", "where", "clamp", "clamp_min", "clamp_max", "leaky_relu", "elu", "softplus", "mish",
    "hardswish", "hardsigmoid", "silu_backward", "gelu_backward", "tanh_backward", "sigmoid_backward", "threshold_backward", "mish_backward",
    "leaky_relu_backward", "elu_backward", "softplus_backward", "hardswish_backward", "hardsigmoid_backward", "native_dropout_backward",
    "eq", "ne", "le", "lt", "ge", "gt", "logical_not", "bitwise_not", "masked_fill", "_to_copy", "clone",
}  # fmt: skip
PRODUCTS = {target: second - 1 for target, second in MATMULS.items()}  # position of the first matrix
REDUCTIONS = {"aten.mean.dim", "aten.sum.dim_IntList", "aten.amax.default", "aten.amin.default"}
SOFTMAXES = {  # position of the dimension
    "aten._softmax.default": 1, "aten._log_softmax.default": 1, "aten._softmax_backward_data.default": 2,
    "aten._log_softmax_backward_data.default": 2,
}  # fmt: skip
FUSED = {  # this package's own: positions of what is rows; every result is
    "mebp.gated.default": (0, 1), "mebp.gated_backward.default": (0, 1, 2), "mebp.add_low_rank.default": (0, 1, 4),
    "mebp.rms_norm.default": (0,), "mebp.rms_norm_backward.default": (0, 1, 3, 4),
}  # fmt: skip
GATHER, NLL_LOSS_BACKWARD = "aten.gather.default", "aten.nll_loss_backward.default"
LAYER_NORM, LAYER_NORM_BACKWARD = "aten.native_layer_norm.default", "aten.native_layer_norm_backward.default"
SHAPINGS = {"aten.view.default", "aten._unsafe_view.default", "aten.unsqueeze.default", "aten.squeeze.dim", "aten.expand.default"}
ROWS, SUM = "rows", "sum"


@dataclass(frozen=True)
class Split:
    """How an op goes in blocks of rows: the inputs that it needs a block of, and what each result is (ROWS, SUM, None for none)."""

    blocks: frozenset[str]
    results: tuple[str | None, ...]


@dataclass
class Rows:
    """The analysis of one graph. `leading` gives the number of leading dimensions that count the tokens, of each value that is rows. `sums`: whether
    ops that add up over the tokens are among those that go row by row."""

    graph: Graph
    tokens: int
    sums: bool = True
    leading: dict[str, int] = field(default_factory=dict)
    columns: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for value in self.graph.values:
            width = self._width(value)
            if width and (count := _leading(value, self.tokens, width)):
                self.leading[value.name] = count
            elif width and len(value.shape) == 2 and value.shape[1] == self.tokens and value.stride[1] == width and value.offset == 0:
                self.columns.add(value.name)

    def _width(self, value: Value) -> int:
        """Elements of a row of the value's memory; 0 where it is no whole number of rows."""
        if value.dtype == "number" or not value.shape:
            return 0
        elements = self.graph.storages[value.storage].size_bytes // itemsize(value.dtype)
        return 0 if elements % self.tokens else elements // self.tokens

    def split(self, op: Op) -> Split | None:
        """How the op goes in blocks of rows; None if it does not."""
        known = op.target.startswith("aten.") or op.target in FUSED or op.target in PRODUCTS
        if op.rng or op.writes or op.listed or not op.creates or not known:
            return None
        found = self._split(op)
        if found is None or any(not self._reached(name) for name in found.blocks) or (SUM in found.results and not self.sums):
            return None
        made = zip(op.outputs, found.results, strict=True)
        return found if all(name is None or self._fits(name, kind) for name, kind in made) else None

    def _fits(self, name: str, kind: str | None) -> bool:
        """Whether blocks of a result can be put in place, or added up."""
        value = self.graph.value[name]
        return (name in self.leading and _contiguous(value)) if kind == ROWS else "float" in value.dtype

    def _split(self, op: Op) -> Split | None:
        if op.target in PRODUCTS:
            return self._product(op)
        if op.target in REDUCTIONS:
            return self._reduction(op)
        if op.target in SOFTMAXES:
            dim, first = op.args[SOFTMAXES[op.target]], self.graph.value[op.args[0].name]
            inner = dim % len(first.shape) >= self.leading.get(first.name, len(first.shape))
            return self._each(op) if inner else None
        if op.target in FUSED:
            return self._rows_of(op, tuple(op.args[k] for k in FUSED[op.target] if k < len(op.args)), (ROWS,) * len(op.outputs))
        if op.target == GATHER:
            inner = op.args[1] % len(self.graph.value[op.args[0].name].shape) >= self.leading.get(op.args[0].name, 0)
            return self._rows_of(op, (op.args[0], op.args[2]), (ROWS,)) if inner else None
        if op.target == NLL_LOSS_BACKWARD and op.args[4] != 0:
            return self._rows_of(op, op.args[1:3], (ROWS,))
        if op.target == LAYER_NORM:
            return self._rows_of(op, op.args[:1], (ROWS, ROWS, ROWS))
        if op.target == LAYER_NORM_BACKWARD:
            return self._rows_of(op, (*op.args[:2], *op.args[3:5]), (ROWS, SUM, SUM))
        return self._each(op) if op.target.split(".")[1] in POINTWISE else None

    def _product(self, op: Op) -> Split | None:
        """Rows times a matrix are rows; columns times rows are a sum over the tokens."""
        position = PRODUCTS[op.target]
        first, second = op.args[position].name, op.args[position + 1].name
        if first in self.leading and len(self.graph.value[first].shape) == 2:
            bias = op.args[:position]
            flat = all(len(self.graph.value[arg.name].shape) == 1 for arg in bias if isinstance(arg, Ref))
            return Split(frozenset((first,)), (ROWS,)) if flat else None
        if not position and first in self.columns and second in self.leading:
            return Split(frozenset((first, second)), (SUM,))
        return None

    def _reduction(self, op: Op) -> Split | None:
        name = op.args[0].name
        count, rank = self.leading.get(name, 0), len(self.graph.value[name].shape)
        dims = {dim % rank for dim in op.args[1]} if count and len(op.args) > 1 and isinstance(op.args[1], tuple) else set()
        if dims and min(dims) >= count:
            return Split(frozenset((name,)), (ROWS,))
        if dims == set(range(count)) and op.target == "aten.sum.dim_IntList":
            return Split(frozenset((name,)), (SUM,))
        return None

    def _rows_of(self, op: Op, args: tuple[object, ...], results: tuple[str, ...]) -> Split | None:
        names = frozenset(arg.name for arg in args if isinstance(arg, Ref))
        if not names <= self.leading.keys():
            return None
        return Split(names, tuple(kind if name else None for name, kind in zip(op.outputs, results, strict=True)))

    def _each(self, op: Op) -> Split | None:
        """An op on each element: its inputs have the result's leading dimensions, or don't depend on the tokens."""
        result = op.outputs[0]
        if len(op.outputs) != 1 or result not in self.leading:
            return None
        count, shape = self.leading[result], self.graph.value[result].shape
        blocks = set()
        for name in inputs_of(op):
            value = self.graph.value[name]
            missing = len(shape) - len(value.shape)
            if not missing and self.leading.get(name) == count and value.shape[:count] == shape[:count]:
                blocks.add(name)
            elif any(size != 1 for size in value.shape[: max(0, count - missing)]):
                return None
        return Split(frozenset(blocks), (ROWS,)) if blocks else None

    def _reached(self, name: str) -> bool:
        """Whether a block of the value can be made of a block of what it is a view of."""
        view = self.graph.view.get(name)
        if view is None or self.graph.storage_of(name) not in self.graph.producer:
            return True
        source = next(iter(inputs_of(view)), "")
        if len(view.outputs) != 1 or source not in self.leading:
            return False
        if view.target == "aten.t.default":
            return name in self.columns and self._reached(source)
        same_rank = len(self.graph.value[source].shape) == len(self.graph.value[name].shape)
        fits = view.target in SHAPINGS and (same_rank or view.target != "aten.expand.default")
        return fits and name in self.leading and self._reached(source)


def element_by_element(target: str) -> bool:
    """Whether each element of the op's result needs of its large inputs that element alone, once what is summed over a row is known."""
    return target.split(".")[1] in POINTWISE or (target in SOFTMAXES and "backward" in target)


def tokens_of(graph: Graph) -> int:
    """The number of rows that most of the forward's arithmetic goes through; 0 if there is no matmul."""
    work: Counter[int] = Counter()
    for _, rows, flops in _products(graph):
        work[rows] += flops
    return work.most_common(1)[0][0] if work else 0


def stream_bytes(rows: Rows) -> int:
    """Bytes of a token in the residual stream: the width of what most of the forward's arithmetic takes."""
    work: Counter[int] = Counter()
    for op, count, flops in _products(rows.graph):
        if count == rows.tokens:
            work[rows.graph.storages[rows.graph.storage_of(op.args[PRODUCTS[op.target]].name)].size_bytes // count] += flops
    return work.most_common(1)[0][0] if work else 0


def _products(graph: Graph) -> list[tuple[Op, int, int]]:
    """(op, rows, multiplications) of each matmul of the forward."""
    found = []
    for op in graph.ops:
        if op.phase == "forward" and op.target in PRODUCTS:
            rows, inner = graph.value[op.args[PRODUCTS[op.target]].name].shape
            found.append((op, rows, rows * inner * graph.value[op.outputs[0] or ""].shape[1]))
    return found


def _leading(value: Value, tokens: int, width: int) -> int:
    """How many leading dimensions count the tokens, each row being `width` elements of memory; 0 if they don't."""
    count = next((k for k in range(1, len(value.shape) + 1) if math.prod(value.shape[:k]) == tokens), 0)
    expected = width
    for size, stride in zip(reversed(value.shape[:count]), reversed(value.stride[:count]), strict=True):
        if size != 1 and stride != expected:
            return 0
        expected *= size
    inner = sum((size - 1) * stride for size, stride in zip(value.shape[count:], value.stride[count:], strict=True))
    return count if value.offset + inner < width else 0


def _contiguous(value: Value) -> bool:
    expected = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return value.offset == 0


def block_shape(value: Value, leading: int) -> tuple[int, ...]:
    """The shape of a block of rows, whose number is -1."""
    return (*(1,) * (leading - 1), -1, *value.shape[leading:])
