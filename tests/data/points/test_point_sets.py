"""Raw releases become training data: S3DIS windows as recorded, ShapeNet files, KITTI frustums, label maps."""

import json

import numpy as np
import pytest
from tests import semantic_kitti
from tests.kitti_scenes import corners_of

from slimray.data.modalities import modality_of, sample_shape, target_of
from slimray.data.points import point_sets as sets
from slimray.data.points.files import read_cloud, read_labels
from slimray.data.points.recipe import PointRecipe, make_points
from slimray.data.samples import BadSample

# ------------------------------------------------------------------------------------------------------ S3DIS


@pytest.fixture(scope="module")
def recorded(shared):
    return np.load(shared / "parity/pvcnn_s3dis_prepare.npz", allow_pickle=False)


def nine_channels(window) -> np.ndarray:
    return np.concatenate([window.coords, window.features["colors"], window.features["place"]], 1)


@pytest.mark.parametrize("offset", sets.S3DIS_OFFSETS)
def test_a_room_is_cut_into_the_recorded_windows(recorded, offset):
    windows = sets.s3dis_windows(recorded["xyzrgb"], recorded["label"], sets.S3DIS_OFFSETS[offset], (0, 0), 2048)
    nums, rows = recorded[f"{offset}_data_num"], recorded[f"{offset}_indices_split_to_full"]
    assert [len(window) for window in windows] == nums.tolist()
    room = recorded["xyzrgb"][:, :3] - recorded["xyzrgb"][:, :3].min(0)
    middles = [np.round(room[r[0], :2] - d[0, :2], 6) for r, d in zip(rows, recorded[f"{offset}_data"], strict=True)]
    compared = 0
    for block in np.unique(middles, axis=0):  # the window of a point within its block was random
        these = [i for i, middle in enumerate(middles) if np.array_equal(middle, block)]
        mine, theirs = (np.concatenate([r[i][: nums[i]] for i in these]) for r in ([w.rows for w in windows], rows))
        assert np.array_equal(np.sort(mine), np.sort(theirs))
        data = np.concatenate([recorded[f"{offset}_data"][i][: nums[i]] for i in these])
        seg = np.concatenate([recorded[f"{offset}_label_seg"][i][: nums[i]] for i in these])
        a, b = np.argsort(mine), np.argsort(theirs)
        assert np.abs(np.concatenate([nine_channels(windows[i]) for i in these])[a] - data[b]).max() < 1e-6
        assert np.array_equal(np.concatenate([windows[i].labels for i in these])[a], seg[b])
        compared += len(these)
    assert compared == len(windows)


def test_every_point_of_a_room_is_in_a_window_and_windows_are_a_function_of_their_key(recorded):
    def rows(key):
        cut = sets.s3dis_windows(recorded["xyzrgb"], recorded["label"], 0.75, key, 1024)
        assert max(len(window) for window in cut) <= 1024
        return np.concatenate([window.rows for window in cut])

    assert np.array_equal(np.unique(rows((1, 0))), np.arange(18000))
    assert np.array_equal(rows((1, 0)), rows((1, 0)))
    assert not np.array_equal(rows((1, 0)), rows((2, 0)))


def room_of(*blocks: tuple[float, float, int]) -> np.ndarray:
    """A room with the given numbers of points in 1.5 m blocks at (x, y), and a corner point at 0."""
    rng = np.random.default_rng(0)
    coords = [rng.uniform([x, y, 0], [x + 1.5, y + 1.5, 3], (n, 3)) for x, y, n in blocks]
    xyz = np.concatenate([np.zeros((1, 3)), *coords])
    return np.c_[xyz, rng.integers(0, 256, (len(xyz), 3))]


def test_a_sparse_block_joins_its_first_full_neighbour():
    room = room_of((0, 0, 900), (1.5, 0, 50), (1.5, 1.5, 900), (4.5, 0, 30))
    windows = sets.s3dis_windows(room, np.zeros(len(room), np.int64), 0.0, (0,), 1000)
    assert [len(np.unique(window.rows)) for window in windows] == [901, 950, 30]  # (0, 1) comes before (-1, 0)
    assert set(range(901, 951)) <= set(windows[1].rows)


