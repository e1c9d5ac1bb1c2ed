"""Point-cloud releases with their shipped cards, from files named like the real ones to packed clouds, without Ray."""

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import pytest
from tests import semantic_kitti

from slimray.data import modalities
from slimray.data.bytes import read_files, read_whole
from slimray.data.cards import Card, load_card
from slimray.data.conversion import MIN_TILE_POINTS, _tiles, labels_path
from slimray.data.index import index_table
from slimray.data.lists import complete, read_split
from slimray.data.points import point_sets
from slimray.data.points.clouds import Cloud
from slimray.data.points.files import read_cloud
from slimray.data.points.meshes import MESH_POINTS
from slimray.data.points.recipe import PointRecipe
from slimray.spec import UserError, parse
from slimray.verbs import prepare

DATASETS = Path(__file__).resolve().parents[3] / "datasets"
DISK = pafs.LocalFileSystem()
OFF = "OFF\n4 4 0\n0 0 0\n1 0 0\n0 1 0\n0 0 1\n3 0 2 1\n3 0 1 3\n3 0 3 2\n3 1 2 3\n"


def shipped(name: str, **fields) -> Card:
    return load_card(name, [DATASETS]).model_copy(update=fields)


def custom(**fields) -> Card:
    fields = {"name": "mine", "layout": "files", "splits": {"train": "{class}/*.ply"}, "sample": "points"} | fields
    return parse(Card, fields, "mine.yaml")


def write(root: Path, files: Mapping[str, str | bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def paths(card: Card, split: str, root: Any) -> list[str]:
    return read_split(card, split, str(root)).column("path").to_pylist()


class Prepared:
    """Result of the task of one chunk: rows of the index, bad samples, the clouds read back from the shard."""

    def __init__(self, card: Card, split: str, root: Any, out: Path, lo: int = 0, hi: int | None = None):
        card = complete(card, str(root))
        table = read_split(card, split, str(root))
        hi = table.num_rows if hi is None else hi
        job = parse(
            prepare.PrepareJob,
            {"kind": "prepare", "name": "x", "data": {"card": card.model_dump(), "root": str(root)}},
            "x.yaml",
        )
        chunk = prepare._Chunk(split, 0, lo, hi)
        work = prepare._Work(str(out), str(root), card, job.data, None, 30)
        part: dict[str, Any] = {"rows": [], "bad": [], "left_out": [], "bytes_in": 0, "bytes_out": 0, "psnr": []}
        prepare._convert(work, chunk, table.slice(lo, hi - lo).to_pylist(), part, DISK, str(out))
        self.root, self.bytes_in, self.bytes_out = f"{out}/data", part["bytes_in"], part["bytes_out"]
        self.rows = index_table(part["rows"]).to_pylist()
        self.bad = {item["path"]: item["reason"] for item in part["bad"]}
        self.notes = part.get("notes", [])
        self.left_out = [item["path"] for item in part["left_out"]]
        self.data = {row["path"]: read_whole(DISK, self.root, row) for row in self.rows}
        self.clouds: dict[str, Any] = {path: read_cloud(path, data) for path, data in self.data.items()}


# -------------------------------------------------------------------------------------------------- the cards


def test_cards_count_as_the_releases_do():
    assert shipped("s3dis").classes == point_sets.S3DIS_CLASSES
    assert shipped("semantic_kitti").classes == semantic_kitti.CLASSES
    counted = {raw: label for raw, label in semantic_kitti.IDS.items() if label != semantic_kitti.IGNORED}
    for name in ("semantic_kitti", "semantickitti_scan"):
        assert shipped(name).label_map == counted
        assert shipped(name).classes == semantic_kitti.CLASSES
    assert shipped("shapenet_part").num_classes == sum(point_sets.SHAPENET_PARTS.values())
    assert shipped("shapenet_part").parts == point_sets.SHAPENET_PARTS


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"splits": {"train": "*.ply"}}, r"splits.train: '\*.ply': must have a component {class}"),
        ({"splits": {"train": "a{class}/*.ply"}}, "splits.train: 'a{class}/.*': must have a component {class}"),
        ({"labels": "point", "num_classes": 2}, "splits.train: .*: must not have a component {class}"),
        ({"splits": {"train": []}}, "splits.train: must be a path or several for layout files"),
        ({"splits": {"train": ["{class}/*", 1]}}, "splits.train: must be a path or several for layout files"),
        ({"layout": "list", "splits": {"train": ["a", "b"]}}, "splits.train: must be one path for layout list"),
        ({"layout": "hmdb51", "splits": {"train": ["a", "b"]}}, r"splits.train: must be \[pattern, mark\]"),
        ({"layout": "s3dis"}, "labels: must be point for layout s3dis"),
        ({"sample": "clip", "tile": 2}, "labels: .* tile .* require sample: points"),
        ({"tile": 0}, "tile: must be > 0"),
        ({"point_labels": "{nmae}.label"}, "point_labels: 'nmae' is not known, did you mean 'name'"),
    ],
)
def test_a_wrong_card_is_refused_with_field_and_reason(fields, reason):
    with pytest.raises(UserError, match=f"mine.yaml: {reason}"):
        custom(**fields)


