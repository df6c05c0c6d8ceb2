"""Why a contestant could not run, in a line for the table."""

from __future__ import annotations

from mebp_compile.errors import MebpError

LONGEST = 400


class PeerUnavailable(MebpError):
    """A peer that can't run here: a package that is not installed, or something that it does not support on this machine."""


def in_short(error: BaseException) -> str:
    """An error's type and message, on one line of at most LONGEST characters."""
    text = f"{type(error).__name__}: {' '.join(str(error).replace(chr(10) + '  try: ', '; try: ').split())}"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
