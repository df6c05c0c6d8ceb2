"""Where a graph holds a loss that can be tiled, and the reason where it can't be.

    logits = mm(x, W^T)  ->  [cap * tanh(logits / cap)]  ->  log_softmax  ->  nll_loss  [and label smoothing]  and the backward of all of these

The head is found by walking back from the loss. Then everything that is made of the logits must be known: MAKES says which op makes what of
what, in the graph's order, and an op that it does not list is another use, for which the logits would have to exist. Views, casts, copies and
one slice of the rows (the usual shift: `logits[:, :-1]`) may stand anywhere between.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from mebp_compile import torch_private

aten = torch.ops.aten
SAME = (aten.view.default, aten._unsafe_view.default, aten._to_copy.default, aten.detach.default, aten.alias.default, aten.clone.default)
ROWS = (aten.slice.Tensor, aten.slice_backward.default)
# (op, what its arguments are that the logits reach) -> what its result is. "d y" is the gradient of y.
MAKES: dict[tuple[Any, tuple[str, ...]], str] = {
    (aten.div.Tensor, ("logits",)): "part",
    (aten.mul.Tensor, ("logits",)): "part",
    (aten.tanh.default, ("part",)): "tanh",
    (aten.mul.Tensor, ("tanh",)): "capped",
    (aten._log_softmax.default, ("logits",)): "log p",
    (aten._log_softmax.default, ("capped",)): "log p",
    (aten.nll_loss_forward.default, ("log p",)): "nll",
    # label smoothing: the mean of -log p over the words, as torch's cross_entropy_loss decomposes it
    (aten.sum.dim_IntList, ("log p",)): "sums",
    (aten.neg.default, ("sums",)): "negated",
    (aten.masked_fill_.Scalar, ("negated",)): "kept",
    (aten.sum.default, ("kept",)): "total",
    (aten.div.Tensor, ("total",)): "average",
    **{(times, (of,)): "even" for times in (aten.mul.Scalar, aten.mul.Tensor) for of in ("total", "average")},
    (aten.add.Tensor, ("even",)): "smoothed",
    # the backward
    (aten.nll_loss_backward.default, ("log p",)): "d log p",
    (aten.add.Tensor, ("d log p",)): "d smoothed",
    (aten._log_softmax_backward_data.default, ("d log p", "log p")): "d seen",
    (aten._log_softmax_backward_data.default, ("d smoothed", "log p")): "d seen",
    (aten.mul.Tensor, ("d seen",)): "d tanh",
    (aten.tanh_backward.default, ("d tanh", "tanh")): "d part",
    (aten.div.Tensor, ("d part",)): "d logits",
    (aten.mul.Tensor, ("d part",)): "d logits",
    (aten.t.default, ("d seen",)): "turned d seen",
    (aten.t.default, ("d logits",)): "turned d logits",
}
DONE = ("nll", "smoothed")  # what is made of these is no longer the logits' business
CHAIN_TO_GRADIENT = (aten.expand.default, aten.unsqueeze.default, aten.neg.default, aten.masked_fill.Scalar, aten.expand.default)


class NotHere(Exception):
    """Why a loss can't be tiled."""


@dataclass(frozen=True)
class Loss:
    """One place to rewrite: what the tiled loss needs, and what it replaces.

    smoothing: 0 for none. cap: 0 for none. cut: the slice of the logits' rows that the loss sees. value: the loss. gradient: of the loss.
    to_input: mm(d logits, W); to_weight: mm(d logits^T, x). gone: the nodes that are no longer needed.
    """

    nll: Node
    head: Node  # mm(x, W^T)
    weight: Node
    smoothing: float
    cap: float
    cut: Node | None
    value: Node | None
    gradient: Node | None
    to_input: tuple[Node, ...]
    to_weight: tuple[Node, ...]
    gone: frozenset[Node]


def places(graph: torch.fx.Graph) -> list[Node]:
    """Where to look: every nll loss, and every log-softmax that none of them sees."""
    found = list(graph.find_nodes(op="call_function", target=aten.nll_loss_forward.default))
    seen = {_source(node.args[0], SAME) for node in found}
    return found + [node for node in graph.find_nodes(op="call_function", target=aten._log_softmax.default) if node not in seen]


def match(place: Node) -> Loss:
    """The loss at one of `places`. Raises NotHere."""
    if place.target is not aten.nll_loss_forward.default:
        users = ", ".join(dict.fromkeys(str(user.target) for user in _beyond(place)))
        raise NotHere(f"its log_softmax is used by {users or 'nothing'}, not by cross_entropy of [tokens, vocabulary] and one index a token")
    head, cut = _head(place)
    found = _Found(place, head)
    for node in head.graph.nodes:
        if any(arg in found.label for arg in node.all_input_nodes):
            found.take(node)
    return found.loss(cut)


# --- back from the loss to the head ---