# --------------------------------------------------------------------------------------------------- patterns


def test_patterns_are_matched_part_by_part_and_leave_hidden_names_out(tmp_path):
    files = ["a/x.ply", "a/.y.ply", "a/x.txt", "a/sub/z.ply", "b/x.ply", ".c/x.ply", "loose.ply"]
    write(tmp_path, dict.fromkeys(files, "x"))
    card = complete(custom(), str(tmp_path))
    assert card.class_names() == ["a", "b"]
    assert read_split(card, "train", str(tmp_path)).select(["path", "label"]).to_pylist() == [
        {"path": "a/x.ply", "label": 0},
        {"path": "b/x.ply", "label": 1},
    ]
    points_of = {"labels": "point", "num_classes": 2}
    assert paths(custom(splits={"train": "*"}, **points_of), "train", tmp_path) == ["loose.ply"]
    several = custom(splits={"train": ["a/sub/*.ply", "[b-z]/*", "a/x.???"]}, **points_of)
    assert paths(several, "train", tmp_path) == ["a/sub/z.ply", "b/x.ply", "a/x.ply", "a/x.txt"]
    with pytest.raises(UserError, match=r"a/x.ply is listed twice"):
        paths(custom(splits={"train": ["a/*.ply", "a/x*"]}, **points_of), "train", tmp_path)
    with pytest.raises(UserError, match=r"c/\*.ply: no such files \(split 'train' of mine\): fix data.root"):
        paths(custom(splits={"train": ["a/*", "c/*.ply"]}, **points_of), "train", tmp_path)
    with pytest.raises(UserError, match="must be a path relative to the root"):
        paths(custom(splits={"train": "../*"}, **points_of), "train", tmp_path / "a")


def test_all_files_of_a_folder_may_be_one_sample(tmp_path):
    write(tmp_path, {"room/b.txt": "2", "room/a.txt": "1", "room/c.md": "3", "room/.d.txt": "4"})
    assert read_files(DISK, str(tmp_path), "room/{*}.txt") == {"a.txt": b"1", "b.txt": b"2"}
    row = {"path": "room/{*}.txt", "shard": "", "frames": 0, "row": -1}
    with zipfile.ZipFile(io.BytesIO(read_whole(DISK, str(tmp_path), row))) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == {"a.txt": b"1", "b.txt": b"2"}
    for path in ("room/{*}.ply", "elsewhere/{*}.txt"):
        with pytest.raises(FileNotFoundError):
            read_files(DISK, str(tmp_path), path)


