"""Pages of the dashboard: a row per run, or a `Look` at one of them, becomes a list of Dash components.

Nothing is read or stored here. Links select what is shown, so that the URL determines the page and the keyboard reaches
everything.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
from dash import dcc, html

from slimray.report.charts import Curves, Scatter
from slimray.report.dashboard.figures import (
    COLOURS,
    confusion_figure,
    front_figure,
    lines_figure,
    parallel_figure,
    subnet_figure,
)
from slimray.report.dashboard.pieces import (
    COLUMNS,
    COST_NAMES,
    STATES,
    Query,
    cut,
    data_table,
    facts_table,
    final_numbers_of,
    finite,
    grid,
    haystack,
    href,
    link,
    named_attribute,
    note_of,
    number_text,
    once,
    picked_of,
    run_link,
    run_row,
    section,
    series_of,
    sort_key,
    spaced,
    state_label,
    tile_list,
    train_curves,
    when,
)
from slimray.report.dashboard.trials import (
    all_trials,
    axes_of,
    best_of_trials,
    better_of,
    costs_of,
    dimensions,
    metric_of,
    points_of,
    score_of,
    trial_key,
)
from slimray.report.dashboard.watch import Look
from slimray.report.metrics import metrics_of, names_in, text_of
from slimray.report.tables import compare, task_tables
from slimray.spec import UserError
from slimray.train import health

MAX_ROWS = 500  # runs on a page; the filter finds the others
MAX_QUARANTINE_ROWS = 200
MAX_SUBNETS = 12
BEST_TRIALS = 12
SHARES = {"all": 1.0, "half": 0.5, "tenth": 0.1}  # best share of the trials to draw


# ---- pages -----------------------------------------------------------------------------------------------------------
def runs_page(rows: Sequence[Mapping[str, Any]], query: Query, words: str, where: str) -> list[Any]:
    """Return the table of runs in state `state=` whose text contains all `words`, sorted by `sort=`.

    Those named in `compare=` are marked as picked.
    """
    if not rows:
        return [html.H1("Runs"), html.P(f"No runs in {where} yet: they appear here once `slimray run` has started.")]
    counts = {state: sum(row["state"] == state for row in rows) for state in STATES}
    chosen = query.get("state", "")
    states = [link("/", query, {"state": ""}, f"all {len(rows)}", not chosen)]
    states += [
        link("/", query, {"state": state}, f"{state} {count}", chosen == state)
        for state, count in counts.items()
        if count
    ]
    wanted = words.casefold().split()
    shown = [row for row in rows if not chosen or row["state"] == chosen]
    shown = [row for row in shown if all(word in haystack(row) for word in wanted)]
    sort = query.get("sort") if query.get("sort") in COLUMNS else "updated"
    shown = sorted(shown, key=lambda row: row["name"])
    shown.sort(key=lambda row: sort_key(row, str(sort)), reverse=COLUMNS[str(sort)])
    picked = picked_of(query)
    out: list[Any] = [html.H1("Runs"), html.Nav(states, className="pills", **named_attribute("aria-label", "states"))]
    compared: list[Any] = []
    if picked:
        to = "/compare?" + urlencode({"runs": ",".join(picked)})
        compared = [dcc.Link(f"Compare {len(picked)} run{'s' if len(picked) > 1 else ''}", href=to, className="action")]
        compared += [html.Span(cut(name), className="tag") for name in picked]
        compared.append(dcc.Link("clear", href=href("/", query, {"compare": ""})))
    out.append(html.P(spaced(compared), className="picked"))  # even if empty, so that the rest keeps its position
    heads = [
        html.Th(
            dcc.Link(name, href=href("/", query, {"sort": name})),
            scope="col",
            **(named_attribute("aria-sort", "descending" if COLUMNS[name] else "ascending") if name == sort else {}),
        )
        for name in COLUMNS
    ]
    heads += [html.Th("message", scope="col"), html.Th("compare", scope="col")]
    body = [run_row(row, picked, query) for row in shown[:MAX_ROWS]]
    table = html.Table([html.Thead(html.Tr(heads)), html.Tbody(body)], className="runs")
    out.append(html.Div(table, className="scroll"))
    if not shown:
        out.append(html.P("No run matches: clear the filter, or choose another state."))
    if len(shown) > MAX_ROWS:
        out.append(
            html.P(f"The first {MAX_ROWS} of {len(shown):,} runs; use the filter to find others.", className="soft")
        )
    return out


def run_page(look: Look, query: Query) -> list[Any]:
    """Return the page of one run: its numbers and charts, or, with `view=`, its report or its resolved job."""
    name, view = str(look.row["name"]), query.get("view", "")
    at = f"/run/{quote(name, safe='')}"
    views = [link(at, {}, {}, "overview", view not in ("report", "job"))]
    if look.has_report:
        views.append(link(at, {}, {"view": "report"}, "report: pictures, clips, clouds", view == "report"))
    views.append(link(at, {}, {"view": "job"}, "job", view == "job"))
    facts = [state_label(look.row["state"]), str(look.row.get("kind") or ""), when(look.row.get("updated"))]
    out: list[Any] = [
        html.H1(name),
        html.P(spaced(one for one in facts if one), className="facts"),
        html.P(look.row.get("message"), className="message") if look.row.get("message") else None,
        html.P(look.row.get("uri"), className="soft uri"),
        html.Nav(views, className="pills", **named_attribute("aria-label", "views")),
    ]
    if look.row["state"] == "reading":
        return [one for one in (*out, html.P("Reading the storage…", className="soft")) if one is not None]
    out += [html.P(f"Not shown: {problem}", className="problem") for problem in look.problems]
    if view == "report" and look.has_report:
        source = f"/report/{quote(name, safe='')}"
        out.append(html.P(html.A("open in a new tab", href=source, target="_blank", rel="noopener noreferrer")))
        out.append(html.Iframe(src=source, title="report of the run", sandbox="allow-scripts", className="report"))
    elif view == "job":
        out += [html.Pre(look.job_text or "There is no job.yaml.", tabIndex="0"), facts_table(look.card)]
    else:
        for section in (_headline, _curves, _results, _stages, _trials, _fronts, _subnets, _confusions, _quarantine):
            out += _guarded(section, look, query)
        if not any(part is not None for part in out[5:]):
            out.append(html.P("Nothing has been recorded yet: this page fills while the run writes."))
    return [part for part in out if part is not None]


def compare_page(looks: Sequence[Look], missing: Sequence[str]) -> list[Any]:
    """Return the page that overlays the curves of several runs and lists their final numbers side by side."""
    out: list[Any] = [html.H1("Compare")]
    out += [html.P(f"There is no run {name!r}.", className="problem") for name in missing]
    if not looks:
        return [*out, html.P("Pick runs in the table of runs, then compare them here.")]
    charts: dict[tuple[str, str], dict[str, Any]] = {}
    for look in looks:
        for curves in train_curves(look.metrics):
            for label, series in curves.series.items():
                if len(series[0]) and not curves.stacked:
                    several = len(curves.series) > 1 or curves.title.startswith("Validation")
                    title = f"{curves.title}: {label}" if several else curves.title
                    charts.setdefault((title, curves.unit), {})[str(look.row["name"])] = series
    out.append(grid([lines_figure(Curves(title, unit, series)) for (title, unit), series in charts.items()]))
    finals = [final_numbers_of(look) for look in looks]
    names = list(dict.fromkeys(name for row in finals for name in row if name not in ("phase", "attempt", "rank")))
    cells = [[run_link(str(look.row["name"])), *(row.get(n) for n in names)] for look, row in zip(looks, finals)]
    if names:
        out.append(section("Final numbers", [data_table(["run", *names], cells)]))
    return out


def problem_page(title: str, sentence: str) -> list[Any]:
    """Return a page with an error message."""
    return [html.H1(title), html.P(sentence, className="problem"), html.P(dcc.Link("all runs", href="/"))]


# ---- sections of a run -----------------------------------------------------------------------------------------------
def _guarded(section: Callable[[Look, Query], list[Any]], look: Look, query: Query) -> list[Any]:
    """Return a section of the page, or a sentence in its place if the run holds content that slimray did not write."""
    try:
        return section(look, query)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, ArithmeticError, UserError) as error:
        what = section.__name__.strip("_")
        return [html.P(f"Not shown: {what} (not written by slimray: {cut(error)})", className="problem")]


def _headline(look: Look, query: Query) -> list[Any]:
    tiles: dict[str, str] = {}
    final = final_numbers_of(look)
    for metric in metrics_of(names_in([final]), look.results)[:1]:
        tiles[f"best {metric['name']}"] = text_of(metric, final.get(f"val/{metric['name']}"))
    last = [row for row in look.metrics if row.get("phase") == "train"][-1:]
    for row in last:
        tiles["epoch"] = number_text("epoch", row.get("epoch"))
        tiles["samples/s"] = number_text("samples_per_s", row.get("train/samples_per_s"))
        if finite(row.get("data/wait_s")) and finite(row.get("time/step_s")) and row["time/step_s"] > 0:
            tiles["waiting for data"] = f"{100 * row['data/wait_s'] / row['time/step_s']:.0f} %"
    good = _goodput(look)
    if good is not None:
        tiles["goodput"] = f"{100 * good:.0f} %"
    if look.stages:
        tiles["stages done"] = f"{sum(one.state == 'finished' for one in look.stages)} / {len(look.stages)}"
    num_trials = sum(len(trials) for trials in look.trials.values())
    if num_trials:
        tiles["trials"] = f"{num_trials:,}"
        tiles[f"best {metric_of(look)}"] = number_text("", best_of_trials(look))
    if finite(look.card.get("seconds")):
        tiles["seconds"] = f"{look.card['seconds']:,.0f}"
    if look.quarantine:
        tiles["quarantined"] = f"{len(once(look.quarantine)):,}"
    return [tile_list(tiles)] if tiles else []


def _goodput(look: Look) -> float | None:
    """Return the share of wall time in useful steps, 0-1: from the card, or else computed from the metrics so far."""
    told = look.card.get("goodput")
    told = told.get("goodput") if isinstance(told, Mapping) else told
    if finite(told):
        return told
    timed = [row for row in look.metrics if row.get("phase") == "train"]
    if not timed or not all(finite(row.get("time/step_s")) and finite(row.get("time")) for row in timed):
        return None
    ended = look.ended if look.row["state"] == "finished" else max(row["time"] for row in timed)
    found = health.goodput(timed, look.started or ended, ended)
    return min(1.0, found.useful_s / found.wall_s) if found.wall_s > 0 else None


def _curves(look: Look, query: Query) -> list[Any]:
    curves = train_curves(look.metrics)
    shown = [lines_figure(one) for one in curves if any(len(steps) for steps, _ in one.series.values())]
    return [section("Curves", [grid(shown)])] if shown else []


def _results(look: Look, query: Query) -> list[Any]:
    """Return the comparison of an evaluation's rows."""
    rows = look.results.get("rows") or []
    if not rows:
        return []
    tables = [compare(rows, look.results), *task_tables(rows, look.results.get("classes", []))]
    return [section(table.title, [data_table(table.header, table.rows), note_of(table.note)]) for table in tables]


