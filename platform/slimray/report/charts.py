"""Charts of a report as inline SVG: curves, scatter plots, confusion heat maps, filmstrips."""

import base64
import binascii
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slimray.report.metrics import main_ones, metrics_of, names_in
from slimray.report.points import png
from slimray.report.tables import NOTHING, Confusion, is_finite, most_confused, per_class, show_number

MAX_LABELLED_CLASSES = 40
NUM_BINS = 300
INK, GRID = "#010101", "#020202"
SERIES = ("#030301", "#030302", "#030303", "#030304", "#030305")
CSS_COLOURS = {INK: "var(--soft)", GRID: "var(--line)", **{c: f"var(--series-{i})" for i, c in enumerate(SERIES, 1)}}
DASHES = ("-", "--", ":", "-.", "-")


@dataclass(frozen=True)
class Curves:
    """Up to five series over steps in one chart: name -> (steps [N], values [N]); `stacked` ones share their steps."""

    title: str
    unit: str
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    stacked: bool = False

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to draw."""
        return not any(len(steps) for steps, _ in self.series.values())


@dataclass(frozen=True)
class Bars:
    """Bars (x, height) at positions that need not be evenly spaced; `legend` holds pairs of a name and its text."""

    title: str
    x_name: str
    y_name: str
    bars: Sequence[tuple[float, float]]
    legend: Sequence[tuple[str, str]] = ()

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to draw."""
        return not self.bars


@dataclass(frozen=True)
class Scatter:
    """Points (x, y), a line through their Pareto front (low x; high or low y, by `better`), and named points
    (x, y, name)."""

    title: str
    x_name: str
    y_name: str
    points: Sequence[tuple[float, float]]
    named: Sequence[tuple[float, float, str]] = ()
    better: str = "higher"

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to draw."""
        return not self.points

    def front(self) -> list[tuple[float, float]]:
        """Return the points that no other dominates, by rising x."""
        out: list[tuple[float, float]] = []
        sign = 1 if self.better == "higher" else -1
        for x, y in sorted(self.points, key=lambda point: (point[0], -sign * point[1])):
            if not out or sign * y > sign * out[-1][1]:
                out.append((x, y))
        return out


@dataclass(frozen=True)
class Clip:
    """One clip with its prediction.

    `strip` is a base64 JPEG or PNG of its frames side by side; square frames are also played one after the other.
    `top` holds (class, probability 0-1), the likeliest first; the first three are shown.
    """

    run: str
    strip: str
    truth: str
    top: Sequence[tuple[str, float]] = field(default_factory=tuple)


def by_batch(rows: Sequence[Mapping[str, Any]], results: Mapping[str, Any] = NOTHING) -> list[Curves]:
    """Return a chart of the first metric by global batch, a curve per learning-rate rule; [] for a single batch size.

    Runs whose rate grows with the batch (the same rate per sample) form one curve, those with one fixed rate another.
    """
    known = [row for row in rows if row.get("peak_lr") and row.get("variant", "natural") == "natural"]
    if len({row["batch"] for row in known}) < 2:
        return []
    found = main_ones(metrics_of(known[0], results))
    metric, unit = (found[0]["name"], found[0]["unit"]) if found else (None, "")
    rules: dict[str, list[Mapping[str, Any]]] = {}
    for row in known:
        rules.setdefault(f"rate {1000 * row['peak_lr'] / row['batch']:.3g} per 1,000 samples", []).append(row)
        rules.setdefault(f"rate {row['peak_lr']:.3g} for any batch", []).append(row)
    series = {}
    for name, chosen in rules.items():
        chosen = sorted(chosen, key=lambda row: row["batch"])
        if metric and len({row["batch"] for row in chosen}) > 1:
            series[name] = ([math.log2(row["batch"]) for row in chosen], [row[metric] for row in chosen])
    return [Curves(f"{metric} by global batch (log2)", unit, series)] if series else []


def train_curves(rows: Sequence[Mapping[str, Any]], results: Mapping[str, Any] = NOTHING) -> list[Curves]:
    """Return the charts of a training from its metric rows, which must be sorted by step."""

    def lines(title: str, unit: str, **names: str) -> Curves:
        return Curves(title, unit, {label: _series(rows, name) for label, name in names.items()})

    split = {
        "data wait": "data/wait_s",
        "transfer": "time/transfer_s",
        "compute": "time/compute_s",
        "communication": "time/communication_s",
    }
    timed = [row for row in rows if any(is_finite(row.get(name)) for name in split.values())]
    parts = {label: [row.get(name) or 0.0 for row in timed] for label, name in split.items()}
    if any("time/step_s" in row for row in timed):
        known = [sum(values) for values in zip(*parts.values())]
        parts["other"] = [max(0.0, (row.get("time/step_s") or 0.0) - part) for row, part in zip(timed, known)]
    steps = [row["step"] for row in timed]
    return [
        lines("Loss", "loss", train="train/loss", validation="val/loss"),
        *_validations(rows, results),
        lines("Learning rate", "lr", lr="train/lr"),
        lines("Throughput", "samples/s", samples="train/samples_per_s"),
        Curves(
            "Where a step's time goes",
            "s",
            {label: (steps, values) for label, values in parts.items()},
            stacked=True,
        ),
    ]


def _validations(rows: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> list[Curves]:
    """Return one chart per unit, with the metrics of that unit."""
    metrics = main_ones(metrics_of(names_in(rows), results))
    out = []
    for unit in dict.fromkeys(metric["unit"] for metric in metrics):
        names = [metric["name"] for metric in metrics if metric["unit"] == unit][:5]
        title = "Validation accuracy" if unit == "%" else f"Validation: {', '.join(names)}"
        out.append(Curves(title, unit, {name: _series(rows, f"val/{name}") for name in names}))
    return out


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    found = [(row["step"], row[name]) for row in rows if is_finite(row.get(name))]
    return [step for step, _ in found], [value for _, value in found]


def median_of(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = _series(rows, name)[1]
    return float(np.median(values)) if values else None


def last_of(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = _series(rows, name)[1]
    return values[-1] if values else None


# ---- pictures ------------------------------------------------------------------------------------------------------
def chart_section(curves: Curves, prefix: str) -> dict[str, Any]:
    """Return a chart as inline SVG with a separate legend (name, text), so that no user's text gets into the SVG."""
    import matplotlib
    from markupsafe import Markup
    from matplotlib.figure import Figure

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": prefix, "text.parse_math": False, "font.size": 10.5}
    series = {name: pair for name, pair in curves.series.items() if len(pair[0])}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.8, 2.6), layout="constrained")
        _draw(figure.add_subplot(), curves, {name: _binned(*pair) for name, pair in series.items()})
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    total = sum(float(np.sum(values)) for _, values in series.values()) or 1.0
    legend = [
        (name, f"{100 * float(np.sum(values)) / total:.0f} %" if curves.stacked else show_number("", values[-1]))
        for name, (_, values) in series.items()
    ]
    svg = Markup(_inline(buffer.getvalue(), prefix, curves.title))  # noqa: S704
    return {"title": curves.title, "svg": svg, "legend": legend, "stacked": curves.stacked}


