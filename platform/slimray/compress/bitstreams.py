"""Bit streams of compressed weights: relative indices with fillers, packed fields, canonical Huffman codes.

Deep Compression (arXiv 1510.00149): a kept weight is stored as its code and the number of zeros before it; a run of
zeros too long for the field is bridged by fillers, entries of code 0. Huffman codes are canonical by (length, symbol),
at most 15 bits long, written MSB first; a table of lengths, 4 bits per symbol, defines a code. numpy only, and no
Python loop over weights: the decoder computes a code for every bit position of a piece at once and then follows the
chain of codes in strides. Invalid data raises ValueError before anything of its size is allocated.
"""

import heapq
from collections.abc import Sequence

import numpy as np

MAX_LENGTH = 15
PIECE = 1 << 17  # bits decoded at a time
STRIDES = 6  # the chain is followed 2**STRIDES codes at a time


# --------------------------------------------------------------------------------------------- relative indices


def to_gaps(positions: np.ndarray, gap_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (gaps, kept) of ascending `positions` int64 `[n]`: uint8 gaps of all entries, and which are not fillers.

    A gap is the number of zeros before a weight, 0 to 2**gap_bits - 1; longer ones are bridged by fillers, each of
    which covers 2**gap_bits positions.
    """
    zeros = np.diff(positions, prepend=-1) - 1
    fillers, last = np.divmod(zeros, 1 << gap_bits)
    places = np.cumsum(fillers + 1) - 1  # indices of the weights among all entries
    total = int(places[-1]) + 1 if len(places) else 0
    gaps = np.full(total, (1 << gap_bits) - 1, np.uint8)
    kept = np.zeros(total, bool)
    gaps[places], kept[places] = last, True
    return gaps, kept


def to_positions(gaps: np.ndarray, size: int) -> np.ndarray:
    """Return the positions int64 of entries with these `gaps`; ValueError if one is beyond `size`."""
    positions = np.cumsum(gaps.astype(np.int64) + 1) - 1
    if len(positions) and positions[-1] >= size:
        raise ValueError(f"its indices lead to position {positions[-1]} of {size}")
    return positions


# ------------------------------------------------------------------------------------------------ packed fields


def packed_bytes(count: int, bits: int) -> int:
    """Return the number of bytes of `count` fields of `bits` bits."""
    return (count * bits + 7) // 8


def pack(values: np.ndarray, bits: int) -> bytes:
    """Return `values` `[n]` as fields of `bits` bits, the first one in the lowest bits of the first byte."""
    if bits == 8:
        return values.astype(np.uint8).tobytes()
    spread = (values.astype(np.uint32)[:, None] >> np.arange(bits, dtype=np.uint32)) & 1
    return np.packbits(spread.astype(np.uint8).reshape(-1), bitorder="little").tobytes()


def unpack(data: bytes, bits: int, count: int) -> np.ndarray:
    """Return the `count` fields of `pack` as uint32; ValueError if the number of bytes does not match."""
    if len(data) != packed_bytes(count, bits):
        raise ValueError(f"{len(data)} bytes for {count} fields of {bits} bits")
    if bits == 8:
        return np.frombuffer(data, np.uint8).astype(np.uint32)
    flat = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits, bitorder="little")
    return flat.reshape(count, bits).astype(np.uint32) @ (1 << np.arange(bits, dtype=np.uint32))


# ------------------------------------------------------------------------------------------------ Huffman codes


def code_lengths(counts: Sequence[int], limit: int = MAX_LENGTH) -> np.ndarray:
    """Return the length of each symbol's code, uint8, 0 for symbols that do not occur, at most `limit`.

    Optimal among codes with this limit. Of equally rare subtrees the one with the smallest symbol is merged first; a
    single symbol has a code of one bit. Raises ValueError for more symbols than there are codes of `limit` bits.
    """
    used = [(int(count), symbol) for symbol, count in enumerate(counts) if count]
    lengths = np.zeros(len(counts), np.uint8)
    if len(used) > 1 << limit:
        raise ValueError(f"{len(used)} symbols do not fit into codes of {limit} bits")
    if len(used) == 1:
        lengths[used[0][1]] = 1
    if len(used) < 2:
        return lengths
    heap: list[tuple[int, int, tuple[int, ...]]] = [(count, symbol, (symbol,)) for count, symbol in used]
    heapq.heapify(heap)
    depth = dict.fromkeys((symbol for _, symbol in used), 0)
    while len(heap) > 1:
        (a, first, some), (b, second, others) = heapq.heappop(heap), heapq.heappop(heap)
        for symbol in some + others:
            depth[symbol] += 1
        heapq.heappush(heap, (a + b, min(first, second), some + others))
    if max(depth.values()) > limit:
        depth = _limited(used, limit)
    for symbol, length in depth.items():
        lengths[symbol] = length
    return lengths


def _limited(used: list[tuple[int, int]], limit: int) -> dict[int, int]:
    """Return the best code lengths within `limit` bits: package-merge (Larmore, Hirschberg, JACM 37(3), 1990)."""
    leaves: list[tuple[int, tuple[int, ...]]] = sorted((count, (symbol,)) for count, symbol in used)
    row = list(leaves)
    for _ in range(limit - 1):
        pairs = [(row[i][0] + row[i + 1][0], row[i][1] + row[i + 1][1]) for i in range(0, len(row) - 1, 2)]
        row = sorted([*leaves, *pairs], key=lambda package: package[0])
    depth = dict.fromkeys((symbol for _, symbol in used), 0)
    for _, symbols in row[: 2 * len(used) - 2]:
        for symbol in symbols:
            depth[symbol] += 1
    return depth


def canonical(lengths: np.ndarray) -> np.ndarray:
    """Return the code of each symbol, uint32, assigned in ascending order of (length, symbol).

    Raises ValueError for lengths that no code can have (Kraft), or that leave codes unused, unless there is only one
    symbol.
    """
    used = np.flatnonzero(lengths)
    codes = np.zeros(len(lengths), np.uint32)
    if not len(used):
        return codes
    if lengths.max() > MAX_LENGTH:
        raise ValueError(f"a code has {lengths.max()} bits, more than {MAX_LENGTH}")
    room = int((1 << (MAX_LENGTH - lengths[used].astype(np.int64))).sum())
    if room != 1 << MAX_LENGTH and not (len(used) == 1 and lengths[used[0]] == 1):
        raise ValueError("its lengths do not form a Huffman code")
    code, before = 0, 0
    for symbol in used[np.argsort(lengths[used], kind="stable")]:
        code <<= int(lengths[symbol]) - before
        codes[symbol], before = code, int(lengths[symbol])
        code += 1
    return codes


def huffman(values: np.ndarray, lengths: np.ndarray) -> bytes:
    """Return the codes of `values` one after the other, MSB first, padded with zero bits to a whole byte."""
    codes = canonical(lengths)
    out: list[np.ndarray] = []
    step = 1 << 20
    for start in range(0, len(values), step):
        part = values[start : start + step]
        size = lengths[part].astype(np.int64)
        ends = np.cumsum(size)
        bits = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
        code, begins = codes[part], ends - size
        for place in range(int(lengths.max(initial=0))):
            some = size > place
            bits[begins[some] + place] = (code[some] >> (size[some] - 1 - place).astype(np.uint32)) & 1
        out.append(bits)
    return np.packbits(np.concatenate(out) if out else np.zeros(0, np.uint8)).tobytes()


def unhuffman(data: bytes, lengths: np.ndarray, count: int) -> np.ndarray:
    """Return the `count` symbols of a stream of `huffman` as uint16.

    Raises ValueError if the stream is longer or shorter than the codes, or holds bits that are not a code. At most one
    entry per bit is allocated, so that the stream bounds `count`.
    """
    total = 8 * len(data)
    if count > total:
        raise ValueError(f"{count} codes in {total} bits")
    symbols, sizes, width = _table(lengths)
    out, found, at = np.empty(count, np.uint16), 0, 0
    raw = np.frombuffer(data, np.uint8)
    while found < count:
        first = at // 8  # of the piece, a whole byte
        piece = raw[first : first + PIECE // 8 + 3]
        starts, at = _chain(piece, at - 8 * first, sizes, width, count - found)
        windows = _windows(piece, width)[starts]
        out[found : found + len(starts)] = symbols[windows]
        found, at = found + len(starts), at + 8 * first
    if (at + 7) // 8 != len(data) or (at > total):
        raise ValueError(f"its codes end at bit {at} of {total}")
    return out


def _table(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Return, for every window of `width` bits, the symbol at its start and the length of its code, 0 if none."""
    codes, width = canonical(lengths), max(1, int(lengths.max(initial=1)))
    symbols, sizes = np.zeros(1 << width, np.uint16), np.zeros(1 << width, np.uint8)
    for symbol in np.flatnonzero(lengths):
        spare = width - int(lengths[symbol])
        low = int(codes[symbol]) << spare
        symbols[low : low + (1 << spare)], sizes[low : low + (1 << spare)] = symbol, lengths[symbol]
    return symbols, sizes, width


def _windows(piece: np.ndarray, width: int) -> np.ndarray:
    """Return the `width` bits that start at each bit of a piece, uint16; bits beyond its end are 0."""
    whole = np.concatenate([piece, np.zeros(2, np.uint8)]).astype(np.uint32)
    three = (whole[:-2] << 16) | (whole[1:-1] << 8) | whole[2:]
    out, mask = np.empty((len(piece), 8), np.uint16), (1 << width) - 1
    for offset in range(8):
        out[:, offset] = (three >> (24 - width - offset)) & mask
    return out.reshape(-1)


def _chain(piece: np.ndarray, at: int, sizes: np.ndarray, width: int, most: int) -> tuple[np.ndarray, int]:
    """Return the bits at which codes start, from bit `at` on, at most `most` within PIECE bits, and where they end.

    A jump table holds, for every bit, the end of the code that would start there; squared STRIDES times it jumps over
    64 codes. So the chain is followed 64 codes at a time, and the smaller tables fill in the codes between, all at
    once.
    """
    length = sizes[_windows(piece, width)]
    end = min(PIECE, 8 * len(piece))  # a code that starts before this bit ends within the piece, or beyond the stream
    after = 8 * len(piece) + MAX_LENGTH
    jumps = [np.full(after + 1, after, np.int64)]
    one = np.arange(end) + length[:end]
    one[length[:end] == 0] = after  # no code starts here, so a chain that arrives here is invalid
    jumps[0][:end] = one
    jumps[0][end:after] = np.arange(end, after)  # stay here, where the next piece continues
    for _ in range(STRIDES):
        jumps.append(jumps[-1][jumps[-1]])
    strides, place, leap = [at], at, jumps[-1]
    need = (most >> STRIDES) + 1
    while place < end and len(strides) < need:
        place = int(leap[place])
        strides.append(place)
    starts = np.array(strides, np.int64)
    for jump in reversed(jumps[:-1]):
        starts = np.stack([starts, jump[starts]], 1).reshape(-1)
    starts = starts[starts < end][:most]
    if not len(starts):
        raise ValueError("its codes are truncated")
    last = int(jumps[0][starts[-1]])
    if last >= after:
        raise ValueError("it holds bits that are not a code")
    return starts, last
