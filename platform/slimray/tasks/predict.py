"""A finished network as a function: samples in, class scores out; for validation, `evaluate` and `predict`.

`Input` is how pixels become numbers and views become one score; it is stored in the run's `model/input.json`, so that
a prediction prepares its input as training did. A file is a sample, as it is in a dataset: a network that was trained
on blocks of rooms wants blocks. Torch only: a machine without Ray predicts too.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from slimray import models, runs, storage
from slimray.data.images.pictures import ImageRecipe
from slimray.data.modalities import read_recipe
from slimray.data.points.clouds import Cloud, removal_note
from slimray.data.points.reader import CloudReader
from slimray.data.points.recipe import PointRecipe, PointSample, make_points
from slimray.data.samples import BadSample
from slimray.data.video.clips import ClipRecipe
from slimray.data.video.decoder import Decoder
from slimray.spec import UserError
from slimray.train import learn

KEY = (0, 0, 0)  # seed, epoch, sample: the same answer every time
PALETTE = (  # of Okabe and Ito, safe for the colour-blind, grey in place of black; further classes get darker shades
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
    (153, 153, 153),
)  # fmt: skip


@dataclass(frozen=True)
class Input:
    """What a network takes: normalisation of uint8 pixels, and how the views of a sample are averaged."""

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    average: Literal["logits", "prob"] = "logits"


@dataclass(frozen=True)
class Network:
    """A run's network ready to use: the module in eval mode, its input, the recipe of its samples, its classes."""

    net: nn.Module
    pixels: Input
    recipe: dict[str, Any]
    classes: tuple[str, ...]
    model: dict[str, Any]


def load_network(run: runs.Run, device: torch.device | str = "cpu") -> Network:
    """Load the network that `run` wrote; UserError if it wrote none."""
    weights, model, taken = runs.read_model(run)
    read_recipe(taken["recipe"])  # a recipe of another version fails here, not at the first file
    net = models.build(**model)
    net.load_state_dict(safetensors.torch.load(weights))
    pixels: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in taken["pixels"].items()}
    return Network(net.to(device).eval(), Input(**pixels), taken["recipe"], tuple(taken["classes"]), model)


