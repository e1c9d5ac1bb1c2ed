"""Tables of a report: final numbers, run comparison, classes, repeats, quarantined files; and numbers as text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from slimray.report.metrics import best_of, main_ones, metrics_of, names_in

NOTHING: Mapping[str, Any] = {}
MAX_QUARANTINE_ROWS = 500


@dataclass(frozen=True)
class Table:
    """Rows under a title; columns named in `bars` hold percent (0-100) and get bars, long ones if `chart`.

    With `fold`, the table is initially collapsed.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""
    bars: frozenset[str] = frozenset()
    fold: bool = False
    chart: bool = False


@dataclass(frozen=True)
class Confusion:
    """Counts of a validation: `counts[truth][predicted]`, a square matrix in the order of `classes`."""

    title: str
    classes: Sequence[str]
    counts: Sequence[Sequence[int]]


# ---- numbers -------------------------------------------------------------------------------------------------------
def final_numbers(
    rows: Sequence[Mapping[str, Any]], card: Mapping[str, Any], results: Mapping[str, Any] = NOTHING
) -> dict[str, dict[str, Any]]:
    """Return {"best": ..., "last": ...} from the card, or else the val row with the best first metric and the last."""
    written, best, last = card.get("metrics", {}), {}, {}
    for metric in metrics_of(names_in(rows), results)[:1]:
        best = best_of(rows, metric)
        last = next((row for row in reversed(rows) if is_finite(row.get(f"val/{metric['name']}"))), {})
    return {"best": dict(written.get("best") or best), "last": dict(written.get("last") or last)}


def compare(rows: Sequence[Mapping[str, Any]], results: Mapping[str, Any] = NOTHING) -> Table:
    """Return the comparison of an evaluation's rows; shares of samples with their 95 % Wilson interval."""
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
        note += " The interval (Wilson) treats all samples as independent, which clips of one scene are not."
        at = columns.index(name) + 1
        for row, line in zip(rows, cells):
            line.insert(at, _interval(row.get(name), row.get("num_samples")))
        columns.insert(at, "95 % interval")
    bars = frozenset(metric["name"] for metric in metrics if metric["unit"] == "%")
    return Table("Side by side", columns, cells, note, bars)


def task_tables(rows: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> list[Table]:
    """Return the further tables that tasks make from the rows of an evaluation."""
    from slimray.tasks import TASKS  # imports torch, not needed for other pages

    made = {table.title: table for task in TASKS.values() for table in task.tables(rows, classes)}
    return [
        Table(one.title, one.header, one.rows, one.note, frozenset(one.bars), one.fold, one.chart)
        for one in made.values()
    ]


def spreads(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Return a table of the spread of numbers in rows with `repeats` (name -> `mean`, `std`, `max`), [] without any."""
    cells = [
        (key(row), name, numbers["mean"], numbers["std"], numbers["max"])
        for row in rows
        for name, numbers in ({**row["repeats"], **row.get("ap", {})} if row.get("repeats") else {}).items()
    ]
    header = ("run", "number", "mean", "deviation", "largest")
    note = "Each repeat is a pass over the split with different random draws."
    return [Table("Over repeats", header, cells, note, fold=len(cells) > 12)] if cells else []


def per_class(confusion: Confusion) -> Table:
    """Return samples, accuracy and the most frequent wrong prediction for each class, the weakest class first."""
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
    header = ("class", "samples", "accuracy", "most often mistaken for")
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
    """Return the 95 % Wilson score interval of a share of `num_samples`, in percent."""
    if not num_samples or not is_finite(percent):
        return "–"
    z, p = 1.96, percent / 100.0
    centre = (p + z * z / (2 * num_samples)) / (1 + z * z / num_samples)
    half = z * math.sqrt(p * (1 - p) / num_samples + z * z / (4 * num_samples**2)) / (1 + z * z / num_samples)
    return f"{100 * max(0.0, centre - half):.1f} – {100 * min(1.0, centre + half):.1f}"


def is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def lost(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def quarantine_table(rows: Sequence[Mapping[str, Any]]) -> Table | None:
    """Return a table that lists each quarantined file once, over all attempts and epochs; None if there are none."""
    once = list({tuple(row.get(name) for name in ("path", "split", "sample")): row for row in rows}.values())
    if not once:
        return None
    columns = [name for name in ("path", "split", "sample", "epoch", "reason") if any(name in row for row in once)]
    cells = [[row.get(name) for name in columns] for row in once[:MAX_QUARANTINE_ROWS]]
    note = "" if len(cells) == len(once) else f"The first {len(cells)}; the run's quarantine folder lists all."
    return Table(f"Quarantined files: {len(once):,}", columns, cells, note, fold=len(once) > 20)


# ---- text and files ------------------------------------------------------------------------------------------------
def show_number(name: str, value: Any) -> str:
    """Return a value as text: large counts short (24.3 M), floats to four digits, dicts on one line, None as a dash."""
    if value is None or value == "" or value == {}:
        return "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {show_number(str(key), inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(show_number(name, inner) for inner in value)
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


def percent_text(value: Any) -> str:
    return f"{value:.1f} %" if is_finite(value) else "–"


def key(row: Mapping[str, Any]) -> str:
    return " · ".join(str(row[name]) for name in ("run", "variant") if row.get(name))
