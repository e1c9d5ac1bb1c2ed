"""What the dashboard's pages show: plain values in, Dash components out; nothing is read and nothing is kept here.

In: a row per run and a `Look` at one of them (dashboard_watch.py). Out: lists of components for dashboard.py. Charts
come from the same `Curves` as the report's. Surprising: parallel coordinates are plain lines in SVG, as Plotly's own
trace compiles code in the browser (which the content security policy forbids) and needs WebGL; they are narrowed down
by links, as is the table, so that the address says all that one sees and the keyboard reaches it.
"""

import html as text_of
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
from dash import dcc, html

from slimray.arch import Arch
from slimray.report import pages
from slimray.report.dashboard.watch import Look
from slimray.spec import UserError
from slimray.train import health

MAX_ROWS = 500  # runs on a page; the filter finds the others
MAX_QUARANTINE_ROWS = 200
MAX_POINTS = 800  # of a curve
MAX_SUBNETS = 12
MAX_TEXT = 120
BEST_TRIALS = 12
MAX_LINES = 3000  # trials drawn
STATES = ("running", "finished", "failed", "stopped", "queued", "damaged", "reading")
COLUMNS = {"name": False, "kind": False, "state": False, "result": True, "updated": True}  # -> whether high comes first
COLOURS = ("#3b82f6", "#e08a1e", "#16a37a", "#c25bd0", "#e0484f", "#7c8ba1", "#0fa3b1", "#b08900")
RAMP = ("#6b7280", "#5873a8", "#3b82f6", "#16a37a", "#d99a00", "#e0484f")  # of trials, from poor to best
SHARES = {"all": 1.0, "half": 0.5, "tenth": 0.1}  # of the trials, the best, that are drawn
COST_NAMES = {"params": "parameters", "macs": "MACs", "memory_mb": "memory, MB", "latency_ms": "latency, ms"}

Query = Mapping[str, str]


# ---- pages -----------------------------------------------------------------------------------------------------------


def runs_page(rows: Sequence[Mapping[str, Any]], query: Query, words: str, where: str) -> list[Any]:
    """The table of runs: those of `state=`, ordered by `sort=`, in whose text are all `words`; `compare=` is picked."""
    if not rows:
        return [html.H1("Runs"), html.P(f"No runs in {where} yet: they appear here once `slimray run` has begun one.")]
    counts = {state: sum(row["state"] == state for row in rows) for state in STATES}
    chosen = query.get("state", "")
    states = [_link("/", query, {"state": ""}, f"all {len(rows)}", not chosen)]
    states += [
        _link("/", query, {"state": state}, f"{state} {count}", chosen == state)
        for state, count in counts.items()
        if count
    ]
    wanted = words.casefold().split()
    shown = [row for row in rows if not chosen or row["state"] == chosen]
    shown = [row for row in shown if all(word in _haystack(row) for word in wanted)]
    sort = query.get("sort") if query.get("sort") in COLUMNS else "updated"
    shown = sorted(shown, key=lambda row: row["name"])
    shown.sort(key=lambda row: _sort_key(row, str(sort)), reverse=COLUMNS[str(sort)])
    picked = _picked(query)
    out: list[Any] = [html.H1("Runs"), html.Nav(states, className="pills", **_named("aria-label", "states"))]
    compared: list[Any] = []
    if picked:
        to = "/compare?" + urlencode({"runs": ",".join(picked)})
        compared = [dcc.Link(f"Compare {len(picked)} run{'s' if len(picked) > 1 else ''}", href=to, className="action")]
        compared += [html.Span(_cut(name), className="tag") for name in picked]
        compared.append(dcc.Link("clear", href=_href("/", query, {"compare": ""})))
    out.append(html.P(_spaced(compared), className="picked"))  # also an empty one: the rest then keeps its place
    heads = [
        html.Th(
            dcc.Link(name, href=_href("/", query, {"sort": name})),
            scope="col",
            **(_named("aria-sort", "descending" if COLUMNS[name] else "ascending") if name == sort else {}),
        )
        for name in COLUMNS
    ]
    heads += [html.Th("message", scope="col"), html.Th("compare", scope="col")]
    body = [_run_row(row, picked, query) for row in shown[:MAX_ROWS]]
    table = html.Table([html.Thead(html.Tr(heads)), html.Tbody(body)], className="runs")
    out.append(html.Div(table, className="scroll"))
    if not shown:
        out.append(html.P("No run fits: clear the filter, or choose another state."))
    if len(shown) > MAX_ROWS:
        out.append(
            html.P(f"The first {MAX_ROWS} of {len(shown):,} runs: the filter finds the others.", className="soft")
        )
    return out


