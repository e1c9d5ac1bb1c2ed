"""Point files are read correctly or refused with a reason; samples follow the recipe and depend on the key alone."""

import io
import json
import struct

import laspy
import numpy as np
import plyfile
import pytest
import trimesh

from slimray.data.points import geometry
from slimray.data.points.clouds import Cloud, write_cloud
from slimray.data.points.files import read_cloud, read_labels
from slimray.data.points.geometry import estimate_normals, farthest_points
from slimray.data.points.meshes import MESH_POINTS, read_mesh, sample_surface
from slimray.data.points.recipe import PointRecipe, make_points, normalized
from slimray.data.samples import BadSample

ZOO = {  # file -> points kept, points left out, features
    "brisk_keypoints_gt.pcd": (1860, 0, {"scale"}),
    "bun0.pcd": (397, 0, {"normals", "curvature"}),
    "bun01.pcd": (200, 0, set()),
    "bun02.pcd": (217, 0, set()),
    "bun03.pcd": (197, 0, set()),
    "bunny.pcd": (397, 0, set()),
    "car6.pcd": (10031, 0, set()),
    "colored_cloud.pcd": (1000, 0, {"colors", "normals", "curvature"}),
    "cube.ply": (24, 0, set()),
    "curve3d.pcd": (110, 0, set()),
    "fragment.pcd": (113662, 0, {"colors", "normals", "curvature"}),
    "lamppost.pcd": (1771, 0, set()),
    "milk.pcd": (13704, 0, set()),
    "nhood_test.pcd": (36, 0, {"intensity"}),
    "octants.pcd": (8, 0, set()),
    "office1.pcd": (254456, 52744, {"colors"}),
    "pcl_logo.pcd": (12909, 0, {"colors"}),
    "redkitchen_000.ply": (258342, 0, set()),
    "sac_plane_test.pcd": (3268, 15, {"normals", "curvature"}),
}
DAMAGED = {
    "empty.xyz": "the file is empty",
    "header_only.pcd": "0 of 397 declared points are there",
    "odd_size.bin": "has 16007 bytes, not a multiple of 16",
    "one_point.xyz": "has 1 usable point of 1",
    "short_last_line.xyz": "the last line has no line break",
    "truncated.ply": "declares 36 points and faces of at least 300 bytes, but 294 bytes are there",
    "truncated_binary.pcd": "596 of 1000 declared points are there",
}


@pytest.fixture(scope="module")
def clouds(shared):
    return shared / "data/pointcloud"


@pytest.mark.parametrize("name", ZOO)
def test_every_file_of_the_zoo_reads_right(clouds, name):
    cloud = read_cloud(name, (clouds / "file_zoo" / name).read_bytes())
    kept, removed, features = ZOO[name]
    assert (len(cloud), cloud.num_removed, set(cloud.features)) == (kept, removed, features)
    assert cloud.coords.dtype == np.float32
    assert np.isfinite(cloud.coords).all()
    assert all(np.isfinite(array).all() for array in cloud.features.values())
    if removed:
        assert len(np.unique(cloud.rows)) == kept


@pytest.mark.parametrize("name", [name for name in ZOO if name.endswith(".pcd")])
def test_pcd_files_read_as_open3d_reads_them(clouds, name):
    path = clouds / "file_zoo" / name
    cloud = read_cloud(name, path.read_bytes())
    read = geometry._open3d().t.io.read_point_cloud(str(path), remove_nan_points=False, remove_infinite_points=False)
    rows = slice(None) if cloud.rows is None else cloud.rows
    assert np.array_equal(cloud.coords, read.point.positions.numpy()[rows])
    for feature, array in cloud.features.items():
        scale = np.float32(255 if feature == "colors" else 1)
        assert np.array_equal(array, read.point[feature].numpy()[rows] / scale), feature


def test_a_cloud_without_coordinates_is_refused(clouds):
    with pytest.raises(BadSample, match=r"has no x, y, z \(it has: rgba\)"):
        read_cloud("stereo_left.pcd", (clouds / "file_zoo/stereo_left.pcd").read_bytes())


@pytest.mark.parametrize("name", DAMAGED)
def test_every_damaged_file_is_refused_with_the_reason(clouds, name):
    with pytest.raises(BadSample, match=DAMAGED[name]):
        read_cloud(name, (clouds / "damaged" / name).read_bytes())


