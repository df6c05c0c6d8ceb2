"""All passes together, at budgets so small that nothing keeps its place for long: the step is still the user's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from law1 import estimated_costs, named_parameters
from models import Recipe, Training
from rewritten import traced

from mebp_compile.compiler import optimize
from mebp_compile.errors import BudgetInfeasible, GraphError
from mebp_compile.lower import lower
from mebp_compile.passes import run_passes

FAMILIES = {
    "qwen2": Recipe("qwen2", optimizer="sgd"),
    "gpt2": Recipe("gpt2", optimizer="sgd"),
    "gemma3": Recipe("gemma3", optimizer="sgd", dtype=torch.bfloat16),
    "adapters": Recipe("qwen2", optimizer="sgd", dtype=torch.bfloat16, lora="model"),
    "wide adapters": Recipe("llama", optimizer="sgd", dtype=torch.bfloat16, lora="float32"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_at_the_smallest_budget(name: str, disk_folder: Path) -> None:
    """At the smallest budget found, and at one half more, no gradient is further from float64's than twice the worst of eager's own."""
    recipe = FAMILIES[name].but(sequence=64, zero="never")
    options = {"numerics": "reassociate", "effort": "fast", "cache": False, "offload": disk_folder}
    exact, own = recipe.build(), recipe.build()
    for module in exact.modules:
        module.double()
    true, rounded = float(exact.step(*exact.batch(0)).detach()), float(own.step(*own.batch(0)).detach())
    allowed = 2 * max(1e-6, abs(rounded / true - 1), *errors(own, exact).values())
    with estimated_costs(), pytest.raises(BudgetInfeasible) as refusal:
        optimize(recipe.build().step, 1000, example=recipe.batch(0), **options)
    for share in (1.0, 1.5):
        other = recipe.build()
        with estimated_costs():
            step = optimize(other.step, int(refusal.value.smallest_bytes * share), example=recipe.batch(0), **options)
        assert abs(float(step(*other.batch(0))) / true - 1) <= allowed
        assert max(errors(other, exact).values()) <= allowed


def errors(training: Training, exact: Training) -> dict[str, float]:
    """|g - g64| / |g64| of each gradient; of one that is zero but for rounding, relative to 1e-4."""
    pairs = zip(named_parameters(training), named_parameters(exact), strict=True)
    trained = [(name, mine.grad.double(), true.grad) for (name, mine), (_, true) in pairs if true.grad is not None]
    return {name: float((mine - true).norm() / max(float(true.norm()), 1e-4)) for name, mine, true in trained}


def test_a_view_of_what_is_gone_is_refused() -> None:
    """A pass that replaces a tensor and leaves the fake values of its views as they were is found before anything is planned."""
    made = traced(Recipe("qwen2", optimizer="sgd").build())
    run_passes(made.module, "reassociate")
    lower(made)
    view = next(node for node in reversed(made.module.graph.nodes) if node.target is torch.ops.aten.view.default)
    view.meta["val"] = view.meta["val"].clone()
    with pytest.raises(GraphError, match=r"aten.view.default at .* is a view of a tensor that the graph does not hold"):
        lower(made)
