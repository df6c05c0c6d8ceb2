"""The command line: what reads plans works without torch; what plans and trains does what eager training does."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from law1 import in_one_block
from planned import costs_by_bytes, roomy, tight

from mebp_compile import cli
from mebp_compile.artifacts import check_artifacts, load_artifacts, save_artifacts
from mebp_compile.cli import main
from mebp_compile.config import format_bytes
from mebp_compile.data import IGNORED, ByteTokens, batches, blocks, read_examples
from mebp_compile.errors import OptionError
from mebp_compile.explain import explain, why
from mebp_compile.finetune import Settings, _on_meta, build_model, load_tokens, make_step
from mebp_compile.progress import Progress

TINY = ["--model", "tiny-qwen2", "--sequence", "32", "--dtype", "float32", "--effort", "fast", "--quiet"]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of artifacts of the tight step."""
    step = tight(True)
    return save_artifacts(tmp_path_factory.mktemp("artifacts") / "step", step.graph, step.plan, step.code)


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Costs by bytes instead of measured ones, and an empty cache: these tests are about what the commands do, not about times."""
    monkeypatch.setenv("MEBP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("mebp_compile.compiler.measure_costs", lambda graph, *_, **__: (costs_by_bytes(graph), in_one_block(graph)))


# --- readers ---


def test_readers_print_what_the_functions_say(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """explain, why and check print the text of the functions of those names, for the loaded plan."""
    step = tight(True)
    name = step.graph.ops[10].name
    for arguments, text in (
        (["explain", str(saved)], explain(step.graph, step.plan)),
        (["explain", str(saved), "--module", "layers.1"], explain(step.graph, step.plan, "layers.1")),
        (["why", str(saved), name], why(step.graph, step.plan, name)),
        (["check", str(saved)], check_artifacts(saved)),
    ):
        assert main(arguments) == 0
        assert capsys.readouterr().out == text + "\n"


@pytest.mark.parametrize("name", ["timeline.html", "graph.svg", "graph.dot", "trace.json"])
def test_show_writes_the_picture(name: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """show writes the file and prints its name."""
    assert main(["show", str(saved), str(tmp_path / name)]) == 0
    assert (tmp_path / name).stat().st_size > 1000
    assert capsys.readouterr().out.strip() == str(tmp_path / name)


def test_readers_work_where_torch_can_not_be_imported(saved: Path, tmp_path: Path) -> None:
    """In a process in which importing torch fails, explain, why, show and check all succeed."""
    code = (
        "import sys\nfor name in ('torch', 'transformers', 'peft'): sys.modules[name] = None\n"
        "from mebp_compile.cli import main\nfolder, out, name = sys.argv[1:]\n"
        "runs = [['explain', folder], ['why', folder, name], ['check', folder], "
        "['show', folder, out + '/t.html'], ['show', folder, out + '/g.svg']]\n"
        "sys.exit(max(main(arguments) for arguments in runs))"
    )
    name = tight(True).graph.ops[0].name
    done = subprocess.run([sys.executable, "-c", code, str(saved), str(tmp_path), name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "t.html").exists()


@pytest.mark.parametrize(
    "arguments",
    [["explain", "nowhere"], ["why", "FOLDER", "nothing_like_it"], ["show", "FOLDER", "picture.png"], ["explain", "FOLDER", "--module", "layers.77"],
     ["plan", "--model", "no-such-model", "--budget", "1MB"], ["plan", "--model", "tiny-qwen2", "--budget", "lots", "--quiet", "--sequence", "8"],
     ["train", "--model", "tiny-qwen2", "--budget", "1MB", "--data", "nowhere.txt", "--steps", "1"],
     ["plan", "--model", "tiny-qwen2", "--budget", "1MB", "--batch", "0"]],
)  # fmt: skip
def test_mistakes_are_told_with_what_to_try(arguments: list[str], saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mistake gives status 2 and one message with a "try:", no traceback."""
    assert main([str(saved) if item == "FOLDER" else item for item in arguments]) == 2
    error = capsys.readouterr().err
    assert "try:" in error
    assert "Traceback" not in error


# --- plan and train ---


