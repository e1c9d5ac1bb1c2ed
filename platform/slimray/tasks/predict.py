"""`predict` with a run's network: its task answers for files, one after the other. Needs torch, but not Ray."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from slimray.runtime.answers import Answer
from slimray.runtime.predict import answers_for
from slimray.spec import UserError
from slimray.tasks import TASKS
from slimray.tasks.network import Network
from slimray.tasks.task import search_options


def answer_lines(network: Network) -> Callable[[str], str] | None:
    """Return a function from a line of text to the network's answer; None if its task answers for files."""
    lines = TASKS[network.task].lines
    if lines is None:
        return None
    _require_no_supernet(network)
    return lines(network)


def searching(network: Network, given: Mapping[str, Any], where: str) -> Network:
    """Return a network with other search options; UserError, with `where`, for invalid ones."""
    return replace(network, recipe=network.recipe | search_options(TASKS[network.task], given, where))


def _require_no_supernet(network: Network) -> None:
    if hasattr(network.net, "space"):
        raise UserError("this run holds a supernet, choose subnets with a search job and predict with one of them")


def predict_files(network: Network, paths: Sequence[Path], k: int, **options: Any) -> Iterator[Answer]:
    """Return an iterator over the answers of a network for files; `options` are those of `answers_for`."""
    _require_no_supernet(network)
    return answers_for(network, TASKS[network.task], paths, k, **options)
