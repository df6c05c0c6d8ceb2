"""One thread for these tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from threads import one_thread


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with one_thread():
        yield
