"""`kind: prepare`: a dataset probed, quarantined and packed for training, as a resumable Ray Data job.

Every file is decoded once from end to end: what does not decode goes to the run's quarantine with its reason, the rest
gets its true frame count, rate and size into the index. `pack` re-encodes it as short-GOP H.264 or JPEG frames into
parquet shards (one clip per row group: large sequential objects that can still be read clip by clip), so that training
decodes cheaply. Clouds of points are always packed, as .npz; a scene may become several (an S3DIS room its windows,
`room#zero-0007`; the tiles of a scan; the frustums of the objects in a scan), whose array `rows` leads back into it.
Images are packed as they are, too large ones as smaller JPEGs. Generated datasets are made here. Work is cut into
shards; a shard whose part file exists is done, so a killed job goes on where it stopped.
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import yaml
from pydantic import Field, model_validator
from ray import exceptions

from slimray import runs, storage
from slimray.data.bytes import read_files, read_whole, write_shard
from slimray.data.cards import Card, labels_path
from slimray.data.images import image_shapes
from slimray.data.index import fingerprint, index_table
from slimray.data.lists import read_split
from slimray.data.pipeline import failure_of, map_numbers
from slimray.data.points import clouds, files, point_sets, shapes
from slimray.data.samples import BadSample
from slimray.data.video import moving_shapes
from slimray.data.video.decoder import Decoder
from slimray.data.video.repack import Pack
from slimray.spec import RunFailed, Spec, UserError, parse
from slimray.train import workers
from slimray.train.progress import make_bar

MIN_TILE_POINTS = 100  # tiles with fewer are left out


class PrepareData(Spec):
    """The raw dataset."""

    card: str | dict[str, Any]
    """Dataset card: its name, the path of its YAML, or the card itself."""
    run: None = None
    root: str | None = None
    """Folder of the raw files: a path, s3:// or gs://; not for generated datasets."""
    splits: tuple[str, ...] | None = None
    """Splits to prepare; default all of the card."""
    clips: int = Field(480, ge=16)
    """Clips, images or clouds to generate in all, a fifth of them for validation (generated datasets only)."""
    size: int = Field(64, ge=16, le=512)
    """Side of generated frames and images in pixels."""
    frames: int = Field(16, ge=2, le=1000)
    """Frames of a generated clip."""
    points: int = Field(1024, ge=16, le=1_000_000)
    """Points of a generated cloud."""
    copies: int = Field(5, ge=1, le=100)
    """Frustums made of each object of split `train`, its 2D box moved and resized by up to a tenth; 1 takes it as it is
    (KITTI only)."""
    seed: int = Field(0, ge=0)
    """Seed of generated clips or clouds."""


class PackSpec(Spec):
    """How clips and images are stored for training; without it only the index is written.

    An image is kept as it is, or where its short side is too long made a smaller JPEG, whatever `format` says.
    """

    format: Literal["h264", "jpeg"] = "h264"
    """Short-GOP H.264, or every frame as a JPEG (9 to 28 times cheaper to decode, 10 to 18 times the bytes)."""
    short_side: int | None = Field(256, ge=16)
    """Short side in pixels, never enlarged; null keeps the size."""
    gop: int = Field(12, ge=1)
    """Frames from one key frame to the next (H.264): the shorter, the cheaper a seek."""
    crf: int = Field(23, ge=0, le=51)
    """Quality of H.264, lower is better."""
    quality: int = Field(90, ge=1, le=100)
    """Quality of JPEG, higher is better."""


class PrepareJob(Spec):
    """Probe, quarantine and pack a dataset, or generate one."""

    kind: Literal["prepare"]
    name: str
    """Name of the run, a folder of the storage; training reads it by `data: {run: NAME}`."""
    data: PrepareData
    pack: PackSpec | None = None
    clips_per_shard: int = Field(64, ge=1)
    """Clips per unit of work, and per parquet shard."""
    tasks: int = Field(0, ge=0)
    """Files decoded at once, a CPU each; 0 = all the CPUs there are."""
    decode_timeout_s: float = Field(120, gt=0)
    """Longest time a file may take; then its decoder is killed and the file is quarantined."""
    max_bad_fraction: float = Field(0.5, ge=0, le=1)
    """Largest part of a split that may fail before the job is called failed."""

    @model_validator(mode="after")
    def _generated_is_not_packed(self) -> "PrepareJob":
        if isinstance(self.data.card, dict) and self.data.card.get("layout") == "generated" and self.data.root:
            raise ValueError("data.root: a generated dataset has none")
        return self