def test_thin_cells_of_a_block_are_filled_up_by_repeats():
    xyz = np.concatenate([np.tile([[0.0, 0, 0]], (8, 1)), [[1.0, 1, 1]], np.tile([[0.5, 0.5, 2]], (3, 1))])
    room = np.c_[xyz, np.zeros((12, 3))]  # cells of 8, 1 and 3 points: 4 on average
    (window,) = sets.s3dis_windows(room, np.arange(12), 0.0, (0,), 100)
    counts = np.bincount(window.rows).tolist()
    assert counts[:9] == [1] * 8 + [4]
    assert sorted(counts[9:]) == [1, 1, 2]


def test_a_room_is_joined_from_its_objects_and_what_does_not_read_is_named():
    objects = {
        "wall_1.txt": b"1 2 3 10 20 30\n4 5 6 1 2 3\n",
        "chair_2.txt": b"7 8 9 0 0 0\n",
        "stairs_1.txt": b"0 0 0 0 0 0\n",
        "ceiling_1.txt": b"1 2 3 4 5 6\n1 2\x10 3 4 5 6\n",
    }
    xyzrgb, labels, skipped = sets.s3dis_room(objects)
    assert xyzrgb.tolist() == [[7, 8, 9, 0, 0, 0], [1, 2, 3, 10, 20, 30], [4, 5, 6, 1, 2, 3]]
    assert labels.tolist() == [9, 3, 3]
    assert list(skipped) == ["ceiling_1.txt"]
    with pytest.raises(BadSample, match="no readable object"):
        sets.s3dis_room({"stairs_1.txt": b"0 0 0 0 0 0\n"})


# --------------------------------------------------------------------------------------------------- ShapeNet


def test_shapenet_shapes_read_with_their_parts(shared):
    files = sorted((shared / "data/pointcloud/shapenet_cap").glob("*.txt"))
    assert len(files) == 11
    cap = sets.SHAPENET_SHAPES.index("Cap")
    recipe = PointRecipe(2048, ("normals",), 16, "sphere", replace=True, jitter=0.01)
    for number, path in enumerate(files):
        cloud = read_cloud(path.name, path.read_bytes(), sets.SHAPENET_COLUMNS)
        sets.check_shapenet_parts(cloud, cap)
        assert 2329 <= len(cloud) <= 2792
        assert set(np.unique(cloud.labels)) <= {6, 7}
        assert make_points(cloud, recipe, (0, 0, number), cap).points.shape == (1, 22, 2048)
    with pytest.raises(BadSample, match="part 6 is not a part of Bag"):
        sets.check_shapenet_parts(cloud, sets.SHAPENET_SHAPES.index("Bag"))


def test_shapenet_parts_run_through_all_shapes():
    parts = [part for shape in range(16) for part in sets.shapenet_part_range(shape)]
    assert parts == list(range(50))
    assert sets.shapenet_part_range(sets.SHAPENET_SHAPES.index("Motorbike")) == range(30, 36)
    assert sets.shapenet_part_range(15) == range(47, 50)


def test_shapenet_lists_are_read():
    assert sets.shapenet_synsets(b"Airplane\t02691156\nTable\t04379243\n") == {"02691156": 0, "04379243": 15}
    assert sets.shapenet_split(b'["shape_data/02691156/1a2b"]') == ["02691156/1a2b.txt"]
    with pytest.raises(BadSample):
        sets.shapenet_synsets(b"Spoon 123\n")


# ------------------------------------------------------------------------------------------------------ KITTI


@pytest.fixture(scope="module")
def calibration(shared):
    """Calibration of scan 000007; the sample scan 000008 was taken by the same rig on the same day."""
    path = shared / "data/pointcloud/mmdet3d_samples/tests/data/kitti/kitti_infos_mono3d.coco.json"
    image = json.loads(path.read_text())["images"][0]

    def numbers(name, columns):
        return " ".join(repr(v) for row in image[name][:3] for v in row[:columns])

    text = f"P0: 1 2 3\nP2: {numbers('cam_intrinsic', 4)}\nR0_rect: {numbers('rect', 3)}\n"
    return sets.kitti_calibration(f"{text}Tr_velo_to_cam: {numbers('Trv2c', 4)}\n\n".encode())


@pytest.fixture(scope="module")
def scan(shared):
    data = (shared / "data/pointcloud/mmdet3d_samples/demo/data/kitti/000008.bin").read_bytes()
    cloud = read_cloud("000008.bin", data)
    return np.concatenate([cloud.coords, cloud.features["intensity"]], 1)


IMAGE = (1242, 375)
DETECTED = b"val/000008.txt 2 0.97 597.6 176.2 720.9 261.1\n/x/000008.png 2 0.4 884.5 178.3 956.4 240.2\n"


