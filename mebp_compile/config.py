"""Budgets and options, parsed once; the only reader of MEBP_* environment variables."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from mebp_compile.errors import BudgetError, OptionError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
TIERS = ("exact", "reassociate", "approximate")
SOLVERS = ("keep_all", "per_layer", "mebp", "mesp", "recompute_all")  # fixed schedules to compare with; None searches
SCHEMES = ("int4", "nf4", "int8")
BUDGET_FIX = 'give bytes or a string such as "256MB" (10^6) or "1GiB" (2^30)'


SCOPES = ("step", "process")


@dataclass(frozen=True)
class Budget:
    """How much memory, and whose. scope "step": everything that the step needs, above the process as it is without it. scope "process": all
    anonymous memory of the lean process that runs the saved step, interpreter and torch included.

    For a step on an accelerator `Budget(device="4GB", host="8GB")`: memory of the accelerator, and pinned memory of the host for what leaves it.
    `size_bytes`, `host_bytes`: bytes, or text with a unit, which becomes bytes. Raises BudgetError, OptionError.
    """

    size_bytes: int
    scope: str = "step"
    host_bytes: int | None = None

    def __init__(
        self,
        size: int | float | str | None = None,
        scope: str = "step",
        *,
        device: int | float | str | None = None,
        host: int | float | str | None = None,
    ) -> None:
        given = [each for each in (size, device) if each is not None]
        if len(given) != 1:
            raise BudgetError(f"a budget of {size!r} and, on the device, {device!r}", 'give one of them: Budget("4GB") or Budget(device="4GB")')
        object.__setattr__(self, "size_bytes", parse_budget(given[0]))
        object.__setattr__(self, "scope", scope)
        object.__setattr__(self, "host_bytes", None if host is None else parse_budget(host))
        _one_of("scope", scope, SCOPES)
        if scope == "process" and (device is not None or host is not None):
            raise OptionError('scope="process" counts one process on the CPU', "leave device and host out")


def offload_folder(offload: str | Path | None, budget: Budget, device: str, weights: bool) -> Path | None:
    """The folder on a disk for what leaves memory, if there is one: from an accelerator's memory it goes to the host's, which the budget bounds.
    device: the accelerator of the step; nothing for the CPU. weights: frozen ones are packed, and lie outside of memory. Raises OptionError.
    """
    to_host = offload == "host" or budget.host_bytes is not None
    if not device and to_host:
        raise OptionError("a host's memory is beside an accelerator's, and the step's parameters are on the CPU", "give a folder on a disk")
    if device and budget.scope == "process":
        raise OptionError(f"a process budget counts memory of the CPU, and the step runs on {device}", "Budget(device=..., host=...)")
    if device and offload not in (None, "host"):
        raise OptionError(f"a step on {device} offloads to the host's memory, not to a folder", 'offload="host", Budget(device=..., host=...)')
    if device and budget.host_bytes is None and (to_host or weights):
        raise OptionError(f"what a step on {device} keeps in host memory needs a limit", 'budget=Budget(device="4GB", host="8GB")')
    return None if offload is None or to_host else Path(offload)


def as_budget(budget: int | float | str | Budget) -> Budget:
    """A Budget as it is, a bare size as one of a step."""
    return budget if isinstance(budget, Budget) else Budget(budget)


def parse_budget(budget: int | float | str) -> int:
    """Bytes of a budget: a number of bytes, or text with a unit ("256MB" is 256 * 10^6, "1GiB" is 2^30)."""
    if isinstance(budget, bool) or not isinstance(budget, (int, float, str)):
        raise BudgetError(f"budget is {budget!r}, of type {type(budget).__name__}", BUDGET_FIX)
    size_bytes = _parse_text(budget) if isinstance(budget, str) else float(budget)
    if not math.isfinite(size_bytes) or size_bytes < 1:
        raise BudgetError(f"budget is {budget!r}: not a positive, finite number of bytes", BUDGET_FIX)
    return int(size_bytes)


def _parse_text(text: str) -> float:
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE][0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS:
        raise BudgetError(f"budget {text!r} is not a size", BUDGET_FIX)
    return float(match[1]) * UNITS[match[2].upper()]


@dataclass(frozen=True)
class Options:
    """What `optimize` was asked for, checked. `offload_dir` is the folder of the scratch file, or None. With `scope` "process" the
    budget is that of a whole lean process, which holds `baseline_bytes` without a step."""

    budget_bytes: int
    offload_dir: Path | None = None
    numerics: str = "exact"
    grads: str = "keep"
    effort: str = "balanced"
    time_limit_s: float = 20.0
    cache: bool = True
    solver: str | None = None
    scope: str = "step"
    baseline_bytes: int = 0
    host_bytes: int | None = None  # of pinned memory beside an accelerator, where the step may offload to it

    @property
    def offloads(self) -> bool:
        """Whether storages may leave memory: for a disk, or for the host's."""
        return self.offload_dir is not None or self.host_bytes is not None

    @property
    def process_bytes(self) -> int | None:
        """The budget of the lean process, if it has one."""
        return self.budget_bytes if self.scope == "process" else None

    def __post_init__(self) -> None:
        _one_of("scope", self.scope, SCOPES)
        _one_of("numerics", self.numerics, TIERS)
        _one_of("grads", self.grads, ("keep", "drop"))
        _one_of("effort", self.effort, ("fast", "balanced", "proof"))
        if self.solver is not None:
            _one_of("solver", self.solver, SOLVERS)
        if not (math.isfinite(self.time_limit_s) and self.time_limit_s > 0):
            raise OptionError(f"the solver's time limit is {self.time_limit_s!r} seconds", "give a positive number of seconds")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OptionError(f"{name}={value!r} is unknown", f"use one of {', '.join(map(repr, allowed))}")


def format_bytes(size_bytes: float) -> str:
    """Bytes for people: 1.94 GiB, 61.8 MiB, 512 B."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size_bytes) >= size:
            return f"{size_bytes / size:.2f} {unit}" if size_bytes < 10 * size else f"{size_bytes / size:.1f} {unit}"
    return f"{int(size_bytes)} B"


def cache_dir() -> Path:
    """Folder of measured costs and plans: MEBP_CACHE, or ~/.cache/mebp_compile."""
    return Path(os.environ.get("MEBP_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mebp_compile")


def debug_level() -> int:
    """MEBP_DEBUG, 0 to 5. It prints more and never changes a result."""
    text = os.environ.get("MEBP_DEBUG", "0")
    if text not in ("", "0", "1", "2", "3", "4", "5"):
        raise OptionError(f"MEBP_DEBUG={text!r}", "set it to a digit from 0 to 5")
    return int(text or 0)


def dump_dir() -> Path | None:
    """MEBP_DUMP: a folder that receives every numbered artifact, or None."""
    text = os.environ.get("MEBP_DUMP")
    return Path(text) if text else None
