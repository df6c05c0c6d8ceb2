"""Load one of this package's own C libraries: plain shared libraries, called through ctypes with pointers in and the GIL released."""

from __future__ import annotations

import ctypes
import importlib.machinery
import logging
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)


def load(stem: Path, declare: Callable[[ctypes.CDLL], None], what: str, otherwise: str) -> ctypes.CDLL | None:
    """The library at `stem` (a path without its suffix), its functions declared; None, said through `logging`, where there is none to use.

    `declare` sets argument types and raises AttributeError where a symbol is missing. `what` and `otherwise` are words for the message.
    """
    for path in filter(Path.exists, (stem.with_name(stem.name + suffix) for suffix in importlib.machinery.EXTENSION_SUFFIXES)):
        try:
            library = ctypes.CDLL(str(path))
            declare(library)
            return library
        except (OSError, AttributeError) as error:
            logger.warning("%s can't be loaded (%s): %s", what, error, otherwise)
            return None
    logger.warning("%s not built (no C compiler at install?): %s", what, otherwise)
    return None
