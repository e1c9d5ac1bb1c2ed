"""Image datasets with their shipped cards, from files named like real ones to indexes, packed shards and recipes."""

import gzip
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import pytest
from PIL import Image

from slimray import storage
from slimray.data import modalities
from slimray.data.bytes import read_whole
from slimray.data.cards import Card, load_card
from slimray.data.images import image_sets, image_shapes
from slimray.data.images.pictures import ImageRecipe
from slimray.data.index import index_table
from slimray.data.lists import complete, read_split
from slimray.data.modalities import read_recipe
from slimray.data.spec import DataSpec
from slimray.spec import UserError, parse
from slimray.storage import StorageError
from slimray.verbs import inputs, networks, prepare
from slimray.verbs.specs import TrainJob

DATASETS = Path(__file__).resolve().parents[3] / "datasets"
DISK = pafs.LocalFileSystem()
KEY = (0, 0, 0)


def shipped(name: str, **fields) -> Card:
    return load_card(name, [DATASETS]).model_copy(update=fields)


def custom(**fields) -> Card:
    fields = {"name": "mine", "layout": "folders", "splits": {"train": "."}, "sample": "image"} | fields
    return parse(Card, fields, "mine.yaml")


def write(root: Path, files: Mapping[str, str | bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def picture(width: int = 40, height: int = 32, form: str = "JPEG", seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def listed(card: Card, split: str, root: Path) -> list[tuple[str, int]]:
    table = read_split(card, split, str(root))
    return list(zip(table.column("path").to_pylist(), table.column("label").to_pylist(), strict=True))


# ---------------------------------------------------------------------------------------------- folders and lists


def test_imagenet_is_a_folder_of_wordnet_numbers_read_by_their_content(tmp_path):
    names = [f"n{number:08d}" for number in range(1000)]
    files: dict[str, bytes] = {f"{split}/{name}/{name}_1.JPEG": b"x" for split in ("train", "val") for name in names}
    files["train/n00000002/n00000002_1.JPEG"] = picture(form="PNG")
    write(tmp_path, files)
    card = complete(shipped("imagenet"), str(tmp_path))
    assert card.class_names() == names
    rows = read_split(card, "train", str(tmp_path)).to_pylist()
    assert (rows[2]["path"], rows[2]["label"]) == ("train/n00000002/n00000002_1.JPEG", 2)
    view, label = modalities.load_image(rows[2], str(tmp_path), ImageRecipe(32, mode="val"), KEY, 30)
    assert (view.shape, label) == ((1, 32, 32, 3), 2)


def test_cifar10_as_folders_of_jpeg_is_read_by_the_card_for_own_images(shared):
    root = shared / "data/images/cifar10_jpg"
    card = complete(shipped("my_images", splits={"train": "train", "val": "test"}), str(root))
    assert tuple(card.class_names()) == shipped("cifar10").classes
    assert (len(listed(card, "train", root)), len(listed(card, "val", root))) == (3000, 600)
    rows = read_split(card, "val", str(root)).to_pylist()[::100]
    for row in rows:
        view, label = modalities.load_image(row, str(root), ImageRecipe(32, 32, "val"), KEY, 30)
        stored = Image.open(root / row["path"])
        assert np.array_equal(view[0], np.asarray(stored.convert("RGB")))
        assert card.class_names()[label] == row["path"].split("/")[1]


def test_a_list_of_images(tmp_path):
    write(tmp_path, {"train.txt": "a/x.jpg 1\nb/y.png 0\n", "a/x.jpg": picture(), "b/y.png": picture(form="PNG")})
    card = custom(layout="list", splits={"train": "train.txt"}, classes=["cat", "dog"])
    assert listed(card, "train", tmp_path) == [("a/x.jpg", 1), ("b/y.png", 0)]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"labels": "point", "num_classes": 2}, "labels: .* require sample: points"),
        ({"file": "{path}/{00001..}.jpg"}, "file: must be one image per sample, not a folder of them"),
        ({"layout": "files", "splits": {"train": "{class}/{*}.jpg"}}, "file: must be one image per sample"),
        ({"layout": "cifar10", "sample": "clip"}, "sample: must be image for layout cifar10"),
        ({"layout": "visual_wake_words"}, "classes: must be two"),
        ({"layout": "visual_wake_words", "classes": ["a", "b", "c"]}, "classes: must be two"),
        ({"layout": "idx", "splits": {"train": ["a-ubyte"]}}, r"splits.train: must be \[pictures, labels\]"),
        ({"layout": "idx", "splits": {"train": ["a.idx", "b.idx"]}}, "splits.train: .* names that end in ubyte"),
        ({"channels": 1, "sample": "clip"}, "channels: 1 requires sample: image"),
        ({"channels": 2}, "channels: "),
        ({"layout": "cifar10", "splits": {"train": [1]}}, "splits.train: must be a path or several for layout cifar10"),
    ],
)
def test_a_wrong_card_is_refused_with_field_and_reason(fields, reason):
    with pytest.raises(UserError, match=f"mine.yaml: {reason}"):
        custom(**fields)


