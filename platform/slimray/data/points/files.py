"""From the bytes of a point file to a cloud, and from a cloud to a sample: which points, how scaled, turned, voted on.

`read_cloud` reads PCD, PLY, LAS/LAZ, text, npy/npz, KITTI .bin and meshes by libraries, and checks what they let pass:
Open3D fills up a cut PCD with whatever is in memory and reads unreadable numbers as 0, laspy returns fewer points than
declared, trimesh an empty mesh. A file that is not what it says is a `BadSample` with the reason. `PointRecipe` is a
value that says how a sample is made, as published for PVCNN (arXiv 1907.03739) and the nets around it; all randomness
is a function of the key (seed, epoch, sample). Open3D is imported here only, and late.
"""

import io
import re
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from slimray.data.samples import BadSample

MIN_POINTS = 2
MAX_POINTS = 100_000_000  # a declared count larger than this is refused before anything is allocated
FAR = 10_000.0  # from here on float32 steps are about a millimetre of a metre: the cloud gets an origin of its own
HUGE = 1e30  # no number of a point cloud; sums and squares of such numbers overflow
MESH_POINTS = 10_000  # drawn from the surface of a mesh

GROUPS = {"coords": ("x", "y", "z"), "normals": ("nx", "ny", "nz"), "colors": ("r", "g", "b")}
ALIASES = {
    "normal_x": "nx", "normal_y": "ny", "normal_z": "nz", "normal": "normals",
    "red": "r", "green": "g", "blue": "b", "color": "colors", "rgb": "colors",
    "labels": "label", "class": "label", "classification": "label", "scalar_label": "label",
    "points": "coords", "xyz": "coords", "pos": "coords", "positions": "coords",
    "reflectance": "intensity", "scalar_intensity": "intensity",
}  # fmt: skip

WIDTHS = {"colors": 3, "normals": 3, "place": 3}  # channels of a feature, others have one

Table = dict[str, np.ndarray]  # column name -> [N] or [N, k]


@dataclass(frozen=True, eq=False)
class Cloud:
    """Points as read: `coords` float32 `[N, 3]`, `features` name -> float32 `[N, k]`, `labels` int64 `[N]` or None.

    Colors are 0 to 1. `rows` int64 `[N]` says which point of its file or room each one is (None: all, in order);
    `origin` float64 `[3]` was subtracted from coords; `num_removed` points were left out for want of finite numbers.
    """

    coords: np.ndarray
    features: Mapping[str, np.ndarray] = field(default_factory=dict)
    labels: np.ndarray | None = None
    rows: np.ndarray | None = None
    origin: np.ndarray = field(default_factory=lambda: np.zeros(3))
    num_removed: int = 0

    def __len__(self) -> int:
        return len(self.coords)


# -------------------------------------------------------------------------------------------------- reading


