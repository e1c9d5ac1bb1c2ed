"""Things of a dataset that have labels: the rows of LABELS say what follows for its lists and its files.

A card names a row (`labels`). Nothing else asks for the name of one, as nothing asks for the name of a task.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Labelling:
    """A row of LABELS."""

    per_sample: bool = False
    """The label of a list is the class of its sample, one of the card's; a folder may name it."""
    per_point: bool = False
    """Files hold a label for each point; the label of a list is the shape of the cloud."""


LABELS: dict[str, Labelling] = {
    "sample": Labelling(per_sample=True),
    "point": Labelling(per_point=True),
    "none": Labelling(),
}
