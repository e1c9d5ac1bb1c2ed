"""The report of a run: one HTML page that needs nothing but itself, to open, mail, print and keep.

In: a run folder (metrics, results.json, card.json, quarantine, job.yaml). Out: the page as a string; the caller writes
it. `render` is the pure core: plain values in, HTML out, all of it autoescaped, and a content security policy that
lets no script run but the one that turns clouds, by its hash, where there are clouds. Pictures of points come from
report_points.py. Surprising: matplotlib draws charts in stand-in colours that become CSS variables, so that one picture
is right in dark, in light and on paper; and a cloud is a still picture until somebody touches it, so that a page of a
hundred opens at once.
"""

import base64
import binascii
import hashlib
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from slimray import runs
from slimray.report.metrics import best_of, main_ones, metrics_of, names_in, text_of
from slimray.report.points import box_section, cloud_section, png
from slimray.runs.examples import BoxView, CloudView, Pair

MAX_LABELLED_CLASSES = 40
NOTHING: Mapping[str, Any] = {}
MAX_QUARANTINE_ROWS = 500
MAX_ROWS = 20_000  # of each phase; longer records are thinned
NUM_BINS = 300
MAX_SCENES = 12  # with boxes, of all runs together
TEMPLATE = Path(__file__).with_name("report.html.j2")
INK, GRID = "#010101", "#020202"
SERIES = ("#030301", "#030302", "#030303", "#030304", "#030305")
CSS_COLOURS = {INK: "var(--soft)", GRID: "var(--line)", **{c: f"var(--series-{i})" for i, c in enumerate(SERIES, 1)}}
DASHES = ("-", "--", ":", "-.", "-")