def read_cloud(
    path: str,
    data: bytes,
    columns: Sequence[str] = (),
    labels: tuple[str, bytes] | None = None,
    keep_finite: bool = False,
) -> Cloud:
    """Read a point file from its bytes; its first bytes, else the extension of `path`, tell its kind.

    `columns` names the columns of text, .npy and .bin files (x y z, nx ny nz, r g b, label; "-" leaves one out);
    `labels` is a (path, bytes) of one label per point. A PCD point with NaN means "nothing measured" and is left out
    and counted; in other formats NaN is damage unless `keep_finite`. A mesh gives MESH_POINTS points of its surface.
    Raises BadSample.
    """
    if not data:
        raise BadSample("the file is empty")
    suffix = _kind(path, data)
    try:
        table = _READERS[suffix](data, suffix, columns)
    except (BadSample, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001  (libraries raise anything on bytes that they cannot read)
        raise BadSample(f"does not read as {suffix[1:].upper()}: {_first_line(error)}") from None
    return _cloud(table, keep_finite or suffix == ".pcd", labels)


def read_labels(path: str, data: bytes, num_points: int) -> np.ndarray:
    """Read one label per point, int64 `[N]`: SemanticKITTI .label (its lower 16 bits), .npy, or text.

    Raises BadSample if there are more or fewer than `num_points`.
    """
    suffix = PurePosixPath(path).suffix.lower()
    if suffix == ".label":
        if len(data) % 4:
            raise BadSample(f"the label file has {len(data)} bytes, no multiple of 4")
        values = np.frombuffer(data, "<u4") & 0xFFFF
    else:
        try:
            values = _npy_array(data) if suffix == ".npy" else np.loadtxt(io.BytesIO(data), ndmin=1)
        except (ValueError, EOFError) as error:
            raise BadSample(f"the label file does not read: {_first_line(error)}") from None
    if values.size != num_points:
        raise BadSample(f"{values.size} labels for {num_points} points")
    return _whole_numbers(values.reshape(-1))


def write_cloud(cloud: Cloud) -> bytes:
    """The cloud as an uncompressed .npz that `read_cloud` reads back; the same cloud gives the same bytes."""
    arrays = {"coords": cloud.coords, "labels": cloud.labels, "rows": cloud.rows, "origin": cloud.origin}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in (arrays | dict(cloud.features)).items():
            if array is not None:
                body = io.BytesIO()
                np.lib.format.write_array(body, np.ascontiguousarray(array), allow_pickle=False)
                archive.writestr(zipfile.ZipInfo(f"{name}.npy"), body.getvalue())
    return buffer.getvalue()


_MAGIC = ((b"ply", ".ply"), (b"LASF", ".las"), (b"\x93NUMPY", ".npy"), (b"PK\x03\x04", ".npz"), (b"# .PCD", ".pcd"))


def _kind(path: str, data: bytes) -> str:
    suffix = PurePosixPath(path).suffix.lower()
    magic = next((kind for start, kind in _MAGIC if data.startswith(start)), suffix)
    kind = suffix if suffix == ".laz" and magic == ".las" else magic
    if kind not in _READERS:
        raise BadSample(f"no point file by its name or first bytes (known: {', '.join(sorted(_READERS))})")
    return kind


def _cloud(table: Table, drop: bool, labels: tuple[str, bytes] | None) -> Cloud:
    """Name, group and check what a reader found."""
    table = {ALIASES.get(name.lower(), name.lower()): array for name, array in table.items()}
    for group, names in GROUPS.items():
        if group not in table and all(name in table for name in names):
            table[group] = np.stack([table.pop(name) for name in names], 1)
    if "coords" not in table:
        raise BadSample(f"has no x, y, z (it has: {', '.join(table) or 'nothing'})")
    with np.errstate(all="ignore"):
        coords = np.asarray(table.pop("coords"), np.float64)
    if coords.ndim != 2 or coords.shape[1] != 3:
        raise BadSample(f"coordinates of shape {list(coords.shape)}, not [points, 3]")
    label, rows, origin = table.pop("label", None), table.pop("rows", None), table.pop("origin", np.zeros(3))
    if labels is not None:
        label = read_labels(*labels, len(coords))
    for name, array in (table | {"labels": label, "rows": rows}).items():
        if array is not None and len(array) != len(coords):
            raise BadSample(f"{len(array)} {name} for {len(coords)} points")
    with np.errstate(all="ignore"):  # what does not fit float32 becomes infinite, and is found so
        features = {name: _feature(name, array) for name, array in table.items()}
        finite = (np.abs(np.concatenate([coords, *features.values()], 1, dtype=np.float32)) < HUGE).min(1)  # not NaN
    removed = len(finite) - int(finite.sum())
    if removed and not drop:
        raise BadSample(f"{removed} of {len(finite)} points are not finite numbers")
    if removed:
        rows = np.flatnonzero(finite) if rows is None else rows[finite]
        coords, features = coords[finite], {name: array[finite] for name, array in features.items()}
        label = None if label is None else label[finite]
    if len(coords) < MIN_POINTS:
        raise BadSample(f"has {len(coords)} usable point{'' if len(coords) == 1 else 's'} of {len(finite)}")
    if not np.ptp(coords, 0).any():
        raise BadSample(f"all {len(coords)} points lie at one place")
    if np.abs(coords).max() > FAR:
        step = np.floor(coords.min(0))
        coords, origin = coords - step, origin + step
    label = None if label is None else _whole_numbers(label)
    return Cloud(coords.astype(np.float32), features, label, rows, np.asarray(origin, np.float64), removed)


def _feature(name: str, array: np.ndarray) -> np.ndarray:
    """A float32 `[N, k]`; colors as bytes or 16-bit words become 0 to 1."""
    wide = array.reshape(len(array), -1)
    if name != "colors":
        return wide.astype(np.float32)
    top = float(np.nanmax(wide)) if wide.size else 0.0
    whole = array.dtype.kind in "iu"
    return (wide / (1 if top <= 1 and not whole else 255 if top <= 255 else 65535)).astype(np.float32)


def _whole_numbers(values: np.ndarray) -> np.ndarray:
    if not ((np.abs(values) < 2**31) & (values == np.floor(values))).all():  # NaN is not below
        raise BadSample("a label is no whole number of 32 bits")
    return values.astype(np.int64)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].split(";")[0][:160]


