"""A permutation that is computed by position: in go places, out comes what lies there, and no array is held.

A keyed bijection of the numbers below n: a Feistel network over pairs (left, right), each of about sqrt(n) values,
which adds a hash of one half to the other in turn, ROUNDS times (Luby and Rackoff 1988; over numbers that are not
powers of two Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). There are more pairs than numbers:
what falls beyond n is permuted again until it does not (cycle walking). It keeps no secret and is no draw from all
permutations (from n = 9 on only every second one can come out); tests/data/test_permutation.py finds places, neighbours
and the mixture of windows as a random permutation has them. numpy only.
"""

from collections.abc import Sequence

import numpy as np

ROUNDS = 8
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # of SplitMix64 (Steele, Lea, Flood 2014)
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


def permuted(places: np.ndarray, count: int, key: Sequence[int]) -> np.ndarray:
    """Return what lies at `places` (from 0, below `count`) of the permutation of `count` numbers by `key`, int64.

    `key` are numbers that are not negative; 0.1 to 0.3 microseconds a place, for few places 0.3 ms.
    """
    rows = np.uint64(max(1, int(np.ceil(np.sqrt(count)))))
    columns = np.uint64(max(1, -(-count // int(rows))))
    rounds = np.random.SeedSequence(list(key)).generate_state(ROUNDS, np.uint64)
    out = _once(np.asarray(places, np.uint64), rows, columns, rounds)
    while (beyond := np.flatnonzero(out >= count)).size:
        out[beyond] = _once(out[beyond], rows, columns, rounds)
    return out.astype(np.int64)


def _once(values: np.ndarray, rows: np.uint64, columns: np.uint64, rounds: np.ndarray) -> np.ndarray:
    left, right = np.divmod(values, columns)
    for number in range(0, ROUNDS, 2):
        left = (left + _hash(right, rounds[number]) % rows) % rows
        right = (right + _hash(left, rounds[number + 1]) % columns) % columns
    return left * columns + right


def _hash(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """SplitMix64's mixing of `values` under a key; wraps around."""
    x = values + key
    x = (x ^ (x >> _SHIFTS[0])) * _MIX[0]
    x = (x ^ (x >> _SHIFTS[1])) * _MIX[1]
    return x ^ (x >> _SHIFTS[2])
