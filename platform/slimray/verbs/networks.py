"""The network of a training before it starts: built on the meta device, compared with the data, counted.

In: a training, the card of its dataset and, if known, the number of its samples. Out: the values that `check` prints
and workers get: parameters, MACs, input, batch, learning rate, steps. torch, no Ray.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

from slimray import compress, models, runs
from slimray.data.cards import Card
from slimray.data.modalities import MODALITIES, input_shape
from slimray.data.plan import ceil_div
from slimray.data.spec import DataSpec
from slimray.data.video.clips import DENSE_WINDOW
from slimray.edge import cost
from slimray.edge.compiler import without_compiler
from slimray.spec import UserError, did_you_mean, lookup, parse
from slimray.tasks import task_of_card, task_options
from slimray.train import optimizers
from slimray.train.methods import hebbian
from slimray.train.planner import Summary
from slimray.verbs import inputs
from slimray.verbs.context import CheckContext
from slimray.verbs.inputs import make_recipe
from slimray.verbs.specs import OWNED, ModelSpec, TrainJob

UNKNOWN = 8  # placeholder for numbers that only a missing dataset defines: classes, tokens
KEPT = "data/network.json"  # the network of `model.run` as the first attempt read it


Job = TypeVar("Job", bound="HasNetwork")


class HasNetwork(Protocol):
    """A job with a network to train and the data to train it on."""

    @property
    def model(self) -> ModelSpec: ...
    @property
    def data(self) -> DataSpec: ...
    def model_copy(self: Job, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Job: ...


def with_network(job: Job, storage: str, kept: runs.Run | None = None) -> Job:
    """Return `job` with the network of `model: {run: NAME}` written out, and samples at the resolution of that network.

    `kept` is the folder of the job's own run: later attempts read there what the first one read, even if the run NAME
    has changed. UserError if NAME has not finished or holds no network.
    """
    if job.model.run is None:
        return job
    if kept is not None and runs.exists(kept, KEPT):
        model = models.stored(json.loads(runs.read_file(kept, KEPT)))
    else:
        found = inputs.finished_run(job.model.run, storage, ("network", "supernet"), "model.run")
        model = {k: v for k, v in inputs.read_model(found, "model.run").items() if k not in OWNED}
        if "compression" in model:  # old masks and codebooks do not apply to new weights
            model["compression"] = compress.shaping(model["compression"])
        if kept is not None:
            runs.write_file(kept, KEPT, json.dumps(model).encode())
    side = _side(model)
    data = job.data if side is None else job.data.at_size(int(side))
    return job.model_copy(update={"model": ModelSpec.model_validate(model), "data": data})


def with_network_if_there(job: Job, ctx: CheckContext, card: Card | None) -> Job | None:
    """Return the result of `with_network`, or None if an earlier job of the file makes the network.

    UserError if the run holds no network, or if its network takes samples of another modality than those of `card`.
    """
    name = job.model.run
    made = None if name is None else ctx.require(name, ("network", "supernet"), "model.run")
    if made is None:
        return with_network(job, ctx.storage)
    if made.card is not None and card is not None:
        sample = parse(Card, made.card, "model.run").sample
        if sample != card.sample:
            takes, gives = MODALITIES[sample].plural, MODALITIES[card.sample].plural
            raise UserError(f"model.run: {name!r} takes {takes}, the dataset has {gives}")
    return None


def given_of(job: HasNetwork, card: Card | None) -> dict[str, Any] | None:
    """Return the arguments that the task gives a network (`num_classes`, ...); None if that needs a missing dataset."""
    return None if card is None else task_of_card(card).arguments(card, task_options(card, job.data.task))


def model_options(job: TrainJob, card: Card | None) -> dict[str, Any]:
    """Return the arguments of `compress.build` for this job; UNKNOWN for those that its task cannot give yet."""
    needs = models.required(str(job.model.name))
    given = given_of(job, card)
    if given is None:
        given = dict.fromkeys(needs, UNKNOWN)
    for option in needs:
        if option not in given and card is not None:
            task = task_of_card(card).name
            raise UserError(f"name: {job.model.name} needs {option}, which the task {task} lacks: use another network")
    options = {**{option: given[option] for option in needs}, **_channels_of(job, card), **job.model.options()}
    if job.optim.zero_gamma:
        options["zero_gamma"] = True
    return models.explicit({"name": job.model.name, **options})


def _channels_of(job: TrainJob, card: Card | None) -> dict[str, int]:
    """Return the option `in_channels` of a network of pixels, from the dataset; {} if it does not apply."""
    channels = None if card is None else _pixel_channels(card)
    known = "in_channels" in models.options_of(str(job.model.name))
    return {"in_channels": channels} if channels is not None and known else {}


def _pixel_channels(card: Card) -> int | None:
    """Return the channels of the samples of a dataset; None for samples without pixels."""
    return card.channels if MODALITIES[card.sample].in_channels is not None else None


def summary(job: TrainJob, card: Card | None, num_train: int | None) -> Summary:
    """Return what is known before the training runs: parameters, MACs, batch, learning rate, steps.

    Parameters and MACs need the number of classes (from the dataset), steps need `num_train`. UserError, with the
    field, for a network that cannot be built or does not fit the data.
    """
    given = given_of(job, card)
    _require_tokens(job, card)
    _require_weights(job, card)
    _require_metrics(job, card)
    row = models.MODELS.get(str(job.model.name))
    if card is None and row is not None and MODALITIES[row.input].early_input is None:
        return Summary(str(job.model.name))  # only the dataset defines the shape of its samples
    net, macs = _measure(job, card)
    out = dataclasses.replace(schedule(job, num_train), input=_input_shape(job, card, net))
    if given is None:
        return out
    classes = card.num_classes or None if card is not None else None
    return dataclasses.replace(out, classes=classes, params=cost.count_params(net), macs=macs)


def schedule(job: TrainJob, num_train: int | None) -> Summary:
    """Return what is known without the network: batch, accumulation, learning rate, epochs, steps."""
    run = job.model.run
    out = Summary(
        str(job.model.name) if run is None else f"that of {run}",
        batch=job.batch.size,
        accumulation=ceil_div(job.batch.num_microbatches, job.scale.most),
        peak_lr=optimizers.peak_rate(job.optim, job.batch.size),
        epochs=job.optim.epochs or None,
        steps=job.optim.steps,
    )
    if num_train is not None and job.batch.tokens:
        out = dataclasses.replace(out, train_samples=num_train)
    elif num_train is not None:
        steps = num_train // job.batch.total if job.batch.drop_last else ceil_div(num_train, job.batch.total)
        if not steps:
            raise UserError(
                f"batch.drop_last: {num_train} training samples do not fill a batch of {job.batch.total}: lower "
                "batch.total, or leave it out"
            )
        total = job.optim.steps or steps * job.optim.epochs
        numbers = {"train_samples": num_train, "epochs": ceil_div(total, steps), "steps_per_epoch": steps}
        out = dataclasses.replace(out, **numbers, steps=total)
    return out


def on_meta(job: TrainJob, card: Card | None) -> Any:
    """Return the network of `job` on the meta device, without values."""
    return cost.build_on_meta(lambda: compress.build(**model_options(job, card)))


def _side(model: Mapping[str, Any]) -> int | None:
    """Return the resolution of a subnet, in pixels, if its arch has one; None otherwise, or if it cannot be built."""
    if not model.get("arch") or model["name"] not in models.MODELS:
        return None
    supernet: dict[str, Any] = dict.fromkeys(models.required(model["name"]), UNKNOWN)
    supernet |= {key: value for key, value in model.items() if key not in ("arch", "compression")}
    try:
        space: Any = cost.build_on_meta(lambda: models.build(**supernet)).space
        name = space.input_name("side")
        return None if name is None else space.arch(model["arch"]).get(name)
    except (UserError, RuntimeError, ValueError, AttributeError):  # building the network raises the error
        return None


def _measure(job: TrainJob, card: Card | None) -> tuple[Any, int]:
    """Return the network on the meta device and its MACs; UserError with the field if it cannot be built or does not
    fit the data."""
    name, options = str(job.model.name), job.model.options()
    try:
        row = lookup(models.MODELS, name, "model")
    except UserError as error:
        raise UserError(f"model.name: {error} (`slimray explain models` lists them)") from None
    sample = row.input if card is None else card.sample
    modality = MODALITIES[sample]
    task = None if card is None else task_of_card(card)
    if job.optim.mutual and task is not None and not task.logits:
        raise UserError(f"optim.mutual: is for classes of samples or points, not for {task.name}: leave it out")
    if row.input != sample:
        raise UserError(f"model.name: {name} takes {MODALITIES[row.input].plural}, the dataset has {modality.plural}")
    if card is not None and row.sides not in (0, card.sides):
        gives = ("plain texts (sides: 1)", "texts with translations (sides: 2)")
        raise UserError(f"model.name: {name} takes {gives[row.sides - 1]}, the dataset has {gives[card.sides - 1]}")
    known = models.options_of(name)
    for option in options:
        if option in OWNED:
            raise UserError(f"model.{option}: is not an option here, {OWNED[option]}")
        if option in (given_of(job, card) or ()):
            raise UserError(f"model.{option}: is not an option here, write data.task.{option}")
        if option not in known and option != "compression":
            raise UserError(f"model.{option}: {name} has no such option{did_you_mean(option, set(known) - set(OWNED))}")
    side = _side({"name": name, **options})
    if side is not None and job.data.size != side:
        raise UserError(f"data.size: must be {side}, the resolution of model.arch (got {job.data.size})")
    channels = modality.in_channels if card is None else _pixel_channels(card)
    if channels is not None and options.get("in_channels", channels) != channels:
        given, count = options["in_channels"], f"{channels} channel{'s' if channels > 1 else ''}"
        raise UserError(f"model.in_channels: the {modality.plural} have {count} (got {given!r})")
    try:
        net = cost.build_on_meta(lambda: compress.build(**model_options(job, card)))
    except UserError as error:
        raise UserError(f"model.{str(error).removeprefix(f'model {name}: ')}") from None
    except (RuntimeError, ValueError) as error:
        raise UserError(f"model: {name} cannot be built with these options ({_first_line(error)})") from None
    if job.optim.hebbian and not hebbian.applies(net):
        raise UserError(f"optim.hebbian: needs an adaptive softmax (micronet_lm), {name} has none: leave it out")
    shape = _input_shape(job, card, net)
    if modality.segmented and job.data.sampling == "dense" and shape[0] > DENSE_WINDOW:
        raise UserError(f"model.num_segments: at most {DENSE_WINDOW} frames with data.sampling: dense (got {shape[0]})")
    with without_compiler():
        optimizers.make_optimizer(net, job.optim, job.batch.size)  # raises UserError for missing parameter groups
    try:
        return net, cost.count_macs(net, (1, *shape))
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"model: {name} does not take {modality.plural} of {' x '.join(map(str, shape))}: change data or its "
            f"options ({_first_line(error)})"
        ) from None


def _input_shape(job: TrainJob, card: Card | None, net: Any) -> tuple[int, ...]:
    """Return the shape of a sample as the network takes it: (T, 3, H, W), (C, H, W) or (C, N)."""
    modality = MODALITIES[models.MODELS[str(job.model.name)].input]
    segments = net.num_segments if modality.segmented else 0
    if modality.early_input is not None:
        return modality.early_input(job.data, segments)
    assert card is not None  # `summary` builds no such network without a dataset
    return input_shape(make_recipe(job.data, card, segments, "train"))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _require_tokens(job: TrainJob, card: Card | None) -> None:
    """Raise UserError for batches counted in tokens of samples without tokens, or shorter than the longest sample."""
    most = job.batch.per_worker_tokens
    if card is None or most is None:
        return
    if MODALITIES[card.sample].pad is None:
        raise UserError(f"batch.tokens: is for texts, {card.name} has {MODALITIES[card.sample].plural}: write total")
    longest = max(card.text.lengths.values()) if card.text is not None else 0
    if longest > most:
        raise UserError(
            f"batch.per_worker_tokens: {most} is less than the length of the longest sample ({longest}): raise it, or "
            "prepare the dataset with a lower text.max_tokens"
        )


def _require_metrics(job: TrainJob, card: Card | None) -> None:
    """Raise UserError for a best metric that the task does not have, or if its outputs are not probabilities."""
    task, named = None if card is None else task_of_card(card), job.checkpoint.best_metric
    if task is None:
        return
    known = [f"val/{metric.name}" for metric in task.metrics]
    if named is not None and named not in known:
        hint = did_you_mean(named, known) or f": use one of {', '.join(known)}"
        raise UserError(f"checkpoint.best_metric: the task {task.name} has no {named!r}{hint}")
    if job.average != "logits" and not task.logits:
        raise UserError(f"average: prob is for classes, not for {task.name}: leave it out")


def _require_weights(job: TrainJob, card: Card | None) -> None:
    weights, num_classes = job.optim.class_weights, card.num_classes if card is not None else 0
    task = None if card is None else task_of_card(card)
    if weights is not None and task is not None and not task.logits:
        raise UserError(f"optim.class_weights: are for classes, not for {task.name}: leave it out")
    if weights == "balanced" and task is not None and not task.index_labels:
        raise UserError("optim.class_weights: balanced counts samples, but here points have labels: write numbers")
    if not isinstance(weights, tuple):
        return
    if num_classes and len(weights) != num_classes:
        raise UserError(f"optim.class_weights: {len(weights)} weights, the dataset has {num_classes} classes")
    if min(weights, default=0) < 0 or not any(weights):
        raise UserError("optim.class_weights: must be numbers >= 0, at least one of them above 0")
