"""Functions in child interpreters: answers, errors, deaths."""

from __future__ import annotations

import sys

import pytest

from mebp_compile.errors import DiskError, MeasureError
from mebp_compile.measure.child import ChildDied, ChildFailed, run_child

CHILDREN = "measure_children"


def test_request_and_answer_survive_noise() -> None:
    """A large nested request comes back unchanged although the child prints, and the child loads no torch by itself."""
    request = {"text": "ä\n" * 1_000_000, "list": [1, 2.5, None, {"deep": [True]}]}
    answer = run_child(CHILDREN, "echo", request)
    assert answer["request"] == request
    assert not answer["torch_loaded"]


def test_environment_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """MEBP_* variables reach the child, `env` overrides them, and `threads` sets the OpenMP count."""
    monkeypatch.setenv("MEBP_DEBUG", "3")
    monkeypatch.setenv("MEBP_DUMP", "here")
    names = {"names": ["MEBP_DEBUG", "MEBP_DUMP", "OMP_NUM_THREADS"]}
    answer = run_child(CHILDREN, "environment", names, env={"MEBP_DUMP": "there"}, threads=1)
    assert answer == {"MEBP_DEBUG": "3", "MEBP_DUMP": "there", "OMP_NUM_THREADS": "1"}


def test_typed_error_keeps_its_type_and_traceback() -> None:
    """A MebpError is raised here as what it was there, with its fix, and with the child's traceback as a note."""
    with pytest.raises(DiskError, match="the disk is sad") as caught:
        run_child(CHILDREN, "raise_disk_error", {})
    assert caught.value.fix == "cheer it up"
    assert "in raise_disk_error" in caught.value.__notes__[0]


def test_other_exception_carries_its_traceback() -> None:
    """Any other exception becomes ChildFailed with the child's traceback text."""
    with pytest.raises(ChildFailed, match="ZeroDivisionError: no such quotient") as caught:
        run_child(CHILDREN, "raise_plain", {})
    assert "in raise_plain" in caught.value.traceback_text


@pytest.mark.parametrize(
    ("module", "function", "text"),
    [
        ("no_such_module_here", "f", "ModuleNotFoundError"),
        (CHILDREN, "no_such_function", "AttributeError"),
        (CHILDREN, "answer_no_json", "not JSON serializable"),
    ],
)
def test_bad_functions_are_reported(module: str, function: str, text: str) -> None:
    """A function that isn't there, or whose answer is no JSON, is reported as what it is."""
    with pytest.raises(ChildFailed, match=text):
        run_child(module, function, {})


def test_answer_must_be_a_dict() -> None:
    """An answer that is JSON but no dict is refused."""
    with pytest.raises(MeasureError, match="answered with a str"):
        run_child(CHILDREN, "answer_text", {})


def test_request_must_be_json() -> None:
    """A request that is no JSON is refused before a child starts."""
    with pytest.raises(MeasureError, match="not JSON"):
        run_child(CHILDREN, "echo", {"value": object()})


def test_killed_child_is_named() -> None:
    """A child that is killed gives ChildDied with the signal's name."""
    with pytest.raises(ChildDied, match="SIGKILL"):
        run_child(CHILDREN, "kill_self", {})


def test_slow_child_is_stopped() -> None:
    """A child that takes too long is stopped and reported."""
    with pytest.raises(MeasureError, match=r"more than 0\.5 s"):
        run_child(CHILDREN, "sleep", {"seconds": 60}, timeout_s=0.5)


def test_interpreter_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter that can't be started is a typed error."""
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(MeasureError, match="can't start an interpreter"):
        run_child(CHILDREN, "echo", {})


def test_full_temporary_folder_is_a_disk_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that can't be written is a DiskError that names TMPDIR."""

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(DiskError, match="TMPDIR"):
        run_child(CHILDREN, "echo", {})