def test_too_few_labels_are_refused(clouds):
    scan, labels = ((clouds / "damaged" / f"labels_too_few.{end}").read_bytes() for end in ("bin", "label"))
    with pytest.raises(BadSample, match="1500 labels for 2000 points"):
        read_cloud("scan.bin", scan, labels=("scan.label", labels))


# ----------------------------------------------------------------------------------------- all formats alike


def scene(n: int = 200) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.uniform(-5, 5, (n, 3)).astype(np.float32), rng.integers(0, 7, n)


def files() -> dict[str, tuple[str, bytes, dict]]:
    """The same 200 labelled points in every format: name, bytes, options of read_cloud."""
    coords, labels = scene()
    rows = np.c_[coords, labels]
    columns = {"columns": ("x", "y", "z", "label")}
    text = "".join(f"{x:.9g} {y:.9g} {z:.9g} {label:.0f}\n" for x, y, z, label in rows)
    npy, table = io.BytesIO(), np.empty(len(rows), [("x", "f4"), ("y", "f4"), ("z", "f4"), ("label", "u1")])
    np.save(npy, rows)
    for i, name in enumerate(table.dtype.names):
        table[name] = rows[:, i]
    found = {
        "text": ("a.txt", text.encode(), columns),
        "windows text": ("a.xyz", text.replace("\n", "\r\n").encode(), columns),
        "csv": ("a.csv", b"x,y,z,label\n" + text.replace(" ", ",").encode(), {}),
        "commented names": ("a.asc", b"# scanned\n//X Y Z Classification\n" + text.encode(), {}),
        "counted": ("a.pts", f"{len(rows)}\n{text}".encode(), columns),
        "npy": ("a.npy", npy.getvalue(), columns),
        "npz": ("a.npz", write_cloud(Cloud(coords, labels=labels)), {}),
        "bin": ("a.bin", rows.astype("<f4").tobytes(), columns),
    }
    for kind, as_text in (("ply", False), ("ply text", True)):
        ply = io.BytesIO()
        plyfile.PlyData([plyfile.PlyElement.describe(table, "vertex")], text=as_text).write(ply)
        found[kind] = ("a.ply", ply.getvalue(), {})
    for kind in ("las", "laz"):
        header = laspy.LasHeader(point_format=3, version="1.4")
        header.scales = np.full(3, 1e-7)
        las, buffer = laspy.LasData(header), io.BytesIO()
        las.x, las.y, las.z = coords.T.astype(np.float64)
        las.classification = labels
        las.write(buffer, do_compress=kind == "laz")
        found[kind] = (f"a.{kind}", buffer.getvalue(), {})
    head = (
        "VERSION .7\nFIELDS x y z label\nSIZE 4 4 4 1\nTYPE F F F U\nCOUNT 1 1 1 1\nWIDTH 200\nHEIGHT 1\nPOINTS 200\n"
    )
    found["pcd"] = ("a.pcd", f"{head}DATA binary\n".encode() + table.tobytes(), {})
    found["pcd text"] = ("a.pcd", f"{head}DATA ascii\n{text}".encode(), {})
    return found


FILES = files()


@pytest.mark.parametrize("kind", FILES)
def test_the_same_points_read_the_same_from_every_format(kind):
    name, data, options = FILES[kind]
    coords, labels = scene()
    cloud = read_cloud(name, data, **options)
    assert np.abs(cloud.coords - coords).max() < 1e-6
    assert cloud.labels is not None
    assert np.array_equal(cloud.labels, labels)
    assert cloud.labels.dtype == np.int64


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.617, 0.9])
def test_a_file_cut_anywhere_is_refused(kind, share):
    name, data, options = FILES[kind]
    cut = data[: int(len(data) * share) | 1]  # .bin: a cut between points leaves a shorter, whole file
    while kind in ("text", "windows text", "csv", "commented names") and cut.endswith(b"\n"):
        cut = cut[:-3]  # the same between lines
    with pytest.raises(BadSample):
        read_cloud(name, cut, **options)