def test_the_labels_of_a_cloud_lie_where_the_card_says():
    def of(form, path):
        return labels_path(custom(point_labels=form), path)

    assert of("{name}.label", "a/b.c/d.bin") == "a/b.c/d.label"
    assert of("{name}.label", "a.b/d") == "a.b/d.label"
    assert of("{folder}/{stem}.label", "d.bin") == "d.label"
    assert of("{folder}/../labels/{stem}.label", "sequences/00/velodyne/7.bin") == "sequences/00/labels/7.label"
    with pytest.raises(UserError, match=r"mine: point_labels: '../labels/d.label' must be a path relative to the root"):
        of("{folder}/../labels/{stem}.label", "d.bin")


# ------------------------------------------------------------------------------------------------------ S3DIS


def lines(array: np.ndarray) -> str:
    return "\n".join(" ".join(f"{v:g}" for v in row) for row in array.tolist()) + "\n"


def thing(rng: np.random.Generator, low: tuple, high: tuple, count: int) -> np.ndarray:
    return np.c_[rng.uniform(low, high, (count, 3)).round(3), rng.integers(0, 256, (count, 3))]


@pytest.fixture(scope="module")
def s3dis(tmp_path_factory):
    """A release of two rooms to train and two to validate on, one of them without any readable object."""
    root, rng = tmp_path_factory.mktemp("s3dis"), np.random.default_rng(0)
    for room in ("Area_1/hall_1", "Area_6/hall_2", "Area_5/office_1"):
        objects = {
            "floor_1.txt": lines(thing(rng, (-1, 2, 0), (3, 5, 0.1), 3000)),
            "chair_1.txt": lines(thing(rng, (0, 3, 0), (1, 4, 1), 900)),
            "stairs_1.txt": lines(thing(rng, (0, 3, 0), (1, 4, 1), 50)),
            "wall_1.txt": "1 2 3 10 20 30\n1 2\x10 3 4 5 6\n",
        }
        write(root, {f"{room}/Annotations/{name}": text for name, text in objects.items()})
        write(root, {f"{room}/{room[7:]}.txt": "1 2 3 4 5 6\n"})
    write(root, {"Area_5/office_2/Annotations/wall_1.txt": "x", "Area_5/.DS_Store": "", "Area_1/angle.txt": "x"})
    return root


def test_an_s3dis_room_becomes_windows_of_both_offsets_that_lead_back_into_it(s3dis, tmp_path):
    card = shipped("s3dis")
    assert paths(card, "train", s3dis) == [f"Area_{r}/Annotations/{{*}}.txt" for r in ("1/hall_1", "6/hall_2")]
    made = Prepared(card, "val", s3dis, tmp_path)
    assert made.bad == {"Area_5/office_2/Annotations/{*}.txt": "the room has no readable object of a known class"}
    assert made.left_out == ["Area_5/office_1/Annotations/wall_1.txt"]
    objects = read_files(DISK, str(s3dis), "Area_5/office_1/Annotations/{*}.txt")
    xyzrgb, labels, _ = point_sets.s3dis_room(objects)
    assert made.bytes_in == sum(map(len, objects.values()))
    assert next(iter(made.clouds)) == "Area_5/office_1#zero-0000"
    assert {row["label"] for row in made.rows} == {0}
    for offset in point_sets.S3DIS_OFFSETS:
        clouds = [cloud for path, cloud in made.clouds.items() if f"#{offset}-" in path]
        rows = np.concatenate([cloud.rows for cloud in clouds])
        assert np.array_equal(np.unique(rows), np.arange(len(xyzrgb)))
        assert np.array_equal(np.concatenate([cloud.labels for cloud in clouds]), labels[rows])
        colors = np.concatenate([cloud.features["colors"] for cloud in clouds])
        assert np.allclose(colors * 255, xyzrgb[rows, 3:], atol=1e-4)
        room = xyzrgb[:, :3] - xyzrgb[:, :3].min(0)
        place = np.concatenate([cloud.features["place"] for cloud in clouds])
        assert np.allclose(place, room[rows] / room.max(0), atol=1e-6)
    recipe = PointRecipe(512, ("colors", "place"), per_point=True)
    sample, label = modalities.load_points(made.rows[0], made.root, recipe, (0, 0, 0), 30)
    assert (sample.shape, label.shape) == ((1, 9, 512), (512,))
    assert recipe.num_channels == 9