def _stages(look: Look, query: Query) -> list[Any]:
    if not look.stages:
        return []
    charts: list[Any] = []
    for title, unit, name in (
        ("Loss, stage by stage", "loss", "train/loss"),
        ("Throughput, stage by stage", "samples/s", "train/samples_per_s"),
    ):
        series = {stage.name: series_of(stage.metrics, name) for stage in look.stages}
        series = {stage: pair for stage, pair in series.items() if len(pair[0])}
        if series:
            charts.append(lines_figure(Curves(title, unit, series)))
    judged = [stage for stage in look.stages if stage.judged]
    metric = metric_of(look)
    table: list[Any] = []
    if judged:
        names = [str(row.get("subnet")) for row in judged[0].judged]
        per = [{str(row.get("subnet")): row.get(metric) for row in stage.judged} for stage in judged]
        series: dict[str, Any] = {name: (list(range(len(per))), [of.get(name) for of in per]) for name in names}
        chart = Curves(f"{metric} of subnets after each stage", "%", dict(list(series.items())[: len(COLOURS)]))
        charts.append(lines_figure(chart, ticks=[stage.name for stage in judged]))
        params = [row.get("params") for row in judged[0].judged]
        cells = [[name, size, *(of.get(name) for of in per)] for name, size in zip(names, params)]
        table = [data_table(["subnet", "params", *(f"{metric} after {stage.name}" for stage in judged)], cells)]
    states = html.Ul(
        [html.Li([stage.name, " ", state_label(stage.state)]) for stage in look.stages], className="stages"
    )
    return [section("Stages", [states, grid(charts), *table])]