@pytest.mark.parametrize("kind", FILES)
def test_changed_bytes_give_a_cloud_or_a_reason_and_nothing_else(kind):
    name, data, options = FILES[kind]
    for seed in range(25):
        rng = np.random.default_rng(seed)
        broken = bytearray(data)
        for _ in range(6):
            broken[rng.integers(len(data) if seed % 2 else min(len(data), 400))] = rng.integers(256)
        try:
            cloud = read_cloud(name, bytes(broken), **options)
        except BadSample:
            continue
        assert np.isfinite(cloud.coords).all()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.npy", b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<f8', 'fortran_order': False, 'shape': (10**12, 3), }"),
        ("a.npy", FILES["npy"][1].replace(b"(200, 4), }         ", b"(200000000000, 4), }")),
        ("a.ply", FILES["ply"][1].replace(b"vertex 200", b"vertex 2000000000")),
        ("a.pcd", FILES["pcd"][1].replace(b" 200\n", b" 99000000\n")),
        ("a.las", FILES["las"][1][:247] + struct.pack("<Q", 10**12) + FILES["las"][1][255:]),
    ],
)
def test_a_huge_declared_count_is_refused_before_memory_is_taken(name, data):
    with pytest.raises(BadSample):
        read_cloud(name, data)


def test_pickled_arrays_are_refused():
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"x": 1}], object), allow_pickle=True)
    with pytest.raises(BadSample, match="not plain numbers"):
        read_cloud("a.npy", buffer.getvalue())


def test_a_point_fewer_than_a_las_header_declares_is_refused():
    name, data, _ = FILES["las"]
    with pytest.raises(BadSample, match="199 of 200 declared points"):
        read_cloud(name, data[:-34])


def test_first_bytes_tell_more_than_the_name():
    assert len(read_cloud("a.xyz", FILES["ply"][1])) == 200
    with pytest.raises(BadSample, match="is not a point file by its extension or first bytes"):
        read_cloud("notes.md", b"hello")


def test_a_text_without_a_last_line_end_reads_if_its_numbers_all_have_the_same_length():
    assert len(read_cloud("a.xyz", b"1.00 2.00 3.00\n1.00 2.00 4.00")) == 2
    with pytest.raises(BadSample, match="may be truncated"):
        read_cloud("a.xyz", b"1.00 2.00 3.00\n1.00 2.00 4.0")


def test_unreadable_words_and_short_lines_are_refused():
    with pytest.raises(BadSample, match="abc"):
        read_cloud("a.xyz", b"1 2 3\n1 2 abc\n")
    with pytest.raises(BadSample, match="number of columns changed"):
        read_cloud("a.xyz", b"1 2 3\n1 2\n")
    head = b"FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nWIDTH 2\nHEIGHT 1\nDATA ascii\n"
    with pytest.raises(BadSample, match="abc"):
        read_cloud("a.pcd", head + b"1 2 abc\n1 2 3\n")
    with pytest.raises(BadSample, match="number of columns changed"):
        read_cloud("a.pcd", head + b"1 2\n1 2 3\n")


def test_columns_are_named_grouped_and_left_out():
    data = b"1 2 3 0 0 1 255 0 51 7\n4 5 6 0 1 0 0 0 0 8\n"
    cloud = read_cloud("a.txt", data, ("x", "y", "z", "nx", "ny", "nz", "r", "g", "b", "-"))
    assert set(cloud.features) == {"normals", "colors"}
    assert np.allclose(cloud.features["colors"], [[1, 0, 0.2], [0, 0, 0]])
    assert set(read_cloud("a.txt", data).features) == {"extra"}
    with pytest.raises(BadSample, match="has 10 columns, but the card names 4"):
        read_cloud("a.txt", data, ("x", "y", "z", "label"))


def test_removed_points_take_their_labels_along():
    head = b"FIELDS x y z label\nSIZE 4 4 4 4\nTYPE F F F I\nWIDTH 2\nHEIGHT 2\nDATA ascii\n"
    cloud = read_cloud("a.pcd", head + b"1 2 3 0\nnan nan nan 1\n4 5 6 2\n7 8 9 3\n")
    assert cloud.num_removed == 1
    assert [list(values) for values in (cloud.labels, cloud.rows)] == [[0, 2, 3], [0, 2, 3]]
    text = b"1 2 3\nnan 1 1\n4 5 6\n"
    labels = ("a.label", np.array([5, 6, 7 | 9 << 16], "<u4").tobytes())
    assert list(read_cloud("a.xyz", text, labels=labels).labels) == [5, 7]


