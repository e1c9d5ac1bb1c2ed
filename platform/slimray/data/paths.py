"""Patterns in the paths of cards and lists: columns, numbered pictures, all files of a folder, classes."""

import posixpath
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from slimray.spec import UserError

COLUMN = re.compile(r"\{([A-Za-z_]\w*)(?::0(\d\d?)d)?\}")
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
NUMBERED = re.compile(r"\{(\d{1,9})\.\.(\d{0,9})\}(?=[^/]*$)")
ALL_FILES = "{*}"  # in the last component of a path
LABELS_OF = ("name", "folder", "stem")  # placeholders for a cloud's path in `point_labels` of a card
GZIP = b"\x1f\x8b"  # the first bytes of a gzip file
GZIP_ENDING = ".gz"
CLASS = "{class}"  # a component of a pattern of layout `files`


def inside(path: str, where: str) -> str:
    """Return `path` normalized; raise UserError if it could lead out of the root."""
    if not path or path.startswith("/") or "://" in path or ".." in path.split("/") or CONTROL.search(path):
        raise UserError(f"{where}: {path!r} must be a path relative to the root, without '..'")
    return posixpath.normpath(path)


def without_gzip(name: str) -> str:
    """Return the name of a file without the gzip extension."""
    return name.removesuffix(GZIP_ENDING)


def is_plain(part: str) -> bool:
    return part != CLASS and not any(sign in part for sign in "*?[")


def matching(names: Sequence[str], part: str) -> list[str]:
    form = "*" if part == CLASS else part
    return [name for name in names if not name.startswith(".") and fnmatchcase(name, form)]
