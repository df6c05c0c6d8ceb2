"""`mebp bench`: this package and its peers on the same model and batches, each in a process of its own, measured side by side."""

from mebp_compile.bench.race import Contestant, Result, race
from mebp_compile.bench.report import table, write_plot

__all__ = ["Contestant", "Result", "race", "table", "write_plot"]
