"""Law 1 for every model family: the compiled step equals the user's own step bit for bit, with room and without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from law1 import assert_same_training, smallest_budget
from models import FAMILIES, Recipe


@pytest.mark.parametrize("family", FAMILIES)
def test_full_fine_tuning_is_bit_equal(family: str) -> None:
    """Three steps of full fine-tuning (tied embeddings, BatchNorm buffers, sliding windows) leave the same bits everywhere."""
    compiled = assert_same_training(Recipe(family).build)
    assert sum(map(len, compiled.programs.values())) == 1


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma3", "gpt2", "vit"])
def test_eager_attention_is_bit_equal(family: str) -> None:
    """The attention that is written out in matrix products is captured as it is, with gradients left in `.grad`."""
    assert_same_training(Recipe(family, attention="eager", optimizer="sgd", zero="first").build, calls=2)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["qwen2", "gemma3", "gpt2"])
def test_padding_masks_are_bit_equal(family: str, attention: str) -> None:
    """A batch with padding keeps its mask in the graph."""
    assert_same_training(Recipe(family, mask="padded", attention=attention, optimizer="sgd").build, calls=2)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_mask_at_all_is_bit_equal(family: str) -> None:
    """A batch without a mask."""
    assert_same_training(Recipe(family, mask=None, optimizer="sgd").build, calls=2)


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma3", "gpt2"])
def test_lora_is_bit_equal(family: str) -> None:
    """PEFT's LoRA with dropout on a frozen base."""
    assert_same_training(Recipe(family, lora="float32", lora_dropout=0.1).build, calls=2)


@pytest.mark.parametrize("adapters", ["float32", "model"])
def test_lora_on_a_bfloat16_base_is_bit_equal(adapters: str) -> None:
    """PEFT's two settings of autocast_adapter_dtype give different dtypes and different kernels; both are captured as they are."""
    recipe = Recipe("llama", lora=adapters, dtype=torch.bfloat16)
    dtypes = {p.dtype for p in recipe.build().modules[0].parameters() if p.requires_grad}
    assert dtypes == {torch.float32 if adapters == "float32" else torch.bfloat16}
    assert_same_training(recipe.build, calls=2)


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "vit"])
def test_dropout_is_bit_equal(family: str) -> None:
    """Dropout draws the same numbers and leaves the generator in the same state."""
    assert_same_training(Recipe(family, dropout=0.1, optimizer="sgd").build)


@pytest.mark.parametrize("family", ["qwen2", "vit", "resnet"])
def test_autocast_is_bit_equal(family: str) -> None:
    """Mixed precision by autocast: its casts are ops of the graph."""
    assert_same_training(Recipe(family, autocast=True, optimizer="sgd").build, calls=2)


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_bfloat16_models_are_bit_equal(family: str) -> None:
    """A model whose parameters, gradients and state are bfloat16."""
    assert_same_training(Recipe(family, dtype=torch.bfloat16).build, calls=2)


TIGHT = {
    "gpt2-dropout": Recipe("gpt2", dropout=0.1, sequence=48, optimizer="sgd"),
    "qwen2-lora-dropout": Recipe("qwen2", lora="float32", lora_dropout=0.1, dropout=0.1, sequence=48, optimizer="sgd"),
    "resnet": Recipe("resnet", batch_size=8, optimizer="sgd"),
    "vit-dropout": Recipe("vit", dropout=0.1, attention="eager", batch_size=8, optimizer="sgd"),
    "llama-accumulation": Recipe("llama", mask="padded", attention="eager", micro_batches=2, zero="first", sequence=48, optimizer="sgd"),
    "gemma3-autocast": Recipe("gemma3", autocast=True, sequence=32, clip=1.0, optimizer="adamw-fused"),
}
SLOW = ("llama-accumulation", "gemma3-autocast")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in TIGHT])
def test_a_tight_budget_changes_no_bit(name: str) -> None:
    """With recompute (of dropout too: the generator is replayed and put back) results are the same, and the plan keeps the budget."""
    recipe = TIGHT[name]
    budget = smallest_budget(recipe.build, fraction=0.35)
    compiled = assert_same_training(recipe.build, budget=budget, calls=2)
    assert compiled.plan.report.recomputes > 0
    assert compiled.plan.peak_bytes <= budget


@pytest.mark.parametrize("name", ["gpt2-dropout", "resnet", "qwen2-lora-dropout"])
def test_offloading_changes_no_bit(name: str, disk_folder: Path) -> None:
    """With activations on disk between forward and backward results are the same."""
    recipe = TIGHT[name]
    budget = smallest_budget(recipe.build, fraction=0.2, offload=disk_folder)
    compiled = assert_same_training(recipe.build, budget=budget, calls=2, offload=disk_folder)
    assert compiled.plan.report.offloads > 0