def _named(array: np.ndarray, columns: Sequence[str], default: Sequence[str]) -> Table:
    """Columns of `[N, C]` by name; without names x y z, and the rest together as "extra"."""
    names = [name.strip("\"'") for name in columns or default]
    if array.ndim != 2 or array.shape[1] < 3:
        raise BadSample(f"holds an array of shape {list(array.shape)}, not [points, 3 or more]")
    if columns and len(columns) != array.shape[1]:
        raise BadSample(f"has {array.shape[1]} columns, the card names {len(columns)}")
    if len(names) != array.shape[1]:
        extra = {"extra": array[:, 3:]} if array.shape[1] > 3 else {}
        return {"coords": array[:, :3], **extra}
    return {name: array[:, i] for i, name in enumerate(names) if name != "-"}


@contextmanager
def _on_disk(data: bytes, suffix: str) -> Iterator[str]:
    """A file of these bytes, for libraries that read files only or slowly from memory."""
    with tempfile.TemporaryDirectory(prefix="slimray-") as folder:
        path = Path(folder) / f"cloud{suffix}"
        path.write_bytes(data)
        yield str(path)


# ------------------------------------------------------------------------------------------------- text, arrays


def _read_text(data: bytes, suffix: str, columns: Sequence[str]) -> Table:
    """Numbers in lines, by blanks, commas or semicolons. A first line may count the points or name the columns."""
    text = data.translate(bytes.maketrans(b",;\t", b"   ")).decode("latin-1").lstrip("ï»¿")
    head, _, rest = text.lstrip().partition("\n")
    while head.startswith(("#", "//")) and rest:
        names = head.lstrip("#/ ").split()
        text = rest
        if not columns and _are_names(names):
            columns = names
        head, _, rest = text.lstrip().partition("\n")
    declared = int(head) if re.fullmatch(r"\d+\s*", head) else None
    if declared is not None:
        text = rest
    elif _are_names(head.split()):
        columns, text = columns or head.split(), rest
    try:
        array = np.loadtxt(io.StringIO(text), dtype=np.float64, comments=None, ndmin=2)
    except ValueError as error:
        raise BadSample(f"does not read as text: {_first_line(error)}") from None
    if array.size == 0:
        raise BadSample("holds no points")
    if declared is not None and declared != len(array):
        raise BadSample(f"{len(array)} of {declared} declared points are there")
    if not text.endswith(("\n", "\r")) and not _ends_whole(text):
        raise BadSample("the last line has no end and its last number may be cut")
    return _named(array, columns, _TEXT_COLUMNS.get(suffix, ()))


_TEXT_COLUMNS = {".xyzn": ("x", "y", "z", "nx", "ny", "nz"), ".xyzrgb": ("x", "y", "z", "r", "g", "b")}


def _are_names(words: Sequence[str]) -> bool:
    return len(words) >= 3 and {"x", "y", "z"} <= {word.strip("\"'").lower() for word in words}


def _ends_whole(text: str) -> bool:
    """Whether the last number is written as long as those above it: then nothing of it can be missing."""
    ends = [line.split()[-1] for line in text[-20_000:].splitlines()[-100:] if line.strip()]
    places = {len(end.rpartition(".")[2]) for end in ends}
    return (len(ends) > 1 and len(places) == 1) or not np.isfinite(float(ends[-1]))


def _npy_array(data: bytes) -> np.ndarray:
    """A .npy of plain numbers; its declared size is compared with the bytes before anything is allocated."""
    buffer = io.BytesIO(data)
    version = np.lib.format.read_magic(buffer)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(buffer)
    if dtype.kind not in "fiub":
        raise BadSample(f"holds {dtype}, no plain numbers")
    count = int(np.prod(np.array(shape, dtype=object))) if shape else 1
    there = (len(data) - buffer.tell()) // dtype.itemsize
    if count != there:
        raise BadSample(f"{there} of {count} declared numbers are there")
    return np.load(io.BytesIO(data), allow_pickle=False)


def _read_npy(data: bytes, _: str, columns: Sequence[str]) -> Table:
    return _named(_npy_array(data), columns, ())


