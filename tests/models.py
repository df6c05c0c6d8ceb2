"""Tiny trainings of every model family: what a capture test compiles, and what it compares with.

A test names a `Recipe` (family, optimizer, options); `recipe.build()` gives a fresh `Training` with the same bits each time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

FAMILIES = ("qwen2", "llama", "gemma3", "gpt2", "vit", "resnet")
TEXT = ("qwen2", "llama", "gemma3", "gpt2")
VOCABULARY = 64
HIDDEN = 32

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-3, foreach=False),
    "adamw-foreach": lambda params: torch.optim.AdamW(params, lr=1e-3, foreach=True),
    "adamw-fused": lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
    "adamw-amsgrad": lambda params: torch.optim.AdamW(params, lr=1e-3, amsgrad=True, foreach=False),
    "adamw-tensor-lr": lambda params: torch.optim.AdamW(params, lr=torch.tensor(1e-3), foreach=False),
    "adam-l2": lambda params: torch.optim.Adam(params, lr=1e-3, weight_decay=0.01),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-2),
    "sgd-momentum": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "sgd-nesterov": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, nesterov=True),
    "sgd-foreach": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, dampening=0.1, foreach=True),
    "sgd-fused": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, fused=True),
    "nadam": lambda params: torch.optim.NAdam(params, lr=1e-3, weight_decay=0.01),
    "radam": lambda params: torch.optim.RAdam(params, lr=1e-3),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=1e-3, momentum=0.9),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-3),
    "adamax": lambda params: torch.optim.Adamax(params, lr=1e-3),
    "asgd": lambda params: torch.optim.ASGD(params, lr=1e-3),
    "rprop": lambda params: torch.optim.Rprop(params, lr=1e-3),
    "adadelta": lambda params: torch.optim.Adadelta(params, lr=1e-1),
}


@dataclass
class Training:
    """A live training: its modules and optimizers, the step, the batch of each call, and what the loop does between calls.

    fresh_gradients: eager makes new gradients at each call, so that what a caller kept of them must stay as it is.
    """

    modules: list[nn.Module]
    optimizers: list[torch.optim.Optimizer]
    step: Callable[..., Any]
    batch: Callable[[int], tuple[Any, ...]]
    between: Callable[[int], None] = lambda call: None
    fresh_gradients: bool = False


@dataclass(frozen=True)
class Recipe:
    """How to build a training.

    mask: None, "ones" or "padded". zero: where `zero_grad` stands: "last", "first" or "never". returns: "loss", "item", "output" or "dict".
    lora: None, "float32" (PEFT's default for a bf16 model) or "model" (the adapters in the model's dtype).
    """

    family: str = "qwen2"
    optimizer: str = "adamw"
    attention: str = "sdpa"
    mask: str | None = "ones"
    dropout: float = 0.0
    dtype: torch.dtype = torch.float32
    autocast: bool = False
    lora: str | None = None
    lora_dropout: float = 0.0
    zero: str = "last"
    set_to_none: bool = True
    clip: float | None = None
    micro_batches: int = 1
    returns: str = "loss"
    sequence: int = 16
    batch_size: int = 2
    seed: int = 0
    config: tuple[tuple[str, Any], ...] = field(default=())

    def build(self) -> Training:
        """A fresh training; two builds are equal bit for bit."""
        torch.manual_seed(self.seed)
        model = self.model().train()
        optimizer = OPTIMIZERS[self.optimizer]([p for p in model.parameters() if p.requires_grad])
        return Training(
            [model], [optimizer], make_step(model, optimizer, self), self.batch, fresh_gradients=self.zero == "first" and self.set_to_none
        )

    def model(self) -> nn.Module:
        model = MODELS[self.family](self).to(self.dtype)
        return with_lora(model, self) if self.lora else model

    def batch(self, call: int) -> tuple[Any, ...]:
        """The batch of one call: (ids, mask) for text, (pixels, labels) for images; of another content at each call."""
        generator = torch.Generator().manual_seed(1000 * self.seed + call)
        if self.family not in TEXT:
            pixels = torch.randn(self.batch_size, 3, 16, 16, generator=generator).to(self.dtype)
            return pixels, torch.randint(0, 5, (self.batch_size,), generator=generator)
        ids = torch.randint(0, VOCABULARY, (self.batch_size, self.sequence), generator=generator)
        mask = None if self.mask is None else torch.ones_like(ids)
        if self.mask == "padded" and mask is not None:
            mask[0, self.sequence // 2 :] = 0
        return ids, mask

    def but(self, **changes: Any) -> Recipe:
        return replace(self, **changes)


def make_step(model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe) -> Callable[..., Any]:
    """The step of a usual training loop, with the parts that the recipe asks for."""

    def losses(first: torch.Tensor, second: torch.Tensor | None) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.autocast):
            if recipe.family in TEXT:
                return model(input_ids=first, attention_mask=second, labels=first)
            return model(pixel_values=first, labels=second)

    def step(first: torch.Tensor, second: torch.Tensor | None) -> Any:
        if recipe.zero == "first":
            optimizer.zero_grad(set_to_none=recipe.set_to_none)
        for micro in range(recipe.micro_batches):
            rows = slice(micro * recipe.batch_size // recipe.micro_batches, (micro + 1) * recipe.batch_size // recipe.micro_batches)
            output = losses(first[rows], None if second is None else second[rows])
            (output.loss / recipe.micro_batches).backward()
        if recipe.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        if recipe.zero == "last":
            optimizer.zero_grad(set_to_none=recipe.set_to_none)
        return RETURNS[recipe.returns](output)

    return step


RETURNS: dict[str, Callable[[Any], Any]] = {
    "loss": lambda output: output.loss,
    "item": lambda output: output.loss.item(),
    "output": lambda output: output,
    "dict": lambda output: {
        "loss": output.loss.detach(),
        "parts": (output.loss * 2, [output.logits.argmax(-1)]),
        "name": "train",
        "none": None,
    },
}


# --- families ---


def _text_config(recipe: Recipe) -> dict[str, Any]:
    common = {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "use_cache": False, "attn_implementation": recipe.attention,
        "attention_dropout": recipe.dropout, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return {**common, **dict(recipe.config)}


def qwen2(recipe: Recipe) -> nn.Module:
    """Full fine-tuning with tied embeddings by default."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**{"tie_word_embeddings": True, **_text_config(recipe)}))


