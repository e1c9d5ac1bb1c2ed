"""Scoring finished networks on a split, on the workers of an evaluation: numbers, votes, boxes, and what is shown.

In: a `ScoreConfig` with a case for each network, order of frames and repeat. Out, from rank 0: a row per case, its
confusion, and pictures of the first samples. Imports Ray.
"""

import base64
import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import get_device

from slimray import runs
from slimray.data.modalities import sample_shape
from slimray.data.pipeline import Batch, FeedConfig, Source
from slimray.data.plan import Phase
from slimray.models.points.branches import branch_responses
from slimray.report import pages
from slimray.tasks import predict
from slimray.tasks.frustum_boxes import FrustumScore
from slimray.tasks.segment import SegmentationScore
from slimray.tasks.votes import SceneVotes
from slimray.train import learn, loop, workers
from slimray.train.spec import ScaleSpec
from slimray.verbs import boxes
from slimray.verbs.inputs import Splits

EXPLAINED = 2  # clouds of a run that are shown with what the branches of its PVConvs respond to


@dataclass(frozen=True)
class Case:
    """One pass: a run, an order of frames, which of its repeats."""

    run_uri: str
    run_name: str
    order: str
    repeat: int


@dataclass(frozen=True)
class ScoreConfig:
    """All that the workers of an evaluation need."""

    run_uri: str
    attempt: int
    cases: tuple[Case, ...]
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


class _Pass:
    """A case under way on this rank: its network, what counts hits, and the votes or boxes found so far."""

    def __init__(self, config: ScoreConfig, number: int, device: torch.device, rows: int):
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


def score_cases(config: ScoreConfig) -> dict[str, Any]:
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


def _show(config: ScoreConfig, current: _Pass, batch: Batch, scores: torch.Tensor | None, out: dict[str, Any]) -> None:
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
    case: Case, network: predict.Network, batch: Any, scores: torch.Tensor, shown: int, most: int
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


# ------------------------------------------------------------------------------------------------- on the driver


def score_boxes(result: dict[str, Any], splits: Splits, split: str) -> None:
    """Add KITTI's AP to the rows, and pictures from above, out of what the workers found."""
    objects = boxes.read_objects(splits.root, split)
    for row, found in zip(result["rows"], result["found"], strict=True):
        row["ap"] = boxes.average_precisions(found, objects)
        points = result["scenes"].get(row["run"], {})
        if row["repeat"] == 0:
            result["boxes"] += boxes.pictures(row["run"], points, found, objects)


def join_repeats(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
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