@dataclass(frozen=True)
class _Chunk:
    """A unit of work: rows `lo` to `hi` of a split, written as shard `number`."""

    split: str
    number: int
    lo: int
    hi: int


@dataclass(frozen=True)
class _Work:
    """What the tasks share."""

    run_uri: str
    root: str
    chunks: tuple[_Chunk, ...]
    tables: dict[str, Any]
    card: Card
    data: PrepareData
    pack: PackSpec | None
    timeout_s: float


def facts(job: PrepareJob, where: str) -> dict[str, Any]:
    """What is known before any file is read: the card, its classes, the splits."""
    card = parse(Card, _card(job), f"{where}: data.card")
    out: dict[str, Any] = {"dataset": card.name, "classes": card.num_classes, "splits": _splits(job, card)}
    if card.layout == "generated":
        out["clips"] = job.data.clips
    elif not (job.data.root or card.root):
        raise UserError(f"{where}: data.root: is required, the folder where {card.name} lies")
    return out


def run(job: PrepareJob, ctx: Any) -> None:
    """Prepare the dataset of `job` in the run folder `ctx.run`."""
    card = parse(Card, _card(job), f"{ctx.where}: data.card")
    generated = card.layout == "generated"
    root = "" if generated else job.data.root or card.root
    assert root is not None
    root = root and storage.absolute(root)
    tables = {}
    for split in _splits(job, card):
        tables[split] = to_generate(job, split) if generated else read_split(card, split, root)
    chunks = [
        _Chunk(split, number, lo, min(lo + job.clips_per_shard, table.num_rows))
        for split, table in tables.items()
        for number, lo in enumerate(range(0, table.num_rows, job.clips_per_shard))
    ]
    if not generated:
        _require_same_lists(ctx, tables)
    done = set(runs.list_names(ctx.run, "data/parts"))
    todo = tuple(chunk for chunk in chunks if _part_name(chunk) not in done)
    if todo:
        _process(job, ctx, card, root, tables, todo)
    _write_indexes(job, ctx, card, chunks, root)


def _require_same_lists(ctx: Any, tables: Mapping[str, pa.Table]) -> None:
    """Raise UserError if a list is not the one this run began with: its shards are numbered by places in it."""
    now = {split: fingerprint(table) for split, table in tables.items()}
    try:
        before = json.loads(runs.read_file(ctx.run, "data/lists.json"))
    except FileNotFoundError:
        runs.write_file(ctx.run, "data/lists.json", json.dumps(now).encode())
        return
    for split in now:
        if now[split] != before.get(split):
            raise UserError(
                f"{ctx.where}: the list of split {split!r} has changed since this run began: restore it, or --restart"
            )


def _card(job: PrepareJob) -> dict[str, Any]:
    assert isinstance(job.data.card, dict)  # embedded when the job was loaded
    return job.data.card


def _splits(job: PrepareJob, card: Card) -> list[str]:
    for split in job.data.splits or ():
        if split not in card.splits:
            raise UserError(f"data.splits: {split!r} is no split of {card.name} ({', '.join(card.splits)})")
    return list(job.data.splits or card.splits)


def to_generate(job: PrepareJob, split: str) -> pa.Table:
    """A fifth of the clips validates; numbers go on from split to split, so that no clip is in two."""
    num_val = job.data.clips // 5
    first, count = (0, job.data.clips - num_val) if split == "train" else (job.data.clips - num_val, num_val)
    return pa.table({"number": np.arange(first, first + count)})


def _part_name(chunk: _Chunk) -> str:
    return f"{chunk.split}-{chunk.number:06d}.json"


def _process(job: PrepareJob, ctx: Any, card: Card, root: str, tables: dict, todo: tuple[_Chunk, ...]) -> None:
    """Run the chunks as Ray Data tasks and show how far they are."""
    slots = job.tasks or os.cpu_count() or 1
    workers.connect(ctx.cpus)
    slots = min(slots, max(1, int(workers.capacity().get("CPU", 1))))
    refs = {split: ray.put(table) for split, table in tables.items()}
    work = _Work(ctx.run.uri, root, todo, refs, card, job.data, job.pack, job.decode_timeout_s)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    context.execution_options.resource_limits = ray.data.ExecutionResources(cpu=slots)
    dataset = map_numbers(len(todo), lambda numbers: _do_chunk(work, todo[int(numbers["id"][0])]))
    total = sum(chunk.hi - chunk.lo for chunk in todo)
    with make_bar(ctx.console) as bar:
        task = bar.add_task(f"{job.name}: clips", total=total, note="")
        try:
            for row in dataset.iter_rows():
                bar.update(task, advance=int(row["clips"]))
        except exceptions.RayTaskError as error:
            raise failure_of(error) from error


