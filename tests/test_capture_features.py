"""Law 1 for the ways in which people write a step: optimizers, gradients, schedulers, callables, results, buffers, masks, constants."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from law1 import assert_same_training, estimated_costs, run_both, snapshot
from models import OPTIMIZERS, Recipe, Training
from torch import nn

from mebp_compile.capture import capture, find_state
from mebp_compile.compiler import optimize
from mebp_compile.lower import lower

REFUSED = ("radam", "asgd")


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))


def numbers(call: int, rows: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(call)
    return torch.randn(rows, 8, generator=generator), torch.randint(0, 4, (rows,), generator=generator)


def training(
    body: Callable[[nn.Module, torch.optim.Optimizer, torch.Tensor, torch.Tensor], Any],
    optimizer: str = "adamw",
    model: Callable[[], nn.Module] = mlp,
    between: Callable[[nn.Module, torch.optim.Optimizer, int], None] = lambda *_: None,
    batch: Callable[[int], tuple[Any, ...]] = numbers,
) -> Callable[[], Training]:
    """A maker of small trainings whose step is `body(model, optimizer, x, y)`."""

    def make() -> Training:
        net = model()
        own = OPTIMIZERS[optimizer](list(net.parameters()))
        return Training([net], [own], lambda x, y: body(net, own, x, y), batch, lambda call: between(net, own, call))

    return make


def usual(net: nn.Module, own: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    loss = nn.functional.cross_entropy(net(x), y)
    loss.backward()
    own.step()
    own.zero_grad()
    return loss


# --- optimizers and gradients ---


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in REFUSED])
def test_optimizers_are_bit_equal(name: str) -> None:
    """Every optimizer of torch.optim that doesn't branch on tensor values, from the step that makes its state on."""
    assert_same_training(training(usual, name), calls=4)


