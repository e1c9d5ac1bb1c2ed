"""Point files of every format, made of the same few points: functions that write them, and the table `NAMED`."""

import io
import struct

import laspy
import numpy as np
import plyfile

RNG = np.random.default_rng(0)
POINTS = np.random.default_rng(0).uniform(-10, 10, (50, 3))
COORDS = RNG.uniform(-5, 5, (40, 3)).astype(np.float32)


def ply(columns: dict[str, np.ndarray], text: bool = False, order: str = "<", faces: int = 0, comments=()) -> bytes:
    types = [(name, array.dtype.str[1:]) for name, array in columns.items()]
    elements = [plyfile.PlyElement.describe(np.asarray(np.rec.fromarrays(list(columns.values()), types)), "vertex")]
    if faces:
        corners = np.array([(np.array([0, 1, 2], "i4"),)] * faces, [("vertex_indices", "O")])
        elements.append(plyfile.PlyElement.describe(corners, "face"))
    buffer = io.BytesIO()
    plyfile.PlyData(elements, text=text, byte_order=order, comments=list(comments)).write(buffer)
    return buffer.getvalue()


def pcd(columns: dict[str, np.ndarray], kind: str = "binary") -> bytes:
    arrays = [array.astype("<f4") for array in columns.values()]
    n, names = len(arrays[0]), list(columns)
    head = f"VERSION .7\nFIELDS {' '.join(names)}\nSIZE{' 4' * len(names)}\nTYPE{' F' * len(names)}\n"
    head += f"COUNT{' 1' * len(names)}\nWIDTH {n}\nHEIGHT 1\nPOINTS {n}\nDATA {kind}\n"
    if kind == "ascii":
        return head.encode() + "".join(" ".join(f"{v:.9g}" for v in row) + "\n" for row in zip(*arrays)).encode()
    if kind == "binary":
        return head.encode() + np.stack(arrays, 1).tobytes()
    flat = np.concatenate(arrays).tobytes()
    packed = b"".join(bytes([len(flat[i : i + 32]) - 1]) + flat[i : i + 32] for i in range(0, len(flat), 32))
    return head.encode() + struct.pack("<2I", len(packed), len(flat)) + packed


def las(coords=COORDS, compress: bool = False, version: str = "1.4", **extra) -> bytes:
    header = laspy.LasHeader(point_format=3, version=version)
    header.scales = np.full(3, 1e-6)
    for name, array in extra.items():
        header.add_extra_dim(laspy.ExtraBytesParams(name, array.dtype))
    data, buffer = laspy.LasData(header), io.BytesIO()
    data.x, data.y, data.z = np.asarray(coords, np.float64).T
    data.classification = np.arange(len(coords)) % 5
    for name, array in extra.items():
        data[name] = array
    data.write(buffer, do_compress=compress)
    return buffer.getvalue()


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz(**arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def xyz(**more) -> dict[str, np.ndarray]:
    return {"x": COORDS[:, 0], "y": COORDS[:, 1], "z": COORDS[:, 2], **more}


def csv(columns: dict[str, np.ndarray]) -> bytes:
    rows = "".join(",".join(f"{value:.9g}" for value in row) + "\n" for row in zip(*columns.values()))
    return f"{','.join(columns)}\n{rows}".encode()


NAMED = {  # formats whose files name their columns
    "csv": ("a.csv", csv),
    "ply": ("a.ply", ply),
    "ply text": ("a.ply", lambda columns: ply(columns, text=True)),
    "ply big-endian": ("a.ply", lambda columns: ply(columns, order=">")),
    "pcd": ("a.pcd", pcd),
    "pcd text": ("a.pcd", lambda columns: pcd(columns, "ascii")),
    "pcd packed": ("a.pcd", lambda columns: pcd(columns, "binary_compressed")),
    "npz": ("a.npz", lambda columns: npz(**columns)),
}


def written(points, places=3, delimiter=";", decimal=",", thousands="") -> bytes:
    def number(value: float) -> str:
        grouped = f"{value:,.{places}f}" if thousands else f"{value:.{places}f}"
        return grouped.translate(str.maketrans({",": thousands, ".": decimal}))

    return ("\n".join(delimiter.join(map(number, row)) for row in points) + "\n").encode()
