"""`model.slim`: a compressed network as a single file, in which everything counts (Deep Compression, arXiv 1510.00149).

    b"SLIM", version uint16, bytes of the header uint32; the header, JSON packed by zlib; then the streams.

The header describes the network (`model`, `input`, as in a run's model folder) and each tensor: name, shape, dtype,
SHA-256 of its decoded bytes, coding, and the bytes of its streams, which follow one another without gaps. A tensor has
the coding that takes the fewest bytes: `dense`, uncompressed; `codes`, a codebook and a Huffman code per value;
`sparse` or `shared`, relative indices of the nonzeros with their values or their codes. Decoding is bit-exact. A file
is checked by its header before anything of the declared size is allocated; invalid data raises UserError.
"""

import hashlib
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimray.compress import bitstreams
from slimray.spec import UserError

MAGIC, VERSION = b"SLIM", 1
START = struct.Struct("<4sHI")
MAX_HEADER_BYTES = 64 << 20  # unpacked
MAX_EXPANSION = 4096  # most values per byte of the file: one filler in two bits bridges 256 zeros
MAX_CODES = 256
GAP_BITS = (2, 3, 4, 5, 6, 7, 8)
CODINGS = {  # coding of a tensor -> its streams
    "dense": ("values",),
    "codes": ("codebook", "table", "symbols"),
    "sparse": ("gap_table", "gaps", "values"),
    "shared": ("codebook", "table", "symbols", "gap_table", "gaps"),
}
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32,
        torch.int64, torch.bool,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Slim:
    """Header of a file: the arguments of `compress.build`, the network's input, its tensors in order, and their offset.

    `model` and `input` are empty in a file that holds only tensors.
    """

    model: dict[str, Any]
    input: dict[str, Any]
    tensors: tuple[dict[str, Any], ...]
    start: int


# ------------------------------------------------------------------------------------------------------- writing


def encode(
    tensors: Mapping[str, Tensor], model: Mapping[str, Any] | None = None, input_json: Mapping[str, Any] | None = None
) -> bytes:
    """Return `tensors` as a file, each with the coding that takes the fewest bytes. Deterministic."""
    entries, streams = [], []
    for name, tensor in tensors.items():
        entry, parts = _encode_tensor(tensor)
        entries.append({"name": name, **entry, "bytes": [len(part) for part in parts]})
        streams += parts
    header = {"model": dict(model or {}), "input": dict(input_json or {}), "tensors": entries}
    packed = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
    return b"".join([START.pack(MAGIC, VERSION, len(packed)), packed, *streams])