def to_input(data: np.ndarray, pixels: Input, device: torch.device) -> Tensor:
    """Samples `[n, V, ...]` as a network takes them, `[n*V, ...]` on `device`.

    uint8 frames `[n, V, T, H, W, 3]` become normalised `[n*V, T, 3, H, W]`, images `[n, V, H, W, 3]` `[n*V, 3, H, W]`
    (pixels travel as uint8); points go as they are.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(data))
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    tensor = tensor.to(device, non_blocking=True).flatten(0, 1)
    if data.dtype != np.uint8:
        return tensor.to(torch.get_default_dtype())
    mean = torch.tensor(pixels.mean, device=device).view(-1, 1, 1) * 255
    std = torch.tensor(pixels.std, device=device).view(-1, 1, 1) * 255
    return (tensor.movedim(-1, -3).to(torch.get_default_dtype()) - mean) / std


@torch.no_grad()
def predict_scores(net: nn.Module, data: np.ndarray, pixels: Input, device: torch.device, rows: int) -> Tensor:
    """Scores `[n, C]`, or `[n, C, N]` per point, of samples `[n, V, ...]`, views averaged, at most `rows` at once."""
    parts = []
    for i in range(0, len(data), rows):
        with learn.autocast(device):
            logits = net(to_input(data[i : i + rows], pixels, device))
        parts.append(learn.merge_views(logits.float(), data.shape[1], pixels.average))
    return torch.cat(parts)


def top_classes(scores: Tensor, classes: Sequence[str], k: int) -> list[tuple[str, float]]:
    """The `k` best (class, probability) of a score vector `[C]`, best first."""
    probabilities = torch.softmax(scores.float(), 0)
    values, indices = probabilities.topk(min(k, len(classes)))
    return [(classes[int(i)], float(v)) for i, v in zip(indices, values, strict=True)]


@dataclass(frozen=True)
class Answer:
    """What was found in a file: its `top` classes, best first, or the `reason` why it could not be read.

    The number of a class is its probability, or its share of the points where those have labels, which are `written`.
    `notes` says which points of a cloud were left out.
    """

    path: Path
    top: list[tuple[str, float]] = field(default_factory=list)
    reason: str = ""
    written: tuple[Path, ...] = ()
    notes: str = ""


def predict_files(
    network: Network,
    paths: Sequence[Path],
    k: int,
    *,
    columns: Sequence[str] = (),
    shape: int | None = None,
    out: Path | None = None,
    rows: int = 8,
    timeout_s: float = 30,
) -> Iterator[Answer]:
    """Return the answers for files in turn, with `k` classes at most: of one view, as validated, or of all points.

    For clouds: `columns` as `read_cloud` takes them, `shape` the class whose one-hot the network takes, `out` the
    folder for labels of points (default: beside the file). The network sees at most `rows` views at once. UserError,
    before anything is read, for an option that does not fit the network and labels that would overwrite a file.
    """
    recipe = read_recipe(network.recipe | {"mode": "val"})
    if recipe.kind == "frustum":
        raise UserError("this network takes frustums, which files are not: score it by an evaluate job")
    if hasattr(network.net, "space"):
        raise UserError("this run holds a supernet: a search job chooses subnets, predict with one of those")
    per_point, num_shapes = getattr(recipe, "per_point", False), getattr(recipe, "num_shapes", 0)
    if columns and isinstance(recipe, ClipRecipe | ImageRecipe):
        raise UserError(f"--columns: is for clouds of points, this network takes {recipe.kind}s")
    if num_shapes and shape not in range(num_shapes):
        raise UserError(f"--shape: the network takes the class of each cloud: give a number from 0 to {num_shapes - 1}")
    if shape is not None and not num_shapes:
        raise UserError("--shape: the network takes no class of a cloud")
    if out is not None and not per_point:
        raise UserError("--out: the network labels whole files, there is nothing to write")
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is no folder")
    if per_point:
        _require_apart(paths, out)
        recipe = replace(recipe, mode="test", votes=1, max_points=0)  # views that hold every point

    def answer(path: Path, decoder: Decoder, reader: CloudReader) -> Answer:
        notes = ""
        device = next(network.net.parameters()).device
        if isinstance(recipe, ClipRecipe):
            views, _ = decoder.clip(str(path), path.read_bytes(), recipe, KEY)
        elif isinstance(recipe, ImageRecipe):
            views, _ = decoder.image(str(path), path.read_bytes(), recipe, KEY)
        else:
            cloud = reader.cloud(str(path), path.read_bytes(), columns, needs=recipe.channels)
            notes = removal_note(cloud.removed, len(cloud) + cloud.num_removed)
            sample = _make_points(cloud, recipe, shape or 0)
            if per_point:
                scores = score_points(network, sample, len(cloud), device, rows)
                answered = _write_labels(cloud, scores, network.classes, k, path, label_files(path, out))
                return replace(answered, notes=notes)
            views = sample.points
        scores = predict_scores(network.net, views[None], network.pixels, device, 1)
        return Answer(path, top_classes(scores[0], network.classes, k), notes=notes)

    def answers() -> Iterator[Answer]:
        with Decoder(timeout_s=timeout_s) as decoder, CloudReader(timeout_s=timeout_s) as reader:
            for path in paths:
                try:
                    found = answer(path, decoder, reader)
                except (BadSample, OSError) as error:
                    found = Answer(path, reason=str(error))
                yield found

    return answers()


# ------------------------------------------------------------------------------------------------ labels of points


def label_files(path: Path, out: Path | None = None) -> tuple[Path, Path]:
    """Where the labels of the points of `path` go: NAME.labels.npz and NAME.labels.ply, beside it or in `out`."""
    stem = (path.parent if out is None else out) / path.stem
    return Path(f"{stem}.labels.npz"), Path(f"{stem}.labels.ply")


def score_points(network: Network, sample: PointSample, num_points: int, device: torch.device, rows: int) -> Tensor:
    """Scores `[num_points, C]` on the CPU of a cloud whose views hold every point: a point's logits are averaged."""
    total = torch.zeros(num_points, len(network.classes))
    for i in range(0, len(sample.points), rows):
        scores = predict_scores(network.net, sample.points[i : i + rows, None], network.pixels, device, rows)
        places = torch.from_numpy(sample.indices[i : i + rows].reshape(-1))
        total.index_add_(0, places, scores.movedim(1, 2).flatten(0, 1).float().cpu())  # [v, C, N] -> [v*N, C]
    seen = torch.from_numpy(np.bincount(sample.indices.reshape(-1), minlength=num_points))
    return total / seen[:, None]


