"""What all tests share: a folder on a real disk, and few threads."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import hypothesis
import pytest

from mebp_compile import cost

hypothesis.settings.register_profile("same", deadline=None, derandomize=True)  # `make test` is green or red for what changed, not by chance
hypothesis.settings.register_profile("explore", deadline=None)  # `make test-all`
hypothesis.settings.load_profile("same")

FOLDER = Path(__file__).resolve().parent.parent / "out"
OWN: list[Path] = []  # the cache folder, where this process made it


@pytest.fixture
def disk_folder() -> Iterator[Path]:
    """An empty folder under the repository's ignored `out/`: temporary folders may lie in memory, which is refused for offloading."""
    FOLDER.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=FOLDER))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def quick_measurements() -> Iterator[None]:
    """Little other memory goes through the caches between measured calls: no test depends on what an op takes in a real step."""
    with mock.patch.object(cost, "BETWEEN_BYTES", 1 << 16):
        yield


def pytest_configure(config: pytest.Config) -> None:
    """Measured costs and planned programs of this run alone, unless MEBP_CACHE names a folder: one for all workers, who inherit the environment."""
    if not os.environ.get("MEBP_CACHE"):
        FOLDER.mkdir(exist_ok=True)
        OWN.append(Path(tempfile.mkdtemp(prefix="cache-", dir=FOLDER)))
        os.environ["MEBP_CACHE"] = str(OWN[0])


def pytest_unconfigure(config: pytest.Config) -> None:
    """What this process made goes."""
    for folder in OWN:
        del os.environ["MEBP_CACHE"]
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cache_folder() -> Path:
    """Of this run, all workers together."""
    return Path(os.environ["MEBP_CACHE"])
