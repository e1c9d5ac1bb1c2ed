"""`kind: evaluate`: finished runs scored on a split, side by side, with pictures of what they saw.

Reads the model folders of `runs` and their dataset (or another one), writes results.json and a report. The test
protocols are those of arXiv 1811.08383 (views = clips x crops); `frame_orders: [natural, shuffled]` shows whether a
network uses motion: without order, only what single frames tell is left.
"""

import base64
import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import ray
import ray.train
import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from ray.train.torch import get_device

from slimray import runs
from slimray.data.modalities import input_shape, sample_shape
from slimray.data.pipeline import Batch, FeedConfig, Source
from slimray.data.plan import Phase
from slimray.data.spec import DataSpec
from slimray.edge import cost
from slimray.models.points.branches import branch_responses
from slimray.report import pages
from slimray.runs.notify import NotifySpec
from slimray.spec import RunFailed, Spec, UserError, located, parse
from slimray.tasks import predict
from slimray.tasks.frustum_boxes import FrustumScore
from slimray.tasks.parts import part_ranges
from slimray.tasks.segment import SegmentationScore
from slimray.tasks.votes import SceneVotes
from slimray.train import learn, loop, workers
from slimray.train.progress import follow
from slimray.train.spec import ScaleSpec
from slimray.verbs import boxes
from slimray.verbs.inputs import Splits, open_splits

EXPLAINED = 2  # clouds of a run that are shown with what the branches of its PVConvs respond to


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
    """Crops per frame or image: centre, three, five, or five and their mirror images."""
    size: int | None = Field(None, ge=16, le=1024)
    """Side of the crop in pixels, if not the trained one (256 for the "full resolution" protocol)."""
    average: Literal["logits", "prob"] = "logits"
    """How views become one score."""
    frame_orders: tuple[Literal["natural", "shuffled"], ...] = Field(("natural",), min_length=1)
    """Orders of the frames to score; `shuffled` takes the motion away."""
    votes: int = Field(0, ge=0, le=100)
    """Draws in which each point of a cloud is voted on, the surest answer wins (labels per point); published: 1 for
    S3DIS, over the windows of a room at both offsets, 10 for ShapeNet part. 0 scores one draw, as in training."""
    missed: Literal["wrong", "last_class"] = "wrong"
    """Points of a room that no window votes on: wrong for their own class, or as published for S3DIS also counted as
    predicted to be of the last class."""
    repeats: int = Field(1, ge=1, le=100)
    """Runs over the split with other random draws; their mean, deviation and best are told (KITTI as published: 20)."""
    batch: int = Field(16, ge=1)
    """Samples a worker handles at once."""
    pictures: int = Field(12, ge=0, le=100)
    """Clips, images or clouds shown in the report, per run."""
    scale: ScaleSpec = ScaleSpec()
    notify: NotifySpec | None = None

    @model_validator(mode="after")
    def _sections_fit(self) -> "EvaluateJob":
        for field in ("runs", "frame_orders"):
            values = getattr(self, field)
            if len(set(values)) < len(values):
                raise ValueError(f"{field}: one is named twice ({', '.join(values)})")
        if self.missed != "wrong" and not self.votes:
            raise ValueError("missed: belongs to votes: say how many")
        return self


@dataclass(frozen=True)
class _Case:
    """One pass: a run, an order of frames, which of its repeats."""

    run_uri: str
    run_name: str
    order: str
    repeat: int


@dataclass(frozen=True)
class _Config:
    run_uri: str
    attempt: int
    cases: tuple[_Case, ...]
    phases: tuple[Phase, ...]
    source: Source
    average: str
    votes: int
    missed: str
    parts: dict[str, range]
    batch: int
    pictures: int
    scale: ScaleSpec
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
        data = ahead[name].data
        if data.card is not None:  # else what its samples are is known when the run it reads is opened
            _require_views(job, where, name, data.sampling, data.card.get("sample", "clip"))
    found = _find(job, where, storage, ahead)
    known = {}
    for one in found:
        taken = _taken(one, where)
        _require_views(job, where, one.name, taken["recipe"].get("sampling", "uniform"), taken["recipe"]["kind"])
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
        if runs.read_job(one).get("kind") == "shrink":
            raise UserError(f"{where}: runs: {one.name!r} holds a supernet: score the subnets that a search job finds")
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


GIVEN = {"clip": "clips", "image": "images", "points": "clouds", "frustum": "frustums"}  # kinds of samples, in words