def test_turning_is_as_recorded(shared):
    conventions = np.load(shared / "parity/pvcnn_conventions.npz", allow_pickle=False)
    turned = sets.turned(conventions["rot_in"], float(conventions["rot_angle"]))
    assert np.abs(turned - conventions["rot_out"]).max() < 1e-6


def test_the_sample_scan_projects_into_its_picture(scan, calibration):
    pixels = sets.projected(sets.rectified(scan[:, :3], calibration), calibration)
    assert len(scan) == 17238  # the sample was cut to what the camera sees
    assert (pixels >= 0).all()
    assert (pixels < IMAGE).all()


def test_frustums_of_detections_on_the_sample_scan(scan, calibration):
    detections = sets.rgb_detections(DETECTED)["000008"]
    near, far = sets.kitti_frustums(scan, calibration, detections, IMAGE)
    assert (near.kind, near.score, near.box) == ("Car", 0.97, None)
    assert near.cloud.labels is None
    assert len(near.cloud) == 1126
    for frustum in (near, far):
        coords = frustum.cloud.coords
        assert coords[:, 2].min() > 2
        assert abs(np.median(coords[:, 0] / coords[:, 2])) < 0.05  # the box now looks along z
        back = sets.turned(coords, -frustum.rotation)
        pixels = sets.projected(back, calibration)
        x1, y1, x2, y2 = frustum.box_2d
        assert (pixels > [x1 - 0.01, y1 - 0.01]).all()
        assert (pixels < [x2 + 0.01, y2 + 0.01]).all()
        assert np.allclose(back, sets.rectified(scan[frustum.cloud.rows, :3], calibration), atol=1e-4)
    assert np.median(near.cloud.coords[:, 2]) < np.median(far.cloud.coords[:, 2])
    sample = make_points(near.cloud, PointRecipe(1024, ("intensity",), 3, replace=True), (0, 0, 0), shape=0)
    assert sample.points.shape == (1, 7, 1024)


def labelled(scan, calibration, box) -> bytes:
    """The label line of a 3D box (x y z of the centre, l w h, heading) with the 2D box around it."""
    pixels = sets.projected(corners_of(box), calibration)
    low, high = np.clip(pixels.min(0), 0, IMAGE), np.clip(pixels.max(0), 0, np.array(IMAGE) - 1)
    x, y, z, length, w, h, heading = box
    numbers = [0.0, 1, -1.5, *low, *high, h, w, length, x, y + h / 2, z, heading]
    return ("Car " + " ".join(f"{v:.6f}" for v in numbers) + "\n").encode()


BOX = (1.07, 0.82, 14.44, 3.66, 1.6, 1.47, -1.25)  # about a car of the sample scan


def test_frustums_of_labels_know_object_and_box(scan, calibration):
    text = labelled(scan, calibration, BOX) + b"DontCare -1 -1 -10 500 160 530 190 -1 -1 -1 -1000 -1000 -1000 -10\n"
    objects = sets.kitti_objects(text)
    assert np.allclose(objects[0].box, BOX, atol=1e-5)
    assert objects[1].box is None
    (frustum,) = sets.kitti_frustums(scan, calibration, objects, IMAGE)
    on_object = frustum.cloud.labels.astype(bool)
    assert 600 < on_object.sum() < 720
    assert np.array_equal(sets.inside_box(frustum.cloud.coords.astype(np.float64), frustum.box), on_object)
    assert abs(frustum.box[0]) < 0.5
    corners = corners_of(frustum.box)
    assert np.allclose((corners[0] + corners[6]) / 2, frustum.box[:3])
    back = sets.turned(corners, -frustum.rotation)
    assert np.allclose(back, corners_of(BOX), atol=1e-4)


def test_corners_are_in_the_published_order():
    corners = corners_of((0, 0, 0, 2, 4, 6, 0))
    assert corners[:, 0].tolist() == [1, 1, -1, -1, 1, 1, -1, -1]
    assert corners[:, 1].tolist() == [3, 3, 3, 3, -3, -3, -3, -3]
    assert corners[:, 2].tolist() == [2, -2, -2, 2, 2, -2, -2, 2]
    turned = corners_of((0, 0, 0, 2, 0, 0, np.pi / 2))
    assert np.allclose(turned[0], [0, 0, -1])


