"""Checks an ONNX file before any library opens it: its operators, and its declared sizes against its content.

In: the bytes of a file from any source. Out: its inputs, outputs and number of nodes, or a UserError of one sentence.
It refuses external data, operators that neither ONNX nor ONNX Runtime has, operators that open files, and tensors that
declare more than they hold or than a network needs. Reads protobuf's wire format, field by field and without copies:
parsing libraries allocate what a file declares, and devices need one library less. Field numbers are those of
onnx.proto (ONNX 1.23).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from slimray.spec import UserError

DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})
OPENS_FILES = frozenset({"EPContext"})  # of com.microsoft: names a file with a compiled network
MAX_FILE_BYTES = (2 << 30) - 1  # protobuf's limit
MAX_VALUES = 1 << 29  # in a declared tensor: 2 GiB of float32
MAX_DEPTH = 12  # of nested graphs in attributes
MAX_NODES = 200_000
MAX_RANK = 16
MAX_VARINT_BYTES = 10
CHUNK_BYTES = 1 << 20  # of a packed field, counted at once
BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16,
        17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4}  # fmt: skip
DTYPES = {1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool",
          10: "float16", 11: "float64", 12: "uint32", 13: "uint64"}  # fmt: skip
SIZED_BY = {"ConstantOfShape": 0, "Expand": 1, "Tile": 1}  # operators -> the input that determines their output size


@dataclass(frozen=True)
class Place:
    """An input or output of a network: name, numpy type, shape with None for dynamic sizes."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Declared:
    """Inputs, outputs and number of nodes that a checked file declares."""

    inputs: tuple[Place, ...]
    outputs: tuple[Place, ...]
    num_nodes: int


class _Bad(Exception):
    """Reason to refuse a file, to be put after its name in a message."""


@dataclass
class _Seen:
    """Functions and number of nodes found so far."""

    functions: set[tuple[str, str]] = field(default_factory=set)
    num_nodes: int = 0


def check_onnx(data: bytes, where: str) -> Declared:
    """Return what an ONNX file declares; UserError, which begins with `where`, if it must not be opened."""
    try:
        if not 0 < len(data) <= MAX_FILE_BYTES:
            raise _Bad("is empty" if not data else f"is larger than ONNX allows ({MAX_FILE_BYTES:,} bytes)")
        return _model(memoryview(data))
    except _Bad as error:
        raise UserError(f"{where}: {error}") from None
    except RecursionError:
        raise UserError(f"{where}: is nested too deeply to be a network") from None