def class_colors(num_classes: int) -> np.ndarray:
    """A colour for each class, uint8 `[num_classes, 3]`, the same whatever their number."""
    number = np.arange(num_classes)
    return (np.array(PALETTE)[number % len(PALETTE)] * 0.6 ** (number // len(PALETTE))[:, None]).astype(np.uint8)


def _make_points(cloud: Cloud, recipe: PointRecipe, shape: int) -> PointSample:
    """The sample of a user's own file; BadSample that says which channels are missing and what can be done."""
    missing = [name for name in recipe.channels if name not in cloud.features and name != "normals"]
    if missing:
        for name in missing:
            if name in cloud.unclear:
                raise BadSample(cloud.unclear[name])
        hint = ": name its columns with --columns" if "extra" in cloud.features else ""
        there = ", ".join(cloud.features) or "coordinates only"
        raise BadSample(f"has no {', '.join(missing)}, which the network takes (it has: {there}){hint}")
    sample = make_points(cloud, recipe, KEY, shape)
    if sample.points.shape[1] != recipe.num_channels:
        raise BadSample(f"gives {sample.points.shape[1]} channels, the network takes {recipe.num_channels}")
    return sample


def _require_apart(paths: Sequence[Path], out: Path | None) -> None:
    """Raise UserError if the labels of one of the files would overwrite another file of them, or its labels."""
    given, owners = {path.resolve() for path in paths}, dict[Path, Path]()
    for path in paths:
        for target in label_files(path, out):
            if target.resolve() in given:
                raise UserError(f"{target}: the labels of {path} would overwrite it: leave it out, or give --out")
            other = owners.setdefault(target.resolve(), path)
            if other.resolve() != path.resolve():
                raise UserError(
                    f"{other}, {path}: their labels would be one file, {target}: predict one by one, with --out"
                )


def _write_labels(
    cloud: Cloud, scores: Tensor, classes: Sequence[str], k: int, path: Path, targets: tuple[Path, Path]
) -> Answer:
    """Write the labels of a cloud as .npz for programs and .ply for viewers, in the coordinates of its file."""
    import plyfile

    best, places = torch.softmax(scores, 1).max(1)
    labels, coords = places.numpy(), cloud.coords + cloud.origin  # float64
    rows = np.arange(len(cloud)) if cloud.rows is None else cloud.rows
    arrays = io.BytesIO()
    np.savez_compressed(
        arrays, coords=coords, labels=labels, confidence=best.numpy(), rows=rows, classes=np.array(classes)
    )
    columns = [*coords.T, labels, *class_colors(len(classes))[labels].T]
    types = [("x", "f8"), ("y", "f8"), ("z", "f8"), ("label", "i4"), ("red", "u1"), ("green", "u1"), ("blue", "u1")]
    vertices = plyfile.PlyElement.describe(np.asarray(np.rec.fromarrays(columns, types)), "vertex")
    legend = [f"class {number} {name!a}" for number, name in enumerate(classes)]
    picture = io.BytesIO()
    plyfile.PlyData([vertices], byte_order="<", comments=legend).write(picture)
    for target, buffer in zip(targets, (arrays, picture), strict=True):
        storage.write_atomic(*storage.open_uri(target), buffer.getvalue())
    shares = np.bincount(labels, minlength=len(classes)) / len(labels)
    order = [int(number) for number in np.argsort(-shares, kind="stable")[:k] if shares[number]]
    return Answer(path, [(classes[number], float(shares[number])) for number in order], written=targets)