# --------------------------------------------------------------------------------------------------------- CIFAR


def records(num: int, num_labels: int, seed: int = 0) -> tuple[bytes, np.ndarray, np.ndarray]:
    """A .bin file of `num` records, its pictures `[num, 32, 32, 3]` and their classes."""
    rng = np.random.default_rng(seed)
    labels, pixels = rng.integers(0, 10, (num, num_labels)), rng.integers(0, 256, (num, 3, 32, 32))
    table = np.concatenate([labels, pixels.reshape(num, -1)], 1).astype(np.uint8)
    return table.tobytes(), pixels.transpose(0, 2, 3, 1).astype(np.uint8), labels[:, -1]


def test_the_binary_release_of_cifar10_is_read_record_by_record(tmp_path):
    made = {f"data_batch_{n}.bin": records(3, 1, n) for n in range(1, 6)} | {"test_batch.bin": records(4, 1, 9)}
    write(tmp_path, {name: data for name, (data, _, _) in made.items()})
    card = shipped("cifar10")
    rows = read_split(card, "train", str(tmp_path)).to_pylist()
    assert [row["path"] for row in rows[:4]] == [
        *(f"data_batch_1.bin#0000{n}" for n in range(3)),
        "data_batch_2.bin#00000",
    ]
    assert [row["label"] for row in rows] == [int(one) for n in range(1, 6) for one in made[f"data_batch_{n}.bin"][2]]
    for place, row in enumerate(rows):
        view, _ = modalities.load_image(row, str(tmp_path), ImageRecipe(32, 32, "val"), KEY, 30)
        assert np.array_equal(view[0], made[row["shard"]][1][place % 3])
    assert len(listed(card, "val", tmp_path)) == 4
    (tmp_path / "data_batch_3.bin").write_bytes(made["data_batch_3.bin"][0][:-1])
    with pytest.raises(
        UserError, match=r"data_batch_3.bin: is not a file of cifar10 \(9,218 bytes are not a whole number of"
    ):
        read_split(card, "train", str(tmp_path))
    (tmp_path / "data_batch_3.bin").write_bytes(made["data_batch_3.bin"][0])
    (tmp_path / "data_batch_5.bin").write_bytes(bytes([10]) + bytes(3072))
    with pytest.raises(UserError, match=r"data_batch_5.bin picture 0: label 10 is not in 0 to 9"):
        read_split(card, "train", str(tmp_path))
    with pytest.raises(UserError, match=r"test_batch.bin: no such file \(split 'val' of cifar10\)"):
        read_split(card, "val", str(tmp_path / "elsewhere"))


def test_a_record_that_is_gone_is_no_picture_of_something_else(tmp_path, monkeypatch):
    data, _, _ = records(3, 1)
    write(tmp_path, {"data_batch_1.bin": data})
    card = shipped("cifar10", splits={"train": "data_batch_1.bin"})
    last = read_split(card, "train", str(tmp_path)).to_pylist()[-1]
    (tmp_path / "data_batch_1.bin").write_bytes(data[:-100])
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(StorageError, match=r"cannot read it .*where the index has a picture"):
        read_whole(DISK, str(tmp_path), last)
    (tmp_path / "data_batch_1.bin").unlink()
    with pytest.raises(FileNotFoundError):
        read_whole(DISK, str(tmp_path), last)


