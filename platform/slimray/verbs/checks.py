"""Checks that several verbs share: the dataset of a job, its starting weights, and the teacher that it names.

Each searches the earlier jobs of the file first, then the storage. No Ray, no torch.
"""

import json
from collections.abc import Callable
from typing import Any, Protocol

from slimray import runs
from slimray.data.cards import Card
from slimray.data.modalities import MODALITIES, Modality, modality_of
from slimray.data.spec import DataSpec
from slimray.spec import UserError, located, parse
from slimray.train.spec import InitSpec, TeacherSpec
from slimray.verbs import inputs
from slimray.verbs.context import CheckContext, Made

WEIGHTS = ("network", "supernet")  # runs whose weights a training can start from


class Training(Protocol):
    """A job that trains on a dataset."""

    @property
    def name(self) -> str: ...
    @property
    def data(self) -> DataSpec: ...
    @property
    def init(self) -> InitSpec | None: ...


def check_training(
    job: Training,
    ctx: CheckContext,
    known: Callable[[Card | None, int | None], dict[str, Any]],
    network: Callable[[Card | None], Any] | None = None,
) -> dict[str, Any]:
    """Return what is known of a training: its dataset, and the result of `known(card, number of training samples)`.

    `network` builds the network on the meta device, so that `check` can compare it with its starting weights. Problems
    with dataset, network and starting weights are all collected; none of them hides another.
    """
    out: dict[str, Any] = {}
    card, counts, fingerprint, splits = None, {}, {}, None
    if isinstance(job.data.card, dict):
        card = parse(Card, job.data.card, f"{ctx.where}: data.card")
    with ctx.noting():
        if job.data.run is not None and (made := ctx.require(job.data.run, ("dataset",), "data.run")):
            counts = made.samples
            inputs.require_splits(f"data: {job.data.run}", made.splits, split_names(job.data))
        else:
            splits = inputs.open_splits(job.data, ctx.where, ctx.storage, split_names(job.data))
            card, counts = splits.card, {name: table.num_rows for name, table in splits.tables.items()}
            card.flip_labels()
            fingerprint = {"fingerprint": splits.fingerprint}
            for split, table in splits.tables.items() if ctx.look else ():
                if absent := inputs.absent_samples(table, splits.root):
                    raise UserError(f"data.root: a file of split {split!r} is missing ({absent[0]})")
    out |= {"dataset": card.name} if card is not None else {}
    with ctx.noting():
        out |= known(card, counts.get(job.data.train))
        if splits is not None and (taken := out.get("input")):
            notes = inputs.notes_of_splits(job.data, splits, taken[0])
            out |= {"notes": notes} if notes else {}
    with ctx.noting():
        _check_init(job.init, ctx, None if network is None else lambda: network(card))
    return out | fingerprint


def split_names(data: DataSpec) -> list[str]:
    """Return the names of the splits that a `data` section trains and validates on."""
    return [name for name in (data.train, data.val) if name is not None]


def _check_init(init: InitSpec | None, ctx: CheckContext, network: Callable[[], Any] | None) -> None:
    """Raise UserError if the weights of `init` are missing, or, with `ctx.look`, cannot be read or do not fit.

    A URL is not fetched for this check.
    """
    if init is None or init.source.startswith(("http://", "https://")):
        return
    if ctx.require(init.source, WEIGHTS, "init.from") is not None:
        return
    try:
        path = runs.weights_source(init.source, ctx.storage, init.sha256)
        if ctx.look:
            from slimray.models import published

            if network is None:
                published.require_finite(published.read(path), path)
            else:
                published.load(network(), path, init.exclude)
    except UserError as error:
        raise UserError(located(str(error), "init.from")) from None


def check_teacher(teacher: str | TeacherSpec | None, ctx: CheckContext, card: Card | None) -> None:
    """Raise UserError if the teacher's network is missing, or is for another task, modality, classes or tokenizer.

    `card` is the dataset of the student; None if only an earlier job of the file will know it.
    """
    name = teacher.run if isinstance(teacher, TeacherSpec) else teacher
    if name is None:
        return
    from slimray.tasks import task_of_card

    task = None if card is None else task_of_card(card)
    if task is not None and not task.logits and task.taught is None:
        raise UserError(
            f"teacher: works for classes of samples, points or tokens, not for the task {task.name}: leave it out"
        )
    made = ctx.require(name, ("network",), "teacher")
    taught = _taught(name, ctx) if made is None else _will_be_taught(made)
    if task is None or card is None or taught is None:
        return
    its_task, takes, num_classes, tokenizer = taught
    if its_task != task.name:
        raise UserError(f"teacher: {name!r} is for the task {its_task}, the dataset for {task.name}: name another run")
    if takes is not (gives := MODALITIES[card.sample]):
        raise UserError(f"teacher: {name!r} takes {takes.plural}, the dataset has {gives.plural}: name another run")
    if num_classes and card.num_classes and num_classes != card.num_classes:
        raise UserError(f"teacher: {name!r} has {num_classes} classes, the dataset has {card.num_classes}")
    if tokenizer is not None and card.text is not None and card.text.tokenizer != tokenizer:
        raise UserError(
            f"teacher: {name!r} has another tokenizer than {card.name}: prepare the dataset with `text.like`, the one "
            "that it was trained on"
        )


def _taught(name: str, ctx: CheckContext) -> tuple[str, Modality, int, str | None]:
    """Return task, modality, number of classes and tokenizer (None without one) of the network of a run.

    UserError if the run holds no network.
    """
    from slimray.tasks.network import task_of

    try:
        taken = json.loads(runs.read_file(runs.find_run(name, ctx.storage), "model/input.json"))
        recipe = taken["recipe"]
        return task_of(taken), modality_of(recipe), len(taken["classes"]), recipe.get("tokenizer")
    except (FileNotFoundError, KeyError, ValueError, TypeError, AttributeError, UserError):
        raise UserError(f"teacher: {name!r} is not a run that holds a network: name a finished training") from None


def _will_be_taught(made: Made) -> tuple[str, Modality, int, str | None] | None:
    """Return the same for a network that an earlier job of the file makes, with None as tokenizer; return None if its
    dataset is not known yet."""
    from slimray.tasks import task_of_card

    if made.card is None:
        return None
    card = parse(Card, made.card, "teacher")
    return task_of_card(card).name, MODALITIES[card.sample], card.num_classes or 0, None
