"""`kind: evaluate`: finished runs scored on a split, side by side, with pictures of what they saw.

Reads the model folders of `runs` and their dataset (or another one), writes results.json and a report. The test
protocols are those of arXiv 1811.08383 (views = clips x crops); `frame_orders: [natural, shuffled]` shows whether a
network uses motion: without order, only what single frames tell is left.
"""

import base64
import contextlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import ray
import ray.train
import torch
from pydantic import Field, model_validator
from ray.train.torch import get_device

from slimray import loop, predict, report, runs, workers
from slimray.data.pipeline import FeedConfig, Source
from slimray.data.plan import Phase
from slimray.data.samples import input_shape, sample_shape
from slimray.edge import cost
from slimray.jobs.inputs import DataSpec, Splits, open_splits
from slimray.progress import follow
from slimray.spec import RunFailed, Spec, UserError, located, parse


class EvaluateJob(Spec):
    """Score finished training runs on one split."""

    kind: Literal["evaluate"]
    name: str
    """Name of this evaluation, a folder of the storage."""
    runs: tuple[str, ...] = Field(min_length=1)
    """Training runs, by name or URI."""
    data: DataSpec | None = None
    """Another dataset than the one the first run was trained on."""
    split: str | None = None
    """Split to score; default the validation split."""
    clips: Literal[1, 2, 10] = 1
    """Clips per video: 1, 2 (centre and left edge of each segment) or 10 (dense sampling)."""
    crops: Literal[1, 3, 5, 10] = 1
    """Crops per frame: centre, three, five, or five and their mirror images."""
    size: int | None = Field(None, ge=16, le=1024)
    """Side of the crop in pixels, if not the trained one (256 for the "full resolution" protocol)."""
    average: Literal["logits", "prob"] = "logits"
    """How views become one score."""
    frame_orders: tuple[Literal["natural", "shuffled"], ...] = Field(("natural",), min_length=1)
    """Orders of the frames to score; `shuffled` takes the motion away."""
    batch: int = Field(16, ge=1)
    """Samples a worker handles at once."""
    pictures: int = Field(12, ge=0, le=100)
    """Clips shown in the report, per run."""
    scale: workers.ScaleSpec = workers.ScaleSpec()

    @model_validator(mode="after")
    def _sections_fit(self) -> "EvaluateJob":
        for field in ("runs", "frame_orders"):
            values = getattr(self, field)
            if len(set(values)) < len(values):
                raise ValueError(f"{field}: one is named twice ({', '.join(values)})")
        return self


@dataclass(frozen=True)
class _Case:
    """One pass: a run, an order of frames."""

    run_uri: str
    run_name: str
    order: str


@dataclass(frozen=True)
class _Config:
    run_uri: str
    attempt: int
    cases: tuple[_Case, ...]
    phases: tuple[Phase, ...]
    source: Source
    average: str
    batch: int
    pictures: int
    scale: workers.ScaleSpec
    decode_slots: int
    decode_timeout_s: float
    board: Any


def facts(job: EvaluateJob, where: str, storage: str, ahead: Mapping[str, Any]) -> dict[str, Any]:
    """What can be known before machines are asked for; UserError for runs, data or views that do not fit together.

    `ahead` are the jobs by name that will have run before this one; of the others the run folders are read.
    """
    out: dict[str, Any] = {"runs": list(job.runs), "views": job.clips * job.crops, "orders": list(job.frame_orders)}
    for name in (name for name in job.runs if name in ahead):
        if ahead[name].kind != "train":
            raise UserError(f"{where}: runs: {name!r} is of kind {ahead[name].kind}, there is no network to score")
        _require_views(job, where, name, ahead[name].data.sampling)
    found = _find(job, where, storage, ahead)
    known = {}
    for one in found:
        taken = _taken(one, where)
        _require_views(job, where, one.name, taken["recipe"].get("sampling", "uniform"))
        known[one.name] = tuple(taken["classes"])
    waits = job.data.run in ahead if job.data is not None else job.runs[0] in ahead
    if not waits:
        _, split, splits = _open_data(job, where, storage, found)
        for name, classes in known.items():
            _require_classes(where, name, classes, splits)
        out |= {"dataset": splits.card.name, "split": split, "samples": splits.tables[split].num_rows}
    return out


def _find(job: EvaluateJob, where: str, storage: str, ahead: Mapping[str, Any]) -> list[runs.Run]:
    """The finished runs of `job`, those of `ahead` left out; UserError for others, or two of one name."""
    try:
        found = [runs.find_run(name, storage) for name in job.runs if name not in ahead]
    except UserError as error:
        raise UserError(located(str(error), f"{where}: runs")) from None
    names = [*ahead.keys() & set(job.runs), *(one.name for one in found)]
    for one in found:
        if names.count(one.name) > 1:
            raise UserError(f"{where}: runs: two of them are named {one.name!r}: score them apart")
        status = runs.read_status(one)
        if status is None or status.state != "finished":
            raise UserError(f"{where}: runs: {one.name!r} has not finished: run it first")
        if not runs.exists(one, "model/input.json"):
            raise UserError(f"{where}: runs: {one.name!r} is no training run, there is no network to score")
        if not runs.exists(one, "model/weights.safetensors"):
            raise UserError(f"{where}: runs: {one.name!r} has lost its model/weights.safetensors: train it again")
    return found


