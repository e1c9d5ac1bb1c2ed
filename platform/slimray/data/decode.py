"""Decodes the samples of a block: rows of an index in, arrays out. Runs in the decoding tasks; no Ray.

A sample that does not decode keeps its place, with the reason; in training the same process does not try it again,
since its weight stays 0 and failing may take long. A missing file ends the run.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from slimray.data.modalities import empty_sample, modality_of, pads_of, read_recipe, target_of
from slimray.data.plan import Phase
from slimray.data.ragged import joined
from slimray.data.rows import PLACE
from slimray.data.samples import BadSample
from slimray.spec import RunFailed

_BAD: dict[tuple[str, int], str] = {}  # found by this process: (index, sample) -> why it does not decode


@dataclass(frozen=True)
class DecodeConfig:
    """Settings that the decoding tasks of one execution share; times are seconds.

    Each task unpickles them. So they hold the phases of these blocks only, by number, and for every split its root and
    the name of its index, not a reference, whose borrowers Ray would track task by task.
    """

    phases: dict[int, Phase]
    splits: dict[str, tuple[str, str]]
    seed: int
    timeout_s: float


def decode_block(rows: pa.Table, config: DecodeConfig) -> dict[str, np.ndarray]:
    """Decode one block: `rows` of the index with the columns PLACE, all of one phase; see `decoded`."""
    phase = config.phases[rows.column("phase")[0].as_py()]
    return decoded(rows, phase, *config.splits[phase.split], config.seed, config.timeout_s)


def decoded(rows: pa.Table, phase: Phase, root: str, index: str, seed: int, timeout_s: float) -> dict[str, np.ndarray]:
    """Return the columns of a decoded block of `phase`; `rows` have the columns of the index and PLACE.

    `root` is the folder of the files, `index` identifies the index; a file may take `timeout_s` seconds. Raises
    RunFailed if a file is missing.
    """
    _, positions, samples = (rows.column(name).to_numpy() for name in PLACE)
    modality, recipe = modality_of(phase.recipe), read_recipe(phase.recipe)
    fixed = modality.pad is None  # otherwise samples differ in length, and the block is as long as its longest
    data = np.zeros((len(samples), *modality.shape(recipe)) if fixed else 0, modality.dtype)
    labels = target_of(phase.recipe).empty(len(samples) if fixed else 0)
    own: list[tuple[np.ndarray, np.ndarray]] = []
    paths, reasons = [], []
    for i, (sample, row) in enumerate(zip(samples, rows.drop_columns(list(PLACE)).to_pylist(), strict=True)):
        reason, key = "", (seed, phase.epoch, int(sample))
        known = (index, int(sample))
        try:
            if phase.split == "train" and known in _BAD:
                raise BadSample(_BAD[known])
            array, label = modality.load(row, root, recipe, key, timeout_s)
            if fixed:
                data[i], labels[i] = array, label
            else:
                own.append((array, label))
        except BadSample as bad:
            reason = str(bad) or "does not decode"
            _BAD[known] = reason
            own += [] if fixed else [empty_sample(phase.recipe)]
        except FileNotFoundError as error:  # Ray would treat an OSError as temporary
            raise RunFailed(
                f"a file of the index is missing ({error}): fix the list, or run `prepare` again"
            ) from error
        paths.append(row["path"])
        reasons.append(reason)
    if not fixed:
        pads = pads_of(phase.recipe)
        data, labels = (joined([values[None] for values in column], pad) for column, pad in zip(zip(*own), pads))
    return {
        "position": positions,
        "sample": samples,
        "label": labels,
        "valid": np.array([not reason for reason in reasons], np.uint8),
        "path": np.array(paths, object),
        "reason": np.array(reasons, object),
        "data": data,
    }
