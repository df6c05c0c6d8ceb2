"""Make the frozen problems of this folder: whole training steps of known architectures, captured, with costs from a roofline.

    python tests/instances/make.py [NAME ...]

Nothing is measured and no weight is allocated (parameters are on meta), so the same versions of torch and transformers give the same file on
every machine. Costs: an op takes 2 us + floating-point operations / 600 GFLOP/s + bytes touched / 10 GB/s; the disk reads 1 GB/s and writes
0.5 GB/s with 100 us of latency, and a transfer delays compute by a quarter of its time. Widths are the published ones; where a
model has fewer layers than its original, its name or the table in docs/solvers.md says so.
"""

from __future__ import annotations

import gzip
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mebp_compile.capture import State, capture, find_state
from mebp_compile.finetune import Settings, _on_meta, _parameters_on_meta, _with_lora
from mebp_compile.flops import op_flops
from mebp_compile.graph import Graph, LoopChoice, Op
from mebp_compile.loop_cost import loop_requests, price_loop
from mebp_compile.lower import lower
from mebp_compile.lower.stream import Record, stream_weights
from mebp_compile.lower.tables import split_tables
from mebp_compile.passes import run_passes
from mebp_compile.planning import Costs, OpCost, build_problem
from mebp_compile.quant.layout import choose_scheme, record_of
from solvers.baselines import keep_all
from solvers.check import replay
from solvers.problem import Problem

FOLDER = Path(__file__).resolve().parent
CALL_US = 2.0
FLOPS_PER_US = 600e3
BYTES_PER_US = 10e3
DISK = {"read_bytes_per_us": 1000.0, "write_bytes_per_us": 500.0, "latency_us": 100, "interference": 0.25}
GROUP_COLUMNS = 64


@dataclass(frozen=True)
class Step:
    """What to capture. numerics: tier of the passes. streamed: frozen weights are int4 records on disk. offload: the disk may be written.
    table_budget: the budget for which large trained tables are split into blocks of rows (0: they stay whole)."""

    step: Callable[..., Any]
    batch: tuple[Any, ...]
    numerics: str = "exact"
    streamed: bool = False
    offload: bool = False
    table_budget: int = 0


# --- costs ---


def shape_of(graph: Graph, op: Op, position: int) -> tuple[int, ...]:
    return graph.value[op.args[position].name].shape


def flops(graph: Graph, op: Op) -> int:
    """Matrix products as mebp_compile.flops counts them; a convolution is 2 * outputs * inputs of each, its backward twice that."""
    if op.target == "aten.convolution.default":
        weight = shape_of(graph, op, 1)
        return 2 * math.prod(graph.value[op.outputs[0] or ""].shape) * math.prod(weight[1:])
    if op.target == "aten.convolution_backward.default":
        return sum(2 * math.prod(shape_of(graph, op, 0)) * math.prod(shape_of(graph, op, 2)[1:]) for made in op.outputs[:2] if made)
    return op_flops(graph, op)


def roofline(flop_count: float, size_bytes: float) -> int:
    return round(CALL_US + flop_count / FLOPS_PER_US + size_bytes / BYTES_PER_US)


def estimated(graph: Graph) -> tuple[Costs, Graph]:
    """Costs by op name, and the graph with its Loops priced."""
    costs = {}
    for op in graph.ops:
        touched = {*op.creates, *op.reads, *op.writes}
        if op.target in ("run.embedding", "run.table_rows"):  # it touches the rows that it looks up
            touched = set(op.creates)
        costs[op.name] = OpCost(roofline(flops(graph, op), sum(graph.storages[s].size_bytes for s in touched)))
    ops = tuple(replace(op, menu=tuple(priced(graph, op, choice) for choice in op.menu)) if op.menu else op for op in graph.ops)
    return Costs(costs, **DISK), replace(graph, ops=ops)


