"""What capture can't do exactly is refused, with the line and the fix, and leaves the user's objects as they were."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from law1 import estimated_costs, snapshot
from models import OPTIMIZERS, Recipe, Training
from torch import nn

from mebp_compile.compiler import optimize
from mebp_compile.errors import BudgetInfeasible, CaptureError, ClosureChanged, DataDependentBranch, MebpError, UndeclaredState, Unsupported

Body = Callable[[nn.Module, torch.optim.Optimizer, torch.Tensor, torch.Tensor], Any]


def small(body: Body, optimizer: str = "adamw", dtype: torch.dtype = torch.float32) -> Training:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
    own = OPTIMIZERS[optimizer](list(net.parameters()))
    return Training([net], [own], lambda x, y: body(net, own, x, y), lambda call: (torch.randn(4, 8).to(dtype), torch.tensor([0, 1, 2, 3])))


def loss_of(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    loss = nn.functional.cross_entropy(net(x), y)
    loss.backward()
    return loss


def refused(
    training: Training, error: type[MebpError], *words: str, step: Callable[..., Any] | None = None, state: Any = None
) -> MebpError:
    """Check that the step is refused with these words, and that nothing of the user's is changed by that."""
    batch = training.batch(0)
    before, drawn, python = snapshot(training), torch.get_rng_state(), (random.getstate(), repr(np.random.get_state()))
    with pytest.raises(error) as caught:
        optimize(step or training.step, "1GB", effort="fast", cache=False, state=state).prepare(*batch)
    for word in words:
        assert word in str(caught.value)
    assert caught.value.fix
    assert snapshot(training) == before
    assert all(not optimizer.state or all(optimizer.state.values()) for optimizer in training.optimizers)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert (random.getstate(), repr(np.random.get_state())) == python
    assert not any("forward" in vars(module) for top in training.modules for module in top.modules())
    return caught.value