@dataclass(frozen=True)
class Table:
    """Rows under a title; columns named in `bars` hold percent (0-100) and get bars, long ones if `chart`.

    `fold` starts it closed.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""
    bars: frozenset[str] = frozenset()
    fold: bool = False
    chart: bool = False


@dataclass(frozen=True)
class Curves:
    """Up to five series over steps in one chart: name -> (steps [N], values [N]); `stacked` ones share their steps."""

    title: str
    unit: str
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    stacked: bool = False


@dataclass(frozen=True)
class Scatter:
    """Points (x, y), those that no other beats joined by a line (x low, y high), and some by name: (x, y, name)."""

    title: str
    x_name: str
    y_name: str
    points: Sequence[tuple[float, float]]
    named: Sequence[tuple[float, float, str]] = ()

    def front(self) -> list[tuple[float, float]]:
        """The points that no other beats, x rising."""
        out: list[tuple[float, float]] = []
        for x, y in sorted(self.points, key=lambda point: (point[0], -point[1])):
            if not out or y > out[-1][1]:
                out.append((x, y))
        return out


@dataclass(frozen=True)
class Confusion:
    """Counts of a validation: `counts[truth][predicted]`, a square of as many rows as `classes`."""

    title: str
    classes: Sequence[str]
    counts: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Clip:
    """One clip as it was judged.

    `strip` is a base64 JPEG or PNG of its frames side by side; square frames are also played one after the other.
    `top` holds (class, probability 0-1), the likeliest first, of which three are shown.
    """

    run: str
    strip: str
    truth: str
    top: Sequence[tuple[str, float]] = field(default_factory=tuple)


def train_report(run: runs.Run) -> str:
    """Return the page of a train run: curves, best and last numbers, confusions, clips, quarantine, how it was made.

    Works on a run of any state, as far as it got; a file that is not there leaves its section out.
    """
    rows = sorted(runs.read_parts(run, "metrics", MAX_ROWS), key=lambda row: row.get("step", 0))
    card, results = runs.read_card(run) or {}, _results(run)
    final = final_numbers(rows, card, results)
    best, last = final["best"], final["last"]
    metrics = main_ones(metrics_of(names_in([best, last]), results))
    headline: dict[str, str] = {}
    for metric in metrics[:1]:
        headline |= {f"best {metric['label']}": text_of(metric, best.get(f"val/{metric['name']}"))}
        headline |= {f"last {metric['label']}": text_of(metric, last.get(f"val/{metric['name']}"))}
    headline |= {f"best {one['label']}": text_of(one, best.get(f"val/{one['name']}")) for one in metrics[1:3]}
    headline |= {
        "last val loss": _show("val/loss", last.get("val/loss")),
        "median samples/s": _show("", _median(rows, "train/samples_per_s")),
        "epochs": _show("", _last(rows, "epoch")),
        "steps whose loss is not finite": _show("", sum(_lost(row.get("train/loss")) for row in rows) or None),
    }
    names = [name for name in {**last, **best} if name not in ("phase", "attempt", "rank")]
    numbers = Table("Final numbers", ("metric", "best", "last"), [(n, best.get(n), last.get(n)) for n in names])
    return _page(run, card, results, headline, [numbers] if names else [], train_curves(rows, results))


def evaluate_report(run: runs.Run) -> str:
    """Return the page of an evaluate run: its runs in one table, what order is worth, classes, AP, pictures."""
    card, results = runs.read_card(run) or {}, _results(run)
    rows = results.get("rows", [])
    metrics = main_ones(metrics_of(names_in(rows), results))
    headline = {_key(row): text_of(one, row.get(one["name"])) for row in rows for one in metrics[:1]}
    tables = [compare(rows, results), *task_tables(rows, results.get("classes", [])), *spreads(rows)] if rows else []
    return _page(run, card, results, headline, tables, by_batch(rows, results))


def by_batch(rows: Sequence[Mapping[str, Any]], results: Mapping[str, Any] = NOTHING) -> list[Curves]:
    """The first metric by global batch, a curve for each rule of the learning rate; nothing for a single batch.

    Runs whose rate grows with the batch (the same rate per sample) are one curve, those of one fixed rate another.
    """
    known = [row for row in rows if row.get("peak_lr") and row.get("variant", "natural") == "natural"]
    if len({row["batch"] for row in known}) < 2:
        return []
    found = main_ones(metrics_of(known[0], results))
    metric, unit = (found[0]["name"], found[0]["unit"]) if found else (None, "")
    rules: dict[str, list[Mapping[str, Any]]] = {}
    for row in known:
        rules.setdefault(f"rate {1000 * row['peak_lr'] / row['batch']:.3g} per 1,000 of a batch", []).append(row)
        rules.setdefault(f"rate {row['peak_lr']:.3g} whatever the batch", []).append(row)
    series = {}
    for name, chosen in rules.items():
        chosen = sorted(chosen, key=lambda row: row["batch"])
        if metric and len({row["batch"] for row in chosen}) > 1:
            series[name] = ([math.log2(row["batch"]) for row in chosen], [row[metric] for row in chosen])
    return [Curves(f"{metric} by global batch (log2)", unit, series)] if series else []


def shrink_report(run: runs.Run) -> str:
    """Return the page of a shrink run: what each stage did to the subnets that are judged after it."""
    card, results = runs.read_card(run) or {}, _results(run)
    stages, metric = results.get("stages", []), str(results.get("metric", "top1"))
    names = [row["subnet"] for row in stages[0]["rows"]] if stages else []
    series = {
        name: (list(range(len(stages))), [stage["rows"][number][metric] for stage in stages])
        for number, name in enumerate(names)
    }
    cells = [
        [name, stages[0]["rows"][number].get("params"), *values]
        for number, (name, (_, values)) in enumerate(series.items())
    ]
    columns = ["subnet", "params", *(f"{metric} after {stage['stage']}" for stage in stages)]
    note = "Percent, 0-100, of subnets cut out of the supernet and re-calibrated, on the validation split."
    table = Table("What shrinking did", columns, cells, note, frozenset(columns[2:]))
    headline = {name: _percent(values[-1]) for name, (_, values) in list(series.items())[:2]}
    headline["archs"] = _show("", card.get("archs"))
    shown = dict(list(series.items())[:5])
    curves = [Curves(f"{metric} of subnets, stage by stage", "%", shown)] if series else []
    return _page(run, card, {}, headline, [table] if series else [], curves)


def search_report(run: runs.Run) -> str:
    """Return the page of a search run: what was found for each target, all that was tried, the fronts."""
    card, results = runs.read_card(run) or {}, _results(run)
    metric, rows = str(results.get("metric", "top1")), results.get("targets", [])
    names = [name for name in ("target", "run", metric, "searched", "params", "macs", "memory_mb") if rows]
    found = Table(
        "Found", names, [[row.get(name) for name in names] for row in rows], _SEARCHED, frozenset({metric, "searched"})
    )
    trials, scatters = results.get("trials", []), []
    for name in ("macs", "params", "memory_mb") if trials else ():
        chosen = [(row[name], row["searched"], row["target"]) for row in rows]
        scatters.append(Scatter(f"{metric} by {name}", name, metric, [(t[name], t["metric"]) for t in trials], chosen))
    reports = [{"target": target, **one} for target, many in results.get("predictors", {}).items() for one in many]
    columns = list(dict.fromkeys(name for one in reports for name in one))
    told = Table("The predictor", columns, [[one.get(name) for name in columns] for one in reports], _PREDICTED)
    headline = {row["target"]: _percent(row.get(metric)) for row in rows} | {"tried": _show("", len(trials))}
    return _page(run, card, {}, headline, [found] * bool(rows) + [told] * bool(reports), scatters)


def proxyless_report(run: runs.Run) -> str:
    """Return the page of an architecture search by training: what was found, the trade-off, what blocks chose."""
    card, results = runs.read_card(run) or {}, _results(run)
    metric, rows = str(results.get("metric", "top1")), results.get("rows", [])
    unit = "MACs" if results.get("cost") == "macs" else "ms"
    names = ["run", "weight", metric, "cost", "expected_cost", "params", "macs", "blocks"]
    aim = f"Cost in {unit}, {_show('', results.get('ref'))} aimed at; expected: under the final probabilities."
    found = Table("Found", names, [[row.get(name) for name in names] for row in rows], aim, frozenset({metric}))
    points = [(row["cost"], row[metric], f"{row['weight']:g}") for row in rows]
    scatter = Scatter(f"{metric} by cost", f"cost [{unit}]", metric, [point[:2] for point in points], points)
    choices = []
    for row in rows:
        codes = list(dict.fromkeys(code for block in row["choices"] for code in block))
        cells = [
            [number, *(100 * block[code] if code in block else "" for code in codes)]
            for number, block in enumerate(row["choices"], 1)
        ]
        note = "Probability of each candidate, kernel/expansion or - for nothing, percent, block by block."
        choices.append(Table(f"Choices of {row['run']}", ["block", *codes], cells, note, frozenset(codes), fold=True))
    headline = {row["run"]: _percent(row.get(metric)) for row in rows}
    return _page(run, card, {}, headline, [found, *choices] if rows else [], [scatter] if len(rows) > 1 else [])


def _page(
    run: runs.Run,
    card: dict[str, Any],
    results: dict[str, Any],
    headline: Mapping[str, str],
    tables: Sequence[Table],
    curves: Sequence[Curves | Scatter],
) -> str:
    status = None if card else runs.read_status(run)  # a page is written just before its run is called finished
    state = ["finished"] if card else [status.state, status.message] if status else []
    confusions = [Confusion(key, results.get("classes", []), m) for key, m in results.get("confusion", {}).items() if m]
    shown = _examples(results)
    clips = [
        Clip(c.get("run", ""), c.get("frames_jpeg_base64", ""), c["truth"], [(n, p) for n, p in c["top"]])
        for c in shown["clip"]
    ]
    clouds = [CloudView.from_plain(plain, results.get("classes", [])) for plain in shown["cloud"]]
    return render(
        run.name,
        subtitle=" · ".join(filter(None, [*state, run.uri])),
        headline=headline,
        curves=curves,
        tables=tables,
        confusions=confusions,
        clips=clips,
        pairs=[Pair.from_plain(plain) for plain in shown["pair"]],
        clouds=clouds,
        boxes=[BoxView.from_plain(plain) for plain in shown["boxes"]],
        quarantine=runs.read_parts(run, "quarantine", MAX_ROWS),
        facts={name: value for name, value in card.items() if name != "metrics"},
        job=runs.read_file(run, "job.yaml").decode("utf-8", "replace") if runs.exists(run, "job.yaml") else "",
    )


def _examples(results: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Examples by type; results written before examples had types hold them under other names."""
    before = {"clip": "clips", "cloud": "clouds", "boxes": "boxes"}
    found: dict[str, list[dict[str, Any]]] = {"pair": []}
    found |= {kind: list(results.get(name, [])) for kind, name in before.items()}
    for one in results.get("examples", []):
        found.setdefault(one["type"], []).append(one)
    return found


