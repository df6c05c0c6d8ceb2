"""Ops that passes put into a step: traceable, registered as `mebp::*`, each with its formula and error bound. Importing registers them."""

from mebp_compile.kernels import attention, cross_entropy, fused, gated, low_rank, native, product, rms_norm, rope, tables

__all__ = ["attention", "cross_entropy", "fused", "gated", "low_rank", "native", "product", "rms_norm", "rope", "tables"]