def _require_views(job: EvaluateJob, where: str, name: str, sampling: str, kind: str) -> None:
    """Raise UserError for a field of `job` that means nothing for samples of `kind`, or not for this `sampling`."""
    for field, kinds in (("clips", "clip"), ("frame_orders", "clip"), ("crops", "clip image"), ("votes", "points")):
        if kind not in kinds.split() and getattr(job, field) != EvaluateJob.model_fields[field].default:
            words = " and ".join(GIVEN[one] for one in kinds.split())
            raise UserError(f"{where}: {field}: is for {words}, {name!r} was trained on {GIVEN[kind]}: leave it out")
    if kind != "clip":
        return
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
        _require_views(job, ctx.where, one.name, network.recipe.get("sampling", "uniform"), network.recipe["kind"])
    table = splits.tables[split]
    workers.connect(ctx.cpus)
    slots = workers.decode_slots(job.scale)
    workers.require(job.scale, slots)
    cases, phases = [], []
    for one, network in zip(found, trained, strict=True):
        for order in job.frame_orders:
            recipe, total = _recipe(job, network, order, splits, split), job.batch * job.scale.most
            for repeat in range(job.repeats):
                cases.append(_Case(one.uri, one.name, order, repeat))
                phases.append(Phase("eval", "eval", repeat, table.num_rows, total, False, recipe))
    board = workers.make_board()
    config = _Config(
        run_uri=ctx.run.uri,
        attempt=ctx.attempt,
        cases=tuple(cases),
        phases=tuple(phases),
        source=Source(splits.root, ray.put(table), table.num_rows),
        average=job.average,
        votes=job.votes,
        missed=job.missed,
        parts=part_ranges(splits.card.parts),
        batch=job.batch,
        pictures=job.pictures,
        scale=job.scale,
        decode_slots=slots,
        decode_timeout_s=data.decode_timeout_s,
        board=board,
    )
    with follow(board, job.name, ctx.console):
        result = workers.launch(_worker, config, job.scale, job.name, board)
    by_run = {one.name: one for one in found}
    by_name = {one.name: network for one, network in zip(found, trained, strict=True)}
    if splits.card.sample == "frustum":
        _score_boxes(result, splits, split)
    result["rows"] = _joined(result["rows"])
    for row in result["rows"]:
        network = by_name[row["run"]]
        shape = input_shape(_recipe(job, network, row["variant"], splits, split))
        row |= {"params": cost.count_params(network.net), "macs": cost.count_macs(network.net, (1, *shape))}
        row |= {"chance": 100 / len(names), "views": job.clips * job.crops, "split": split}
        row |= {"num_quarantined": table.num_rows - row["num_samples"]}
        trained_with = runs.read_card(by_run[row["run"]]) or {}
        row |= {key: trained_with[key] for key in ("batch", "peak_lr") if key in trained_with}
    if not all(row["num_samples"] for row in result["rows"]):
        raise RunFailed(f"no file of split {split!r} decodes: see quarantine/ in the run folder")
    results = {
        "rows": result["rows"],
        "classes": list(names),
        "confusion": result["confusion"],
        "clips": result["clips"],
        "clouds": result["clouds"],
        "boxes": result["boxes"],
    }
    ctx.finish({"metrics": {"rows": result["rows"]}, "dataset": {"fingerprint": splits.fingerprint}}, results)
    runs.write_report(ctx.run, pages.evaluate_report(ctx.run))


def _score_boxes(result: dict[str, Any], splits: Splits, split: str) -> None:
    """Add KITTI's AP to the rows, and pictures from above, out of what the workers found."""
    objects = boxes.read_objects(splits.root, split)
    for row, found in zip(result["rows"], result["found"], strict=True):
        row["ap"] = boxes.average_precisions(found, objects)
        points = result["scenes"].get(row["run"], {})
        if row["repeat"] == 0:
            result["boxes"] += boxes.pictures(row["run"], points, found, objects)


def _joined(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per run and order: the mean of its repeats, with `repeats` (mean, std, max of each number) if several.

    `ap` holds mean, std and max always.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["run"], row["variant"]), []).append(row)
    out = []
    for same in groups.values():
        row = {k: v for k, v in same[0].items() if k != "repeat"}
        if "ap" in row:
            row["ap"] = boxes.summary([one["ap"] for one in same])
        if len(same) > 1:
            numbers = [{k: v for k, v in one.items() if isinstance(v, float)} for one in same]
            several = boxes.summary(numbers)
            row |= {name: value["mean"] for name, value in several.items()} | {"repeats": several}
        out.append(row)
    return out


