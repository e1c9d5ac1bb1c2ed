"""Declarations of files: columns with the same meaning, missing numbers, counts that do not hold."""

import io
import struct
import zipfile

import numpy as np
import pytest
from tests.point_files import COORDS, NAMED, RNG, las, npy, npz, pcd, ply, xyz

from slimray.data.points.clouds import Cloud, write_cloud
from slimray.data.points.files import read_cloud
from slimray.data.points.meshes import read_mesh
from slimray.data.points.recipe import PointRecipe, make_points
from slimray.data.samples import BadSample

# ------------------------------------------------------------------------------------------ columns that mean the same


@pytest.mark.parametrize("kind", NAMED)
def test_two_columns_for_the_label_are_a_question_answered_by_name(kind):
    name, write = NAMED[kind]
    one, two = np.arange(40, dtype="f4") % 4, np.arange(40, dtype="f4") % 7
    data = write(xyz(classification=one, label=two))
    with pytest.raises(BadSample, match=r"2 columns for label \(classification, label\): say which, label=class"):
        read_cloud(name, data)
    cloud = read_cloud(name, data, needs=())
    assert cloud.labels is None
    assert set(cloud.unclear) == {"label"}
    assert np.array_equal(read_cloud(name, data, ("label=label",)).labels, two)
    assert np.array_equal(read_cloud(name, data, ("label=classification",)).labels, one)


@pytest.mark.parametrize("kind", NAMED)
def test_two_columns_for_a_feature_are_a_question_for_those_who_want_it(kind):
    name, write = NAMED[kind]
    one, two = RNG.random(40).astype("f4"), RNG.random(40).astype("f4")
    data = write(xyz(intensity=one, reflectance=two))
    with pytest.raises(BadSample, match="2 columns for intensity"):
        read_cloud(name, data, needs=("intensity",))
    assert len(read_cloud(name, data, needs=("label",))) == 40
    cloud = read_cloud(name, data, ("intensity=reflectance",), needs=("intensity",))
    assert np.array_equal(cloud.features["intensity"][:, 0], two)
    bare = read_cloud(name, data, needs=())
    with pytest.raises(BadSample, match="2 columns for intensity"):
        make_points(bare, PointRecipe(8, ("intensity",)), (0, 0, 0))


def test_colors_and_normals_that_come_twice_are_questions():
    columns = {one: RNG.random(40).astype("f4") for one in ("red", "green", "blue", "r", "g", "b")}
    with pytest.raises(BadSample, match=r"2 columns for b \(b, blue\)"):
        read_cloud("a.ply", ply(xyz(**columns)))
    with pytest.raises(BadSample, match="2 columns for colors"):
        read_cloud("a.npz", npz(coords=COORDS, colors=COORDS, r=COORDS[:, 0], g=COORDS[:, 0], b=COORDS[:, 0]))
    with pytest.raises(BadSample, match=r"2 columns for coords \(points, xyz\): say which, coords=points"):
        read_cloud("a.npz", npz(points=COORDS, xyz=COORDS))
    assert np.array_equal(read_cloud("a.npz", npz(points=COORDS, xyz=COORDS[::-1]), ("coords=points",)).coords, COORDS)


def test_a_column_of_one_name_twice_is_a_question():
    with pytest.raises(BadSample, match=r"2 columns for label .*: name all columns in order"):
        read_cloud("a.csv", b"x,y,z,label,label\n1,2,3,0,1\n4,5,6,0,1\n")
    data = b"x,y,z,label,label\n1,2,3,0,1\n4,5,6,0,1\n"
    assert read_cloud("a.csv", data, ("x", "y", "z", "-", "label")).labels.tolist() == [1, 1]
    body = io.BytesIO()
    np.save(body, COORDS)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("coords.npy", body.getvalue())
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("coords.npy", body.getvalue())
    with pytest.raises(BadSample, match="two arrays with the same name"):
        read_cloud("a.npz", buffer.getvalue())


