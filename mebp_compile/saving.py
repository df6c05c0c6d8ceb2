"""A step as a folder from which a lean process runs it: the artifacts, and beside them `lean.json`, `state.json` and the state's tensors.

    graph.json problem.json schedule.json offsets.json plan.json program.py     what `mebp check`, `explain` and `show` read (`artifacts`)
    program.pyc          the program compiled: compiling it needs 85 MB, loading it 3
    state.*              parameters, buffers, optimizer state, constants, param groups (`runtime.saved_state`)
    adapter_config.json  of PEFT, where the step trains LoRA adapters
    lean.json            the binding, the contract, and what batch and process must be like; or why the step can't be lean

No pickle, and nothing of the user's own classes: where a step needs them, lean.json says so and `load_lean` refuses.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree

from mebp_compile import artifacts
from mebp_compile.capture import State
from mebp_compile.capture.contract import Contract, to_json
from mebp_compile.config import Options
from mebp_compile.errors import DiskError, LeanError
from mebp_compile.lean import COMPILED, FORMAT_VERSION, LEAN, compile_program
from mebp_compile.runtime.ahead import state_after
from mebp_compile.runtime.bind import Streamed
from mebp_compile.runtime.homes import Homes
from mebp_compile.runtime.program import Program
from mebp_compile.runtime.saved_state import GENERATOR, TENSORS, plain_groups, write_json, write_state
from mebp_compile.runtime.setup import binding_of
from mebp_compile.runtime.tensor_file import Geometry

OWN_CONTAINERS = ("builtins.", "collections.")
ADAPTER_FILE, PARAMETERS_FILE = "adapter_model.safetensors", "parameters.safetensors"


@dataclass(frozen=True)
class Subject:
    """What is saved: a program, and everything of its CompiledStep that it runs on. `facts`: the signature of the batch and the process.
    `poisoned`: why its state can't be trusted, or ""."""

    program: Program
    state: State
    options: Options
    streamed: Streamed | None
    homes: Homes | None
    ignored_gradients: frozenset[str]
    facts: tuple[Any, ...]
    poisoned: str = ""


def save_step(folder: str | Path, subject: Subject) -> Path:
    """Write all of it; files there are replaced. Raises DiskError."""
    program = subject.program
    folder = artifacts.save_artifacts(folder, program.graph, program.plan, program.code)
    (folder / LEAN).unlink(missing_ok=True)
    try:
        data = _lean(folder, subject)
    except LeanError as error:
        data = {"format": FORMAT_VERSION, "refused": [error.message, error.fix]}
    write_json(folder / LEAN, data)
    return folder


def _lean(folder: Path, subject: Subject) -> dict[str, Any]:
    """The content of lean.json, with everything that it names written. Raises LeanError for a step that can't be lean."""
    program, options = subject.program, subject.options
    if subject.poisoned:
        raise LeanError(f"a call failed in mid-step before it was saved ({subject.poisoned})", "load a checkpoint, optimize again and save that")
    _check_next_call(subject)
    contract = _contract_text(program.contract)
    binding = binding_of(program.graph, program.plan, options.offloads, options.host_bytes is not None)
    if any("#" in source for source in binding.sources.values()):
        raise LeanError("its table lies in blocks of rows, which a lean process does not know yet", "plan it with a budget that holds the table")
    names = parameter_names(subject.state)
    trained = [source for source in binding.written if source.startswith("parameter:")]
    keys = _adapter_keys(subject.state, names, trained)
    _write_state(folder, subject, list(dict.fromkeys(binding.sources.values())), binding.random)
    compile_program({"source": str(folder / artifacts.PROGRAM), "target": str(folder / COMPILED)})
    if keys is not None:
        _write_adapter_config(folder, subject.state)
    needed = {source for source, _ in binding.weights.values()}
    return {
        "format": FORMAT_VERSION,
        "torch": torch.__version__,
        "batch": repr(subject.facts[0]),
        "tensors": [[leaf[0], str(leaf[2]).removeprefix("torch.")] for leaf in subject.facts[0][1] if isinstance(leaf[0], tuple)],
        "environment": repr(subject.facts[-1]),
        "threads": torch.get_num_threads(),
        "process_bytes": options.process_bytes,
        "offload": str(options.offload_dir.resolve()) if options.offload_dir is not None else None,
        "binding": binding.to_data(),
        "contract": json.loads(contract),
        "store": _store(folder, subject.streamed) if needed else None,
        "names": {source: name for source, name in (subject.streamed.names if subject.streamed else {}).items() if source in needed},
        "trained": {
            "file": PARAMETERS_FILE if keys is None else ADAPTER_FILE,
            "names": {source: names[source] for source in trained} if keys is None else keys,
        },
    }  # fmt: skip


# --- what can't be lean ---