def render(
    title: str,
    *,
    subtitle: str = "",
    headline: Mapping[str, str] | None = None,
    curves: Sequence[Curves | Scatter] = (),
    tables: Sequence[Table] = (),
    confusions: Sequence[Confusion] = (),
    clips: Sequence[Clip] = (),
    pairs: Sequence[Pair] = (),
    clouds: Sequence[CloudView] = (),
    boxes: Sequence[BoxView] = (),
    quarantine: Sequence[Mapping[str, Any]] = (),
    facts: Mapping[str, Any] | None = None,
    job: str = "",
) -> str:
    """Return one self-contained HTML page of these sections; an empty one is left out.

    `headline`: a few names and ready text, shown large. `boxes`: MAX_SCENES are shown, of each run as many, scenes of
    the same place in their runs side by side. `quarantine`: rows with `path` (or `split` and `sample`) and
    `reason`. `facts`: how the run was made, a nested dict is shown on one line. `job`: the resolved YAML. Any text may
    be hostile: it is shown, never run. Raises ValueError for a confusion that is no square of its classes, and a cloud
    or a scene whose arrays do not fit each other.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(show=_show, percent=_percent, sha256=_sha256)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        subtitle=subtitle,
        headline={name: text for name, text in (headline or {}).items() if text != "–"},
        charts=[
            _scatter(chart, f"c{i}") if isinstance(chart, Scatter) else _chart(chart, f"c{i}")
            for i, chart in enumerate(curves)
            if (chart.points if isinstance(chart, Scatter) else any(len(s) for s, _ in chart.series.values()))
        ],
        tables=[table for table in tables if table.rows],
        confusions=[_confusion_section(confusion) for confusion in confusions],
        clips=[_clip_section(clip) for clip in clips],
        pairs=[pair for pair in pairs if pair.pictures],
        clouds=[cloud_section(cloud) for cloud in clouds if len(cloud.coords)],
        scenes=[box_section(scene) for scene in _first_of_each(boxes)[:MAX_SCENES]],
        num_scenes=len(boxes),
        quarantine=_quarantine_table(quarantine),
        facts=[(name, _show(name, value)) for name, value in (facts or {}).items() if value is not None],
        job=job,
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # a file name may hold bytes that are no text


_SEARCHED = "Percent, 0-100: searched on samples held out of training, the other on the split for the end, scored once."
_PREDICTED = "Held-out error (in units of the metric) and rank correlation, and how it fared on what was measured next."

# ---- numbers -------------------------------------------------------------------------------------------------------


def final_numbers(
    rows: Sequence[Mapping[str, Any]], card: Mapping[str, Any], results: Mapping[str, Any] = NOTHING
) -> dict[str, dict[str, Any]]:
    """Return {"best": ..., "last": ...}: as the card says, else the val rows of the best first metric and the last."""
    written, best, last = card.get("metrics", {}), {}, {}
    for metric in metrics_of(names_in(rows), results)[:1]:
        best = best_of(rows, metric)
        last = next((row for row in reversed(rows) if _finite(row.get(f"val/{metric['name']}"))), {})
    return {"best": dict(written.get("best") or best), "last": dict(written.get("last") or last)}


def train_curves(rows: Sequence[Mapping[str, Any]], results: Mapping[str, Any] = NOTHING) -> list[Curves]:
    """Return the charts of a training from its metric rows, which are sorted by step."""

    def lines(title: str, unit: str, **names: str) -> Curves:
        return Curves(title, unit, {label: _series(rows, name) for label, name in names.items()})

    split = {
        "data wait": "data/wait_s",
        "transfer": "time/transfer_s",
        "compute": "time/compute_s",
        "communication": "time/communication_s",
    }
    timed = [row for row in rows if any(_finite(row.get(name)) for name in split.values())]
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
    """A chart for the metrics of each unit."""
    metrics = main_ones(metrics_of(names_in(rows), results))
    out = []
    for unit in dict.fromkeys(metric["unit"] for metric in metrics):
        names = [metric["name"] for metric in metrics if metric["unit"] == unit][:5]
        title = "Validation accuracy" if unit == "%" else f"Validation: {', '.join(names)}"
        out.append(Curves(title, unit, {name: _series(rows, f"val/{name}") for name in names}))
    return out


def compare(rows: Sequence[Mapping[str, Any]], results: Mapping[str, Any] = NOTHING) -> Table:
    """Return the rows of an evaluation side by side; shares of samples with their 95 % Wilson interval."""
    metrics = main_ones(metrics_of(names_in(rows), results))
    known = [
        "run",
        "variant",
        *(metric["name"] for metric in metrics),
        "chance",
        "num_samples",
        "params",
        "macs",
    ]
    columns = [name for name in known if any(name in row for row in rows)]
    columns += sorted(
        {name for row in rows for name, value in row.items() if not isinstance(value, list | dict)} - {*known}
    )
    cells = [[row.get(name) for name in columns] for row in rows]
    units = dict.fromkeys(metric["unit"] for metric in metrics)
    note = "Percent, 0-100." if "%" in units else ""
    for name in [metric["name"] for metric in metrics if metric["share"] and "num_samples" in columns]:
        note += " The interval (Wilson) counts every sample as independent; clips of one scene are not."
        at = columns.index(name) + 1
        for row, line in zip(rows, cells):
            line.insert(at, _interval(row.get(name), row.get("num_samples")))
        columns.insert(at, "95 % interval")
    bars = frozenset(metric["name"] for metric in metrics if metric["unit"] == "%")
    return Table("Side by side", columns, cells, note, bars)


def task_tables(rows: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> list[Table]:
    """Return the tables that tasks have for the rows of an evaluation, beside their comparison."""
    from slimray.tasks import TASKS  # torch, which other pages do without

    made = {table.title: table for task in TASKS.values() for table in task.tables(rows, classes)}
    return [
        Table(one.title, one.header, one.rows, one.note, frozenset(one.bars), one.fold, one.chart)
        for one in made.values()
    ]


def spreads(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Return a table of how far the numbers of the rows with `repeats` (name -> `mean`, `std`, `max`) lie apart."""
    cells = [
        (_key(row), name, numbers["mean"], numbers["std"], numbers["max"])
        for row in rows
        for name, numbers in ({**row["repeats"], **row.get("ap", {})} if row.get("repeats") else {}).items()
    ]
    header = ("run", "number", "mean", "deviation", "largest")
    note = "Each repeat is a pass over the split with other random draws."
    return [Table("Over repeats", header, cells, note, fold=len(cells) > 12)] if cells else []