def test_shaken_copies_stay_near_and_are_a_function_of_their_key(scan, calibration):
    objects = sets.kitti_objects(labelled(scan, calibration, BOX))

    def boxes(key):
        return np.array([f.box_2d for f in sets.kitti_frustums(scan, calibration, objects, IMAGE, key, 5, 0.1)])

    first = boxes((0, 8))
    assert first.shape == (5, 4)
    assert np.array_equal(first, boxes((0, 8)))
    assert not np.array_equal(first, boxes((0, 9)))
    size, still = np.ptp(np.reshape(objects[0].box_2d, (2, 2)), 0), np.array(objects[0].box_2d)
    assert np.abs((first[:, :2] + first[:, 2:]) / 2 - (still[:2] + still[2:]) / 2).max(0)[0] <= 0.1 * size[0]
    assert np.abs((first[:, 2:] - first[:, :2]) / size - 1).max() <= 0.1 + 1e-9
    assert len({f.rotation for f in sets.kitti_frustums(scan, calibration, objects, IMAGE, (0, 8), 5, 0.1)}) == 5


def test_low_boxes_empty_boxes_and_other_kinds_are_left_out(scan, calibration):
    def num(*boxes, kind="Car"):
        objects = [sets.KittiObject(kind, box) for box in boxes]
        return len(sets.kitti_frustums(scan, calibration, objects, IMAGE))

    assert num((597.6, 176.2, 720.9, 261.1)) == 1
    assert num((597.6, 236.2, 720.9, 261.1)) == 0  # 24.9 pixels high
    assert num((597.6, 0.0, 720.9, 40.0)) == 0  # sky
    assert num((597.6, 176.2, 720.9, 261.1), kind="Van") == 0
    far_box = sets.KittiObject("Car", (597.6, 176.2, 720.9, 261.1), (0.0, -20.0, 14.0, 4.0, 2.0, 2.0, 0.0))
    assert sets.kitti_frustums(scan, calibration, [far_box], IMAGE) == []


def test_broken_calibrations_labels_and_detections_are_refused():
    with pytest.raises(BadSample, match="R0_rect"):
        sets.kitti_calibration(b"P2: 1 2 3 4 5 6 7 8 9 10 11 12\n")
    with pytest.raises(BadSample, match="calibration cannot be read"):
        sets.kitti_calibration(b"P2: 1 2\nR0_rect: 1\nTr_velo_to_cam: 1\n")
    with pytest.raises(BadSample, match="has 4 words"):
        sets.kitti_objects(b"Car 0 0 0\n")
    with pytest.raises(BadSample, match="line 2"):
        sets.rgb_detections(DETECTED.splitlines()[0] + b"\nval/1.txt 9 0.5 1 2 3 4\n")


# ----------------------------------------------------------------------------------------------- SemanticKITTI


def test_a_semantic_kitti_scan_reads_with_its_classes(shared):
    scan = shared / "data/pointcloud/semantickitti_scan/000000_az000-240.bin"
    labels = scan.with_suffix(".label")
    cloud = read_cloud(scan.name, scan.read_bytes(), labels=(labels.name, labels.read_bytes()))
    assert len(cloud) == 80835
    classes = semantic_kitti.labels_of(cloud.labels)
    names = {semantic_kitti.CLASSES[i] for i in np.unique(classes) if i != semantic_kitti.IGNORED}
    assert {"car", "road", "sidewalk", "vegetation", "pole", "traffic-sign"} <= names
    assert "truck" not in names
    road = cloud.coords[classes == semantic_kitti.CLASSES.index("road")]
    assert np.median(road[:, 2]) < -1.5  # the scanner is 1.73 m above it


def test_small_samples_of_other_formats_read(shared):
    samples = shared / "data/pointcloud/mmdet3d_samples"
    colored = ("x", "y", "z", "r", "g", "b")
    for name, columns in (
        ("demo/data/scannet/scene0000_00.bin", colored),
        ("demo/data/sunrgbd/000017.bin", colored),
        ("tests/data/s3dis/points/Area_1_office_2.bin", colored),
        ("tests/data/semantickitti/sequences/00/velodyne/000000.bin", ()),
    ):
        path = samples / name
        cloud = read_cloud(path.name, path.read_bytes(), columns)
        assert np.isfinite(cloud.coords).all()
        if columns:
            assert 0 <= cloud.features["colors"].min() < cloud.features["colors"].max() <= 1
    labels = samples / "tests/data/semantickitti/sequences/00/labels/000000.label"
    assert len(read_labels(labels.name, labels.read_bytes(), 50)) == 50
    sweep = next((samples / "tests/data/nuscenes/samples/LIDAR_TOP").glob("*.bin"))
    cloud = read_cloud(sweep.name, sweep.read_bytes(), ("x", "y", "z", "intensity", "ring"))
    assert len(cloud) == 100
    assert set(cloud.features) == {"intensity", "ring"}