def test_cifar100_takes_its_fine_labels(tmp_path):
    data, pictures, fine = records(5, 2)
    names = [f"thing {n}" for n in range(100)]
    write(tmp_path, {"train.bin": data, "test.bin": records(2, 2)[0], "fine_label_names.txt": "\n".join(names) + "\n"})
    card = complete(shipped("cifar100"), str(tmp_path))
    assert card.class_names() == names
    rows = read_split(card, "train", str(tmp_path)).to_pylist()
    assert [row["label"] for row in rows] == fine.tolist()
    view, _ = modalities.load_image(rows[4], str(tmp_path), ImageRecipe(32, 32, "val"), KEY, 30)
    assert np.array_equal(view[0], pictures[4])


# --------------------------------------------------------------------------------------------- Visual Wake Words


def coco(boxes: list[dict[str, Any]], images: list[dict[str, Any]] | None = None) -> str:
    sizes = [(1, "1.jpg"), (2, "2.jpg"), (3, "3.jpg"), (7, "7.jpg")]
    images = images or [{"id": number, "file_name": name, "width": 200, "height": 100} for number, name in sizes]
    categories = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}]
    return json.dumps({"images": images, "annotations": boxes, "categories": categories})


def box(image: int, width: float, height: float, category: int = 1) -> dict[str, Any]:
    outline = [[0.5, 1.5, 3.0, 2.0]]
    return {"id": 5, "image_id": image, "category_id": category, "bbox": [3, 4, width, height], "segmentation": outline}


def test_a_person_counts_from_more_than_half_a_percent_of_the_image(tmp_path):
    limit = image_sets.MIN_OBJECT_SHARE * 200 * 100
    assert limit == 100
    boxes = [box(1, 10, 10), box(2, 10, 10.1), box(3, 50, 50, category=18), box(1, 9, 9), box(2, 1, 1)]
    write(tmp_path, {"annotations/instances_train2017.json": coco(boxes)})
    card = shipped("visual_wake_words")
    train = [("train2017/1.jpg", 0), ("train2017/2.jpg", 1), ("train2017/3.jpg", 0), ("train2017/7.jpg", 0)]
    assert listed(card, "train", tmp_path) == train
    dogs = parse(Card, card.model_dump() | {"classes": ["no_dog", "dog"]}, "mine.yaml")
    assert [label for _, label in listed(dogs, "train", tmp_path)] == [0, 0, 1, 0]
    with pytest.raises(UserError, match=r"instances_val2017.json: no such file \(split 'val'"):
        listed(card, "val", tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[", "Expecting value"),
        ("[]", "has no list of categories: must be instance annotations of COCO"),
        ('{"categories": [{"name": "person", "id": 1}]}', "has no list of annotations"),
        ('{"categories": [{"name": "cat", "id": 1}]}', r"has no category 'person' \(it has: cat\)"),
        (coco([{"image_id": 1, "category_id": 1}]), "has annotations without a box"),
        (coco([box(1, 2, 3) | {"bbox": [1, 2, "a", 3]}]), "annotation 5 lacks its image_id, its category_id or the 4"),
        (coco([box(1, 2, 3) | {"image_id": [1]}]), "annotation 5 lacks its image_id"),
        (
            coco([], [{"id": 1, "file_name": "a.jpg", "width": 0, "height": 3}]),
            "image 1 lacks its id, file_name, width",
        ),
        (
            coco([], [{"id": 1, "file_name": "../a.jpg", "width": 3, "height": 3}]),
            "must be a path relative to the root",
        ),
        (coco([], [{"id": n, "file_name": "a.jpg", "width": 3, "height": 3} for n in (1, 2)]), "is listed twice"),
    ],
)
def test_wrong_annotations_are_refused_with_their_file(tmp_path, text, reason):
    write(tmp_path, {"annotations/instances_train2017.json": text})
    with pytest.raises(UserError, match=rf"instances_train2017.json.*{reason}"):
        listed(shipped("visual_wake_words"), "train", tmp_path)


# ------------------------------------------------------------------------------------------------------- prepare


