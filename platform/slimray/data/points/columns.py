"""Columns of point files: how a user lists them, and what the names of columns mean.

A user's list names the columns in order ("x y z - label"); "-" leaves one out. In files that name their columns
themselves an entry `label=semantic_id` chooses which column is meant. `delimiter=` and `decimal=` say how the numbers
of a text are written, where that cannot be told from the text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

GROUPS = {"coords": ("x", "y", "z"), "normals": ("nx", "ny", "nz"), "colors": ("r", "g", "b")}
ALIASES = {
    "normal_x": "nx", "normal_y": "ny", "normal_z": "nz", "normal": "normals",
    "red": "r", "green": "g", "blue": "b", "rf": "r", "gf": "g", "bf": "b",
    "diffuse_red": "r", "diffuse_green": "g", "diffuse_blue": "b", "color": "colors", "rgb": "colors",
    "labels": "label", "class": "label", "classification": "label",
    "points": "coords", "xyz": "coords", "pos": "coords", "positions": "coords",
    "points:0": "x", "points:1": "y", "points:2": "z",
    "reflectance": "intensity",
}  # fmt: skip
DELIMITERS = {"blank": " ", "comma": ",", "semicolon": ";", "tab": "\t"}
DECIMALS = {"point": ".", "comma": ","}


@dataclass(frozen=True)
class Columns:
    """A user's list of columns, read: `names` in order, `chosen` meaning -> column, and how numbers are written.

    `delimiter` and `decimal` are characters, None where the text is to tell.
    """

    names: tuple[str, ...] = ()
    chosen: dict[str, str] = field(default_factory=dict)
    delimiter: str | None = None
    decimal: str | None = None


def parse_columns(entries: Sequence[str]) -> Columns:
    """Read a user's list of columns (`point_columns` of a card, `--columns`). Raises ValueError with what is wrong."""
    names, chosen, marks = [], {}, {}
    for entry in entries:
        name, equals, value = entry.strip().strip("\"'").partition("=")
        if not equals:
            names.append(name)
        elif name in ("delimiter", "decimal"):
            known = DELIMITERS if name == "delimiter" else DECIMALS
            if value not in known:
                raise ValueError(f"{entry}: {name} is one of {', '.join(known)}")
            marks[name] = known[value]
        elif not value:
            raise ValueError(f"{entry}: which column?")
        elif meaning(name) in chosen:
            raise ValueError(f"{entry}: {name} is chosen twice")
        else:
            chosen[meaning(name)] = plain(value)
    if marks.get("delimiter") == marks.get("decimal") == ",":
        raise ValueError("delimiter=comma and decimal=comma exclude each other")
    means = [meaning(name) for name in names if name != "-"]
    twice = sorted({name for name in means if means.count(name) > 1})
    if twice:
        raise ValueError(f"{twice[0]} is named twice: leave a column out by -")
    return Columns(tuple(names), chosen, marks.get("delimiter"), marks.get("decimal"))


def plain(name: str) -> str:
    """A column's name in lower case, without quotes and control characters, blanks as underscores."""
    kept = "".join(c for c in name.strip().strip("\"'").strip() if c.isprintable())
    return "_".join(kept.lower().split()).encode("utf-8", "replace").decode()


def meaning(name: str) -> str:
    """Return what a column of this name holds: `classification` is a "label", CloudCompare's `scalar_Label` too."""
    short = plain(name)
    short = short.removeprefix("scalar_") or short
    return ALIASES.get(short, short)
