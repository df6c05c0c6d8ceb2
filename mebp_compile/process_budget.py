"""`Budget(..., scope="process")`: what a lean process holds besides the step, and what that leaves for the step.

Three parts, all measured or bounded before the first step:

    baseline    interpreter, torch and this package's runtime, threads and kernels warmed: measured in a child, once a machine
    kernels     what the step's ops leave behind for good at their first call (compiled code of matmuls, 0.6 MB each): the cost table has it
    program     code object, binding, views of the arena: a bound by the number of ops
"""

from __future__ import annotations

import torch

from mebp_compile.config import Options, format_bytes
from mebp_compile.cost import CostTable
from mebp_compile.errors import BudgetError, BudgetInfeasible
from mebp_compile.graph import Graph
from mebp_compile.measure.child import run_child

PROGRAM_BYTES_PER_OP = 2048  # code, binding and cached views were 1,700 bytes an op for a step of 4,551 ops
HOLES_BYTES = 4 << 20  # free blocks between used ones, after malloc has given back what it can
RUNS = 3  # of the child; the largest counts


def baseline_bytes() -> int:
    """RssAnon of a warmed lean process without a step, on this machine. Raises MeasureError, CacheError."""
    return int(CostTable().remember("process:1", lambda: {"baseline_bytes": max(_measured() for _ in range(RUNS))})["baseline_bytes"])


def _measured() -> int:
    return int(run_child("mebp_compile.lean_process", "baseline", {}, threads=torch.get_num_threads())["anon_bytes"])


def checked_baseline_bytes(budget_bytes: int) -> int:
    """The baseline. Raises BudgetError, which names it, where the budget is not larger."""
    found = baseline_bytes()
    if budget_bytes <= found:
        raise BudgetError(
            f"a process budget of {budget_bytes:,} bytes leaves nothing for the step: interpreter, torch and runtime alone hold "
            f"{found:,} bytes ({format_bytes(found)}) of anonymous memory here",
            f'give more than that, such as Budget({found + (64 << 20)}, scope="process"), or budget the step alone with scope="step"',
        )
    return found


def own_bytes(options: Options, graph: Graph, kernel_bytes: int) -> int:
    """What the process that runs this graph's program holds besides what the plan counts; 0 where the budget is the step's own."""
    if options.scope == "step":
        return 0
    return options.baseline_bytes + kernel_bytes + PROGRAM_BYTES_PER_OP * len(graph.ops) + HOLES_BYTES


def left_for_step(options: Options, own: int) -> int:
    """The bytes that the plan may use. Raises BudgetError where none are left."""
    if options.budget_bytes <= own:
        raise BudgetError(
            f"a process budget of {options.budget_bytes:,} bytes leaves nothing for the step: the lean process holds {own:,} bytes besides it "
            f"({options.baseline_bytes:,} of them interpreter, torch and runtime, the rest the program and its kernels)",
            f'give more than that, such as Budget({own + (64 << 20)}, scope="process")',
        )
    return options.budget_bytes - own


def in_process(error: BudgetInfeasible, own: int) -> BudgetInfeasible:
    """A refusal in the step's terms, told in the process's."""
    smallest, bound = error.smallest_bytes + own, error.lower_bound_bytes + own
    return BudgetInfeasible(
        f"{error.message}; that is the step's share, the lean process holds {own:,} bytes ({format_bytes(own)}) besides it, so the smallest "
        f"process budget found is {smallest:,} bytes",
        error.fix.replace(f"budget={error.smallest_bytes}", f'budget=Budget({smallest}, scope="process")'),
        smallest,
        bound,
        error.binding_op,
    )