@pytest.mark.parametrize("compress", [False, True])
def test_extra_dimensions_of_las_are_columns(compress, shared):
    extra = {"label": np.arange(40, dtype="i4") % 3, "height_above": RNG.random(40).astype("f4")}
    data = las(compress=compress, **extra)
    with pytest.raises(BadSample, match=r"2 columns for label \(classification, label\)"):
        read_cloud("a.las", data)
    cloud = read_cloud("a.las", data, ("label=label",))
    assert np.array_equal(cloud.labels, extra["label"])
    assert np.array_equal(cloud.features["height_above"][:, 0], extra["height_above"])
    reported = (shared / "data/reported/P6_las_extra_labels/a.las").read_bytes()
    assert read_cloud("a.las", reported, ("label=label",)).labels[:4].tolist() == [4, 7, 10, 9]
    assert read_cloud("a.las", reported, ("label=semantic_id",)).labels[:4].tolist() == [3, 6, 9, 8]
    with pytest.raises(BadSample, match="has no column nothing"):
        read_cloud("a.las", reported, ("label=nothing",))


# ------------------------------------------------------------------------------------------------ missing numbers


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_points_are_left_out_for_numbers_that_are_needed_and_bad(kind, bad):
    name, write = NAMED[kind]
    intensity, x = RNG.random(40).astype("f4"), COORDS[:, 0].copy()
    intensity[:7], x[5:9] = bad, bad
    data = write(xyz(intensity=intensity))
    assert len(read_cloud(name, data, needs=())) == 40
    cloud = read_cloud(name, data, needs=("intensity",))
    assert (len(cloud), cloud.removed, cloud.num_removed) == (33, {"intensity": 7}, 7)
    assert cloud.rows.tolist() == list(range(7, 40))
    data = write(xyz(intensity=intensity) | {"x": x})
    assert read_cloud(name, data, needs=("intensity",)).removed == {"x, y, z": 4, "intensity": 5}
    assert read_cloud(name, data, needs=()).removed == {"x, y, z": 4}


def test_reported_scans_lose_only_points_that_a_network_cannot_take(shared):
    reported = shared / "data/reported"
    scan = (reported / "P1_toronto3d_nan_intensity/L003.ply").read_bytes()
    assert len(read_cloud("a.ply", scan, needs=("colors",))) == 2000
    cloud = read_cloud("a.ply", scan, needs=("intensity",))
    assert (len(cloud), cloud.removed) == (1963, {"intensity": 37})
    scan = (reported / "P8_pcd_nan_normals/a.pcd").read_bytes()
    assert len(read_cloud("a.pcd", scan, needs=())) == 2000
    cloud = read_cloud("a.pcd", scan, needs=("normals",))
    assert (len(cloud), cloud.removed) == (1600, {"normals": 400})


def test_gaps_of_a_stored_cloud_cost_points_only_where_they_are_needed():
    intensity = np.ones((40, 1), np.float32)
    intensity[::4] = np.nan
    data = write_cloud(Cloud(COORDS, {"intensity": intensity}, np.arange(40)))
    assert len(read_cloud("a.npz", data, needs=("label",))) == 40
    cloud = read_cloud("a.npz", data, needs=("intensity", "label"))
    assert len(cloud) == 30
    assert np.array_equal(cloud.labels, cloud.rows)


def test_a_label_that_is_missing_costs_a_point_where_labels_are_needed():
    data = b"x,y,z,label\n1,2,3,0\n4,5,6,\n7,8,9,2\n"
    assert read_cloud("a.csv", data, needs=("label",)).labels.tolist() == [0, 2]
    assert len(read_cloud("a.csv", data, needs=())) == 3


@pytest.mark.parametrize("kind", NAMED)
def test_numbers_whose_squares_overflow_are_no_coordinates(kind):
    name, write = NAMED[kind]
    normals = {one: np.ones(40, "f4") for one in ("nx", "ny", "nz")}
    with pytest.raises(BadSample, match=r"has 0 usable points of 40 \(40 of 40 points left out"):
        read_cloud(name, write({one: array * np.float32(1e29) + 1e28 for one, array in xyz().items()} | normals))


