"""Progress of a run on a terminal: a bar with samples/s, time spent waiting for data and ETA; a few lines elsewhere.

`follow` polls the run's progress actor, to which rank 0 reports, from a thread of the driver. The run itself does not
depend on this file.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ray
from ray import exceptions
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

Tell = Callable[[Mapping[str, Any]], None]


def make_bar(console: Console) -> Progress:
    """Return a progress bar with slimray's columns; it shows nothing when `console` is not a terminal."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


@contextlib.contextmanager
def follow(actor: Any, title: str, console: Console, tell: Tell = lambda event: None) -> Iterator[None]:
    """Show the progress reported to `actor` until the block ends; call `tell` with notices and waits."""
    done = threading.Event()
    thread = threading.Thread(target=_poll, args=(actor, title, console, done, tell), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=5)


def _poll(actor: Any, title: str, console: Console, done: threading.Event, tell: Tell) -> None:
    shown: dict[str, Any] = {}
    heard, waits, over = 0, "", False
    started: tuple[float, float] | None = None
    with make_bar(console) as bar:
        task = bar.add_task(f"{title}: starting workers", total=1, note="")
        while not over:
            over = done.wait(0.5)  # the last report is read once more after the end
            try:
                state: Any = ray.get(actor.read.remote(), timeout=5)
            except (exceptions.RayError, TimeoutError):
                continue
            news = state.get("news", [])
            for one in news[heard if heard <= len(news) else 0 :]:  # an actor that was restarted has no news
                console.print(f"{title}: {one['note']}", highlight=False, markup=False)
                if one["preempted"]:
                    tell({"state": "preempted", "message": one["note"]})
            heard = len(news)
            if state.get("waits_for", "") != waits:
                waits = state["waits_for"]
                tell({"state": "waiting", "message": waits})
            if not state.get("steps"):
                continue
            last = state.get("last") or {}
            if last and last != shown and console.is_terminal:
                shown = last
                numbers = "  ".join(f"{k} {v:.2f}" for k, v in last.items() if k.startswith("val/"))
                console.print(f"{title}: epoch {last['epoch']}/{state['epochs']}  {numbers}", highlight=False)
            passed = state["epoch"] + (state["step"] / state["steps"] if state["phase"] == "train" else 1)
            started = started or (time.monotonic(), passed)
            bar.update(
                task,
                description=f"{title}: {state['phase']} epoch {state['epoch'] + 1}/{state['epochs']}",
                completed=state["step"],
                total=state["steps"],
                note=_note(state, passed, started),
            )


def _note(state: dict[str, Any], passed: float, started: tuple[float, float]) -> str:
    """Return a text like `123 samples/s, 4 % waiting for data, 2:10 left`."""
    parts = []
    if "samples_per_s" in state:
        parts += [f"{state['samples_per_s']:.1f} samples/s", f"{100 * state['wait']:.0f} % waiting for data"]
    if passed > started[1]:
        left = (time.monotonic() - started[0]) / (passed - started[1]) * max(0.0, state["epochs"] - passed)
        parts.append(f"{int(left) // 60}:{int(left) % 60:02d} left")
    return ", ".join(parts)