def _read_npz(data: bytes, _: str, __: Sequence[str]) -> Table:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if sum(item.file_size for item in archive.infolist()) > 64 * MAX_POINTS:
            raise BadSample("unpacks to more than a point cloud can be")
        arrays = {item.filename.removesuffix(".npy"): _npy_array(archive.read(item)) for item in archive.infolist()}
    return {name: array for name, array in arrays.items() if array.ndim}


def _read_bin(data: bytes, _: str, columns: Sequence[str]) -> Table:
    """Rows of little-endian float32, as KITTI stores scans: x y z intensity unless the card names other columns."""
    names = columns or ("x", "y", "z", "intensity")
    if len(data) % (4 * len(names)):
        raise BadSample(f"has {len(data)} bytes, no multiple of {4 * len(names)} ({len(names)} float32 a point)")
    return _named(np.frombuffer(data, "<f4").reshape(-1, len(names)), names, ())


# ------------------------------------------------------------------------------------------------ PCD, PLY, LAS


def _read_pcd(data: bytes, _: str, __: Sequence[str]) -> Table:
    """Every count of the header is checked against the bytes first. Fields of several numbers a point are left out."""
    start = re.search(rb"^DATA[ \t]+(\w+)[ \t]*\r?\n", data[:65536], re.MULTILINE)
    if start is None:
        raise BadSample("has no PCD header with a DATA line")
    lines = (line.split() for line in data[: start.end()].decode("latin-1").splitlines() if not line.startswith("#"))
    header = {line[0]: line[1:] for line in lines if line}
    names, kinds = header.get("FIELDS", header.get("COLUMNS", [])), header.get("TYPE", [])
    sizes = [int(size) for size in header.get("SIZE", [])]
    counts = [int(count) for count in header.get("COUNT", ["1"] * len(names))]
    if not len(names) == len(kinds) == len(sizes) == len(counts) or min(counts, default=0) < 1:
        raise BadSample("its header does not give a type, size and count for each field")
    if not {"x", "y", "z"} <= set(names):
        raise BadSample(f"has no x, y, z (it has: {', '.join(names)})")
    width, height = (int(header.get(key, ["1"])[0]) for key in ("WIDTH", "HEIGHT"))
    points = int(header.get("POINTS", [width * height])[0])
    if points != width * height or not 0 < points <= MAX_POINTS:
        raise BadSample(f"declares {points} points in {width} x {height}")
    layout = np.dtype(
        [(f"f{i}", _PCD_TYPES[kind, size], (n,)) for i, (kind, size, n) in enumerate(zip(kinds, sizes, counts))]
    )
    body, words = data[start.end() :], start[1].decode()
    if words == "ascii":
        columns = _pcd_text(body, points, counts)
    elif words == "binary":
        if len(body) < points * layout.itemsize:
            raise BadSample(f"{len(body) // layout.itemsize} of {points} declared points are there")
        array = np.frombuffer(body, layout, points)
        columns = [array[name][:, 0] for name in layout.names or ()]
    elif words == "binary_compressed":
        columns = _pcd_packed(body, points, layout)
    else:
        raise BadSample(f"its points are stored as {words!r}, not ascii, binary or binary_compressed")
    table: Table = {name: column for name, column, n in zip(names, columns, counts) if n == 1 and name != "_"}
    for packed in {"rgb", "rgba"} & set(table):
        values = table.pop(packed)
        bits = values.astype("<f4").view("<u4") if kinds[names.index(packed)] == "F" else values.astype(np.uint32)
        table["colors"] = np.stack([bits >> 16 & 255, bits >> 8 & 255, bits & 255], 1).astype(np.uint8)
    return table


_PCD_TYPES = {(kind, size): f"<{kind.lower()}{size}" for kind in "IU" for size in (1, 2, 4, 8)} | {
    ("F", 4): "<f4",
    ("F", 8): "<f8",
}


def _pcd_text(body: bytes, points: int, counts: list[int]) -> list[np.ndarray]:
    """By numpy: Open3D reads an unreadable number as 0 and a short line as none."""
    array = np.loadtxt(io.BytesIO(body), dtype=np.float64, comments=None, ndmin=2) if body.strip() else np.zeros((0, 0))
    if len(array) != points:
        raise BadSample(f"{len(array)} of {points} declared points are there")
    if array.shape[1] != sum(counts):
        raise BadSample(f"has {array.shape[1]} numbers a point, the header declares {sum(counts)}")
    return [array[:, at] for at in np.cumsum([0, *counts[:-1]])]


