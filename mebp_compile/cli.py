"""The command line. `explain`, `why`, `show` and `check` read a folder of artifacts and never import torch; `plan` and `train` do the work;
`run` runs a saved step in this very process, and so imports nothing that planning needs.

    mebp plan  --model qwen2.5-0.5b --budget 512MB --sequence 256 --weights int4 --out step/
    mebp train --model Qwen2.5-0.5B/ --data notes.txt --budget 512MB --steps 100 --adapter-out adapter/
    mebp plan  --model qwen2.5-0.5b --budget 256MB --scope process --weights int4 --optimizer sgd --offload DIR --out step/
    mebp run   step/ --data notes.txt --steps 100 --log log.jsonl --adapter-out adapter/
    mebp explain step/ --module layers.3.mlp
    mebp why step/ layers_3_mlp_up_proj_mm
    mebp show step/ timeline.html
    mebp check step/
    mebp bench --model qwen2.5-0.5b --weights int4 --optimizer sgd --budgets 32MB,64MB,320MB --data notes.txt --out bench/
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mebp_compile.config import SCHEMES, SCOPES, TIERS, format_bytes, parse_budget
from mebp_compile.errors import BudgetError, MebpError, OptionError
from mebp_compile.models import CONFIGS
from mebp_compile.progress import Progress

PEERS = (
    "eager", "checkpointing", "compile:0", "compile:0.25", "compile:0.5", "compile:0.75", "compile:1", "remat_by_tags", "schedule:per_layer",
    "schedule:mebp", "schedule:mesp", "mezo", "bnb", "matmul",
)  # fmt: skip
RUN_STEPS = ("plan", "train", "run", "bench")  # the commands whose steps a small heap is for

if TYPE_CHECKING:
    from mebp_compile.bench import Result
    from mebp_compile.compiler import CompiledStep
    from mebp_compile.finetune import Settings, Training


def command() -> int:
    """`main`, where steps run in a process whose malloc keeps its heap small."""
    if sys.argv[1:2] and sys.argv[1] in RUN_STEPS:
        from mebp_compile.measure.process import restart_with_small_heap

        restart_with_small_heap()
    return main()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for an error that says what to try, 130 when interrupted."""
    args = parser().parse_args(argv)
    try:
        args.command(args)
        sys.stdout.flush()
        return 0
    except MebpError as error:
        print(f"mebp: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mebp: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, less) went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    top = argparse.ArgumentParser(prog="mebp", description="Training steps inside a hard memory budget.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _add_plan(commands.add_parser("plan", help="plan a LoRA fine-tuning step: will it fit, how fast, what it does"))
    _add_train(commands.add_parser("train", help="fine-tune with LoRA inside the budget"))
    _add_run(commands.add_parser("run", help="run a saved step in this process, without the planner: for --scope process"))
    _add_bench(commands.add_parser("bench", help="measure this package and its peers side by side on this machine"))
    _add_readers(commands)
    return top


def _add_readers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The commands that read a folder of artifacts."""
    item = commands.add_parser("explain", help="what a saved plan does: budget, peak, a line per layer")
    item.add_argument("folder", type=Path)
    item.add_argument("--module", help='only this module, such as "layers.3.mlp"')
    item.set_defaults(command=_explain)
    item = commands.add_parser("why", help="the life of one storage, value or op")
    item.add_argument("folder", type=Path)
    item.add_argument("name")
    item.set_defaults(command=_why)
    item = commands.add_parser("show", help="write a picture: .html timeline, .svg or .dot graph, .json trace for Perfetto")
    item.add_argument("folder", type=Path)
    item.add_argument("picture", type=Path, metavar="FILE")
    item.set_defaults(command=_show)
    item = commands.add_parser("check", help="prove a saved plan again: graph, schedule, offsets, budget")
    item.add_argument("folder", type=Path)
    item.set_defaults(command=_check)


def _add_shared(item: argparse.ArgumentParser) -> None:
    item.add_argument("--model", required=True, help=f"a checkpoint folder, or with random weights one of {', '.join(CONFIGS)}")
    item.add_argument("--sequence", type=int, default=256, help="tokens of a sequence (256)")
    item.add_argument("--batch", type=int, default=1, help="sequences of a batch (1)")
    item.add_argument("--lora-rank", type=int, default=8, help="of the adapters (8); 0 trains all parameters")
    item.add_argument("--adapter-dtype", choices=("bfloat16", "float32"), help="of the adapters (the model's)")
    item.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw")
    item.add_argument("--lr", type=float, default=1e-4)
    item.add_argument("--weights", choices=SCHEMES, help="quantise the frozen weights and read them from disk")
    item.add_argument("--store", type=Path, help="folder of the quantised weights (made if it does not exist)")
    item.add_argument("--offload", type=Path, metavar="DIR", help="folder on disk for activations")
    item.add_argument("--numerics", choices=TIERS, default="exact", help='"reassociate" allows the tiled loss (exact)')
    item.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    item.add_argument("--effort", choices=("fast", "balanced", "proof"), default="balanced")
    item.add_argument("--time-limit", type=float, default=20.0, metavar="SECONDS", help="of the solver (20)")
    item.add_argument("--seed", type=int, default=0)
    item.add_argument("--out", type=Path, metavar="FOLDER", help="save the artifacts: graph, problem, schedule, offsets, plan, program")
    item.add_argument("--quiet", action="store_true", help="no progress")


def _add_budget(item: argparse.ArgumentParser) -> None:
    item.add_argument("--budget", required=True, help='such as "512MB" (10^6) or "1GiB" (2^30)')


def _add_bench(item: argparse.ArgumentParser) -> None:
    _add_shared(item)
    item.add_argument("--budgets", default="", help="of our rows, with commas between: 32MB,64MB,320MB")
    item.add_argument("--peers", default=",".join(PEERS), help=f"with commas between ({','.join(PEERS)})")
    item.add_argument("--data", type=Path, required=True, help="a text file")
    item.add_argument("--rounds", type=int, default=5, help="timed steps of each, taken in turn (5)")
    item.add_argument("--rows", type=Path, metavar="FILE", help="a JSON list of other settings, run alone, or together in lists of their own")
    item.set_defaults(command=_bench, numerics="reassociate", budget="1GB")


def _add_plan(item: argparse.ArgumentParser) -> None:
    _add_budget(item)
    _add_shared(item)
    item.add_argument("--scope", choices=SCOPES, default="step", help='"process": the budget is that of the whole process of `mebp run` (step)')
    item.set_defaults(command=_plan)


def _add_train(item: argparse.ArgumentParser) -> None:
    _add_budget(item)
    _add_shared(item)
    item.add_argument("--data", type=Path, required=True, help="a text file, or .jsonl with text, prompt and completion, or messages")
    item.add_argument("--steps", type=int, required=True)
    item.add_argument("--adapter-out", type=Path, metavar="FOLDER", help="save the adapter there, in PEFT's format")
    item.add_argument("--log", type=Path, metavar="FILE", help="write the loss of each step, a JSON line each")
    item.set_defaults(command=_train)


def _add_run(item: argparse.ArgumentParser) -> None:
    item.add_argument("folder", type=Path, help="written by `mebp plan --out` or `step.save`")
    item.add_argument("--data", type=Path, required=True, help="a text file, or .jsonl with text, prompt and completion, or messages")
    item.add_argument("--steps", type=int, required=True)
    item.add_argument("--tokenizer", type=Path, metavar="FILE", help="a tokenizer.json (without one bytes are tokens)")
    item.add_argument("--seed", type=int, default=0, help="of the order of the data (0)")
    item.add_argument("--state", type=Path, metavar="FOLDER", help="go on from what an earlier run saved with --adapter-out")
    item.add_argument("--adapter-out", type=Path, metavar="FOLDER", help="save what was trained there (adapters in PEFT's format)")
    item.add_argument("--offload", type=Path, metavar="DIR", help="folder on disk, instead of the one that the step was planned with")
    item.add_argument("--log", type=Path, metavar="FILE", help="write the loss of each step, a JSON line each")
    item.add_argument("--quiet", action="store_true", help="no progress")
    item.set_defaults(command=_run)


# --- commands ---


def _explain(args: argparse.Namespace) -> None:
    from mebp_compile.artifacts import load_artifacts
    from mebp_compile.explain import explain

    graph, plan, _ = load_artifacts(args.folder)
    print(explain(graph, plan, args.module))


def _why(args: argparse.Namespace) -> None:
    from mebp_compile.artifacts import load_artifacts
    from mebp_compile.explain import why

    graph, plan, _ = load_artifacts(args.folder)
    print(why(graph, plan, args.name))


def _show(args: argparse.Namespace) -> None:
    from mebp_compile.artifacts import load_artifacts
    from mebp_compile.viz import write

    graph, plan, _ = load_artifacts(args.folder)
    print(write(args.picture, graph, plan))


def _check(args: argparse.Namespace) -> None:
    from mebp_compile.artifacts import check_artifacts

    print(check_artifacts(args.folder))


def _plan(args: argparse.Namespace) -> None:
    progress = Progress(args.quiet)
    step = _prepare(args, _settings(args), progress).step
    if args.scope == "process":
        left_bytes, budget_bytes = step.plan.problem.budget_bytes, parse_budget(args.budget)
        print(
            f"process budget {format_bytes(budget_bytes)}: {format_bytes(budget_bytes - left_bytes)} for interpreter, torch, program and kernels, "
            f"{format_bytes(left_bytes)} for the step"
        )
    if args.out is None:
        return
    with progress.stage("saving the step and its state"):
        step.save(args.out)
    print(f"saved   {args.out} (mebp run {args.out}; mebp explain {args.out}; mebp show {args.out} timeline.html)")
    if args.scope == "process":
        _try_out(args.out, parse_budget(args.budget), progress)


def _try_out(folder: Path, budget_bytes: int, progress: Progress) -> None:
    """Measure the saved step in a lean process. Raises BudgetError where it is above the budget after all."""
    from mebp_compile.lean_process import TRIAL_STEPS, try_out

    with progress.stage(f"{TRIAL_STEPS} steps in a lean process"):
        peak_bytes = try_out(folder)["peak_bytes"]
    print(_process_line(peak_bytes, budget_bytes))
    if peak_bytes > budget_bytes:
        raise BudgetError(
            f"a lean process held {peak_bytes:,} bytes, {peak_bytes - budget_bytes:,} above the budget",
            f"plan with a budget smaller by that, and report this step: {folder}",
        )


def _process_line(peak_bytes: int, budget_bytes: int | None) -> str:
    """What a whole lean process held."""
    limit = "" if budget_bytes is None else f", budget {budget_bytes:,} bytes ({format_bytes(budget_bytes)})"
    return f"process RssAnon at most {peak_bytes:,} bytes ({format_bytes(peak_bytes)}), interpreter and torch included{limit}"


def _run(args: argparse.Namespace) -> None:
    from mebp_compile.lean_process import Run, become_lean, run

    wanted = Run(args.folder, args.data, args.steps, args.tokenizer, args.seed, args.log, args.state, args.offload)
    become_lean()
    progress = Progress(args.quiet)
    ran = run(wanted, lambda number, loss: progress.update("run", number, args.steps, f"loss {loss:.4f}"))
    print(f"loss    {ran.losses[0]:.4f} at the first step, {ran.losses[-1]:.4f} at step {len(ran.losses)}")
    if args.adapter_out is not None:
        print(f"adapter {ran.step.save_state(args.adapter_out)}")
    print(_process_line(ran.peak_bytes, ran.budget_bytes))
    if ran.budget_bytes is not None and ran.peak_bytes > ran.budget_bytes:
        raise BudgetError("the process was above its budget; everything was computed and saved", "plan again with a smaller budget")


def _train(args: argparse.Namespace) -> None:
    settings, progress = _settings(args), Progress(args.quiet)
    if args.steps < 1:
        raise OptionError(f"--steps is {args.steps}", "give a positive number")
    if not args.data.is_file():
        raise OptionError(f"there is no data file {args.data}", "give a UTF-8 .txt or .jsonl file")
    from mebp_compile.finetune import train

    training = _prepare(args, settings, progress)
    if args.out is not None:
        _save_plan(args.out, training.step)
    losses = train(training, args.data, args.steps, args.adapter_out, args.log, progress)
    print(f"loss    {losses[0]:.4f} at the first step, {losses[-1]:.4f} at step {len(losses)}")
    if args.adapter_out is not None:
        print(f"adapter {args.adapter_out}")


def _save_plan(folder: Path, step: CompiledStep) -> None:
    """The artifacts alone: what is trained has its own place."""
    from mebp_compile.artifacts import save_artifacts

    save_artifacts(folder, step.graph, step.plan, step.code)
    print(f"saved   {folder} (mebp explain {folder}; mebp show {folder} timeline.html)")


def _bench(args: argparse.Namespace) -> None:
    from dataclasses import replace

    from mebp_compile.bench import Contestant, race, read_races, report, write_report

    if args.rounds < 1:
        raise OptionError(f"--rounds is {args.rounds}", "give a positive number")
    if not args.data.is_file():
        raise OptionError(f"there is no data file {args.data}", "give a UTF-8 text file")
    settings = _settings(args)
    budgets = [budget for budget in args.budgets.split(",") if budget]
    for budget in budgets:
        parse_budget(budget)
    rows = [Contestant(f"ours, {budget}", "ours", replace(settings, budget=budget)) for budget in budgets]
    rows += [Contestant(kind, kind, settings) for kind in args.peers.split(",") if kind]
    races = ([rows] if rows else []) + (read_races(args.rows, settings) if args.rows is not None else [])
    results: list[list[Result]] = []
    files: list[Path] = []
    for contestants in races:
        results.append(race(contestants, args.rounds, args.data, Progress(args.quiet)))
        files = write_report(results, args.out) if args.out is not None else []  # after each: a run that is cut short keeps what it has
    print(report(results), *files, sep="\n")


def _prepare(args: argparse.Namespace, settings: Settings, progress: Progress) -> Training:
    """Model and planned step, with the summary printed."""
    from mebp_compile.explain import summary
    from mebp_compile.finetune import prepare

    training = prepare(settings, progress)
    step = training.step
    print(summary(step.graph, step.plan))
    return training


def _settings(args: argparse.Namespace) -> Settings:
    from mebp_compile.finetune import Settings

    return Settings(
        model=args.model, budget=args.budget, sequence=args.sequence, batch=args.batch, lora_rank=args.lora_rank,
        adapter_dtype=args.adapter_dtype, optimizer=args.optimizer, lr=args.lr, weights=args.weights, offload=args.offload, store=args.store,
        dtype=args.dtype, effort=args.effort, time_limit_s=args.time_limit, seed=args.seed, numerics=args.numerics,
        scope=getattr(args, "scope", "step"),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
