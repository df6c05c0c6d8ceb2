"""Ops that passes put into a step: traceable, registered as `mebp::*`, each with its formula and error bound. Importing registers them."""

from mebp_compile.kernels import cross_entropy, native, tables

__all__ = ["cross_entropy", "native", "tables"]