@pytest.mark.parametrize("name", ["adamw", "adamw-foreach", "adamw-fused", "sgd-momentum", "sgd-foreach", "adagrad"])
def test_optimizers_are_bit_equal_in_bfloat16(name: str) -> None:
    """The same for parameters in bfloat16, whose one-element tensors of hyper-parameters round."""

    def model() -> nn.Module:
        return mlp().to(torch.bfloat16)

    def half(net: nn.Module, own: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return usual(net, own, x.to(torch.bfloat16), y)

    assert_same_training(training(half, name, model), calls=3)


@pytest.mark.parametrize(("zero", "set_to_none"), [("first", True), ("first", False), ("last", False), ("never", True)])
def test_gradients_across_calls_are_bit_equal(zero: str, set_to_none: bool) -> None:
    """zero_grad first, last or never (gradients then accumulate in `.grad`), to None or to zeros."""
    assert_same_training(Recipe("gpt2", optimizer="sgd", zero=zero, set_to_none=set_to_none).build)


def test_forward_and_backward_alone_are_bit_equal() -> None:
    """A step without an optimizer leaves gradients, and adds to those of the calls before."""

    def body(net: nn.Module, own: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        return loss

    assert_same_training(training(body))


def test_clipping_is_bit_equal() -> None:
    """clip_grad_norm_ over all gradients before the update, and its norm returned."""

    def body(net: nn.Module, own: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> Any:
        own.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        nn.utils.clip_grad_value_(net.parameters(), 0.05)
        own.step()
        return norm

    assert_same_training(training(body))


def test_accumulation_inside_the_step_is_bit_equal() -> None:
    """Two micro-batches whose gradients add up before one update."""
    assert_same_training(Recipe("llama", micro_batches=2, optimizer="sgd").build, calls=2)


def test_two_optimizers_and_two_models_are_bit_equal() -> None:
    """A step that trains two modules with an optimizer each, one of them twice."""

    def make() -> Training:
        first, second = mlp(0), mlp(1)
        own = torch.optim.AdamW(first.parameters(), lr=1e-3)
        other = torch.optim.SGD([{"params": second[0].parameters(), "lr": 0.1}, {"params": second[2].parameters()}], lr=0.01, momentum=0.9)

        def step(x: torch.Tensor, y: torch.Tensor) -> Any:
            loss = nn.functional.mse_loss(first(x), second(x).detach())
            loss.backward()
            own.step()
            reverse = nn.functional.mse_loss(second(x), first(x).detach())
            reverse.backward()
            own.zero_grad()
            other.step()
            other.zero_grad()
            return loss, reverse

        return Training([first, second], [own, other], step, numbers)

    assert_same_training(make)


def test_frozen_and_unused_parameters_are_bit_equal() -> None:
    """Parameters with requires_grad False, and ones that the step never uses, stay as they are and get no gradient."""

    def model() -> nn.Module:
        net = mlp()
        net[0].weight.requires_grad_(False)
        net.register_parameter("unused", nn.Parameter(torch.ones(3)))
        return net

    def body(net: nn.Module, own: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = x
        for layer in net.children():
            hidden = layer(hidden)
        loss = nn.functional.cross_entropy(hidden, y)
        loss.backward()
        own.step()
        own.zero_grad()
        return loss

    assert_same_training(training(body, model=model))


# --- hyper-parameters ---

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "linear": lambda own: torch.optim.lr_scheduler.LinearLR(own, start_factor=0.1, total_iters=3),
    "cosine": lambda own: torch.optim.lr_scheduler.CosineAnnealingLR(own, T_max=4),
    "one-cycle": lambda own: torch.optim.lr_scheduler.OneCycleLR(own, max_lr=0.01, total_steps=6),
    "lambda-from-zero": lambda own: torch.optim.lr_scheduler.LambdaLR(own, lambda epoch: epoch / 4),
}


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-foreach", "adamw-fused", "adamw-tensor-lr", "sgd-momentum"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_outside_the_step_are_bit_equal(scheduler: str, optimizer: str) -> None:
    """A scheduler stepped between calls moves the learning rate (OneCycleLR: the betas or momentum too) of the compiled step."""

    def make() -> Training:
        net = mlp()
        own = OPTIMIZERS[optimizer](list(net.parameters()))
        schedule = SCHEDULERS[scheduler](own)
        return Training([net], [own], lambda x, y: usual(net, own, x, y), numbers, lambda call: schedule.step())

    compiled = assert_same_training(make, calls=5)
    assert sum(map(len, compiled.programs.values())) <= (2 if scheduler == "lambda-from-zero" else 1) + (optimizer == "sgd-momentum")


def test_weight_decay_switched_on_between_calls_is_bit_equal() -> None:
    """A hyper-parameter that an optimizer branches on is a guard: another value of the branch is captured anew."""

    def between(net: nn.Module, own: torch.optim.Optimizer, call: int) -> None:
        own.param_groups[0]["weight_decay"] = (0.0, 0.1, 0.2, 0.0, 0.3)[call]

    compiled = assert_same_training(training(usual, "adam-l2", between=between), calls=5)
    assert sum(map(len, compiled.programs.values())) == 2


def test_hyper_parameters_read_by_the_step_are_live() -> None:
    """A learning rate that the step reads itself (also through math.sqrt) and returns follows its changes."""
    import math

    def body(net: nn.Module, own: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> Any:
        rate = own.param_groups[0]["lr"]
        loss = nn.functional.cross_entropy(net(x), y) * math.sqrt(rate) + rate**2
        loss.backward()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.sub_(parameter.grad, alpha=rate)
                parameter.grad = None
        return loss, rate, -rate

    def between(net: nn.Module, own: torch.optim.Optimizer, call: int) -> None:
        own.param_groups[0]["lr"] *= 0.7

    compiled = assert_same_training(training(body, "sgd", between=between), calls=3)
    assert sum(map(len, compiled.programs.values())) == 1


# --- Python values, callables, results ---


def test_a_closure_value_changed_between_calls_is_followed() -> None:
    """A plain value in the step's closure is a guard: the step is captured anew when the caller changes it."""

    def make() -> Training:
        net, knob = mlp(), {"scale": 1.0}
        own = OPTIMIZERS["sgd"](net.parameters())

        def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            loss = nn.functional.cross_entropy(net(x), y) * knob["scale"]
            loss.backward()
            own.step()
            own.zero_grad()
            return loss

        return Training([net], [own], step, numbers, lambda call: knob.update(scale=2.0))

    compiled = assert_same_training(make, calls=3)
    assert sum(map(len, compiled.programs.values())) == 2


def test_a_module_attribute_changed_between_calls_is_followed() -> None:
    """`dropout.p` set by the caller between calls is seen."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 4))

    def between(net: nn.Module, own: torch.optim.Optimizer, call: int) -> None:
        net[1].p = 0.25

    assert_same_training(training(usual, "sgd", model, between), calls=3)


def test_train_and_eval_between_calls_are_followed() -> None:
    """Switching between train() and eval() outside the step gives another program each, and the first one again."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))

    def between(net: nn.Module, own: torch.optim.Optimizer, call: int) -> None:
        net.train(call % 2 == 1)

    compiled = assert_same_training(training(usual, "sgd", model, between), calls=4)
    assert sum(map(len, compiled.programs.values())) == 2


def test_tensors_held_by_the_closure_are_live() -> None:
    """A tensor of the step's closure is read, and written, where the user keeps it."""

    def make() -> Training:
        net, weights, totals = mlp(), torch.tensor([1.0, 2.0, 0.5, 1.0]), {"loss": torch.zeros(())}
        own = OPTIMIZERS["sgd"](net.parameters())

        def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            loss = nn.functional.cross_entropy(net(x), y, weight=weights)
            loss.backward()
            own.step()
            own.zero_grad()
            totals["loss"].add_(loss.detach())
            return totals["loss"].clone()

        def between(call: int) -> None:
            weights.mul_(1.5)

        return Training([net], [own], step, numbers, between)

    assert_same_training(make)


class Trainer:
    """A step as a bound method, with what it needs in attributes."""

    def __init__(self) -> None:
        self.net = mlp()
        self.own = OPTIMIZERS["adamw"](self.net.parameters())
        self.steps_done = 0

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(x), y)

    def step(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = self.loss(x, y)
        loss.backward()
        self.own.step()
        self.own.zero_grad()
        return loss

    __call__ = step


def _count(trainer: Trainer, call: int) -> None:
    trainer.steps_done += 1


@pytest.mark.parametrize("kind", ["method", "callable", "partial", "lambda"])
def test_callables_are_bit_equal(kind: str) -> None:
    """Bound methods, callable objects, partials and lambdas; a counter that the step doesn't read costs no new capture."""

    def make() -> Training:
        trainer = Trainer()
        step = {
            "method": trainer.step,
            "callable": trainer,
            "partial": functools.partial(usual, trainer.net, trainer.own),
            "lambda": lambda x, y: trainer.step(x, y),
        }[kind]
        return Training([trainer.net], [trainer.own], step, numbers, lambda call: _count(trainer, call))

    compiled = assert_same_training(make)
    assert sum(map(len, compiled.programs.values())) == 1


@pytest.mark.parametrize(("family", "returns"), [("llama", "item"), ("llama", "output"), ("llama", "dict"), ("vit", "output")])
def test_results_keep_their_form(family: str, returns: str) -> None:
    """Losses, `.item()` numbers, HF outputs and nested dicts with constants come back as they would."""
    assert_same_training(Recipe(family, returns=returns, optimizer="sgd").build, calls=2)


def test_other_batch_shapes_are_planned_anew() -> None:
    """A longer batch gets a program of its own; the first one is used again afterwards."""
    compiled = assert_same_training(training(usual, batch=lambda call: numbers(call, rows=4 + call % 2)), calls=4)
    assert sum(map(len, compiled.programs.values())) == 2


def test_batches_that_share_memory_are_bit_equal() -> None:
    """Slices of one data set, views of one tensor, and the same tensor passed twice are told apart by what they hold."""
    data = torch.randn(12, 9, generator=torch.Generator().manual_seed(0))

    def body(net: nn.Module, own: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = (net(x) - y[:, :4]).square().mean()
        loss.backward()
        own.step()
        own.zero_grad()
        return loss

    def batch(call: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = data[4 * (call % 2) : 4 * (call % 2) + 4]
        return (rows[:, :-1], rows[:, 1:]) if call != 2 else (rows[:, :-1], rows[:, :-1])

    assert_same_training(training(body, batch=batch), calls=4)


def test_keyword_arguments_and_plain_arguments() -> None:
    """Keyword arguments, nested batches and plain numbers; True and 1 are different batches."""
    net, other = mlp(), mlp()

    def maker(module: nn.Module) -> Callable[..., Any]:
        def step(batch: dict[str, torch.Tensor], *, scale: Any) -> Any:
            loss = nn.functional.cross_entropy(module(batch["x"]), batch["y"]) * (2.0 if scale is True else 3.0)
            loss.backward()
            return loss

        return step

    own, compiled = maker(net), optimize(maker(other), "1GB", effort="fast", cache=False)
    with estimated_costs():
        for scale in (True, 1, True):
            x, y = numbers(0)
            assert torch.equal(own({"x": x, "y": y}, scale=scale), compiled({"x": x, "y": y}, scale=scale))
    assert sum(map(len, compiled.programs.values())) >= 2


# --- masks ---


def test_an_all_ones_mask_gives_the_graph_without_a_mask() -> None:
    """The padding question is asked of the real batch: a full mask leaves no trace in the graph."""
    shapes = []
    for mask in (None, "ones", "padded"):
        training = Recipe("qwen2", mask=mask, optimizer="sgd").build()
        traced = capture(training.step, find_state(training.step), training.batch(0), {})
        shapes.append([op.target for op in lower(traced).ops])
    assert shapes[0] == shapes[1]
    assert shapes[1] != shapes[2]


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_a_batch_with_padding_is_planned_anew(family: str) -> None:
    """After batches without padding comes one with: the guard fails, another program is made, and both stay in use."""
    recipe = Recipe(family, optimizer="sgd")

    def make() -> Training:
        built = recipe.build()
        built.batch = lambda call: recipe.but(mask="padded" if call % 2 else "ones").batch(call)
        return built

    compiled = assert_same_training(make, calls=4)
    assert sum(map(len, compiled.programs.values())) == 2


# --- odd modules ---


class Scaled(torch.autograd.Function):
    """x * 2 whose gradient is three times too large: a custom backward pass can be told from the derived one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return grad * 6 + 0 * x


class Odd(nn.Module):
    """Constants, in-place ops on views, multi-output views, a replaced buffer, a mutated buffer, and a custom Function."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 12)
        self.head = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second, third = self.inner(x).split(4, dim=-1)
        mixed = (first * torch.tensor([1.0, -0.5, 0.25, 2.0])).clone()
        mixed[:, 1:3].mul_(2.0)
        mixed[:, 0] += second[:, 0]
        rows = torch.stack([row * (index + 1) for index, row in enumerate(mixed.unbind(0))])
        left, right = third.chunk(2, dim=-1)
        (only,) = third[:1].unbind(0)  # lists of one
        (whole,) = third.split(4, dim=-1)
        left = left + only[0] * whole[0, 1]
        joined = Scaled.apply(rows + torch.cat([right, left], dim=-1).expand(1, -1, -1).squeeze(0))
        self.seen.add_(1)
        self.mean = 0.9 * self.mean + 0.1 * joined.detach().mean(0)
        windows = joined.as_strided((joined.shape[0], 2, 2), (4, 2, 1)).transpose(1, 2).reshape(-1, 4)
        return self.head(windows.masked_fill(windows > 3, float("-0.0")))


def test_odd_modules_are_bit_equal() -> None:
    """Everything that `Odd` does, over several steps."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        return Odd()

    assert_same_training(training(usual, model=model))


def test_not_a_number_and_negative_zero_survive() -> None:
    """NaN and -0.0 in losses, gradients and parameters are the same bytes."""

    def body(net: nn.Module, own: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> Any:
        loss = nn.functional.cross_entropy(net(x), y) + torch.log(x[0, 0] * 0 - 1)
        loss.backward()
        own.step()
        return loss, -(x * 0)

    assert_same_training(training(body, "sgd"))


def recurrent() -> nn.Module:
    """A GRU and an LSTM with dropout between its layers, which list their weights again whenever these are swapped."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(8, 8)
            self.lstm = nn.LSTM(8, 8, 2, dropout=0.1)
            self.head = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.lstm(self.gru(x[None])[0])[0][0])

    torch.manual_seed(0)
    return Recurrent()


def parametrized() -> nn.Module:
    """Weights that are computed from others at each use, with a power iteration in buffers."""
    torch.manual_seed(0)
    wrap = nn.utils.parametrizations
    return nn.Sequential(wrap.weight_norm(nn.Linear(8, 8)), wrap.spectral_norm(nn.Linear(8, 4)))


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # torch's own, from reading the mkldnn flags
@pytest.mark.parametrize("model", [recurrent, parametrized])
def test_modules_that_handle_their_own_weights_are_bit_equal(model: Callable[[], nn.Module]) -> None:
    """Recurrent layers, and parametrized ones."""
    with torch.backends.mkldnn.flags(enabled=False):
        assert_same_training(training(usual, "sgd", model))


def test_gradients_and_parameters_edited_by_hand_are_bit_equal() -> None:
    """`.grad` replaced and scaled, `.data` written in place, a moving average in a second module, an optimizer with a closure."""

    def make() -> Training:
        net, average = mlp(0), mlp(0)
        own = OPTIMIZERS["sgd-momentum"](net.parameters())

        def step(x: torch.Tensor, y: torch.Tensor) -> Any:
            def closure() -> torch.Tensor:
                own.zero_grad()
                loss = nn.functional.cross_entropy(net(x), y)
                loss.backward()
                for parameter in net.parameters():
                    parameter.grad = parameter.grad * 0.5
                    parameter.grad.data.mul_(0.3)
                return loss

            loss = own.step(closure)
            with torch.no_grad():
                for mean, parameter in zip(average.parameters(), net.parameters(), strict=True):
                    mean.lerp_(parameter, 0.1)
                    parameter.data.add_(parameter.grad.data, alpha=-0.1)
                    parameter.grad.zero_()
            return loss

        return Training([net, average], [own], step, numbers)

    assert_same_training(make)


def test_hooks_and_gradients_of_intermediates_are_bit_equal() -> None:
    """Tensor hooks, torch.autograd.grad with create_graph, and backward through the gradient."""

    def body(net: nn.Module, own: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> Any:
        hidden = net[0](x)
        hidden.register_hook(lambda grad: grad * 0.5)
        loss = nn.functional.cross_entropy(net[2](net[1](hidden)), y)
        (slope,) = torch.autograd.grad(loss, net[0].bias, create_graph=True)
        (loss + slope.square().sum()).backward()
        own.step()
        own.zero_grad()
        return slope

    assert_same_training(training(body))


def test_parameters_on_meta_can_be_captured() -> None:
    """No weight is needed for a capture: the graph of a model on `meta` is that of the same model in memory."""
    texts = []
    for device in ("cpu", "meta"):
        recipe = Recipe("qwen2", optimizer="sgd")
        with torch.device(device):
            net = recipe.model().train()
        own = torch.optim.SGD(net.parameters(), lr=0.1)
        ids = recipe.batch(0)[0]

        def step(ids: torch.Tensor, net: nn.Module = net, own: Any = own) -> torch.Tensor:
            loss: torch.Tensor = net(input_ids=ids, labels=ids).loss
            loss.backward()
            own.step()
            own.zero_grad()
            return loss

        texts.append(lower(capture(step, find_state(step), (ids,), {})).listing())
    assert texts[0] == texts[1]


def test_planning_leaves_no_trace() -> None:
    """Capturing, planning and generating a step touches no parameter, gradient or buffer, and draws no random number."""
    built = Recipe("vit", dropout=0.1, optimizer="sgd").build()
    before, drawn = snapshot(built), torch.get_rng_state()
    with estimated_costs():
        optimize(built.step, "1GB", effort="fast", cache=False).prepare(*built.batch(0))
    assert snapshot(built) == before
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not any("forward" in vars(module) for module in built.modules[0].modules())


def test_a_compiled_step_takes_over_in_the_middle_of_a_training() -> None:
    """Optimizer state and gradients that exist already are used as they are."""

    def make() -> Training:
        built = Recipe("gpt2", zero="never").build()
        for call in range(2):
            built.step(*built.batch(10 + call))
        return built

    own, other = make(), make()
    with estimated_costs():
        run_both(own, other, optimize(other.step, "1GB", effort="fast", cache=False), calls=2)
