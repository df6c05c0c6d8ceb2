"""Pictures of a plan: the memory timeline (HTML, SVG), the graph (dot, SVG) and a trace for Perfetto (JSON). Torch-free, self-contained files."""

from mebp_compile.viz.dot import graph_dot, graph_svg
from mebp_compile.viz.files import write
from mebp_compile.viz.page import timeline_html
from mebp_compile.viz.timeline import timeline_svg
from mebp_compile.viz.trace import trace_json

__all__ = ["graph_dot", "graph_svg", "timeline_html", "timeline_svg", "trace_json", "write"]