def run_page(look: Look, query: Query) -> list[Any]:
    """One run: its numbers and charts, or with `view=` its report, or its job as it was resolved."""
    name, view = str(look.row["name"]), query.get("view", "")
    at = f"/run/{quote(name, safe='')}"
    views = [_link(at, {}, {}, "overview", view not in ("report", "job"))]
    if look.has_report:
        views.append(_link(at, {}, {"view": "report"}, "report: pictures, clips, clouds", view == "report"))
    views.append(_link(at, {}, {"view": "job"}, "job", view == "job"))
    facts = [_state(look.row["state"]), str(look.row.get("kind") or ""), _when(look.row.get("updated"))]
    out: list[Any] = [
        html.H1(name),
        html.P(_spaced(one for one in facts if one), className="facts"),
        html.P(look.row.get("message"), className="message") if look.row.get("message") else None,
        html.P(look.row.get("uri"), className="soft uri"),
        html.Nav(views, className="pills", **_named("aria-label", "views")),
    ]
    if look.row["state"] == "reading":
        return [one for one in (*out, html.P("The storage is being read…", className="soft")) if one is not None]
    out += [html.P(f"Not shown: {problem}", className="problem") for problem in look.problems]
    if view == "report" and look.has_report:
        source = f"/report/{quote(name, safe='')}"
        out.append(html.P(html.A("open it on its own", href=source, target="_blank", rel="noopener noreferrer")))
        out.append(html.Iframe(src=source, title="report of the run", sandbox="allow-scripts", className="report"))
    elif view == "job":
        out += [html.Pre(look.job_text or "There is no job.yaml.", tabIndex="0"), _facts_table(look.card)]
    else:
        for section in (_headline, _curves, _results, _stages, _trials, _fronts, _subnets, _confusions, _quarantine):
            out += _guarded(section, look, query)
        if not any(part is not None for part in out[5:]):
            out.append(html.P("Nothing was recorded yet: this page fills while the run writes."))
    return [part for part in out if part is not None]


def compare_page(looks: Sequence[Look], missing: Sequence[str]) -> list[Any]:
    """The curves of several runs over each other, chart by chart, and their final numbers side by side."""
    out: list[Any] = [html.H1("Compare")]
    out += [html.P(f"There is no run {name!r}.", className="problem") for name in missing]
    if not looks:
        return [*out, html.P("Pick runs in the table of runs, then compare them here.")]
    charts: dict[tuple[str, str], dict[str, Any]] = {}
    for look in looks:
        for curves in _train_curves(look.metrics):
            for label, series in curves.series.items():
                if len(series[0]) and not curves.stacked:
                    several = len(curves.series) > 1 or label in pages.ACCURACIES
                    title = f"{curves.title}: {label}" if several else curves.title
                    charts.setdefault((title, curves.unit), {})[str(look.row["name"])] = series
    out.append(_grid([_lines(pages.Curves(title, unit, series)) for (title, unit), series in charts.items()]))
    finals = [_final(look) for look in looks]
    names = list(dict.fromkeys(name for row in finals for name in row if name not in ("phase", "attempt", "rank")))
    cells = [[_run_link(str(look.row["name"])), *(row.get(n) for n in names)] for look, row in zip(looks, finals)]
    if names:
        out.append(_section("Final numbers", [_table(["run", *names], cells)]))
    return out


def problem_page(title: str, sentence: str) -> list[Any]:
    """A page that says what is wrong."""
    return [html.H1(title), html.P(sentence, className="problem"), html.P(dcc.Link("all runs", href="/"))]


# ---- sections of a run -----------------------------------------------------------------------------------------------


def _guarded(section: Callable[[Look, Query], list[Any]], look: Look, query: Query) -> list[Any]:
    """A section of the page; of a run that holds what we never wrote, a sentence in its place."""
    try:
        return section(look, query)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, ArithmeticError, UserError) as error:
        what = section.__name__.strip("_")
        return [html.P(f"Not shown: {what} (other content than slimray writes: {_cut(error)})", className="problem")]