def _pcd_packed(body: bytes, points: int, layout: np.dtype) -> list[np.ndarray]:
    """Unpacked by Open3D, field after field, as columns of single bytes: some headers, so read, end the process."""
    packed, unpacked = struct.unpack_from("<2I", body) if len(body) >= 8 else (1, 0)
    if packed > len(body) - 8 or unpacked != points * layout.itemsize:
        raise BadSample(f"{max(0, len(body) - 8)} of {packed} declared bytes of packed points are there")
    names, ones = ["x", "y", "z", *(f"b{i}" for i in range(3, layout.itemsize))], " 1" * layout.itemsize
    header = f"VERSION .7\nFIELDS {' '.join(names)}\nSIZE{ones}\nTYPE{' U' * layout.itemsize}\nCOUNT{ones}\n"
    header += f"WIDTH {points}\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS {points}\nDATA binary_compressed\n"
    with _on_disk(header.encode() + body, ".pcd") as path:
        read = _open3d().t.io.read_point_cloud(path, remove_nan_points=False, remove_infinite_points=False).point
    if "positions" not in read or len(read.positions) != points:
        raise BadSample("the packed points do not unpack")
    flat = np.concatenate([*read.positions.numpy().T, *(read[name].numpy()[:, 0] for name in names[3:])]).tobytes()
    columns, at = [], 0
    for name in layout.names or ():
        columns.append(np.frombuffer(flat, layout[name].base, points, at))
        at += points * layout[name].itemsize
    return columns


def _read_ply(data: bytes, _: str, __: Sequence[str]) -> Table:
    import plyfile

    with _on_disk(data, ".ply") as path:
        elements = plyfile.PlyData.read(path)
        if "vertex" not in elements:
            raise BadSample("has no vertices")
        vertices = elements["vertex"].data
        names = [name for name in vertices.dtype.names or () if vertices.dtype[name].kind in "fiu"]
        return {name: np.array(vertices[name]) for name in names}


def _read_las(data: bytes, _: str, __: Sequence[str]) -> Table:
    """Scaled coordinates, the classification as label, intensity and colors. Points are counted: laspy does not."""
    import laspy

    _check_las(data)
    with laspy.open(io.BytesIO(data)) as reader:
        header = reader.header
        declared, there = header.point_count, (len(data) - header.offset_to_point_data) // header.point_format.size
        if declared > MAX_POINTS or (declared > there and not header.are_points_compressed):
            raise BadSample(f"{there} of {declared} declared points are there")
        las = reader.read()
    if len(las.points) != declared:
        raise BadSample(f"{len(las.points)} of {declared} declared points are there")
    table = {"coords": np.asarray(las.xyz), "label": np.asarray(las.classification)}
    known = set(las.point_format.dimension_names)
    return table | {name: np.asarray(las[name]) for name in ("intensity", "red", "green", "blue") if name in known}


def _check_las(data: bytes) -> None:
    """Counts that laspy and lazrs believe: too many records take minutes, too many chunks end the process."""
    if len(data) < 227:
        raise BadSample(f"has {len(data)} bytes, less than a LAS header")
    minor, compressed = data[25], data[104] >= 128
    start, records = struct.unpack_from("<2I", data, 96)
    extended = struct.unpack_from("<I", data, 243)[0] if minor >= 4 and len(data) >= 375 else 0
    if start > len(data) or 54 * records + 60 * extended > len(data):
        raise BadSample(f"declares {records + extended} records and points from byte {start} in {len(data)} bytes")
    if compressed:
        table = struct.unpack_from("<q", data, start)[0] if len(data) >= start + 8 else len(data)
        table = struct.unpack_from("<q", data, len(data) - 8)[0] if table == -1 else table
        chunks = struct.unpack_from("<I", data, table + 4)[0] if 0 <= table <= len(data) - 8 else len(data)
        if chunks > len(data):
            raise BadSample("its table of chunks is cut or broken")


# ---------------------------------------------------------------------------------------------------- meshes


