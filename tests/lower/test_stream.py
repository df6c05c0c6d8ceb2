"""Streamed weights in the Graph."""

from __future__ import annotations

from pathlib import Path

import torch
from law1 import estimated_costs
from models import Recipe

from mebp_compile.compiler import optimize
from mebp_compile.runtime.metering import meter_storages


def test_a_table_that_is_only_looked_up_takes_no_memory(tmp_path: Path) -> None:
    """An untied embedding on disk: its record is never in memory, is not charged, and the measured peak is the predicted one."""
    recipe = Recipe("llama", lora="float32")
    training = recipe.build()
    with estimated_costs():
        compiled = optimize(training.step, "100MB", weights="int4", offload=tmp_path, effort="fast", cache=False)
        losses = [compiled(*training.batch(call)) for call in range(2)]
    records = {storage.name: storage for storage in compiled.graph.storages if storage.role == "weight"}
    assert records["embed_tokens_weight_packed"].size_bytes == 0
    assert records["lm_head_weight_packed"].size_bytes > 0
    leaves = list(training.batch(2))
    reading = meter_storages(compiled.prepare(*leaves), leaves)
    assert reading.peak_bytes <= compiled.plan.tensor_bytes
    assert all(torch.isfinite(torch.as_tensor(loss)).all() for loss in losses)