def test_points_that_float32_merges_get_an_origin():
    coords = 5000.3 + RNG.random((40, 3)) * 1e-9
    cloud = read_cloud("a.npz", npz(coords=coords))
    assert np.allclose(cloud.coords + cloud.origin, coords, rtol=0, atol=1e-12)
    sample = make_points(cloud, PointRecipe(16, normalize="sphere", mode="val"), (0, 0, 0))
    assert np.isfinite(sample.points).all()
    with pytest.raises(BadSample, match="are at the same place"):
        read_cloud("a.npz", npz(coords=coords * 0 + np.arange(40)[:, None] * 1e-200))
    with pytest.raises(BadSample, match="are at the same place and have no size"):
        make_points(Cloud(np.ones((40, 3), np.float32)), PointRecipe(16, normalize="sphere"), (0, 0, 0))


# ------------------------------------------------------------------------------------------------ widths and shapes


def test_a_scan_of_five_columns_is_not_read_as_one_of_four(shared):
    data = (shared / "data/reported/P2_nuscenes_pcd_bin/n015__LIDAR_TOP__1531.pcd.bin").read_bytes()
    for columns in ((), ("x", "y", "z", "intensity"), ("x", "y", "z", "nx", "ny", "nz", "r", "g")):
        with pytest.raises(BadSample, match=r"do not look like rows of \d .* 4336 points of 5"):
            read_cloud("a.pcd.bin", data, columns)
    assert len(read_cloud("a.pcd.bin", data, ("x", "y", "z", "intensity", "ring"))) == 4336


@pytest.mark.parametrize("width", [3, 5, 6, 7, 8])
def test_no_other_width_passes_for_four_columns(width):
    spreads = np.array([30, 30, 2, 0.3, 9, 20, 1e5, 0.1])[:width]
    rows = (RNG.standard_normal((840, width)) * spreads + 5).astype("<f4")
    with pytest.raises(BadSample, match="name its columns"):
        read_cloud("a.bin", rows.tobytes())
    assert len(read_cloud("a.bin", rows.tobytes(), ("x", "y", "z", "a", "b", "c", "d", "e")[:width])) == 840


def test_scans_of_four_columns_need_no_names(shared):
    scans = [*shared.glob("data/pointcloud/kitti_scans/*.bin"), *shared.glob("data/pointcloud/kitti_object/**/*.bin")]
    for path in [*scans, *shared.glob("data/pointcloud/semantickitti_scan/*.bin")]:
        data = path.read_bytes()
        for cut in range(12):  # so that other widths divide it too
            assert read_cloud(path.name, data[: len(data) - 16 * cut]).features["intensity"].max() <= 1


def test_arrays_with_a_point_a_column_are_read_upright_or_questioned():
    assert np.array_equal(read_cloud("a.npy", npy(COORDS.T.repeat(3, 1))).coords, COORDS.repeat(3, 0))
    with pytest.raises(BadSample, match=r"shape \[3, 6\]: name its columns"):
        read_cloud("a.npy", npy(COORDS[:6].T))
    assert np.array_equal(read_cloud("a.npy", npy(COORDS[:6].T), ("x", "y", "z")).coords, COORDS[:6])
    data = npz(coords=COORDS.T, normals=COORDS.T, labels=np.arange(40))
    assert np.array_equal(read_cloud("a.npz", data).features["normals"], COORDS)


# --------------------------------------------------------------------------------------------------- counts


def cloud_files() -> dict[str, tuple[str, bytes, int]]:
    """File name, bytes, and bytes of its last point, of formats that declare their number of points."""
    return {
        "ply": ("a.ply", ply(xyz()), 12),
        "ply big-endian": ("a.ply", ply(xyz(), order=">"), 12),
        "pcd": ("a.pcd", pcd(xyz()), 12),
        "las": ("a.las", las(), 34),
        "las 1.2": ("a.las", las(version="1.2"), 34),
    }


@pytest.mark.parametrize("kind", cloud_files())
def test_more_or_fewer_points_than_declared_are_refused(kind):
    name, data, size = cloud_files()[kind]
    assert len(read_cloud(name, data)) == 40
    for wrong in (data[:-size], data[:-1], data + data[-size:]):
        with pytest.raises(BadSample, match="declare"):
            read_cloud(name, wrong)