def _encode_tensor(tensor: Tensor) -> tuple[dict[str, Any], list[bytes]]:
    """Return the header entry of a tensor, without name and bytes, and its streams."""
    words = _words(tensor)
    data = words.tobytes()
    entry: dict[str, Any] = {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    best: tuple[dict[str, Any], list[bytes]] = ({"coding": "dense"}, [data])
    positions = np.flatnonzero(words)
    if len(words) < 64 or not len(positions):  # tables would not pay off
        return entry | best[0], best[1]
    book, codes = np.unique(words, return_inverse=True)
    candidates = [best]
    if len(book) <= MAX_CODES:
        table, stream = _coded(codes.astype(np.uint16), len(book))
        candidates.append(({"coding": "codes", "codes": len(book)}, [book.tobytes(), table, stream]))
    values = words[positions]
    used = book[book != 0]
    if len(used) < MAX_CODES:
        symbols = np.searchsorted(used, values).astype(np.uint16) + 1
        for gap_bits in GAP_BITS:
            gaps, kept = bitstreams.to_gaps(positions, gap_bits)
            whole = np.zeros(len(gaps), np.uint16)
            whole[kept] = symbols
            parts = [used.tobytes(), *_coded(whole, len(used) + 1), *_coded(gaps.astype(np.uint16), 1 << gap_bits)]
            about = {"coding": "shared", "codes": len(used) + 1, "gap_bits": gap_bits, "entries": len(gaps)}
            candidates.append((about, parts))
    else:
        for gap_bits in GAP_BITS:
            gaps, kept = bitstreams.to_gaps(positions, gap_bits)
            whole = np.zeros(len(gaps), words.dtype)
            whole[kept] = values
            parts = [*_coded(gaps.astype(np.uint16), 1 << gap_bits), whole.tobytes()]
            candidates.append(({"coding": "sparse", "gap_bits": gap_bits, "entries": len(gaps)}, parts))
    about, parts = min(candidates, key=lambda one: sum(map(len, one[1])) + len(json.dumps(one[0])))
    return entry | about, parts


def _coded(values: np.ndarray, count: int) -> tuple[bytes, bytes]:
    """Return the length table of a Huffman code of `values` among `count` symbols, 4 bits each, and the stream."""
    lengths = bitstreams.code_lengths(np.bincount(values, minlength=count).tolist())
    return bitstreams.pack(lengths, 4), bitstreams.huffman(values, lengths)


def _words(tensor: Tensor) -> np.ndarray:
    """Return the values of a tensor as unsigned integers of the same bits, flat, little endian."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    size = flat.element_size()
    data = flat.view(torch.uint8).numpy() if flat.numel() else np.zeros(0, np.uint8)
    return np.ascontiguousarray(data).view(f"<u{size}")


# ------------------------------------------------------------------------------------------------------- reading


def read_header(data: bytes, where: str) -> Slim:
    """Return the header of a file, checked against the file's size; UserError, with `where`, if it is invalid."""
    try:
        return _header(data)
    except (ValueError, KeyError, TypeError, struct.error, zlib.error, RecursionError, OverflowError) as error:
        raise UserError(f"{where}: is not a readable model.slim ({_reason(error)})") from None


def _header(data: bytes) -> Slim:
    magic, version, size = START.unpack_from(data)
    if magic != MAGIC:
        raise ValueError("it does not begin with SLIM")
    if version != VERSION:
        raise ValueError(f"it is of version {version}, but this slimray reads {VERSION}")
    start = START.size + size
    if start > len(data):
        raise ValueError(f"its header of {size:,} bytes is longer than the file")
    unpacker = zlib.decompressobj()
    text = unpacker.decompress(data[START.size : start], MAX_HEADER_BYTES)
    if unpacker.unconsumed_tail or not unpacker.eof or unpacker.unused_data:
        raise ValueError("its header is damaged, or unpacks to more than 64 MB")
    found = json.loads(text)
    tensors, room, values = [], len(data) - start, 0
    for plain in found["tensors"]:
        values += _check_entry(plain)
        room -= sum(plain["bytes"])
        tensors.append(plain)
    if room != 0:
        raise ValueError(f"its streams are {abs(room):,} bytes {'shorter' if room > 0 else 'longer'} than the file")
    if values > MAX_EXPANSION * len(data):
        raise ValueError(f"it declares {values:,} values in {len(data):,} bytes")
    if len({plain["name"] for plain in tensors}) < len(tensors):
        raise ValueError("two tensors have the same name")
    if not isinstance(found["model"], dict) or not isinstance(found["input"], dict):
        raise ValueError("it does not name a network")
    return Slim(found["model"], found["input"], tuple(tensors), start)


def _check_entry(plain: Any) -> int:
    """Return the number of values of a tensor; ValueError, KeyError or TypeError for an inconsistent entry."""
    shape, sizes, coding = plain["shape"], plain["bytes"], plain["coding"]
    if not isinstance(plain["name"], str) or not isinstance(plain["sha256"], str):
        raise ValueError("a tensor has no name or no SHA-256")
    parts = CODINGS[coding]
    whole = [*shape, *sizes, *(plain[key] for key in ("codes", "gap_bits", "entries") if key in plain)]
    if not all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 1 << 48 for one in whole):
        raise ValueError("a size is not a whole number")
    values, width = 1, DTYPES[plain["dtype"]].itemsize
    for side in shape:
        values *= side
        if values >= 1 << 48:
            raise ValueError("a tensor has too many values")
    if len(sizes) != len(parts) or len(shape) > 16:
        raise ValueError(f"coding {coding} has {len(parts)} streams")
    size = dict(zip(parts, sizes, strict=True))
    entries = values
    if "gaps" in size:
        entries, gap_bits = plain["entries"], plain["gap_bits"]
        if entries > values or not 1 <= gap_bits <= 8 or size["gap_table"] != (4 << gap_bits) // 8:
            raise ValueError(f"{entries} entries with {gap_bits}-bit indices for {values} values")
    if "codebook" in size:
        codes = plain["codes"]
        stored = codes - (coding == "shared")
        if not 1 <= codes <= MAX_CODES or size["codebook"] != width * stored or size["table"] != (codes + 1) // 2:
            raise ValueError(f"{codes} codes do not match their codebook or table")
    if "values" in size and size["values"] != width * entries:
        raise ValueError(f"{size['values']} bytes for {entries} values of {width} bytes")
    for name in ("symbols", "gaps"):
        if name in size and not entries <= 8 * size[name] <= bitstreams.MAX_LENGTH * entries + 7:
            raise ValueError(f"{size[name]} bytes for {entries} codes")
    return values


