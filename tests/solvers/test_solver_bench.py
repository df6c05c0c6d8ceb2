"""solvers.bench and the frozen instances: records only get better, and the solver of today keeps up with them."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
from generators import layered

from solvers.__main__ import main
from solvers.bench import SEED, TOLERANCE, BenchError, Entry, Record, Row, new_entries, problem_of, read_entries, run, updated, write_entries
from solvers.cut_bound import lower_bound_us
from solvers.problem import ProblemError, read_problem
from solvers.solve import solve

INSTANCES = Path(__file__).resolve().parent.parent / "instances"
ENTRIES = read_entries(INSTANCES)
LARGE = 1200  # ops: more than this is left to `make test-all`
TIGHTEST = {entry.file: entry for entry in sorted(ENTRIES, key=lambda entry: -entry.budget_bytes)}  # of each problem
SMALL = [entry for entry in TIGHTEST.values() if len(problem_of(INSTANCES, entry).ops) <= LARGE]

KNOWN = Record(1000, 1.0, 60.0, "greedy", "abc")
ENTRY = Entry("chain@30%", "chain.json", 100, 900, {"fast": KNOWN})


def row(time_us: int, bound_us: int = 0, entry: Entry = ENTRY) -> Row:
    """The entry, solved now in `time_us` with a bound of `bound_us`."""
    return Row(entry, "fast", replace(KNOWN, time_us=time_us, commit="def"), bound_us)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one packed problem of 24 ops and no table."""
    (tmp_path / "chain.json.gz").write_bytes(gzip.compress(replace(layered(0, 24), name="chain").to_json().encode()))
    return tmp_path


# --- records ---


def test_only_what_is_better_is_recorded() -> None:
    """A faster answer and a higher bound replace the old ones, and the same answer found sooner; a slower answer and a lower bound change nothing."""
    assert updated(row(1004, 800)) == ENTRY
    assert updated(Row(ENTRY, "fast", replace(KNOWN, seconds=KNOWN.seconds + 1), 0)) == ENTRY
    assert updated(Row(ENTRY, "fast", replace(KNOWN, seconds=KNOWN.seconds / 2), 0)).records["fast"].seconds == KNOWN.seconds / 2
    better = updated(row(980, 950))
    assert (better.best_us, better.bound_us, better.records["fast"].commit) == (980, 950, "def")
    first = updated(Row(ENTRY, "balanced", replace(KNOWN, time_us=990), 0))
    assert {effort: record.time_us for effort, record in first.records.items()} == {"fast": 1000, "balanced": 990}


def test_a_bound_above_a_schedule_is_never_recorded() -> None:
    """A bound above the time found, or above the record of any effort, raises and names the instance."""
    for crossing in (row(1000, 1001), row(899), row(2000, 1001)):
        with pytest.raises(BenchError, match="chain@30%"):
            updated(crossing)
        assert "one of the two is wrong" in " ".join(crossing.faults())


def test_faults() -> None:
    """Up to TOLERANCE slower than the record is no fault, more is one; without a record there is nothing to be slower than."""
    assert row(int(1000 * (1 + TOLERANCE)), 900).faults() == []
    assert "slower" in " ".join(row(int(1000 * (1 + TOLERANCE)) + 1).faults())
    assert row(5000, entry=replace(ENTRY, records={})).faults() == []


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    """read_entries gives what write_entries got, sorted by name; a table that isn't one is refused."""
    write_entries(tmp_path, [ENTRY, replace(ENTRY, name="a", records={})])
    assert read_entries(tmp_path) == [replace(ENTRY, name="a", records={}), ENTRY]
    for text in ("[]", "{}", '{"format": 7, "instances": []}', '{"format": 1, "instances": [{"name": 1}]}'):
        (tmp_path / "best.json").write_text(text)
        with pytest.raises(BenchError):
            read_entries(tmp_path)
    with pytest.raises(BenchError, match="--instances"):
        read_entries(tmp_path / "gone")