def _trials(look: Look, query: Query) -> list[Any]:
    """Return all trials in parallel coordinates, the best of them in a table, and the selected one as a drawing."""
    done = [(target, one) for target, trials in look.trials.items() for one in trials if finite(score_of(one))]
    if not done:
        return []
    at = f"/run/{quote(str(look.row['name']), safe='')}"
    metric = metric_of(look)
    done.sort(key=lambda pair: score_of(pair[1]), reverse=better_of(look) == "higher")
    share = query.get("trials") if query.get("trials") in SHARES else "all"
    shown = done[: max(1, math.ceil(SHARES[str(share)] * len(done)))]
    parts = [
        link(at, query, {"trials": "" if name == "all" else name}, label, share == name)
        for name, label in (("all", f"all {len(done):,}"), ("half", "best half"), ("tenth", "best tenth"))
    ]
    axes = axes_of([one for _, one in shown], metric)
    head = ["trial", metric, *[name for name in axes if name != metric], "subnet"]
    cells = []
    for target, one in done[:BEST_TRIALS]:
        key = trial_key(target, one)
        drawn = dcc.Link("draw", href=href(at, query, {"trial": key}), title=f"draw trial {key}")
        values = dimensions(one)
        cells.append([key, score_of(one), *(values.get(name) for name in axes if name != metric), drawn])
    named = [(trial_key(target, one), one.get("arch")) for target, one in done]
    extra = [subnet_figure(key, arch or {}) for key, arch in named if key == query.get("trial")]
    several = f", of {', '.join(look.trials)}" if len(look.trials) > 1 else ""
    title = f"{len(shown):,} of {len(done):,} trials{several}: {metric} from worst (grey) to best (red)"
    return [
        section(
            "Trials",
            [
                html.Nav(parts, className="pills", **named_attribute("aria-label", "which trials")),
                parallel_figure(title, axes),
                html.H3("The best"),
                data_table(head, cells),
                *extra,
            ],
        )
    ]