def _write_indexes(job: PrepareJob, ctx: Any, card: Card, chunks: list[_Chunk], root: str) -> None:
    """Join the parts to one index per split, the quarantine, the card of the prepared dataset."""
    rows: dict[str, list] = {chunk.split: [] for chunk in chunks}
    bad: dict[str, list] = {chunk.split: [] for chunk in chunks}
    objects: dict[str, list] = {chunk.split: [] for chunk in chunks}
    files, failed = dict.fromkeys(rows, 0), dict.fromkeys(rows, 0)
    totals: dict[str, Any] = {"bytes_in": 0, "bytes_out": 0, "psnr": []}
    for chunk in chunks:
        part = json.loads(runs.read_file(ctx.run, f"data/parts/{_part_name(chunk)}"))
        rows[chunk.split] += part["rows"]
        bad[chunk.split] += part["bad"] + part["left_out"]
        objects[chunk.split] += part.get("objects", [])
        files[chunk.split] += chunk.hi - chunk.lo
        failed[chunk.split] += len(part["bad"])
        totals["bytes_in"] += part["bytes_in"]
        totals["bytes_out"] += part["bytes_out"]
        totals["psnr"] += part["psnr"]
    with contextlib.closing(runs.PartWriter(ctx.run, "quarantine", ctx.attempt, 0)) as writer:
        for split, items in bad.items():
            for item in items:
                writer.write({"split": split, **item})
    metrics: dict[str, Any] = {}
    for split, items in rows.items():
        total = files[split]
        if not items:
            raise RunFailed(f"split {split!r}: none of {total} files decodes, see quarantine/ in the run folder")
        if failed[split] > job.max_bad_fraction * total:
            raise RunFailed(
                f"split {split!r}: {failed[split]} of {total} files do not decode, more than max_bad_fraction "
                f"({job.max_bad_fraction:g}): see quarantine/ in the run folder, or raise the bound"
            )
        buffer = io.BytesIO()
        pq.write_table(index_table(items), buffer)
        runs.write_file(ctx.run, f"data/{split}.parquet", buffer.getvalue())
        if objects[split]:  # what is to be found, also in images without a frustum
            runs.write_file(ctx.run, f"data/{split}.objects.json", json.dumps(objects[split]).encode())
        metrics[split] = {"clips": len(items), "quarantined": len(bad[split])}
    here = job.pack is not None or card.layout == "generated" or card.sample in ("points", "frustum")
    prepared = card.prepared(list(rows), None if here else root)
    text = yaml.safe_dump(prepared.model_dump(mode="json", exclude_defaults=True), sort_keys=False)
    runs.write_file(ctx.run, "data/card.yaml", text.encode())
    packed: dict[str, Any] = {key: totals[key] for key in ("bytes_in", "bytes_out")} if job.pack else {}
    if totals["psnr"]:
        packed["psnr_db"] = float(np.median(totals["psnr"]))
    ctx.finish({"metrics": metrics, "packed": packed, "dataset": {"name": card.name}})
    summary = ", ".join(f"{split} {m['clips']} clips ({m['quarantined']} quarantined)" for split, m in metrics.items())
    ctx.console.print(f"{job.name}: {summary}", highlight=False)


# ------------------------------------------------------------------------------------------------ in the tasks


def _do_chunk(work: _Work, chunk: _Chunk) -> dict[str, np.ndarray]:
    """Make one shard and its part file; the part is written last and says that the shard is whole."""
    fs, folder = storage.open_uri(work.run_uri)
    table: Any = ray.get(work.tables[chunk.split], timeout=300)
    table = table.slice(chunk.lo, chunk.hi - chunk.lo)
    part: dict[str, Any] = {
        "rows": [],
        "bad": [],
        "left_out": [],
        "objects": [],
        "bytes_in": 0,
        "bytes_out": 0,
        "psnr": [],
    }
    make = _generate if work.card.layout == "generated" else _convert
    make(work, chunk, table.to_pylist(), part, fs, folder)
    storage.write_atomic(fs, f"{folder}/data/parts/{_part_name(chunk)}", json.dumps(part).encode())
    return {"clips": np.array([chunk.hi - chunk.lo])}


