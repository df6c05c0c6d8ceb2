"""`mebp bench`: contestants in processes of their own, a table, verdicts and a picture of what was measured, and a failure that stops nobody
else.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import random
import signal
import xml.etree.ElementTree as xml
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mebp_compile.bench import Contestant, Result, nf4, race, read_races, table, torch_private, verdicts, write_plot, write_report
from mebp_compile.bench.peers import PEERS, mezo_step, prepare
from mebp_compile.bench.plot import pareto
from mebp_compile.bench.race import _ended
from mebp_compile.bench.report import predictions, trainings
from mebp_compile.bench.torch_compile import compiled_step, remat_by_tags_step
from mebp_compile.bench.unavailable import PeerUnavailable, in_short
from mebp_compile.cli import PEERS as DEFAULT_PEERS
from mebp_compile.cli import main
from mebp_compile.config import SOLVERS
from mebp_compile.errors import OptionError
from mebp_compile.finetune import Settings, build_model, make_step
from mebp_compile.progress import Progress

TEXT = "A line of text that is read as bytes, again and again.\n" * 60
MB = 10**6
DENSE = Settings("tiny-qwen2", "1MB", sequence=32, optimizer="sgd")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def torch_settings() -> Iterator[None]:
    """torch.compile's options as they were, afterwards."""
    import torch._dynamo.config
    import torch._functorch.config

    budget, remat = "activation_memory_budget", "remat_using_tags_for_fwd_loss_bwd_graph"
    functorch, dynamo = torch._functorch.config, torch._dynamo.config
    with functorch.patch({budget: 1.0, remat: True}), dynamo.patch(trace_autograd_ops=False):
        yield
    torch.compiler.reset()


# --- races ---


def test_ours_mesp_and_eager_on_the_same_batches(text: Path, disk_folder: Path) -> None:
    """Exact tier: the same losses, MeSP's schedule too; ours inside its budget by every meter; a budget of nothing is an error of its row alone."""
    settings = Settings(
        "tiny-qwen2", "450KB", sequence=32, optimizer="sgd", weights="int4", offload=disk_folder, store=disk_folder / "store", effort="fast"
    )
    small = Settings(**{**vars(settings), "budget": "10KB"})
    rows = [Contestant("ours", "ours", settings), Contestant("too small", "ours", small)]
    rows += [Contestant(kind, kind, settings) for kind in ("schedule:mesp", "eager")]
    ours, refused, mesp, eager = race(rows, 2, text, Progress(quiet=True))
    assert ours.losses == mesp.losses == eager.losses
    assert len(ours.seconds) == len(eager.seconds) == 2
    assert 0 < ours.tensor_bytes <= ours.malloc_bytes <= ours.predicted_bytes <= 450_000
    assert ours.tensor_bytes < eager.tensor_bytes
    assert 0 < mesp.tensor_bytes <= mesp.malloc_bytes <= mesp.predicted_bytes
    assert "BudgetInfeasible" in refused.error
    assert not refused.seconds
    printed = table([ours, refused, eager])
    assert "too small: BudgetInfeasible" in printed
    assert f"{eager.median_s / eager.median_s:.2f}" in printed


