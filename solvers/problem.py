"""A training step as a scheduling problem: ops, storages, bytes and microseconds. No tensors, no torch.

Everything is a frozen dataclass and round-trips through JSON, so a bug report is a file.
Ids are indices into `Problem.ops` and `Problem.storages`. Bytes and microseconds are integers.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1


class ProblemError(ValueError):
    """The problem is malformed. The message names the op or storage and says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to run an op.

    reads: storages that must be live; disk_bytes are read inside the op and are already inside time_us;
    trips (of a loop) only informs.
    """

    reads: tuple[int, ...]
    workspace_bytes: int = 0
    time_us: int = 0
    trips: int = 1
    disk_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Op:
    """One op. creates: storages that it allocates. writes: storages it modifies in place (not repeated in reads).

    choices[0] is the default. rng ops keep their base order among each other (first runs).
    rerunnable=False forbids a second run. optional: need not run where nobody reads what it creates (a weight that is
    dequantised for choices that a schedule may not take).
    """

    name: str
    choices: tuple[Choice, ...]
    creates: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    rng: bool = False
    rerunnable: bool = True
    phase: str = "forward"
    module: str = ""
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Storage:
    """A block of bytes.

    persistent: exists before the step, and after it at its final version.
    movable: may be written to and read from disk; for a persistent one `Schedule.resident` decides its home.
    output: created in the step and live at its end.
    stored: a persistent movable one that no op writes is on disk wherever its home is (a packed weight in its store): it may leave memory at any
    time, and is never written.
    """

    name: str
    size_bytes: int
    persistent: bool = False
    movable: bool = True
    output: bool = False
    stored: bool = False


@dataclass(frozen=True, slots=True)
class Problem:
    """Ops in their fixed base order, the storages they use, the budget and the speed of the disk.

    constant_bytes are live throughout. Each transfer takes latency_us + ceil(size / bandwidth), and delays compute by the share
    `interference` of that, rounded down: copying takes a core, or memory bandwidth.
    can_offload=False forbids writes to disk; reading persistent storages whose home is the disk stays possible.
    away_limit_bytes: where what is not in memory lies may be small too (host memory, for an accelerator): the most bytes of storages that are at
    home there or are ever offloaded; None is no limit.
    """

    ops: tuple[Op, ...]
    storages: tuple[Storage, ...]
    budget_bytes: int
    constant_bytes: int = 0
    read_bytes_per_us: float = 1000.0
    write_bytes_per_us: float = 500.0
    latency_us: int = 50
    interference: float = 0.0
    can_offload: bool = True
    away_limit_bytes: int | None = None
    name: str = ""

    def validate(self) -> None:
        """Raise ProblemError naming the first op or storage that breaks a rule of the format."""
        _validate_numbers(self)
        _validate_storages(self)
        creator: dict[int, int] = {}
        written: set[int] = set()
        for index, op in enumerate(self.ops):
            _validate_op(self, op)
            for storage in op.creates:
                _validate_creation(self, op, storage, creator)
                creator[storage] = index
            written.update(op.writes)
        _validate_definitions(self, creator)
        for storage in sorted(written):
            if self.storages[storage].stored:
                raise ProblemError(f"storage {self.storages[storage].name}: stored, but an op writes it")
        for op in self.ops:
            _validate_optional(self, op, written)

    def with_budget(self, budget_bytes: int) -> Problem:
        """The same problem under another budget."""
        return replace(self, budget_bytes=budget_bytes)

    def moving_only(self, kept: Collection[int]) -> Problem:
        """The same problem in which only these of its movable storages move."""
        moving = (info if s in kept else replace(info, movable=False, stored=False) for s, info in enumerate(self.storages))
        return replace(self, storages=tuple(moving))

    def to_json(self) -> str:
        """The problem as JSON text; `from_json` gives an equal problem back."""
        return json.dumps({"format": FORMAT_VERSION, **asdict(self)}, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Problem:
        """Parse and validate. Raises ProblemError for anything that is not a valid problem."""
        try:
            data = json.loads(text)
            problem = _from_dict(data)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ProblemError(f"not a problem in JSON: {error!r}") from error
        problem.validate()
        return problem


def read_problem(path: Path) -> Problem:
    """The problem in a .json file, or in a .json.gz one. Raises ProblemError for what is no problem, OSError for what can't be read."""
    data = path.read_bytes()
    try:
        return Problem.from_json((gzip.decompress(data) if path.suffix == ".gz" else data).decode())
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ProblemError(f"{path} is neither JSON nor JSON packed by gzip: {error}") from error