def _taken(one: runs.Run, where: str) -> dict[str, Any]:
    """What the network of a run takes, without its weights."""
    try:
        taken = json.loads(runs.read_file(one, "model/input.json"))
        return {"recipe": dict(taken["recipe"]), "classes": list(taken["classes"])}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: runs: {one.uri}/model/input.json is damaged ({error}): train it again") from None


def _open_data(job: EvaluateJob, where: str, storage: str, found: list[runs.Run]) -> tuple[DataSpec, str, Splits]:
    """The data section, the split and its index: those of the job, else of the first run."""
    data = job.data
    if data is None:
        data = parse(DataSpec, runs.read_job(found[0]).get("data") or {}, f"{found[0].uri}/job.yaml: data")
    split = job.split or data.val or data.train
    return data, split, open_splits(data, where, storage, [split])


def _require_views(job: EvaluateJob, where: str, name: str, sampling: str) -> None:
    wanted = {2: "uniform", 10: "dense"}.get(job.clips, sampling)
    if sampling != wanted:
        raise UserError(f"{where}: clips: {job.clips} is for {wanted} sampling, {name!r} was trained with {sampling}")


def _require_classes(where: str, name: str, classes: tuple[str, ...], splits: Splits) -> None:
    if classes != tuple(splits.card.class_names()):
        raise UserError(f"{where}: runs: {name!r} knows other classes than {splits.card.name}: score it apart")


def run(job: EvaluateJob, ctx: Any) -> None:
    """Score every run of `job` and write the comparison to the run folder `ctx.run`."""
    found = _find(job, ctx.where, ctx.storage, {})
    trained = [predict.load_network(one) for one in found]
    data, split, splits = _open_data(job, ctx.where, ctx.storage, found)
    names = tuple(splits.card.class_names())
    for one, network in zip(found, trained, strict=True):
        _require_classes(ctx.where, one.name, network.classes, splits)
        _require_views(job, ctx.where, one.name, network.recipe.get("sampling", "uniform"))
    table = splits.tables[split]
    workers.connect(ctx.cpus)
    slots = workers.decode_slots(job.scale)
    workers.require(job.scale, slots)
    cases, phases = [], []
    for one, network in zip(found, trained, strict=True):
        for order in job.frame_orders:
            cases.append(_Case(one.uri, one.name, order))
            total = job.batch * job.scale.workers
            phases.append(Phase("eval", "eval", 0, table.num_rows, total, False, _recipe(job, network, order)))
    board = workers.make_board()
    config = _Config(
        run_uri=ctx.run.uri,
        attempt=ctx.attempt,
        cases=tuple(cases),
        phases=tuple(phases),
        source=Source(splits.root, ray.put(table), table.num_rows),
        average=job.average,
        batch=job.batch,
        pictures=job.pictures,
        scale=job.scale,
        decode_slots=slots,
        decode_timeout_s=data.decode_timeout_s,
        board=board,
    )
    with follow(board, job.name, ctx.console):
        result = workers.launch(_worker, config, job.scale, job.name, board)
    by_name = {one.name: network for one, network in zip(found, trained, strict=True)}
    for row in result["rows"]:
        network = by_name[row["run"]]
        shape = input_shape(_recipe(job, network, row["variant"]))
        row |= {"params": cost.count_params(network.net), "macs": cost.count_macs(network.net, (1, *shape))}
        row |= {"chance": 100 / len(names), "views": job.clips * job.crops, "split": split}
        row |= {"num_quarantined": table.num_rows - row["num_samples"]}
    if not all(row["num_samples"] for row in result["rows"]):
        raise RunFailed(f"no file of split {split!r} decodes: see quarantine/ in the run folder")
    results = {
        "rows": result["rows"],
        "classes": list(names),
        "confusion": result["confusion"],
        "clips": result["clips"],
        "clouds": result["clouds"],
    }
    ctx.finish({"metrics": {"rows": result["rows"]}, "dataset": {"fingerprint": splits.fingerprint}}, results)
    runs.write_report(ctx.run, report.evaluate_report(ctx.run))


def _recipe(job: EvaluateJob, network: predict.Network, order: str) -> dict[str, Any]:
    """The run's own recipe, with the views and the frame order of this evaluation."""
    if network.recipe["kind"] != "clip":
        return network.recipe
    plain = job.clips == 1 and job.crops == 1
    recipe = network.recipe | {"mode": "val" if plain else "test", "num_clips": job.clips, "crops": job.crops}
    if job.size:
        recipe |= {"size": job.size, "resize": max(job.size, recipe["resize"])}
    return recipe | {"frame_order": order, "flip": False}