def _recipe(job: EvaluateJob, network: predict.Network, order: str, splits: Splits, split: str) -> dict[str, Any]:
    """The run's own recipe, with the views and the frame order of this evaluation."""
    if network.recipe["kind"] == "points" and job.votes:
        most = int(np.max(splits.tables[split].column("frames").to_numpy()))
        fill = not splits.card.parts  # windows are voted on equally often, shapes by how many points they have
        return network.recipe | {"mode": "test", "votes": job.votes, "max_points": most, "fill": fill}
    if network.recipe["kind"] == "image":
        size, resize = job.size or network.recipe["size"], network.recipe["resize"]
        recipe = network.recipe | {"mode": "test", "crops": job.crops, "flip": False, "size": size}
        return recipe | {"resize": resize and max(size, resize)}  # 0 follows the size
    if network.recipe["kind"] != "clip":
        return network.recipe
    plain = job.clips == 1 and job.crops == 1
    recipe = network.recipe | {"mode": "val" if plain else "test", "num_clips": job.clips, "crops": job.crops}
    if job.size:
        recipe |= {"size": job.size, "resize": max(job.size, recipe["resize"])}
    return recipe | {"frame_order": order, "flip": False}


# --------------------------------------------------------------------------------------------- on the workers


class _Pass:
    """A case under way on this rank: its network, what counts hits, and the votes or boxes found so far."""

    def __init__(self, config: _Config, number: int, device: torch.device, rows: int):
        self.case, self.config, self.device, self.rows = config.cases[number], config, device, rows
        network = predict.load_network(runs.run_at(self.case.run_uri), device)
        self.network = replace(network, pixels=replace(network.pixels, average=config.average))
        self.score = loop.make_score(network.recipe, len(network.classes))
        self.votes: SceneVotes | None = None
        self.found: list[boxes.Detection] = []
        if config.phases[number].recipe.get("per_point") and config.votes:
            paths, batch = (
                ray.get(config.source.index, timeout=300).column("path").to_pylist(),
                config.phases[number].batch,
            )
            self.votes = SceneVotes(paths, batch, len(network.classes), config.parts)

    def take(self, batch: Batch, seed: tuple[int, int, int]) -> torch.Tensor | None:
        """Count the valid rows of `batch`; their scores, of the first view where views are votes, else None."""
        network = self.network
        if isinstance(self.score, FrustumScore):
            learn.seed_step(*seed)  # which points of the mask a network looks at
            pieces = loop.find_boxes(network.net, batch, network.pixels, self.device, self.rows, self.score)
            places = np.flatnonzero(batch.valid)
            for start, outputs in zip(range(0, len(places), self.rows), pieces, strict=True):
                chosen = places[start : start + self.rows]
                paths = [batch.path[i] for i in chosen]
                templates = network.net.size_templates
                self.found += boxes.detections_of(outputs, batch.label[chosen], paths, templates)  # type: ignore[arg-type]
            return None
        if self.votes is None:
            return loop.score_batch(network.net, batch, network.pixels, self.device, self.rows, self.score)
        first = []
        for i in np.flatnonzero(batch.valid):
            real = batch.label[i][1, :, 0] >= 0  # the others are blank views
            views, labels = batch.data[i][real], batch.label[i][:, real]
            scores = predict.predict_scores(network.net, views[:, None], network.pixels, self.device, self.rows)
            self.votes.add(int(batch.sample[i]), scores, labels)
            first.append(scores[0])
        return torch.stack(first) if first else None

    def end(self, world: int) -> tuple[dict[str, Any], Any, list[boxes.Detection]]:
        """The row of the table, the confusion if there is one, the boxes of all ranks. A collective."""
        score = self.score if self.votes is None else self.votes.score
        loop.merge_scores(score, world, self.device)
        found = [self.found]
        if isinstance(score, FrustumScore) and world > 1:
            found = [[] for _ in range(world)]
            dist.all_gather_object(found, self.found)
        row = {"run": self.case.run_name, "variant": self.case.order, "repeat": self.case.repeat}
        result = score.result()
        if isinstance(score, SegmentationScore) and self.config.missed == "last_class":
            result = score.result(missed_as_last=True)
        return row | _plain(result), loop.confusion_of(score), [one for part in found for one in part]


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
    out: dict[str, Any] = {
        "rows": [],
        "confusion": {},
        "clips": [],
        "clouds": [],
        "boxes": [],
        "found": [],
        "scenes": {},
    }
    current, number = None, -1
    bad: dict[int, dict[str, Any]] = {}  # sample -> its row of the quarantine
    quarantine = runs.PartWriter(runs.run_at(config.run_uri), "quarantine", config.attempt, rank)
    with workers.open_stream(feed) as stream, contextlib.closing(quarantine):
        for phase, step, batch in stream:
            if current is None:
                number += 1
                current = _Pass(config, number, device, rows)
            case = current.case
            if batch is not None:
                for i in np.flatnonzero(~batch.valid):
                    if int(batch.sample[i]) not in bad:
                        bad[int(batch.sample[i])] = {"path": batch.path[i], "reason": batch.reason[i]}
                        quarantine.write(bad[int(batch.sample[i])])
                scores = current.take(batch, (case.repeat, step, rank))
                if rank == 0 and case.order == "natural" and case.repeat == 0:
                    _show(config, current, batch, scores, out)
            if current.votes is not None:
                current.votes.settle(step, world, device)
            if rank == 0:
                state = {"phase": case.run_name, "epoch": number, "epochs": len(config.cases)}
                config.board.update.remote(**state, step=step + 1, steps=phase.num_steps)
            if step + 1 == phase.num_steps:
                row, confusion, found = current.end(world)
                out["rows"].append(row)
                out["found"].append(found)
                if confusion is not None:
                    out["confusion"][f"{case.run_name} ({case.order})"] = confusion
                current = None
    return out