def _generate(work: _Work, chunk: _Chunk, rows: list[dict], part: dict[str, Any], fs: Any, folder: str) -> None:
    """Clips as H.264 files under data/clips, clouds and images as a parquet shard."""
    data, packed = work.data, []
    shard = f"shards/{chunk.split}-{chunk.number:06d}.parquet"
    for row in rows:
        if work.card.sample == "points":
            coords, labels, label = shapes.make_cloud(row["number"], data.seed, num_points=data.points)
            encoded = clouds.write_cloud(clouds.Cloud(coords, labels=labels))
            path, shape = f"{chunk.split}/{row['number']:06d}.npz", {"frames": data.points}
            place = {"shard": shard, "row": len(packed)}
            packed.append({"path": path, "label": label, "data": encoded})
        elif work.card.sample == "image":
            picture, label = image_shapes.make_image(row["number"], data.seed, size=data.size)
            encoded, path = image_shapes.encode_png(picture), f"{chunk.split}/{row['number']:06d}.png"
            place, shape = {"shard": shard, "row": len(packed)}, {"width": data.size, "height": data.size}
            packed.append({"path": path, "label": label, "data": encoded})
        else:
            frames, label = moving_shapes.make_clip(row["number"], data.seed, size=data.size, num_frames=data.frames)
            encoded = moving_shapes.encode_h264(frames)
            path, place = f"clips/{chunk.split}/{row['number']:06d}.mp4", {}
            storage.write_atomic(fs, f"{folder}/data/{path}", encoded)
            shape = {"frames": data.frames, "fps": float(moving_shapes.FPS), "width": data.size, "height": data.size}
        part["rows"].append({"path": path, "label": int(label), **shape, **place})
        part["bytes_out"] += len(encoded)
    if packed:
        write_shard(fs, f"{folder}/data/{shard}", packed)


def _convert(work: _Work, chunk: _Chunk, rows: list[dict], part: dict[str, Any], fs: Any, folder: str) -> None:
    """Read every file whole, and pack the good ones into one parquet shard."""
    packed_here = work.pack or work.card.sample in ("points", "frustum")
    shard = f"shards/{chunk.split}-{chunk.number:06d}.parquet" if packed_here else ""
    rows = [{**row, "split": chunk.split} for row in rows]
    with Decoder(timeout_s=work.timeout_s) as decoder:
        packed = _pack(work, rows, part, shard, decoder)
        first = next(packed, None)
        if first is not None:
            write_shard(fs, f"{folder}/data/{shard}", itertools.chain([first], packed))


def _pack(work: _Work, rows: list[dict], part: dict[str, Any], shard: str, decoder: Decoder) -> Iterator[dict]:
    """The rows of the shard, made one by one (none without a shard); `part` notes what is made and what is bad."""
    make = _MAKERS.get(work.card.layout) or {"points": _cloud, "image": _image}.get(work.card.sample, _clip)
    packed = 0
    for row in rows:
        try:
            for made in make(work, row, decoder):
                place = {"shard": shard, "row": packed} if shard else {"shard": row["shard"], "row": row["row"]}
                label = row["label"] if made.label is None else made.label
                part["rows"].append({"path": made.path, "label": label, **made.shape, **place})
                part["left_out"] += [{"path": path, "reason": reason} for path, reason in made.left_out.items()]
                part["bytes_in"] += made.bytes_in
                if shard:
                    packed += 1
                    part["bytes_out"] += len(made.data)
                    part["psnr"] += [] if made.psnr is None else [made.psnr]
                    yield {"path": made.path, "label": label, "data": made.data}
            if work.card.layout == "kitti":
                part["objects"].append({"image": row["path"], "objects": list(map(vars, _objects(work, row["path"])))})
        except (BadSample, FileNotFoundError) as error:
            reason = str(error) if isinstance(error, BadSample) else "no such file"
            part["bad"].append({"path": row["path"], "reason": reason})


@dataclass(frozen=True)
class _Made:
    """A sample as stored: its path in the index, columns of the index that say what it holds, bytes read for it.

    `psnr` is in dB, of what was lost; `left_out` are files that it lacks, with the reason; `label` is its class, if
    that is another than the file's.
    """

    path: str
    data: bytes
    shape: dict[str, Any]
    bytes_in: int
    psnr: float | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    label: int | None = None