def test_plan_refuses_what_can_not_fit_and_saves_what_does(unmeasured: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A budget too small is refused with the smallest one found; with that, plan prints the summary and saves artifacts that pass check."""
    assert main(["plan", *TINY, "--budget", "100KB"]) == 2
    smallest = capsys.readouterr().err.split("budget=")[1].split(",")[0]
    assert main(["plan", *TINY, "--budget", smallest, "--out", str(tmp_path / "step")]) == 0
    graph, plan, _ = load_artifacts(tmp_path / "step")
    assert plan.peak_bytes <= int(smallest) < plan.keep_all_bytes
    assert f"peak {format_bytes(plan.peak_bytes)}" in capsys.readouterr().out
    assert sum(storage.role == "optimizer" for storage in graph.storages) == 2 * 14 * 3  # A and B of 14 linear layers: step and two moments
    assert len(check_artifacts(tmp_path / "step").splitlines()) == 7  # pages given back among them


def test_train_gives_the_losses_and_the_adapter_of_eager_training(
    unmeasured: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The logged losses and the saved adapter of three steps equal, bit for bit, those of the same loop run eagerly."""
    import torch
    from safetensors.torch import load_file

    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"{n} and {n + 1} is ", "completion": f"{2 * n + 1}, of course"}) for n in range(40)))
    arguments = [*TINY, "--budget", "3MB", "--lr", "0.01", "--data", str(data), "--steps", "3"]
    assert main(["train", *arguments, "--adapter-out", str(tmp_path / "adapter"), "--log", str(tmp_path / "log.jsonl")]) == 0

    settings = Settings(model="tiny-qwen2", budget="3MB", sequence=32, lr=0.01, dtype="float32")
    model, _ = build_model(settings)
    step, _ = make_step(model, settings)
    source = batches(blocks(read_examples(data), load_tokens(settings), 32), 1, settings.seed)
    losses = [step(*next(source)).item() for _ in range(3)]

    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == losses
    assert f"{losses[-1]:.4f} at step 3" in capsys.readouterr().out
    eager = {name.replace(".default.", "."): p for name, p in model.named_parameters() if p.requires_grad}
    trained = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert trained.keys() == eager.keys()
    assert all(torch.equal(trained[name], eager[name]) for name in eager)
    assert any(trained[name].abs().max() > 0 for name in trained if "lora_B" in name)


@pytest.mark.slow
def test_quantised_plan_keeps_the_weights_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --weights int4 the frozen matrices are weights of a store, none of them a parameter in memory; the plan passes check."""
    monkeypatch.setenv("MEBP_CACHE", str(tmp_path / "cache"))
    arguments = ["--weights", "int4", "--store", str(tmp_path / "store"), "--optimizer", "sgd", "--out", str(tmp_path / "step")]
    assert main(["plan", "--model", "tiny-qwen2", "--sequence", "32", "--effort", "fast", "--quiet", "--budget", "1.5MB", *arguments]) == 0
    graph, _, _ = load_artifacts(tmp_path / "step")
    resident = [
        s for s in graph.storages if s.role == "parameter" and "lora" not in s.source and "norm" not in s.source and "bias" not in s.source
    ]
    assert resident == []
    assert any(s.role == "weight" for s in graph.storages)
    assert len(check_artifacts(tmp_path / "step").splitlines()) == 6


def test_a_model_on_meta_has_real_buffers_and_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With quantised weights the base is on meta, while buffers and adapters are real: A random, B zero, in the model's dtype."""
    import torch

    settings = Settings(model="tiny-qwen2", budget="1MB", weights="int4", store=tmp_path / "store")
    model, store = build_model(settings)
    assert store is not None
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(adapters) == 28
    assert all(not p.is_meta and p.dtype == torch.bfloat16 for p in adapters.values())
    assert all(bool((p == 0).all()) == ("lora_B" in name) for name, p in adapters.items())
    assert all(p.is_meta for p in model.parameters() if not p.requires_grad)
    plain, _ = build_model(Settings(model="tiny-qwen2", budget="1MB"))
    expected = dict(plain.named_buffers())
    assert all(torch.equal(buffer, expected[name]) for name, buffer in model.named_buffers())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]  # tied is still tied
    store.close()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("qwen2.5-0.5b", 494_032_768), ("qwen2.5-1.5b", 1_543_714_304), ("qwen2.5-3b", 3_085_938_688), ("gemma3-1b", 999_885_952),
     ("gemma3-4b", 3_880_263_168), ("qwen3-0.6b", 596_049_920), ("llama-3.1-8b", 8_030_261_248)],
)  # fmt: skip
def test_named_models_have_their_published_size(name: str, parameters: int) -> None:
    """Built on meta, tied where the model is: as many parameters as the published checkpoint has."""
    model = _on_meta(Settings(model=name, budget="1GB"))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())


# --- data ---


def test_jsonl_forms_give_loss_where_they_should(tmp_path: Path) -> None:
    """Text gives loss everywhere, a completion but not its prompt, an assistant's messages but not the user's."""
    rows: list[dict[str, Any]] = [
        {"text": "abc"}, {"prompt": "ab", "completion": "cd"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]},
    ]  # fmt: skip
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_examples(path) == [[("abc", True)], [("ab", False), ("cd", True)], [("user: hi\n", False), ("assistant: yes\n", True)]]


def test_blocks_are_the_tokens_end_to_end() -> None:
    """Ids joined in order with the end token between examples, labels ignored in prompts, the rest of a block dropped."""
    made = blocks([[("ab", False), ("c", True)], [("defg", True)]], ByteTokens(), 4)
    assert made == [([97, 98, 99, 256], [IGNORED, IGNORED, 99, 256]), ([100, 101, 102, 103], [100, 101, 102, 103])]


