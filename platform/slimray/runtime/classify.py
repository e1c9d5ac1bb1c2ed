"""Classification of a user's file: returns its likeliest classes."""

from pathlib import Path

from slimray.data.modalities import modality_of, read_recipe
from slimray.data.own_files import Readers
from slimray.runtime.answers import Answer, Answerer, AnswerOptions, Answers, Model, only_array, top_classes


def answer(model: Model, options: AnswerOptions) -> Answerer:
    """Return a function of a file to its classes, from one view, prepared as in validation."""
    kind = modality_of(model.recipe)
    assert kind.open_file is not None
    read = kind.open_file(read_recipe({**model.recipe, "mode": "val"}), options.file)

    def one(path: Path, readers: Readers) -> Answer:
        views, notes = read(str(path), path.read_bytes(), readers)
        scores = only_array(model.outputs(views[None], 1))
        return Answer(path, top_classes(scores[0], model.classes, options.top), notes=notes)

    return one


CLASSIFY = Answers("classify", answer)