def _clip(work: _Work, row: dict[str, Any], decoder: Decoder) -> Iterator[_Made]:
    """A video probed, and re-encoded if it is to be packed."""
    source, root = storage.open_uri(work.root)
    data = read_whole(source, root, row)
    if work.pack is None:
        found, encoded, psnr = decoder.probe(row["path"], data), b"", None
    else:
        encoded, found, psnr = decoder.repack(row["path"], data, Pack(**work.pack.model_dump()))
    shape = {"frames": found.frames, "fps": found.fps, "width": found.width, "height": found.height}
    yield _Made(row["path"], encoded, shape, len(data), psnr)


def _image(work: _Work, row: dict[str, Any], decoder: Decoder) -> Iterator[_Made]:
    """An image decoded, and made smaller if it is to be packed and its short side is too long."""
    source, root = storage.open_uri(work.root)
    data = read_whole(source, root, row)
    short_side, quality = (None, 90) if work.pack is None else (work.pack.short_side, work.pack.quality)
    encoded, found, psnr = decoder.shrink(row["path"], data, short_side, quality)
    yield _Made(row["path"], encoded, {"width": found.width, "height": found.height}, len(data), psnr)


def _cloud(work: _Work, row: dict[str, Any], _: Decoder) -> Iterator[_Made]:
    """A cloud read from any point file, with the labels of its points as classes; whole, or in tiles."""
    card, (source, root) = work.card, storage.open_uri(work.root)
    data, labels = read_whole(source, root, row), None
    if card.point_labels:
        path = labels_path(card, row["path"])
        labels = (path, read_whole(source, root, {**row, "path": path}))
    cloud = files.read_cloud(row["path"], data, card.point_columns, labels)
    if card.labels == "point":
        cloud = _with_classes(cloud, card)
    size = len(data) + len(labels[1] if labels else b"")
    if card.tile is None:
        yield _stored(row["path"], cloud, size)
        return
    tiles = _tiles(cloud, card.tile)
    if not tiles:
        raise BadSample(f"no tile of it has {MIN_TILE_POINTS} points and a label that counts")
    for number, tile in enumerate(tiles):
        yield _stored(f"{row['path']}#{number:04d}", tile, 0 if number else size)


def _room(work: _Work, row: dict[str, Any], _: Decoder) -> Iterator[_Made]:
    """The windows of an S3DIS room, first those of offset "zero", then those of "half"."""
    source, root = storage.open_uri(work.root)
    objects = read_files(source, root, row["path"])
    folder, room = row["path"].rpartition("/")[0], row["path"].partition("/Annotations/")[0]
    xyzrgb, labels, skipped = point_sets.s3dis_room(objects)
    size, left_out = sum(map(len, objects.values())), {f"{folder}/{name}": why for name, why in skipped.items()}
    for key, (name, offset) in enumerate(point_sets.S3DIS_OFFSETS.items()):
        windows = point_sets.s3dis_windows(xyzrgb, labels, offset, (zlib.crc32(room.encode()), key))
        for number, window in enumerate(windows):
            if not np.ptp(window.coords, 0).any():
                continue  # a lone point, far from all others, is no cloud
            features = dict(window.features)
            window = dataclasses.replace(window, features=features)
            yield _stored(f"{room}#{name}-{number:04d}", window, size, left_out)
            size, left_out = 0, {}


def _shape(work: _Work, row: dict[str, Any], _: Decoder) -> Iterator[_Made]:
    """A shape of ShapeNet part, whose parts must be those of its class."""
    source, root = storage.open_uri(work.root)
    data = read_whole(source, root, row)
    yield _stored(row["path"], point_sets.shapenet_cloud(row["path"], data, row["label"]), len(data))


