"""Point files are parsed in a child process: the same bits, one file lost to a hang or crash, limited memory."""

import itertools
import os
import signal
import struct
import threading
from dataclasses import replace

import numpy as np
import pytest
from tests.point_files import COORDS, NAMED, POINTS, las, ply, written, xyz
from tests.waits import patience

from slimray.data import child
from slimray.data.points import point_sets
from slimray.data.points.clouds import Cloud, write_cloud
from slimray.data.points.files import read_cloud
from slimray.data.points.reader import CloudReader
from slimray.data.points.recipe import PointRecipe, make_points
from slimray.data.samples import BadSample

MAX_MB = 400  # MB that a child may hold for inputs of a few megabytes; its libraries take about 140


@pytest.fixture(scope="module")
def reader():
    with CloudReader(timeout_s=patience(60)) as reader:
        yield reader


def peak_mb(reader: CloudReader) -> int:
    with open(f"/proc/{reader.pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) >> 10


def equal(one, two) -> bool:
    if one is None or two is None:
        return one is two
    return np.array_equal(one, two, equal_nan=True) and one.dtype == two.dtype


def attempt(read, *args, **options) -> Cloud | str:
    """Return the cloud, or the reason why there is none."""
    try:
        return read(*args, **options)
    except BadSample as bad:
        return str(bad)


def features(n: int = 500) -> Cloud:
    rng = np.random.default_rng(1)
    colors, intensity = rng.random((n, 3), np.float32), rng.random((n, 1), np.float32)
    intensity[::50] = np.nan
    coords, labels, rows = rng.uniform(-2, 4, (n, 3)).astype(np.float32), rng.integers(0, 5, n), rng.permutation(n)
    return Cloud(coords, {"colors": colors, "intensity": intensity}, labels, rows, np.ones(3))


# --------------------------------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("kind", NAMED)
def test_a_cloud_comes_back_as_it_was_read(kind, reader):
    name, write = NAMED[kind]
    data = write(xyz(intensity=COORDS[:, 0], label=np.arange(40, dtype="f4"), nx=COORDS[:, 1] * np.nan))
    for needs in (None, (), ("intensity",)):
        here, there = (attempt(read, name, data, needs=needs) for read in (read_cloud, reader.cloud))
        if isinstance(here, str) or isinstance(there, str):
            assert here == there
            continue
        for part in ("coords", "labels", "rows", "origin"):
            assert equal(getattr(here, part), getattr(there, part)), part
        assert list(here.features) == list(there.features)
        assert all(equal(array, there.features[one]) for one, array in here.features.items())
        assert (here.removed, here.unclear) == (there.removed, there.unclear)


@pytest.mark.parametrize(
    ("recipe", "labelled"),
    [
        (PointRecipe(64, ("colors",), rotate_z=180, jitter=0.01, normalize="sphere"), True),
        (PointRecipe(64, ("intensity", "normals"), num_shapes=3, mode="val", per_point=True), True),
        (PointRecipe(64, mode="val", spread=True), True),
        (PointRecipe(64, mode="val"), False),
        (PointRecipe(64, ("colors", "intensity"), mode="test", votes=2, per_point=True), True),
    ],
)
def test_a_sample_comes_back_to_the_bit(recipe, labelled, reader):
    cloud, key = features(), (0, 1, 2)
    data = write_cloud(cloud if labelled else replace(cloud, labels=None))
    needs = [*recipe.channels, *(["label"] if recipe.per_point else [])]
    here = make_points(read_cloud("a.npz", data, needs=needs), recipe, key, 1)
    there = reader.sample("a.npz", data, recipe, key, 1)
    for part in ("points", "labels", "indices", "rows", "box"):
        assert equal(getattr(here, part), getattr(there, part)), part
    assert np.isfinite(there.points).all()


def test_a_frustum_and_a_room_come_back_to_the_bit(reader):
    cloud = Cloud(COORDS, {"intensity": COORDS[:, :1]}, np.arange(40) % 2, np.arange(40))
    frustum = point_sets.Frustum(cloud, "Cyclist", 0.25, (1.0, 2.0, 30.0, 40.0), np.arange(7.0), 0.5)
    data, recipe = point_sets.write_frustum(frustum), PointRecipe(16, ("intensity",), 3, kind="frustum", flip=True)
    facts, there = reader.frustum("f.npz", data, recipe, (3, 2, 1))
    here = make_points(point_sets.read_frustum("f.npz", data).cloud, recipe, (3, 2, 1), 2, frustum.box)
    assert equal(here.points, there.points)
    assert equal(here.box, there.box)
    assert (facts.kind, facts.rotation, facts.score, facts.box_2d) == ("Cyclist", 0.25, 0.5, (1.0, 2.0, 30.0, 40.0))
    objects = {"wall_1.txt": b"0 0 0 1 2 3\n1 1 1 4 5 6\n", "chair_1.txt": b"1 2 3 4 5 6\n", "beam_1.txt": b"1 2 x\n"}
    xyzrgb, labels, skipped = point_sets.s3dis_room(objects)
    again = reader.room("room", objects)
    assert equal(xyzrgb, again[0])
    assert equal(labels, again[1])
    assert skipped == again[2]


def test_labels_of_a_file_of_their_own_go_along(reader):
    data, labels = "".join(f"{x} {y} {z}\n" for x, y, z in POINTS).encode(), np.arange(50, dtype="<u4").tobytes()
    assert reader.cloud("a.xyz", data, labels=("a.label", labels)).labels.tolist() == list(range(50))


# ------------------------------------------------------------------------------------------------ hangs and crashes


def test_a_file_that_takes_too_long_costs_itself_alone():
    slow = b"1 2 3\n" * 3_000_000
    with CloudReader(timeout_s=patience(60)) as reader:
        reader.cloud("good.xyz", b"1 2 3\n4 5 6\n")
        reader.timeout_s = 0.2
        with pytest.raises(BadSample, match=r"reading took over 0\.2 s"):
            reader.cloud("slow.xyz", slow)
        reader.timeout_s = patience(60)
        with pytest.raises(BadSample, match=r"reading took over 0\.2 s"):
            reader.cloud("slow.xyz", slow)
        assert len(reader.cloud("good.xyz", b"1 2 3\n4 5 6\n")) == 2


def test_a_crash_costs_one_file():
    with CloudReader(timeout_s=patience(60)) as reader:
        reader.cloud("good.xyz", b"1 2 3\n4 5 6\n")
        timer = threading.Timer(0.2, os.kill, (reader.pid, signal.SIGSEGV))
        timer.start()
        with pytest.raises(BadSample, match="reading ended with SIGSEGV"):
            reader.cloud("crashes.xyz", b"1 2 3\n" * 5_000_000)
        assert len(reader.cloud("good.xyz", b"1 2 3\n4 5 6\n")) == 2


def test_the_memory_of_a_child_is_bounded(reader):
    reader.cloud("good.xyz", b"1 2 3\n4 5 6\n")
    with open(f"/proc/{reader.pid}/limits") as limits:
        assert next(line for line in limits if "address space" in line).split()[3] == str(child.MAX_MEMORY)


# ---------------------------------------------------------------------------------------------- hostile inputs

HEAD = "VERSION .7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 {count}\nWIDTH {points}\nHEIGHT 1\n"
XYZ = b"property float x\nproperty float y\nproperty float z\nend_header\n"


def packed_pcd(count: int, points: int) -> bytes:
    unpacked = points * 4 * (2 + count)
    head = HEAD.format(count=count, points=points) + "DATA binary_compressed\n"
    return head.encode() + struct.pack("<2I", 20, unpacked & 0xFFFFFFFF) + bytes(20)


def bomb() -> bytes:
    """An .npz that declares an unpacked size of 4 GB."""
    data = bytearray(write_cloud(Cloud(COORDS)))
    struct.pack_into("<I", data, data.index(b"PK\x01\x02") + 24, 4_000_000_000)
    return bytes(data)


HOSTILE = {
    "count.pcd": packed_pcd(100_000_000, 1),
    "count_and_points.pcd": packed_pcd(16_000, 90_000_000),
    "points.pcd": packed_pcd(1, 99_999_999),
    "text.pcd": (HEAD.format(count=100_000_000, points=1) + "DATA ascii\n1 2 3\n").encode(),
    "vertices.ply": b"ply\nformat ascii 1.0\nelement vertex 100000000000000\n" + XYZ + b"1 2 3\n",
    "vertices_big.ply": b"ply\nformat binary_big_endian 1.0\nelement vertex 100000000000000\n" + XYZ + bytes(36),
    "list.ply": b"ply\nformat binary_little_endian 1.0\nelement vertex 1\nproperty list uint double x\n"
    + XYZ
    + b"\xff" * 36,
    "nothing.ply": b"ply\nformat binary_little_endian 1.0\nelement vertex 99999999\nend_header\n" + bytes(36),
    "counts.off": b"OFF\n100000000000000 1 0\n0 0 0\n",
    "corners.off": b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n99999999999 0 1 2\n",
    "line.txt": b"1" * 3_000_000,
    "delimiters.csv": b";" * 3_000_000 + b"\n",
    "quotes.csv": b'"' * 2_000_001,
    "usemtl.obj": b"v 0 0 0\nv 1 0 0\nv 0 1 0\n" + b"".join(b"usemtl m%d\nf 1 2 3\n" % i for i in range(40_000)),
    "comments.ply": b"ply\nformat ascii 1.0\n" + b"comment x\n" * 90_000 + b"element vertex 0\n" + XYZ,
    "comments.off": b"OFF\n" + b"# c\n" * 300_000 + b"3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n",
    "points.las": las()[:247] + struct.pack("<Q", 10**13) + las()[255:],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_small_file_takes_little_memory_and_time_whatever_it_declares(name, reader):
    reader.timeout_s = patience(30)
    found = attempt(reader.cloud, name, HOSTILE[name])
    if isinstance(found, str):
        assert "took over" not in found
        assert len(found) < 400
    else:
        assert name in ("usemtl.obj", "comments.off")
        assert len(found) == 10_000
    assert peak_mb(reader) < MAX_MB


def test_an_archive_that_unpacks_to_too_much_is_refused_unread(reader):
    with pytest.raises(BadSample, match="unpacks to more than"):
        reader.cloud("bomb.npz", bomb())
    assert peak_mb(reader) < MAX_MB


# ---------------------------------------------------------------------------------------------------- fuzzing

WORDS = [
    "-1", "0", "1", "2", "7", "40", "41", "99999999", "100000000000000", "9" * 30, "nan", "-inf", "1e308", "x", "",
    "\0", "é", "1,5", "0x10", "float", "list", "uchar", "label", "rgb", "F", "U", "8", "binary_compressed", "ascii",
    ";", "\t",
]  # fmt: skip


def whole_files() -> dict[str, tuple[str, bytes]]:
    columns = xyz(intensity=COORDS[:, 0], label=np.arange(40, dtype="f4"))
    files = {kind: (name, write(columns)) for kind, (name, write) in NAMED.items()}
    files |= {"las": ("a.las", las(extra=COORDS[:, 0])), "laz": ("a.laz", las(compress=True))}
    files |= {"text": ("a.txt", written(POINTS)), "faces": ("a.ply", ply(xyz(), faces=9))}
    files["stored"] = ("a.npz", write_cloud(features(40)))
    files["off"] = ("a.off", b"OFF\n4 2 0\n0 0 0\n1 0 0\n0 1 0\n0 0 1\n3 0 1 2\n3 0 1 3\n")
    files["obj"] = ("a.obj", b"v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nf 1 2 3\nf -1/1/1 -2 -3\n")
    files["bin"] = ("a.bin", np.c_[COORDS, COORDS[:, :1] * 0.1].astype("<f4").tobytes())
    return files


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Damage a file: flip bits, exchange words of a header, repeat or drop lines, truncate it, insert foreign bytes."""
    broken = bytearray(data)
    how, head = rng.integers(6), min(len(data), 400)
    if how == 0:
        for _ in range(rng.integers(1, 9)):
            broken[rng.integers(head if rng.random() < 0.7 else len(broken))] ^= 1 << int(rng.integers(8))
    elif how == 1:
        words = bytes(broken[:head]).split(b" ")
        for _ in range(rng.integers(1, 4)):
            words[rng.integers(len(words))] = str(rng.choice(WORDS)).encode()
        broken[:head] = b" ".join(words)
    elif how == 2:
        lines = bytes(broken[:head]).split(b"\n")
        at = int(rng.integers(len(lines)))
        lines[at : at + 1] = [lines[at]] * int(rng.choice([0, 2, 5]))
        broken[:head] = b"\n".join(lines)
    elif how == 3:
        broken = broken[: rng.integers(1, len(broken))]
    elif how == 4:
        at = int(rng.integers(len(broken)))
        broken[at : at + int(rng.integers(9))] = str(rng.choice(WORDS)).encode()
    else:
        at = int(rng.integers(max(1, head - 8)))
        broken[at : at + 8] = struct.pack("<q", int(rng.choice([-1, 0, 1 << 31, 1 << 62, 10**9, 255])))
    return bytes(broken)


def fuzz(reader: CloudReader, rounds: int) -> tuple[int, int]:
    """Send each kind of file damaged in `rounds` ways; return how many can still be read, and the total."""
    read = sent = 0
    for (kind, (name, data)), number in itertools.product(whole_files().items(), range(rounds)):
        broken = damaged(data, np.random.default_rng([number, len(kind), len(data)]))
        needs = [None, (), ("intensity", "label")][number % 3]
        sent += 1
        cloud = attempt(reader.cloud, f"{number}{name}", broken, needs=needs)
        if isinstance(cloud, str):
            assert not any(words in cloud for words in ("took over", "ended with", "\n")), (kind, number, cloud)
            continue
        read += 1
        assert np.isfinite(cloud.coords).all(), (kind, number)
        assert cloud.coords.dtype == np.float32
        assert needs is not None or all(np.isfinite(array).all() for array in cloud.features.values()), (kind, number)
    return read, sent


def test_no_damage_ends_or_stops_a_child_or_takes_its_memory():
    with CloudReader(timeout_s=patience(60)) as reader:
        read, sent = fuzz(reader, 20)
        assert 0 < read < sent
        assert peak_mb(reader) < MAX_MB


@pytest.mark.benchmark
def test_thousands_of_damaged_files_neither_end_nor_stop_a_child():
    with CloudReader(timeout_s=patience(60)) as reader:
        read, sent = fuzz(reader, 400)
        print(f"{sent} inputs, {read} still read, at most {peak_mb(reader)} MB")
        assert peak_mb(reader) < MAX_MB
