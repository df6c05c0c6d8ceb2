"""Lower the traced fx graph to the Graph: storages instead of values, reads and writes instead of aliasing, one vocabulary of ops.

Nothing is computed differently from here on. Multi-tensor updates (foreach, fused) become one op per parameter, which their CPU kernels do
in a loop anyway; updates move to right after the last gradient contribution that they need (`order`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from mebp_compile import graph as ir
from mebp_compile import torch_private
from mebp_compile.capture import devices
from mebp_compile.capture.hyper import stand_in
from mebp_compile.capture.trace import Traced
from mebp_compile.errors import GraphError, Unsupported
from mebp_compile.graph import Const, Graph, Op, Ref, Storage, Value
from mebp_compile.lower.naming import Namer
from mebp_compile.lower.order import early_updates, without_dead_ops
from mebp_compile.lower.out_kernels import out_kernel
from mebp_compile.lower.phases import Places, places

IDENTITY = (torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.lift_fresh.default, torch.ops.aten.detach_.default)
# Ops that can't be scheduled: (what they do, what to do instead).
REPLACES = ("replaces a tensor's storage", "write into the tensor with copy_ instead")
REFUSED = {
    **dict.fromkeys(("set_", "resize_", "resize_as_", "set_data"), REPLACES),
    "mkldnn_rnn_layer": (
        "keeps a workspace only while gradients are recorded, and does not say how large",
        "run the step with torch.backends.mkldnn.flags(enabled=False)",
    ),
}


def lower(traced: Traced, name: str = "step") -> Graph:
    """The Graph of a traced step. Raises GraphError where the trace holds something that can't be scheduled."""
    graph = _Lowering(traced, name).graph()
    graph = early_updates(without_dead_ops(graph))
    graph = _without_cleared_gradients(graph, traced.cleared)
    ir.verify(graph)
    return graph


def _without_cleared_gradients(graph: Graph, cleared: tuple[str, ...]) -> Graph:
    """Gradients of the step before that this one clears before anything reads them are gone when it begins: they take no bytes."""
    used = {storage for op in graph.ops for storage in (*op.reads, *op.writes)} | {graph.storage_of(name) for _, name in graph.results}
    gone = {f"gradient:{name}" for name in cleared}
    storages = tuple(
        replace(storage, size_bytes=0) if storage.source in gone and index not in used else storage
        for index, storage in enumerate(graph.storages)
    )
    return replace(graph, storages=storages)


def drop_gradients(graph: Graph, cleared: tuple[str, ...]) -> Graph:
    """The graph that leaves no `.grad` behind where the next step would clear it unread: each is freed after its last use."""
    gone = {f"gradient:{name}" for name in cleared}
    return replace(graph, results=tuple(result for result in graph.results if result[0] not in gone))


