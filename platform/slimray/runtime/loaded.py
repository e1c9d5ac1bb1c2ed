"""An export as a function: `load(folder)` checks it and returns a `Loaded`, which computes, steps and answers.

Inputs are prepared as in training, by the recipe stored in the folder. A network that was exported as a step (online
TSM) is started and stepped by the caller, who keeps its states; called on clips, it steps through their frames and
averages the logits, as the network did in training.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from slimray.data.modalities import read_recipe
from slimray.runtime.answers import Answer, Arrays
from slimray.runtime.engines import ENGINES, Session, choose
from slimray.runtime.folder import Facts, Step, find_export, read_export, read_graph
from slimray.runtime.inputs import Input, merge_views, to_input
from slimray.runtime.onnx_file import check_onnx
from slimray.runtime.predict import ANSWERS, answers_for
from slimray.runtime.translate import Speaker, TranslateOptions, beam_search, cached_of, translator
from slimray.spec import UserError, parse

MAX_STATE_VALUES = 1 << 26  # in all states of a step together

States = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Loaded:
    """A checked export, ready to compute: a `Model` (see answers.py), and for online networks `start` and `step`."""

    where: str
    facts: Facts
    engine: str
    session: Session
    pixels: Input
    speaker: Speaker | None = None
    """The encoder and the step of a network that answers token by token."""

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The plain recipe of its samples."""
        return self.facts.input["recipe"]

    @property
    def classes(self) -> Sequence[str]:
        """Its classes, in the order of its scores."""
        return self.facts.input["classes"]

    @property
    def task(self) -> str:
        """The name of its task."""
        return self.facts.input["task"]

    @property
    def reach(self) -> int:
        """Largest distance in pixels at which an input still affects an output (assumed for all exports)."""
        return 32

    @property
    def frame_shape(self) -> tuple[int | None, ...]:
        """Shape of its input without the batch, None for any size."""
        return self._input.shape[1:]

    @property
    def online(self) -> bool:
        """True if it is a step from one frame to the next."""
        return bool(self.facts.states)

    @property
    def _input(self) -> Any:
        given = {state.input for state in self.facts.states}
        return next(one for one in self.facts.inputs if one.name not in given)

    def __call__(self, given: np.ndarray | str | Path) -> Any:
        """Return the `Answer` for a file, or the float32 outputs `[n, ...]` of an array of samples with one view each.

        Arrays are as the recipe makes them: uint8 images `[n, H, W, 3]` or clips `[n, T, H, W, 3]`, float32 clouds
        `[n, C, N]`.
        """
        if isinstance(given, str | Path):
            (found,) = self.answers([Path(given)])
            return found
        return self.outputs(given[:, None], max(1, len(given)))

    @property
    def line(self) -> Callable[[str], str] | None:
        """Return the function that translates a line of text; None for networks that do not answer lines."""
        speaker, recipe = self.speaker, read_recipe(self.recipe)
        if speaker is None:
            return None

        def search(source: np.ndarray) -> Sequence[int]:
            (found,) = beam_search(speaker, source, recipe.beam, recipe.length_penalty, recipe.max_length)
            return found[0].tokens if found else ()

        return translator(recipe, search)

    def searching(self, options: Mapping[str, Any], where: str) -> "Loaded":
        """Return a copy with other search `options`; UserError, with `where`, for unknown or inapplicable ones."""
        if not options:
            return self
        if self.speaker is None:
            raise UserError(f"{where}: applies only to networks that search their answers: remove it")
        recipe = {**self.recipe, **parse(TranslateOptions, options, where).model_dump(include=set(options))}
        return replace(self, facts=self.facts.model_copy(update={"input": {**self.facts.input, "recipe": recipe}}))

    def answers(self, paths: Sequence[Path], top: int = 5, **options: Any) -> Iterator[Answer]:
        """Return an iterator over the answers for files; `options` are those of `answers_for`."""
        if self.task not in ANSWERS:
            raise UserError(
                f"{self.where}: exports of task {self.task!r} cannot answer for files (those of {', '.join(ANSWERS)} "
                "can): pass arrays to slimray.runtime.load(...)"
            )
        return answers_for(self, ANSWERS[self.task], paths, top, **options)

    def outputs(self, data: np.ndarray, rows: int) -> Arrays:
        """Return float32 outputs `[n, ...]` of samples `[n, V, ...]`, views averaged, at most `rows` at once."""
        if not len(data):
            raise ValueError("no samples, so there are no outputs")
        if self.speaker is not None:
            raise UserError(f"{self.where}: translates lines of text, call slimray.runtime.load(...).line(text)")
        views, found = to_input(data, self.pixels), list[dict[str, np.ndarray]]()
        size = self._input.shape[0]  # a fixed batch is padded
        at_once = size if size is not None else max(1, rows) * data.shape[1]
        for i in range(0, len(views), at_once):
            part = views[i : i + at_once]
            blank = 0 if size is None else size - len(part)
            padded = np.concatenate([part, np.repeat(part[-1:], blank, 0)]) if blank else part
            outputs = self._whole(padded) if self.online else self._run({self._input.name: padded})
            found.append({name: value[: len(part)] for name, value in outputs.items()})
        joined = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
        if len(joined) == 1:
            return merge_views(next(iter(joined.values())), data.shape[1], self.pixels.average)
        return {name: merge_views(value, data.shape[1], "logits") for name, value in joined.items()}

    def start(self, batch: int = 1) -> States:
        """Return the initial states of a stream, zeros, or of a `batch` of streams if the export allows it."""
        shapes = {state.input: (batch, *state.shape[1:]) for state in self.facts.states}
        return {state.input: np.zeros(shapes[state.input], state.dtype) for state in self.facts.states}

    def step(self, frame: np.ndarray, states: States) -> tuple[np.ndarray, States]:
        """Return float32 logits `[B, C]` of the next frames uint8 `[B, H, W, 3]` and the states after them."""
        outputs = self._run({self._input.name: to_input(frame[:, None], self.pixels), **states})
        return self._stepped(outputs)

    def _stepped(self, outputs: dict[str, np.ndarray]) -> tuple[np.ndarray, States]:
        after = {state.input: outputs.pop(state.output) for state in self.facts.states}
        (logits,) = outputs.values()
        return logits, after

    def _whole(self, clips: np.ndarray) -> dict[str, np.ndarray]:
        """Return the mean logits of prepared clips float32 `[B, T, 3, H, W]`, stepped from zero states."""
        states, total = self.start(len(clips)), []
        for frame in np.moveaxis(clips, 1, 0):
            logits, states = self._stepped(self._run({self._input.name: np.ascontiguousarray(frame), **states}))
            total.append(logits)
        return {"logits": np.stack(total).mean(0, dtype=np.float32)}

    def _run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        for one in self.facts.inputs:
            shape = feeds[one.name].shape
            if len(shape) != len(one.shape) or any(b not in (None, a) for a, b in zip(shape, one.shape)):
                wanted = " x ".join("any" if side is None else str(side) for side in one.shape)
                raise UserError(f"{self.where}: {one.name}: takes {wanted}, got {' x '.join(map(str, shape))}")
        found = self.session(feeds)
        return {one.name: np.asarray(found[one.name], np.float32) for one in self.facts.outputs}