def scatter_section(scatter: Scatter, prefix: str) -> dict[str, Any]:
    """Return points and their front as inline SVG; the named points are in the legend."""

    def draw(axes: Any) -> None:
        axes.scatter(*zip(*scatter.points), s=9, color=INK, alpha=0.35, linewidths=0)
        axes.plot(*zip(*scatter.front()), drawstyle="steps-post", color=SERIES[0], linewidth=1.6)
        for colour, marker, (x, y, _) in zip(SERIES, "osD^v", scatter.named[:5]):
            axes.plot([x], [y], marker, color=colour, markersize=7)

    legend = [(name, f"{show_number('', x)}, {show_number('', y)}") for x, y, name in scatter.named[:5]]
    return _plain_section(scatter, prefix, draw, legend)


def bars_section(bars: Bars, prefix: str) -> dict[str, Any]:
    """Return bars as inline SVG and their legend; a bar is 0.8 of the smallest distance between two bars wide."""

    def draw(axes: Any) -> None:
        places, heights = (np.array(one) for one in zip(*bars.bars))
        gap = np.diff(np.sort(places)).min() if len(places) > 1 else 1.0
        axes.bar(places, heights, width=0.8 * gap, color=SERIES[0])

    return _plain_section(bars, prefix, draw, bars.legend)