class _Lowering:
    """Walks the fx nodes once, in order, and files what each one makes."""

    def __init__(self, traced: Traced, name: str) -> None:
        self.traced, self.name = traced, name
        self.places: dict[torch.fx.Node, Places] = places(traced.module.graph)
        self.namer = Namer()
        self.storages: list[Storage] = []
        self.values: dict[str, Value] = {}
        self.ops: list[Op] = []
        self.views: list[Op] = []
        self.inputs: list[str] = []
        self.results: list[tuple[str, str]] = []
        self.by_cdata: dict[int, int] = {}
        self.by_geometry: dict[tuple[Any, ...], str] = {}
        self.of_node: dict[torch.fx.Node, Any] = {}  # value name, or a tuple of names, of each fx node
        self.hypers: dict[str, str] = {}

    def graph(self) -> Graph:
        inputs = iter(self.traced.inputs)
        for node in self.traced.module.graph.nodes:
            if node.op == "placeholder":
                item = next(inputs)
                self._persistent(node, item.source, item.role)
            elif node.op == "get_attr":
                self._constant(node, torch_private.constant_of(node))
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                self._output(node)
        return Graph(
            self.name,
            tuple(self.storages),
            tuple(self.values.values()),
            tuple(self.ops),
            tuple(self.views),
            tuple(self.inputs),
            tuple(self.results),
            self.traced.device,
        )

    # --- storages and values ---

    def _persistent(self, node: torch.fx.Node, source: str, role: str, tensor: Any = None) -> None:
        value = node.meta.get("val", tensor) if tensor is None else tensor
        name = self.namer.persistent(source)
        storage, _ = self._storage(value, name, role, source)
        if isinstance(node.meta.get("val"), torch.Tensor):  # each use of a constant has a fake of its own
            self.by_cdata[node.meta["val"].untyped_storage()._cdata] = storage
        self.of_node[node] = self._value(name, value, storage)
        if self.of_node[node] not in self.inputs:
            self.inputs.append(self.of_node[node])

    def _constant(self, node: torch.fx.Node, tensor: torch.Tensor) -> None:
        """A tensor that the trace made of Python numbers: kept beside the graph, or made anew where the number is a hyper-parameter."""
        expression = self.traced.hyper.expression_of(tensor)
        if expression is None:
            held = self.traced.held.get(str(node.target))
            self._persistent(node, f"constant:{node.target}" if held is None else f"tensor:{held}", "constant", tensor)
            return
        place, name = self.places[node], self.namer.unique("hyper_tensor")
        storage, _ = self._storage(tensor, name, "activation")
        self.of_node[node] = self._value(name, tensor, storage)
        number = self._hyper(expression)
        kwargs = (("dtype", Const(*torch_private.constant_name(tensor.dtype))),)
        target = torch_private.target_name(torch.ops.aten.scalar_tensor.default)
        self.ops.append(
            Op(name, target, (Ref(number),), kwargs, (name,), (storage,), (self.values[number].storage,), (), place.phase, place.module)
        )

    def _storage(self, tensor: torch.Tensor, name: str, role: str, source: str = "") -> tuple[int, bool]:
        """The number of the tensor's storage, and whether it is new."""
        untyped = tensor.untyped_storage()
        key = untyped._cdata
        if key in self.by_cdata:
            return self.by_cdata[key], False
        self.by_cdata[key] = len(self.storages)
        on_host = bool(self.traced.device) and not devices.place_of(tensor)
        self.storages.append(Storage(name, untyped.nbytes(), role, source, on_host))
        return self.by_cdata[key], True

    def _value(self, name: str, tensor: torch.Tensor, storage: int) -> str:
        """The name of the value with this geometry in this storage: an existing one, or a new one."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        geometry = (storage, dtype, tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()))
        if geometry not in self.by_geometry:
            self.by_geometry[geometry] = name
            self.values[name] = Value(name, *geometry)
        return self.by_geometry[geometry]

    def _number(self, name: str, role: str = "activation", source: str = "") -> str:
        self.storages.append(Storage(name, 0, role, source))
        self.values[name] = Value(name, len(self.storages) - 1, "number")
        return name

    # --- calls ---

    def _call(self, node: torch.fx.Node) -> None:
        target = node.target
        if "_record_function_" in str(target):
            return
        if node.target is torch_private.GETITEM and isinstance(self.of_node.get(node.args[0]), tuple):  # type: ignore[call-overload]
            self.of_node[node] = self.of_node[node.args[0]][node.args[1]]  # type: ignore[index]
        elif target in IDENTITY:
            self.of_node[node] = self.of_node[node.args[0]]  # type: ignore[index]
        elif not isinstance(target, torch._ops.OpOverload):
            self._python(node)
        elif torch_private.is_multi_tensor(target):
            self._split(node)
        else:
            self.of_node[node] = self._op(node, target, node.args, node.kwargs, node.meta.get("val"))

    def _python(self, node: torch.fx.Node) -> None:
        """Arithmetic on Python numbers: a power of beta, a step size."""
        place = self.places[node]
        name = self._number(self.namer.op(place.module, getattr(node.target, "__name__", "number"), node))
        args = self._args(node.args)
        storage = self.values[name].storage
        reads = tuple(dict.fromkeys(self.values[value].storage for value in ir.refs(args)))
        target = "py." + getattr(node.target, "__name__", str(node.target))
        self.ops.append(Op(name, target, args, (), (name,), (storage,), reads, (), place.phase, place.module, place.source))
        self.of_node[node] = name

    def _split(self, node: torch.fx.Node) -> None:
        """A foreach or fused op on lists, as one op per position: the same kernel on lists of one."""
        lists = [arg for arg in (*node.args, *node.kwargs.values()) if isinstance(arg, (list, tuple)) and arg]
        length = len(lists[0])
        if any(len(part) != length for part in lists):
            raise GraphError(f"{node.target} has lists of different lengths", "report this step")
        outputs = []
        for index in range(length):
            pick = lambda arg, index=index: [arg[index]] if isinstance(arg, (list, tuple)) and arg else arg  # noqa: E731
            args = tuple(pick(arg) for arg in node.args)
            kwargs = {key: pick(arg) for key, arg in node.kwargs.items()}
            value = node.meta.get("val")
            made = self._op(node, node.target, args, kwargs, [value[index]] if isinstance(value, (list, tuple)) and value else None)
            outputs.append(made[0] if isinstance(made, tuple) and made else None)
        self.of_node[node] = tuple(outputs)

    def _op(self, node: torch.fx.Node, target: Any, fx_args: Any, fx_kwargs: Any, made: Any) -> Any:
        """File one op; returns the names of what it makes: one name, or a tuple of them."""
        if target._opname in REFUSED:
            what, fix = REFUSED[target._opname]
            raise Unsupported(f"{target} at {torch_private.node_line(node)} {what}", fix)
        place = self.places[node]
        args, kwargs = self._args(fx_args), tuple((key, self._arg(arg)) for key, arg in fx_kwargs.items())
        name = self.namer.op(place.module, target._opname, node)
        used = [self.values[value].storage for value in (*ir.refs(args), *ir.refs(tuple(arg for _, arg in kwargs)))]
        written = torch_private.written_arguments(target, fx_args, fx_kwargs)
        writes = tuple(dict.fromkeys(self.values[self.of_node[item]].storage for item in written))
        if any(self.storages[storage].role == "batch" for storage in writes):
            raise Unsupported(f"{target} at {torch_private.node_line(node)} writes into a tensor of the batch", "clone it first")
        known = len(self.values)
        outputs, creates = self._outputs(name, made)
        source = torch_private.node_line(node) if place.phase == "forward" else ""
        if not creates and not writes and target is not torch.ops.aten._local_scalar_dense.default and outputs:
            if len(self.values) > known:  # otherwise it only renames values that exist
                self._view(name, target, args, kwargs, outputs, _listed(made), place)
            return outputs[0] if isinstance(made, torch.Tensor) else outputs
        if creates and torch_private.viewed(target, fx_args) is not None:
            raise GraphError(f"{target} at {torch_private.node_line(node)} is a view of a tensor that the graph does not hold", "report this step")
        reads = tuple(storage for storage in dict.fromkeys(used) if storage not in writes)
        out_target, out = out_kernel(target, made)
        fresh = tuple(output if output is not None and self.values[output].storage in creates else None for output in outputs)
        self.ops.append(
            Op(name, torch_private.target_name(target), args, kwargs, fresh, creates, reads, writes, place.phase, place.module, source,
               place.forward_op, torch_private.draws_random_numbers(target, fx_args, fx_kwargs), out_target, out, listed=_listed(made))
        )  # fmt: skip
        return outputs if isinstance(made, (list, tuple)) else (outputs[0] if outputs else None)

    def _outputs(self, name: str, made: Any) -> tuple[tuple[str | None, ...], tuple[int, ...]]:
        """Value names of what an op returns (existing ones where it returns an argument), and the storages that are new."""
        outputs: list[str | None] = []
        creates: list[int] = []
        parts = list(made) if isinstance(made, (list, tuple)) else ([] if made is None else [made])
        for index, part in enumerate(parts):
            label = name if len(parts) == 1 else self.namer.unique(f"{name}_{index}")
            if isinstance(part, torch.Tensor):
                storage, new = self._storage(part, label, "activation")
                outputs.append(self._value(label, part, storage))
            elif part is None:
                outputs.append(None)
                continue
            else:
                outputs.append(self._number(label))
                storage, new = self.values[label].storage, True
            if new:
                creates.append(storage)
        return tuple(outputs), tuple(creates)

    def _view(self, name: str, target: Any, args: Any, kwargs: Any, outputs: tuple[str | None, ...], listed: bool, place: Places) -> None:
        """A view op: kept aside, to be placed where its result is used."""
        target_name = torch_private.target_name(target)
        self.views.append(Op(name, target_name, args, kwargs, outputs, phase=place.phase, module=place.module, listed=listed))

    # --- arguments and results ---

    def _args(self, args: Any) -> tuple[Any, ...]:
        return tuple(self._arg(arg) for arg in args)

    def _arg(self, arg: Any) -> Any:
        if isinstance(arg, torch.fx.Node):
            made = self.of_node[arg]
            return Ref(made) if isinstance(made, str) else tuple(Ref(part) for part in made)
        if isinstance(arg, (list, tuple)):
            return tuple(self._arg(part) for part in arg)
        if isinstance(arg, float) and stand_in(arg) in self.traced.hyper.expressions:
            return Ref(self._hyper(self.traced.hyper.expressions[stand_in(arg)]))
        if isinstance(arg, bool) or arg is None or isinstance(arg, (int, float, str)):
            return arg
        return Const(*torch_private.constant_name(arg))

    def _hyper(self, expression: str) -> str:
        if expression not in self.hypers:
            self.hypers[expression] = self._number(self.namer.hyper(expression), "hyper", f"hyper:{expression}")
            self.inputs.append(self.hypers[expression])
        return self.hypers[expression]

    def _output(self, node: torch.fx.Node) -> None:
        leaves = node.args[0] if isinstance(node.args[0], (list, tuple)) else [node.args[0]]
        for path, leaf in zip(self.traced.results, leaves, strict=True):
            self.results.append((path, self.of_node[leaf]))  # type: ignore[index]


def _listed(made: Any) -> bool:
    """Whether an op gives its one result in a list."""
    return isinstance(made, (list, tuple)) and len(made) == 1