def read_mesh(path: str, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Vertices float64 `[V, 3]` and triangles int64 `[F, 3]` of an OFF, OBJ, STL or PLY mesh. Raises BadSample."""
    import trimesh

    kind = PurePosixPath(path).suffix.lower()[1:]
    try:
        mesh: Any = trimesh.load_mesh(io.BytesIO(data), file_type=kind, process=False)
        vertices, faces = np.asarray(mesh.vertices, np.float64), np.asarray(mesh.faces, np.int64)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  (as in read_cloud)
        raise BadSample(f"does not read as {kind.upper()}: {_first_line(error)}") from None
    if not len(faces):
        raise BadSample("the mesh has no faces, or is cut")
    if kind == "off":
        _check_off(data, len(vertices))
    if kind == "stl" and len(data) >= 84 and not data[:512].lstrip().startswith(b"solid"):
        declared = int(np.frombuffer(data[80:84], "<u4")[0])
        if declared != len(faces):
            raise BadSample(f"{len(faces)} of {declared} declared faces are there")
    if not np.isfinite(vertices).all():
        raise BadSample("a vertex of the mesh is not a finite number")
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise BadSample(f"a face names vertex {int(faces.max())} of {len(vertices)}")
    return vertices, faces


def _check_off(data: bytes, num_vertices: int) -> None:
    """Compare the counts in an OFF header with the lines; in some ModelNet files they follow OFF without a blank."""
    lines = [line for line in data.decode("latin-1").splitlines() if line.strip() and not line.startswith("#")]
    head = lines[0].lstrip()[3:].split() or lines[1].split()
    vertices, faces = int(head[0]), int(head[1])
    there = len(lines) - (1 if lines[0].strip()[3:].strip() else 2)
    if num_vertices != vertices or there < vertices + faces:
        raise BadSample(f"{there} of {vertices + faces} declared vertices and faces are there")


def sample_surface(
    vertices: np.ndarray, faces: np.ndarray, num_points: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Points drawn evenly from the surface of triangles, and their normals: float64 `[N, 3]` each.

    Raises BadSample for a mesh without area.
    """
    corners = vertices[faces]  # [F, 3, 3]
    across = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    area = np.linalg.norm(across, axis=1)
    if not area.sum() > 0:
        raise BadSample("the mesh has no area")
    picked = rng.choice(len(faces), num_points, p=area / area.sum())
    u, v = rng.random((2, num_points, 1))
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)  # the far half folded back
    a, b, c = corners[picked].transpose(1, 0, 2)
    return a + u * (b - a) + v * (c - a), across[picked] / area[picked, None]


def _read_mesh(data: bytes, suffix: str, _: Sequence[str]) -> Table:
    vertices, faces = read_mesh(f"mesh{suffix}", data)
    coords, normals = sample_surface(vertices, faces, MESH_POINTS, np.random.default_rng(0))
    return {"coords": coords, "normals": normals}


_READERS: dict[str, Callable[[bytes, str, Sequence[str]], Table]] = {
    ".pcd": _read_pcd,
    ".ply": _read_ply,
    ".las": _read_las,
    ".laz": _read_las,
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".bin": _read_bin,
    ".off": _read_mesh,
    ".obj": _read_mesh,
    ".stl": _read_mesh,
    **dict.fromkeys((".xyz", ".txt", ".pts", ".csv", ".asc", ".xyzn", ".xyzrgb"), _read_text),
}


# --------------------------------------------------------------------------------------------- normals, spread


def _open3d() -> Any:
    import open3d

    open3d.utility.set_verbosity_level(open3d.utility.VerbosityLevel.Error)
    return open3d


def estimate_normals(coords: np.ndarray, neighbours: int = 16) -> np.ndarray:
    """Unit normals float32 `[N, 3]` from the nearest neighbours of each point, turned away from the cloud's centre."""
    o3d = _open3d()
    cloud = o3d.t.geometry.PointCloud(o3d.core.Tensor(np.ascontiguousarray(coords, np.float32)))
    cloud.estimate_normals(max_nn=neighbours)
    normals = cloud.point.normals.numpy()
    outward = ((coords - coords.mean(0)) * normals).sum(1, keepdims=True)
    return np.where(outward < 0, -normals, normals).astype(np.float32)


def farthest_points(coords: np.ndarray, num_points: int) -> np.ndarray:
    """Rows int64 `[num_points]` of a spread-out subset, ascending: each next point is the farthest from those taken.

    It starts at row 0 and takes time proportional to N times num_points: about 1 s for 1,024 of 20,000.
    """
    o3d = _open3d()
    cloud = o3d.t.geometry.PointCloud(o3d.core.Tensor(np.ascontiguousarray(coords, np.float32)))
    cloud.point["row"] = o3d.core.Tensor(np.arange(len(coords))[:, None])
    return cloud.farthest_point_down_sample(num_points).point["row"].numpy()[:, 0]


# --------------------------------------------------------------------------------------------------- samples


