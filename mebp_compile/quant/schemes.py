"""The schemes by name."""

from __future__ import annotations

from mebp_compile.errors import OptionError
from mebp_compile.quant.int4 import INT4
from mebp_compile.quant.int8 import INT8
from mebp_compile.quant.nf4 import NF4
from mebp_compile.quant.scheme import Scheme

SCHEMES = {"int4": INT4, "nf4": NF4, "int8": INT8}


def scheme_named(name: str) -> Scheme:
    """The scheme called `name`. Raises OptionError for an unknown one."""
    if name not in SCHEMES:
        raise OptionError(f"unknown scheme {name!r}", fix=f"one of {', '.join(SCHEMES)}")
    return SCHEMES[name]