def decode(data: bytes, where: str, shapes: Mapping[str, Sequence[int]] | None = None) -> dict[str, Tensor]:
    """Return the tensors of a file, bit for bit as they were encoded.

    Raises UserError, with `where`, for a damaged or hostile file; with `shapes` (name -> shape, of the target network)
    also for other names or shapes, before anything is allocated.
    """
    slim = read_header(data, where)
    if shapes is not None:
        found = {plain["name"]: list(plain["shape"]) for plain in slim.tensors}
        wanted = {name: list(shape) for name, shape in shapes.items()}
        if found != wanted:
            name = next(name for name in {**wanted, **found} if found.get(name) != wanted.get(name))
            raise UserError(
                f"{where}: its tensors are not those of its network: {name} has shape {found.get(name, 'none')}, not "
                f"{wanted.get(name, 'none')}"
            )
    out: dict[str, Tensor] = {}
    at = slim.start
    for plain in slim.tensors:
        parts = {}
        for name, size in zip(CODINGS[plain["coding"]], plain["bytes"], strict=True):
            parts[name] = data[at : at + size]
            at += size
        try:
            words = _decode_tensor(plain, parts)
            if hashlib.sha256(words.tobytes()).hexdigest() != plain["sha256"]:
                raise ValueError("its values differ from those that were written")
        except (ValueError, IndexError, OverflowError) as error:
            raise UserError(f"{where}: tensor {plain['name']} is damaged ({_reason(error)})") from None
        flat = torch.from_numpy(words.view(np.uint8)).view(DTYPES[plain["dtype"]])
        out[plain["name"]] = flat.reshape(plain["shape"])
    return out


def _decode_tensor(plain: Mapping[str, Any], parts: Mapping[str, bytes]) -> np.ndarray:
    """Return the values of a tensor as unsigned integers, in a writable array."""
    size = int(np.prod(plain["shape"], dtype=np.int64)) if plain["shape"] else 1
    word = np.dtype(f"<u{DTYPES[plain['dtype']].itemsize}")
    if plain["coding"] == "dense":
        return np.frombuffer(parts["values"], word).copy()
    if plain["coding"] == "codes":
        book = np.frombuffer(parts["codebook"], word)
        return book[_symbols(parts["symbols"], parts["table"], plain["codes"], size)]
    entries = plain["entries"]
    gaps = _symbols(parts["gaps"], parts["gap_table"], 1 << plain["gap_bits"], entries)
    positions = bitstreams.to_positions(gaps, size)
    if plain["coding"] == "sparse":
        values = np.frombuffer(parts["values"], word)
    else:
        book = np.concatenate([np.zeros(1, word), np.frombuffer(parts["codebook"], word)])
        values = book[_symbols(parts["symbols"], parts["table"], plain["codes"], entries)]
    out = np.zeros(size, word)
    out[positions] = values
    return out


def _symbols(stream: bytes, table: bytes, count: int, entries: int) -> np.ndarray:
    return bitstreams.unhuffman(stream, bitstreams.unpack(table, 4, count).astype(np.uint8), entries)


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


# ------------------------------------------------------------------------------------------------------- counting


def parts_of(slim: Slim, total: int) -> dict[str, int]:
    """Return the composition of a file's `total` bytes: header, codebooks, tables, symbols, gaps, values."""
    out = {"header": slim.start, "codebooks": 0, "tables": 0, "symbols": 0, "gaps": 0, "values": 0}
    names: dict[str, str] = {"codebook": "codebooks", "table": "tables", "gap_table": "tables"}
    for plain in slim.tensors:
        for name, size in zip(CODINGS[plain["coding"]], plain["bytes"], strict=True):
            out[str(names.get(name, name))] += size
    assert sum(out.values()) == total
    return out