def llama(recipe: Recipe) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{"tie_word_embeddings": False, **_text_config(recipe)}))


def gemma3(recipe: Recipe) -> nn.Module:
    """One layer with a sliding window, one with full attention."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8}
    return Gemma3ForCausalLM(Gemma3TextConfig(**{**_text_config(recipe), **kinds, **dict(recipe.config)}))


def gpt2(recipe: Recipe) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=HIDDEN, n_layer=2, n_head=4, use_cache=False, attn_implementation=recipe.attention,
        resid_pdrop=recipe.dropout, embd_pdrop=recipe.dropout, attn_pdrop=recipe.dropout, bos_token_id=1, eos_token_id=2,
        **dict(recipe.config),
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def vit(recipe: Recipe) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4, intermediate_size=2 * HIDDEN, image_size=16, patch_size=4,
        num_labels=5, hidden_dropout_prob=recipe.dropout, attention_probs_dropout_prob=recipe.dropout, attn_implementation=recipe.attention,
        **dict(recipe.config),
    )  # fmt: skip
    return ViTForImageClassification(config)


def resnet(recipe: Recipe) -> nn.Module:
    """Convolutions and BatchNorm: running statistics are buffers that the forward pass moves."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=5, **dict(recipe.config))
    return ResNetForImageClassification(config)


MODELS: dict[str, Callable[[Recipe], nn.Module]] = {
    "qwen2": qwen2, "llama": llama, "gemma3": gemma3, "gpt2": gpt2, "vit": vit, "resnet": resnet,
}  # fmt: skip


def with_lora(model: nn.Module, recipe: Recipe) -> nn.Module:
    """The model under PEFT's LoRA, base frozen; adapters in float32 or in the model's dtype."""
    names = ["c_attn"] if recipe.family == "gpt2" else ["q_proj", "v_proj"]
    with warnings.catch_warnings():  # peft still uses names that transformers is about to drop
        warnings.simplefilter("ignore")
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=4, lora_alpha=8, lora_dropout=recipe.lora_dropout, target_modules=names, fan_in_fan_out=recipe.family == "gpt2"
        )
        adapted: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=recipe.lora == "float32")
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zero at first, which would leave half of the backward pass untested
            nn.init.normal_(parameter, std=0.02)
    return adapted
