"""Quantised weights: schemes, packing, dequantising as one traceable op with a C kernel, and the format of a store."""

from mebp_compile.quant.dequantise import (
    columns_maker,
    dequantise,
    dequantise_columns,
    dequantise_into,
    dequantise_rows,
    embedding_rows,
    rows_maker,
)
from mebp_compile.quant.layout import FORMATS, PLAIN, choose_scheme
from mebp_compile.quant.scheme import Packed, Scheme
from mebp_compile.quant.schemes import SCHEMES, scheme_named

__all__ = [
    "FORMATS",
    "PLAIN",
    "SCHEMES",
    "Packed",
    "Scheme",
    "choose_scheme",
    "columns_maker",
    "dequantise",
    "dequantise_columns",
    "dequantise_into",
    "dequantise_rows",
    "embedding_rows",
    "rows_maker",
    "scheme_named",
]