def _headline(look: Look, query: Query) -> list[Any]:
    tiles: dict[str, str] = {}
    final = _final(look)
    for name in pages.ACCURACIES:
        value = final.get(f"val/{name}")
        if _finite(value):
            tiles[f"best {name}"] = f"{value:.1f} %"
            break
    last = [row for row in look.metrics if row.get("phase") == "train"][-1:]
    for row in last:
        tiles["epoch"] = _number("epoch", row.get("epoch"))
        tiles["samples/s"] = _number("samples_per_s", row.get("train/samples_per_s"))
        if _finite(row.get("data/wait_s")) and _finite(row.get("time/step_s")) and row["time/step_s"] > 0:
            tiles["waiting for data"] = f"{100 * row['data/wait_s'] / row['time/step_s']:.0f} %"
    good = _goodput(look)
    if good is not None:
        tiles["goodput"] = f"{100 * good:.0f} %"
    if look.stages:
        tiles["stages done"] = f"{sum(one.state == 'finished' for one in look.stages)} / {len(look.stages)}"
    num_trials = sum(len(trials) for trials in look.trials.values())
    if num_trials:
        tiles["trials"] = f"{num_trials:,}"
        tiles[f"best {_metric(look)}"] = _number("", max(filter(_finite, map(_score, _all_trials(look))), default=None))
    if _finite(look.card.get("seconds")):
        tiles["seconds"] = f"{look.card['seconds']:,.0f}"
    if look.quarantine:
        tiles["quarantined"] = f"{len(_once(look.quarantine)):,}"
    return [_tiles(tiles)] if tiles else []


def _goodput(look: Look) -> float | None:
    """The share of wall time in steps that counted, 0-1: as the card says, else reckoned from the metrics so far."""
    told = look.card.get("goodput")
    told = told.get("goodput") if isinstance(told, Mapping) else told
    if _finite(told):
        return told
    timed = [row for row in look.metrics if row.get("phase") == "train"]
    if not timed or not all(_finite(row.get("time/step_s")) and _finite(row.get("time")) for row in timed):
        return None
    ended = look.ended if look.row["state"] == "finished" else max(row["time"] for row in timed)
    found = health.goodput(timed, look.started or ended, ended)
    return min(1.0, found.useful_s / found.wall_s) if found.wall_s > 0 else None


def _curves(look: Look, query: Query) -> list[Any]:
    curves = _train_curves(look.metrics)
    shown = [_lines(one) for one in curves if any(len(steps) for steps, _ in one.series.values())]
    return [_section("Curves", [_grid(shown)])] if shown else []


def _results(look: Look, query: Query) -> list[Any]:
    """The rows of an evaluation side by side."""
    rows = look.results.get("rows") or []
    if not rows:
        return []
    tables = [pages.compare(rows), *pages.order_matters(rows), *pages.average_precisions(rows)]
    return [_section(table.title, [_table(table.header, table.rows), _note(table.note)]) for table in tables]


def _stages(look: Look, query: Query) -> list[Any]:
    if not look.stages:
        return []
    charts: list[Any] = []
    for title, unit, name in (
        ("Loss, stage by stage", "loss", "train/loss"),
        ("Throughput, stage by stage", "samples/s", "train/samples_per_s"),
    ):
        series = {stage.name: _series(stage.metrics, name) for stage in look.stages}
        series = {stage: pair for stage, pair in series.items() if len(pair[0])}
        if series:
            charts.append(_lines(pages.Curves(title, unit, series)))
    judged = [stage for stage in look.stages if stage.judged]
    metric = _metric(look)
    table: list[Any] = []
    if judged:
        names = [str(row.get("subnet")) for row in judged[0].judged]
        per = [{str(row.get("subnet")): row.get(metric) for row in stage.judged} for stage in judged]
        series: dict[str, Any] = {name: (list(range(len(per))), [of.get(name) for of in per]) for name in names}
        chart = pages.Curves(f"{metric} of subnets after each stage", "%", dict(list(series.items())[: len(COLOURS)]))
        charts.append(_lines(chart, ticks=[stage.name for stage in judged]))
        params = [row.get("params") for row in judged[0].judged]
        cells = [[name, size, *(of.get(name) for of in per)] for name, size in zip(names, params)]
        table = [_table(["subnet", "params", *(f"{metric} after {stage.name}" for stage in judged)], cells)]
    states = html.Ul([html.Li([stage.name, " ", _state(stage.state)]) for stage in look.stages], className="stages")
    return [_section("Stages", [states, _grid(charts), *table])]