# --------------------------------------------------------------------------------------------- on the workers


def _worker(config: _Config) -> dict[str, Any]:
    """Score all cases on this rank's part of the split; rank 0 returns the merged results."""
    context, device = ray.train.get_context(), get_device()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(max(1, int(config.scale.cpus_per_worker)))
    views = max(sample_shape(phase.recipe)[0] for phase in config.phases)
    rows = max(1, config.batch // views)  # views of a sample are scored together
    feed = FeedConfig(
        phases=config.phases,
        sources={"eval": config.source},
        seed=0,
        world=world,
        max_rows=rows,
        decode_slots=config.decode_slots,
        decode_timeout_s=config.decode_timeout_s,
        wait_timeout_s=config.scale.data_timeout_s,
    )
    out: dict[str, Any] = {"rows": [], "confusion": {}, "clips": [], "clouds": []}
    network, score, number, case = None, None, -1, config.cases[0]
    bad: dict[int, dict[str, Any]] = {}  # sample -> its row of the quarantine
    quarantine = runs.PartWriter(runs.run_at(config.run_uri), "quarantine", config.attempt, rank)
    with workers.open_stream(feed) as stream, contextlib.closing(quarantine):
        for phase, step, batch in stream:
            if network is None or score is None:
                number += 1
                case = config.cases[number]
                network = predict.load_network(runs.run_at(case.run_uri), device)
                network = replace(network, pixels=replace(network.pixels, average=config.average))
                score = loop.make_score(network.recipe, len(network.classes))
            if batch is not None:
                for i in np.flatnonzero(~batch.valid):
                    if int(batch.sample[i]) not in bad:
                        bad[int(batch.sample[i])] = {"path": batch.path[i], "reason": batch.reason[i]}
                        quarantine.write(bad[int(batch.sample[i])])
                scores = loop.score_batch(network.net, batch, network.pixels, device, rows, score)
                shown = sum(one["run"] == case.run_name for one in (*out["clips"], *out["clouds"]))
                if rank == 0 and scores is not None and case.order == "natural" and shown < config.pictures:
                    for kind, picture in _pictures(case, network, batch, scores, config.pictures - shown):
                        out[kind].append(picture)
            if rank == 0:
                state = {"phase": case.run_name, "epoch": number, "epochs": len(config.cases)}
                config.board.update.remote(**state, step=step + 1, steps=phase.num_steps)
            if step + 1 == phase.num_steps:
                loop.merge_scores(score, world, device)
                numbers = score.result()
                out["rows"].append({"run": case.run_name, "variant": case.order, **_plain(numbers)})
                out["confusion"][f"{case.run_name} ({case.order})"] = score.confusion.tolist()
                network = score = None
    return out


def _plain(numbers: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a row; the only list among them is `class_iou`, None for a class that is not there."""
    return {k: v for k, v in numbers.items() if isinstance(v, int | float) or k == "class_iou"}


def _pictures(
    case: _Case, network: predict.Network, batch: Any, scores: torch.Tensor, most: int
) -> list[tuple[str, dict[str, Any]]]:
    """Where the first view of each of up to `most` valid samples goes in the results, and its picture."""
    kind, picture = {6: ("clips", _clip), 4: ("clouds", _cloud)}.get(batch.data.ndim, ("", None))
    if picture is None:
        return []
    chosen = list(zip(np.flatnonzero(batch.valid), scores, strict=True))[:most]
    return [(kind, picture(case.run_name, network, batch.data[i, 0], batch.label[i], one)) for i, one in chosen]


def _clip(run: str, network: predict.Network, view: np.ndarray, label: Any, scores: torch.Tensor) -> dict[str, Any]:
    """Frames `[T, H, W, 3]` as a filmstrip, with truth and the three best classes."""
    top = predict.top_classes(scores, network.classes, 3)
    return {"run": run, "frames_jpeg_base64": filmstrip(view), "truth": network.classes[int(label)], "top": top}


def _cloud(run: str, network: predict.Network, view: np.ndarray, label: Any, scores: torch.Tensor) -> dict[str, Any]:
    """Points `[C, N]`, x y z first, with the labels of scores `[C, N]`, or as a whole as a clip."""
    coords, classes = view[:3].T, network.classes
    if scores.ndim == 1:
        top = predict.top_classes(scores, classes, 3)
        return report.CloudView(run, coords, classes[int(label)], top=top).to_plain()
    return report.CloudView(run, coords, np.asarray(label), scores.argmax(0).cpu().numpy(), classes).to_plain()


def filmstrip(frames: np.ndarray, height: int = 96) -> str:
    """uint8 `[T, H, W, 3]` side by side as one JPEG of `height` pixels, base64 text."""
    from PIL import Image

    strip = Image.fromarray(np.concatenate(list(frames), axis=1))
    strip = strip.resize((round(strip.width * height / strip.height), height), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    strip.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()