class Prepared:
    """Result of the task of one chunk, without Ray: rows of the index, bad samples, and the root of the files."""

    def __init__(self, card: Card, root: str, out: Path, **fields: Any):
        data = {"card": card.model_dump(), "root": root or None, **fields.pop("data", {})}
        job = parse(prepare.PrepareJob, {"kind": "prepare", "name": "x", "data": data, **fields}, "x.yaml")
        generated = card.layout == "generated"
        table = prepare._table(job, card, "train", root)
        chunk = prepare._Chunk("train", 0, 0, table.num_rows)
        work = prepare._Work(str(out), root, card, job.data, job.pack, 30)
        part: dict[str, Any] = {"rows": [], "bad": [], "left_out": [], "objects": []}
        part |= {"bytes_in": 0, "bytes_out": 0, "psnr": []}
        make = prepare._generate if generated else prepare._convert
        make(work, chunk, table.to_pylist(), part, DISK, str(out))
        self.rows = index_table(part["rows"]).to_pylist()
        self.bad = {item["path"]: item["reason"] for item in part["bad"]}
        self.root, self.part = f"{out}/data", part


def test_packing_keeps_images_as_they_are_and_makes_only_large_ones_smaller(tmp_path):
    small, large = picture(40, 32), picture(300, 200)
    write(
        tmp_path / "in", {"a/small.jpg": small, "a/large.jpg": large, "b/broken.jpg": large[:999], "b/empty.jpg": b""}
    )
    card = complete(custom(), str(tmp_path / "in"))
    made = Prepared(card, str(tmp_path / "in"), tmp_path / "out", pack={"short_side": 64})
    assert sorted(made.bad) == ["b/broken.jpg", "b/empty.jpg"]
    found = {row["path"]: row for row in made.rows}
    assert read_whole(DISK, made.root, found["a/small.jpg"]) == small
    assert (found["a/large.jpg"]["width"], found["a/large.jpg"]["height"]) == (96, 64)
    assert len(read_whole(DISK, made.root, found["a/large.jpg"])) < len(large) / 3
    view, label = modalities.load_image(found["a/large.jpg"], made.root, ImageRecipe(64, 64, "val"), KEY, 30)
    assert (view.shape, label, len(made.part["psnr"])) == ((1, 64, 64, 3), 0, 1)


def test_images_that_are_only_checked_stay_where_they_are(tmp_path):
    data, pictures, _ = records(3, 1)
    write(tmp_path, {"data_batch_1.bin": data})
    made = Prepared(shipped("cifar10", splits={"train": "data_batch_1.bin"}), str(tmp_path), tmp_path / "out")
    assert [row["shard"] for row in made.rows] == ["data_batch_1.bin"] * 3
    view, _ = modalities.load_image(made.rows[2], str(tmp_path), ImageRecipe(32, 32, "val"), KEY, 30)
    assert np.array_equal(view[0], pictures[2])
    packed = Prepared(shipped("cifar10", splits={"train": "data_batch_1.bin"}), str(tmp_path), tmp_path / "p", pack={})
    view, _ = modalities.load_image(packed.rows[2], packed.root, ImageRecipe(32, 32, "val"), KEY, 30)
    assert np.array_equal(view[0], pictures[2])


def test_generated_images_are_packed_without_loss(tmp_path):
    made = Prepared(shipped("image_shapes"), "", tmp_path / "out", data={"clips": 20, "size": 48, "seed": 3})
    assert len(made.rows) == 16
    for row in made.rows[::5]:
        number = int(row["path"].split("/")[1][:6])
        expected, label = image_shapes.make_image(number, 3, 48)
        view, loaded = modalities.load_image(row, made.root, ImageRecipe(48, 48, "val"), KEY, 30)
        assert np.array_equal(view[0], expected)
        assert loaded == label == row["label"]


# ----------------------------------------------------------------------------------------------- idx, shades of gray


