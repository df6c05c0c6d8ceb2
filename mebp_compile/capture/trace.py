"""Trace one call of a training step into a single fx graph: forward, backward and update, over fake tensors.

The user's own modules and optimizers are used, with their tensors swapped for fake ones for the duration of the call, so that nothing is
computed and no weight is needed (parameters may be on `meta`). Method: make_fx over the whole step, as torchtitan's graph trainer does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree

from mebp_compile import torch_private
from mebp_compile.capture import devices
from mebp_compile.capture.facts import tensor_places
from mebp_compile.capture.find import State
from mebp_compile.capture.hyper import HyperTable, followed_math, live_groups, stand_in
from mebp_compile.capture.predicates import PredicateMode
from mebp_compile.errors import CaptureError, UndeclaredState, Unsupported


@dataclass(frozen=True)
class Input:
    """A graph input: where it lives (`source`), what it is, and the tensor that it has now."""

    source: str
    role: str
    tensor: torch.Tensor


@dataclass
class Traced:
    """The raw trace: the graph, its inputs in placeholder order, and what its outputs are, in order.

    held: for each constant of the graph that is a tensor of the user's own, the place that holds it; it is read there at each call. device: the
    accelerator that the step runs on; nothing for the CPU.
    """

    module: torch.fx.GraphModule
    inputs: list[Input]
    results: list[str]
    return_spec: pytree.TreeSpec
    return_constants: dict[int, Any]
    return_hypers: dict[int, str]
    hyper: HyperTable
    predicates: list[Any] = field(default_factory=list)
    cleared: tuple[str, ...] = ()
    gradients_given: tuple[str, ...] = ()
    held: dict[str, str] = field(default_factory=dict)
    device: str = ""


def collect_inputs(state: State, batch: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Input]:
    """Every tensor that the step may touch: parameters, buffers, gradients, optimizer state, tensor hyper-parameters, the batch."""
    inputs: list[Input] = []
    for root, path, parameter in state.parameters():
        inputs.append(Input(f"parameter:{root}:{path}", "parameter", parameter))
    for root, module in state.modules.items():
        inputs += [Input(f"buffer:{root}:{path}", "buffer", buffer) for path, buffer in module.named_buffers()]
    for root, path, parameter in state.parameters():
        if parameter.grad is not None:
            inputs.append(Input(f"gradient:{root}:{path}", "gradient", parameter.grad))
    names = parameter_names(state)
    for root, optimizer in state.optimizers.items():
        inputs += _optimizer_inputs(root, optimizer, names)
    leaves = pytree.tree_leaves((batch, kwargs))
    inputs += [Input(f"batch:{index}", "batch", leaf) for index, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    return inputs


def parameter_names(state: State) -> dict[int, str]:
    """`root:path` of each parameter, by id."""
    return {id(parameter): f"{root}:{path}" for root, path, parameter in state.parameters()}


def _optimizer_inputs(root: str, optimizer: torch.optim.Optimizer, names: dict[int, str]) -> Iterator[Input]:
    for index, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if isinstance(value, torch.Tensor):
                yield Input(f"group:{root}:{index}:{key}", "optimizer", value)
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    yield Input(f"optimizer:{root}:{names[id(parameter)]}:{key}", "optimizer", value)


def trace_step(step_fn: Callable[..., Any], state: State, batch: tuple[Any, ...], kwargs: dict[str, Any], salt: str = "") -> Traced:
    """One fx graph of `step_fn(*batch, **kwargs)`; `salt` chooses the stand-ins of hyper-parameters."""
    inputs = collect_inputs(state, batch, kwargs)
    mode, device = torch_private.fake_mode(), devices.common_device(item.tensor for item in inputs)
    with torch_private.fake_construction(mode):
        fakes = _fakes(inputs, mode, devices.torch_device(device))
    hyper = HyperTable(salt)
    run = _Run(step_fn, state, batch, kwargs, inputs, hyper)
    with contextlib.ExitStack() as stack:
        for name, module in state.modules.items():
            stack.enter_context(torch_private.annotated_modules(module, name))
        stack.enter_context(torch_private.tracing_contexts(mode))
        stack.enter_context(followed_math())
        module = torch_private.make_fx(run, fakes)
    given = tuple(item.source.split(":", 1)[1] for item in inputs if item.role == "gradient")
    held = _held_constants(module, state)
    seen = (tuple(run.cleared), given, held, device)
    return Traced(module, inputs, run.results, run.spec, run.constants, run.hypers, hyper, run.predicates, *seen)


def _held_constants(module: torch.fx.GraphModule, state: State) -> dict[str, str]:
    """The place of each constant of the graph that the user's own code holds. Raises UndeclaredState where none is known for such a
    tensor.
    """
    owners = {id(read()): name for name, read in tensor_places(state).items()}
    held = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            constant = torch_private.constant_of(node)
            if not isinstance(constant, torch.Tensor):
                raise Unsupported(
                    f"an op at {torch_private.node_line(node)} takes a {type(constant).__name__}",
                    "use torch's default generator, or draw the numbers before the step and pass them in the batch",
                )
            if id(constant) in owners:
                held[str(node.target)] = owners[id(constant)]
            elif id(constant) in state.reach.seen:
                raise UndeclaredState(
                    f"a tensor of shape {tuple(constant.shape)} used at {torch_private.node_line(node)} lies too deep in "
                    "the step's closure to be followed",
                    "keep it in a variable that the step names, as a buffer of a module, or pass it in the batch",
                )
    return held


def _fakes(inputs: list[Input], mode: Any, device: torch.device) -> list[torch.Tensor]:
    """A fake for each input. State that shares a storage (views, ties) gives fakes that share one; each batch tensor has one of its own,
    since what it shares memory with (a whole data set, the same tokens passed as labels) may differ at each call.
    """
    return [
        torch_private.dense_fake(mode, item.tensor) if item.role == "batch" else torch_private.fake_tensor(mode, item.tensor, device)
        for item in inputs
    ]


class _Run:
    """The function that make_fx traces; keeps what it learnt beside the graph."""

    def __init__(self, step_fn: Callable[..., Any], state: State, batch: Any, kwargs: Any, inputs: list[Input], hyper: HyperTable) -> None:
        self.step_fn, self.state, self.batch, self.kwargs, self.inputs, self.hyper = step_fn, state, batch, kwargs, inputs, hyper
        self.results: list[str] = []
        self.predicates: list[Any] = []
        self.constants: dict[int, Any] = {}
        self.hypers: dict[int, str] = {}
        self.spec: Any = None
        self.names = parameter_names(state)
        self.cleared: list[str] = []

    def __call__(self, *tensors: torch.Tensor) -> list[Any]:
        given = {item.source: tensor for item, tensor in zip(self.inputs, tensors, strict=True)}
        self.state.stand_ins = {id(tensor): (tensor, item.tensor) for item, tensor in zip(self.inputs, tensors, strict=True)}
        batch, kwargs = self._batch(given)
        real = {item.source: item.tensor for item in self.inputs if item.role == "batch"}
        with contextlib.ExitStack() as stack:
            parameters = self._swap_modules(stack, given)
            self._swap_optimizers(stack, given, parameters)
            predicates = stack.enter_context(PredicateMode(given, real))
            cleared = stack.enter_context(torch_private.gradients_cleared_first())
            stack.enter_context(torch_private.no_reseeding(_refuse_reseeding))
            memory = {name: torch_private.memory_of(tensor) for name, tensor in given.items()}
            returned = self.step_fn(*batch, **kwargs)
            _check_memory(given, memory)
            self.cleared = [name for name, parameter in parameters.items() if id(parameter) in cleared]
            outputs = self._outputs(returned, given, parameters)
        self.predicates = predicates.guards
        self.results = [name for name, _ in outputs]
        return [value for _, value in outputs]

    def _batch(self, given: dict[str, torch.Tensor]) -> Any:
        leaves, spec = pytree.tree_flatten((self.batch, self.kwargs))
        return pytree.tree_unflatten([given.get(f"batch:{index}", leaf) for index, leaf in enumerate(leaves)], spec)

    def _swap_modules(self, stack: contextlib.ExitStack, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Put the fakes in the modules; returns the fake parameter of each `root:path`."""
        for root, module in self.state.modules.items():
            tensors = {
                item.source.split(":", 2)[2]: given[item.source]
                for item in self.inputs
                if item.role in ("parameter", "buffer") and item.source.split(":", 2)[1] == root
            }
            stack.enter_context(torch_private.reparametrized(module, tensors))
        parameters = {item.source.split(":", 1)[1]: given[item.source] for item in self.inputs if item.role == "parameter"}
        for name, parameter in parameters.items():
            parameter.grad = given.get(f"gradient:{name}")
        stack.callback(_forget_gradients, parameters)
        return parameters

    def _swap_optimizers(self, stack: contextlib.ExitStack, given: dict[str, torch.Tensor], parameters: dict[str, torch.Tensor]) -> None:
        for root, optimizer in self.state.optimizers.items():
            groups = live_groups(optimizer, root, self.hyper)
            stack.enter_context(_swapped(optimizer, root, groups, self.names, given, parameters))

    def _outputs(self, returned: Any, given: dict[str, torch.Tensor], parameters: dict[str, torch.Tensor]) -> list[tuple[str, Any]]:
        """What outlives the step: what it returns, gradients left, optimizer state that it made, buffers that it replaced."""
        leaves, self.spec = pytree.tree_flatten(returned)
        outputs: list[tuple[str, Any]] = []
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, (torch.Tensor, torch.SymFloat, torch.SymInt, torch.SymBool)):
                outputs.append((f"return:{index}", leaf.detach() if isinstance(leaf, torch.Tensor) else leaf))
            elif isinstance(leaf, float) and stand_in(leaf) in self.hyper.expressions:
                self.hypers[index] = self.hyper.expressions[stand_in(leaf)]
            elif isinstance(leaf, (int, float, str, bool, type(None), torch.dtype)):
                self.constants[index] = leaf
            else:
                raise CaptureError(
                    f"the step returns a {type(leaf).__name__}, which can't be a result of a compiled step",
                    "return tensors, numbers, or dicts and lists of these",
                )
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                outputs.append((f"gradient:{name}", parameter.grad))
        outputs += self._new_state(given, parameters)
        outputs += self._new_buffers(given)
        return outputs

    def _new_state(self, given: dict[str, torch.Tensor], parameters: dict[str, torch.Tensor]) -> Iterator[tuple[str, Any]]:
        for root, optimizer in self.state.optimizers.items():
            for name, parameter in parameters.items():
                for key, value in optimizer.state.get(parameter, {}).items():
                    source = f"optimizer:{root}:{name}:{key}"
                    if isinstance(value, torch.Tensor) and value is not given.get(source):
                        yield source, value

    def _new_buffers(self, given: dict[str, torch.Tensor]) -> Iterator[tuple[str, Any]]:
        for root, module in self.state.modules.items():
            for path, buffer in module.named_buffers():
                source = f"buffer:{root}:{path}"
                if buffer is not given.get(source):
                    yield source, buffer


