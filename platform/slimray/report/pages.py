"""Report of a run: one self-contained HTML page to open, mail, print and keep.

In: a run folder (metrics, results.json, card.json, quarantine, job.yaml). Out: the page as a string; the caller writes
it. `render` is the pure core: plain values in, HTML out, all autoescaped, with a content security policy that allows no
script except, on pages with clouds, the one that turns them, identified by its hash. Pictures of points come from
points.py. Surprising: matplotlib draws charts in stand-in colours that become CSS variables, so that one picture suits
dark mode, light mode and paper; and a cloud is a still picture until it is touched, so that a page with a hundred of
them opens at once.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slimray import runs
from slimray.report import searches
from slimray.report.charts import (
    Bars,
    Clip,
    Curves,
    Scatter,
    by_batch,
    clip_section,
    confusion_section,
    last_of,
    median_of,
    section,
    train_curves,
)
from slimray.report.metrics import main_ones, metrics_of, names_in, text_of
from slimray.report.points import box_section, cloud_section
from slimray.report.tables import (
    Confusion,
    Table,
    compare,
    final_numbers,
    key,
    lost,
    percent_text,
    quarantine_table,
    show_number,
    spreads,
    task_tables,
)
from slimray.runs.examples import BoxView, CloudView, Pair, Texts

MAX_ROWS = 20_000  # of each phase; longer records are thinned
MAX_CODEBOOKS = 12  # drawn as bars
MAX_SCENES = 12  # with boxes, of all runs together
TEMPLATE = Path(__file__).with_name("report.html.j2")


def train_report(run: runs.Run) -> str:
    """Return the page of a train run: curves, best and last numbers, confusions, clips, quarantine, how it was made.

    Works for a run in any state; sections whose files do not exist are left out.
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
        "last val loss": show_number("val/loss", last.get("val/loss")),
        "median samples/s": show_number("", median_of(rows, "train/samples_per_s")),
        "epochs": show_number("", last_of(rows, "epoch")),
        "steps whose loss is not finite": show_number("", sum(lost(row.get("train/loss")) for row in rows) or None),
    }
    names = [name for name in {**last, **best} if name not in ("phase", "attempt", "rank")]
    numbers = Table("Final numbers", ("metric", "best", "last"), [(n, best.get(n), last.get(n)) for n in names])
    return _page(run, card, results, headline, [numbers] if names else [], train_curves(rows, results))


def evaluate_report(run: runs.Run) -> str:
    """Return the page of an evaluate run: its runs in one table, the value of frame order, classes, AP, pictures."""
    card, results = runs.read_card(run) or {}, _results(run)
    rows = results.get("rows", [])
    metrics = main_ones(metrics_of(names_in(rows), results))
    headline = {key(row): text_of(one, row.get(one["name"])) for row in rows for one in metrics[:1]}
    tables = [compare(rows, results), *task_tables(rows, results.get("classes", [])), *spreads(rows)] if rows else []
    return _page(run, card, results, headline, tables, by_batch(rows, results))


def shrink_report(run: runs.Run) -> str:
    """Return the page of a shrink run: the scores of the evaluated subnets after each stage."""
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
    one = _metric(metric, results)
    percent = one["unit"] == "%"
    measure = "Percent, 0-100" if percent else one["label"].capitalize()
    note = f"{measure}, of subnets extracted from the supernet and recalibrated, on the validation split."
    table = Table("Subnets by stage", columns, cells, note, frozenset(columns[2:] if percent else ()))
    headline = {name: text_of(one, values[-1]) for name, (_, values) in list(series.items())[:2]}
    headline["archs"] = show_number("", card.get("archs"))
    shown = dict(list(series.items())[:5])
    curves = [Curves(f"{metric} of subnets, stage by stage", one["unit"], shown)] if series else []
    return _page(run, card, {}, headline, [table] if series else [], curves)