IDX = {"train": ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"]}


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(side.to_bytes(4, "big") for side in array.shape) + array.tobytes()


def digits(num: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (num, 28, 28), np.uint8), rng.integers(0, 10, num).astype(np.uint8)


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_are_read_packed_or_not_as_one_channel(tmp_path, packed):
    pictures, labels = digits()
    pack, end = (gzip.compress, ".gz") if packed else (bytes, "")
    write(tmp_path, {name + end: pack(idx(one)) for name, one in zip(IDX["train"], (pictures, labels), strict=True)})
    card = shipped("mnist")
    rows = read_split(card, "train", str(tmp_path)).to_pylist()
    assert [row["label"] for row in rows] == labels.tolist()
    assert rows[3]["path"] == f"train-images-idx3-ubyte{end}#00003"
    for place, row in enumerate(rows):
        view, _ = modalities.load_image(row, str(tmp_path), ImageRecipe(28, 28, "val", channels=1), KEY, 30)
        assert np.array_equal(view, pictures[place][None, :, :, None])
    made = Prepared(card, str(tmp_path), tmp_path / "out", pack={})
    view, _ = modalities.load_image(made.rows[4], made.root, ImageRecipe(28, 28, "val", channels=1), KEY, 30)
    assert np.array_equal(view[0, ..., 0], pictures[4])
    assert made.rows[4]["label"] == labels[4]
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte: no such file, gzipped or not .*: fix data"):
        read_split(card, "val", str(tmp_path))


def test_the_complete_mnist_is_read(shared):
    rows = read_split(shipped("mnist"), "val", str(shared / "data/mnist")).to_pylist()
    assert len(rows) == 10_000
    assert [row["label"] for row in rows[:6]] == [7, 2, 1, 0, 4, 1]
    view, label = modalities.load_image(rows[3], str(shared / "data/mnist"), ImageRecipe(28, 28, "val"), KEY, 30)
    assert (view.shape, label) == ((1, 28, 28, 3), 0)
    assert view[0, 14, 14].max() == 0, "a nought is empty in the middle"
    assert (view[..., 0] == view[..., 2]).all()


def bomb(size: int) -> bytes:
    """gzip of an idx file that declares 4 GB and holds `size` bytes of zeros."""
    return gzip.compress(bytes([0, 0, 8, 3]) + (1 << 16).to_bytes(4, "big") * 2 + (1).to_bytes(4, "big") + bytes(size))


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        (0, b"", "has no header of an idx file of bytes with 3 axes"),
        (0, idx(digits()[1]), "has no header of an idx file of bytes with 3 axes"),
        (0, idx(digits()[0])[:-1], "it declares 3,920 bytes, more than a file of 3,935 bytes can hold"),
        (0, idx(digits()[0]) + b"x", "it holds more than the 3,920 bytes that it declares"),
        (0, bomb(100), "it declares 4,294,967,296 bytes, more than a file of"),
        (0, gzip.compress(idx(digits()[0])[:-9]), "it ends before the 3,920 bytes that it declares"),
        (0, gzip.compress(idx(digits()[0]))[:-9], "it ends before the 3,920 bytes that it declares"),
        (0, gzip.compress(idx(digits()[0]))[:-8] + bytes(8), "gzip: .*incorrect data check"),
        (0, b"\x1f\x8b" + bytes(100), "gzip: "),
        (1, idx(digits(4)[1]), "holds 5 pictures, .* 4 labels"),
        (1, idx(np.full(5, 10, np.uint8)), "picture 0: label 10 is not in 0 to 9"),
    ],
)
def test_a_damaged_idx_file_is_one_sentence(tmp_path, name, data, reason):
    pictures, labels = digits()
    files = dict(zip(IDX["train"], (idx(pictures), idx(labels)), strict=True)) | {IDX["train"][name]: data}
    write(tmp_path, files)
    with pytest.raises(UserError, match=reason):
        read_split(shipped("mnist"), "train", str(tmp_path))


def test_a_packed_idx_file_that_has_changed_is_no_picture_of_something_else(tmp_path, monkeypatch):
    pictures, labels = digits()
    write(
        tmp_path, {f"{n}.gz": gzip.compress(idx(one)) for n, one in zip(IDX["train"], (pictures, labels), strict=True)}
    )
    rows = read_split(shipped("mnist"), "train", str(tmp_path)).to_pylist()
    write(tmp_path, {f"{IDX['train'][0]}.gz": gzip.compress(idx(pictures[:2]))})
    monkeypatch.setattr("time.sleep", lambda _: None)
    assert read_whole(DISK, str(tmp_path), rows[1]).endswith(pictures[1].tobytes())
    with pytest.raises(StorageError, match="where the index has a picture"):
        read_whole(DISK, str(tmp_path), rows[4])


