"""Every private torch and transformers API that the package uses still does what `torch_private` relies on; a failure here names the one
that moved.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from mebp_compile import torch_private as private

aten = torch.ops.aten
PACKAGE = Path(private.__file__).parent


def test_torch_is_the_version_this_was_written_for() -> None:
    """Private APIs are pinned to torch 2.13."""
    assert torch.__version__.startswith("2.13.")


def test_private_torch_names_stand_in_one_file() -> None:
    """No other file of the package imports a private module of torch, except for pytree and op types, which have no public name."""
    allowed = ("torch.utils._pytree", "torch.utils._python_dispatch", "torch._ops")
    for file in PACKAGE.rglob("*.py"):
        if file.name == "torch_private.py":
            continue
        for line in file.read_text().splitlines():
            code = line.split("#")[0]
            if re.search(r"torch\._[a-z]|torch\.\w+\._[a-z]|torch\.fx\.experimental", code):
                assert any(name in code for name in allowed), f"{file.name}: {line.strip()}"


def test_fakes_share_storage_as_the_real_tensors_do() -> None:
    """Views of one tensor become fakes of one storage; batch fakes have one of their own, no larger than needed."""
    mode = private.fake_mode()
    base = torch.ones(4, 6)
    whole, part = private.fake_tensor(mode, base), private.fake_tensor(mode, base[1])
    assert whole.untyped_storage()._cdata == part.untyped_storage()._cdata
    assert private.is_fake(whole)
    alone = private.dense_fake(mode, base[:, 1:3])
    assert alone.untyped_storage().nbytes() < base.untyped_storage().nbytes()
    assert alone.stride() == base[:, 1:3].stride()


def test_fakes_leave_gradients_alone() -> None:
    """Making a fake of a parameter keeps its gradient object."""
    parameter = nn.Parameter(torch.ones(2))
    grad = parameter.grad = torch.ones(2)
    private.fake_tensor(private.fake_mode(), parameter)
    assert parameter.grad is grad


def test_meta_parameters_become_cpu_fakes() -> None:
    """A parameter on meta is captured as if it lay in memory."""
    fake = private.fake_tensor(private.fake_mode(), nn.Parameter(torch.ones(2, device="meta")))
    assert fake.device.type == "cpu"
    assert isinstance(fake, nn.Parameter)


def traced(function: object, *inputs: torch.Tensor) -> torch.fx.GraphModule:
    mode = private.fake_mode()
    fakes = [private.fake_tensor(mode, tensor) for tensor in inputs]
    with private.tracing_contexts(mode):
        return private.make_fx(function, fakes)  # type: ignore[arg-type]


def test_a_trace_has_forward_backward_and_lines() -> None:
    """make_fx goes through backward(), marks its nodes, links them by sequence numbers and keeps the user's lines."""
    weight = nn.Parameter(torch.ones(3))

    def step(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        (weight * x).sin().sum().backward()
        return weight.grad  # type: ignore[return-value]

    nodes = {node.name: node for node in traced(step, weight, torch.ones(3)).graph.nodes}
    assert nodes["cos"].meta["autograd_backward"]
    assert nodes["cos"].meta["seq_nr"] == nodes["sin"].meta["seq_nr"]
    assert __file__ in private.node_line(nodes["sin"])


def test_modules_are_annotated_and_restored() -> None:
    """Nodes carry the path of their module; `forward` is put back, an instance's own one and after an exception too."""
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    own = net[1].forward
    net[1].forward = own  # type: ignore[method-assign]
    with private.annotated_modules(net, "net"):
        graph = traced(lambda x: net[1](x), torch.ones(2)).graph
    assert [node.meta["custom"]["fqn"] for node in graph.nodes if node.op == "call_function" and node.target is aten.relu.default] == [
        "net.1"
    ]
    assert "forward" not in vars(net)
    assert vars(net[1])["forward"] is own
    with pytest.raises(KeyError), private.annotated_modules(net, "net"):
        raise KeyError
    assert "forward" not in vars(net[0])


def test_gradients_cleared_before_backward_are_noticed() -> None:
    """zero_grad before the first backward is told from zero_grad after it; both patches are undone."""
    net = nn.Linear(2, 2)
    own = torch.optim.SGD(net.parameters(), lr=0.1)
    names = (torch.autograd.backward, torch.optim.Optimizer.zero_grad, nn.Module.zero_grad)
    with private.gradients_cleared_first() as cleared:
        net.zero_grad()
        net(torch.ones(2)).sum().backward()
    assert cleared == {id(parameter) for parameter in net.parameters()}
    with private.gradients_cleared_first() as cleared:
        net(torch.ones(2)).sum().backward()
        own.zero_grad()
    assert not cleared
    assert (torch.autograd.backward, torch.optim.Optimizer.zero_grad, nn.Module.zero_grad) == names


def test_symbolic_numbers_that_are_known_become_plain() -> None:
    """`item()` gives a symbolic number under the tracer; times zero it is known."""
    seen = []

    def step(x: torch.Tensor) -> torch.Tensor:
        number = x.item()
        seen.append((private.is_symbolic(number), private.is_symbolic(private.plain_number(number)), private.plain_number(number * 0)))
        return x + number

    traced(step, torch.ones(()))
    assert seen == [(True, True, 0.0)]


def test_questions_outside_the_trace() -> None:
    """Inside `outside_tracing` real tensors compute as usual, and the node of a traced tensor can be asked for."""
    found = []

    def step(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        found.append(private.proxy_node(y))
        with private.outside_tracing():
            found.append(float(torch.ones(2).sum()))
        return y

    traced(step, torch.ones(2))
    assert found[0].target is aten.mul.Tensor
    assert found[1] == 2.0
    assert private.proxy_node(torch.ones(1)) is None


def test_transformers_asks_for_mask_values_under_the_tracer() -> None:
    """The name that is patched so that transformers branches on masks as in eager exists."""
    from transformers.utils import import_utils

    assert callable(import_utils.is_fake_tensor)


@pytest.mark.parametrize(
    ("target", "dropout", "draws"),
    [
        (aten.bernoulli_.float, None, True),
        (aten.native_dropout.default, None, True),
        (aten._scaled_dot_product_flash_attention_for_cpu.default, 0.0, False),
        (aten._scaled_dot_product_flash_attention_for_cpu.default, 0.5, True),
        (aten.mm.default, None, False),
    ],
)
def test_random_draws(target: torch._ops.OpOverload, dropout: float | None, draws: bool) -> None:
    """The tag of random ops, and the dropout probability of attention that carries it without drawing."""
    args = (None, None, None, dropout) if dropout is not None else ()
    assert private.draws_random_numbers(target, args, {}) is draws


def test_written_arguments() -> None:
    """Schemas tell which arguments an op writes, lists and out arguments included; batch norm's running statistics are known to be
    silent.
    """
    graph = torch.fx.Graph()
    a, b, c = graph.placeholder("a"), graph.placeholder("b"), graph.placeholder("c")
    assert private.written_arguments(aten.add_.Tensor, (a, b), {}) == [a]
    assert private.written_arguments(aten.add.out, (a, b), {"out": c}) == [c]
    assert private.written_arguments(aten._foreach_add_.List, ([a, b], [c, c]), {}) == [a, b]
    assert private.written_arguments(aten.add.Tensor, (a, b), {}) == []
    norm = aten.native_batch_norm.default
    assert private.written_arguments(norm, (a, None, None, b, c, True, 0.1, 1e-5), {}) == [b, c]
    assert private.written_arguments(norm, (a, None, None, b, c, False, 0.1, 1e-5), {}) == []


def test_silent_writers_are_the_known_ones() -> None:
    """Batch norm in training mode changes its statistics although its schema does not say so."""
    mean, variance = torch.zeros(3), torch.ones(3)
    assert not any(argument.alias_info for argument in aten.native_batch_norm.default._schema.arguments)
    torch.native_batch_norm(torch.randn(4, 3), None, None, mean, variance, True, 0.1, 1e-5)
    assert mean.abs().sum() > 0


def test_out_kernels_are_found() -> None:
    """The out= overload with a CPU kernel of its own, by the functional op's arguments; ops without one give None."""
    assert private.native_out_overload(aten.mm.default) == ("aten.mm.out", ("out",))
    assert private.native_out_overload(aten.add.Tensor) == ("aten.add.out", ("out",))
    assert (
        private.native_out_overload(aten.native_layer_norm.default) is None
        or private.native_out_overload(aten.native_layer_norm.default)[1]
    )
    assert private.native_out_overload(aten._scaled_dot_product_flash_attention_for_cpu.default) is None


def test_constants_have_names() -> None:
    """Dtypes, devices, layouts and memory formats as they stand in a program."""
    assert private.constant_name(torch.bfloat16) == ("dtype", "bfloat16")
    assert private.constant_name(torch.device("cpu")) == ("device", "cpu")
    assert private.constant_name(torch.strided) == ("layout", "strided")
    assert private.constant_name(torch.preserve_format) == ("memory_format", "preserve_format")
    with pytest.raises(Exception, match="an op takes a"):
        private.constant_name(object())


def test_multi_tensor_ops_are_told_by_name() -> None:
    """Foreach and fused ops."""
    assert private.is_multi_tensor(aten._foreach_add_.List)
    assert private.is_multi_tensor(aten._fused_adamw_.default)
    assert not private.is_multi_tensor(aten.add.Tensor)
