"""Fine-tuning with LoRA inside a budget, as `mebp plan` and `mebp train` do it: model, adapters, optimizer, data, step, loop.

A worked example of the API as much as a tool: `make_step` is an ordinary training step, and `optimize` makes it fit.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from mebp_compile.compiler import CompiledStep, optimize
from mebp_compile.config import SCHEMES, Budget, cache_dir
from mebp_compile.data import ByteTokens, batches, blocks, open_log, read_examples
from mebp_compile.errors import DiskError, OptionError
from mebp_compile.measure.disk import FOLDER_FIX
from mebp_compile.models import CONFIGS, named_config
from mebp_compile.planning import Plan
from mebp_compile.progress import Progress
from mebp_compile.runtime.weights import WeightStore

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


@dataclass(frozen=True)
class Settings:
    """What to train and inside which budget. `model`: a name of CONFIGS or a checkpoint folder; `offload`, `store`: folders on disk.

    `lora_rank` 0 trains all parameters. `adapter_dtype`: of the adapters, the model's own without it (PEFT's default is float32).
    """

    model: str
    budget: str
    sequence: int = 256
    batch: int = 1
    lora_rank: int = 8
    adapter_dtype: str | None = None
    optimizer: str = "adamw"
    lr: float = 1e-4
    weights: str | None = None
    offload: Path | None = None
    store: Path | None = None
    dtype: str = "bfloat16"
    effort: str = "balanced"
    time_limit_s: float = 20.0
    seed: int = 0
    numerics: str = "exact"
    solver: str | None = None
    scope: str = "step"

    def __post_init__(self) -> None:
        for name, least in (("sequence", 1), ("batch", 1), ("lora_rank", 0)):
            if getattr(self, name) < least:
                raise OptionError(f"{name} is {getattr(self, name)}", "give a positive number")
        if self.lora_rank == 0 and self.weights is not None:
            raise OptionError("weights are quantised where they are frozen, and a LoRA rank of 0 trains them all", "leave one of the two out")
        for name, allowed in (("optimizer", OPTIMIZERS), ("dtype", DTYPES), ("adapter_dtype", (None, *DTYPES))):
            if getattr(self, name) not in allowed:
                raise OptionError(f"{name}={getattr(self, name)!r} is unknown", f"use one of {', '.join(filter(None, allowed))}")
        if self.weights is not None and self.weights not in SCHEMES:
            raise OptionError(f"weights={self.weights!r} is unknown", f"use one of {', '.join(SCHEMES)}, or leave it out")
        if self.offload is not None and not self.offload.is_dir():
            raise OptionError(f"there is no folder {self.offload}", FOLDER_FIX)
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise OptionError(f"the learning rate is {self.lr!r}", "give a positive number")


# --- the model ---


def build_model(settings: Settings, progress: Progress | None = None) -> tuple[nn.Module, WeightStore | None]:
    """A causal language model, with LoRA adapters on all its linear layers unless the rank is 0, and the store of its frozen weights if they
    are quantised.

    With a store the frozen weights are never in memory: the model is built on meta.
    """
    store = open_store(settings, progress) if settings.weights is not None else None
    torch.manual_seed(settings.seed)
    base = _on_meta(settings) if store is not None else _in_memory(settings)
    base.config.use_cache = False
    model = _with_lora(base, settings) if settings.lora_rank else base
    model.train()
    return model, store


def config_of(settings: Settings) -> Any:
    """The transformers config of a named configuration or a checkpoint folder."""
    import transformers

    if settings.model in CONFIGS:
        return named_config(settings.model)
    if not (Path(settings.model) / "config.json").is_file():
        raise OptionError(
            f"{settings.model} is neither a folder with a config.json nor a known configuration",
            f"use one of {', '.join(CONFIGS)}, or a folder",
        )
    return transformers.AutoConfig.from_pretrained(settings.model, local_files_only=True)


def _in_memory(settings: Settings) -> Any:
    import transformers

    config, dtype = config_of(settings), DTYPES[settings.dtype]
    if settings.model in CONFIGS:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    return transformers.AutoModelForCausalLM.from_pretrained(settings.model, config=config, dtype=dtype, local_files_only=True)


def _on_meta(settings: Settings) -> Any:
    """The model without weights; its buffers (rotary frequencies, scales) are real."""
    import transformers

    with _parameters_on_meta():
        return transformers.AutoModelForCausalLM.from_config(config_of(settings), dtype=DTYPES[settings.dtype])  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, parameters of new modules go to meta before anything writes to them."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # one that is on meta may be shared by tied modules
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    with mock.patch.object(nn.Module, "register_parameter", register_on_meta):
        yield


def _with_lora(base: Any, settings: Settings) -> nn.Module:
    """PEFT's LoRA; adapters that came out on meta get the start that PEFT gives (A random, B zero)."""
    import peft

    config = peft.LoraConfig(
        r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a property that has a new name
        model: nn.Module = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and weight is not None and weight.requires_grad:
            real = torch.zeros(weight.shape, dtype=DTYPES[settings.adapter_dtype or settings.dtype])
            if ".lora_A." in f"{name}.":
                nn.init.kaiming_uniform_(real, a=math.sqrt(5))
            module.weight = nn.Parameter(real)
    return model


def open_store(settings: Settings, progress: Progress | None = None) -> WeightStore:
    """The quantised weights of the model: an existing store, or a new one beside the other stores."""
    assert settings.weights is not None
    folder = settings.store or cache_dir() / "weights" / f"{Path(settings.model).name}-{settings.weights}"
    if (folder / "manifest.json").is_file():
        return WeightStore.open(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)

    def told(name: str, done_bytes: int, total_bytes: int) -> None:
        if progress is not None:
            progress.update(f"quantise to {settings.weights}", done_bytes >> 20, max(1, total_bytes >> 20), name)

    if settings.model in CONFIGS:
        return WeightStore.from_config(_on_meta(settings), folder, settings.weights, settings.seed, progress=told)
    return WeightStore.from_checkpoint(settings.model, folder, settings.weights, progress=told)


# --- the step ---


def make_step(model: nn.Module, settings: Settings) -> tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], torch.optim.Optimizer]:
    """An ordinary training step step(input_ids, labels) -> loss, both int64 [batch, sequence], and its optimizer."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS[settings.optimizer](trained, lr=settings.lr)

    def step(input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=input_ids, labels=labels).loss
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step, optimizer


@dataclass
class Training:
    """A model with adapters and its step, planned inside the budget."""

    settings: Settings
    model: nn.Module
    step: CompiledStep


def prepare(settings: Settings, progress: Progress) -> Training:
    """Build the model and plan its step for the batch that the settings name. Raises what `optimize` raises (BudgetInfeasible, ...)."""
    with progress.stage("model"):
        model, store = build_model(settings, progress)
        step_fn, _ = make_step(model, settings)
    return Training(settings, model, compile_step(step_fn, settings, store, progress))


def compile_step(step_fn: Callable[..., Any], settings: Settings, store: WeightStore | None, progress: Progress) -> CompiledStep:
    """The step planned inside the settings' budget, for the batch that they name."""
    with progress.stage("capture, cost and plan"):
        step = _optimize(step_fn, settings, store, progress.say)
        step.prepare(*example(settings))
        return step


