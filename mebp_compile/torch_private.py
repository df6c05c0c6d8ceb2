"""Every private or fragile torch and transformers API that this package uses, in one file, for torch 2.13.

`tests/test_torch_private.py` fails when one of them moves.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import operator
import traceback
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import proxy
from torch.fx.experimental import proxy_tensor
from torch.fx.traceback import annotate_fn, preserve_node_meta
from torch.nn.utils import stateless

from mebp_compile.errors import GraphError

CPU = torch.device("cpu")
FRAMES_KEPT = 3  # of the stack of each node


# --- fake tensors ---


def fake_mode() -> FakeTensorMode:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # brings sympy, 36 MB, which only a capture needs

    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())


def mode_of(fake: torch.Tensor) -> FakeTensorMode:
    """The mode that made a fake tensor."""
    assert isinstance(fake, FakeTensor)
    return fake.fake_mode


def fake_construction(mode: FakeTensorMode) -> contextlib.AbstractContextManager[Any]:
    return mode


def fake_tensor(mode: FakeTensorMode, tensor: torch.Tensor, device: torch.device = CPU) -> torch.Tensor:
    """A fake of a real tensor (sharing storage as the real ones do), or one on `device` of a meta tensor."""
    if tensor.device.type != "meta":
        grad = tensor.grad if tensor.is_leaf else None
        try:
            if grad is not None:
                tensor.grad = None
            return mode.from_tensor(tensor, static_shapes=True)
        finally:
            if grad is not None:
                tensor.grad = grad
    fake = FakeTensor(mode, tensor.detach(), device)
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def dense_fake(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    """A fake with the geometry of a real tensor and a storage of its own that is no larger than it needs."""
    with mode:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return fake.requires_grad_(tensor.requires_grad) if tensor.requires_grad else fake


def is_fake(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


# --- tracing ---


def data_dependent() -> type[Exception]:
    """What torch raises where Python branches on a value that is known only when the step runs."""
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    return GuardOnDataDependentSymNode


@contextlib.contextmanager
def annotated_modules(root: nn.Module, name: str) -> Iterator[None]:
    """Inside, every node traced in a module's forward carries the module's path in meta["custom"]["fqn"]."""
    with contextlib.ExitStack() as stack:
        for path, module in root.named_modules():
            own = module.__dict__.get("forward")
            module.forward = annotate_fn({"fqn": f"{name}.{path}" if path else name})(module.forward)  # type: ignore[method-assign]
            stack.callback(_restore_forward, module, own)
        yield


def _restore_forward(module: nn.Module, own: Any) -> None:
    if own is None:
        module.__dict__.pop("forward")
    else:
        module.forward = own  # type: ignore[method-assign]


@contextlib.contextmanager
def tracing_contexts(mode: FakeTensorMode) -> Iterator[None]:
    """All that a whole-step trace needs around it."""
    with contextlib.ExitStack() as stack:
        for context in (
            mode,
            tracing(TracingContext(mode)),
            preserve_node_meta(),
            torch.autograd.set_multithreading_enabled(False),
            torch.compiler._non_strict_tracing_context(),
            torch.compiler._patch_engine_backward(),
            _transformers_branch_as_in_eager(),
        ):
            stack.enter_context(context)
        yield


@contextlib.contextmanager
def _transformers_branch_as_in_eager() -> Iterator[None]:
    """transformers avoids asking for mask values under fake tensors; here the question is answered concretely, as in eager."""
    try:
        from transformers.utils import import_utils
    except ImportError:
        yield
        return
    with mock.patch.object(import_utils, "is_fake_tensor", return_value=False):
        yield


def make_fx(function: Callable[..., Any], fakes: list[torch.Tensor]) -> torch.fx.GraphModule:
    tracer = proxy_tensor.PythonKeyTracer
    with mock.patch.object(proxy, "CapturedTraceback", _UserFrames), mock.patch.object(tracer, "_filter_traceback_frames", _as_it_is):
        return proxy_tensor.make_fx(function, record_stack_traces=True)(*fakes)


class _UserFrames:
    """In the place of torch's traceback, which looks up every frame of every node (a quarter of a capture): the innermost frames outside torch and
    this package (torch's own filter keeps only those below a function named `forward`)."""

    extract = classmethod(lambda cls: cls())

    def summary(self) -> traceback.StackSummary:
        return traceback.StackSummary.from_list(list(itertools.islice(_user_frames(), FRAMES_KEPT))[::-1])


def _as_it_is(tracer: Any, frames: traceback.StackSummary) -> traceback.StackSummary:
    return frames


def _user_frames() -> Iterator[traceback.FrameSummary]:
    """The frames of the present call that belong to neither torch nor this package, the innermost first."""
    for frame, line in traceback.walk_stack(None):
        if _of_the_user(frame.f_code.co_filename):
            yield traceback.FrameSummary(frame.f_code.co_filename, line, frame.f_code.co_name, lookup_line=False)


def _of_the_user(filename: str) -> bool:
    return "/torch/" not in filename and "/mebp_compile/" not in filename


def reparametrized(module: nn.Module, tensors: dict[str, torch.Tensor]) -> contextlib.AbstractContextManager[Any]:
    return stateless._reparametrize_module(module, tensors, tie_weights=True)


@contextlib.contextmanager
def gradients_cleared_first() -> Iterator[set[int]]:
    """Collects the ids of the parameters that a zero_grad(set_to_none=True) clears before the first backward pass."""
    cleared: set[int] = set()
    started: list[bool] = []
    backward, optimizer_zero, module_zero = torch.autograd.backward, torch.optim.Optimizer.zero_grad, nn.Module.zero_grad

    def note(parameters: Any, set_to_none: bool) -> None:
        if not started and set_to_none:
            cleared.update(id(parameter) for parameter in parameters)

    def watched_backward(*args: Any, **kwargs: Any) -> Any:
        started.append(True)
        return backward(*args, **kwargs)

    def watched_optimizer(self: torch.optim.Optimizer, set_to_none: bool = True) -> None:
        note([parameter for group in self.param_groups for parameter in group["params"]], set_to_none)
        optimizer_zero(self, set_to_none)

    def watched_module(self: nn.Module, set_to_none: bool = True) -> None:
        note(self.parameters(), set_to_none)
        module_zero(self, set_to_none)

    with (
        mock.patch.object(torch.autograd, "backward", watched_backward),
        mock.patch.object(torch.optim.Optimizer, "zero_grad", watched_optimizer),
        mock.patch.object(nn.Module, "zero_grad", watched_module),
    ):
        yield cleared


@contextlib.contextmanager
def no_reseeding(refuse: Callable[[str], None]) -> Iterator[None]:
    """Inside, functions that set the state of torch's generator call `refuse` with their name: no op of a graph could do that again."""
    with contextlib.ExitStack() as stack:
        for name in ("manual_seed", "seed", "set_rng_state"):
            for owner in (torch, torch.random):
                stack.enter_context(mock.patch.object(owner, name, lambda *args, name=name, **kwargs: refuse(name)))
        yield


def memory_of(tensor: torch.Tensor) -> Any:
    """Which memory a tensor shows, and how."""
    return tensor.untyped_storage()._cdata, tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


def positional_count(function: Callable[..., Any]) -> int:
    return len(inspect.signature(function).parameters)


def is_symbolic(number: Any) -> bool:
    return isinstance(number, (torch.SymFloat, torch.SymInt, torch.SymBool))


def plain_number(number: Any) -> Any:
    """A symbolic number whose value is known after all (`0 * step`) as that value; anything else as it is."""
    if not isinstance(number, (torch.SymFloat, torch.SymInt)) or not number.node.expr.is_number:
        return number
    return float(number.node.expr) if isinstance(number, torch.SymFloat) else int(number.node.expr)


# --- looking into a trace in progress ---


def proxy_node(tensor: torch.Tensor) -> torch.fx.Node | None:
    """The fx node that made a tensor of the trace in progress, or None."""
    mode = proxy_tensor.get_proxy_mode()
    if mode is None:
        return None
    slot = proxy_tensor.get_proxy_slot(tensor, mode.tracer, None, lambda entry: entry)
    return getattr(getattr(slot, "proxy", None), "node", None)


@contextlib.contextmanager
def outside_tracing() -> Iterator[None]:
    """Real tensors behave as usual inside: no fake mode, no tracer."""
    with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
        yield


def constant_of(node: torch.fx.Node) -> torch.Tensor:
    """The real tensor behind a get_attr node of the trace in progress."""
    item: Any = node.graph.owning_module or proxy_tensor.get_proxy_mode().tracer.root  # type: ignore[union-attr]
    for part in str(node.target).split("."):
        item = getattr(item, part)
    return item


def is_random(target: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


def user_line() -> str:
    """`file:line` of the innermost frame that belongs to neither torch nor this package."""
    return next((f"{frame.filename}:{frame.lineno}" for frame in _user_frames()), "")


def raising_line(error: BaseException) -> str:
    """`file:line` of the innermost frame of the user's code (or of a model library) that an exception passed through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _of_the_user(frame.filename)]
    own = [frame for frame in frames if "site-packages" not in frame.filename and "<" not in frame.filename] or frames
    return f"{own[-1].filename}:{own[-1].lineno} ({own[-1].line})" if own else "an unknown line"


def node_line(node: torch.fx.Node) -> str:
    """The last user line of a node's recorded stack trace."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip().startswith("File")]
    own = [line for line in lines if "/torch/" not in line]
    return (own or lines or ["an unknown line"])[-1]


def multiplies_bfloat16() -> bool:
    """Whether torch has a fast product of bf16 matrices on this processor."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


# --- op schemas ---

GETITEM = operator.getitem
# Ops whose schema does not say that they write to an argument: position of the argument, and of the flag that decides.
SILENT_WRITES = {"aten.native_batch_norm.default": ((3, 4), 5)}


def target_name(target: Any) -> str:
    """`aten.mm.default`."""
    return str(target)


def is_multi_tensor(target: Any) -> bool:
    return target._opname.startswith(("_foreach_", "_fused_"))


def written_arguments(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.fx.Node]:
    """The fx nodes among an op's arguments that it modifies in place."""
    written: list[Any] = []
    for position, argument in enumerate(target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            written += list(given) if isinstance(given, (list, tuple)) else [given]
    positions, flag = SILENT_WRITES.get(target_name(target), ((), None))
    if flag is not None and args[flag]:
        written += [args[position] for position in positions]
    return [item for item in written if isinstance(item, torch.fx.Node)]


def viewed(target: Any, args: tuple[Any, ...]) -> Any:
    """The argument whose memory the results show, for an op that only ever makes views; None for any other."""
    if not isinstance(target, torch._ops.OpOverload) or not args:
        return None
    composite = target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    return args[0] if target is torch.ops.aten._unsafe_view.default or (target.is_view and not composite) else None


def draws_random_numbers(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the op advances the generator: its tag, except for attention without dropout, which carries the tag all the same."""
    if not is_random(target):
        return False
    for position, argument in enumerate(target._schema.arguments):
        if argument.name == "dropout_p":
            value = args[position] if position < len(args) else kwargs.get("dropout_p", argument.default_value)
            return bool(value)
    return True


def native_out_overload(target: Any) -> tuple[str, tuple[str, ...]] | None:
    """The out= overload of a functional op that has a CPU kernel of its own: (its name, the names of its out arguments)."""
    packet = getattr(getattr(torch.ops, target.namespace), target._opname)
    wanted = [(argument.name, str(argument.type)) for argument in target._schema.arguments]
    for name in packet.overloads():
        overload = getattr(packet, name)
        outs = [argument for argument in overload._schema.arguments if argument.is_out]
        plain = [(argument.name, str(argument.type)) for argument in overload._schema.arguments if not argument.is_out]
        if outs and plain == wanted and torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), "CPU"):
            return target_name(overload), tuple(argument.name for argument in outs)
    return None


def constant_name(item: Any) -> tuple[str, str]:
    """(kind, name) of a torch constant that can stand in a program: a dtype, device, layout or memory format."""
    for kind, cls in (("dtype", torch.dtype), ("device", torch.device), ("layout", torch.layout), ("memory_format", torch.memory_format)):
        if isinstance(item, cls):
            return kind, str(item).removeprefix("torch.")
    raise GraphError(f"an op takes a {type(item).__name__} ({item!r})", "report this step")


# --- tensors that leave memory ---


def exchange(tensor: torch.Tensor, other: torch.Tensor) -> None:
    """The two objects swap all but their identity: memory, geometry, device, gradient, hooks of autograd.

    `torch.utils.swap_tensors` does the same but refuses tensors with weak references, which a capture leaves behind on purpose.
    """
    torch._C._swap_tensor_impl(tensor, other)  # type: ignore[attr-defined]


def memory_is_shared(tensor: torch.Tensor) -> bool:
    """Whether a tensor that is another object (a view, a `.data`) keeps the memory of this one alive."""
    storage = tensor.untyped_storage()
    return bool(torch._C._storage_Use_Count(storage._cdata) > 2)  # type: ignore[attr-defined]  # the tensor and `storage` itself
