"""`predict`: a network answers for files, one after the other, in the way of its task.

A file is a sample, as in a dataset: a network that was trained on blocks of rooms needs blocks. `ANSWERS` are the tasks
whose exports answer without torch.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from slimray.data.modalities import modality_of
from slimray.data.own_files import FileOptions, Readers
from slimray.data.points.reader import CloudReader
from slimray.data.samples import BadSample
from slimray.data.video.decoder import Decoder
from slimray.runtime.answers import Answer, AnswerOptions, Answers
from slimray.runtime.classify import CLASSIFY
from slimray.runtime.segment import PARTS, SEGMENT
from slimray.runtime.super_resolve import SUPER_RESOLVE
from slimray.spec import UserError

ANSWERS: dict[str, Answers] = {one.name: one for one in (CLASSIFY, SEGMENT, PARTS, SUPER_RESOLVE)}


def answers_for(
    model: Any,
    task: Any,
    paths: Sequence[Path],
    k: int,
    *,
    columns: Sequence[str] = (),
    shape: int | None = None,
    out: Path | None = None,
    rows: int = 8,
    timeout_s: float = 30,
) -> Iterator[Answer]:
    """Return an iterator over the answers for files, with at most `k` classes: from one view, prepared as in
    validation, or from all points.

    `model` is a `Model`; `task` has `answer` and `writes`, like `Answers`. For clouds: `columns` as in `read_cloud`,
    `shape` the class whose one-hot the network takes. `out` is the folder for written files (default: beside each
    file). The network sees at most `rows` views at once. Raises UserError, before anything is read, for an option that
    does not apply to the network, and for output that would overwrite a file.
    """
    modality = modality_of(model.recipe)
    if modality.open_file is None:
        raise UserError(f"this network takes {modality.plural}, which are not files: score it with an evaluate job")
    options = AnswerOptions(paths, k, FileOptions(tuple(columns), shape), out, rows)
    if out is not None and not task.writes:
        raise UserError("--out: this network labels whole files, so there is nothing to write: remove it")
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is not a folder")
    answer = task.answer(model, options)

    def answers() -> Iterator[Answer]:
        with Decoder(timeout_s=timeout_s) as decoder, CloudReader(timeout_s=timeout_s) as clouds:
            readers = Readers(decoder, clouds)
            for path in paths:
                try:
                    found = answer(path, readers)
                except (BadSample, OSError) as error:
                    found = Answer(path, reason=str(error))
                yield found

    return answers()