# -------------------------------------------------------------------------------------------------- wire format


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield the fields of a message: their number, and an integer or the bytes of a field with a length."""
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise _Bad("is not an ONNX file (a field has no number)")
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise _Bad("is not an ONNX file (a field has an unknown type)")
        if size > end - at:
            raise _Bad("is not an ONNX file, or is truncated (a field is longer than the file)")
        yield number, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 7 * MAX_VARINT_BYTES, 7):
        if at >= len(data):
            raise _Bad("is not an ONNX file, or is truncated (a number is incomplete)")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & ((1 << 64) - 1), at
    raise _Bad("is not an ONNX file (a number is too long)")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise _Bad("is not an ONNX file (a field has another type)")
    return value


def _int(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise _Bad("is not an ONNX file (a field has another type)")
    return _signed(value)


def _text(value: int | memoryview) -> str:
    return bytes(_bytes(value)[:300]).decode("utf-8", "replace")


def _few_ints(value: int | memoryview) -> tuple[int, list[int]]:
    """Return the number of integers in a repeated field, packed or single, and the integers if there are at most
    MAX_RANK. Packed ones are counted by their last bytes, because decoding a field takes many times its size."""
    if isinstance(value, int):
        return 1, [_signed(value)]
    count, begin = 0, 0
    for start in range(0, len(value), CHUNK_BYTES):
        ends = np.flatnonzero(np.frombuffer(value[start : start + CHUNK_BYTES], np.uint8) < 128) + start + 1
        if (np.diff(ends, prepend=begin) > MAX_VARINT_BYTES).any():
            raise _Bad("is not an ONNX file (a number is too long)")
        count, begin = count + len(ends), int(ends[-1]) if len(ends) else begin
    if begin != len(value):
        raise _Bad("is not an ONNX file, or is truncated (a number is incomplete)")
    if count > MAX_RANK:
        return count, []
    found, at = [], 0
    while at < len(value):
        one, at = _varint(value, at)
        found.append(_signed(one))
    return count, found


def _more_dims(dims: list[int], value: int | memoryview, what: str) -> list[int]:
    count, found = _few_ints(value)
    if len(dims) + count > MAX_RANK:
        raise _Bad(f"declares {what} of an impossible shape")
    return dims + found


# ------------------------------------------------------------------------------------------------------ messages


def _model(data: memoryview) -> Declared:
    seen, graphs, functions, opsets = _Seen(), [], [], []
    for number, value in _fields(data):
        if number == 7:
            graphs.append(_bytes(value))
        elif number == 8:
            opsets.append(_bytes(value))
        elif number == 20:
            raise _Bad("holds training information, export only the network")
        elif number == 25:
            functions.append(_bytes(value))
    if len(graphs) != 1 or not opsets:
        raise _Bad("is not an ONNX file (it holds no graph)")
    for one in functions:
        names = {number: _text(value) for number, value in _fields(one) if number in (1, 10)}
        seen.functions.add((names.get(10, ""), names.get(1, "")))
    for one in functions:
        for number, value in _fields(one):
            if number == 7:
                _node(_bytes(value), seen, 0, {})
            elif number == 12:
                _place(_bytes(value))
            elif number == 11:
                _attribute(_bytes(value), seen, 0)
    inputs, outputs = _graph(graphs[0], seen, 0)
    return Declared(inputs, outputs, seen.num_nodes)


def _graph(data: memoryview, seen: _Seen, depth: int) -> tuple[tuple[Place, ...], tuple[Place, ...]]:
    if depth > MAX_DEPTH:
        raise _Bad("is nested too deeply to be a network")
    inputs, outputs, nodes, small = [], [], [], dict[str, list[int]]()
    for number, value in _fields(data):
        if number == 1:
            nodes.append(_bytes(value))
        elif number == 5:
            name, values = _tensor(_bytes(value))
            if values is not None:
                small[name] = values
        elif number in (11, 12, 13):
            found = _place(_bytes(value))
            if number != 13:
                (inputs if number == 11 else outputs).append((found, _bytes(value)))
        elif number == 15:
            _sparse(_bytes(value))
    for node in nodes:
        _node(node, seen, depth, small)
    names = _initializers(data)
    return tuple(one for one, _ in inputs if one.name not in names), tuple(one for one, _ in outputs)


def _initializers(data: memoryview) -> set[str]:
    """Return the names of the weights of a graph, which old files list among the inputs."""
    found = set()
    for number, value in _fields(data):
        if number == 5:
            found |= {_text(one) for key, one in _fields(_bytes(value)) if key == 8}
    return found


def _node(data: memoryview, seen: _Seen, depth: int, small: dict[str, list[int]]) -> None:
    seen.num_nodes += 1
    if seen.num_nodes > MAX_NODES:
        raise _Bad(f"holds more than {MAX_NODES:,} operators")
    kind, domain, inputs, outputs, constant = "", "", [], [], None
    for number, value in _fields(data):
        if number == 1:
            inputs.append(_text(value))
        elif number == 2:
            outputs.append(_text(value))
        elif number == 4:
            kind = _text(value)
        elif number == 7:
            domain = _text(value)
        elif number == 5:
            constant = _attribute(_bytes(value), seen, depth) or constant
    if domain not in DOMAINS and (domain, kind) not in seen.functions:
        raise _Bad(f"uses the custom operator {domain}::{kind}, which needs external code: export the network again")
    if kind in OPENS_FILES and domain == "com.microsoft":
        raise _Bad(f"uses the operator {kind}, which opens a file")
    if kind == "Constant" and outputs and constant is not None:
        small[outputs[0]] = constant
    place = SIZED_BY.get(kind)
    if place is not None and place < len(inputs) and inputs[place] in small:
        _require_size([abs(one) for one in small[inputs[place]]], f"the output of {kind}")


def _attribute(data: memoryview, seen: _Seen, depth: int) -> list[int] | None:
    """Check the content of an attribute; return the integers of a small tensor or of a list in it, None if none."""
    found, numbers, count = None, list[int](), 0
    for number, value in _fields(data):
        if number == 5 or number == 10:
            found = _tensor(_bytes(value))[1]
        elif number in (6, 11):
            _graph(_bytes(value), seen, depth + 1)
        elif number in (22, 23):
            _sparse(_bytes(value))
        elif number == 8:
            more, few = _few_ints(value)
            count += more
            numbers = [*numbers, *few] if count <= MAX_RANK else []
    return found or numbers or None


def _sparse(data: memoryview) -> None:
    dims = list[int]()
    for number, value in _fields(data):
        if number in (1, 2):
            _tensor(_bytes(value))
        elif number == 3:
            dims = _more_dims(dims, value, "a sparse tensor")
    _require_size(dims, "a sparse tensor")


def _require_size(dims: list[int], what: str) -> int:
    if len(dims) > MAX_RANK or any(one < 0 for one in dims):
        raise _Bad(f"declares {what} of an impossible shape")
    if math.prod(dims) > MAX_VALUES:
        raise _Bad(f"declares {what} of {math.prod(dims):,} values, more than {MAX_VALUES:,}")
    return math.prod(dims)


def _tensor(data: memoryview) -> tuple[str, list[int] | None]:
    """Check a tensor's declaration against its content; return its name, and its values if they are few int64."""
    dims, kind, name, raw = list[int](), 0, "", None
    held, numbers = 0, list[int]()
    for number, value in _fields(data):
        if number == 1:
            dims = _more_dims(dims, value, "a tensor")
        elif number == 2:
            kind = _int(value)
        elif number == 8:
            name = _text(value)
        elif number == 9:
            raw = _bytes(value)
        elif number == 13 or (number == 14 and _int(value) != 0):
            raise _Bad("keeps weights in another file (external data), export it as one file")
        elif number in (4, 10):  # float and double, packed, or one of them
            held += len(_bytes(value)) // (4 if number == 4 else 8)
        elif number in (5, 7, 11):
            more, few = _few_ints(value)
            held += more
            numbers = [*numbers, *few] if number == 7 and held <= MAX_RANK else []
        elif number == 6:
            held += 1
    count = _require_size(dims, "a tensor")
    if kind == 8:
        if held != count:
            raise _Bad("declares a tensor that does not match its content")
        return name, None
    if kind not in BITS:
        raise _Bad(f"declares a tensor of an unknown type ({kind})")
    size = -(-count * BITS[kind] // 8)
    packed = -(-count // 2) if BITS[kind] == 4 else count * 2 if kind in (14, 15) else count
    if (len(raw) != size) if raw is not None else (held != packed):
        there = f"{len(raw):,} bytes" if raw is not None else f"{held:,} values"
        raise _Bad(f"declares a tensor of {count:,} values but holds {there} of it")
    if kind == 7 and raw is not None and count <= MAX_RANK:
        numbers = [int.from_bytes(raw[i : i + 8], "little", signed=True) for i in range(0, 8 * count, 8)]
    return name, numbers if kind == 7 and count <= MAX_RANK else None


def _place(data: memoryview) -> Place:
    """Return an input, output or value; dimensions that are not fixed are None."""
    name, dtype, shape = "", "", list[int | None]()
    for number, value in _fields(data):
        if number == 1:
            name = _text(value)
        elif number == 2:
            for kind, inner in _fields(_bytes(value)):
                if kind != 1:
                    continue
                for key, one in _fields(_bytes(inner)):
                    if key == 1:
                        dtype = DTYPES.get(_int(one), "")
                    elif key == 2:
                        shape = [_dim(_bytes(dim)) for tag, dim in _fields(_bytes(one)) if tag == 1]
    _require_size([one for one in shape if one is not None], f"the value {name!r}")
    return Place(name, dtype, tuple(shape))


def _dim(data: memoryview) -> int | None:
    found = None
    for number, value in _fields(data):
        if number == 1:
            found = _int(value)
    return found