def priced(graph: Graph, op: Op, choice: LoopChoice) -> LoopChoice:
    """A Loop's choice: the products of one tile, and the bytes of its weight's tile."""
    tile = loop_requests(graph, op)[choice.trips][0]
    x, weight = (arg["tensor"]["shape"] for arg in tile["args"][:2])
    products = 1 if tile["target"] == "aten.mm.default" else 2
    count = 2 * products * math.prod(x) * math.prod(weight) // x[-1]
    return price_loop(graph, op, choice, roofline(count, 2 * (math.prod(x) + math.prod(weight))), 0, DISK["read_bytes_per_us"])


# --- from a step to a problem ---


def records(state: State) -> dict[str, Record]:
    """int4 records of the frozen weights that the scheme can hold, as a weight store would have them."""
    found = {}
    for root, path, parameter in state.parameters():
        dtype = str(parameter.dtype).removeprefix("torch.")
        scheme = choose_scheme("int4", path, tuple(parameter.shape), dtype)
        if parameter.requires_grad or scheme == "none":
            continue
        layout = record_of(scheme, tuple(parameter.shape), dtype)
        scales = parameter.shape[-1] // GROUP_COLUMNS if scheme == "int4" else 1
        codes = (layout.rows, layout.code_row_bytes)
        found[f"parameter:{root}:{path}"] = Record(scheme, layout.size_bytes, codes, (layout.rows, scales), "bfloat16")
    return found


def problem_of(name: str, made: Step) -> Problem:
    """Capture, passes, lower, costs; the budget is what keep-all needs."""
    state = find_state(made.step)
    traced = capture(made.step, state, made.batch, {})
    run_passes(traced.module, made.numerics)
    graph = lower(traced)
    if made.table_budget:
        graph = split_tables(graph, made.table_budget)
    if made.streamed:
        graph = stream_weights(graph, records(state))
    costs, graph = estimated(graph)
    problem = replace(build_problem(graph, costs, 1 << 50, made.offload), name=name)
    return problem.with_budget(replay(problem, keep_all(problem), enforce_budget=False).peak_bytes)


# --- steps ---


def training(model: nn.Module, optimizer: torch.optim.Optimizer, loss_of: Callable[..., Any]) -> Callable[..., Any]:
    """The usual step: loss_of(model, *batch), backward, update, zero_grad."""

    def step(*batch: Any) -> Any:
        loss = loss_of(model, *batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, foreach=False)


def momentum(model: nn.Module, first_step: bool = False) -> torch.optim.Optimizer:
    """SGD whose momentum exists already, but in the first step, which makes it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, foreach=False)
    for parameter in model.parameters() if not first_step else ():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def hugging_face(kind: str, config: Any, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A model of transformers with its parameters on meta, training."""
    import transformers

    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _parameters_on_meta():
            return getattr(transformers, kind)(config).train()
    finally:
        torch.set_default_dtype(default)


def text_loss(model: nn.Module, ids: torch.Tensor) -> Any:
    return model(input_ids=ids, labels=ids).loss


