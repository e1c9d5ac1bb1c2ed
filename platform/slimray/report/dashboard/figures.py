"""Figures of the dashboard: curves, parallel coordinates, fronts, confusions, subnets, as Dash components.

Charts use the same `Curves` as the report. Surprising: parallel coordinates are plain SVG lines, because Plotly's own
trace compiles code in the browser (which the content security policy forbids) and needs WebGL.
"""

import html as text_of
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from dash import dcc, html

from slimray.arch import Arch
from slimray.report import charts
from slimray.report.dashboard.pieces import (
    COST_NAMES,
    cut,
    named_attribute,
    number_text,
    plain,
    plain_numbers,
    run_link,
    spaced,
    thinned,
)

MAX_LINES = 3000  # trials drawn
COLOURS = ("#3b82f6", "#e08a1e", "#16a37a", "#c25bd0", "#e0484f", "#7c8ba1", "#0fa3b1", "#b08900")
RAMP = ("#6b7280", "#5873a8", "#3b82f6", "#16a37a", "#d99a00", "#e0484f")  # colours of trials, from worst to best


# ---- figures ---------------------------------------------------------------------------------------------------------
def lines_figure(curves: charts.Curves, height: int = 260, ticks: Sequence[str] = ()) -> Any:
    """Return a chart of series over steps, each thinned to MAX_POINTS means."""
    traces = []
    for place, (name, (steps, values)) in enumerate(curves.series.items()):
        x, y = thinned(steps, values)
        trace = {"type": "scatter", "mode": "lines" if len(x) > 1 else "markers", "x": x, "y": y, "name": plain(name)}
        trace["line"] = {"color": COLOURS[place % len(COLOURS)], "width": 1.8}
        trace["line"] |= {"dash": ("solid", "dash", "dot")[place // len(COLOURS) % 3]}
        if curves.stacked:
            trace |= {"stackgroup": "one", "line": {**trace["line"], "width": 0.5}}
        traces.append(trace)
    x_axis: dict[str, Any] = {"title": {"text": "step"}}
    if ticks:
        x_axis = {"tickvals": list(range(len(ticks))), "ticktext": [plain(tick) for tick in ticks]}
        x_axis["range"] = [-0.4, len(ticks) - 0.6]
    return _figure(curves.title, traces, x_axis, {"title": {"text": plain(curves.unit)}}, height)


def parallel_figure(title: str, axes: Mapping[str, Sequence[float | None]]) -> Any:
    """Return trials as lines over parallel axes, the last of which is the metric; one trace per sixth of the trials.

    The trials are divided by their metric. A trial without a value on an axis leaves a gap there.
    """
    names = list(axes)
    values = np.array([[math.nan if v is None else v for v in column] for column in axes.values()], dtype=np.float64).T
    low, high = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
    scaled = np.where(high > low, (values - low) / np.where(high > low, high - low, 1), 0.5)
    order = np.argsort(values[:, -1], kind="stable")[-MAX_LINES:]  # from worst to best, so that the best are on top
    traces: list[dict[str, Any]] = []
    for colour, group in zip(RAMP, np.array_split(order, len(RAMP)), strict=True):
        if not len(group):
            continue
        # one line, there and back again, so that it is a single element of the page; it turns on the outer axes
        there, back = np.arange(len(names)), np.arange(len(names))[::-1]
        x = np.concatenate([back if i % 2 else there for i in range(len(group))])
        y = np.where((np.arange(len(group)) % 2 == 1)[:, None], scaled[group][:, ::-1], scaled[group]).round(4).ravel()
        scores = values[group, -1]
        name = f"{number_text('', scores.min())} to {number_text('', scores.max())}"
        trace = {"type": "scatter", "mode": "lines", "x": x.tolist(), "y": plain_numbers(y), "name": name}
        traces.append(trace | {"line": {"color": colour, "width": 1}, "hoverinfo": "skip", "opacity": 0.55})
    shapes = [
        {"type": "line", "x0": i, "x1": i, "y0": 0, "y1": 1, "line": {"color": "#8a8f98", "width": 1}, "layer": "above"}
        for i in range(len(names))
    ]
    notes = [
        {"x": i, "y": y, "text": number_text(name, end), "showarrow": False, "yanchor": anchor, "font": {"size": 11}}
        for i, name in enumerate(names)
        for y, end, anchor in ((1.01, high[i], "bottom"), (-0.01, low[i], "top"))
    ]
    x_axis = {
        "tickvals": list(range(len(names))),
        "ticktext": [plain(COST_NAMES.get(name, name)) for name in names],
        "showgrid": False,
        "range": [-0.45, len(names) - 0.55],
    }
    y_axis = {"visible": False, "range": [-0.12, 1.1]}
    return _figure(title, traces, x_axis, y_axis, 380, shapes=shapes, annotations=notes)


def front_figure(
    title: str,
    cost: str,
    metric: str,
    points: Sequence[tuple[float, float]],
    front: Sequence[tuple[float, float]],
    chosen: Sequence[tuple[float, float, str]],
) -> Any:
    def trace(name: str, pairs: Sequence[Any], colour: str, **more: Any) -> dict[str, Any]:
        x, y = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        return {"type": "scatter", "mode": "markers", "name": name, "x": x, "y": y, "marker": {"color": colour}} | more

    grey, points = COLOURS[5], points[:MAX_LINES]
    traces = [
        trace("trials", [], grey),  # for the legend only, because the points are drawn as a shape
        trace(
            "front", front, COLOURS[0], mode="lines+markers", line={"shape": "hv", "width": 1.5, "color": COLOURS[0]}
        ),
    ]
    if chosen:
        names = [plain(name) for _, _, name in chosen]
        mark = {"color": COLOURS[4], "size": 11, "symbol": "diamond"}
        spots = {
            "mode": "markers+text",
            "text": names,
            "textposition": "bottom right",
            "marker": mark,
            "cliponaxis": False,
        }
        traces.append(trace("chosen", chosen, "", **spots))
    unit = plain(COST_NAMES.get(cost, cost))
    spots = [*points, *front, *((x, y) for x, y, _ in chosen)]
    x_axis, y_axis = ({"range": _around([spot[i] for spot in spots])} for i in (0, 1))
    x_axis, y_axis = x_axis | {"title": {"text": unit}}, y_axis | {"title": {"text": plain(metric)}}
    return _figure(title, traces, x_axis, y_axis, 300, shapes=[_dots(points, grey)] if points else [])


def _dots(points: Sequence[tuple[float, float]], colour: str) -> dict[str, Any]:
    """Return points as short dashes of one shape, which is a single element of the page instead of one per point."""
    half = 0.006 * (max(x for x, _ in points) - min(x for x, _ in points))
    path = "".join(f"M{x - half:.8g},{y:.6g}L{x + half:.8g},{y:.6g}" for x, y in points)
    return {"type": "path", "path": path, "line": {"color": colour, "width": 4}, "opacity": 0.5, "layer": "below"}


def _around(values: Sequence[float]) -> list[float]:
    """Return the range of an axis that shows all values with a margin."""
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return [low - margin, high + margin]


def confusion_figure(title: str, classes: Sequence[str], counts: np.ndarray) -> Any:
    if counts.shape != (len(classes), len(classes)):
        raise ValueError(f"confusion of shape {counts.shape} for {len(classes)} classes")
    if not (np.abs(counts) < 2**53).all():
        raise ValueError("confusion holds values that are not counts")
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    many = len(classes) > 40
    labels = [plain(name) for name in classes]
    trace: dict[str, Any] = {
        "type": "heatmap",
        "z": share.round(4).tolist(),
        "customdata": counts.astype(int).tolist(),
        "colorscale": [[0, "rgba(59,130,246,0.04)"], [1, "rgba(59,130,246,1)"]],
        "zmin": 0,
        "zmax": 1,
        "showscale": False,
        "hovertemplate": "truth %{y}<br>predicted %{x}<br>%{customdata} samples, %{z:.1%}<extra></extra>",
        **({} if many else {"x": labels, "y": labels}),
    }
    if len(classes) <= 12:
        trace |= {"text": counts.astype(int).tolist(), "texttemplate": "%{text}"}
    x_axis = {"title": {"text": "predicted"}, "type": "category" if not many else "linear", "showgrid": False}
    y_axis = {**x_axis, "title": {"text": "truth"}, "autorange": "reversed"}
    return _figure(title, [trace], x_axis, y_axis, 380)


def _figure(
    title: str, traces: Sequence[Any], x_axis: dict[str, Any], y_axis: dict[str, Any], height: int, **more: Any
) -> Any:
    """Return a figure under its title. The page sets background and text colour (dashboard.css), also in dark mode."""
    axis = {"automargin": True, "zeroline": False, "gridcolor": "#8a8f9840", "fixedrange": False}
    layout = {
        "height": height,
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "#7a808c"},
        "xaxis": axis | x_axis,
        "yaxis": axis | y_axis,
        "showlegend": False,
        "hovermode": "closest",
        "dragmode": False,
        "uirevision": title,
        **more,
    }
    graph = dcc.Graph(
        figure={"data": list(traces), "layout": layout},
        config={"displayModeBar": False, "responsive": True, "displaylogo": False},
        style={"height": f"{height}px"},
    )
    children = [
        html.Figcaption(cut(title)),
        html.Div(graph, role="img", **named_attribute("aria-label", cut(f"chart: {title}"))),
    ]
    if len(traces) > 1:
        children.insert(1, html.Div([_key(trace) for trace in traces], className="legend soft"))
    return html.Figure(children)


def _key(trace: Mapping[str, Any]) -> Any:
    """Return the colour and name of a series as ordinary text of the page."""
    colour = (trace.get("line") or {}).get("color") or trace["marker"]["color"]
    return html.Span([html.I(style={"background": colour}), text_of.unescape(str(trace["name"]))])


def subnet_figure(title: str, arch: Mapping[str, Any], run: Any = None) -> Any:
    """Return a drawing of an arch: a bar per block, its height the expansion (or width), its colour the kernel.

    Skipped blocks are hollow.
    """
    value = Arch.from_dict(arch)
    depths = {depth.name: depth for depth in value.depths}
    lists = {name: genes for name, genes in value.dimensions if isinstance(genes, tuple) and name not in depths}
    singles = [f"{name} {number_text('', genes)}" for name, genes in value.dimensions if not isinstance(genes, tuple)]
    singles = [f"{name} {' '.join(number_text('', gene) for gene in value[name])}" for name in depths] + singles
    tall = next((name for name in ("expand", "width") if name in lists), next(iter(lists), None))
    caption = [title, html.Span(" · ".join(singles), className="soft")]
    if run:
        caption.append(run_link(str(run)))
    if tall is None:
        return html.Figure([html.Figcaption(spaced(caption))], className="subnet")
    heights = lists[tall]
    colours = lists.get("kernel", ())
    kinds = sorted(set(colours))
    active = value.runs(tall)
    stages = next((depth.stages for depth in value.depths if tall in depth.skips), ())
    starts = set(np.cumsum([stage.blocks for stage in stages]).tolist())
    bars = []
    for i, (height, runs) in enumerate(zip(heights, active, strict=True)):
        genes = ", ".join(f"{name} {number_text('', g[i])}" for name, g in lists.items() if i < len(g))
        kind = kinds.index(colours[i]) % len(COLOURS) if i < len(colours) else 0
        look = {"--share": f"{height / max(heights):.3f}" if max(heights) > 0 else "0", "--bar": COLOURS[kind]}
        said = f"block {i + 1}: {genes if runs else 'skipped'}"
        names = "block" + ("" if runs else " skipped") + (" first" if i in starts else "")
        bars.append(
            html.Span(className=names, style=look, title=said, role="img", **named_attribute("aria-label", said))
        )
    legend = [
        html.Span([html.I(style={"background": COLOURS[i % len(COLOURS)]}), f"kernel {number_text('', kind)}"])
        for i, kind in enumerate(kinds)
    ]
    legend.append(html.Span(f"height: {tall}; hollow: skipped"))
    return html.Figure(
        [
            html.Figcaption(spaced(caption)),
            html.Div(bars, className="blocks"),
            html.Div(legend, className="legend soft"),
        ],
        className="subnet",
    )
