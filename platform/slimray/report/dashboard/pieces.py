"""Elements of a page: tables, tiles, links, and numbers as text."""

import html as text_of
import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
from dash import dcc, html

from slimray.report import charts, tables
from slimray.report.dashboard.watch import Look

MAX_POINTS = 800  # of a curve
MAX_TEXT = 120
STATES = ("running", "finished", "failed", "stopped", "queued", "damaged", "reading")
COLUMNS = {"name": False, "kind": False, "state": False, "result": True, "updated": True}  # True: sorted high to low
COST_NAMES = {"params": "parameters", "macs": "MACs", "memory_mb": "memory, MB", "latency_ms": "latency, ms"}
Query = Mapping[str, str]


# ---- numbers and text ------------------------------------------------------------------------------------------------
def plain(value: Any) -> str:
    """Return a text for Plotly, which interprets some markup: escaped and shortened."""
    return text_of.escape(cut(value), quote=False)


def train_curves(rows: Sequence[Mapping[str, Any]]) -> list[charts.Curves]:
    ordered = sorted((row for row in rows if finite(row.get("step"))), key=lambda row: row["step"])
    return charts.train_curves(ordered)


def final_numbers_of(look: Look) -> dict[str, Any]:
    """Return the best numbers of the card, or else of the metrics so far."""
    return tables.final_numbers(list(look.metrics), look.card)["best"]