def image_loss(model: nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> Any:
    return model(pixel_values=pixels, labels=labels).loss


def ids(batch: int, sequence: int) -> torch.Tensor:
    return torch.zeros((batch, sequence), dtype=torch.int64)


def images(batch: int, side: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros((batch, 3, side, side), dtype=dtype), torch.zeros(batch, dtype=torch.int64)


def lora(model: str, layers: int = 0) -> nn.Module:
    """A named language model on meta with rank-8 adapters on all its projections; of `layers` layers where that is given."""
    from mebp_compile import finetune

    settings = Settings(model, "1GB")
    config = finetune.config_of(settings)
    if layers:
        config.num_hidden_layers = layers
        config.layer_types = config.layer_types[:layers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = _on_meta_config(config)
        base.config.use_cache = False
        return _with_lora(base, settings).train()


def _on_meta_config(config: Any) -> Any:
    import transformers

    with _parameters_on_meta():
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def qwen_lora() -> Step:
    """24 layers, sequence 256, int4 weights streamed, tiled loss, AdamW on the adapters."""
    model = lora("qwen2.5-0.5b")
    return Step(training(model, adamw(model), text_loss), (ids(1, 256),), "reassociate", streamed=True, offload=True)


def qwen_full() -> Step:
    """24 layers, sequence 256, all parameters, tiled loss, AdamW; parameters and moments may live on disk, the tied table in blocks."""
    base = _on_meta(Settings("qwen2.5-0.5b", "1GB", lora_rank=0)).train()
    base.config.use_cache = False
    return Step(training(base, adamw(base), text_loss), (ids(1, 256),), "reassociate", offload=True, table_budget=256 << 20)


def gemma3() -> Step:
    """6 of 26 layers of Gemma3-1B (5 with a sliding window of 512, one full), sequence 1024, adapters, frozen bf16 weights, no disk."""
    model = lora("gemma3-1b", 6)
    return Step(training(model, adamw(model), text_loss), (ids(1, 1024),), "reassociate")


def gpt2() -> Step:
    """GPT-2 small, 12 layers, 2 sequences of 256, all parameters, AdamW, full logits, no disk."""
    from transformers import GPT2Config

    model = hugging_face("GPT2LMHeadModel", GPT2Config(use_cache=False, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    return Step(training(model, adamw(model), text_loss), (ids(2, 256),))


def vit() -> Step:
    """ViT-Base, 12 layers, 8 images of 224, SGD with momentum, no disk."""
    from transformers import ViTConfig

    model = hugging_face("ViTForImageClassification", ViTConfig(num_labels=1000, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    return Step(training(model, momentum(model), image_loss), images(8, 224))


def resnet50() -> Step:
    """ResNet-50, 8 images of 224, fp32, SGD with momentum, no disk."""
    from transformers import ResNetConfig

    model = hugging_face("ResNetForImageClassification", ResNetConfig(num_labels=1000), torch.float32)
    return Step(training(model, momentum(model), image_loss), images(8, 224, torch.float32))


def t5() -> Step:
    """T5-small, 6 + 6 layers, one pair of 256 and 256 tokens, all parameters, AdamW, with a disk for activations."""
    from transformers import T5Config

    config = T5Config(num_layers=6, d_model=512, dropout_rate=0.0, use_cache=False, decoder_start_token_id=0)
    model = hugging_face("T5ForConditionalGeneration", config)

    def loss_of(model: nn.Module, source: torch.Tensor, target: torch.Tensor) -> Any:
        return model(input_ids=source, labels=target).loss

    return Step(training(model, adamw(model), loss_of), (ids(4, 256), ids(4, 256)), offload=True)


class Block(nn.Module):
    """Two convolutions with group norms and SiLU, and a residual."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(8, inputs), nn.GroupNorm(8, outputs)])
        self.convs = nn.ModuleList([nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)])
        self.skip = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(functional.silu(norm(y)))
        return y + self.skip(x)


class UNet(nn.Module):
    """A denoising U-Net: 4 levels of two blocks each way, whose outputs on the way down are kept for the way up."""

    def __init__(self, width: int = 64, levels: int = 4) -> None:
        super().__init__()
        wide = [width * 2**k for k in range(levels)]
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList([Block(wide[max(0, k - 1)], wide[k]) for k in range(levels)])
        self.again = nn.ModuleList([Block(size, size) for size in wide])
        self.up = nn.ModuleList([Block(wide[k] + wide[k + 1], wide[k]) for k in reversed(range(levels - 1))])
        self.after = nn.ModuleList([Block(wide[k], wide[k]) for k in reversed(range(levels - 1))])
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, kept = self.first(x), []
        for level, (block, again) in enumerate(zip(self.down, self.again, strict=True)):
            x = again(block(functional.avg_pool2d(x, 2) if level else x))
            kept.append(x)
        for block, after, skip in zip(self.up, self.after, reversed(kept[:-1]), strict=True):
            x = after(block(torch.cat([skip, functional.interpolate(x, scale_factor=2.0)], 1)))
        return self.last(x)


def unet() -> Step:
    """The U-Net above, 4 images of 128, fp32, AdamW, no disk."""
    with _parameters_on_meta():
        model = UNet().train()

    def loss_of(model: nn.Module, noisy: torch.Tensor, noise: torch.Tensor) -> Any:
        return functional.mse_loss(model(noisy), noise)

    return Step(training(model, adamw(model), loss_of), (torch.zeros(4, 3, 128, 128), torch.zeros(4, 3, 128, 128)))


class Experts(nn.Module):
    """A mixture of experts with dense dispatch: every expert runs on every token, weighted by a softmax over the chosen ones. The routing of
    real ones has shapes that depend on data, which no capture of a whole step can have."""

    def __init__(self, hidden: int, inner: int, count: int, used: int) -> None:
        super().__init__()
        self.router, self.used = nn.Linear(hidden, count, bias=False), used
        self.gate = nn.ModuleList([nn.Linear(hidden, inner, bias=False) for _ in range(count)])
        self.up = nn.ModuleList([nn.Linear(hidden, inner, bias=False) for _ in range(count)])
        self.down = nn.ModuleList([nn.Linear(inner, hidden, bias=False) for _ in range(count)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = functional.softmax(self.router(x), -1)
        least = scores.topk(self.used, -1).values[..., -1:]
        weights, total = torch.where(scores >= least, scores, 0.0), torch.zeros_like(x)
        for k, (gate, up, down) in enumerate(zip(self.gate, self.up, self.down, strict=True)):
            total = total + weights[..., k : k + 1] * down(functional.silu(gate(x)) * up(x))
        return total


class MoeModel(nn.Module):
    """Decoder layers of attention and `Experts`, after the shape of Qwen2-MoE (hidden 2048, experts of 1408) with 8 experts of which 2 are used."""

    def __init__(self, layers: int = 4, hidden: int = 2048, inner: int = 1408, vocabulary: int = 32000) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList([nn.ModuleDict({
            "norm": nn.RMSNorm(hidden), "qkv": nn.Linear(hidden, 3 * hidden), "out": nn.Linear(hidden, hidden, bias=False),
            "after": nn.RMSNorm(hidden), "experts": Experts(hidden, inner, 8, 2),
        }) for _ in range(layers)])  # fmt: skip
        self.head = nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            parts = layer["qkv"](layer["norm"](x)).unflatten(-1, (3, 16, -1)).permute(2, 0, 3, 1, 4)
            mixed = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
            x = x + layer["out"](mixed.transpose(1, 2).flatten(2))
            x = x + layer["experts"](layer["after"](x))
        return self.head(x)


def moe(first_step: bool = False) -> Step:
    """4 layers of 8 experts, one sequence of 512, bf16, SGD with momentum; parameters, moments and activations may go to disk."""
    with _parameters_on_meta():
        model = MoeModel().to(torch.bfloat16).train()

    def loss_of(model: nn.Module, tokens: torch.Tensor) -> Any:
        return functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())

    return Step(training(model, momentum(model, first_step), loss_of), (ids(1, 512),), offload=True)


STEPS: dict[str, Callable[[], Step]] = {
    "qwen2.5-0.5b-lora": qwen_lora, "qwen2.5-0.5b-full": qwen_full, "gemma3-1b-6-layers": gemma3, "gpt2": gpt2, "vit-base": vit,
    "resnet-50": resnet50, "unet": unet, "t5-small": t5, "moe-4-layers": moe, "moe-4-layers-first-step": lambda: moe(first_step=True),
}  # fmt: skip


def write(problem: Problem) -> Path:
    """<name>.json.gz, the same bytes each time."""
    path = FOLDER / f"{problem.name}.json.gz"
    path.write_bytes(gzip.compress(problem.to_json().encode(), 9, mtime=0))
    return path


def main(names: list[str]) -> None:
    for name in names or STEPS:
        problem = problem_of(name, STEPS[name]())
        path = write(problem)
        print(f"{name:24} {len(problem.ops):6} ops {len(problem.storages):6} storages {path.stat().st_size:9,} bytes", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