def _fronts(look: Look, query: Query) -> list[Any]:
    """Return a chart per cost (each hardware has a latency of its own): trials, front, and the chosen subnets."""
    metric, trials = metric_of(look), all_trials(look)
    chosen = [row for row in look.results.get("targets") or [] if isinstance(row, Mapping)]
    costs = list(dict.fromkeys([*look.fronts, *(name for one in trials[:50] for name in costs_of(one))]))
    out = []
    for cost in costs:
        points = points_of(trials, cost)
        front = sorted(points_of(look.fronts.get(cost) or (), cost))
        front = front or Scatter("", cost, metric, points, better=better_of(look)).front()
        placed = [row for row in chosen if finite(row.get(cost)) and finite(row.get("searched"))]
        picked = [(row[cost], row["searched"], str(row.get("target"))) for row in placed]
        if points or front:
            out.append(front_figure(f"{metric} by {COST_NAMES.get(cost, cost)}", cost, metric, points, front, picked))
    return [section("Pareto fronts", [grid(out)])] if out else []


def _subnets(look: Look, query: Query) -> list[Any]:
    """Return drawings of the chosen subnets, or of the arch that this run trains."""
    found = [
        (
            f"{row.get('target')}: {number_text('', row.get('searched'))} {metric_of(look)}",
            row.get("arch"),
            row.get("run"),
        )
        for row in look.results.get("targets") or []
        if isinstance(row, Mapping)
    ]
    if isinstance(look.job.get("arch"), Mapping):
        found.append((str(look.row["name"]), look.job["arch"], None))
    drawn = [subnet_figure(title, arch, run) for title, arch, run in found[:MAX_SUBNETS] if isinstance(arch, Mapping)]
    return [section("Subnets", drawn)] if drawn else []


def _confusions(look: Look, query: Query) -> list[Any]:
    classes = [str(name) for name in look.results.get("classes") or []]
    out = []
    for title, counts in (look.results.get("confusion") or {}).items():
        if counts:
            out.append(confusion_figure(str(title), classes, np.asarray(counts, dtype=np.float64)))
    return [section("Confusion", [grid(out)])] if out else []


def _quarantine(look: Look, query: Query) -> list[Any]:
    rows = once(look.quarantine)
    if not rows:
        return []
    names = [n for n in ("path", "split", "sample", "reason") if any(row.get(n) is not None for row in rows)]
    cells = [[row.get(name) for name in names] for row in rows[:MAX_QUARANTINE_ROWS]]
    note = (
        "" if len(rows) <= MAX_QUARANTINE_ROWS else f"The first {MAX_QUARANTINE_ROWS}; the run's quarantine/ lists all."
    )
    return [section(f"Quarantined files: {len(rows):,}", [data_table(names, cells), note_of(note)])]
