"""Clouds written as text: a point a line."""

import io
import re
from collections.abc import Sequence

import numpy as np

from slimray.data.points.clouds import Table, first_line, named
from slimray.data.samples import BadSample


def read_text(data: bytes, suffix: str, columns: Sequence[str]) -> Table:
    """Numbers in lines, by blanks, commas or semicolons. A first line may count the points or name the columns."""
    text = data.translate(bytes.maketrans(b",;\t", b"   ")).decode("latin-1").lstrip("ï»¿")
    head, _, rest = text.lstrip().partition("\n")
    while head.startswith(("#", "//")) and rest:
        names = head.lstrip("#/ ").split()
        text = rest
        if not columns and _are_names(names):
            columns = names
        head, _, rest = text.lstrip().partition("\n")
    declared = int(head) if re.fullmatch(r"\d+\s*", head) else None
    if declared is not None:
        text = rest
    elif _are_names(head.split()):
        columns, text = columns or head.split(), rest
    try:
        array = np.loadtxt(io.StringIO(text), dtype=np.float64, comments=None, ndmin=2)
    except ValueError as error:
        raise BadSample(f"does not read as text: {first_line(error)}") from None
    if array.size == 0:
        raise BadSample("holds no points")
    if declared is not None and declared != len(array):
        raise BadSample(f"{len(array)} of {declared} declared points are there")
    if not text.endswith(("\n", "\r")) and not _ends_whole(text):
        raise BadSample("the last line has no end and its last number may be cut")
    return named(array, columns, _TEXT_COLUMNS.get(suffix, ()))


_TEXT_COLUMNS = {".xyzn": ("x", "y", "z", "nx", "ny", "nz"), ".xyzrgb": ("x", "y", "z", "r", "g", "b")}


def _are_names(words: Sequence[str]) -> bool:
    return len(words) >= 3 and {"x", "y", "z"} <= {word.strip("\"'").lower() for word in words}


def _ends_whole(text: str) -> bool:
    """Whether the last number is written as long as those above it: then nothing of it can be missing."""
    ends = [line.split()[-1] for line in text[-20_000:].splitlines()[-100:] if line.strip()]
    places = {len(end.rpartition(".")[2]) for end in ends}
    return (len(ends) > 1 and len(places) == 1) or not np.isfinite(float(ends[-1]))