def test_a_frustum_is_stored_whole(scan, calibration):
    (made,) = sets.kitti_frustums(scan, calibration, sets.kitti_objects(labelled(scan, calibration, BOX)), IMAGE)
    data = sets.write_frustum(made)
    assert data == sets.write_frustum(made)
    back = sets.read_frustum("f.npz", data)
    assert (back.kind, back.rotation, back.box_2d, back.score) == (made.kind, made.rotation, made.box_2d, made.score)
    assert np.array_equal(back.box, made.box)
    assert np.array_equal(back.cloud.coords, made.cloud.coords)
    assert np.array_equal(back.cloud.labels, made.cloud.labels)
    with pytest.raises(BadSample, match="is not a frustum"):
        sets.read_frustum("f.npz", data[:-30])


def test_a_frustum_is_a_sample_with_its_truth(scan, calibration, tmp_path):
    (made, *_) = sets.kitti_frustums(scan, calibration, sets.kitti_objects(labelled(scan, calibration, BOX)), IMAGE)
    (tmp_path / "f.npz").write_bytes(sets.write_frustum(made))
    recipe = PointRecipe(64, ("intensity",), 3, replace=True, mode="val", kind="frustum")
    row = {"path": "f.npz", "label": 0, "shard": "", "row": -1, "frames": 0}
    kind = modality_of(recipe.to_dict())
    points, truth = kind.load(row, str(tmp_path), recipe, (0, 0, 0), 10.0)
    assert points.shape == sample_shape(recipe.to_dict()) == (1, 7, 64)
    assert truth.shape == target_of(recipe.to_dict()).shape == (75,)
    number = sets.KITTI_CLASSES.index(made.kind)
    assert points[0, 4:, 0].tolist() == [float(i == number) for i in range(3)]
    on_object = sets.inside_box(points[0, :3].T.astype(np.float64), made.box)
    assert (truth[:64].astype(bool) == on_object).mean() > 0.95  # float32 at the rim
    np.testing.assert_allclose(truth[64:71], made.box, rtol=1e-6)
    assert truth[71] == number
    assert truth[72] == pytest.approx(made.rotation, abs=1e-6)
    mirrored = PointRecipe(**(vars(recipe) | {"mode": "train", "flip": True}))
    boxes = {round(float(kind.load(row, str(tmp_path), mirrored, (0, e, 0), 10.0)[1][64]), 4) for e in range(12)}
    assert boxes == {round(float(made.box[0]), 4), round(-float(made.box[0]), 4)}


@pytest.mark.parametrize("wrong", ["nan", "inf", "-inf", "1e999"])
def test_kitti_numbers_that_are_not_finite_are_refused(wrong):
    rows = {"P2": 12, "R0_rect": 9, "Tr_velo_to_cam": 12}
    for name in rows:
        text = "".join(f"{n}: {' '.join(['7'] * (k - 1) + [wrong if n == name else '7'])}\n" for n, k in rows.items())
        with pytest.raises(BadSample, match=f"{name} of the calibration holds numbers that are not finite"):
            sets.kitti_calibration(text.encode())
    for place in range(14):
        fields = ["0"] * place + [wrong] + ["0"] * (13 - place)
        with pytest.raises(BadSample, match="line 1 of the labels holds numbers that are not finite"):
            sets.kitti_objects(f"Car {' '.join(fields)}\n".encode())
    for place in range(6):
        fields = ["2", "0.5", "1", "2", "3", "4"]
        fields[place] = wrong
        with pytest.raises(BadSample, match="line 1 of the detections"):
            sets.rgb_detections(f"val/000001.png {' '.join(fields)}\n".encode())


def test_a_camera_without_a_focal_length_is_refused():
    text = f"P2: {'0 ' * 12}\nR0_rect: {'1 ' * 9}\nTr_velo_to_cam: {'1 ' * 12}\n"
    with pytest.raises(BadSample, match="a focal length that is not positive"):
        sets.kitti_calibration(text.encode())