def _head(nll: Node) -> tuple[Node, Node | None]:
    """The head's matmul, and the slice that leaves some of its rows out."""
    softmax: Any = nll.args[0]
    if nll.args[2] is not None:
        raise NotHere("it weighs the classes")
    if nll.args[3] not in (1, 2):
        raise NotHere("it is not reduced to a mean or a sum")
    if not _is(softmax, aten._log_softmax.default):
        raise NotHere("it does not come from log_softmax")
    if softmax.meta["val"].dtype != torch.float32:
        raise NotHere(f"the softmax is in {softmax.meta['val'].dtype}")
    head = _source(_uncapped(softmax.args[0]), (*SAME, aten.slice.Tensor))
    if not _is(head, aten.mm.default):
        hint = " (a contiguous() before the head makes it one)" if _is(head, aten.bmm.default) else ""
        raise NotHere(f"the logits are made by {getattr(head, 'target', head)}, not by one matmul{hint}")
    if not _is(head.args[1], aten.t.default):
        raise NotHere("the head's weight is not stored as [vocabulary, features]")
    cuts = [node for node in _between(softmax.args[0], head) if node.target is aten.slice.Tensor and _size(node) != _size(node.args[0])]
    if len(cuts) > 1:
        raise NotHere("the logits' rows are sliced more than once")
    return head, cuts[0] if cuts else None


def _uncapped(logits: Any) -> Any:
    """What soft-capping was given, or the logits themselves where they are not capped."""
    outer: Any = _source(logits, (*SAME, aten.slice.Tensor))
    tanh: Any = _source(outer.args[0], (*SAME, aten.slice.Tensor)) if _is(outer, aten.mul.Tensor) else None
    part: Any = _source(tanh.args[0], (*SAME, aten.slice.Tensor)) if _is(tanh, aten.tanh.default) else None
    return part.args[0] if _is(part, aten.div.Tensor) or _is(part, aten.mul.Tensor) else logits


def _between(node: Any, first: Node) -> list[Node]:
    """The chain of first arguments from a node back to `first`."""
    chain = []
    while node is not first:
        chain.append(node)
        node = node.args[0]
    return chain


def _beyond(node: Node) -> list[Node]:
    """The users of a node and of its views, but for the backward of log-softmax."""
    users: list[Node] = []
    for user in node.users:
        users += _beyond(user) if user.target in SAME else [user] if user.target is not aten._log_softmax_backward_data.default else []
    return users


# --- forward, to everything that is made of the logits ---


class _Found:
    """What is made of the logits, node by node in the graph's order."""

    def __init__(self, nll: Node, head: Node) -> None:
        self.nll, self.head = nll, head
        self.weight: Any = head.args[1].args[0]  # type: ignore[union-attr]
        self.words = int(head.meta["val"].shape[1])
        self.label: dict[Node, str] = {head: "logits"}
        self.made: dict[str, Node] = {}
        self.to_input: list[Node] = []
        self.to_weight: list[Node] = []

    def take(self, node: Node) -> None:
        """File one node that uses something made of the logits."""
        known = tuple(self.label[arg] for arg in node.args if isinstance(arg, Node) and arg in self.label)
        label = MAKES.get((node.target, known))
        if node.target in (*SAME, *ROWS) and len(known) == 1:
            self._same(node, known[0])
        elif label is not None:
            if label in self.made:
                raise NotHere("it is differentiated twice" if "d " in label else "the logits have more than one loss")
            self.made[label] = node
            if label not in DONE:
                self.label[node] = label
        elif _is(node, aten.mm.default) and known in (("d seen",), ("d logits",)) and self._is_weight(node.args[1]):
            self.to_input.append(node)
        elif _is(node, aten.mm.default) and known in (("turned d seen",), ("turned d logits",)) and node.args[1] is self.head.args[0]:
            self.to_weight.append(node)
        else:
            what = "the step returns them" if node.op == "output" else f"{node.target} at {torch_private.node_line(node)} uses them"
            raise NotHere(f"the logits have another use: {what}")

    def _same(self, node: Node, label: str) -> None:
        """A view, a cast or a slice of rows stays what it was, as long as each row still holds all words."""
        if _size(node)[-1:] != (self.words,) or (node.target is aten.slice.Tensor and len(node.args) > 4 and node.args[4] != 1):
            raise NotHere(f"{node.target} at {torch_private.node_line(node)} takes the rows of the logits apart")
        self.label[node] = label

    def _is_weight(self, node: Any) -> bool:
        return _source(node, (aten.t.default, *SAME)) is _source(self.weight, SAME)

    def loss(self, cut: Node | None) -> Loss:
        """What was found, after its numbers have been compared."""
        if self.made.get("nll") is not self.nll or _size(self.made["log p"]) != (_size(self.nll.args[1])[0], self.words):
            raise NotHere("the rows of the logits are not the tokens of the loss")
        if self.made["log p"].args[1] not in (1, -1):
            raise NotHere("the softmax is not over the words of a row")
        cap = self._cap()
        value = next((user for user in self.nll.users if user.target is operator.getitem and user.args[1] == 0), None)
        gradient: Any = self.made["d log p"].args[0] if "d log p" in self.made else None
        smoothing, more = 0.0, set[Node]()
        if "sums" in self.made:
            smoothing, more = _smoothing(self, value)
            value = self.made["smoothed"]
        if "d smoothed" in self.made:
            gradient, chain = _smoothed_gradient(self)
            more |= chain
        elif smoothing and gradient is not None:
            raise NotHere("the gradient of its label smoothing is missing")
        gone = frozenset([*self.label, *self.made.values(), *self.to_input, *self.to_weight, *more])
        return Loss(self.nll, self.head, self.weight, smoothing, cap, cut, value, gradient, tuple(self.to_input), tuple(self.to_weight), gone)

    def _cap(self) -> float:
        """The cap of soft-capping, the same number in all its four places; 0 where there is none."""
        names = ("part", "capped", "d tanh", "d logits")
        if "tanh" not in self.made:
            return 0.0
        factors = [_factor(self.made[name]) for name in names if name in self.made]
        cap = factors[1]
        wanted = [1.0 / cap, cap, cap, 1.0 / cap] if cap > 0 else []
        if any(abs(factor / want - 1.0) > 1e-6 for factor, want in zip(factors, wanted, strict=False)) or not wanted:
            raise NotHere("its soft-capping is not cap * tanh(logits / cap)")
        return cap


