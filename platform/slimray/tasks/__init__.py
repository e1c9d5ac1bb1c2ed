"""Tasks: what networks predict and how predictions are scored. `TASKS` is the table; a new task is a file and a row.

A card names its task (`task:`); `task_of_card` infers the task of older cards without it.
"""

from collections.abc import Mapping
from typing import Any

from slimray.spec import UserError, lookup, parse
from slimray.tasks.classify import CLASSIFY
from slimray.tasks.frustum_boxes import FRUSTUM_BOXES
from slimray.tasks.language import LANGUAGE
from slimray.tasks.parts import PARTS
from slimray.tasks.segment import SEGMENT
from slimray.tasks.super_resolve import SUPER_RESOLVE
from slimray.tasks.task import Task, task_before
from slimray.tasks.translate import TRANSLATE

TASKS: dict[str, Task] = {
    task.name: task for task in (CLASSIFY, SEGMENT, PARTS, FRUSTUM_BOXES, SUPER_RESOLVE, TRANSLATE, LANGUAGE)
}


def task_of_card(card: Any) -> Task:
    """Return the task of a dataset card; UserError for an unknown one."""
    return lookup(TASKS, card.task or task_before(card.sample, card.labelling.per_point, bool(card.parts)), "task")


def task_options(card: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a card's task with their defaults; UserError `data.task.scale: ...` for an invalid one."""
    try:
        return parse(task_of_card(card).spec, dict(given), "data.task").model_dump()
    except UserError as error:
        raise UserError(str(error).replace("data.task: ", "data.task.")) from None


def with_target(task: Task, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a plain recipe with its target in `task`."""
    plain = {key: value for key, value in recipe.items() if key != "target"}
    return {**plain, "target": task.target(plain).to_plain()}
