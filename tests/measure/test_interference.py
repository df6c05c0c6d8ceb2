"""What transfers take from compute."""

from __future__ import annotations

import threading
from pathlib import Path

from mebp_compile.measure.interference import measure_interference


def test_it_is_a_share_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """The figure is a share of the transfer's time; no thread and no file stays."""
    before = threading.active_count()
    share, copied_per_us = measure_interference(tmp_path)
    assert 0.0 <= share <= 1.0
    assert copied_per_us > 0
    assert threading.active_count() == before
    assert list(tmp_path.iterdir()) == []
