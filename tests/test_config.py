"""Budgets and options: what is accepted, and the typed error for everything else."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mebp_compile.config import Budget, Options, as_budget, cache_dir, debug_level, format_bytes, parse_budget
from mebp_compile.errors import BudgetError, OptionError


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("256MB", 256 * 10**6),
        ("1GiB", 2**30),
        ("1.5 GB", 1_500_000_000),
        ("512", 512),
        (4096, 4096),
        (1e6, 10**6),
        ("2kib", 2048),
        ("1e6", 10**6),
    ],
)
def test_budgets_are_read_in_powers_of_ten_or_two(text: Any, size_bytes: int) -> None:
    """MB is 10^6 and MiB 2^20, whatever the case, and numbers are bytes."""
    assert parse_budget(text) == size_bytes


@pytest.mark.parametrize(
    "wrong", ["", "MB", "-1MB", "12 parsecs", "nan", "inf", math.nan, math.inf, -5, 0, 0.5, "0", None, True, [1], b"1MB", "1MB 2MB"]
)
def test_budgets_that_are_no_size_are_refused(wrong: Any) -> None:
    """Malformed, negative, zero and NaN budgets give a BudgetError that shows the value and says what to write."""
    with pytest.raises(BudgetError) as caught:
        parse_budget(wrong)
    assert repr(wrong) in str(caught.value)
    assert "256MB" in caught.value.fix


@pytest.mark.parametrize(
    "wrong", [{"numerics": "fast"}, {"grads": "maybe"}, {"effort": "heroic"}, {"time_limit_s": math.nan}, {"time_limit_s": 0.0}]
)
def test_unknown_options_are_refused(wrong: dict[str, Any]) -> None:
    """An option's unknown value gives an OptionError that names the option's allowed values."""
    with pytest.raises(OptionError) as caught:
        Options(1000, **wrong)
    assert caught.value.fix


def test_sizes_are_printed_in_binary_units() -> None:
    """Bytes print as KiB, MiB and GiB with three digits."""
    assert [format_bytes(size) for size in (0, 1023, 1024, 64 * 2**20, int(1.94 * 2**30))] == [
        "0 B",
        "1023 B",
        "1.00 KiB",
        "64.0 MiB",
        "1.94 GiB",
    ]


def test_environment_is_read_here_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """MEBP_CACHE moves the cache; MEBP_DEBUG takes a digit and nothing else."""
    monkeypatch.setenv("MEBP_CACHE", "somewhere")
    assert str(cache_dir()) == "somewhere"
    monkeypatch.setenv("MEBP_DEBUG", "3")
    assert debug_level() == 3
    monkeypatch.setenv("MEBP_DEBUG", "loud")
    with pytest.raises(OptionError):
        debug_level()


def test_a_budget_has_bytes_and_a_scope() -> None:
    """Budget reads sizes as parse_budget does, is a step's unless said otherwise, and refuses other scopes; a bare size is a step's budget."""
    assert Budget("256MB", scope="process").size_bytes == 256 * 10**6
    assert as_budget("1KiB") == Budget(1024) == Budget(1024, "step")
    assert as_budget(Budget("1GB", "process")) == Budget(10**9, "process")
    assert Options(1000, scope="process").process_bytes == 1000
    assert Options(1000).process_bytes is None
    with pytest.raises(BudgetError):
        Budget("lots")
    for scope in ("planet", ""):
        with pytest.raises(OptionError, match="scope"):
            Budget("1GB", scope=scope)
        with pytest.raises(OptionError, match="scope"):
            Options(1000, scope=scope)
