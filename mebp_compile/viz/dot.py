"""The graph as a dot file (by pydot) and as SVG: laid out by Graphviz where it is installed, otherwise in layers by ourselves."""

from __future__ import annotations

import shutil
import subprocess
from html import escape

from mebp_compile.config import format_bytes
from mebp_compile.graph import Graph
from mebp_compile.planning import Plan
from mebp_compile.viz.clusters import Node, Picture, picture

FILL = {"kept": "#dbe9fb", "recomputed": "#ecd9f7", "offloaded": "#d2efe8"}
EDGE = {"forward": "#4f8fd9", "backward": "#e0882b", "update": "#5c9a58"}
BOX_WIDTH, BOX_HEIGHT, SPACE_X, SPACE_Y, MARGIN = 210, 52, 26, 44, 30
GRAPHVIZ_SECONDS = 60


def graph_dot(graph: Graph, plan: Plan) -> str:
    """Graphviz text: fill says kept, recomputed or offloaded, the border the phase, the edges the bytes that flow."""
    import pydot

    shown = picture(graph, plan)
    dot = pydot.Dot(_quoted(graph.name), graph_type="digraph", rankdir="TB", fontname="Helvetica")
    dot.set_node_defaults(shape="box", style='"rounded,filled"', fontname="Helvetica", fontsize="10")
    dot.set_edge_defaults(fontname="Helvetica", fontsize="8", color='"#98a2b3"')
    for number, node in enumerate(shown.nodes):
        text = _quoted("\\n".join([node.label, *node.notes]))
        dot.add_node(
            pydot.Node(f"n{number}", label=text, fillcolor=_quoted(FILL[node.fate]), color=_quoted(EDGE.get(node.phase, "#667085")))
        )
    for writer, reader, size in shown.edges:
        dot.add_edge(pydot.Edge(f"n{writer}", f"n{reader}", label=_quoted(format_bytes(size)) if size else '""'))
    return str(dot.to_string())


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'


def graph_svg(graph: Graph, plan: Plan, graphviz: bool = True) -> str:
    """The picture of `graph_dot` as SVG, by Graphviz's `dot` if it is there (and `graphviz` allows it), else by `layered_svg`."""
    program = shutil.which("dot") if graphviz else None
    if program is not None:
        try:
            done = subprocess.run(
                [program, "-Tsvg"], input=graph_dot(graph, plan), capture_output=True, text=True, timeout=GRAPHVIZ_SECONDS, check=True
            )
            return done.stdout
        except (subprocess.SubprocessError, OSError):
            pass  # an old or broken Graphviz: our own layout needs nothing
    return layered_svg(picture(graph, plan))


def layered_svg(shown: Picture) -> str:
    """Nodes in rows (each below all that it needs), each row ordered by where its inputs lie."""
    rows = _rows(shown)
    widest = max((len(row) for row in rows), default=1)
    width = 2 * MARGIN + widest * BOX_WIDTH + (widest - 1) * SPACE_X
    height = 2 * MARGIN + len(rows) * BOX_HEIGHT + max(0, len(rows) - 1) * SPACE_Y + 24
    place: dict[int, tuple[float, float]] = {}
    for depth, row in enumerate(rows):
        left = (width - len(row) * BOX_WIDTH - (len(row) - 1) * SPACE_X) / 2
        for column, node in enumerate(row):
            place[node] = (left + column * (BOX_WIDTH + SPACE_X), MARGIN + 24 + depth * (BOX_HEIGHT + SPACE_Y))
    parts = [_curve(place[a], place[b], size) for a, b, size in shown.edges]
    parts += [_box(shown.nodes[number], *spot) for number, spot in place.items()]
    look = "<style>text{font:11px system-ui,sans-serif;fill:#1d2430}.s{font-size:9.5px;fill:#667085}</style>"
    paper = f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f"{look}{paper}{_key()}{''.join(parts)}</svg>\n"
    )


def _rows(shown: Picture) -> list[list[int]]:
    """Longest-path layers; inside a layer nodes are sorted by the mean column of their inputs."""
    depth = [0] * len(shown.nodes)
    inputs: dict[int, list[int]] = {}
    for writer, reader, _ in shown.edges:
        inputs.setdefault(reader, []).append(writer)
    for node in _topological(shown, inputs):
        depth[node] = max((depth[writer] + 1 for writer in inputs.get(node, ())), default=0)
    rows: list[list[int]] = [[] for _ in range(max(depth, default=-1) + 1)]
    column: dict[int, float] = {}
    for level, row in enumerate(rows):
        members = [node for node in range(len(depth)) if depth[node] == level]
        row.extend(sorted(members, key=lambda node: _mean([column[w] for w in inputs.get(node, ())], node)))
        column.update({node: position - len(row) / 2 for position, node in enumerate(row)})
    return rows


def _topological(shown: Picture, inputs: dict[int, list[int]]) -> list[int]:
    import networkx

    net = networkx.DiGraph()
    net.add_nodes_from(range(len(shown.nodes)))
    net.add_edges_from((writer, reader) for reader, writers in inputs.items() for writer in writers)
    return list(networkx.topological_sort(net))


def _mean(columns: list[float], node: int) -> tuple[float, int]:
    return (sum(columns) / len(columns) if columns else 0.0), node


def _curve(start: tuple[float, float], end: tuple[float, float], size_bytes: int) -> str:
    x0, y0, x1, y1 = start[0] + BOX_WIDTH / 2, start[1] + BOX_HEIGHT, end[0] + BOX_WIDTH / 2, end[1]
    middle = (y0 + y1) / 2
    tip = f"<title>{format_bytes(size_bytes)}</title>"
    return f'<path d="M{x0:.0f} {y0:.0f}C{x0:.0f} {middle:.0f} {x1:.0f} {middle:.0f} {x1:.0f} {y1:.0f}" fill="none" stroke="#98a2b3">{tip}</path>'


def _box(node: Node, x: float, y: float) -> str:
    middle = x + BOX_WIDTH / 2
    label = node.label if len(node.label) <= 32 else f"…{node.label[-31:]}"
    note = ", ".join(node.notes[:1] + [item.replace("recomputed: ", "again ").replace("offloaded: ", "disk ") for item in node.notes[1:]])
    lines = (
        f'<text x="{middle:.0f}" y="{y + 21:.0f}" text-anchor="middle">{escape(label)}</text>'
        f'<text class="s" x="{middle:.0f}" y="{y + 37:.0f}" text-anchor="middle">{escape(note if len(note) <= 42 else note[:41] + "…")}</text>'
    )
    box = (
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="7" fill="{FILL[node.fate]}" '
        f'stroke="{EDGE.get(node.phase, "#667085")}" stroke-width="1.4"/>'
    )
    return f"<g><title>{escape(f'{node.label} ({node.phase}): {note}')}</title>{box}{lines}</g>"


def _key() -> str:
    """What the colours mean."""
    parts = []
    for number, (name, colour, border) in enumerate(
        [*((fate, fill, "#98a2b3") for fate, fill in FILL.items()), *((phase, "#ffffff", line) for phase, line in EDGE.items())]
    ):
        x = MARGIN + 92 * number
        parts.append(
            f'<rect x="{x}" y="12" width="12" height="12" rx="3" fill="{colour}" stroke="{border}"/><text x="{x + 18}" y="22">{name}</text>'
        )
    return "".join(parts)
