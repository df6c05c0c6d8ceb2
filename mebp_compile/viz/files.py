"""Writing a picture to a file: its suffix says which picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mebp_compile.errors import DiskError, OptionError
from mebp_compile.graph import Graph
from mebp_compile.planning import Plan
from mebp_compile.viz.dot import graph_dot, graph_svg
from mebp_compile.viz.page import timeline_html
from mebp_compile.viz.timeline import timeline_svg
from mebp_compile.viz.trace import trace_json
from mebp_compile.whole_file import write_whole

Picture = Callable[[Graph, Plan], str]
WRITERS: dict[str, Picture] = {".svg": graph_svg, ".dot": graph_dot, ".json": trace_json}


def write(path: str | Path, graph: Graph, plan: Plan, measured: Sequence[int] | None = None) -> Path:
    """Write the picture that the suffix names: .html timeline, .svg or .dot graph (a .svg whose name holds "timeline": the timeline), .json trace.

    Raises OptionError for another suffix, DiskError where the file can't be written.
    """
    path = Path(path)
    if path.suffix == ".html":
        text = timeline_html(graph, plan, measured)
    elif path.suffix == ".svg" and "timeline" in path.stem:
        text = timeline_svg(graph, plan, measured)
    elif path.suffix in WRITERS:
        text = WRITERS[path.suffix](graph, plan)
    else:
        raise OptionError(
            f"no picture is written to a {path.suffix or 'nameless'} file ({path})", "end the name in .html, .svg, .dot or .json"
        )
    try:
        write_whole(path, text)
    except OSError as error:
        raise DiskError(f"can't write {path}: {error.strerror}", "give a file in a folder that exists and can be written") from error
    return path