def test_a_label_must_be_a_whole_number():
    with pytest.raises(BadSample, match="not a 32-bit integer"):
        read_cloud("a.txt", b"1 2 3 0.5\n4 5 6 1\n", ("x", "y", "z", "label"))
    with pytest.raises(BadSample, match="not a 32-bit integer"):
        read_labels("a.txt", b"1\n0.5\n", 2)


def test_points_at_one_place_are_refused():
    with pytest.raises(BadSample, match="all 2 points are at the same place"):
        read_cloud("a.xyz", b"1 2 3\n1 2 3\n")


def test_far_coordinates_keep_their_millimetres():
    cloud = read_cloud("a.xyz", b"85000.001 446000.002 1.5\n85000.004 446000.000 1.5\n")
    assert cloud.origin.tolist() == [85000, 446000, 1]
    assert np.allclose(cloud.coords, [[0.001, 0.002, 0.5], [0.004, 0, 0.5]], atol=1e-6)
    again = read_cloud("a.npz", write_cloud(cloud))
    assert np.array_equal(again.origin, cloud.origin)


def test_a_written_cloud_reads_back_and_has_one_form(clouds):
    cloud = read_cloud("a.pcd", (clouds / "file_zoo/colored_cloud.pcd").read_bytes())
    cloud = Cloud(cloud.coords, cloud.features, np.arange(1000) % 3, np.arange(1000)[::-1], np.ones(3))
    data = write_cloud(cloud)
    again = read_cloud("a.npz", data)
    assert write_cloud(again) == data
    for name, array in cloud.features.items():
        assert np.array_equal(again.features[name], array)
    assert np.array_equal(again.rows, cloud.rows)


# --------------------------------------------------------------------------------------------------- meshes


def mesh_file(kind: str) -> bytes:
    data = trimesh.creation.icosphere(subdivisions=3, radius=2).export(file_type=kind)
    return data.encode() if isinstance(data, str) else data


@pytest.mark.parametrize("kind", ["off", "obj", "stl"])
def test_a_mesh_gives_points_of_its_surface(kind):
    cloud = read_cloud(f"a.{kind}", mesh_file(kind))
    assert len(cloud) == MESH_POINTS
    assert np.abs(np.linalg.norm(cloud.coords, axis=1) - 2).max() < 0.02
    assert np.abs(cloud.coords / 2 - cloud.features["normals"]).max() < 0.15
    assert np.array_equal(read_cloud(f"a.{kind}", mesh_file(kind)).coords, cloud.coords)


@pytest.mark.parametrize("kind", ["off", "obj", "stl", "ply"])
@pytest.mark.parametrize("share", [0, 0.2, 0.35])
def test_a_cut_mesh_is_refused(kind, share):
    data = mesh_file(kind)
    with pytest.raises(BadSample):
        read_mesh(f"a.{kind}", data[: int(len(data) * share)])


def test_an_off_file_cut_in_its_faces_is_refused():
    lines = mesh_file("off").splitlines(keepends=True)
    with pytest.raises(BadSample):
        read_mesh("a.off", b"".join(lines[:-3]))


def test_an_off_header_without_a_blank_reads():
    assert len(read_mesh("a.off", mesh_file("off").replace(b"OFF\n", b"OFF", 1))[1]) == 1280


def test_a_surface_is_sampled_by_area():
    vertices = np.array([[0, 0, 0], [3, 0, 0], [0, 2, 0], [0, 0, 5], [1, 0, 5], [0, 2, 5.0]])
    faces = np.array([[0, 1, 2], [3, 4, 5]])  # areas 3 and 1
    coords, normals = sample_surface(vertices, faces, 8000, np.random.default_rng(0))
    assert abs((coords[:, 2] == 0).mean() - 0.75) < 0.02
    assert np.allclose(normals, [0, 0, 1])
    assert np.allclose(coords[coords[:, 2] == 0].mean(0), [1, 2 / 3, 0], atol=0.05)
    with pytest.raises(BadSample, match="area of the mesh is zero"):
        sample_surface(np.zeros((3, 3)), np.array([[0, 1, 2]]), 10, np.random.default_rng(0))


# ---------------------------------------------------------------------------------------- normals and spread


def test_estimated_normals_of_a_sphere_point_outwards():
    way = np.random.default_rng(0).standard_normal((2000, 3))
    coords = (way / np.linalg.norm(way, axis=1, keepdims=True)).astype(np.float32)
    assert (coords * estimate_normals(coords)).sum(1).min() > 0.95