def load(
    path: str | Path, *, storage: str = "runs", format: str | None = None, engine: str | None = None,
    threads: int | None = None,
) -> Loaded:  # fmt: skip
    """Return the export in the folder `path`, or that of a run by its name in `storage` (ONNX first, or of `format`).

    `engine` is a row of ENGINES (default: the first installed), `threads` the number of threads it uses. Raises
    UserError if `path` is not an export, or if the export is damaged, unsafe to open or inconsistent with export.json.
    """
    where = find_export(str(path), storage, format)
    facts, data = read_export(where)
    pixels = check_facts(facts, where)
    name = choose(facts.format, engine)
    session, speaker = _open(where, facts, data, name, threads), None
    if facts.step is not None:
        widths = cached_of(facts, facts.step, where)
        speaker = Speaker(session, _open(where, facts.step, read_graph(where, facts.step), name, threads), widths)
    return Loaded(where, facts, name, session, pixels, speaker)


def _open(where: str, part: Step, data: bytes, engine: str, threads: int | None) -> Session:
    """Return the session of a graph of the export, whose file is checked before the engine opens it."""
    place = f"{where}/{part.file}"
    declared = check_onnx(data, place)
    there = {one.name for one in declared.inputs}, {one.name for one in declared.outputs}
    if there != ({one.name for one in part.inputs}, {one.name for one in part.outputs}):
        raise UserError(f"{place}: its inputs or outputs differ from export.json, export the run again")
    try:
        session = ENGINES[engine].open(data, threads)
    except Exception as error:  # noqa: BLE001  (the exceptions of ONNX Runtime have no other common class)
        raise UserError(f"{place}: {_said(engine, 'cannot load it', error)}") from None

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            return session(feeds)
        except Exception as error:  # noqa: BLE001
            raise UserError(f"{where}: {_said(engine, 'cannot compute it', error)}") from None

    return run


def check_facts(facts: Facts, where: str) -> Input:
    """Return the preparation of pixels; UserError for an export with inconsistent states, recipe or classes."""
    place = f"{where}/export.json"
    try:
        pixels, taken = Input.of(facts.input["pixels"]), facts.input
        read_recipe(taken["recipe"])
        if not (isinstance(taken["classes"], list) and all(isinstance(one, str) for one in taken["classes"])):
            raise ValueError("classes must be a list of names")
        if not isinstance(taken["task"], str):
            raise ValueError("task must be a name")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{place}: input: has no valid recipe for files ({error}), export the run again") from None
    inputs, outputs = {one.name for one in facts.inputs}, {one.name for one in facts.outputs}
    values = 0
    for state in facts.states:
        if state.input not in inputs or state.output not in outputs or min(state.shape, default=0) < 1:
            raise UserError(
                f"{place}: states: {state.input!r} is not an input with a size and an output, export the run again"
            )
        values += int(np.prod(state.shape, dtype=object))
    if values > MAX_STATE_VALUES:
        raise UserError(f"{place}: states: hold {values:,} values, more than {MAX_STATE_VALUES:,}")
    if len(inputs) != 1 + len(facts.states) or (facts.states and len(outputs) != 1 + len(facts.states)):
        raise UserError(f"{place}: inputs: must be one, besides states (got {len(inputs)})")
    return pixels


def _said(name: str, what: str, error: BaseException) -> str:
    words = " ".join(str(error).split())
    return f"{ENGINES[name].title} {what} ({words[:200] or type(error).__name__})"
