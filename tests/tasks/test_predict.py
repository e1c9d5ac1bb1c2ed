"""A finished run predicts on a user's files: clips and clouds of any format, labels of all points, refusals."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import laspy
import numpy as np
import plyfile
import pytest
import safetensors.torch
import torch

from slimray import models, runs
from slimray.cli import main
from slimray.data.images import image_shapes
from slimray.data.images.pictures import ImageRecipe
from slimray.data.points import shapes
from slimray.data.points.clouds import Cloud, write_cloud
from slimray.data.points.files import read_cloud
from slimray.data.points.recipe import PointRecipe, make_points
from slimray.data.video import moving_shapes
from slimray.data.video.clips import ClipRecipe
from slimray.runtime.segment import class_colors
from slimray.tasks import predict
from slimray.tasks.network import Network, load_network, to_input, top_classes

PARTS = tuple(f"{name} {part}" for name, parts in shapes.PARTS.items() for part in parts)
SMALL = {"width": 0.125, "voxel": 0.25}
CLOUD = shapes.make_cloud(0, 0, 1000)[0]
RECIPE = PointRecipe(num_points=256, normalize="sphere", mode="val", per_point=True)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working folder; its runs are in `runs`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLIMRAY_STORAGE", raising=False)
    return tmp_path


def train(name: str, classes: tuple[str, ...], recipe: Any, **options: Any) -> Network:
    """Return the folder of the untrained run `net`; small variances make its answers differ between points."""
    torch.manual_seed(0)
    options |= {"name": name, "num_classes": len(classes)}
    state = models.build(**options).state_dict()
    state = {key: value * 0.05 if key.endswith("running_var") else value for key, value in state.items()}
    run = runs.open_run("runs", "net")
    runs.write_job(run, {"kind": "train", "name": "net"})
    taken = {"recipe": recipe.to_dict(), "pixels": {"average": "logits"}, "classes": list(classes)}
    runs.write_model(run, safetensors.torch.save(state), options, taken)
    return load_network(run)


def segmentation(**changes: Any) -> Network:
    recipe = PointRecipe(**{**RECIPE.to_dict(), **changes})
    return train("pvcnn_s3dis", PARTS, recipe, in_channels=recipe.num_channels, **SMALL)


def text(*columns: np.ndarray) -> bytes:
    return "".join(" ".join(f"{n:.9g}" for n in row) + "\n" for row in np.concatenate(columns, 1)).encode()


def array(value: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, value)
    return buffer.getvalue()


def ply(coords: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    table = np.array([tuple(row) for row in coords], [("x", "f4"), ("y", "f4"), ("z", "f4")])
    plyfile.PlyData([plyfile.PlyElement.describe(table, "vertex")]).write(buffer)
    return buffer.getvalue()


def pcd(coords: np.ndarray) -> bytes:
    head = f"VERSION .7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nWIDTH {len(coords)}\nHEIGHT 1\n"
    return f"{head}POINTS {len(coords)}\nDATA binary\n".encode() + coords.astype("<f4").tobytes()


def las(coords: np.ndarray) -> bytes:
    header = laspy.LasHeader(point_format=3, version="1.2")
    header.scales = np.full(3, 1e-6)
    data, buffer = laspy.LasData(header), io.BytesIO()
    data.x, data.y, data.z = coords.T.astype(np.float64)
    data.write(buffer)
    return buffer.getvalue()


FORMATS: dict[str, Callable[[np.ndarray], bytes]] = {
    "a.xyz": text,
    "a.npy": array,
    "a.npz": lambda coords: write_cloud(Cloud(coords)),
    "a.ply": ply,
    "a.pcd": pcd,
    "a.bin": lambda coords: np.concatenate([coords, coords[:, :1]], 1, dtype=np.float32).tobytes(),
    "a.las": las,
}


def put(file: str, data: bytes) -> Path:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_bytes(data)
    return Path(file)


def labels(path: str) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return dict(arrays)


@pytest.fixture
def shell(monkeypatch, capsys) -> Callable[..., tuple[Any, str, str]]:
    """`shell("a.ply", "--top", "2")` does what `slimray predict net a.ply --top 2` does: code, output, errors."""

    def run(*arguments: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["slimray", "predict", "net", *arguments])
        code: Any = 0
        try:
            main.main()
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


# ------------------------------------------------------------------------------------------------- whole files


def test_a_clip_gets_probabilities_also_by_a_run_that_never_validated(shell):
    recipe = ClipRecipe(num_segments=4, size=32, resize=36, mode="train", flip=True)
    train("tsm_resnet18", moving_shapes.CLASSES, recipe, width=0.125, num_segments=4)
    put("a.mp4", moving_shapes.encode_h264(moving_shapes.make_clip(0, 0)[0]))
    code, out, _ = shell("a.mp4", "--json")
    (row,) = json.loads(out)
    assert (code, row["reason"], row["written"]) == (0, "", [])
    assert {name for name, _ in row["top"]} == set(moving_shapes.CLASSES)
    assert sum(p for _, p in row["top"]) == pytest.approx(1)
    assert shell("a.mp4", "--json")[1] == out, "nothing is drawn at random"


def test_an_image_gets_the_probabilities_of_its_centre_and_what_is_no_image_a_reason(shell):
    recipe = ImageRecipe(size=32, mode="train", flip=True)
    network = train("resnet18", image_shapes.CLASSES, recipe, width=0.125)
    picture, _ = image_shapes.make_image(5, 0, 37)
    put("a.jpg", image_shapes.encode_png(picture))
    put("b.jpg", b"no image")
    code, out, err = shell("a.jpg", "b.jpg", "--top", "3", "--json")
    found, refused = json.loads(out)
    with torch.no_grad():
        view = to_input(picture[None, None, 2:34, 2:34], network.pixels, torch.device("cpu"))
        expected = top_classes(network.net(view)[0], image_shapes.CLASSES, 3)
    assert [name for name, _ in found["top"]] == [name for name, _ in expected]
    assert [p for _, p in found["top"]] == pytest.approx([p for _, p in expected], abs=1e-5)
    assert (code, refused["reason"]) == (2, "is not a picture that can be read")
    assert "1 of 2 files could not be read" in err
    code, _, err = shell("a.jpg", "--columns", "x y z")
    assert (code, "--columns: is for clouds of points, but this network takes images" in err) == (2, True)


@pytest.mark.parametrize("file", FORMATS)
def test_a_cloud_of_any_format_gets_the_same_probabilities(file):
    recipe = PointRecipe(num_points=256, normalize="sphere", mode="val")
    network = train("pvcnn_cls", shapes.CLASSES, recipe, in_channels=3, **SMALL)
    (found,) = predict.predict_files(network, [put(file, FORMATS[file](CLOUD))], 3)
    view = torch.from_numpy(make_points(Cloud(CLOUD), recipe, (0, 0, 0)).points)
    with torch.no_grad():
        expected = top_classes(network.net(view)[0], shapes.CLASSES, 3)
    assert [name for name, _ in found.top] == [name for name, _ in expected]
    assert [p for _, p in found.top] == pytest.approx([p for _, p in expected], abs=1e-3)
    assert sorted(path.name for path in Path().iterdir()) == sorted([file, "runs"]), "nothing is written"


# ---------------------------------------------------------------------------------------------- labels of points


@pytest.mark.parametrize("file", FORMATS)
def test_every_point_of_a_cloud_of_any_format_gets_a_label(shell, file):
    segmentation()
    before = put(file, FORMATS[file](CLOUD)).read_bytes()
    code, out, err = shell(file)
    assert (code, err) == (0, "")
    assert out.splitlines()[1] == "  labels of its points: a.labels.npz, a.labels.ply"
    found = labels("a.labels.npz")
    assert found["coords"].dtype == np.float64
    np.testing.assert_allclose(found["coords"], CLOUD, atol=1e-6)
    assert found["classes"].tolist() == list(PARTS)
    assert ((found["confidence"] > 1 / len(PARTS)) & (found["confidence"] <= 1)).all()
    assert len(np.unique(found["labels"])) > 1
    assert Path(file).read_bytes() == before


def test_the_logits_of_a_point_are_averaged_over_the_views_that_hold_it():
    network = segmentation()
    cloud = read_cloud("a.npy", array(CLOUD))
    sample = make_points(cloud, PointRecipe(**{**RECIPE.to_dict(), "mode": "test"}), (0, 0, 0))
    total, seen = np.zeros((1000, len(PARTS))), np.zeros(1000)
    for view, rows in zip(sample.points, sample.indices, strict=True):
        with torch.no_grad():
            scores = network.net(torch.from_numpy(view[None]))[0].numpy().T
        for row, score in zip(rows, scores, strict=True):
            total[row] += score
            seen[row] += 1
    assert set(seen) == {1, 2}, "1024 places for 1000 points"
    list(predict.predict_files(network, [put("a.npy", array(CLOUD))], 5))
    found = labels("a.labels.npz")
    mean = total / seen[:, None]
    np.testing.assert_array_equal(found["labels"], mean.argmax(1))
    np.testing.assert_allclose(found["confidence"], np.exp(mean).max(1) / np.exp(mean).sum(1), rtol=1e-4)


@pytest.mark.parametrize("num_points", [100, 256, 257, 5000])
def test_how_many_views_are_computed_at_once_changes_no_label(num_points):
    network, most, at_once = segmentation(), -(-num_points // 256), []
    put("a.npy", array(shapes.make_cloud(1, 0, num_points)[0]))
    network.net.register_forward_pre_hook(lambda _, inputs: at_once.append(len(inputs[0])))
    found = []
    for rows in (1, 3):
        list(predict.predict_files(network, [Path("a.npy")], 5, rows=rows))
        found.append(labels("a.labels.npz"))
        assert max(at_once) == min(rows, most)
        assert sum(at_once) == most
        at_once.clear()
    assert len(found[0]["labels"]) == num_points
    np.testing.assert_allclose(found[0]["confidence"], found[1]["confidence"], rtol=1e-4)
    assert (found[0]["labels"] == found[1]["labels"]).mean() > 0.999


def test_the_shares_of_the_classes_are_those_of_the_labels(shell):
    segmentation()
    put("a.npy", array(CLOUD))
    row = json.loads(shell("a.npy", "--top", "2", "--json")[1])[0]
    found = labels("a.labels.npz")["labels"]
    shares = {PARTS[i]: float((found == i).mean()) for i in range(len(PARTS))}
    assert row["top"] == [[name, shares[name]] for name in sorted(shares, key=lambda name: -shares[name])[:2]]
    assert row["written"] == ["a.labels.npz", "a.labels.ply"]
    assert all(share for _, share in json.loads(shell("a.npy", "--top", "99", "--json")[1])[0]["top"])


def test_the_labels_are_a_coloured_cloud_for_viewers(shell):
    segmentation()
    put("a.npy", array(CLOUD))
    shell("a.npy")
    found, cloud = labels("a.labels.npz"), read_cloud("a.labels.ply", Path("a.labels.ply").read_bytes())
    np.testing.assert_array_equal(cloud.coords, found["coords"].astype(np.float32))
    np.testing.assert_array_equal(cloud.labels, found["labels"])
    colors = class_colors(len(PARTS))
    np.testing.assert_array_equal(np.round(cloud.features["colors"] * 255), colors[found["labels"]])
    assert "class 0 'lamp stand'" in plyfile.PlyData.read("a.labels.ply").comments


def test_classes_have_colours_of_their_own_whatever_their_number():
    assert len(np.unique(class_colors(24), axis=0)) == 24
    np.testing.assert_array_equal(class_colors(24)[:5], class_colors(5))


def test_far_coordinates_come_back_as_they_were(shell):
    segmentation()
    far = CLOUD + np.array([500_000.25, 5_400_000.5, 100.0])
    put("a.npy", array(far))
    assert shell("a.npy")[0] == 0
    np.testing.assert_allclose(labels("a.labels.npz")["coords"], far, atol=1e-6)
    vertex = plyfile.PlyData.read("a.labels.ply")["vertex"]
    np.testing.assert_allclose(np.stack([vertex[name] for name in "xyz"], 1), far, atol=1e-6)


def test_points_without_a_measurement_have_no_label_and_the_others_say_which_they_are(shell):
    segmentation()
    holes = CLOUD.copy()
    holes[10:20] = np.nan
    put("a.pcd", pcd(holes))
    assert shell("a.pcd")[0] == 0
    found = labels("a.labels.npz")
    assert len(found["labels"]) == 990
    np.testing.assert_array_equal(found["coords"], CLOUD[found["rows"]])


def test_labels_go_into_a_folder_on_request(shell):
    segmentation()
    put("in/a.b.npy", array(CLOUD))
    assert shell("in/a.b.npy", "--out", "new/folder")[0] == 0
    assert sorted(path.name for path in Path("new/folder").iterdir()) == ["a.b.labels.npz", "a.b.labels.ply"]
    assert [path.name for path in Path("in").iterdir()] == ["a.b.npy"]


# -------------------------------------------------------------------------------------------------- channels


def test_columns_of_text_are_named_by_an_option(shell):
    segmentation(channels=("colors",))
    colors = np.random.default_rng(0).integers(0, 256, (1000, 3))
    put("a.txt", text(CLOUD, np.ones((1000, 1)), colors))
    code, out, _ = shell("a.txt")
    assert code == 2
    assert out == ("a.txt: has no colors, which the network takes (it has: extra): name its columns with --columns\n")
    assert shell("a.txt", "--columns", "x y z - r g b")[0] == 0
    found = labels("a.labels.npz")["labels"]
    put("b.npz", write_cloud(Cloud(CLOUD, {"colors": (colors / 255).astype(np.float32)})))
    assert shell("b.npz", "--columns", "x,y,z")[0] == 0
    assert (labels("b.labels.npz")["labels"] == found).mean() > 0.99


def test_points_are_left_out_only_for_numbers_that_the_network_takes_and_are_counted(shell):
    intensity = np.ones((1000, 1))
    intensity[:37] = np.nan
    put("a.npz", write_cloud(Cloud(CLOUD, {"intensity": intensity.astype(np.float32)})))
    segmentation()
    code, out, _ = shell("a.npz")
    assert code == 0
    assert "left out" not in out
    assert len(labels("a.labels.npz")["labels"]) == 1000
    segmentation(channels=("intensity",))
    code, out, _ = shell("a.npz")
    assert code == 0
    assert "\n  37 of 1000 points left out, not finite numbers: 37 by intensity\n" in out
    assert labels("a.labels.npz")["rows"].tolist() == list(range(37, 1000))
    assert json.loads(shell("a.npz", "--json")[1])[0]["notes"].startswith("37 of 1000 points left out")


def test_a_dialect_that_cannot_be_told_is_given_with_the_columns(shell):
    segmentation()
    points = np.random.default_rng(0).uniform(1, 9, (300, 3))
    put("a.txt", "".join(";".join(f"{v:.3f}".replace(".", ",") for v in row) + "\n" for row in points).encode())
    code, out, _ = shell("a.txt")
    assert code == 2
    assert "read in 2 ways" in out
    assert shell("a.txt", "--columns", "decimal=comma")[0] == 0
    assert np.allclose(labels("a.labels.npz")["coords"], points.round(3), atol=1e-6)


def test_a_cloud_without_the_channels_of_the_network_is_one_sentence(shell):
    segmentation(channels=("colors", "intensity"))
    put("a.ply", ply(CLOUD))
    code, out, err = shell("a.ply")
    assert (code, err) == (2, "1 of 1 files could not be read; the reasons are above\n")
    assert out == "a.ply: has no colors, intensity, which the network takes (it has: coordinates only)\n"
    put("a.npz", write_cloud(Cloud(CLOUD, {"colors": np.ones((1000, 4)), "intensity": np.ones((1000, 1))})))
    assert shell("a.npz")[1] == "a.npz: gives 8 channels, but the network takes 7\n"


def test_normals_are_estimated_where_a_file_has_none(shell):
    segmentation(channels=("normals",))
    put("a.ply", ply(CLOUD))
    assert shell("a.ply")[0] == 0


def test_a_network_that_takes_the_class_of_a_cloud_is_told_it(shell):
    train("pvcnn_shapenet", PARTS, PointRecipe(**{**RECIPE.to_dict(), "channels": ("normals",), "num_shapes": 5}),
          num_shapes=5, **SMALL)  # fmt: skip
    put("a.ply", ply(CLOUD))
    for wrong in ((), ("--shape", "5")):
        code, _, err = shell("a.ply", *wrong)
        assert code == 2
        assert err == "--shape: this network takes the class of each cloud: give a number from 0 to 4\n"
    confidence = []
    for number in ("0", "1"):
        assert shell("a.ply", "--shape", number)[0] == 0
        confidence.append(labels("a.labels.npz")["confidence"])
    assert (confidence[0] != confidence[1]).any()


# --------------------------------------------------------------------------------------------------- refusals


def test_files_that_cannot_be_read_are_named_and_the_others_labelled(shell):
    segmentation()
    put("a.npy", array(CLOUD))
    put("b.npy", array(CLOUD)[:-4])
    put("c.mp4", b"no cloud")
    code, out, err = shell("gone.ply", "b.npy", "c.mp4", "a.npy", "--json")
    assert (code, err) == (2, "3 of 4 files could not be read; the reasons are above\n")
    rows = json.loads(out)
    assert [bool(row["top"]) for row in rows] == [False, False, False, True]
    assert [row["reason"][:26] for row in rows] == [
        "no such file",
        "2999 of 3000 declared numb",
        "is not a point file by its",
        "",
    ]
    assert [row["written"] for row in rows[:3]] == [[], [], []]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("a.ply a.labels.ply", "a.labels.ply: the labels of a.ply would overwrite it: omit it, or give --out"),
        ("in/a.labels.ply a.ply --out in", "in/a.labels.ply: the labels of a.ply would overwrite it"),
        ("link/a.labels.ply in/a.ply", "in/a.labels.ply: the labels of in/a.ply would overwrite it"),
        (
            "a.ply in/a.ply --out new",
            "a.ply, in/a.ply: their labels would be the same file, new/a.labels.npz: predict one",
        ),
        ("a.ply --out in/a.ply", "--out: in/a.ply is not a folder"),
        ("a.ply --shape 1", "--shape: this network does not take the class of a cloud"),
    ],
)
def test_no_file_of_the_user_is_overwritten(shell, folder, arguments, sentence):
    segmentation()
    Path("link").symlink_to("in")
    files = ("a.ply", "a.labels.ply", "in/a.ply", "in/a.labels.ply")
    for file in files:
        put(file, ply(CLOUD))
    code, out, err = shell(*arguments.split())
    assert (code, out) == (2, "")
    assert err.startswith(sentence)
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in (".ply", ".npz")}
    assert there == set(files)
    assert all(Path(file).read_bytes() == ply(CLOUD) for file in files)


def test_labels_of_an_earlier_time_are_replaced(shell):
    segmentation()
    put("a.npy", array(CLOUD))
    put("a.labels.npz", b"old")
    assert shell("a.npy", "a.npy")[0] == 0
    assert len(labels("a.labels.npz")["labels"]) == 1000


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--columns=xyz", "--columns: is for clouds of points, but this network takes clips: leave it out\n"),
        ("--out=x", "--out: this network labels whole files, so there is nothing to write: remove it\n"),
        ("--shape=0", "--shape: this network does not take the class of a cloud: leave it out\n"),
    ],
)
def test_options_of_clouds_are_refused_for_clips(shell, option, sentence):
    recipe = ClipRecipe(num_segments=4, size=32, resize=36, mode="val")
    train("tsm_resnet18", moving_shapes.CLASSES, recipe, width=0.125, num_segments=4)
    put("a.mp4", b"x")
    assert shell("a.mp4", option) == (2, "", sentence)


def test_what_takes_no_files_says_so(shell):
    frustums = PointRecipe(16, ("intensity",), 3, mode="val", kind="frustum")
    train("frustum_pointnet", ("Car", "Pedestrian", "Cyclist"), frustums, width=0.125)
    put("a.ply", ply(CLOUD))
    assert shell("a.ply") == (
        2,
        "",
        "this network takes frustums, which are not files: score it with an evaluate job\n",
    )
    images = ImageRecipe(size=32, mode="val")
    train("ofa_mobilenetv3", ("a", "b"), images, preset="tiny")
    code, out, err = shell("a.ply")
    assert (code, out) == (2, "")
    assert err.startswith("this run holds a supernet")


@pytest.mark.parametrize("recipe", [{"kind": "hologram"}, {"kind": "points", "colour": 1}, []])
def test_a_recipe_of_another_version_is_one_sentence(shell, recipe):
    segmentation()
    path = Path("runs/net/model/input.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"recipe": recipe}))
    put("a.ply", ply(CLOUD))
    code, out, err = shell("a.ply")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith(f"{Path.cwd()}/runs/net")