@pytest.mark.parametrize(("lines", "name"), [(ply(xyz(), text=True), "a.ply"), (pcd(xyz(), "ascii"), "a.pcd")])
def test_more_or_fewer_lines_than_declared_are_refused(lines, name):
    whole = lines.splitlines(keepends=True)
    for wrong in (whole[:-1], [*whole, whole[-1]]):
        with pytest.raises(BadSample, match=r"(39|41) of 40 declared"):
            read_cloud(name, b"".join(wrong))


@pytest.mark.parametrize("text", [False, True])
def test_more_or_fewer_faces_than_declared_are_refused(text):
    data = ply(xyz(), text, faces=7)
    assert len(read_cloud("a.ply", data)) == 40
    for count in (b"6", b"8", b"70000"):
        with pytest.raises(BadSample):
            read_cloud("a.ply", data.replace(b"element face 7", b"element face " + count))
    off = b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n"
    assert len(read_mesh("a.off", off)[1]) == 1
    for wrong in (off + b"3 0 1 2\n", off.replace(b"3 1 0", b"3 2 0", 1), off.replace(b"3 1 0", b"2 1 0", 1)):
        with pytest.raises(BadSample, match=r"declared|OFF"):
            read_mesh("a.off", wrong)


def test_a_compressed_las_that_declares_more_chunks_than_it_has_is_refused():
    data = bytearray(las(compress=True))
    struct.pack_into("<Q", data, 247, 140_000)  # of chunks of 50,000
    with pytest.raises(BadSample, match="140000 points are declared, but 1 to 50000 are there"):
        read_cloud("a.laz", bytes(data))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.las", las(COORDS[:0])),
        ("a.laz", las(COORDS[:0], compress=True)),
        ("a.ply", ply({one: array[:0] for one, array in xyz(red=COORDS[:, 0]).items()})),
        ("a.ply", ply({one: array[:0] for one, array in xyz().items()}, text=True)),
        ("a.npz", npz(coords=COORDS[:0], colors=COORDS[:0])),
        ("a.npy", npy(COORDS[:0])),
    ],
)
def test_files_without_points_say_so(name, data):
    with pytest.raises(BadSample, match="has 0 usable points of 0"):
        read_cloud(name, data)


# ------------------------------------------------------------------------------------------------ headers


def test_comments_of_a_ply_need_not_be_ascii(shared):
    assert len(read_cloud("a.ply", (shared / "data/reported/P3_ply_non_ascii_comment/a.ply").read_bytes())) == 2000
    for text in (False, True):
        data = ply(xyz(), text, comments=["COMMENT"])
        for said in ("größe".encode(), "größe".encode("latin-1"), b"\xff\xfe\x80", b"x\nobj_info \xe9"):
            cloud = read_cloud("a.ply", data.replace(b"COMMENT", said))
            assert np.allclose(cloud.coords, COORDS, atol=1e-6)
        head, _, body = data.partition(b"end_header\n")
        lines = head.replace(b"COMMENT", b"\xe9").replace(b"\n", b"\r\n")
        assert np.allclose(read_cloud("a.ply", lines + b"end_header\r\n" + body).coords, COORDS, atol=1e-6)


@pytest.mark.parametrize("origin", [np.zeros(2), np.zeros((3, 1)), np.array([0, np.nan, 0]), np.zeros(0)])
def test_an_origin_that_is_not_three_numbers_is_refused(origin):
    with pytest.raises(BadSample, match="origin"):
        read_cloud("a.npz", npz(coords=COORDS, origin=origin))


@pytest.mark.parametrize("rows", [np.arange(40) - 1, np.zeros((40, 2), int), np.arange(40.0), np.arange(39)])
def test_rows_that_are_not_the_points_of_a_file_are_refused(rows):
    with pytest.raises(BadSample, match="rows"):
        read_cloud("a.npz", npz(coords=COORDS, rows=rows))


def test_a_column_called_rows_or_origin_is_a_column():
    cloud = read_cloud("a.ply", ply(xyz(rows=COORDS[:, 0], origin=COORDS[:, 1])))
    assert set(cloud.features) == {"column_rows", "column_origin"}
    assert cloud.rows is None
    again = read_cloud("a.npz", write_cloud(cloud))
    assert np.array_equal(again.features["column_rows"], cloud.features["column_rows"])