def test_packed_problems(folder: Path) -> None:
    """A .json.gz file gives the problem that was packed; one that is cut short or isn't packed is refused as a problem."""
    path = folder / "chain.json.gz"
    assert read_problem(path).name == "chain"
    data = path.read_bytes()
    for broken in (data[: len(data) // 2], b"{}", data[:10] + b"\xff" * 40):
        path.write_bytes(broken)
        with pytest.raises(ProblemError):
            read_problem(path)


# --- the command ---


def test_bench_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--add makes entries, --update fills them, a second run finds nothing worse, and a record out of reach gives exit code 1."""
    arguments = ["bench", "--instances", str(folder), "--effort", "fast"]
    assert main([*arguments, "--add", str(folder / "chain.json.gz"), "--shares", "0.5,1", "--update"]) == 0
    entries = read_entries(folder)
    assert [entry.name for entry in entries] == ["chain@100%", "chain@50%"]
    assert entries[0].budget_bytes == read_problem(folder / "chain.json.gz").with_budget(entries[0].budget_bytes).budget_bytes
    assert all(0 < entry.bound_us <= entry.records["fast"].time_us for entry in entries)
    assert main(arguments) == 0
    assert "nothing is worse" in capsys.readouterr().out
    write_entries(folder, [replace(entry, bound_us=1, records={"fast": replace(entry.records["fast"], time_us=10)}) for entry in entries])
    before = (folder / "best.json").read_text()
    assert main([*arguments, "--only", "50%"]) == 1
    assert "slower than the record" in capsys.readouterr().out
    assert (folder / "best.json").read_text() == before


def test_bench_command_refuses(folder: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown instance, a folder without a table and a problem from elsewhere are one line on stderr and exit code 1."""
    write_entries(folder, [ENTRY])
    other = tmp_path_factory.mktemp("other")
    for extra in (["--only", "gone"], ["--instances", str(other)], ["--add", str(other / "chain.json.gz")]):
        assert main(["bench", "--instances", str(folder), "--effort", "fast", *extra]) == 1
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_new_entries_lie_between_the_smallest_budget_and_keep_all(folder: Path) -> None:
    """Share 0 is the smallest budget found, 1 keep-all's, and both solve."""
    least, most = new_entries(folder / "chain.json.gz", (0.0, 1.0))
    assert least.budget_bytes < most.budget_bytes
    assert run(folder, most, "fast", 1.0).gap == 0.0
    assert run(folder, least, "fast", 1.0).found.time_us >= run(folder, most, "fast", 1.0).found.time_us


# --- the instances ---


def test_the_table_is_whole() -> None:
    """Every problem of the folder has an entry, every entry a problem, a fast and a balanced record, and a bound that no record crosses."""
    assert {entry.file for entry in ENTRIES} == {path.name for path in INSTANCES.glob("*.json.gz")}
    for entry in ENTRIES:
        assert {"fast", "balanced"} <= set(entry.records), entry.name
        assert all(0 < entry.bound_us <= record.time_us for record in entry.records.values()), entry.name
        assert entry.records["balanced"].time_us <= entry.records["fast"].time_us, entry.name
    assert sum(path.stat().st_size for path in INSTANCES.iterdir() if path.is_file()) < 3_000_000
    assert len(json.loads((INSTANCES / "best.json").read_text())["instances"]) == len({entry.name for entry in ENTRIES})


@pytest.mark.parametrize("entry", SMALL, ids=lambda entry: entry.name)
def test_small_instances_keep_up(entry: Entry) -> None:
    """The greedy answer, which no limit cuts, is as good as its record, and today's bound as high as the best one, but below every schedule."""
    problem = problem_of(INSTANCES, entry)
    found, bound = solve(problem, "fast", seed=SEED).report.time_us, lower_bound_us(problem)
    assert found <= entry.records["fast"].time_us * (1 + TOLERANCE)
    assert entry.bound_us * (1 - TOLERANCE) <= bound <= min(found, entry.best_us or found)


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_all_instances_keep_up(entry: Entry) -> None:
    """With the limit that its record was found with, no instance is worse than its record, and no bound crosses a value."""
    assert run(INSTANCES, entry, "balanced", entry.records["balanced"].limit_s).faults() == []
