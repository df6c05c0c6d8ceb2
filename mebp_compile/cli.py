"""The command line. `explain`, `why`, `show` and `check` read a folder of artifacts and never import torch; `plan` and `train` do the work.

    mebp plan  --model qwen2.5-0.5b --budget 512MB --sequence 256 --weights int4 --out step/
    mebp train --model Qwen2.5-0.5B/ --data notes.txt --budget 512MB --steps 100 --adapter-out adapter/
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

from mebp_compile.artifacts import check_artifacts, load_artifacts, save_artifacts
from mebp_compile.config import SCHEMES, TIERS, parse_budget
from mebp_compile.errors import MebpError, OptionError
from mebp_compile.explain import explain, summary, why
from mebp_compile.models import CONFIGS
from mebp_compile.progress import Progress
from mebp_compile.viz import write

PEERS = ("eager", "checkpointing", "schedule:per_layer", "mezo")

if TYPE_CHECKING:
    from mebp_compile.finetune import Settings, Training


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
    item.add_argument("--lora-rank", type=int, default=8)
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
    item.add_argument("--budgets", required=True, help="of our rows, with commas between: 32MB,64MB,320MB")
    item.add_argument("--peers", default=",".join(PEERS), help=f"with commas between ({','.join(PEERS)})")
    item.add_argument("--data", type=Path, required=True, help="a text file")
    item.add_argument("--rounds", type=int, default=5, help="timed steps of each, taken in turn (5)")
    item.set_defaults(command=_bench, numerics="reassociate", budget="1GB")


def _add_plan(item: argparse.ArgumentParser) -> None:
    _add_budget(item)
    _add_shared(item)
    item.set_defaults(command=_plan)


def _add_train(item: argparse.ArgumentParser) -> None:
    _add_budget(item)
    _add_shared(item)
    item.add_argument("--data", type=Path, required=True, help="a text file, or .jsonl with text, prompt and completion, or messages")
    item.add_argument("--steps", type=int, required=True)
    item.add_argument("--adapter-out", type=Path, metavar="FOLDER", help="save the adapter there, in PEFT's format")
    item.add_argument("--log", type=Path, metavar="FILE", help="write the loss of each step, a JSON line each")
    item.set_defaults(command=_train)


# --- commands ---


def _explain(args: argparse.Namespace) -> None:
    graph, plan, _ = load_artifacts(args.folder)
    print(explain(graph, plan, args.module))


def _why(args: argparse.Namespace) -> None:
    graph, plan, _ = load_artifacts(args.folder)
    print(why(graph, plan, args.name))


def _show(args: argparse.Namespace) -> None:
    graph, plan, _ = load_artifacts(args.folder)
    print(write(args.picture, graph, plan))


def _check(args: argparse.Namespace) -> None:
    print(check_artifacts(args.folder))


def _plan(args: argparse.Namespace) -> None:
    _prepare(args, _settings(args), Progress(args.quiet))


def _train(args: argparse.Namespace) -> None:
    settings, progress = _settings(args), Progress(args.quiet)
    if args.steps < 1:
        raise OptionError(f"--steps is {args.steps}", "give a positive number")
    if not args.data.is_file():
        raise OptionError(f"there is no data file {args.data}", "give a UTF-8 .txt or .jsonl file")
    from mebp_compile.finetune import train

    losses = train(_prepare(args, settings, progress), args.data, args.steps, args.adapter_out, args.log, progress)
    print(f"loss    {losses[0]:.4f} at the first step, {losses[-1]:.4f} at step {len(losses)}")
    if args.adapter_out is not None:
        print(f"adapter {args.adapter_out}")


def _bench(args: argparse.Namespace) -> None:
    from dataclasses import replace

    from mebp_compile.bench import Contestant, race, table, write_plot

    if args.rounds < 1:
        raise OptionError(f"--rounds is {args.rounds}", "give a positive number")
    if not args.data.is_file():
        raise OptionError(f"there is no data file {args.data}", "give a UTF-8 text file")
    settings = _settings(args)
    for budget in args.budgets.split(","):
        parse_budget(budget)
    rows = [Contestant(f"ours, {budget}", "ours", replace(settings, budget=budget)) for budget in args.budgets.split(",")]
    rows += [Contestant(kind, kind, settings) for kind in args.peers.split(",") if kind]
    results = race(rows, args.rounds, args.data, Progress(args.quiet))
    text = table(results)
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "bench.txt").write_text(text + "\n")
        print(write_plot(results, args.out / "bench.svg"))


def _prepare(args: argparse.Namespace, settings: Settings, progress: Progress) -> Training:
    """Model and planned step, with the summary printed and the artifacts saved."""
    from mebp_compile.finetune import prepare

    training = prepare(settings, progress)
    step = training.step
    print(summary(step.graph, step.plan))
    if args.out is not None:
        save_artifacts(args.out, step.graph, step.plan, step.code)
        print(f"saved   {args.out} (mebp explain {args.out}; mebp show {args.out} timeline.html)")
    return training


def _settings(args: argparse.Namespace) -> Settings:
    from mebp_compile.finetune import Settings

    return Settings(
        model=args.model, budget=args.budget, sequence=args.sequence, batch=args.batch, lora_rank=args.lora_rank, optimizer=args.optimizer,
        lr=args.lr, weights=args.weights, offload=args.offload, store=args.store, dtype=args.dtype, effort=args.effort,
        time_limit_s=args.time_limit, seed=args.seed, numerics=args.numerics,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
