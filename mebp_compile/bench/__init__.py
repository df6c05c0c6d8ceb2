"""`mebp bench`: this package and its peers on the same model and batches, each in a process of its own, measured side by side."""

from mebp_compile.bench.plot import write_plot
from mebp_compile.bench.race import Contestant, Result, race
from mebp_compile.bench.report import report, table, verdicts, write_report
from mebp_compile.bench.rows import read_races

__all__ = ["Contestant", "Result", "race", "read_races", "report", "table", "verdicts", "write_plot", "write_report"]
