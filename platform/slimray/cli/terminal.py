"""Shared by all commands: options, the two consoles, JSON for programs."""

import json
import os
import re
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from slimray.spec import shown

LOG_CONTROL = re.compile(
    r"\x1b\[(?![0-9;]*m)[0-?]*[ -/]*[@-~]"  # every CSI sequence except colours
    r"|\x1b[\]PX^_].*?(?:\x07|\x1b\\|$)"  # titles, links, device control
    r"|\x1b(?!\[)|[\x00-\x08\x0b\x0c\x0e-\x1a\x7f-\x9f]",
    re.DOTALL,
)
WIDTH = 160  # columns of output to a file or a pipe
PLAIN: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}  # never interpret what names contain


class Terminal(Console):
    """A console that prints control characters visibly instead of sending them to the terminal."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(shown(text), **options)


console = Terminal(stderr=True, width=None if sys.stderr.isatty() else WIDTH, **PLAIN)
out = Terminal(width=None if sys.stdout.isatty() else WIDTH, **PLAIN)
Files = Annotated[
    list[str], typer.Argument(help="Job files; several documents in one file run in order.", metavar="FILE...")
]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="Override a field: section.field=value, or NAME:section.field=value.")
]
Storage = Annotated[
    str | None, typer.Option(help="Where runs are: a folder, s3:// or gs://. Default: $SLIMRAY_STORAGE or ./runs.")
]
Restart = Annotated[bool, typer.Option("--restart", help="Clear an unfinished or finished run of the same name first.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def storage_of(given: str | None) -> str:
    return given or os.environ.get("SLIMRAY_STORAGE") or "runs"


def emit(value: Any) -> None:
    """Print a value as JSON; numbers that JSON lacks (NaN, infinity) become null."""
    plain = json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)
    sys.stdout.write(json.dumps(plain, indent=2, allow_nan=False) + "\n")


def clean_log(text: str) -> str:
    """Return the log of a job without terminal control sequences; colours are kept."""
    return LOG_CONTROL.sub("", text)


def say(text: str) -> None:
    """Print a line without wrapping it."""
    out.print(text, soft_wrap=True)
