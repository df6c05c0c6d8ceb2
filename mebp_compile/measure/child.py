"""Run a function in a fresh interpreter that exchanges JSON with this one. Torch-free.

Never a fork: after torch has run, a forked child hangs at its first parallel op. Request, answer and output go
through files in a temporary folder, not pipes, so neither side can block on the other and what a library prints can't
be mistaken for the answer.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mebp_compile import errors
from mebp_compile.errors import DiskError, MeasureError, MebpError
from mebp_compile.measure.malloc_meter import preload_environment

BOOTSTRAP = """
import json, sys
with open(sys.argv[1]) as file:
    sys.path[:] = json.load(file)["path"]
from mebp_compile.measure.child import serve
serve(sys.argv[1], sys.argv[2])
"""
OUTPUT_TAIL_BYTES = 4000


class ChildDied(MeasureError):
    """The child ended without an answer: killed, out of memory, or a crash in native code. The request itself may be
    the cause.
    """


class ChildFailed(MeasureError):
    """The function raised something that is no MebpError; `traceback_text` is the child's traceback."""

    traceback_text = ""


def run_child(
    module: str,
    function: str,
    request: Mapping[str, Any],
    preload_malloc: bool = False,
    timeout_s: float = 600.0,
    env: Mapping[str, str] | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """`module.function(request)` in a new interpreter: a dict of JSON in, a dict of JSON out.

    The child inherits this process's environment (all MEBP_* variables with it), its import path and its folder;
    `env` comes on top, `threads` sets the number of OpenMP and MKL threads, `preload_malloc` puts the malloc meter in.
    Raises what the function raised if that is a MebpError, with the child's traceback as a note; ChildFailed for any
    other exception; ChildDied if the child was killed or crashed; MeasureError if it took more than `timeout_s` or
    the request is not JSON.
    """
    environment = {
        **os.environ,
        **(preload_environment() if preload_malloc else {}),
        **_thread_variables(threads),
        **(env or {}),
    }
    try:
        text = json.dumps({"path": sys.path, "module": module, "function": function, "request": request})
    except (TypeError, ValueError) as error:
        raise MeasureError(
            f"the request for {function} is not JSON: {error}", "pass dicts, lists, text and numbers"
        ) from error
    try:
        with tempfile.TemporaryDirectory(prefix="mebp-child-", ignore_cleanup_errors=True) as folder:
            Path(folder, "request.json").write_text(text)
            return _answer(_run(function, Path(folder), environment, timeout_s), function, Path(folder))
    except OSError as error:
        raise DiskError(
            f"can't write the request for {function}: {error}", "free space in the folder that TMPDIR names"
        ) from error


def serve(request_path: str, answer_path: str) -> None:
    """The child's side: reads the request, calls the function, writes {"answer": ...} or {"error": ...}."""
    try:
        with open(request_path) as file:
            call = json.load(file)
        answer = getattr(importlib.import_module(call["module"]), call["function"])(call["request"])
        text = json.dumps({"answer": answer})
    except Exception as error:
        text = json.dumps({"error": _describe(error)})
    with open(answer_path, "w") as file:
        file.write(text)


def _thread_variables(threads: int | None) -> dict[str, str]:
    return {} if threads is None else {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def _run(function: str, folder: Path, environment: Mapping[str, str], timeout_s: float) -> int:
    """The child's exit status; its output goes to output.txt."""
    command = [
        sys.executable,
        "-X",
        "faulthandler",
        "-c",
        BOOTSTRAP,
        str(folder / "request.json"),
        str(folder / "answer.json"),
    ]
    with open(folder / "output.txt", "wb") as output:
        try:
            return subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                timeout=timeout_s,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired as error:
            message = f"{function} took more than {timeout_s:g} s in a child and was stopped\n{_tail(folder)}"
            raise MeasureError(message, "ask for less at once, or give a longer timeout_s") from error
        except OSError as error:
            raise MeasureError(
                f"can't start an interpreter for {function}: {error}", "free memory or processes"
            ) from error


def _answer(status: int, function: str, folder: Path) -> dict[str, Any]:
    try:
        reply = json.loads((folder / "answer.json").read_text())
    except (OSError, ValueError):
        raise ChildDied(
            f"the child for {function} ended without an answer: {_status_text(status)}\n{_tail(folder)}",
            "free memory if it was killed; otherwise run the function in this process to see the crash",
        ) from None
    if "error" in reply:
        raise _rebuild(reply["error"], function)
    if not isinstance(reply["answer"], dict):
        raise MeasureError(
            f"{function} answered with a {type(reply['answer']).__name__}", "return a dict from the child's function"
        )
    return reply["answer"]


def _status_text(status: int) -> str:
    """ "exit status 3", or "killed by SIGKILL" for the negative numbers that stand for signals."""
    names = {number.value: number.name for number in signal.Signals}
    return f"exit status {status}" if status >= 0 else f"killed by {names.get(-status, f'signal {-status}')}"


def _tail(folder: Path) -> str:
    try:
        return (folder / "output.txt").read_bytes()[-OUTPUT_TAIL_BYTES:].decode(errors="replace")
    except OSError:
        return ""


def _describe(error: Exception) -> dict[str, str]:
    ours = isinstance(error, MebpError)
    return {
        "type": type(error).__name__,
        "message": error.message if isinstance(error, MebpError) else str(error),
        "fix": error.fix if isinstance(error, MebpError) else "",
        "ours": type(error).__name__ if ours and getattr(errors, type(error).__name__, None) is type(error) else "",
        "traceback": "".join(traceback.format_exception(error)),
    }


def _rebuild(told: Mapping[str, str], function: str) -> MebpError:
    """The exception to raise here for one that was raised there."""
    if told["ours"]:
        try:
            same: MebpError = getattr(errors, told["ours"])(told["message"], told["fix"])
        except TypeError:  # a class with more arguments than a message and a fix
            same = MebpError(told["message"], told["fix"])
        same.add_note(f"raised in a child process:\n{told['traceback']}")
        return same
    other = ChildFailed(
        f"{function} failed in a child: {told['type']}: {told['message']}\n{told['traceback']}", told["fix"]
    )
    other.traceback_text = told["traceback"]
    return other
