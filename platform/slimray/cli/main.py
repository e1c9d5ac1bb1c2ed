"""The `slimray` command: check, run, show, predict. Exit codes: 0 done, 2 your mistake, 1 failed, 3 no retries left.

Everything that needs Ray or torch is imported inside the verbs, so that `--help` is quick and `predict` works on a
machine without Ray. With `--json`, standard output holds JSON for programs and nothing else.
"""

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from slimray import __version__
from slimray.cli import cluster, device, explain, jobs, look, use
from slimray.cli.terminal import console, say
from slimray.spec import RunFailed, UserError

OF_TRAINING = {
    "decord",
    "jinja2",
    "jsonschema",
    "markupsafe",
    "matplotlib",
    "open3d",
    "optuna",
    "ray",
    "safetensors",
    "tensorboardX",
    "torch",
    "wandb",
}  # fmt: skip  (what the extra `train` brings)
app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None, help=(__doc__ or "").split("\n")[0]
)
for group in (jobs, look, use, device, explain, cluster):
    app.add_typer(group.app)


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        say(f"slimray {__version__}")
        raise typer.Exit


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Folder to fill; must not already hold files with these names.")],
) -> None:
    """Copy example jobs, dataset cards, cluster files and their schemas into FOLDER to start from."""
    from slimray.verbs import inputs

    pairs = [
        (file, folder / part / file.name)
        for part in ("jobs", "datasets")
        for pattern in ("*.yaml", "*.json")
        for file in sorted(inputs.packaged(part).glob(pattern))
    ]
    clusters = inputs.packaged("cluster")
    pairs += [(f, folder / "cluster" / f.relative_to(clusters)) for f in sorted(clusters.rglob("*")) if f.is_file()]
    if not pairs:
        raise UserError("init: this installation of slimray has no examples, install it again")
    for _, target in pairs:
        if os.path.lexists(target):  # a dangling link counts too: writing would follow it
            raise UserError(f"{target}: already exists, choose an empty folder")
    for file, target in pairs:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    go = "" if folder.resolve() == Path.cwd() else f"cd {shlex.quote(str(folder))} && "
    say(f"next: {go}slimray check jobs/quickstart.yaml && slimray run jobs/quickstart.yaml")


def main() -> None:
    """Run the command line; errors that a user can act on end in one sentence and an exit code."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        app(standalone_mode=False)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        _fail("stopped", 1)
    except UserError as error:
        _fail(str(error), 2)
    except RunFailed as error:
        _fail(str(error), error.code)
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except ModuleNotFoundError as error:
        if (name := (error.name or "").partition(".")[0]) not in OF_TRAINING:
            raise
        _fail(f"this needs {name}, which a plain install (for exports) lacks: pip install 'slimray[train]'", 2)
    except OSError as error:
        _fail(f"{error.filename or 'slimray'}: {(error.strerror or str(error)).lower()}", 2)
    except Exception as error:
        show = getattr(error, "show", None)
        if show is None or not type(error).__module__.startswith(("click", "typer")):
            raise
        show()  # a wrong option or argument
        sys.exit(2)


def _fail(sentence: str, code: int) -> None:
    console.print(sentence, style="red", soft_wrap=True)
    sys.exit(code)