def test_the_command_writes_table_verdicts_and_picture(text: Path, disk_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One contestant of each kind that is cheap here, and one that can't run."""
    arguments = ["--weights", "int4", "--optimizer", "sgd", "--sequence", "32", "--effort", "fast", "--offload", str(disk_folder), "--quiet"]
    peers = ["checkpointing", "schedule:per_layer", "schedule:mesp", "mezo", "compile:2"]
    others = [*peers, "matmul"]
    rows = ["--budgets", "1MB", "--peers", ",".join(others), "--rounds", "1", "--data", str(text)]
    assert main(["bench", "--model", "tiny-qwen2", *arguments, *rows, "--store", str(disk_folder / "store"), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for name in ("ours, 1MB", *peers[:-1]):
        line = next(line for line in printed.splitlines() if line.startswith(name))
        assert len(line.split()) >= 7, printed
    assert "compile:2: OptionError: compile:2 is no activation memory budget" in printed
    assert all(f"ours against {peer}: " in printed for peer in peers)
    assert (tmp_path / "out" / "bench.txt").read_text() in printed
    assert (tmp_path / "out" / "bench.svg").read_text().count("<circle") == 5
    saved = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [row["name"] for row in saved] == ["ours, 1MB", *others]
    assert saved[-1]["flops"] == 24 * 4 * 32 * 64 * 128
    assert "matrix products run at" in printed
    assert "ours against matmul" not in printed
    assert all(row["peak_bytes"] > 0 and row["median_s"] == row["seconds"][0] for row in saved[:-2])


@pytest.mark.slow
def test_torch_recomputes_by_tags(text: Path) -> None:
    """torch's own pass over the whole step: losses as in eager, fewer bytes of tensors."""
    kinds = ("remat_by_tags", "eager")
    remat, eager = race([Contestant(kind, kind, DENSE) for kind in kinds], 1, text, Progress(quiet=True))
    assert remat.losses == pytest.approx(eager.losses, rel=1e-3)
    assert 0 < remat.tensor_bytes < eager.tensor_bytes
    assert remat.malloc_bytes < eager.malloc_bytes


@pytest.mark.slow
def test_torch_compile_with_a_memory_budget(text: Path) -> None:
    """Compiled by inductor: losses near eager's, compiled code runs under the meters."""
    kinds = ("compile:0", "compile:1", "remat_by_tags:inductor", "eager")
    *compiled, eager = race([Contestant(kind, kind, DENSE) for kind in kinds], 1, text, Progress(quiet=True))
    for result in compiled:
        assert not result.error
        assert result.losses == pytest.approx(eager.losses, rel=1e-2)
        assert 0 < result.tensor_bytes != eager.tensor_bytes


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is optional: pip install .[bench]")
def test_bitsandbytes_keeps_packed_weights(text: Path) -> None:
    """NF4 weights in transformers and PEFT: the loss near that of the same weights in bfloat16, fewer bytes kept."""
    packed, eager = race([Contestant(kind, kind, DENSE) for kind in ("bnb", "eager")], 1, text, Progress(quiet=True))
    assert not packed.error
    assert packed.losses == pytest.approx(eager.losses, rel=0.05)
    assert packed.losses != eager.losses
    assert 0 < packed.tensor_bytes < eager.tensor_bytes


# --- peers that can't run say why ---


def test_every_default_peer_is_known() -> None:
    """The peers that the command runs by default are contestants, and its schedules are the solver's names."""
    for kind in DEFAULT_PEERS:
        name, _, detail = kind.partition(":")
        assert name in (*PEERS, "matmul") or (name == "schedule" and detail in SOLVERS), kind


def test_bitsandbytes_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is an error that says what to install, before the model is built."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PeerUnavailable, match="not installed: pip install"):
        prepare("bnb", Settings("no such model", "1MB"))
    with pytest.raises(PeerUnavailable, match="not installed"):
        nf4.nf4_model(None, torch.bfloat16)


@pytest.mark.parametrize("kind", ["compile", "compile:", "compile:2", "compile:-0.1", "compile:half", "compile:nan", "remat_by_tags:gpu", "sleep"])
def test_unknown_contestants_are_refused(kind: str, torch_settings: None) -> None:
    """A number that is no budget, a backend or a name that nobody has."""
    with pytest.raises(OptionError):
        prepare(kind, DENSE)


def test_torch_compile_without_a_compiler(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without C++ compiler the row says so, in a line."""
    monkeypatch.setenv("CXX", "/no/such/compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    [result] = race([Contestant("compile:1", "compile:1", DENSE)], 1, text, Progress(quiet=True))
    assert result.error.startswith("PeerUnavailable: torch.compile can't run this model here: InductorError: InvalidCxxCompiler")
    assert "TORCHDYNAMO_VERBOSE" not in result.error
    assert table([result]).splitlines()[1] == f"compile:1: {result.error}"


def test_errors_in_a_line() -> None:
    """Type and message without line breaks, and not without end."""
    assert in_short(OptionError("a  bad\nvalue", "another")) == "OptionError: a bad value; try: another"
    assert len(in_short(ValueError("x" * 5000))) == 400


def test_processes_that_end_too_early() -> None:
    """A signal is named; the one that a full memory sends has its likely reason."""
    assert "out of memory" in _ended(-signal.SIGKILL)
    assert _ended(-signal.SIGSEGV) == f"its process was killed by signal {int(signal.SIGSEGV)}"
    assert _ended(3) == "its process ended with status 3"


def test_bad_requests_are_refused_early(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No rounds, no file, a budget that is none."""
    base = ["bench", "--model", "tiny-qwen2"]
    assert main([*base, "--budgets", "1MB", "--data", str(text), "--rounds", "0"]) == 2
    assert main([*base, "--budgets", "1MB", "--data", str(text) + "x"]) == 2
    assert main([*base, "--budgets", "1MB,much", "--data", str(text)]) == 2
    assert "positive" in capsys.readouterr().err


# --- the private APIs of torch.compile ---


def test_the_budget_is_torch_compiles_option(torch_settings: None) -> None:
    """Setting it changes the option by that name, which exists."""
    import torch._functorch.config

    model = torch.nn.Linear(2, 2)
    compiled_step(model, lambda x: model(x), "0.25")
    assert torch._functorch.config.activation_memory_budget == 0.25


def test_the_pass_is_what_saves_memory(torch_settings: None) -> None:
    """With `remat_using_tags_for_fwd_loss_bwd_graph` off, the same step under the same checkpoints needs what eager needs."""
    peaks, losses = {}, {}
    batch = (torch.arange(32)[None], torch.arange(32)[None])
    for remat in (True, False):
        torch.compiler.reset()
        model, _ = build_model(DENSE)
        _, optimizer = make_step(model, DENSE)
        step = remat_by_tags_step(model, optimizer, "aot_eager", remat)
        losses[remat] = [step(*batch).item() for _ in range(2)]
        peaks[remat] = torch_private.allocated_peak(lambda step=step: step(*batch))
    assert losses[True] == losses[False]
    assert peaks[True] < 0.8 * peaks[False]


def test_allocated_peak_is_exact() -> None:
    """Two tensors at once, one of them freed before a third: the sum of the first two."""

    def call() -> None:
        first, second = torch.empty(1 << 20), torch.empty(1 << 19)
        del first, second
        torch.empty(1 << 18)

    assert torch_private.allocated_peak(call) == 4 * ((1 << 20) + (1 << 19))
    assert torch_private.allocated_peak(lambda: None) == 0


# --- verdicts ---


def measured(name: str, size_mb: float, *seconds: float, kind: str = "") -> Result:
    return Result(name, kind or name, seconds=list(seconds), malloc_bytes=int(size_mb * MB), tensor_bytes=1)


def test_verdicts() -> None:
    """Below and left; not below; not left; not measured; nothing of ours. Rounds are compared one by one."""
    ours = [measured("ours, 20MB", 20, 3.0, 3.0, 9.0, kind="ours"), measured("ours, 90MB", 90, 1.0, 1.0, 9.0, kind="ours")]
    peers = [measured("slow", 100, 4.0, 4.0, 2.0), measured("quick", 50, 1.5, 1.5, 1.5), measured("tiny", 10, 9.0, 9.0, 9.0), Result("dead", "dead")]
    assert verdicts([*ours, *peers]) == [
        "ours against slow: below and left of its 100.0 MB: ours, 20MB (20.0 MB, 0.75 x its time) and ours, 90MB (90.0 MB, 0.25 x its time)",
        "ours against quick: NOT below: within its 50.0 MB the fastest of ours is ours, 20MB (20.0 MB, 2.00 x its time)",
        "ours against tiny: NOT left of its 10.0 MB: the smallest of ours is ours, 20MB (20.0 MB, 0.33 x its time)",
        "ours against dead: not measured to the end, so nothing is said of it",
    ]
    assert verdicts(peers[:1]) == ["ours against slow: nothing of ours ran"]


def test_another_training_is_named() -> None:
    """Losses that leave eager's are said, a NaN too; those that stay are counted; without eager there is nothing to say."""
    losses = {"eager": [10.0, 8.0], "near": [10.0, 8.008], "gone": [10.0, 9.0], "broken": [10.0, math.nan], "refused": []}
    results = [Result(name, "eager" if name == "eager" else "ours", losses=held) for name, held in losses.items()]
    assert trainings(results) == [
        "gone: NOT the training of eager: losses are 12.50% apart",
        "broken: NOT the training of eager: losses are inf% apart",
        "losses of 1 of 3 rows of ours are within 0.100% of eager's in every step",
    ]
    assert trainings(results[1:]) == trainings(results[:1]) == []


def test_rows_that_did_not_run_say_why() -> None:
    """The reason stands in the row's place; a row that failed later keeps its figures, and the reason follows the table."""
    later = measured("later", 5, 1.0)
    later.error = "OSError: no space"
    lines = table([Result("never", "never", error="PeerUnavailable: not installed"), later]).splitlines()
    assert lines[1] == "never: PeerUnavailable: not installed"
    assert lines[2].split()[0] == "later"
    assert lines[3] == "later: OSError: no space"


def test_predictions_are_held_against_the_products_of_the_machine() -> None:
    """The least and the most of ours; the machine's own drift beside them; nothing where nothing is predicted."""
    results = [measured(f"ours, {size}MB", size, seconds, kind="ours") for size, seconds in ((1, 2.0), (2, 1.0))]
    results += [measured("matmul", 0, 0.5), measured("eager", 9, 1.0)]
    for result, seconds in zip(results, (1.8, 1.05, 0.45, 0.0), strict=True):
        result.predicted_us = int(seconds * 1e6)
    ours = "predicted times of 2 rows are off by -10% (ours, 1MB) to +5% (ours, 2MB)"
    assert predictions(results) == [f"{ours}; those of the products alone by -10%"]
    assert predictions(results[:2]) == [ours]
    assert predictions(results[2:]) == predictions([]) == []


# --- the picture ---


def random_results(seed: int) -> list[Result]:
    draw = random.Random(seed)
    kinds = ["ours"] * 5 + ["eager", "checkpointing", "compile:0.25", "compile:0.75", "schedule:per_layer", "bnb"]
    return [measured(f"{kind} {k}", draw.uniform(10, 2000) ** draw.choice((0.3, 1)), draw.uniform(0.5, 3), kind=kind) for k, kind in enumerate(kinds)]


def drawn(results: list[Result], tmp_path: Path) -> Any:
    return xml.fromstring(write_plot(results, tmp_path / "x.svg").read_text())


@pytest.mark.parametrize("seed", range(10))
def test_the_picture_shows_everybody(seed: int, tmp_path: Path) -> None:
    """A dot for each, further right with more bytes and higher with more seconds, and its name, which covers no other's."""
    results = random_results(seed)
    root = drawn(results, tmp_path)
    dots = {item[0].text.rpartition(": ")[0]: (float(item.get("cx")), float(item.get("cy"))) for item in root.iter() if item.tag.endswith("circle")}
    assert sorted(dots) == sorted(result.name for result in results)
    by_size = sorted(results, key=lambda result: result.peak_bytes)
    across = [dots[result.name][0] for result in by_size]
    assert across == sorted(across)
    by_time = sorted(results, key=lambda result: -result.median_s)
    upwards = [dots[result.name][1] for result in by_time]
    assert upwards == sorted(upwards)
    names = {result.name for result in results}
    labels = [(float(item.get("x")), float(item.get("y")), item.text) for item in root.iter() if item.tag.endswith("text") and item.text in names]
    assert {label for _, _, label in labels} == names
    for k, (x, y, label) in enumerate(labels):
        for other_x, other_y, other in labels[:k]:
            beside = x + 6 * len(label) < other_x or other_x + 6 * len(other) < x
            assert beside or abs(y - other_y) > 12.5, (label, other)


def test_the_picture_is_a_page_of_its_own(tmp_path: Path) -> None:
    """No scripts, links, style sheets or images from elsewhere; names are escaped."""
    path = write_plot([measured("<b>&", 5, 1.0)], tmp_path / "x.svg")
    root = xml.fromstring(path.read_text())
    assert {item.tag.partition("}")[2] for item in root.iter()} <= {"svg", "style", "rect", "path", "text", "circle", "title"}
    assert not [name for item in root.iter() for name in item.keys() if "href" in name]
    assert "<b>&" in [item.text for item in root.iter()]


@pytest.mark.parametrize("seed", range(5))
def test_the_curve_is_what_nobody_of_ours_beats(seed: int) -> None:
    """Each point is on it, or another is no larger and no slower; along it bytes rise and seconds fall."""
    results = random_results(seed)
    front = pareto(results)
    for result in results:
        better = [other for other in front if other.peak_bytes <= result.peak_bytes and other.median_s <= result.median_s]
        assert better
        assert result in front or result not in better
    assert all(a.peak_bytes < b.peak_bytes and a.median_s > b.median_s for a, b in itertools.pairwise(front))


def test_a_picture_of_nothing(tmp_path: Path) -> None:
    """Where everybody failed there is still a file, and a table; without malloc's meter tensors are shown."""
    failed = [Result("ours", "ours", error="no")]
    assert "nobody ran" in write_plot(failed, tmp_path / "x.svg").read_text()
    assert [path.name for path in write_report([failed], tmp_path / "new")] == ["bench.txt", "bench.json", "bench.svg"]
    unmetered = Result("eager", "eager", seconds=[1.0], tensor_bytes=7 * MB)
    assert "eager: 7.0 MB, 1 s" in write_plot([unmetered], tmp_path / "x.svg").read_text()


# --- MeZO ---


def test_mezo_moves_against_the_slope() -> None:
    """On a quadratic the two forwards give a step downhill on average, and the perturbation leaves no trace where the slope is zero."""

    class Quadratic(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((4,), 3.0))

        def forward(self, **_: torch.Tensor) -> object:
            return type("Output", (), {"loss": self.weight.square().sum()})

    model = Quadratic()
    step = mezo_step(model, 0.01)
    with torch.no_grad():
        losses = [float(step(input_ids=None, labels=None)) for _ in range(200)]
    assert losses[-1] < 0.1 * losses[0]
    assert mezo_step(Quadratic(), 0.0)(input_ids=None, labels=None) > 0


def test_races_of_a_file_replace_settings_and_bad_ones_are_named(tmp_path: Path) -> None:
    """Each row is a contestant of ours with its own model, sequence and store, alone unless it stands in a list; what is no row is refused with an
    example."""
    settings = Settings("tiny-qwen2", "1MB", weights="int4", store=tmp_path / "tiny-qwen2-int4")
    path = tmp_path / "rows.json"
    everything = {"name": "all", "lora_rank": 0, "weights": None, "store": None, "model": "qwen2.5-0.5b"}
    path.write_text(json.dumps([{"name": "long", "sequence": 64}, everything, [{"name": "a", "budget": "2MB"}, {"name": "b", "kind": "eager"}]]))
    (long,), (whole,), pair = read_races(path, settings)
    assert [(each.name, each.kind, each.settings.budget) for each in pair] == [("a", "ours", "2MB"), ("b", "eager", "1MB")]
    assert (long.name, long.settings.sequence, long.settings.store) == ("long", 64, settings.store)
    assert (whole.settings.lora_rank, whole.settings.store, whole.settings.weights) == (0, None, None)
    for text in ("{}", "[3]", "[[3]]", '[{"sequence": 3}]', '[{"name": "x", "colour": 3}]', "no json"):
        path.write_text(text)
        with pytest.raises(OptionError, match="write a list such as"):
            read_races(path, settings)