def _refuse_reseeding(function: str) -> None:
    raise Unsupported(
        f"the step calls torch's {function} at {torch_private.user_line()}, which a compiled step would not do again",
        "seed before the step; and call no torch.utils.checkpoint in it: the solver chooses what is recomputed",
    )


def _check_memory(given: dict[str, torch.Tensor], memory: dict[str, Any]) -> None:
    """`p.data = ...` gives a tensor other memory, which leaves no op in the trace."""
    for source, tensor in given.items():
        if torch_private.memory_of(tensor) != memory[source]:
            name = ".".join(source.split(":")[1:])
            raise Unsupported(f"the step gives {name} other memory (`.data = ...`)", "write into it: with torch.no_grad(): p.copy_(...)")


def _forget_gradients(parameters: dict[str, torch.Tensor]) -> None:
    for parameter in parameters.values():
        parameter.grad = None


@contextlib.contextmanager
def _swapped(
    optimizer: torch.optim.Optimizer,
    root: str,
    groups: list[dict[str, Any]],
    names: dict[int, str],
    given: dict[str, torch.Tensor],
    parameters: dict[str, torch.Tensor],
) -> Iterator[None]:
    """The optimizer working on the given parameters, state and live hyper-parameters instead of its own."""
    own_state, own_groups = optimizer.state, [dict(group) for group in optimizer.param_groups]
    state: dict[Any, dict[str, Any]] = type(own_state)(dict) if hasattr(own_state, "default_factory") else {}
    for parameter, entries in own_state.items():
        name = names[id(parameter)]
        state[parameters[name]] = {key: given.get(f"optimizer:{root}:{name}:{key}", value) for key, value in entries.items()}
    optimizer.state = state
    for index, group in enumerate(optimizer.param_groups):
        tensors = {key: given[f"group:{root}:{index}:{key}"] for key in group if f"group:{root}:{index}:{key}" in given}
        group.update({**groups[index], **tensors, "params": [parameters[names[id(p)]] for p in group["params"]]})
    try:
        yield
    finally:
        optimizer.state = own_state
        for group, own in zip(optimizer.param_groups, own_groups, strict=True):
            group.clear()
            group.update(own)
