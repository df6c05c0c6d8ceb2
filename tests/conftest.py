"""What all tests share: a folder on a real disk, and few threads."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "out"


@pytest.fixture
def disk_folder() -> Iterator[Path]:
    """An empty folder under the repository's ignored `out/`: temporary folders may lie in memory, which is refused for offloading."""
    FOLDER.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=FOLDER))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