def test_the_windows_of_a_room_do_not_depend_on_the_chunk_it_is_in(s3dis, tmp_path):
    both = Prepared(shipped("s3dis"), "train", s3dis, tmp_path / "both")
    second = Prepared(shipped("s3dis"), "train", s3dis, tmp_path / "second", lo=1)
    assert second.data
    assert second.data == {path: data for path, data in both.data.items() if path.startswith("Area_6/hall_2#")}
    assert len(both.data) == len(both.rows) > len(second.data)


# --------------------------------------------------------------------------------------------------- ShapeNet


def shape_text(parts: tuple[int, ...], count: int = 300) -> str:
    rng = np.random.default_rng(len(parts))
    return lines(np.c_[rng.normal(size=(count, 6)).round(4), rng.choice(parts, count)])


@pytest.fixture
def shapenet(tmp_path):
    names = {"train": ["02691156/a", "03001627/b"], "val": ["02691156/c"], "test": ["03001627/d", "02691156/e"]}
    lists = {
        f"train_test_split/shuffled_{split}_file_list.json": json.dumps([f"shape_data/{name}" for name in listed])
        for split, listed in names.items()
    }
    write(tmp_path, lists | {"synsetoffset2category.txt": "Airplane\t02691156\nChair\t03001627\n"})
    write(tmp_path, {f"02691156/{name}.txt": shape_text((0, 1, 3)) for name in "ac"})
    write(tmp_path, {f"03001627/{name}.txt": shape_text((12, 15)) for name in "bd"})
    write(tmp_path, {"02691156/e.txt": shape_text((0, 12))})
    return tmp_path


def test_shapenet_trains_on_two_of_its_lists_and_a_label_is_the_shape_of_the_one_hot(shapenet):
    card = shipped("shapenet_part")
    table = read_split(card, "train", str(shapenet))
    assert table.column("path").to_pylist() == ["02691156/a.txt", "03001627/b.txt", "02691156/c.txt"]
    assert table.column("label").to_pylist() == [0, 4, 0]
    made = Prepared(card, "train", shapenet, shapenet / "out")
    assert (len(made.rows), made.bad) == (3, {})
    assert set(made.clouds["03001627/b.txt"].labels) == {12, 15}
    recipe = PointRecipe(256, ("normals",), 16, "sphere", replace=True, jitter=0.01, per_point=True)
    sample, labels = modalities.load_points(made.rows[1], made.root, recipe, (0, 0, 0), 30)
    assert sample.shape == (1, 22, 256)
    assert np.array_equal(sample[0, 6:, 0], np.eye(16)[4])
    assert set(labels) == {12, 15}
    assert Prepared(card, "val", shapenet, shapenet / "val").bad == {
        "02691156/e.txt": "part 12 is not a part of Airplane"
    }


def test_a_broken_shapenet_release_is_refused_with_the_file(shapenet):
    card, place = shipped("shapenet_part"), "train_test_split/shuffled_train_file_list.json"
    for broken in ("[", "[1]", "7"):
        write(shapenet, {place: broken})
        with pytest.raises(UserError, match=r"shuffled_train_file_list.json: must be a JSON list of shapes"):
            read_split(card, "train", str(shapenet))
    write(shapenet, {place: '["shape_data/999/a"]'})
    with pytest.raises(UserError, match=r"entry 1: '999/a.txt' is not in one of the folders of synset"):
        read_split(card, "train", str(shapenet))
    write(shapenet, {"synsetoffset2category.txt": "Spoon 1\n"})
    with pytest.raises(UserError, match=r"synsetoffset2category.txt: a line is not a known shape name"):
        read_split(card, "train", str(shapenet))
    with pytest.raises(UserError, match=r"no such file \(the shapes of shapenet_part\): fix data.root"):
        read_split(card, "train", str(shapenet / "elsewhere"))


# -------------------------------------------------------------------------------------------------- ModelNet