def _metric(name: str, results: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the metric of that name, as stored in the run or else defined by its task; percent if neither has it."""
    return next(iter(metrics_of([name], results)), {"name": name, "label": name, "unit": "%"})


def search_report(run: runs.Run) -> str:
    """Return the page of a search run: the subnet found for each target, all trials, the fronts."""
    card, results = runs.read_card(run) or {}, _results(run)
    metric, rows = str(results.get("metric", "top1")), results.get("targets", [])
    asked = [name for name in ("latency_ms", "energy_mj", "peak_kb", "int8_kb") if any(name in row for row in rows)]
    names = ["target", "run", metric, "searched", "params", "macs", "memory_mb", *asked] if rows else []
    one = {"better": "higher", **_metric(metric, results)}
    bars = frozenset({metric, "searched"} if one["unit"] == "%" else ())
    note = _SEARCHED + (" Percent, 0-100." if bars else "")
    found = Table("Found", names, [[row.get(name) for name in names] for row in rows], note, bars)
    drawn = [searches.layers(row, results.get("largest", {})) for row in rows]
    reports = [{"target": target, **one} for target, many in results.get("predictors", {}).items() for one in many]
    columns = list(dict.fromkeys(name for one in reports for name in one))
    told = Table("The predictor", columns, [[one.get(name) for name in columns] for one in reports], _PREDICTED)
    headline = {row["target"]: text_of(one, row.get(metric)) for row in rows}
    headline |= {"tried": show_number("", len(results.get("trials", [])))}
    charts = [searches.history(results, one), *searches.fronts(results, one)]
    return _page(run, card, {}, headline, [found] * bool(rows) + drawn + [told] * bool(reports), charts)


def proxyless_report(run: runs.Run) -> str:
    """Return the page of an architecture search by training: the networks found, the trade-off, the blocks' choices."""
    card, results = runs.read_card(run) or {}, _results(run)
    metric, rows = str(results.get("metric", "top1")), results.get("rows", [])
    unit = "MACs" if results.get("cost") == "macs" else "ms"
    names = ["run", "weight", metric, "cost", "expected_cost", "params", "macs", "blocks"]
    aim = f"Cost in {unit}, target {show_number('', results.get('ref'))}; expected: under the final probabilities."
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
        note = "Probability of each candidate (kernel/expansion, or - for no block), percent, block by block."
        choices.append(Table(f"Choices of {row['run']}", ["block", *codes], cells, note, frozenset(codes), fold=True))
    headline = {row["run"]: percent_text(row.get(metric)) for row in rows}
    return _page(run, card, {}, headline, [found, *choices] if rows else [], [scatter] if len(rows) > 1 else [])


def compress_report(run: runs.Run) -> str:
    """Return the page of a compression: accuracy against size, MACs and latency by step, and the shares by layer."""
    card, results = runs.read_card(run) or {}, _results(run)
    steps, metrics = results.get("steps", []), results.get("metrics", [])
    rows = [one["row"] for one in steps]
    if not rows:
        return _page(run, card, {}, {}, [], [])
    metric = metrics[0]["name"]
    names = ["run", metric, "gain", "weights", "kept", "params", "macs", "bytes", "share", "latency_ms", "speedup"]
    names = [name for name in [*names, "seconds"] if name in ("gain", "share") or name in rows[0]]
    first = rows[0]
    cells = [row | {"gain": row[metric] - first[metric], "share": 100 * row["bytes"] / first["bytes"]} for row in rows]
    table = Table("Steps", names, [[row.get(name) for name in names] for row in cells], _STEPS, frozenset({"share"}))
    layers = list(steps[0]["layers"])
    shares = [
        [name, *(100 * one["layers"][name]["kept"] / one["layers"][name]["weights"]
                 if name in one["layers"] else None for one in steps)]
        for name in layers
    ]  # fmt: skip
    columns = ["layer", *(row["run"] for row in rows)]
    kept = Table("Weights kept, by layer", columns, shares, "Percent of the layer's weights.", frozenset(columns[1:]))
    charts: list[Scatter | Bars] = []
    tables = [table, kept]
    if bits := [one["details"]["bits"] for one in steps if one["details"].get("bits")][-1:]:
        bars = [[name, w, a, 100 * w / 8, 100 * (a or 0) / 8] for name, (w, a) in bits[0].items()]
        header = ["layer", "weights", "inputs", "weights, % of 8 bits", "inputs, % of 8 bits"]
        tables.append(Table("Bits, by layer", header, bars, _BITS, frozenset(header[3:]), fold=len(bars) > 20))
    for one in steps:
        if found := one["details"].get("sensitivity"):
            quantized = one["row"]["step"] == "quantize"
            ratios = list(dict.fromkeys(ratio for name, scores in found.items() if name for ratio in scores))
            lines = [[name, *(scores.get(ratio) for ratio in ratios)] for name, scores in found.items() if name]
            title = f"Sensitivity before {one['row']['run']}"
            note = _ROUNDED if quantized else _SENSITIVITY
            tables.append(Table(title, ["layer", *ratios], lines, note, fold=True))
    for name in ("bytes", "macs", "latency_ms"):
        if len({row.get(name) for row in rows}) > 1 and all(name in row for row in rows):
            points = [(row[name], row[metric]) for row in rows]
            named = [(row[name], row[metric], row["run"]) for row in (rows[-4:] if len(rows) > 5 else rows[1:])]
            named = [(first[name], first[metric], first["run"]), *named]
            charts.append(Scatter(f"{metric} by {name}", name, metric, points, named, metrics[0]["better"]))
    for one in steps:
        if one["details"].get("candidates"):
            table, drawn = _policies(one, metrics[0])
            tables.append(table)
            charts.extend(drawn)
    if "codebooks" in steps[-1]:
        table, drawn = _codebooks(steps[-1])
        tables.append(table)
        charts.extend(drawn)
    last = rows[-1]
    headline = {f"original {metric}": text_of(metrics[0], first.get(metric))}
    headline |= {f"compressed {metric}": text_of(metrics[0], last.get(metric))}
    headline |= {"times smaller": f"{first['bytes'] / max(1, last['bytes']):.1f} x"}
    if "speedup" in last:
        headline["times as fast"] = f"{last['speedup']:.2f} [{last['speedup_low']:.2f}, {last['speedup_high']:.2f}]"
    return _page(run, card, {}, headline, tables, charts)


def _policies(step: Mapping[str, Any], metric: Mapping[str, Any]) -> tuple[Table, list[Scatter]]:
    """Return the policy that a step's search found, the uniform one under the same limits, and all candidates."""
    details, name, run = step["details"], metric["name"], step["row"]["run"]
    costs, even = details["costs"], details["uniform"]
    limited = [cost for cost in details["candidates"][0] if cost in details["limits"]]
    rows = [["found", details["searched"], *(costs.get(cost) for cost in limited)]]
    rows += [["uniform", even[name], *(even["costs"].get(cost) for cost in limited)]]
    rows += [["limit", None, *(details["limits"][cost] for cost in limited)]]
    charts = []
    for cost in limited:
        points = [(one[cost], one[name]) for one in details["candidates"]]
        named = [(costs[cost], details["searched"], "found"), (even["costs"][cost], even[name], "uniform")]
        title = f"{run}: {name} of candidates by {cost}"
        charts.append(Scatter(title, cost, name, points, named, metric["better"]))
    return Table(f"Policies of {run}", ["policy", name, *limited], rows, _JUDGED), charts


def _codebooks(step: Mapping[str, Any]) -> tuple[Table, list[Bars]]:
    """Return the codebooks of the layers as a table, and as bars for the layers with the most weights."""
    shared = next(one["bits"] for one in reversed(step["records"]) if one["step"] == "share")
    books = {name: book for name, book in step["codebooks"].items() if book}
    counts = {name: sum(count for _, count in book) for name, book in books.items()}
    rows = [
        [name, shared[name], 100 * shared[name] / 8, len(book), counts[name], book[0][0], book[-1][0]]
        for name, book in books.items()
    ]
    header = ["layer", "bits", "bits, % of 8", "values", "weights", "least", "greatest"]
    drawn = [
        Bars(f"Codebook of {name}", "value", "weights", books[name], [("values", str(len(books[name])))])
        for name in sorted(books, key=counts.__getitem__, reverse=True)[:MAX_CODEBOOKS]
    ]
    return Table("Codebooks", header, rows, _CODEBOOKS, frozenset(header[2:3]), fold=len(rows) > 20), drawn


def export_report(run: runs.Run) -> str:
    """Return the page of an export run: every format compared with torch, in results and latency."""
    card, results = runs.read_card(run) or {}, _results(run)
    rows, best = results.get("rows", []), str(results.get("best", ""))
    names = ["format", best, "relative", "worst_sample", "max_abs", "agreement", "unoptimised_agreement", "mb", "ms"]
    names += ["eager_ms", "ratio", "ratio_low", "ratio_high", "energy_mj", "energy", "reason"]
    names = [name for name in names if any(name in row for row in rows)]
    note = (
        f"On {results.get('samples')} samples of the validation split: relative difference from torch (L2), percent of "
        "answers with the same class or translation (unoptimised: without graph optimisations). Milliseconds per "
        f"{'frame' if results.get('online') else 'sample'}, and the ratio to eager torch: median and 95 % interval of "
        "alternating pairs. Energy of one, measured if the device reports its power, or modelled (45 nm, to compare). "
        f"On {results.get('cpu')}."
    )
    table = Table("Exports", names, [[_small(name, row.get(name)) for name in names] for row in rows], note)
    states = [[one["input"], one["output"], " x ".join(map(str, one["shape"]))] for one in results.get("states", [])]
    given = Table("States of a step", ("input", "output", "shape"), states, "Zeros before the first frame.", fold=True)
    headline = {row["format"]: f"{row['ratio']:.2f} of torch's time" for row in rows if "ratio" in row}
    return _page(run, card, {}, headline, [table, given])


def _small(name: str, value: Any) -> Any:
    """Return differences as text, because tables would round these small numbers to zero."""
    return f"{value:.1e}" if name in ("relative", "worst_sample", "max_abs") and isinstance(value, float) else value


def _page(
    run: runs.Run,
    card: dict[str, Any],
    results: dict[str, Any],
    headline: Mapping[str, str],
    tables: Sequence[Table],
    curves: Sequence[Curves | Scatter | Bars] = (),
) -> str:
    status = None if card else runs.read_status(run)  # a page is written just before its run is marked finished
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
        texts=[Texts.from_plain(plain) for plain in shown["texts"]],
        clouds=clouds,
        boxes=[BoxView.from_plain(plain) for plain in shown["boxes"]],
        quarantine=runs.read_parts(run, "quarantine", MAX_ROWS),
        facts={name: value for name, value in card.items() if name != "metrics"},
        job=runs.read_file(run, "job.yaml").decode("utf-8", "replace") if runs.exists(run, "job.yaml") else "",
    )


