"""Arrays of unequal length along their last axis: padded to the longest, and trimmed again. numpy only."""

from collections.abc import Sequence

import numpy as np


def joined(arrays: Sequence[np.ndarray], pad: float) -> np.ndarray:
    """Return `[n, ..., L]` arrays concatenated, with shorter last axes filled up with `pad`."""
    if len({array.shape[1:] for array in arrays}) == 1:
        return np.concatenate(arrays)
    longest = max(array.shape[-1] for array in arrays)
    whole = np.full((sum(map(len, arrays)), *arrays[0].shape[1:-1], longest), pad, arrays[0].dtype)
    start = 0
    for array in arrays:
        whole[start : start + len(array), ..., : array.shape[-1]] = array
        start += len(array)
    return whole


def tight(data: np.ndarray, labels: np.ndarray, pads: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Return samples `[n, ..., L]` and labels `[n, ..., M]` without trailing places that are padding in all of them.

    The same number is removed from both, so that L - M, which must be 0 or more, stays the same.
    """
    more, used = data.shape[-1] - labels.shape[-1], 1
    for array, pad, beyond in ((data, pads[0], more), (labels, pads[1], 0)):
        there = (array != pad).reshape(-1, array.shape[-1]).any(0)
        used = max(used, int(np.flatnonzero(there)[-1]) + 1 - beyond if there.any() else 1)
    return data[..., : used + more], labels[..., :used]
