"""Labels of a dataset: the rows of LABELS define what has labels, with the consequences for lists and files.

A card names a row (`labels`). No other code branches on the name of a row, as none does on the name of a task.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Labelling:
    """A row of LABELS."""

    per_sample: bool = False
    """The label in a list is the class of its sample, one of the card's; a folder may name it."""
    per_point: bool = False
    """Files hold a label for each point; the label in a list is the shape of the cloud."""


LABELS: dict[str, Labelling] = {
    "sample": Labelling(per_sample=True),
    "point": Labelling(per_point=True),
    "none": Labelling(),
}