def _check_next_call(subject: Subject) -> None:
    """The next call must be this program's too: a first call that makes state (SGD's momentum) is another program than those after it."""
    with state_after(subject.state, subject.program.graph, subject.ignored_gradients) as differs:
        if differs:
            raise LeanError(
                "the first call of this step makes state that the calls after it find, so they are another program",
                "call the step once (or load a checkpoint that has this state), then save it",
            )


def _contract_text(contract: Contract) -> str:
    """The contract as JSON, without its constants, which lie with the state. Raises LeanError for values that only the user's code can make."""
    text = to_json(replace(contract, constants={}))
    if text is None:
        raise LeanError("the step returns, or branches on, a value that is not plain data", "return tensors, numbers, tuples, lists or dicts")
    for kind in _containers(json.loads(pytree.treespec_dumps(contract.return_spec))[1]):
        if not kind.startswith(OWN_CONTAINERS):
            raise LeanError(f"the step returns a {kind}, a class of a library", "return the tensors that you need, such as output.loss")
    return text


def _containers(spec: dict[str, Any]) -> Iterator[str]:
    if spec["type"] is not None:
        yield spec["type"]
    for child in spec["children_spec"]:
        yield from _containers(child)


# --- the state ---


def _write_state(folder: Path, subject: Subject, sources: list[str], random: bool) -> None:
    give = _giver(subject)
    generator = {GENERATOR: torch.get_rng_state()} if random else {}
    geometries = {source: _geometry(source, give) for source in sources}
    geometries |= {name: Geometry.of(tensor) for name, tensor in generator.items()}
    names = {source: source for source in geometries}
    groups = plain_groups(subject.state.optimizers)
    write_state(folder, {TENSORS: names}, geometries, lambda source: generator[source] if source in generator else give(source), groups)


def _giver(subject: Subject) -> Callable[[str], torch.Tensor]:
    """A function that gives the tensor at a source, wherever it lies."""
    live, homes = subject.program.engine.live, subject.homes

    def give(source: str) -> torch.Tensor:
        if homes is not None and source in homes.away:
            return homes.load(source)
        tensor = live.getter(source)()
        if not isinstance(tensor, torch.Tensor) or type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.device.type != "cpu":
            raise LeanError(f"{source} is a {type(tensor).__name__} whose memory can't be saved", "use plain tensors on the CPU")
        return tensor

    return give


def _geometry(source: str, give: Callable[[str], torch.Tensor]) -> Geometry:
    return Geometry.of(give(source))


def parameter_names(state: State) -> dict[str, str]:
    """The name of each parameter's source: its path, with the module's own name before it where there are several modules."""
    several = len(state.modules) > 1
    return {f"parameter:{root}:{path}": f"{root}.{path}" if several else path for root, path, _ in state.parameters()}


# --- LoRA ---


def _peft(state: State) -> tuple[Any, str] | None:
    """The one module that PEFT wrapped, and its adapter's name."""
    modules: list[Any] = list(state.modules.values())
    adapter = getattr(modules[0], "active_adapter", None) if len(modules) == 1 and hasattr(modules[0], "peft_config") else None
    return (modules[0], adapter) if isinstance(adapter, str) and adapter in modules[0].peft_config else None


def _adapter_keys(state: State, names: dict[str, str], trained: list[str]) -> dict[str, str] | None:
    """Names in PEFT's adapter file, which leaves the adapter's own out, or None where the step trains something else than LoRA's A and B."""
    found = _peft(state)
    if found is None or not trained or not all(".lora_A." in names[source] or ".lora_B." in names[source] for source in trained):
        return None
    return {source: names[source].replace(f".{found[1]}.", ".") for source in trained}


def _write_adapter_config(folder: Path, state: State) -> None:
    """adapter_config.json as PEFT writes it for inference."""
    found = _peft(state)
    assert found is not None
    module, adapter = found
    config = copy.copy(module.peft_config[adapter])
    config.inference_mode = True
    base = module.get_base_model()
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = vars(base).get("name_or_path") or None
    classes = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    config.save_pretrained(str(folder), auto_mapping_dict=classes if config.task_type is None else None)


# --- the weight store ---


def _store(folder: Path, streamed: Streamed | None) -> dict[str, str]:
    """Where the weight store is, and the digest of its manifest. A store that would go with this process is linked or copied into the folder."""
    assert streamed is not None
    path = streamed.store.path.resolve()
    digest = hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest()
    if not streamed.temporary:
        return {"path": str(path), "digest": digest}
    try:
        shutil.rmtree(folder / "weights", ignore_errors=True)
        shutil.copytree(path, folder / "weights", copy_function=_link_or_copy)
    except (OSError, shutil.Error) as error:
        raise DiskError(f"can't copy the weight store into {folder}: {error}", "free space, or pass weights=a WeightStore") from error
    return {"path": "weights", "digest": digest}


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
