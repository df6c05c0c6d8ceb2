"""The documents tell the truth: links and paths exist, runnable snippets run, and the quickstart does what it says."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from law1 import estimated_costs

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("README.md")])
HOMES = (ROOT, ROOT / "mebp_compile", ROOT / "solvers")  # where a path in a document may start
WRITTEN = {"program.py"}  # a file that saving a plan writes, not one of the repository
LINK = re.compile(r"\[[^\]\n]*\]\(([^()\s]+)\)")
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
FILE = re.compile(r"[\w.-]+(?:/[\w.-]+)*\.(?:py|md|c|toml)")
FOLDER = re.compile(r"[\w.-]+(?:/[\w.-]+)*/")
DEEP = re.compile(r"(?<![\w./-])(?:mebp_compile|solvers|tests|docs|examples)/[\w./-]*\w")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
RUNNABLE = re.compile(r"^```python runnable\n(.*?)^```$", re.MULTILINE | re.DOTALL)
names = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings: lower case, words joined by hyphens."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing_links(document: Path) -> Iterator[str]:
    """Relative links of a document whose file, or heading in it, does not exist."""
    for link in LINK.findall(FENCE.sub("", document.read_text())):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


def missing_paths(document: Path) -> Iterator[str]:
    """Files and folders that a document names, in a span of code or anywhere below a folder of the repository, and that do not exist."""
    text = document.read_text()
    spans = SPAN.findall(FENCE.sub("", text))
    named = {span for span in spans if FILE.fullmatch(span) or (FOLDER.fullmatch(span) and document.name != "README.md")}
    for name in sorted((named | set(DEEP.findall(text))) - WRITTEN):
        if not any((home / name).exists() for home in (*HOMES, document.parent)):
            yield name


@names
def test_links_and_paths_exist(document: Path) -> None:
    """Every relative link, and every file and folder that a document names, exists in the repository."""
    assert [*missing_links(document), *missing_paths(document)] == []


def test_missing_links_and_paths_are_found(tmp_path: Path) -> None:
    """The check above sees a link, a heading, a file and a folder that are not there, and nothing else."""
    document = tmp_path / "document.md"
    document.write_text(
        "# A heading\n[a](gone.md) [b](#a-heading) [c](#gone) [d](https://host/page) `gone.py` `planning.py` `program.py` `capture/` `gone/`\n"
        "```sh\npython examples/gone.py solvers/solve.py\n```\n"
    )
    assert list(missing_links(document)) == ["gone.md", "#gone"]
    assert list(missing_paths(document)) == ["examples/gone.py", "gone.py", "gone/"]


@pytest.fixture
def quiet_torch() -> Iterator[None]:
    """What a snippet does to the number of threads and to the generator ends with it."""
    threads, generator = torch.get_num_threads(), torch.get_rng_state()
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(generator)


@pytest.mark.usefixtures("quiet_torch")
@pytest.mark.parametrize("document", [path for path in DOCUMENTS if RUNNABLE.search(path.read_text())], ids=lambda path: path.name)
def test_snippets_run(document: Path, disk_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The snippets marked `python runnable` execute, in the order of the document and in one namespace, with estimated costs."""
    monkeypatch.chdir(disk_folder)
    text, scope = document.read_text(), {"__name__": document.stem}
    with estimated_costs():
        for snippet in RUNNABLE.finditer(text):
            above = "\n" * (text[: snippet.start(1)].count("\n"))  # so that a traceback names the document's line
            exec(compile(above + snippet[1], str(document), "exec"), scope)


def quickstart() -> Any:
    """The module examples/quickstart.py."""
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "examples" / "quickstart.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("quiet_torch")
def test_quickstart_at_a_small_scale(disk_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """examples/quickstart.py recomputes to stay inside its budget, equals eager bit for bit, and writes what it says."""
    compiled = quickstart().main(budget="2.3MB", rows=128, steps=2, folder=disk_folder)
    assert compiled.plan.peak_bytes <= 2_300_000 < compiled.plan.keep_all_bytes
    assert compiled.plan.report.recomputes > 0
    assert "equal bit for bit" in capsys.readouterr().out
    assert {"program.py", "timeline.html"} <= {path.name for path in disk_folder.iterdir()}