def plan_again(step_fn: Callable[..., Any], settings: Settings, store: WeightStore | None) -> Plan:
    """The plan of a step that was planned before, by a new CompiledStep: from the cache."""
    return _optimize(step_fn, settings, store, None).dry_run(*example(settings))


def example(settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of the geometry that the settings name."""
    ids = torch.zeros((settings.batch, settings.sequence), dtype=torch.int64)
    return ids, ids.clone()


def _optimize(
    step_fn: Callable[..., Any], settings: Settings, store: WeightStore | None, say: Callable[[str], None] | None
) -> CompiledStep:
    return optimize(
        step_fn, Budget(settings.budget, settings.scope), weights=store, offload=settings.offload, numerics=settings.numerics, solver=settings.solver,
        effort=settings.effort, time_limit_s=settings.time_limit_s, progress=say,
    )  # fmt: skip


# --- data ---


def load_tokens(settings: Settings) -> Any:
    """The tokenizer of the checkpoint folder if it has one, else bytes."""
    folder = Path(settings.model)
    if settings.model in CONFIGS or not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return ByteTokens()
    import transformers

    return transformers.AutoTokenizer.from_pretrained(settings.model, local_files_only=True)


def byte_batches(settings: Settings, data: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of a data file with bytes as tokens, whatever the model."""
    return batches(blocks(read_examples(data), ByteTokens(), settings.sequence), settings.batch, settings.seed)


# --- the loop ---


def train(training: Training, data: Path, steps: int, adapter: Path | None, log: Path | None, progress: Progress) -> list[float]:
    """Run `steps` steps on the data; write the losses (a JSON line each) and the adapter in PEFT's format (where all parameters are trained,
    the checkpoint, which takes their memory). Returns the losses."""
    settings = training.settings
    tokens = load_tokens(settings)
    source = batches(blocks(read_examples(data), tokens, settings.sequence), settings.batch, settings.seed)
    losses: list[float] = []
    with open_log(log) as write:
        for number in range(1, steps + 1):
            started = time.perf_counter()
            losses.append(float(training.step(*next(source)).item()))
            write({"step": number, "loss": losses[-1], "seconds": round(time.perf_counter() - started, 4)})
            progress.update("train", number, steps, f"loss {losses[-1]:.4f}")
    if adapter is not None:
        training.step.materialise()
        save_adapter(training.model, adapter)
    return losses


def save_adapter(model: Any, folder: Path) -> None:
    """adapter_model.safetensors and adapter_config.json, as PeftModel.from_pretrained reads them; or the checkpoint of a model without adapters."""
    only_adapters = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
    try:
        model.save_pretrained(str(folder), **only_adapters)
    except OSError as error:
        raise DiskError(f"can't save the adapter in {folder}: {error}", "give a folder that can be written") from error