def test_modelnet_meshes_become_points_of_their_surface(tmp_path):
    meshes = {f"{name}/{split}/{name}_0001.off": OFF for name in ("sofa", "bed") for split in ("train", "test")}
    write(tmp_path, meshes | {"bed/train/bed_0002.off": OFF.replace("OFF\n", "OFF"), "bed/test/bed_9.off": OFF[:40]})
    with pytest.raises(UserError, match="2 classes, but the card modelnet40 has num_classes: 40"):
        read_split(shipped("modelnet40"), "train", str(tmp_path))
    card = shipped("modelnet40", num_classes=0)
    made = Prepared(card, "train", tmp_path, tmp_path / "out")
    assert [(row["path"], row["label"], row["frames"]) for row in made.rows] == [
        ("bed/train/bed_0001.off", 0, MESH_POINTS),
        ("bed/train/bed_0002.off", 0, MESH_POINTS),
        ("sofa/train/sofa_0001.off", 1, MESH_POINTS),
    ]
    assert made.clouds["sofa/train/sofa_0001.off"].features["normals"].shape == (MESH_POINTS, 3)
    val = Prepared(card, "val", tmp_path, tmp_path / "val")
    assert (len(val.rows), list(val.bad)) == (2, ["bed/test/bed_9.off"])


# --------------------------------------------------------------------------------------------- SemanticKITTI


def test_semantic_kitti_scans_find_their_labels_and_classes(shared, tmp_path):
    scan = (shared / "data/pointcloud/semantickitti_scan/000000_az000-240.bin").read_bytes()
    raw = np.frombuffer(scan, "<f4").reshape(-1, 4)
    label = (shared / "data/pointcloud/semantickitti_scan/000000_az000-240.label").read_bytes()
    for sequence in ("00", "03", "07", "08", "09", "10", "11"):
        write(tmp_path / "sequences" / sequence, {"velodyne/000004.bin": scan})
        write(tmp_path / "sequences" / sequence, {"labels/000004.label": label} if sequence != "09" else {})
    card = shipped("semantic_kitti")
    assert paths(card, "train", tmp_path) == [
        f"sequences/{sequence}/velodyne/000004.bin" for sequence in ("00", "03", "07", "09", "10")
    ]
    made = Prepared(card, "val", tmp_path, tmp_path / "out")
    cloud = made.clouds["sequences/08/velodyne/000004.bin"]
    assert np.array_equal(cloud.coords, raw[:, :3])
    assert np.array_equal(cloud.features["intensity"], raw[:, 3:])
    assert np.array_equal(cloud.labels, semantic_kitti.labels_of(np.frombuffer(label, "<u4")))
    assert made.bytes_in == len(scan) + len(label)
    some = Prepared(card, "train", tmp_path, tmp_path / "some", lo=3)
    assert (len(some.rows), some.bad) == (1, {"sequences/09/velodyne/000004.bin": "no such file"})


def test_one_scan_is_cut_into_tiles_that_lead_back_into_it(shared, tmp_path):
    root = shared / "data/pointcloud/semantickitti_scan"
    made = Prepared(shipped("semantickitti_scan"), "train", root, tmp_path)
    (path,) = paths(shipped("semantickitti_scan"), "train", root)
    whole = read_cloud(path, (root / path).read_bytes())
    raw = np.frombuffer((root / path).with_suffix(".label").read_bytes(), "<u4")
    rows = np.concatenate([cloud.rows for cloud in made.clouds.values()])
    assert len(made.rows) == 18
    assert list(made.clouds)[-1] == f"{path}#0017"
    assert len(np.unique(rows)) == len(rows) > 0.97 * len(whole)
    for cloud in made.clouds.values():
        assert np.array_equal(cloud.coords, whole.coords[cloud.rows])
        assert np.array_equal(cloud.labels, semantic_kitti.labels_of(raw[cloud.rows]))
        assert np.ptp(cloud.coords[:, :2], 0).max() <= 20
        assert len(cloud) >= MIN_TILE_POINTS
        assert cloud.labels.max() >= 0