def series_of(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    found = sorted((row["step"], row[name]) for row in rows if finite(row.get(name)) and finite(row.get("step")))
    return [step for step, _ in found], [value for _, value in found]


def thinned(steps: Sequence[float], values: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return at most MAX_POINTS points, each the mean of its neighbours."""
    if len(steps) <= MAX_POINTS:
        return list(steps), list(values)
    groups = np.array_split(np.asarray(values, np.float64), MAX_POINTS)
    at = np.array_split(np.asarray(steps, np.float64), MAX_POINTS)
    return [float(group.mean()) for group in at], [float(group.mean()) for group in groups]


def plain_numbers(values: np.ndarray) -> list[float | None]:
    """Return values for JSON, with null for NaN."""
    return [None if value != value else value for value in values.tolist()]


def once(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return each quarantined file once, over all attempts and epochs."""
    return list({tuple(str(row.get(name)) for name in ("path", "split", "sample")): row for row in rows}.values())


def finite(value: Any) -> bool:
    """Return True if the value is a finite number within the range of a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def number_text(name: str, value: Any) -> str:
    """Return a value as text: counts of weights and MACs short (24.3 M), floats to four digits, None as a dash."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return cut(value)
    if not finite(value):
        return "not finite"
    if name.rsplit("/", 1)[-1] in ("params", "macs") and value >= 1000:
        power = min(int(math.log10(value) // 3), 4)
        return f"{value / 1000**power:.3g} {' kMGT'[power]}"
    if isinstance(value, int) or abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def cut(value: Any, length: int = MAX_TEXT) -> str:
    """Return a shortened text whose characters can be encoded (file names may hold bytes that are not text)."""
    said = str(value).encode("utf-8", "replace").decode("utf-8")
    return said if len(said) <= length else said[: length - 1] + "…"


def when(updated: Any) -> str:
    return re.sub(r"T(\d\d:\d\d):\d\dZ$", r" \1 UTC", updated) if isinstance(updated, str) else ""


# ---- pieces ----------------------------------------------------------------------------------------------------------
def run_row(row: Mapping[str, Any], picked: Sequence[str], query: Query) -> Any:
    name = str(row["name"])
    others = [one for one in picked if one != name]
    here = name in picked
    toggle = dcc.Link(
        "✓ picked" if here else "pick",
        href=href("/", query, {"compare": ",".join(others if here else [*picked, name])}),
        className="pick",
        title=f"{'remove' if here else 'compare'} {cut(name)}",
    )
    cells = {
        "name": run_link(name),
        "kind": row.get("kind") or "–",
        "state": state_label(row["state"]),
        "result": row.get("result") or "–",
        "updated": when(row.get("updated")) or "–",
        "message": cut(row.get("message") or ""),
        "compare": toggle,
    }
    return html.Tr(
        [html.Td(cell, className=f"cell-{key}", **named_attribute("data-label", key)) for key, cell in cells.items()],
        className="picked" if here else "",
    )


def run_link(name: str) -> Any:
    return dcc.Link(cut(name), href=f"/run/{quote(name, safe='')}")


def state_label(state: Any) -> Any:
    return html.Span(str(state), className=f"state {state if state in STATES else 'queued'}")


def haystack(row: Mapping[str, Any]) -> str:
    return " ".join(str(row.get(name) or "") for name in ("name", "kind", "state", "result", "message")).casefold()


def sort_key(row: Mapping[str, Any], column: str) -> Any:
    if column == "result":
        found = re.search(r"[\d.]+(?= %)", str(row.get("result") or ""))
        return float(found[0]) if found else -1.0
    return str(row.get(column) or "")


def picked_of(query: Query) -> list[str]:
    return list(dict.fromkeys(filter(None, query.get("compare", "").split(","))))


def href(at: str, query: Query, changes: Query) -> str:
    kept = {name: value for name, value in {**query, **changes}.items() if value}
    return at + ("?" + urlencode(kept) if kept else "")


def link(at: str, query: Query, changes: Query, label: str, current: bool) -> Any:
    return dcc.Link(label, href=href(at, query, changes), className="current" if current else "pill")


def named_attribute(attribute: str, value: str) -> dict[str, Any]:
    """Return an attribute whose name is not a Python identifier, as keyword arguments."""
    return {attribute: value}


def spaced(parts: Any) -> list[Any]:
    out: list[Any] = []
    for part in parts:
        out += [part, " "]
    return out


def section(title: str, children: Sequence[Any]) -> Any:
    return html.Section([html.H2(title), *(child for child in children if child is not None)])


def note_of(note: str) -> Any:
    return html.P(note, className="soft") if note else None


def grid(figures: Sequence[Any]) -> Any:
    return html.Div(list(figures), className="grid")


def tile_list(tiles: Mapping[str, str]) -> Any:
    return html.Dl([html.Div([html.Dt(name), html.Dd(value)]) for name, value in tiles.items()], className="tiles")


def data_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    """Return a table with aligned numbers; cells are values, or components, which are shown unchanged."""
    names = [str(name) for name in header]
    columns = [[row[i] for row in rows if i < len(row)] for i in range(len(names))]
    right = [any(map(finite, column)) for column in columns]
    digits = [_digits(name, column) for name, column in zip(names, columns, strict=True)]
    body = []
    for row in rows:
        cells = []
        for name, value, number, places in zip(names, row, right, digits):
            if hasattr(value, "to_plotly_json"):
                shown = value
            else:
                shown = f"{value:,.{places}f}" if places is not None and finite(value) else number_text(name, value)
            cells.append(html.Td(shown, className="num" if number else ""))
        body.append(html.Tr(cells))
    heads = [html.Th(name, scope="col", className="num" if number else "") for name, number in zip(names, right)]
    return html.Div(html.Table([html.Thead(html.Tr(heads)), html.Tbody(body)]), className="scroll", tabIndex="0")


def _digits(name: str, column: Sequence[Any]) -> int | None:
    """Return the decimal places of a column of floats, the same in all rows; None: use `number_text` per number."""
    values = [abs(value) for value in column if finite(value)]
    if name.rsplit("/", 1)[-1] in ("params", "macs") or not any(isinstance(value, float) for value in values):
        return None
    if all(value == int(value) for value in values):
        return 0
    return max(0, min(6, 3 - math.floor(math.log10(max(values)))))


def facts_table(card: Mapping[str, Any]) -> Any:
    rows = []
    for name, value in card.items():
        pairs = value.items() if isinstance(value, Mapping) else [("", value)]
        rows += [[f"{name} {key}".strip(), cut(inner, 400)] for key, inner in pairs]
    return section("Card", [data_table(["what", "value"], rows)]) if rows else None
