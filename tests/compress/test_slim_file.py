"""The compressed file: bit-exact, equal to the recorded cases, and hostile files are refused by their header."""

import hashlib
import json
import random
import struct
import zlib

import numpy as np
import pytest
import torch

from slimray.compress import bitstreams, slim_file
from slimray.spec import UserError

CASES = ("fc_gap_overflow", "gap_exactly_15_and_15_again", "gap_exactly_16", "six_fillers_then_one", "conv_8bit",
         "fc_5bit_skewed", "one_symbol")  # fmt: skip


def mixed(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return tensors of all codings and types."""
    torch.manual_seed(seed)
    sparse = torch.where(torch.rand(90, 100) < 0.1, torch.randn(90, 100), 0.0)
    book = torch.randn(15)
    shared = torch.where(torch.rand(90, 100) < 0.05, book[torch.randint(15, (90, 100))], 0.0)
    return {
        "shared": shared,
        "sparse": sparse,
        "codes": book[torch.randint(15, (16, 8, 3, 3))],
        "dense": torch.randn(9, 9),
        "far": torch.cat([torch.zeros(3000), torch.ones(1), torch.zeros(2000)]),
        "minus": torch.tensor([0.0, -0.0, float("nan"), float("inf")] * 32),
        "half": (torch.randn(100) * (torch.rand(100) < 0.2)).half(),
        "bf16": torch.randn(70).bfloat16(),
        "whole": torch.randint(-3, 3, (200,), dtype=torch.int8),
        "steps": torch.tensor(7),
        "none": torch.zeros(0, 4),
        "zeros": torch.zeros(128),
        "mask": torch.rand(128) < 0.5,
    }


def bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def case(shared, name: str) -> dict:
    cases = json.loads((shared / "parity/compression/deep_compression.json").read_text())["cases"]
    return next(one for one in cases if one["name"] == name)


# ------------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("name", CASES)
def test_streams_are_those_of_the_recorded_cases(shared, name):
    one = case(shared, name)
    codes = np.array(one["codes"])
    gaps, kept = bitstreams.to_gaps(np.flatnonzero(codes), one["gap_bits"])
    symbols = np.zeros(len(gaps), np.uint16)
    symbols[kept] = codes[codes != 0]
    assert (gaps.tolist(), symbols.tolist()) == (one["gaps"], one["symbols"])
    assert int((~kept).sum()) == one["fillers"]
    for values, bits_of, what in ((symbols, one["code_bits"], "symbols"), (gaps, one["gap_bits"], "gaps")):
        packed = bitstreams.pack(values, bits_of)
        assert packed.hex() == one[f"packed_{what}_hex"]
        assert bitstreams.unpack(packed, bits_of, len(values)).tolist() == values.tolist()
        lengths = bitstreams.code_lengths(np.bincount(values, minlength=1 << bits_of).tolist())
        known = one[f"{what[:-1]}_code_lengths"]
        assert {str(s): int(n) for s, n in enumerate(lengths) if n} == known
        coded = bitstreams.canonical(lengths)
        assert {s: f"{coded[int(s)]:0{n}b}" for s, n in known.items()} == one[f"{what[:-1]}_codes"]
        stream = bitstreams.huffman(values.astype(np.uint16), lengths)
        assert stream.hex() == one[f"huffman_{what}_hex"]
        assert lengths[values].astype(np.int64).sum() == one[f"huffman_{what}_bits"]
        assert bitstreams.unhuffman(stream, lengths, len(values)).tolist() == values.tolist()
    book = np.frombuffer(bytes.fromhex(one["codebook_hex"]), np.float32)
    decoded = np.zeros(len(codes), np.float32)
    decoded[bitstreams.to_positions(gaps, len(codes))] = book[symbols]
    assert hashlib.sha256(decoded.tobytes()).hexdigest() == one["decoded_sha256_f32_le"]
    assert np.array_equal(decoded, book[codes])


@pytest.mark.parametrize("count", [1, 2, 7, 300, 5000, 300_000])
@pytest.mark.parametrize("skew", [0.02, 0.6])
def test_what_is_coded_comes_back_over_the_borders_of_pieces(count, skew):
    rng = np.random.default_rng(count)
    values = np.minimum(rng.geometric(skew, count) - 1, 255).astype(np.uint16)
    lengths = bitstreams.code_lengths(np.bincount(values, minlength=256).tolist())
    stream = bitstreams.huffman(values, lengths)
    assert np.array_equal(bitstreams.unhuffman(stream, lengths, count), values)


def test_codes_are_optimal_and_never_longer_than_15_bits():
    counts = [1, 1]
    while len(counts) < 30:
        counts.append(counts[-1] + counts[-2])  # Fibonacci: the unlimited code is 29 bits long
    lengths = bitstreams.code_lengths(counts)
    assert lengths.max() == 15
    assert sum(2.0 ** -int(n) for n in lengths) == 1
    free = bitstreams.code_lengths(counts, 32)
    assert sum(c * int(n) for c, n in zip(counts, lengths)) < 1.001 * sum(c * int(n) for c, n in zip(counts, free))
    few = [5, 9, 12, 13, 16, 45]
    assert sum(c * int(n) for c, n in zip(few, bitstreams.code_lengths(few))) == 224
    assert bitstreams.code_lengths(few, 3).max() == 3


@pytest.mark.parametrize("lengths", [[1, 1, 1], [2, 2], [1, 0, 2], [16, 1]])
def test_lengths_of_no_code_are_refused(lengths):
    with pytest.raises(ValueError, match=r"Huffman code|bits, more than"):
        bitstreams.canonical(np.array(lengths, np.uint8))


def test_streams_that_do_not_fit_are_refused():
    lengths = bitstreams.code_lengths([4, 3, 2, 1])
    stream = bitstreams.huffman(np.array([0, 1, 2, 3] * 9, np.uint16), lengths)
    for data, count in ((stream, 10**9), (stream, 35 - 8), (stream[:-1], 36), (stream + b"\0", 36), (b"", 1)):
        with pytest.raises(ValueError):
            bitstreams.unhuffman(data, lengths, count)
    lone = bitstreams.code_lengths([0, 9])
    with pytest.raises(ValueError, match="not a code"):
        bitstreams.unhuffman(b"\x40", lone, 8)
    with pytest.raises(ValueError, match="position 16 of 16"):
        bitstreams.to_positions(np.array([15, 0], np.uint8), 16)


# ---------------------------------------------------------------------------------------------------------- files


def test_every_tensor_comes_back_bit_for_bit():
    tensors = mixed()
    data = slim_file.encode(tensors, {"name": "net"}, {"classes": ["a"]})
    found = slim_file.decode(data, "x.slim", {name: tensor.shape for name, tensor in tensors.items()})
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(found[name]) == bits(tensor), name
    header = slim_file.read_header(data, "x.slim")
    assert (header.model, header.input) == ({"name": "net"}, {"classes": ["a"]})
    codings = {plain["name"]: plain["coding"] for plain in header.tensors}
    assert {name: codings[name] for name in ("shared", "sparse", "codes", "dense")} == {
        "shared": "shared", "sparse": "sparse", "codes": "codes", "dense": "dense",
    }  # fmt: skip
    assert sum(slim_file.parts_of(header, len(data)).values()) == len(data)
    assert slim_file.encode(tensors, {"name": "net"}, {"classes": ["a"]}) == data


def test_a_file_never_grows_by_more_than_its_header():
    tensors = {"random": torch.randn(1000), "small": torch.randn(3)}
    data = slim_file.encode(tensors)
    assert len(data) - slim_file.read_header(data, "x").start == 4 * 1003


def packed(header: bytes, streams: bytes = b"", version: int = 1) -> bytes:
    found = zlib.compress(header)
    return struct.pack("<4sHI", b"SLIM", version, len(found)) + found + streams


def declared(**changed) -> bytes:
    plain = {"name": "w", "shape": [100], "dtype": "float32", "sha256": "0", "coding": "dense", "bytes": [400]}
    header = {"model": {}, "input": {}, "tensors": [plain | changed]}
    return packed(
        json.dumps(header).encode(),
        bytes(sum(n for n in (plain | changed)["bytes"] if isinstance(n, int) and 0 < n < 9999)),
    )


HOSTILE = {
    "empty": b"",
    "magic": b"PK\3\4" + bytes(100),
    "version": packed(b"{}", version=9),
    "no tensors": packed(b"{}"),
    "a list": packed(b"[]"),
    "no JSON": packed(b"{"),
    "deep": packed(b"[" * 100_000),
    "bomb": packed(b" " * (65 << 20)),
    "header beyond the end": struct.pack("<4sHI", b"SLIM", 1, 1 << 31) + b"x",
    "huge": declared(shape=[1 << 40]),
    "huge and coded": declared(shape=[1 << 30], coding="shared", codes=2, gap_bits=2, entries=8, bytes=[4, 1, 1, 2, 1]),
    "negative": declared(shape=[-100]),
    "no number": declared(shape=["100"]),
    "true": declared(shape=[True], bytes=[4]),
    "overflow": declared(shape=[1 << 31, 1 << 31]),
    "too long": declared(bytes=[401]),
    "unknown type": declared(dtype="complex64"),
    "unknown coding": declared(coding="pickle"),
    "streams missing": declared(coding="shared", codes=3, gap_bits=4, entries=9, bytes=[8]),
    "too many entries": declared(coding="shared", codes=3, gap_bits=4, entries=101, bytes=[8, 2, 40, 8, 40]),
    "too many codes": declared(coding="codes", codes=999, bytes=[4 * 999, 500, 40]),
    "codes in too few bits": declared(coding="codes", codes=3, bytes=[12, 2, 12]),
    "no index bits": declared(coding="sparse", gap_bits=0, entries=9, bytes=[0, 2, 36]),
    "trailing": declared() + b"x",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused_before_anything_is_allocated(name, monkeypatch):
    monkeypatch.setattr(slim_file, "_decode_tensor", None)  # decoding must not be reached
    with pytest.raises(UserError, match=r"x\.slim: is not a readable model\.slim"):
        slim_file.decode(HOSTILE[name], "x.slim")


def test_other_tensors_than_those_of_the_network_are_refused():
    data = slim_file.encode({"a": torch.zeros(4)})
    for shapes in ({"a": (5,)}, {"b": (4,)}, {}, {"a": (4,), "b": (1,)}):
        with pytest.raises(UserError, match="not those of its network"):
            slim_file.decode(data, "x.slim", shapes)


def test_damaged_bytes_are_noticed_wherever_they_are():
    tensors = {name: mixed()[name] for name in ("shared", "sparse", "codes", "dense")}
    data, rng, noticed = slim_file.encode(tensors, {"name": "net"}), random.Random(0), 0
    for _ in range(400):
        broken = bytearray(data)
        kind = rng.randrange(4)
        if kind == 0:
            broken[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del broken[rng.randrange(len(data)) :]
        elif kind == 2:
            at = rng.randrange(len(data))
            broken[at : at + 8] = rng.randbytes(8)
        else:
            broken.insert(rng.randrange(len(data)), rng.randrange(256))
        try:
            found = slim_file.decode(bytes(broken), "x.slim")
        except UserError:
            noticed += 1
            continue
        assert bytes(broken) == data or all(bits(found[name]) == bits(tensors[name]) for name in tensors)
    assert noticed > 380


def test_streams_with_random_headers_end_in_a_sentence():
    data, rng = slim_file.encode(mixed()), random.Random(1)
    head = slim_file.read_header(data, "x")
    for _ in range(300):
        plain = json.loads(json.dumps(head.tensors))
        one = rng.choice(plain)
        key = rng.choice(list(one))
        if isinstance(one[key], int):
            one[key] = rng.choice([0, 1, one[key] + 1, one[key] * 2, 255, 1 << 40])
        elif isinstance(one[key], list) and one[key]:
            one[key][rng.randrange(len(one[key]))] = rng.choice([0, 1, 3, 5000, 1 << 50, -1])
        elif key in ("coding", "dtype"):
            one[key] = rng.choice([*slim_file.CODINGS, *slim_file.DTYPES])
        header = json.dumps({"model": {}, "input": {}, "tensors": plain}).encode()
        try:
            slim_file.decode(packed(header, data[head.start :]), "x.slim")
        except UserError:
            continue
        assert plain == list(head.tensors) or key in ("name", "dtype", "shape")