def _show(config: _Config, current: _Pass, batch: Batch, scores: torch.Tensor | None, out: dict[str, Any]) -> None:
    """Keep up to `config.pictures` of the first samples of a run in `out`."""
    run = current.case.run_name
    if isinstance(current.score, FrustumScore):
        scenes = out["scenes"].setdefault(run, {})
        for i in np.flatnonzero(batch.valid):
            image = batch.path[i].rpartition("#")[0]
            if image in scenes or len(scenes) < config.pictures:
                scenes.setdefault(image, []).append(boxes.scene_points(batch.data[[i], 0], batch.label[[i]]))
        return
    shown = sum(one["run"] == run for one in (*out["clips"], *out["clouds"]))
    if scores is None or shown >= config.pictures:
        return
    for kind, picture in _pictures(current.case, current.network, batch, scores, shown, config.pictures):
        out[kind].append(picture)


def _plain(numbers: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a row, with `class_iou` (a list) and `category_iou` (by name): None for what is not there."""
    return {k: v for k, v in numbers.items() if isinstance(v, int | float) or k in ("class_iou", "category_iou")}


def _pictures(
    case: _Case, network: predict.Network, batch: Any, scores: torch.Tensor, shown: int, most: int
) -> list[tuple[str, dict[str, Any]]]:
    """Where the first view of each valid sample goes in the results, and its picture; `most` of a run, with `shown`."""
    places = {6: ("clips", _clip), 5: ("clips", _image), 4: ("clouds", _cloud)}
    kind, picture = places.get(batch.data.ndim, ("", None))
    if picture is None:
        return []
    chosen = list(zip(np.flatnonzero(batch.valid), scores, strict=True))[: most - shown]
    votes = batch.label.ndim == 4  # labels and rows of several views: those of the first
    labels = batch.label[:, 0, 0] if votes else batch.label
    out = []
    for number, (i, one) in enumerate(chosen, shown):
        view = batch.data[i, 0]
        options = {"responses": _responses(network, view)} if kind == "clouds" and number < EXPLAINED else {}
        out.append((kind, picture(case.run_name, network, view, labels[i], one, **options)))
    return out


def _responses(network: predict.Network, view: np.ndarray) -> list[pages.ResponseView]:
    """What the two branches of each PVConv respond to in points `[C, N]`; nothing where a network has none."""
    device = next(network.net.parameters()).device
    found = branch_responses(network.net, torch.from_numpy(view)[None].to(device))
    return [pages.ResponseView(one.name, one.voxel, one.point, one.coords.T) for one in found]


def _clip(run: str, network: predict.Network, view: np.ndarray, label: Any, scores: torch.Tensor) -> dict[str, Any]:
    """Frames `[T, H, W, 3]` as a filmstrip, with truth and the three best classes."""
    top = predict.top_classes(scores, network.classes, 3)
    return {"run": run, "frames_jpeg_base64": filmstrip(view), "truth": network.classes[int(label)], "top": top}


def _image(run: str, network: predict.Network, view: np.ndarray, label: Any, scores: torch.Tensor) -> dict[str, Any]:
    """A picture `[H, W, 3]` as a clip of one frame."""
    return _clip(run, network, view[None], label, scores)


def _cloud(
    run: str,
    network: predict.Network,
    view: np.ndarray,
    label: Any,
    scores: torch.Tensor,
    responses: Sequence[pages.ResponseView] = (),
) -> dict[str, Any]:
    """Points `[C, N]`, x y z first, with the labels of scores `[C, N]`, or as a whole as a clip."""
    coords, classes = view[:3].T, network.classes
    if scores.ndim == 1:
        top = predict.top_classes(scores, classes, 3)
        return pages.CloudView(run, coords, classes[int(label)], top=top, responses=responses).to_plain()
    predicted = scores.argmax(0).cpu().numpy()
    return pages.CloudView(run, coords, np.asarray(label), predicted, classes, responses=responses).to_plain()


def filmstrip(frames: np.ndarray, height: int = 96) -> str:
    """uint8 `[T, H, W, 3]` side by side as one JPEG of `height` pixels, base64 text."""
    from PIL import Image

    strip = Image.fromarray(np.concatenate(list(frames), axis=1))
    strip = strip.resize((round(strip.width * height / strip.height), height), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    strip.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()