def per_class(confusion: Confusion) -> Table:
    """Return samples, accuracy and the class most often taken for it, for each class, the weakest first."""
    counts = np.asarray(confusion.counts, dtype=np.int64)  # [truth, predicted]
    wrong = counts - np.diag(np.diag(counts))
    rows = []
    for index, name in enumerate(confusion.classes):
        num_samples = int(counts[index].sum())
        accuracy = 100.0 * float(counts[index, index]) / num_samples if num_samples else None
        taken = int(wrong[index].argmax())
        rival = f"{confusion.classes[taken]} ({wrong[index, taken]})" if wrong[index, taken] else "–"
        rows.append((name, num_samples, accuracy, rival))
    rows.sort(key=lambda row: math.inf if row[2] is None else row[2])
    header = ("class", "samples", "accuracy", "most often taken for")
    return Table("Accuracy per class", header, rows, bars=frozenset({"accuracy"}), fold=len(rows) > 20)


def most_confused(confusion: Confusion, num_pairs: int = 10) -> Table:
    """Return the `num_pairs` largest off-diagonal cells: truth, predicted, count, percent of the truth's samples."""
    counts = np.asarray(confusion.counts, dtype=np.int64)
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:num_pairs]
    cells = [(int(at) // len(wrong), int(at) % len(wrong)) for at in order]
    rows = [
        (
            confusion.classes[t],
            confusion.classes[p],
            int(wrong[t, p]),
            100.0 * float(wrong[t, p]) / int(counts[t].sum()),
        )
        for t, p in cells
        if wrong[t, p]
    ]
    header = ("truth", "predicted", "samples", "share of truth")
    return Table("Most confused", header, rows, bars=frozenset({"share of truth"}))


def _interval(percent: float | None, num_samples: int | None) -> str:
    """The 95 % Wilson score interval of a share of `num_samples`, in percent."""
    if not num_samples or not _finite(percent):
        return "–"
    z, p = 1.96, percent / 100.0
    centre = (p + z * z / (2 * num_samples)) / (1 + z * z / num_samples)
    half = z * math.sqrt(p * (1 - p) / num_samples + z * z / (4 * num_samples**2)) / (1 + z * z / num_samples)
    return f"{100 * max(0.0, centre - half):.1f} – {100 * min(1.0, centre + half):.1f}"


def _finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _lost(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    found = [(row["step"], row[name]) for row in rows if _finite(row.get(name))]
    return [step for step, _ in found], [value for _, value in found]


def _median(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = _series(rows, name)[1]
    return float(np.median(values)) if values else None


def _last(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = _series(rows, name)[1]
    return values[-1] if values else None


# ---- pictures ------------------------------------------------------------------------------------------------------


def _chart(curves: Curves, prefix: str) -> dict[str, Any]:
    """A chart as inline SVG with its legend (name, text) apart, so that no text of a user gets into the SVG."""
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
        (name, f"{100 * float(np.sum(values)) / total:.0f} %" if curves.stacked else _show("", values[-1]))
        for name, (_, values) in series.items()
    ]
    svg = Markup(_inline(buffer.getvalue(), prefix, curves.title))  # noqa: S704
    return {"title": curves.title, "svg": svg, "legend": legend, "stacked": curves.stacked}


def _scatter(scatter: Scatter, prefix: str) -> dict[str, Any]:
    """Points and their front as inline SVG; the named points are in the legend."""
    import matplotlib
    from markupsafe import Markup
    from matplotlib.figure import Figure

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": prefix, "text.parse_math": False, "font.size": 10.5}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.8, 2.9), layout="constrained")
        axes = figure.add_subplot()
        axes.scatter(*zip(*scatter.points), s=9, color=INK, alpha=0.35, linewidths=0)
        axes.plot(*zip(*scatter.front()), drawstyle="steps-post", color=SERIES[0], linewidth=1.6)
        for colour, marker, (x, y, _) in zip(SERIES, "osD^v", scatter.named[:5]):
            axes.plot([x], [y], marker, color=colour, markersize=7)
        axes.set_xlabel(scatter.x_name, color=INK)
        axes.set_ylabel(scatter.y_name, color=INK)
        axes.tick_params(colors=INK, length=0)
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(GRID)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    legend = [(name, f"{_show('', x)}, {_show('', y)}") for x, y, name in scatter.named[:5]]
    svg = Markup(_inline(buffer.getvalue(), prefix, scatter.title))  # noqa: S704
    return {"title": scatter.title, "svg": svg, "legend": legend, "stacked": False}


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
    """Matplotlib's SVG made fit for a page: own ids, CSS colours, size of its frame, no prologue or global style."""
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
    """Step, mean, minimum and maximum of at most NUM_BINS consecutive groups of points."""
    num_bins = min(len(steps), NUM_BINS)
    groups = np.array_split(np.asarray(values, dtype=np.float64), num_bins)
    at = np.array([group.mean() for group in np.array_split(np.asarray(steps, dtype=np.float64), num_bins)])
    mean, low, high = (np.array([reduce(group) for group in groups]) for reduce in (np.mean, np.min, np.max))
    return at, mean, low, high


def _confusion_section(confusion: Confusion) -> dict[str, Any]:
    counts = np.asarray(confusion.counts, dtype=np.int64)
    num_classes = len(confusion.classes)
    if counts.shape != (num_classes, num_classes):
        raise ValueError(f"confusion {confusion.title!r} has shape {counts.shape} for {num_classes} classes")
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)  # of the truth's samples, 0-1
    small = num_classes <= MAX_LABELLED_CLASSES
    return {
        "title": confusion.title,
        "classes": confusion.classes,
        "cells": [list(zip(row, part)) for row, part in zip(counts.tolist(), share.tolist())] if small else [],
        "picture": "" if small else _heat_map(share),
        "tables": [table for table in (most_confused(confusion), per_class(confusion)) if table.rows],
    }


def _heat_map(share: np.ndarray) -> str:
    """A data URI of a PNG, one pixel a cell, whose opacity is the root of the share: it fits any background."""
    from PIL import Image

    picture = Image.fromarray(np.round(255 * np.sqrt(share)).astype(np.uint8))
    picture = picture.convert("L").convert("P")
    picture.putpalette([37, 99, 235] * 256)
    return png(picture, bytes(range(256)))


def _clip_section(clip: Clip) -> dict[str, Any]:
    from PIL import Image

    picture, num_frames, aspect = "", 1, 1.0
    try:
        raw = base64.b64decode(clip.strip, validate=True)
        with Image.open(io.BytesIO(raw), formats=("JPEG", "PNG")) as image:
            width, height = image.size
            kind = str(image.format).lower()
    except (binascii.Error, OSError, ValueError):
        pass  # the page says "no picture"; a clip without one is still worth its prediction
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


def _first_of_each(scenes: Sequence[BoxView]) -> list[BoxView]:
    """The first scene of each run, then the second of each, and so on."""
    turn = [sum(before.run == scene.run for before in scenes[:i]) for i, scene in enumerate(scenes)]
    return [scenes[i] for i in sorted(range(len(scenes)), key=turn.__getitem__)]


def _quarantine_table(rows: Sequence[Mapping[str, Any]]) -> Table | None:
    """The quarantined files, each once however many attempts and epochs met it; None if there are none."""
    once = list({tuple(row.get(name) for name in ("path", "split", "sample")): row for row in rows}.values())
    if not once:
        return None
    columns = [name for name in ("path", "split", "sample", "epoch", "reason") if any(name in row for row in once)]
    cells = [[row.get(name) for name in columns] for row in once[:MAX_QUARANTINE_ROWS]]
    note = "" if len(cells) == len(once) else f"The first {len(cells)}; the run's quarantine folder has all."
    return Table(f"Quarantined files: {len(once):,}", columns, cells, note, fold=len(once) > 20)


# ---- text and files ------------------------------------------------------------------------------------------------


def _show(name: str, value: Any) -> str:
    """A value as text: large counts short (24.3 M), floats to four digits, a dict on one line, nothing as a dash."""
    if value is None or value == "" or value == {}:
        return "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_show(str(key), inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_show(name, inner) for inner in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value):
        return "not finite"
    if name.rsplit("/", 1)[-1] in ("params", "macs") and value >= 1000:
        power = min(int(math.log10(value) // 3), 4)
        return f"{value / 1000**power:.3g} {' kMGT'[power]}"
    if isinstance(value, int) or abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _sha256(text: str) -> str:
    """The hash of an inline script as a content security policy names it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def _percent(value: Any) -> str:
    return f"{value:.1f} %" if _finite(value) else "–"


def _key(row: Mapping[str, Any]) -> str:
    return " · ".join(str(row[name]) for name in ("run", "variant") if row.get(name))


def _results(run: runs.Run) -> dict[str, Any]:
    return json.loads(runs.read_file(run, "results.json")) if runs.exists(run, "results.json") else {}
