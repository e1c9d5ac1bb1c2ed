"""Columns of point files: how a user lists them, and the meaning of their names.

A user's list names the columns in order ("x y z - label"); "-" skips one. For files that name their columns themselves,
an entry such as `label=semantic_id` chooses the column. `delimiter=` and `decimal=` define how the numbers of a text
are written, if that is not clear from the text.
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
    """A parsed list of columns: `names` in order, `chosen` (meaning -> column), and how numbers are written.

    `delimiter` and `decimal` are characters; None means they are inferred from the text.
    """

    names: tuple[str, ...] = ()
    chosen: dict[str, str] = field(default_factory=dict)
    delimiter: str | None = None
    decimal: str | None = None


def parse_columns(entries: Sequence[str]) -> Columns:
    """Parse a user's list of columns (`point_columns` of a card, `--columns`); raise ValueError if it is invalid."""
    names, chosen, marks = [], {}, {}
    for entry in entries:
        name, equals, value = entry.strip().strip("\"'").partition("=")
        if not equals:
            names.append(name)
        elif name in ("delimiter", "decimal"):
            known = DELIMITERS if name == "delimiter" else DECIMALS
            if value not in known:
                raise ValueError(f"{entry}: {name} must be one of {', '.join(known)}")
            marks[name] = known[value]
        elif not value:
            raise ValueError(f"{entry}: must name a column, as in {name}=COLUMN")
        elif meaning(name) in chosen:
            raise ValueError(f"{entry}: {name} is chosen twice")
        else:
            chosen[meaning(name)] = plain(value)
    if marks.get("delimiter") == marks.get("decimal") == ",":
        raise ValueError("delimiter=comma and decimal=comma exclude each other")
    means = [meaning(name) for name in names if name != "-"]
    twice = sorted({name for name in means if means.count(name) > 1})
    if twice:
        raise ValueError(f"{twice[0]} is named twice: skip a column with -")
    return Columns(tuple(names), chosen, marks.get("delimiter"), marks.get("decimal"))


def plain(name: str) -> str:
    """Return a column's name in lower case, without quotes and control characters, with underscores for blanks."""
    kept = "".join(c for c in name.strip().strip("\"'").strip() if c.isprintable())
    return "_".join(kept.lower().split()).encode("utf-8", "replace").decode()


def meaning(name: str) -> str:
    """Return the meaning of a column of this name: "label" for `classification` or CloudCompare's `scalar_Label`."""
    short = plain(name)
    short = short.removeprefix("scalar_") or short
    return ALIASES.get(short, short)