def _examples(results: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return examples by type; results written before examples had types store them under other names."""
    before = {"clip": "clips", "cloud": "clouds", "boxes": "boxes"}
    found: dict[str, list[dict[str, Any]]] = {"pair": [], "texts": []}
    found |= {kind: list(results.get(name, [])) for kind, name in before.items()}
    for one in results.get("examples", []):
        found.setdefault(one["type"], []).append(one)
    return found


def render(
    title: str,
    *,
    subtitle: str = "",
    headline: Mapping[str, str] | None = None,
    curves: Sequence[Curves | Scatter | Bars] = (),
    tables: Sequence[Table] = (),
    confusions: Sequence[Confusion] = (),
    clips: Sequence[Clip] = (),
    pairs: Sequence[Pair] = (),
    texts: Sequence[Texts] = (),
    clouds: Sequence[CloudView] = (),
    boxes: Sequence[BoxView] = (),
    quarantine: Sequence[Mapping[str, Any]] = (),
    facts: Mapping[str, Any] | None = None,
    job: str = "",
) -> str:
    """Return one self-contained HTML page of these sections; empty ones are left out.

    `headline`: a few names with their text, shown large. `boxes`: MAX_SCENES are shown, equally many of each run, with
    the runs' scenes of the same position side by side. `quarantine`: rows with `path` (or `split` and `sample`) and
    `reason`. `facts`: how the run was made; a nested dict is shown on one line. `job`: the resolved YAML. Any text may
    be hostile: it is shown, never run. Raises ValueError for a confusion whose shape does not match its classes, and
    for a cloud or a scene whose arrays do not match.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(show=show_number, percent=percent_text, sha256=_sha256)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        subtitle=subtitle,
        headline={name: text for name, text in (headline or {}).items() if text != "–"},
        charts=[section(chart, f"c{i}") for i, chart in enumerate(curves) if not chart.is_empty],
        tables=[table for table in tables if table.rows],
        confusions=[confusion_section(confusion) for confusion in confusions],
        clips=[clip_section(clip) for clip in clips],
        pairs=[pair for pair in pairs if pair.pictures],
        texts=[one for one in texts if one.texts],
        clouds=[cloud_section(cloud) for cloud in clouds if len(cloud.coords)],
        scenes=[box_section(scene) for scene in _first_of_each(boxes)[:MAX_SCENES]],
        num_scenes=len(boxes),
        quarantine=quarantine_table(quarantine),
        facts=[(name, show_number(name, value)) for name, value in (facts or {}).items() if value is not None],
        job=job,
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # a file name may hold bytes that are not text


_SEARCHED = "Searched: on samples held out of training; the other score: on the final split, computed once."
_STEPS = (
    "Bytes: size of the file with the weights. Speedup: median ratio to the original, timed alternately on this "
    "machine; above 1 is faster. Zeros make a file smaller, but not a dense kernel faster."
)
_SENSITIVITY = "The metric (a loss negated) with only this layer pruned to the share in the heading."
_JUDGED = (
    "On the samples that score policies, before any fine-tuning. Pruning under a latency limit: the latency of the "
    "policy found is measured, the others are predicted."
)
_CODEBOOKS = f"Without zero. Drawn for the layers with the most weights, at most {MAX_CODEBOOKS} of them."
_BITS = "Layers that are not listed stay float, and so do inputs without a number."
_ROUNDED = "With only this layer quantized: loss in points of the metric, the metric, megabytes saved."
_PREDICTED = "Held-out error (in units of the metric) and rank correlation, and the same on the trials measured next."


def _first_of_each(scenes: Sequence[BoxView]) -> list[BoxView]:
    """Return the first scene of each run, then the second of each, and so on."""
    turn = [sum(before.run == scene.run for before in scenes[:i]) for i, scene in enumerate(scenes)]
    return [scenes[i] for i in sorted(range(len(scenes)), key=turn.__getitem__)]


def _sha256(text: str) -> str:
    """Return the hash of an inline script in the form of a content security policy."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def _results(run: runs.Run) -> dict[str, Any]:
    return json.loads(runs.read_file(run, "results.json")) if runs.exists(run, "results.json") else {}
