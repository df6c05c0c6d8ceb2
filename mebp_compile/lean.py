"""Run a saved step in a lean process: the generated program and torch, without the model's class, transformers, or the solver.

    step = load_lean("step/")          # a folder from `CompiledStep.save` or `mebp plan --out`
    loss = step(input_ids, labels)     # bit for bit what the compiled step gives
    step.save_state("trained/")        # the trained parameters, and what else is needed to go on from here: load_lean("step/", state="trained/")

Nothing here imports the planner, so that a whole process (interpreter, torch, program and tensors) can stay inside a budget of
`Budget(..., scope="process")`, which is checked before the first step.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import marshal
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree

from mebp_compile.capture.contract import from_json
from mebp_compile.config import format_bytes
from mebp_compile.errors import BudgetError, DiskError, LeanError, StepPoisoned, StoreError
from mebp_compile.measure.child import run_child
from mebp_compile.measure.process import malloc_trim, rss
from mebp_compile.runtime.assemble import assemble
from mebp_compile.runtime.binding import Binding
from mebp_compile.runtime.data_state import DataHomes, DataState
from mebp_compile.runtime.guards import batch_facts, environment_facts
from mebp_compile.runtime.runner import Runner, step_of
from mebp_compile.runtime.saved_state import GENERATOR, TENSORS, SavedState, plain_groups, read_json, read_state, write_state
from mebp_compile.runtime.tensor_file import DAMAGED, Geometry
from mebp_compile.runtime.weights import WeightStore

FORMAT_VERSION = 3
LEAN, PROGRAM, COMPILED, ADAPTER = "lean.json", "program.py", "program.pyc", "adapter_config.json"
PYC_HEADER_BYTES = 16
PLAN_AGAIN = "plan the step for it: `mebp plan --out`, or optimize and save"


@dataclass(frozen=True)
class Saved:
    """lean.json, read."""

    folder: Path
    data: dict[str, Any]
    binding: Binding

    @property
    def process_bytes(self) -> int | None:
        """The budget of the whole process, where the step was planned for one."""
        return self.data["process_bytes"]  # type: ignore[no-any-return]


def read_saved(folder: str | Path) -> Saved:
    """What a folder says about itself. Raises LeanError (no saved step, or one that can't be lean), StoreError (damaged)."""
    folder = Path(folder)
    data = read_json(folder / LEAN)
    try:
        if data["format"] != FORMAT_VERSION:
            raise StoreError(f"{folder / LEAN} has another format than {FORMAT_VERSION}", DAMAGED)
        if "refused" in data:
            raise LeanError(f"this step can't run in a lean process: {data['refused'][0]}", data["refused"][1])
        return Saved(folder, data, Binding.from_data(data["binding"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{folder / LEAN} can't be read: {error!r}", DAMAGED) from error


def load_lean(folder: str | Path, *, state: str | Path | None = None, offload: str | Path | None = None) -> LeanStep:
    """The step that was saved in `folder`, on the state saved with it, or on a later one that `save_state` wrote to the folder `state`.

    `offload` replaces the folder on disk that the step was planned with. Sets torch's number of threads to that of the plan. Raises LeanError,
    StoreError (damaged files, another weight store), DiskError, and BudgetError where this process already holds too much for its budget.
    """
    saved = read_saved(folder)
    _check_process(saved)
    return LeanStep(saved, read_state(Path(state)) if state is not None else None, Path(offload) if offload is not None else None)


def _check_process(saved: Saved) -> None:
    """The same torch, and the facts that its kernels depend on."""
    if saved.data["torch"] != torch.__version__:
        raise LeanError(f"the step was planned with torch {saved.data['torch']}, this is {torch.__version__}", "plan it again here")
    torch.set_num_threads(saved.data["threads"])
    if repr(environment_facts()) != saved.data["environment"]:
        raise LeanError(
            f"torch is set up as {environment_facts()!r} (threads, default dtype, deterministic, autocast, mkldnn), "
            f"the step was planned under {saved.data['environment']}",
            "set it up alike before load_lean, or plan again",
        )


class LeanStep(Runner):
    """A saved step: call it as the original. `optimizers` have `param_groups` to change a learning rate, and nothing else."""

    def __init__(self, saved: Saved, later: SavedState | None = None, offload: Path | None = None) -> None:
        self.saved, self.binding = saved, saved.binding
        self.batch, self.results = saved.binding.batch, saved.binding.results
        self.poisoned = ""
        base = read_state(saved.folder)
        self.live = DataState({}, (later or base).groups)
        folder = offload or (Path(saved.data["offload"]) if saved.data["offload"] is not None else None)
        if folder is None and (saved.binding.slots or saved.binding.away):
            raise LeanError("the step moves tensors to disk, and no folder is named", "pass offload=a folder on a disk")
        self.homes = DataHomes(self.live, folder) if folder is not None else None
        self.function = step_of(program_code(saved.folder))
        self.contract = from_json(json.dumps(saved.data["contract"]))
        self.engine = assemble(saved.binding, self.live, folder, _open_store(saved), saved.data["names"], self.homes, saved.process_bytes)
        self._fill(base, later)
        malloc_trim()
        self._check_budget()

    def __call__(self, *batch: Any, **kwargs: Any) -> Any:
        """One step. Raises LeanError for a batch that the program was not planned for, StepPoisoned after a step that failed half-way."""
        if self.poisoned:
            raise StepPoisoned(f"an earlier call failed in mid-step ({self.poisoned}); the state may be half updated", "load the step again")
        leaves = pytree.tree_leaves((batch, kwargs))
        self._check_batch(batch, kwargs, leaves)
        self.arrange()
        try:
            return self.run(leaves)
        except BaseException as error:
            self.poisoned = f"{type(error).__name__}: {error}"
            raise

    @property
    def optimizers(self) -> dict[str, Any]:
        return dict(self.live.optimizers)

    def batch_tensors(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor of the batch, in the order of its leaves."""
        return [(tuple(shape), getattr(torch, dtype)) for shape, dtype in self.saved.data["tensors"]]

    # --- state ---

    def tensor(self, source: str) -> torch.Tensor:
        """A copy of the tensor at a source ("parameter:model:layers.0.weight"), wherever it lies. Raises LeanError for an unknown one."""
        if source == GENERATOR:
            return torch.get_rng_state()
        if self.homes is not None and source in self.homes.away:
            return self.homes.load(source)
        if source not in self.live.tensors:
            raise LeanError(f"the saved step has no state {source!r}", f"it has {', '.join(sorted(self.sources)[:3])} ...")
        return self.live.tensors[source].detach().clone()

    @property
    def sources(self) -> frozenset[str]:
        """Sources of all the state that there is now."""
        return frozenset(self.live.tensors) | (self.homes.away if self.homes is not None else frozenset())

    def save_state(self, folder: str | Path) -> Path:
        """Write what steps change. Trained parameters go to `adapter_model.safetensors` (LoRA, with adapter_config.json, as PEFT reads them) or
        `parameters.safetensors`, the rest to `state.safetensors`; `load_lean(step_folder, state=folder)` goes on from there, bit for bit.

        Raises StepPoisoned, DiskError.
        """
        if self.poisoned:
            raise StepPoisoned(f"an earlier call failed in mid-step ({self.poisoned})", "load the step again")
        folder, trained = Path(folder), self.saved.data["trained"]
        changed = [*self._sources(), *([GENERATOR] if self.binding.random else [])]
        geometries = {source: Geometry.of(self.tensor(source)) for source in (*changed, *trained["names"])}
        readable = {source for source in trained["names"] if geometries[source].contiguous}
        files = {TENSORS: {source: source for source in changed if source not in readable}}
        if trained["names"]:
            files[trained["file"]] = dict(trained["names"])
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if (self.saved.folder / ADAPTER).is_file():
                shutil.copyfile(self.saved.folder / ADAPTER, folder / ADAPTER)
        except OSError as error:
            raise DiskError(f"can't save the state in {folder}: {error}", "give a folder that can be written") from error
        write_state(folder, files, geometries, self.tensor, plain_groups(self.live.optimizers), by_rows=trained["file"])
        return folder

    def _sources(self) -> list[str]:
        """Sources of what steps change: what they write in place, and what they bind."""
        bound = [path for path in self.results if not path.startswith("return:")]
        return [source for source in dict.fromkeys((*self.binding.written, *bound)) if source in self.sources]

    def _fill(self, base: SavedState, later: SavedState | None) -> None:
        """Put the saved tensors where the program wants them, one at a time."""
        newer = frozenset(later.places) if later is not None else frozenset()
        away = frozenset(self.binding.away.values())
        for saved, but in ((base, newer), (later, frozenset[str]())):
            for source, tensor in saved.tensors(but) if saved is not None else ():
                if source == GENERATOR:
                    torch.set_rng_state(tensor)
                elif self.homes is not None and source in away:
                    self.homes.leave(source, tensor)
                else:
                    self.live.tensors[source] = tensor

    # --- checks ---

    def _check_batch(self, batch: Any, kwargs: Any, leaves: list[Any]) -> None:
        found = repr(batch_facts((batch, kwargs)))
        if found != self.saved.data["batch"]:
            raise LeanError(f"the batch is {found}; the step was planned for {self.saved.data['batch']}", PLAN_AGAIN)
        if not self.applies(leaves):
            raise LeanError("a guard of the step does not hold: a hyper-parameter or a mask is not what the program relies on", PLAN_AGAIN)

    def kept_bytes(self) -> int:
        """What the plan counts and is in memory already: the state that lies there, and resident packed weights. The arena is untouched yet."""
        records = self.engine.weights.resident.values() if self.engine.weights is not None else ()
        return sum(tensor.untyped_storage().nbytes() for tensor in (*self.live.tensors.values(), *records))

    def _check_budget(self) -> None:
        """A process that already holds more than the plan leaves it is refused before the first step."""
        budget_bytes = self.saved.process_bytes
        if budget_bytes is None:
            return
        own_bytes = rss().anon_bytes - self.kept_bytes()
        if own_bytes + self.binding.peak_bytes > budget_bytes:
            raise BudgetError(
                f"this process holds {own_bytes:,} bytes ({format_bytes(own_bytes)}) besides the step's state, and the step needs "
                f"{self.binding.peak_bytes:,}: more than its budget of {budget_bytes:,} bytes",
                "load it in a process that has imported nothing else (`mebp run`), or plan with a larger budget",
            )


# --- the parts ---


def program_code(folder: Path) -> Any:
    """The code of program.py, from program.pyc where that was compiled from this very text; else a child compiles it, which takes 85 MB."""
    source = folder / PROGRAM
    try:
        text_hash = importlib.util.source_hash(source.read_bytes())
        code = _compiled(folder / COMPILED, text_hash)
        if code is None:
            run_child("mebp_compile.lean", "compile_program", {"source": str(source), "target": str(folder / COMPILED)})
            code = _compiled(folder / COMPILED, text_hash)
    except OSError as error:
        raise StoreError(f"can't read the program in {folder}: {error}", DAMAGED) from error
    if code is None:
        raise StoreError(f"{source} changed while it was loaded", "load it again")
    return code


def _compiled(path: Path, text_hash: bytes) -> Any:
    """The code in a .pyc file (PEP 552), or None where it is of another interpreter or another text."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    head = importlib.util.MAGIC_NUMBER + (3).to_bytes(4, "little") + text_hash
    return marshal.loads(memoryview(raw)[PYC_HEADER_BYTES:]) if raw[:PYC_HEADER_BYTES] == head else None


def compile_program(request: dict[str, str]) -> dict[str, Any]:
    """Compile request["source"] to request["target"], valid for this very text. A lean process has a child do it."""
    import py_compile

    try:
        py_compile.compile(
            request["source"], request["target"], doraise=True, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH
        )
    except py_compile.PyCompileError as error:
        raise LeanError(f"{request['source']} is not Python: {error.msg}", "start from the text of `step.code`") from error
    except OSError as error:
        raise DiskError(f"can't write {request['target']}: {error.strerror}", "make the folder writable") from error
    return {}


def _open_store(saved: Saved) -> WeightStore | None:
    """The weight store that the step was planned with. Raises StoreError for another one."""
    said = saved.data["store"]
    if said is None:
        return None
    path = saved.folder / said["path"]  # an absolute path stays what it is
    store = WeightStore.open(path)
    if hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest() != said["digest"]:
        store.close()
        raise StoreError(f"the weight store {path} is not the one that the step was planned with", "restore it, or plan again")
    return store