def _trials(look: Look, query: Query) -> list[Any]:
    """All trials in parallel coordinates, the best of them in a table, one of them drawn."""
    done = [(target, one) for target, trials in look.trials.items() for one in trials if _finite(_score(one))]
    if not done:
        return []
    at = f"/run/{quote(str(look.row['name']), safe='')}"
    metric = _metric(look)
    done.sort(key=lambda pair: -_score(pair[1]))
    share = query.get("trials") if query.get("trials") in SHARES else "all"
    shown = done[: max(1, math.ceil(SHARES[str(share)] * len(done)))]
    parts = [
        _link(at, query, {"trials": "" if name == "all" else name}, label, share == name)
        for name, label in (("all", f"all {len(done):,}"), ("half", "best half"), ("tenth", "best tenth"))
    ]
    axes = _axes([one for _, one in shown], metric)
    head = ["trial", metric, *[name for name in axes if name != metric], "subnet"]
    cells = []
    for target, one in done[:BEST_TRIALS]:
        key = _trial_key(target, one)
        drawn = dcc.Link("draw", href=_href(at, query, {"trial": key}), title=f"draw trial {key}")
        values = _dimensions(one)
        cells.append([key, _score(one), *(values.get(name) for name in axes if name != metric), drawn])
    named = [(_trial_key(target, one), one.get("arch")) for target, one in done]
    extra = [_subnet(key, arch or {}) for key, arch in named if key == query.get("trial")]
    several = f", of {', '.join(look.trials)}" if len(look.trials) > 1 else ""
    title = f"{len(shown):,} of {len(done):,} trials{several}: {metric} from poor (grey) to best (red)"
    return [
        _section(
            "Trials",
            [
                html.Nav(parts, className="pills", **_named("aria-label", "which trials")),
                _parallel(title, axes),
                html.H3("The best"),
                _table(head, cells),
                *extra,
            ],
        )
    ]


def _fronts(look: Look, query: Query) -> list[Any]:
    """A chart for each cost (and so for each hardware, whose latency is one): trials, front, what was chosen."""
    metric, trials = _metric(look), _all_trials(look)
    chosen = [row for row in look.results.get("targets") or [] if isinstance(row, Mapping)]
    costs = list(dict.fromkeys([*look.fronts, *(name for one in trials[:50] for name in _costs(one))]))
    out = []
    for cost in costs:
        points = _points(trials, cost)
        front = sorted(_points(look.fronts.get(cost) or (), cost))
        front = front or pages.Scatter("", cost, metric, points).front()
        placed = [row for row in chosen if _finite(row.get(cost)) and _finite(row.get("searched"))]
        picked = [(row[cost], row["searched"], str(row.get("target"))) for row in placed]
        if points or front:
            out.append(_front(f"{metric} by {COST_NAMES.get(cost, cost)}", cost, metric, points, front, picked))
    return [_section("Pareto fronts", [_grid(out)])] if out else []


def _subnets(look: Look, query: Query) -> list[Any]:
    """The subnets that were chosen, or the one that this run is."""
    found = [
        (f"{row.get('target')}: {_number('', row.get('searched'))} {_metric(look)}", row.get("arch"), row.get("run"))
        for row in look.results.get("targets") or []
        if isinstance(row, Mapping)
    ]
    if isinstance(look.job.get("arch"), Mapping):
        found.append((str(look.row["name"]), look.job["arch"], None))
    drawn = [_subnet(title, arch, run) for title, arch, run in found[:MAX_SUBNETS] if isinstance(arch, Mapping)]
    return [_section("Subnets", drawn)] if drawn else []


def _confusions(look: Look, query: Query) -> list[Any]:
    classes = [str(name) for name in look.results.get("classes") or []]
    out = []
    for title, counts in (look.results.get("confusion") or {}).items():
        if counts:
            out.append(_confusion(str(title), classes, np.asarray(counts, dtype=np.float64)))
    return [_section("What was taken for what", [_grid(out)])] if out else []


