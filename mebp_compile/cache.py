"""Planned programs on disk: a second process with the same step, model, batch geometry and budget skips capture, costs and solver.

The key covers all that decides the graph: the code of the step and of the functions that it reaches, their plain values, every module's class
and plain attributes, parameters, batch geometry, options, library versions, the state of every source file of the user's own that is loaded,
and the machine. Guards are asked again at every call, as always; a program whose guards do not hold is left alone and another is kept beside it.
"""

from __future__ import annotations

import hashlib
import inspect
import marshal
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mebp_compile.artifacts import load_artifacts, save_artifacts
from mebp_compile.capture import State
from mebp_compile.capture.contract import Contract, from_json, to_json
from mebp_compile.capture.devices import device_of
from mebp_compile.config import Options, cache_dir
from mebp_compile.cost import fingerprint
from mebp_compile.errors import CacheError, MebpError
from mebp_compile.graph import Graph
from mebp_compile.planning import Plan
from mebp_compile.runtime.bind import Streamed

VARIANTS = 8  # programs of one key, told apart by their guards
LIBRARIES = ("torch", "transformers", "peft", "ortools")
Found = tuple[Contract, Graph, Plan, str]


def find(key: str, applies: Callable[[Contract], bool]) -> Found | None:
    """The cached program of `key` whose guards hold, or None. A damaged entry counts as absent."""
    for folder in _folders(key):
        if not (folder / "contract.json").exists():
            return None
        try:
            contract = from_json((folder / "contract.json").read_text())
            if applies(contract):
                return (contract, *load_artifacts(folder))
        except (MebpError, OSError, ValueError, KeyError, TypeError):
            continue
    return None


def keep(key: str, contract: Contract, graph: Graph, plan: Plan, code: str) -> None:
    """Save a program under `key`, if its contract has a text. Raises CacheError where the cache folder can't be written."""
    text = to_json(contract)
    folder = next((folder for folder in _folders(key) if not (folder / "contract.json").exists()), None)
    if text is None or folder is None:
        return
    try:
        save_artifacts(folder, graph, plan, code)
        part = folder / ".contract.part"
        part.write_text(text)
        part.replace(folder / "contract.json")
    except (OSError, MebpError) as error:
        raise CacheError(
            f"the program can't be kept in {folder}: {error}", "set MEBP_CACHE to a folder that can be written, or pass cache=False"
        ) from error


def _folders(key: str) -> Iterator[Path]:
    return (cache_dir() / "programs" / f"{key}-{number}" for number in range(VARIANTS))


def program_key(step_fn: Callable[..., Any], state: State, options: Options, signature: Any, streamed: Streamed | None) -> str:
    """A digest of everything that decides the program."""
    facts = (
        [(name, _version(name)) for name in LIBRARIES],
        fingerprint(device_of(state)),
        device_of(state),
        _code(step_fn),
        [_code(function) for function in state.reach.functions],
        [fact for root, module in state.modules.items() for fact in _modules(root, module)],
        [_optimizer(root, optimizer) for root, optimizer in state.optimizers.items()],
        sorted((name, repr(record)) for name, record in (streamed.records if streamed else {}).items()),
        (options.budget_bytes, options.scope, options.baseline_bytes, options.offload_dir is not None, options.numerics, options.grads),
        options.host_bytes,
        (options.effort, options.time_limit_s, options.solver),
        signature,
        sorted(_own_files()),
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _code(step_fn: Callable[..., Any]) -> str:
    function = inspect.unwrap(getattr(step_fn, "func", step_fn))
    code = getattr(function, "__code__", None)
    return hashlib.sha256(marshal.dumps(code)).hexdigest() if code else repr(type(step_fn))


def _modules(root: str, top: torch.nn.Module) -> Iterator[str]:
    """A line for each module: path, class, and the plain attributes that its forward may branch on; and the model's configuration."""
    for path, module in top.named_modules():
        plain = {
            key: value
            for key, value in sorted(vars(module).items())
            if isinstance(value, (bool, int, float, str, tuple, type(None))) and not key.startswith("_is_full_backward")
        }
        hooks = [len(vars(module).get(name) or ()) for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
        yield f"{root}.{path}: {type(module).__module__}.{type(module).__qualname__} {plain} {hooks}"
    config = getattr(top, "config", None)
    if hasattr(config, "to_dict"):
        yield repr(sorted((str(key), repr(value)) for key, value in config.to_dict().items()))


def _optimizer(root: str, optimizer: torch.optim.Optimizer) -> str:
    groups = [(len(group["params"]), sorted(key for key in group)) for group in optimizer.param_groups]
    return f"{root}: {type(optimizer).__module__}.{type(optimizer).__qualname__} {groups}"


def _own_files() -> Iterator[tuple[str, int, int]]:
    """Path, time and size of each loaded source file that belongs to no installed library: the user's own code, and this package's."""
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file and "site-packages" not in file and not file.startswith(sys.base_prefix):
            try:
                stat = Path(file).stat()
            except OSError:
                continue
            yield file, stat.st_mtime_ns, stat.st_size