def test_blocks_without_loss_are_left_out_and_none_is_an_error() -> None:
    """A block whose labels are all ignored would give NaN: it is left out; nothing left is an OptionError."""
    assert len(blocks([[("x" * 8, False), ("y" * 8, True)]], ByteTokens(), 4)) == 2
    with pytest.raises(OptionError, match="block"):
        blocks([[("x" * 8, False)]], ByteTokens(), 4)
    with pytest.raises(OptionError, match="shorter"):
        blocks([[("abc", True)]], ByteTokens(), 100)


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"prompt": "a"}', '{"messages": [{"content": "x"}]}', "3"])
def test_a_bad_line_is_named(line: str, tmp_path: Path) -> None:
    """A line that is not an example is an OptionError with its number."""
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(OptionError, match="line 2"):
        read_examples(path)


def test_batches_go_round_the_data() -> None:
    """Every block comes once before any comes twice, and the same seed gives the same order."""
    data = [([n], [n]) for n in range(6)]
    first, again = batches(data, 2, seed=3), batches(data, 2, seed=3)
    drawn = [next(first)[0].flatten().tolist() for _ in range(6)]
    assert sorted(chain(*drawn[:3])) == sorted(chain(*drawn[3:])) == list(range(6))
    assert drawn == [next(again)[0].flatten().tolist() for _ in range(6)]


# --- progress ---


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_redraws_one_line_on_a_terminal() -> None:
    """On a terminal there is one line, rewritten, that ends full; lines said in between stay."""
    now = [0.0]
    screen = Screen()
    progress = Progress(stream=screen, clock=lambda: now[0])
    for done in range(1, 11):
        now[0] += 1
        progress.update("train", done, 10, f"loss {done}")
    assert screen.getvalue().count("\n") == 1
    assert screen.getvalue().count("\r") == 10
    assert "10/10  loss 10" in screen.getvalue().rsplit("\r", 1)[1]


def test_progress_elsewhere_prints_few_plain_lines() -> None:
    """In a file there are no carriage returns, the first and last part have a line, and those between come 5 s apart."""
    now = [0.0]
    stream = io.StringIO()
    progress = Progress(stream=stream, clock=lambda: now[0])
    for done in range(1, 21):
        now[0] += 1
        progress.update("solve", done, 20)
    assert stream.getvalue().splitlines() == ["solve: 1/20", "solve: 6/20", "solve: 11/20", "solve: 16/20", "solve: 20/20"]


def test_quiet_progress_says_nothing() -> None:
    """Quiet means no output at all."""
    screen = Screen()
    progress = Progress(quiet=True, stream=screen)
    with progress.stage("plan"):
        progress.update("x", 1, 1)
    progress.say("x")
    assert screen.getvalue() == ""


def test_the_roomy_plan_is_not_the_tight_one() -> None:
    """The two plans that these tests use differ in what they do (or nothing above would show a difference)."""
    assert roomy().plan.report.recomputes == 0 < tight(True).plan.report.recomputes


def test_a_folder_that_does_not_exist_is_refused_before_the_model_is_built(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="there is no folder"):
        Settings("tiny-qwen2", "1MB", offload=tmp_path / "none")


def test_all_parameters_can_be_trained(unmeasured: None, disk_folder: Path, tmp_path: Path) -> None:
    """A LoRA rank of 0 trains and saves the model itself; with quantised weights it is refused."""
    import transformers

    with pytest.raises(OptionError, match="trains them all"):
        Settings(model="tiny-qwen2", budget="4MB", lora_rank=0, weights="int4")
    data = tmp_path / "notes.txt"
    data.write_text("all parameters, all of them. " * 40)
    shape = ["--model", "tiny-qwen2", "--budget", "4MB", "--sequence", "32", "--lora-rank", "0", "--optimizer", "sgd", "--lr", "0.1"]
    out = tmp_path / "model"
    assert main(["train", *shape, "--data", str(data), "--steps", "3", "--adapter-out", str(out), "--offload", str(disk_folder), "--quiet"]) == 0
    trained = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="bfloat16")
    torch.manual_seed(0)
    fresh, _ = build_model(Settings(model="tiny-qwen2", budget="4MB", lora_rank=0))
    moved = [not torch.equal(a, b) for (_, a), (_, b) in zip(trained.named_parameters(), fresh.named_parameters(), strict=True)]
    assert sum(moved) > len(moved) // 2


def test_only_what_runs_steps_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers of a saved plan start at once; each name in RUN_STEPS is a command."""
    started = []
    monkeypatch.setattr("mebp_compile.measure.process.restart_with_small_heap", lambda: started.append(sys.argv[1]))
    monkeypatch.setattr(cli, "main", lambda: 0)
    for name in ("explain", "check", "--help", *cli.RUN_STEPS):
        monkeypatch.setattr(sys, "argv", ["mebp", name])
        assert cli.command() == 0
    assert started == ["plan", "train", "run", "bench"]
    commands = next(action.choices for action in cli.parser()._actions if action.choices)
    assert set(cli.RUN_STEPS) <= set(commands)
