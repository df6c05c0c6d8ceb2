"""What a plan does, in words: `explain` for the whole step or a module, `why` for one storage, value or op, `summary` for print(step)."""

from mebp_compile.explain.life import why
from mebp_compile.explain.overview import explain, summary

__all__ = ["explain", "summary", "why"]