def _quarantine(look: Look, query: Query) -> list[Any]:
    rows = _once(look.quarantine)
    if not rows:
        return []
    names = [n for n in ("path", "split", "sample", "reason") if any(row.get(n) is not None for row in rows)]
    cells = [[row.get(name) for name in names] for row in rows[:MAX_QUARANTINE_ROWS]]
    note = (
        "" if len(rows) <= MAX_QUARANTINE_ROWS else f"The first {MAX_QUARANTINE_ROWS}; quarantine/ of the run has all."
    )
    return [_section(f"Quarantined files: {len(rows):,}", [_table(names, cells), _note(note)])]


# ---- figures ---------------------------------------------------------------------------------------------------------


def _lines(curves: pages.Curves, height: int = 260, ticks: Sequence[str] = ()) -> Any:
    """A chart of series over steps, thinned to MAX_POINTS means each."""
    traces = []
    for place, (name, (steps, values)) in enumerate(curves.series.items()):
        x, y = _thinned(steps, values)
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


def _parallel(title: str, axes: Mapping[str, Sequence[float | None]]) -> Any:
    """Trials as lines over parallel axes, the last of which is the metric; a trace for each sixth of them by metric.

    A trial without a value on an axis leaves a gap there.
    """
    names = list(axes)
    values = np.array([[math.nan if v is None else v for v in column] for column in axes.values()], dtype=np.float64).T
    low, high = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
    scaled = np.where(high > low, (values - low) / np.where(high > low, high - low, 1), 0.5)
    order = np.argsort(values[:, -1], kind="stable")[-MAX_LINES:]  # from poor to best: the best lie on top
    traces: list[dict[str, Any]] = []
    for colour, group in zip(RAMP, np.array_split(order, len(RAMP)), strict=True):
        if not len(group):
            continue
        # one line, there and back again, which is one element of the page; its turns lie on the outer axes
        there, back = np.arange(len(names)), np.arange(len(names))[::-1]
        x = np.concatenate([back if i % 2 else there for i in range(len(group))])
        y = np.where((np.arange(len(group)) % 2 == 1)[:, None], scaled[group][:, ::-1], scaled[group]).round(4).ravel()
        scores = values[group, -1]
        name = f"{_number('', scores.min())} to {_number('', scores.max())}"
        trace = {"type": "scatter", "mode": "lines", "x": x.tolist(), "y": _plain(y), "name": name}
        traces.append(trace | {"line": {"color": colour, "width": 1}, "hoverinfo": "skip", "opacity": 0.55})
    shapes = [
        {"type": "line", "x0": i, "x1": i, "y0": 0, "y1": 1, "line": {"color": "#8a8f98", "width": 1}, "layer": "above"}
        for i in range(len(names))
    ]
    notes = [
        {"x": i, "y": y, "text": _number(name, end), "showarrow": False, "yanchor": anchor, "font": {"size": 11}}
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


def _front(
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
        trace("trials", [], grey),  # for the legend: they are a shape
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
    """Points as short dashes of one shape: one element of the page in place of one for each of them."""
    half = 0.006 * (max(x for x, _ in points) - min(x for x, _ in points))
    path = "".join(f"M{x - half:.8g},{y:.6g}L{x + half:.8g},{y:.6g}" for x, y in points)
    return {"type": "path", "path": path, "line": {"color": colour, "width": 4}, "opacity": 0.5, "layer": "below"}


def _around(values: Sequence[float]) -> list[float]:
    """The range of an axis that shows all values with some room."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return [low - room, high + room]


def _confusion(title: str, classes: Sequence[str], counts: np.ndarray) -> Any:
    if counts.shape != (len(classes), len(classes)):
        raise ValueError(f"confusion of shape {counts.shape} for {len(classes)} classes")
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
        "hovertemplate": "truth %{y}<br>taken for %{x}<br>%{customdata} samples, %{z:.1%}<extra></extra>",
        **({} if many else {"x": labels, "y": labels}),
    }
    if len(classes) <= 12:
        trace |= {"text": counts.astype(int).tolist(), "texttemplate": "%{text}"}
    x_axis = {"title": {"text": "taken for"}, "type": "category" if not many else "linear", "showgrid": False}
    y_axis = {**x_axis, "title": {"text": "truth"}, "autorange": "reversed"}
    return _figure(title, [trace], x_axis, y_axis, 380)


def _figure(
    title: str, traces: Sequence[Any], x_axis: dict[str, Any], y_axis: dict[str, Any], height: int, **more: Any
) -> Any:
    """A figure under its title. Background and ink are the page's (dashboard.css), so that dark mode is right."""
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
        html.Figcaption(_cut(title)),
        html.Div(graph, role="img", **_named("aria-label", _cut(f"chart: {title}"))),
    ]
    if len(traces) > 1:
        children.insert(1, html.Div([_key(trace) for trace in traces], className="legend soft"))
    return html.Figure(children)


def _key(trace: Mapping[str, Any]) -> Any:
    """The colour and the name of a series, as the page's own text."""
    colour = (trace.get("line") or {}).get("color") or trace["marker"]["color"]
    return html.Span([html.I(style={"background": colour}), text_of.unescape(str(trace["name"]))])


def _subnet(title: str, arch: Mapping[str, Any], run: Any = None) -> Any:
    """An arch drawn: a bar per block, as high as its expansion (or width), coloured by kernel; those skipped hollow."""
    value = Arch.from_dict(arch)
    depths = {depth.name: depth for depth in value.depths}
    lists = {name: genes for name, genes in value.dimensions if isinstance(genes, tuple) and name not in depths}
    singles = [f"{name} {_number('', genes)}" for name, genes in value.dimensions if not isinstance(genes, tuple)]
    singles = [f"{name} {' '.join(_number('', gene) for gene in value[name])}" for name in depths] + singles
    tall = next((name for name in ("expand", "width") if name in lists), next(iter(lists), None))
    caption = [title, html.Span(" · ".join(singles), className="soft")]
    if run:
        caption.append(_run_link(str(run)))
    if tall is None:
        return html.Figure([html.Figcaption(_spaced(caption))], className="subnet")
    heights = lists[tall]
    colours = lists.get("kernel", ())
    kinds = sorted(set(colours))
    active = value.runs(tall)
    stages = next((depth.stages for depth in value.depths if tall in depth.skips), ())
    starts = set(np.cumsum([stage.blocks for stage in stages]).tolist())
    bars = []
    for i, (height, runs) in enumerate(zip(heights, active, strict=True)):
        genes = ", ".join(f"{name} {_number('', g[i])}" for name, g in lists.items() if i < len(g))
        kind = kinds.index(colours[i]) % len(COLOURS) if i < len(colours) else 0
        look = {"--share": f"{height / max(heights):.3f}" if max(heights) > 0 else "0", "--bar": COLOURS[kind]}
        said = f"block {i + 1}: {genes if runs else 'skipped'}"
        names = "block" + ("" if runs else " skipped") + (" first" if i in starts else "")
        bars.append(html.Span(className=names, style=look, title=said, role="img", **_named("aria-label", said)))
    legend = [
        html.Span([html.I(style={"background": COLOURS[i % len(COLOURS)]}), f"kernel {_number('', kind)}"])
        for i, kind in enumerate(kinds)
    ]
    legend.append(html.Span(f"height: {tall}; hollow: skipped"))
    return html.Figure(
        [
            html.Figcaption(_spaced(caption)),
            html.Div(bars, className="blocks"),
            html.Div(legend, className="legend soft"),
        ],
        className="subnet",
    )


# ---- trials ----------------------------------------------------------------------------------------------------------


def _all_trials(look: Look) -> list[Mapping[str, Any]]:
    return [one for trials in look.trials.values() for one in trials]


def _trial_key(target: str, trial: Mapping[str, Any]) -> str:
    return f"{target} {trial.get('index', '')}".strip()


def _score(trial: Mapping[str, Any]) -> Any:
    return trial.get("metric")


def _costs(trial: Mapping[str, Any]) -> dict[str, float]:
    """The costs of a trial: those under `costs`, or, in results.json and front.json, beside the metric."""
    told = trial.get("costs")
    own = (
        told if isinstance(told, Mapping) else {n: v for n, v in trial.items() if n not in ("metric", "index", "arch")}
    )
    return {str(name): value for name, value in own.items() if _finite(value)}


def _points(trials: Sequence[Mapping[str, Any]], cost: str) -> list[tuple[float, float]]:
    """(cost, metric) of the trials that have both."""
    rows = [(_costs(one), _score(one)) for one in trials]
    return [(costs[cost], score) for costs, score in rows if cost in costs and _finite(score)]


def _dimensions(trial: Mapping[str, Any]) -> dict[str, float]:
    """The numbers a trial is drawn by: of an arch depth, mean kernel and so on, or of a configuration; and costs."""
    out: dict[str, float] = {}
    if isinstance(trial.get("arch"), Mapping):
        arch = Arch.from_dict(trial["arch"])
        for name, genes in arch.dimensions:
            if any(name == depth.name for depth in arch.depths):
                out[f"{name}, sum"] = float(sum(genes))  # type: ignore[arg-type]
            elif isinstance(genes, tuple):
                used = [gene for gene, runs in zip(genes, arch.runs(name), strict=True) if runs]
                out[f"{name}, mean"] = float(np.mean(used)) if used else math.nan
            else:
                out[name] = float(genes)
    elif isinstance(trial.get("config"), Mapping):
        out |= {str(name): float(value) for name, value in trial["config"].items() if _finite(value)}
    return out | _costs(trial)


def _axes(trials: Sequence[Mapping[str, Any]], metric: str) -> dict[str, list[float | None]]:
    """Axis -> its value in each trial, at most nine axes, the metric last."""
    rows = [_dimensions(one) for one in trials]
    names = list(dict.fromkeys(name for row in rows for name in row))[:8]
    return {name: [row.get(name) for row in rows] for name in names if name != metric} | {
        metric: list(map(_score, trials))
    }


def _metric(look: Look) -> str:
    named = look.results.get("metric")
    if isinstance(named, str):
        return named
    judged = [row for stage in look.stages for row in stage.judged]
    found = [one.get("metrics") for one in _all_trials(look)[:20]] + judged
    names = {name for one in found if isinstance(one, Mapping) for name in one}
    return next((name for name in pages.ACCURACIES if name in names), "metric")


# ---- numbers and text ------------------------------------------------------------------------------------------------


def plain(value: Any) -> str:
    """A text for Plotly, which takes some markup: shown as it is, and cut."""
    return text_of.escape(_cut(value), quote=False)


def _train_curves(rows: Sequence[Mapping[str, Any]]) -> list[pages.Curves]:
    ordered = sorted((row for row in rows if _finite(row.get("step"))), key=lambda row: row["step"])
    return pages.train_curves(ordered)


def _final(look: Look) -> dict[str, Any]:
    """The best numbers: of the card, else of the metrics so far."""
    return pages.final_numbers(list(look.metrics), look.card)["best"]


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    found = sorted((row["step"], row[name]) for row in rows if _finite(row.get(name)) and _finite(row.get("step")))
    return [step for step, _ in found], [value for _, value in found]


def _thinned(steps: Sequence[float], values: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """At most MAX_POINTS means of neighbours."""
    if len(steps) <= MAX_POINTS:
        return list(steps), list(values)
    groups = np.array_split(np.asarray(values, np.float64), MAX_POINTS)
    at = np.array_split(np.asarray(steps, np.float64), MAX_POINTS)
    return [float(group.mean()) for group in at], [float(group.mean()) for group in groups]


def _plain(values: np.ndarray) -> list[float | None]:
    """As JSON has it: no number is null."""
    return [None if value != value else value for value in values.tolist()]


def _once(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The quarantined files, each once however many attempts and epochs met it."""
    return list({tuple(str(row.get(name)) for name in ("path", "split", "sample")): row for row in rows}.values())


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(name: str, value: Any) -> str:
    """A value as text: counts of weights and MACs short (24.3 M), floats to four digits, nothing as a dash."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _cut(value)
    if not math.isfinite(value):
        return "not finite"
    if name.rsplit("/", 1)[-1] in ("params", "macs") and value >= 1000:
        power = min(int(math.log10(value) // 3), 4)
        return f"{value / 1000**power:.3g} {' kMGT'[power]}"
    if isinstance(value, int) or abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _cut(value: Any, length: int = MAX_TEXT) -> str:
    """Text that fits a page, of characters that can be encoded (a file name may hold bytes that are no text)."""
    said = str(value).encode("utf-8", "replace").decode("utf-8")
    return said if len(said) <= length else said[: length - 1] + "…"


def _when(updated: Any) -> str:
    return re.sub(r"T(\d\d:\d\d):\d\dZ$", r" \1 UTC", updated) if isinstance(updated, str) else ""


# ---- pieces ----------------------------------------------------------------------------------------------------------


def _run_row(row: Mapping[str, Any], picked: Sequence[str], query: Query) -> Any:
    name = str(row["name"])
    others = [one for one in picked if one != name]
    here = name in picked
    toggle = dcc.Link(
        "✓ picked" if here else "pick",
        href=_href("/", query, {"compare": ",".join(others if here else [*picked, name])}),
        className="pick",
        title=f"{'leave' if here else 'compare'} {_cut(name)}",
    )
    cells = {
        "name": _run_link(name),
        "kind": row.get("kind") or "–",
        "state": _state(row["state"]),
        "result": row.get("result") or "–",
        "updated": _when(row.get("updated")) or "–",
        "message": _cut(row.get("message") or ""),
        "compare": toggle,
    }
    return html.Tr(
        [html.Td(cell, className=f"cell-{key}", **_named("data-label", key)) for key, cell in cells.items()],
        className="picked" if here else "",
    )


def _run_link(name: str) -> Any:
    return dcc.Link(_cut(name), href=f"/run/{quote(name, safe='')}")


def _state(state: Any) -> Any:
    return html.Span(str(state), className=f"state {state if state in STATES else 'queued'}")


def _haystack(row: Mapping[str, Any]) -> str:
    return " ".join(str(row.get(name) or "") for name in ("name", "kind", "state", "result", "message")).casefold()


def _sort_key(row: Mapping[str, Any], column: str) -> Any:
    if column == "result":
        found = re.search(r"[\d.]+(?= %)", str(row.get("result") or ""))
        return float(found[0]) if found else -1.0
    return str(row.get(column) or "")


def _picked(query: Query) -> list[str]:
    return list(dict.fromkeys(filter(None, query.get("compare", "").split(","))))


def _href(at: str, query: Query, changes: Query) -> str:
    kept = {name: value for name, value in {**query, **changes}.items() if value}
    return at + ("?" + urlencode(kept) if kept else "")


def _link(at: str, query: Query, changes: Query, label: str, current: bool) -> Any:
    return dcc.Link(label, href=_href(at, query, changes), className="current" if current else "pill")


def _named(attribute: str, value: str) -> dict[str, Any]:
    """An attribute whose name is none in Python, as keyword arguments."""
    return {attribute: value}


def _spaced(parts: Any) -> list[Any]:
    out: list[Any] = []
    for part in parts:
        out += [part, " "]
    return out


def _section(title: str, children: Sequence[Any]) -> Any:
    return html.Section([html.H2(title), *(child for child in children if child is not None)])


def _note(note: str) -> Any:
    return html.P(note, className="soft") if note else None


def _grid(figures: Sequence[Any]) -> Any:
    return html.Div(list(figures), className="grid")


def _tiles(tiles: Mapping[str, str]) -> Any:
    return html.Dl([html.Div([html.Dt(name), html.Dd(value)]) for name, value in tiles.items()], className="tiles")


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    """A table whose numbers are aligned; cells are values, or components as they are."""
    names = [str(name) for name in header]
    columns = [[row[i] for row in rows if i < len(row)] for i in range(len(names))]
    right = [any(map(_finite, column)) for column in columns]
    digits = [_digits(name, column) for name, column in zip(names, columns, strict=True)]
    body = []
    for row in rows:
        cells = []
        for name, value, number, places in zip(names, row, right, digits):
            if hasattr(value, "to_plotly_json"):
                shown = value
            else:
                shown = f"{value:,.{places}f}" if places is not None and _finite(value) else _number(name, value)
            cells.append(html.Td(shown, className="num" if number else ""))
        body.append(html.Tr(cells))
    heads = [html.Th(name, scope="col", className="num" if number else "") for name, number in zip(names, right)]
    return html.Div(html.Table([html.Thead(html.Tr(heads)), html.Tbody(body)]), className="scroll", tabIndex="0")


def _digits(name: str, column: Sequence[Any]) -> int | None:
    """Decimal places of a column of floats, the same in all rows; None: each number as `_number` has it."""
    values = [abs(value) for value in column if _finite(value)]
    if name.rsplit("/", 1)[-1] in ("params", "macs") or not any(isinstance(value, float) for value in values):
        return None
    if all(value == int(value) for value in values):
        return 0
    return max(0, min(6, 3 - math.floor(math.log10(max(values)))))


def _facts_table(card: Mapping[str, Any]) -> Any:
    rows = []
    for name, value in card.items():
        pairs = value.items() if isinstance(value, Mapping) else [("", value)]
        rows += [[f"{name} {key}".strip(), _cut(inner, 400)] for key, inner in pairs]
    return _section("Card", [_table(["what", "value"], rows)]) if rows else None
