"""A file that is there whole or not at all, whatever ends its writing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A temporary file beside `path` to write to; when the block ends well it is flushed to the disk and renamed to `path`, else it is removed.

    An OSError comes out as it is: the caller knows what the file means to the user.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """The same for a text, in UTF-8."""
    with whole_file(path) as file:
        file.write(text.encode())