def _plain_section(
    chart: Scatter | Bars, prefix: str, draw: Callable[[Any], None], legend: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """Return a chart with named axes and a grid, drawn by `draw`, as inline SVG."""
    import matplotlib
    from markupsafe import Markup
    from matplotlib.figure import Figure

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": prefix, "text.parse_math": False, "font.size": 10.5}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.8, 2.9), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.set_xlabel(chart.x_name, color=INK)
        axes.set_ylabel(chart.y_name, color=INK)
        axes.tick_params(colors=INK, length=0)
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(GRID)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = Markup(_inline(buffer.getvalue(), prefix, chart.title))  # noqa: S704
    return {"title": chart.title, "svg": svg, "legend": legend, "stacked": False}


def section(chart: Curves | Scatter | Bars, prefix: str) -> dict[str, Any]:
    """Return any chart as a section of a page."""
    if isinstance(chart, Curves):
        return chart_section(chart, prefix)
    return scatter_section(chart, prefix) if isinstance(chart, Scatter) else bars_section(chart, prefix)


def _draw(axes: Any, curves: Curves, binned: Mapping[str, tuple[np.ndarray, ...]]) -> None:
    """Draw the binned series, in stand-in colours, on a bare set of axes."""
    if curves.stacked:
        steps = next(iter(binned.values()))[0]
        axes.stackplot(steps, [mean for _, mean, _, _ in binned.values()], colors=SERIES, linewidth=0, alpha=0.8)
    else:
        for colour, dash, (steps, mean, low, high) in zip(SERIES, DASHES, binned.values()):
            marker = "o" if len(steps) < 40 else ""
            axes.plot(steps, mean, dash, color=colour, linewidth=1.6, marker=marker, markersize=3)
            if (high > low).any():
                axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
    if all(low.min() >= 0 for _, _, low, _ in binned.values()):
        axes.set_ylim(bottom=0)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel(curves.unit, color=INK)
    axes.tick_params(colors=INK, length=0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.margins(x=0.02)
    axes.ticklabel_format(axis="both", style="plain", useOffset=False)


def _inline(svg: str, prefix: str, title: str) -> str:
    """Adapt Matplotlib's SVG to a page: unique ids, CSS colours, the size of its frame, no prologue or global style."""
    from markupsafe import escape

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{prefix}-", svg)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    for stand_in, colour in CSS_COLOURS.items():
        svg = svg.replace(stand_in, colour)
    return svg


def _binned(steps: Sequence[float], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return step, mean, minimum and maximum of at most NUM_BINS consecutive groups of points."""
    num_bins = min(len(steps), NUM_BINS)
    groups = np.array_split(np.asarray(values, dtype=np.float64), num_bins)
    at = np.array([group.mean() for group in np.array_split(np.asarray(steps, dtype=np.float64), num_bins)])
    mean, low, high = (np.array([reduce(group) for group in groups]) for reduce in (np.mean, np.min, np.max))
    return at, mean, low, high


def confusion_section(confusion: Confusion) -> dict[str, Any]:
    counts = np.asarray(confusion.counts, dtype=np.int64)
    num_classes = len(confusion.classes)
    if counts.shape != (num_classes, num_classes):
        raise ValueError(f"confusion {confusion.title!r} has shape {counts.shape} for {num_classes} classes")
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)  # of the samples of the true class, 0-1
    small = num_classes <= MAX_LABELLED_CLASSES
    return {
        "title": confusion.title,
        "classes": confusion.classes,
        "cells": [list(zip(row, part)) for row, part in zip(counts.tolist(), share.tolist())] if small else [],
        "picture": "" if small else _heat_map(share),
        "tables": [table for table in (most_confused(confusion), per_class(confusion)) if table.rows],
    }


def _heat_map(share: np.ndarray) -> str:
    """Return a data URI of a PNG, one pixel per cell; opacity is the root of the share, to suit any background."""
    from PIL import Image

    picture = Image.fromarray(np.round(255 * np.sqrt(share)).astype(np.uint8))
    picture = picture.convert("L").convert("P")
    picture.putpalette([37, 99, 235] * 256)
    return png(picture, bytes(range(256)))


def clip_section(clip: Clip) -> dict[str, Any]:
    from PIL import Image

    picture, num_frames, aspect = "", 1, 1.0
    try:
        raw = base64.b64decode(clip.strip, validate=True)
        with Image.open(io.BytesIO(raw), formats=("JPEG", "PNG")) as image:
            width, height = image.size
            kind = str(image.format).lower()
    except (binascii.Error, OSError, ValueError):
        pass  # the page shows "no picture" and the prediction
    else:
        picture = f"data:image/{kind};base64," + base64.b64encode(raw).decode("ascii")
        num_frames = width // height if width % height == 0 else 1  # frames are square as the network sees them
        aspect = width / height
    predicted = clip.top[0][0] if clip.top else "–"
    return {
        "run": clip.run,
        "picture": picture,
        "num_frames": num_frames,
        "aspect": aspect,
        "truth": clip.truth,
        "right": predicted == clip.truth,
        "top": [(name, 100.0 * probability) for name, probability in clip.top[:3]],
    }