def test_colours_become_shades_of_gray_in_training_and_validation(tmp_path):
    write(tmp_path, {"a/x.png": picture(40, 40, "PNG"), "b/x.png": picture(40, 40, "PNG", 1)})
    card = complete(custom(channels=1), str(tmp_path))
    data = parse(DataSpec, {"size": 32, "resize": 40}, "x.yaml")
    row = read_split(card, "train", str(tmp_path)).to_pylist()[0]
    for mode, crops in (("train", 1), ("val", 1), ("test", 10)):
        recipe = inputs.make_recipe(data, card, 0, mode, crops=crops)
        assert modalities.sample_shape(recipe) == (crops, 32, 32, 1)
        assert modalities.input_shape(recipe) == (1, 32, 32)
        view, _ = modalities.load_image(row, str(tmp_path), read_recipe(recipe), KEY, 30)
        assert view.shape == (crops, 32, 32, 1)
    with Image.open(tmp_path / "a/x.png") as stored:
        whole = read_recipe(inputs.make_recipe(data.at_size(40), card, 0, "val"))
        view, _ = modalities.load_image(row, str(tmp_path), ImageRecipe(40, 40, "val", channels=1), KEY, 30)
        assert np.array_equal(view[0, ..., 0], np.asarray(stored.convert("L")))
    assert whole.channels == 1
    assert card.prepared(["train"], None).channels == 1


def test_networks_get_as_many_channels_as_the_dataset_has():
    document = {"kind": "train", "name": "x", "data": {"card": {}, "root": "r", "size": 28, "resize": 28}}
    document |= {"batch": {"total": 8, "per_worker": 8}, "optim": {"lr": 0.1, "reference_batch": 8, "epochs": 1}}
    for model, channels in (("lenet300", 1), ("lenet300", 3), ("resnet20", 1), ("resnet20", 3)):
        job = parse(TrainJob, document | {"model": {"name": model}}, "x.yaml")
        card = custom(classes=["a", "b"], channels=channels)
        assert networks.model_options(job, card)["in_channels"] == channels
        assert networks.summary(job, card, 80).input == (channels, 28, 28)
    wrong = parse(TrainJob, document | {"model": {"name": "resnet20", "in_channels": 3}}, "x.yaml")
    with pytest.raises(UserError, match=r"model\.in_channels: the images have 1 channel "):
        networks.summary(wrong, custom(classes=["a", "b"], channels=1), 80)


# ------------------------------------------------------------------------------------------------- from a job


def test_a_job_says_how_images_are_varied():
    data = parse(DataSpec, {"size": 160, "images": {"area": [0.2, 1], "brightness": 0}}, "x.yaml")
    train = read_recipe(inputs.make_recipe(data, custom(classes=["a", "b"]), 0, "train"))
    assert (train.size, train.scale, train.brightness, train.saturation, train.flip) == (160, (0.2, 1.0), 0, 0.5, True)
    val = read_recipe(inputs.make_recipe(data, custom(classes=["a", "b"]), 0, "val"))
    assert (val.mode, val.flip, val.short_side) == ("val", False, 183)
    never = custom(classes=["left", "right"], flip="never")
    assert not inputs.make_recipe(data, never, 0, "train")["flip"]
    swapped = custom(classes=["left", "right"], flip="labels", flip_pairs=[["left", "right"]])
    assert inputs.make_recipe(data, swapped, 0, "train")["flip_labels"] == ((0, 1),)
    defaults = inputs.make_recipe(parse(DataSpec, {}, "x.yaml"), never, 0, "train")
    assert read_recipe(defaults) == ImageRecipe(flip=False)


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        ({"area": [0, 1]}, r"images.area: must be a range above 0 and up to 1, got \[0.0, 1.0\]"),
        ({"area": [0.5, 0.2]}, "images.area: must be a range"),
        ({"ratio": [0, 1]}, "images.ratio: must be a range above 0"),
        ({"brightness": 2}, "images.brightness: must be <= 1"),
        ({"brigthness": 0.1}, "images.brigthness: unknown field, did you mean 'brightness'"),
    ],
)
def test_a_wrong_variation_is_one_sentence(images, reason):
    with pytest.raises(UserError, match=reason):
        parse(DataSpec, {"images": images}, "x.yaml")


def test_a_picture_at_a_negative_byte_is_an_error_of_the_index_and_no_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.time, "sleep", lambda _: None)
    (tmp_path / "a.bin").write_bytes(bytes(10_000))
    row = {"path": "a.bin#0", "shard": "a.bin", "row": -7, "frames": 0}
    with pytest.raises(StorageError, match="it ends before byte"):
        read_whole(pafs.LocalFileSystem(), str(tmp_path), row)