def test_farthest_points_are_those_of_the_plain_algorithm():
    coords = np.random.default_rng(0).random((300, 3)).astype(np.float32)
    taken, far = [0], np.full(300, np.inf)
    for _ in range(39):
        far = np.minimum(far, ((coords - coords[taken[-1]]) ** 2).sum(1))
        taken.append(int(far.argmax()))
    assert sorted(taken) == farthest_points(coords, 40).tolist()


# --------------------------------------------------------------------------------------------------- samples


def cloud_of(n: int = 500) -> Cloud:
    rng = np.random.default_rng(1)
    normals = rng.standard_normal((n, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    features = {"normals": normals.astype(np.float32), "colors": rng.random((n, 3), np.float32)}
    return Cloud(rng.uniform(-2, 4, (n, 3)).astype(np.float32), features, rng.integers(0, 5, n))


def test_a_recipe_survives_json():
    recipe = PointRecipe(channels=("colors",), scale=(0.9, 1.1))
    assert PointRecipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_a_sample_is_a_function_of_its_key():
    cloud, recipe = cloud_of(), PointRecipe(64, rotate_z=180, jitter=0.01)
    assert np.array_equal(make_points(cloud, recipe, (0, 1, 2)).points, make_points(cloud, recipe, (0, 1, 2)).points)
    keys = [(seed, epoch, sample) for seed in range(2) for epoch in range(2) for sample in range(2)]
    assert len({make_points(cloud, recipe, key).points.tobytes() for key in keys}) == 8


def test_channels_are_coordinates_then_features_then_the_shape():
    cloud = cloud_of()
    sample = make_points(cloud, PointRecipe(64, ("normals", "colors"), num_shapes=4, mode="val"), (0, 0, 0), shape=2)
    assert sample.points.shape == (1, 13, 64)
    assert sample.points.dtype == np.float32
    rows = sample.indices[0]
    expected = np.concatenate([cloud.coords[rows], cloud.features["normals"][rows], cloud.features["colors"][rows]], 1)
    assert np.array_equal(sample.points[0, :9].T, expected)
    assert sample.points[0, 9:].sum(1).tolist() == [0, 0, 64, 0]
    assert np.array_equal(sample.labels, cloud.labels[sample.indices])


def test_a_missing_channel_is_named_and_missing_normals_are_estimated():
    bare = Cloud(cloud_of().coords)
    with pytest.raises(BadSample, match=r"has no colors \(it has: coordinates only\)"):
        make_points(bare, PointRecipe(64, ("colors",)), (0, 0, 0))
    assert make_points(bare, PointRecipe(64, ("normals",)), (0, 0, 0)).points.shape == (1, 6, 64)


def test_points_repeat_only_where_they_are_too_few_or_always_with_replace():
    def kinds(n, **options):
        return len(np.unique(make_points(cloud_of(n), PointRecipe(400, **options), (0, 0, 0)).indices))

    assert kinds(500) == 400
    assert kinds(100) < 101
    assert kinds(500, replace=True) < 350


def test_spread_points_are_the_farthest_ones():
    cloud = cloud_of()
    sample = make_points(cloud, PointRecipe(64, mode="val", spread=True), (0, 0, 0))
    assert np.array_equal(sample.indices[0], farthest_points(cloud.coords, 64))


@pytest.mark.parametrize("votes", [1, 10])
def test_votes_cover_every_point(votes):
    cloud = cloud_of(2600)
    recipe = PointRecipe(2048, mode="test", votes=votes, jitter=0.1, normalize="sphere")
    sample = make_points(cloud, recipe, (0, 0, 0))
    assert sample.points.shape == (2 * votes, 3, 2048) == (recipe.num_views(2600), 3, 2048)
    assert np.bincount(sample.indices.reshape(-1), minlength=2600).min() >= votes
    whole = normalized(cloud.coords, "sphere")
    assert np.array_equal(sample.points[0].T, whole[sample.indices[0]])  # the test is not augmented


def test_windows_of_a_room_all_have_the_same_number_of_views():
    recipe = PointRecipe(4096, mode="test", max_points=8192)
    for n in (600, 5000, 8192):
        assert make_points(cloud_of(n), recipe, (0, 0, 0)).points.shape == (2, 3, 4096)
    with pytest.raises(BadSample, match="has 8193 points, max_points is 8192"):
        make_points(cloud_of(8193), recipe, (0, 0, 0))


def test_shapes_are_normalised_as_recorded(shared):
    recorded = np.load(shared / "parity/pvcnn_conventions.npz", allow_pickle=False)
    assert np.abs(normalized(recorded["norm_in"], "sphere") - recorded["norm_out"]).max() < 1e-6


def test_a_block_stands_on_the_floor_about_its_middle():
    coords = normalized(cloud_of().coords, "block")
    assert abs(coords[:, 2].min()) < 1e-6
    assert np.abs(coords[:, :2].min(0) + coords[:, :2].max(0)).max() < 1e-6
    assert np.allclose(np.ptp(coords, 0), np.ptp(cloud_of().coords, 0))


def augmented(epoch: int = 0, box=None, **options):
    """Return a cloud's sample with augmentation, and the same points without."""
    cloud, key = cloud_of(), (0, epoch, 0)
    recipe = PointRecipe(200, ("normals", "colors"), **options)
    sample = make_points(cloud, recipe, key, box=box)
    plain = make_points(cloud, PointRecipe(200, ("normals", "colors")), key)
    assert np.array_equal(sample.indices, plain.indices)
    return sample.points[0], plain.points[0], sample.box


def test_turning_about_z_keeps_heights_radii_and_the_angle_to_the_normals():
    turned, plain, _ = augmented(rotate_z=180)
    assert np.array_equal(turned[[2, 5]], plain[[2, 5]])
    assert np.allclose(np.hypot(*turned[:2]), np.hypot(*plain[:2]), atol=1e-5)
    assert np.allclose((turned[:3] * turned[3:6]).sum(0), (plain[:3] * plain[3:6]).sum(0), atol=1e-5)
    angles = []
    for epoch in range(40):
        turned, plain, _ = augmented(epoch, rotate_z=30)
        angles.append(np.degrees(np.arctan2(turned[1, 0], turned[0, 0]) - np.arctan2(plain[1, 0], plain[0, 0])))
    angles = (np.array(angles) + 180) % 360 - 180
    assert 20 < np.abs(angles).max() <= 30.001
    assert angles.min() < 0 < angles.max()


def test_scale_jitter_and_color_drop_do_what_they_say():
    scaled, plain, _ = augmented(scale=(0.9, 1.1))
    ratio = scaled[:3] / plain[:3]
    assert np.ptp(ratio) < 1e-5
    assert 0.9 <= ratio.mean() <= 1.1
    jittered, plain, _ = augmented(jitter=0.01, jitter_clip=0.02)
    noise = jittered[:3] - plain[:3]
    assert np.abs(noise).max() < 0.0201
    assert 0.008 < noise.std() < 0.0105
    assert np.array_equal(jittered[3:], plain[3:])
    dropped = [not augmented(epoch, color_drop=0.2)[0][6:].any() for epoch in range(200)]
    assert 0.12 < np.mean(dropped) < 0.28


def test_one_augmentation_does_not_change_the_draws_of_another():
    turned, _, _ = augmented(rotate_z=180)
    both, _, _ = augmented(rotate_z=180, scale=(2.0, 2.0), color_drop=1.0)
    assert np.allclose(both[:3], 2 * turned[:3], atol=1e-5)


def test_a_mirrored_box_goes_with_its_points():
    from slimray.data.points.point_sets import inside_box

    box = np.array([1.0, 0.5, 2.0, 3.0, 2.0, 2.5, 0.4])
    seen = set()
    for epoch in range(20):
        points, plain, moved = augmented(epoch, box, flip=True)
        mirrored = bool(np.array_equal(points[0], -plain[0]))
        seen.add(mirrored)
        assert (moved[0] == -1.0) == mirrored
        assert np.array_equal(inside_box(points[:3].T, moved), inside_box(plain[:3].T, box))
    assert seen == {True, False}
    with pytest.raises(ValueError, match="but not rotated about z"):
        augmented(0, box, rotate_z=10)


def test_the_published_shift_is_all_but_constant():
    box = np.array([0.3, 0.4, 10.0, 3.0, 2.0, 2.5, 0.4])
    for epoch in range(10):
        points, plain, moved = augmented(epoch, box, published_shift=True)
        assert np.allclose(points[2] - plain[2], 0.8 * 0.5, atol=1e-5)
        assert np.isclose(moved[2], 10.4)