def test_tiles_without_enough_points_or_labels_are_left_out_and_rows_lead_through():
    rng = np.random.default_rng(0)
    labels = np.repeat([1, 1, -1], [150, 99, 120])
    coords = rng.random((369, 3))
    coords[:, 0] += np.repeat([0, 2.5, 4.5], [150, 99, 120])
    rows = 1000 + np.arange(len(coords))
    cloud = Cloud(coords.astype(np.float32), {"intensity": coords[:, :1]}, labels, rows, np.array([1.0, 2, 3]))
    (tile,) = _tiles(cloud, 2.0)
    assert tile.rows is not None
    assert tile.rows.tolist() == rows[:150].tolist()
    assert tile.origin.tolist() == [1, 2, 3]
    unlabelled = Cloud(cloud.coords, rows=rows)
    assert [len(tile) for tile in _tiles(unlabelled, 2.0)] == [150, 120]


# ---------------------------------------------------------------------------------------------- one's own files


def test_dales_objects_are_read_by_the_card_for_own_clouds(shared, tmp_path):
    root = shared / "data/pointcloud/dales_objects"
    card = complete(shipped("my_clouds"), str(root))
    assert card.class_names() == ["0", "1", "2", "3", "4"]
    assert read_split(card, "train", str(root)).num_rows == 294
    made = Prepared(card, "val", root, tmp_path)
    assert (len(made.rows), made.bad) == (75, {})
    assert np.bincount([row["label"] for row in made.rows]).tolist() == [15] * 5
    for row in made.rows[::15]:
        original = np.loadtxt(root / row["path"])
        cloud = made.clouds[row["path"]]
        assert np.allclose(cloud.coords + cloud.origin, original, atol=1e-3)
        assert row["frames"] == len(original)


def test_caps_with_labelled_points_are_read_by_the_card_for_own_clouds(shared, tmp_path):
    root = shared / "data/pointcloud/shapenet_cap"
    card = shipped("my_cloud_parts")
    assert len(paths(card, "train", root)) == 9
    made = Prepared(card, "val", root, tmp_path)
    assert list(made.clouds) == ["cap_test_08.txt", "cap_test_09.txt"]
    for path, cloud in made.clouds.items():
        original = np.loadtxt(root / path)
        assert np.array_equal(cloud.labels, original[:, 6] - 6)
        assert np.allclose(cloud.features["normals"], original[:, 3:6])
    other = Prepared(card.model_copy(update={"label_map": {7: 0}}), "val", root, tmp_path / "other")
    assert set(np.unique(other.clouds["cap_test_08.txt"].labels)) == {-1, 0}
    plain = Prepared(card.model_copy(update={"label_map": {}}), "val", root, tmp_path / "plain")
    assert plain.bad == dict.fromkeys(made.clouds, "has label 7, but there are 2 classes")
    assert not plain.rows
    assert not (tmp_path / "plain/data").exists()


def test_damaged_clouds_cost_themselves_alone(shared, tmp_path):
    names = ["nan_rows.xyz", "empty.xyz", "one_point.xyz", "truncated.ply", "good.xyz", "gone.xyz"]
    for name in names[:4]:
        write(tmp_path, {name: (shared / "data/pointcloud/damaged" / name).read_bytes()})
    write(tmp_path, {"good.xyz": "0 0 0\n1 1 1\n", "train.txt": "\n".join(f"{name} 0" for name in names)})
    made = Prepared(shipped("my_clouds"), "train", tmp_path, tmp_path / "out")
    assert [(row["path"], row["row"]) for row in made.rows] == [("nan_rows.xyz", 0), ("good.xyz", 1)]
    assert set(made.bad) == set(names) - {"nan_rows.xyz", "good.xyz"}
    assert made.notes == ["nan_rows.xyz: 16 of 151 points left out, not finite numbers: 16 by x, y, z"]
    assert made.bad["gone.xyz"] == "no such file"