def _factor(node: Node) -> float:
    """By what a product or a quotient multiplies its first argument."""
    number = node.args[1]
    if not isinstance(number, (int, float)) or not number:
        raise NotHere("the cap of its soft-capping is not a number")
    return float(number) if node.target is aten.mul.Tensor else 1.0 / number


# --- label smoothing ---


def _smoothing(found: _Found, value: Any) -> tuple[float, set[Node]]:
    """(e, the nodes) of  (1 - e) nll + e / V reduced(-sum_v log p), as cross_entropy makes it with label_smoothing=e."""
    made = found.made
    added = made.get("smoothed")
    plain: Any = next((arg for arg in added.args if arg is not made["even"]), None) if added is not None else None
    alone = _scaled(plain) and plain.args[0] is value and list(value.users) == [plain] and list(plain.users) == [added]
    if added is None or added.kwargs or not alone:
        raise NotHere("its log_softmax is summed over the words for something else than label smoothing")
    smoothing, even = 1.0 - plain.args[1], made["even"].args[1]
    _check_mask(found, made["kept"].args)
    if ("average" in made) != (found.nll.args[3] == 1) or ("average" in made and not _counts(found, made["average"].args[1])):
        raise NotHere("its label smoothing is reduced in another way than the loss")
    if not isinstance(even, float) or abs(even * found.words - smoothing) > 1e-6 or not 0.0 <= smoothing <= 1.0:
        raise NotHere("the weights of its label smoothing do not add up to 1")
    return even * found.words, {plain, value}


def _smoothed_gradient(found: _Found) -> tuple[Node, set[Node]]:
    """(the gradient of the loss, the nodes between it and both parts of the gradient of log p)."""
    nll_grad: Any = found.made["d log p"].args[0]
    node: Any = next(arg for arg in found.made["d smoothed"].args if arg not in found.label)
    chain: set[Node] = {nll_grad}
    for target in CHAIN_TO_GRADIENT:
        if not _is(node, target):
            raise NotHere("the gradient of its label smoothing is unknown")
        if target is aten.masked_fill.Scalar:
            _check_mask(found, node.args)
        chain.add(node)
        node = node.args[0]
    if _is(node, aten.div.Tensor) and _counts(found, node.args[1]):
        chain.add(node)
        node = node.args[0]
    if not _scaled(node) or not _scaled(nll_grad) or node.args[0] is not nll_grad.args[0]:
        raise NotHere("the two parts of its label smoothing have different gradients")
    return node.args[0], {*chain, node}


def _scaled(node: Any) -> bool:
    """Whether a node is something times a number."""
    return (_is(node, aten.mul.Scalar) or _is(node, aten.mul.Tensor)) and isinstance(node.args[1], (int, float))


def _check_mask(found: _Found, masked: tuple[Any, ...]) -> None:
    """masked_fill(rows, target == ignore_index, 0)."""
    _, mask, filling = masked
    if not _is_mask(found, mask) or filling != 0:
        raise NotHere("its label smoothing leaves other rows out than the loss")


def _is_mask(found: _Found, mask: Any) -> bool:
    return _is(mask, aten.eq.Scalar) and mask.args[0] is found.nll.args[1] and mask.args[1] == found.nll.args[4]


def _counts(found: _Found, count: Any) -> bool:
    """Whether a node is the number of rows that are not ignored."""
    return _is(count, aten.sum.default) and _is(count.args[0], aten.bitwise_not.default) and _is_mask(found, count.args[0].args[0])


# --- nodes ---


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, Node) and node.target is target


def _size(node: Any) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _source(node: Any, through: tuple[Any, ...]) -> Any:
    """Where a node comes from, seen through ops of these kinds."""
    while isinstance(node, Node) and node.target in through:
        node = node.args[0]
    return node