def test_a_scheduler_stepped_inside_is_refused() -> None:
    """scheduler.step() inside the step would happen once, while tracing; the scheduler is put back."""

    def body(net: nn.Module, own: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = loss_of(net, x, y)
        own.step()
        scheduler.step()
        return loss

    training = small(body)
    scheduler = torch.optim.lr_scheduler.LinearLR(training.optimizers[0], total_iters=5)
    before = copy.deepcopy(scheduler.state_dict())
    refused(training, ClosureChanged, "scheduler", "outside the step", __file__)
    assert scheduler.state_dict() == before


def test_a_scheduler_asked_inside_is_refused() -> None:
    """get_last_lr() inside the step would be asked once."""

    def body(net: nn.Module, own: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> Any:
        return loss_of(net, x, y), scheduler.get_last_lr()[0]

    training = small(body)
    scheduler = torch.optim.lr_scheduler.LinearLR(training.optimizers[0], total_iters=5)
    refused(training, Unsupported, "param_groups")


@pytest.mark.parametrize(
    "draw",
    [random.random, lambda: float(np.random.rand()), lambda: OWN_RANDOM.random(), lambda: float(OWN_GENERATOR.random())],
    ids=["random", "numpy", "random.Random", "numpy generator"],
)
def test_python_randomness_is_refused(draw: Callable[[], float]) -> None:
    """Numbers from Python's and numpy's generators would be drawn once; the generators are put back."""

    def body(net: nn.Module, own: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return loss_of(net, x * draw(), y)

    own_states = (OWN_RANDOM.getstate(), repr(OWN_GENERATOR.bit_generator.state))
    refused(small(body), ClosureChanged, "drew from", "pass them in the batch")
    assert (OWN_RANDOM.getstate(), repr(OWN_GENERATOR.bit_generator.state)) == own_states


OWN_RANDOM = random.Random(0)
OWN_GENERATOR = np.random.default_rng(0)


def test_numpy_randomness_that_wraps_around_is_refused() -> None:
    """A draw that brings numpy's position in its state back to where it was is noticed by the state's words."""

    def body(net: nn.Module, own: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return loss_of(net, x * float(np.random.randint(0, 2, size=624, dtype=np.int64).sum()), y)

    refused(small(body), ClosureChanged, "numpy.random")


@pytest.mark.parametrize("ask", [lambda loss: torch.isnan(loss), lambda loss: loss.item() > 2.0, lambda loss: float(loss) < 1.0])
def test_branches_on_tensor_values_are_refused(ask: Callable[[torch.Tensor], Any]) -> None:
    """`if torch.isnan(loss)` names its line."""

    def body(net: nn.Module, own: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = loss_of(net, x, y)
        if ask(loss):
            loss = loss * 0
        own.step()
        return loss

    refused(small(body), DataDependentBranch, "branches on the value", __file__, "torch.where")


@pytest.mark.parametrize("name", ["radam", "asgd"])
def test_optimizers_that_branch_on_tensors_are_refused(name: str) -> None:
    """RAdam and ASGD decide in Python on their step counters."""

    def body(net: nn.Module, own: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = loss_of(net, x, y)
        own.step()
        return loss

    refused(small(body, name), DataDependentBranch, __file__)


def test_undeclared_parameters_are_refused() -> None:
    """A bare parameter in the closure, and an optimizer over parameters of a module that the step doesn't reach."""
    extra = nn.Parameter(torch.ones(8))

    def body(net: nn.Module, own: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return loss_of(net, x * extra, y)

    refused(small(body), UndeclaredState, "state=[")
    elsewhere = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)

    def other(net: nn.Module, own: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = loss_of(net, x, y)
        elsewhere.step()
        return loss

    refused(small(other), UndeclaredState, "elsewhere", "state=[")


def test_a_module_that_the_search_misses_must_be_declared() -> None:
    """With state=[...] naming only the optimizer, the model's parameters are undeclared; naming both, the step is captured."""
    training = small(lambda net, own, x, y: loss_of(net, x, y))
    refused(training, UndeclaredState, "state=[", state=[training.optimizers[0]])
    optimize(training.step, "1GB", effort="fast", cache=False, state=[*training.modules, *training.optimizers]).prepare(*training.batch(0))


def test_ddp_is_refused() -> None:
    """A DistributedDataParallel wrapper, whose communication a capture would lose."""
    training = small(lambda net, own, x, y: loss_of(net, x, y))

    class Wrapped(nn.parallel.DistributedDataParallel):
        def __init__(self, module: nn.Module) -> None:
            nn.Module.__init__(self)
            self.module = module

    wrapper = Wrapped(training.modules[0])
    refused(training, Unsupported, "Wrapped", ".module", step=lambda x, y: loss_of(wrapper, x, y))


def test_checkpointing_left_on_is_refused() -> None:
    """HF gradient checkpointing would fix the recompute that the solver is to choose."""
    training = Recipe("qwen2").build()
    training.modules[0].activation_checkpointing_enable()  # type: ignore[operator]
    refused(training, Unsupported, "gradient_checkpointing_disable()")


class Counter:
    total = 0


@pytest.mark.parametrize("kind", ["cell", "list", "dict", "attribute", "global", "module"])
def test_changed_closures_are_refused(kind: str) -> None:
    """A counter, a log or an attribute that the step changes would change once; it is put back."""
    count, log, table, counter = 0, ["kept"], {"n": 1}, Counter()

    def body(net: nn.Module, own: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        nonlocal count
        global TALLY
        loss = loss_of(net, x, y)
        if kind == "cell":
            count += 1
        elif kind == "list":
            log.append(loss)  # type: ignore[arg-type]
        elif kind == "dict":
            table["n"] += 1
        elif kind == "attribute":
            counter.total += 1
        elif kind == "global":
            TALLY += 1
        else:
            net.calls += 1  # type: ignore[operator, assignment]
        return loss

    training = small(body)
    training.modules[0].calls = 0  # type: ignore[assignment]
    counter.total = 0
    refused(training, ClosureChanged, "changed", "outside the step")
    assert (count, log, table, counter.total, TALLY, training.modules[0].calls) == (0, ["kept"], {"n": 1}, 0, 0, 0)


TALLY = 0


def test_train_switched_inside_the_step_is_refused() -> None:
    """A step that leaves the model in another mode."""
    training = small(lambda net, own, x, y: loss_of(net.eval(), x, y))
    refused(training, ClosureChanged, "train()")
    assert training.modules[0].training


def test_lost_hyper_parameters_are_refused() -> None:
    """A learning rate that passes through numpy would be baked in: noticed by tracing with two stand-ins."""

    def body(net: nn.Module, own: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = loss_of(net, x, y)
        rate = float(np.sqrt(own.param_groups[0]["lr"]))
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.sub_(parameter.grad, alpha=rate)  # type: ignore[arg-type]
        return loss

    refused(small(body, "sgd"), Unsupported, "hyper-parameter", __file__)


def test_hyper_parameters_lost_in_rounding_are_refused() -> None:
    """Rprop writes its factors into bfloat16 constants, where they can't be told apart any more."""

    def body(net: nn.Module, own: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = loss_of(net, x, y)
        own.step()
        own.zero_grad()
        return loss

    refused(small(body, "rprop", torch.bfloat16), Unsupported, "hyper-parameter")


def test_writing_into_the_batch_is_refused() -> None:
    """An in-place op on a batch tensor."""
    refused(small(lambda net, own, x, y: loss_of(net, x.mul_(2), y)), Unsupported, "batch", "clone")


@pytest.mark.parametrize("kind", ["manual_seed", "set_rng_state", "checkpoint"])
def test_reseeding_is_refused(kind: str) -> None:
    """Setting torch's generator inside the step; torch.utils.checkpoint does it to replay dropout, which the trace would lose."""
    from torch.utils.checkpoint import checkpoint

    state = torch.get_rng_state()

    def body(net: nn.Module, own: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if kind == "manual_seed":
            torch.manual_seed(0)
        elif kind == "set_rng_state":
            torch.set_rng_state(state)
        loss = nn.functional.cross_entropy(checkpoint(net, x, use_reentrant=False) if kind == "checkpoint" else net(x), y)
        loss.backward()
        return loss

    refused(small(body), Unsupported, "set_rng_state" if kind == "checkpoint" else kind, "seed before the step")


def test_generators_of_the_users_own_are_refused() -> None:
    """A torch.Generator passed to an op."""
    own_generator = torch.Generator().manual_seed(0)
    refused(
        small(lambda net, own, x, y: loss_of(net, x + torch.randn(x.shape, generator=own_generator), y)),
        Unsupported,
        "Generator",
        "default generator",
    )


def test_recurrent_layers_of_mkldnn_are_refused() -> None:
    """mkldnn's LSTM keeps what its backward pass needs out of sight."""
    torch.manual_seed(0)
    lstm = nn.LSTM(8, 8)
    training = small(lambda net, own, x, y: loss_of(net, lstm(x[None])[0][0], y))
    refused(training, Unsupported, "mkldnn_rnn_layer", "mkldnn.flags(enabled=False)")


def test_replaced_data_is_refused() -> None:
    """`p.data = ...` leaves no op in the trace."""

    def body(net: nn.Module, own: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = loss_of(net, x, y)
        for parameter in net.parameters():
            parameter.data = parameter.data * 0.5
        return loss

    refused(small(body), Unsupported, "0.weight", "copy_")


def test_a_tensor_kept_in_a_module_is_refused() -> None:
    """`module.last = loss` would keep the first one for ever, whether or not the attribute held a tensor before."""

    def body(net: nn.Module, own: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = loss_of(net, x, y)
        net.last = loss.detach()
        return loss

    training = small(body)
    for before in (None, torch.zeros(())):
        training.modules[0].last = before  # type: ignore[assignment]
        refused(training, ClosureChanged, "last")
        assert training.modules[0].last is before


def test_odd_results_are_refused() -> None:
    """A step that returns an object of the user's own."""
    refused(small(lambda net, own, x, y: [loss_of(net, x, y), Counter()]), CaptureError, "Counter", "return tensors")


def test_an_error_of_the_step_names_its_line() -> None:
    """A step that raises while it is traced: the error names the line, and the model is as it was."""

    def body(net: nn.Module, own: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return loss_of(net, x.reshape(3, 5), y)

    error = refused(small(body), CaptureError, "while the step was traced", __file__)
    assert error.__cause__ is not None


def test_an_infeasible_budget_leaves_no_trace() -> None:
    """A budget that is refused after the capture takes the optimizer's fresh state away again."""

    def body(net: nn.Module, own: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = loss_of(net, x, y)
        own.step()
        return loss

    training = small(body)
    before = snapshot(training)
    with pytest.raises(BudgetInfeasible), estimated_costs():
        optimize(training.step, 1000, effort="fast", cache=False).prepare(*training.batch(0))
    assert snapshot(training) == before
    assert not training.optimizers[0].state


def test_no_callable_is_refused() -> None:
    """Something that is not a step at all."""
    with pytest.raises(MebpError, match="not a callable"):
        optimize(3, "1GB")  # type: ignore[arg-type]