def _scan(work: _Work, row: dict[str, Any], _: Decoder) -> Iterator[_Made]:
    """The frustums of a KITTI scan: behind the 2D boxes of its labels, or of a detector where the card names one."""
    path, split, (source, root) = row["path"], row["split"], storage.open_uri(work.root)
    data, number = read_whole(source, root, row), path.rpartition("/")[2].removesuffix(".bin")
    cloud = files.read_cloud(path, data)
    scan = np.concatenate([cloud.coords + cloud.origin, cloud.features["intensity"]], 1)
    calibration = point_sets.kitti_calibration(_beside(work, path, "calib", ".txt"))
    image_size = point_sets.png_size(_beside(work, path, "image_2", ".png", 32))
    objects = _objects(work, path)
    if split in work.card.detections:
        objects = _detections(work.root, work.card.detections[split]).get(number, [])
    training = split == "train"
    copies, shake = (work.data.copies, 0.1) if training and work.data.copies > 1 else (1, 0.0)
    key = (work.data.seed, zlib.crc32(path.encode()))
    frustums = point_sets.kitti_frustums(scan, calibration, objects, image_size, key, copies, shake)
    for place, frustum in enumerate(frustums):
        stored = point_sets.write_frustum(frustum)
        label = point_sets.KITTI_CLASSES.index(frustum.kind)
        shape = {"frames": len(frustum.cloud)}
        yield _Made(f"{path}#{place:04d}", stored, shape, 0 if place else len(data), label=label)


def _objects(work: _Work, path: str) -> list[point_sets.KittiObject]:
    """All that is labelled in the image of a scan."""
    return point_sets.kitti_objects(_beside(work, path, "label_2", ".txt"))


def _beside(work: _Work, path: str, folder: str, suffix: str, num_bytes: int | None = None) -> bytes:
    """The file that belongs to a scan, `training/velodyne/000123.bin`, in another folder; its first bytes, or all."""
    source, root = storage.open_uri(work.root)
    name = path.replace("/velodyne/", f"/{folder}/").removesuffix(".bin") + suffix
    try:
        return storage.read_bytes(source, storage.join(root, name), num_bytes)
    except FileNotFoundError:
        raise BadSample(f"{name} is missing") from None


@functools.lru_cache(maxsize=2)
def _detections(root: str, name: str) -> dict[str, list[point_sets.KittiObject]]:
    """The 2D boxes of a detector by the number of their image; read once in a process."""
    fs, folder = storage.open_uri(root)
    try:
        return point_sets.rgb_detections(storage.read_bytes(fs, storage.join(folder, name)))
    except FileNotFoundError:
        raise RunFailed(f"{storage.join(root, name)}: there are no such detections: mend the card") from None
    except BadSample as bad:
        raise RunFailed(f"{storage.join(root, name)}: {bad}") from None


_MAKERS: dict[str, Callable[[_Work, dict[str, Any], Decoder], Iterator[_Made]]] = {
    "s3dis": _room,
    "shapenet_part": _shape,
    "kitti": _scan,
}


def _stored(path: str, cloud: clouds.Cloud, bytes_in: int, left_out: Mapping[str, str] | None = None) -> _Made:
    return _Made(path, clouds.write_cloud(cloud), {"frames": len(cloud)}, bytes_in, left_out=left_out or {})


def _tiles(cloud: clouds.Cloud, side: float) -> list[clouds.Cloud]:
    """Squares of x and y, in their order; `rows` lead back into the file. Left out are sparse ones, and those without
    a label that counts."""
    cells = np.floor((cloud.coords[:, :2] - cloud.coords[:, :2].min(0)) / side).astype(np.int64)
    inverse = np.unique(cells, axis=0, return_inverse=True)[1].reshape(-1)
    order = np.argsort(inverse, kind="stable")
    tiles = []
    for taken in np.split(order, np.flatnonzero(np.diff(inverse[order])) + 1):
        labels = None if cloud.labels is None else cloud.labels[taken]
        useless = labels is not None and labels.max() < 0
        if len(taken) < MIN_TILE_POINTS or useless or not np.ptp(cloud.coords[taken], 0).any():
            continue
        features = {name: array[taken] for name, array in cloud.features.items()}
        rows = taken if cloud.rows is None else cloud.rows[taken]
        tiles.append(clouds.Cloud(cloud.coords[taken], features, labels, rows, cloud.origin))
    return tiles


def _with_classes(cloud: clouds.Cloud, card: Card) -> clouds.Cloud:
    """`cloud` with the class of each point in place of its label; -1 for labels that do not count."""
    if cloud.labels is None:
        raise BadSample("has no label per point")
    classes = cloud.labels
    if card.label_map:
        classes = np.full(len(cloud), -1, np.int64)
        for label, number in card.label_map.items():
            classes[cloud.labels == label] = number
    if classes.max() >= card.num_classes:
        raise BadSample(f"has label {int(classes.max())}, there are {card.num_classes} classes")
    return dataclasses.replace(cloud, labels=classes)