def _from_dict(data: Mapping[str, Any]) -> Problem:
    """Rebuild the dataclasses from plain JSON values."""
    fields = dict(data)
    version = fields.pop("format", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise ProblemError(f"problem format {version!r} is not {FORMAT_VERSION}: write it again with this version")
    fields["ops"] = tuple(_op_from_dict(op) for op in data["ops"])
    fields["storages"] = tuple(Storage(**storage) for storage in data["storages"])
    return Problem(**fields)


def _op_from_dict(data: Mapping[str, Any]) -> Op:
    fields = dict(data)
    fields["choices"] = tuple(Choice(**{**choice, "reads": tuple(choice["reads"])}) for choice in data["choices"])
    fields["creates"] = tuple(data.get("creates", ()))
    fields["writes"] = tuple(data.get("writes", ()))
    return Op(**fields)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _validate_numbers(problem: Problem) -> None:
    for field in ("budget_bytes", "constant_bytes", "latency_us"):
        if not _is_count(getattr(problem, field)):
            raise ProblemError(f"{field} must be an integer >= 0, not {getattr(problem, field)!r}")
    for field in ("read_bytes_per_us", "write_bytes_per_us"):
        if not getattr(problem, field) > 0:
            raise ProblemError(f"{field} must be positive, not {getattr(problem, field)!r}")
    if problem.away_limit_bytes is not None and not _is_count(problem.away_limit_bytes):
        raise ProblemError(f"away_limit_bytes must be None or an integer >= 0, not {problem.away_limit_bytes!r}")
    if not 0 <= problem.interference <= 1:
        raise ProblemError(f"interference must be a share from 0 to 1, not {problem.interference!r}")


def _validate_storages(problem: Problem) -> None:
    for storage in problem.storages:
        if not _is_count(storage.size_bytes):
            raise ProblemError(f"storage {storage.name}: size_bytes must be an integer >= 0")
        if storage.persistent and storage.output:
            raise ProblemError(f"storage {storage.name}: persistent storages are kept anyway, don't mark them output")
        if storage.stored and not (storage.persistent and storage.movable):
            raise ProblemError(f"storage {storage.name}: only persistent movable storages are stored")


def _validate_op(problem: Problem, op: Op) -> None:
    """Numbers, ids and repetitions of one op."""
    if not op.choices:
        raise ProblemError(f"op {op.name}: needs at least one choice")
    _validate_ids(problem, op, op.creates, "creates")
    _validate_ids(problem, op, op.writes, "writes")
    if set(op.creates) & set(op.writes):
        raise ProblemError(f"op {op.name}: creates and writes the same storage")
    for choice in op.choices:
        _validate_ids(problem, op, choice.reads, "reads")
        if set(choice.reads) & (set(op.creates) | set(op.writes)):
            raise ProblemError(f"op {op.name}: reads repeats a storage of creates or writes")
        for field in ("workspace_bytes", "time_us", "trips", "disk_bytes"):
            if not _is_count(getattr(choice, field)):
                raise ProblemError(f"op {op.name}: {field} must be an integer >= 0")


def _validate_optional(problem: Problem, op: Op, written: set[int]) -> None:
    """An optional op may run at any time before somebody reads what it makes, or not at all."""
    if not op.optional:
        return
    if op.writes or op.rng or not op.creates or any(problem.storages[s].output for s in op.creates):
        raise ProblemError(f"op {op.name}: an optional op only creates storages, none an output, and draws no random numbers")
    if written & {*op.creates, *(read for choice in op.choices for read in choice.reads)}:
        raise ProblemError(f"op {op.name}: what an optional op reads or creates is never written in place")


def _validate_ids(problem: Problem, op: Op, ids: Iterable[int], field: str) -> None:
    seen: set[int] = set()
    for storage in ids:
        if not _is_count(storage) or storage >= len(problem.storages):
            raise ProblemError(f"op {op.name}: {field} names storage {storage!r}, which does not exist")
        if storage in seen:
            raise ProblemError(f"op {op.name}: {field} repeats storage {problem.storages[storage].name}")
        seen.add(storage)


def _validate_creation(problem: Problem, op: Op, storage: int, creator: Mapping[int, int]) -> None:
    name = problem.storages[storage].name
    if problem.storages[storage].persistent:
        raise ProblemError(f"op {op.name}: creates persistent storage {name}, which exists already")
    if storage in creator:
        raise ProblemError(f"op {op.name}: creates storage {name}, as {problem.ops[creator[storage]].name} does")


def _validate_definitions(problem: Problem, creator: Mapping[int, int]) -> None:
    """Every storage is persistent or created, and nothing is used before it is created."""
    for index, storage in enumerate(problem.storages):
        if not storage.persistent and index not in creator:
            raise ProblemError(f"storage {storage.name}: neither persistent nor created by an op")
    for position, op in enumerate(problem.ops):
        for used in (*op.writes, *(read for choice in op.choices for read in choice.reads)):
            if creator.get(used, -1) >= position:
                raise ProblemError(f"op {op.name}: uses storage {problem.storages[used].name} before it is created")


def creators(problem: Problem) -> tuple[int, ...]:
    """For every storage the op that creates it, or -1 for persistent ones."""
    result = [-1] * len(problem.storages)
    for index, op in enumerate(problem.ops):
        for storage in op.creates:
            result[storage] = index
    return tuple(result)


def used_versions(problem: Problem) -> tuple[dict[int, int], ...]:
    """For every op: storage -> version that the op finds in base order, for reads (of any choice) and writes.

    A persistent storage starts at version 0, its creation gives version 1, each write adds 1.
    """
    version = [0] * len(problem.storages)
    result = []
    for op in problem.ops:
        used = {read: version[read] for choice in op.choices for read in choice.reads}
        used.update((written, version[written]) for written in op.writes)
        result.append(used)
        for created in op.creates:
            version[created] = 1
        for written in op.writes:
            version[written] += 1
    return tuple(result)


def final_versions(problem: Problem) -> tuple[int, ...]:
    """For every storage its version at the end of the base order."""
    version = [0 if storage.persistent else 1 for storage in problem.storages]
    for op in problem.ops:
        for written in op.writes:
            version[written] += 1
    return tuple(version)


def pinned_bytes(problem: Problem) -> int:
    """Bytes that no schedule can free: the constant and the persistent storages that don't move."""
    return problem.constant_bytes + sum(s.size_bytes for s in problem.storages if s.persistent and not s.movable)