@dataclass(frozen=True)
class PointRecipe:
    """How a sample is made of a cloud. The network's channels are x y z, then `channels`, then a one-hot of the shape.

    `channels` are feature names ("colors", "normals" (estimated where the file has none), "intensity", ...);
    `num_shapes` > 0 adds the one-hot. `normalize` "sphere": mean to 0, largest radius to 1, over the whole cloud, as
    ShapeNet part is published; "block": middle of x and y to 0, lowest z to 0, in metres, as an S3DIS block; "none".
    `mode` "train" draws and augments, "val" draws only, "test" covers all points: `votes` times
    ceil(n / num_points) views, n the cloud's size or, where given, `max_points` (8192 for S3DIS windows); without
    `fill` a cloud smaller than that has fewer views, and the rest of its sample is blank (ShapeNet).
    `replace` draws with replacement always (ShapeNet, KITTI), else only where points are too few (S3DIS); `spread`
    makes "val" take the farthest points instead of a draw, the same every time.
    Augmentation: `rotate_z` degrees to either side, `scale` range, mirrored x by `flip` half of the time, `jitter`
    standard deviation in xyz cut at `jitter_clip`, colors zeroed with chance `color_drop`. As published: S3DIS none,
    ShapeNet jitter 0.01 (clip 0.05), KITTI flip and `published_shift`. PointNeXt's S3DIS recipe (arXiv 2206.04670):
    rotate_z 180, scale 0.9 to 1.1, jitter 0.005 (clip 0.02), color_drop 0.2.
    `per_point` says that the label is one per point, not one per cloud.
    `published_shift` moves a frustum by 0.8 times its box's distance from the axis along z: a slip in frustum-pointnets
    that its published numbers include.
    """

    num_points: int = 2048
    channels: tuple[str, ...] = ()
    num_shapes: int = 0
    normalize: str = "none"
    mode: str = "train"
    replace: bool = False
    spread: bool = False
    votes: int = 1
    max_points: int = 0
    fill: bool = True
    rotate_z: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    flip: bool = False
    jitter: float = 0.0
    jitter_clip: float = 0.05
    color_drop: float = 0.0
    published_shift: bool = False
    per_point: bool = False
    kind: str = "points"

    @property
    def num_channels(self) -> int:
        """Channels of a sample: coordinates, `channels`, one-hot."""
        return 3 + sum(WIDTHS.get(name, 1) for name in self.channels) + self.num_shapes

    def num_views(self, num_points: int = 0) -> int:
        """Views of a cloud of `num_points`; the same for all clouds unless mode is "test" without `max_points`."""
        if self.mode != "test":
            return 1
        return self.votes * -(-(self.max_points or num_points) // self.num_points)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "PointRecipe":
        """The recipe of `to_dict`, lists from JSON included."""
        low, high = plain.get("scale", cls.scale)
        return cls(**{**plain, "channels": tuple(plain.get("channels", ())), "scale": (float(low), float(high))})


@dataclass(frozen=True, eq=False)
class PointSample:
    """`points` float32 `[V, C, N]`, `labels` int64 `[V, N]` or None, `indices` int64 `[V, N]`: the cloud's row of each.

    `box` float32 `[7]` (centre x y z, size l w h, heading) where a box was given, moved along with the points.
    """

    points: np.ndarray
    labels: np.ndarray | None
    indices: np.ndarray
    box: np.ndarray | None = None


def streams(key: Sequence[int]) -> tuple[np.random.Generator, np.random.Generator]:
    """The two random streams of a sample (which points, augmentation), a function of its key alone."""
    draw, augment = np.random.SeedSequence(list(key)).spawn(2)
    return np.random.default_rng(draw), np.random.default_rng(augment)


def make_points(
    cloud: Cloud, recipe: PointRecipe, key: Sequence[int], shape: int = 0, box: np.ndarray | None = None
) -> PointSample:
    """One sample of `cloud`. `key` is (seed, epoch, sample), `shape` the class for the one-hot, `box` as PointSample's.

    Raises BadSample: a channel that the cloud has not, or more points than `max_points`.
    """
    draw, augment = streams(key)
    coords = normalized(cloud.coords, recipe.normalize)
    features = {name: _channel(cloud, name) for name in recipe.channels}
    if recipe.mode == "val" and recipe.spread and len(cloud) >= recipe.num_points:
        indices = farthest_points(coords, recipe.num_points)[None]
    else:
        indices = draw_indices(recipe, len(cloud), draw)
    coords, features = coords[indices], {name: array[indices] for name, array in features.items()}  # [V, N, k]
    if recipe.mode == "train":
        coords, features, box = _augmented(coords, features, box, recipe, augment)
    hot = np.zeros((*indices.shape, recipe.num_shapes), np.float32)
    if recipe.num_shapes:
        hot[..., shape] = 1
    points = np.concatenate([coords, *features.values(), hot], -1, dtype=np.float32)
    return PointSample(
        np.ascontiguousarray(points.transpose(0, 2, 1)),
        None if cloud.labels is None else cloud.labels[indices],
        indices,
        None if box is None else np.asarray(box, np.float32),
    )


def draw_indices(recipe: PointRecipe, num_points: int, rng: np.random.Generator) -> np.ndarray:
    """Which points each view takes, int64 `[V, recipe.num_points]`; in mode "test" every point at least `votes` times.

    Raises BadSample for more points than `max_points`.
    """
    if recipe.mode != "test":
        replace = recipe.replace or num_points < recipe.num_points
        return rng.choice(num_points, recipe.num_points, replace=replace)[None].astype(np.int64)
    if recipe.max_points and num_points > recipe.max_points:
        raise BadSample(f"has {num_points} points, max_points is {recipe.max_points}")
    views = recipe.num_views(num_points) if recipe.fill else recipe.votes * -(-num_points // recipe.num_points)
    total = views * recipe.num_points
    return rng.permutation(np.arange(total) % num_points).reshape(-1, recipe.num_points)


def normalized(coords: np.ndarray, how: str) -> np.ndarray:
    """Coordinates float32 `[N, 3]` normalised "none", "sphere" or "block", as PointRecipe says."""
    if how == "sphere":
        centred = coords - coords.mean(0, dtype=np.float64)
        return (centred / np.linalg.norm(centred, axis=1).max()).astype(np.float32)
    if how == "block":
        low, high = coords.min(0), coords.max(0)
        return coords - np.array([(low[0] + high[0]) / 2, (low[1] + high[1]) / 2, low[2]], coords.dtype)
    return coords


def _channel(cloud: Cloud, name: str) -> np.ndarray:
    if name in cloud.features:
        return cloud.features[name]
    if name == "normals":
        return estimate_normals(cloud.coords)
    raise BadSample(f"has no {name} (it has: {', '.join(cloud.features) or 'coordinates only'})")


def _augmented(
    coords: np.ndarray,
    features: dict[str, np.ndarray],
    box: np.ndarray | None,
    recipe: PointRecipe,
    rng: np.random.Generator,
) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray | None]:
    """Every draw is made whatever the recipe, so that switching one augmentation does not change the others."""
    angle, size, mirror, drop = rng.uniform(-1, 1), rng.uniform(*recipe.scale), rng.random() < 0.5, rng.random()
    coords = coords.astype(np.float32)
    if box is not None and (recipe.rotate_z or recipe.scale != (1.0, 1.0)):
        raise ValueError("a box in camera coordinates can be mirrored and shifted, not turned about z or scaled")
    if recipe.rotate_z:
        cos, sin = np.cos(np.radians(angle * recipe.rotate_z)), np.sin(np.radians(angle * recipe.rotate_z))
        turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]], np.float32).T
        coords = coords @ turn
        if "normals" in features:
            features = features | {"normals": features["normals"] @ turn}
    coords = coords * np.float32(size)
    if recipe.flip and mirror:
        coords = coords * np.array([-1, 1, 1], np.float32)
        if "normals" in features:
            features = features | {"normals": features["normals"] * np.array([-1, 1, 1], np.float32)}
        if box is not None:
            box = np.concatenate([[-box[0]], box[1:6], [np.pi - box[6]]])
    if recipe.published_shift and box is not None:
        far = np.hypot(box[0], box[1])
        shift = np.clip(rng.standard_normal() * 0.05 * far, 0.8 * far, 1.2 * far)  # all but always 0.8 far
        coords = coords + np.array([0, 0, shift], np.float32)
        box = np.concatenate([box[:2], [box[2] + shift], box[3:]])
    if recipe.jitter:
        noise = rng.standard_normal(coords.shape) * recipe.jitter
        coords = coords + np.clip(noise, -recipe.jitter_clip, recipe.jitter_clip)
    if drop < recipe.color_drop and "colors" in features:
        features = features | {"colors": np.zeros_like(features["colors"])}
    return coords, features, box
