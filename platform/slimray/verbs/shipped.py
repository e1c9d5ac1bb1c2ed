"""Faults of earlier versions in finished runs: detect wrong sample recipes or statistics from their files.

Runs written by earlier versions may have one of two faults. A subnet of another resolution got the zoom of its
supernet's images; averaged weights (`optim.ema`) got the BatchNorm statistics of the weights that were not averaged.
`slimray recalibrate RUN` fixes both, by writing a new run. No torch.
"""

from collections.abc import Mapping
from typing import Any

from slimray import runs
from slimray.data.spec import DataSpec, scaled_resize
from slimray.data.views import at_size
from slimray.spec import RunFailed, UserError

SINCE = "precise_norm"  # a field of `optim` that was added together with averaged statistics: older jobs lack it
UNREAD = (UserError, RunFailed, OSError, ValueError, KeyError, TypeError, AttributeError)  # errors of a damaged run


def warning(run: runs.Run) -> str:
    """Return the fault of a finished run's network and the command that fixes it, "" if there is none."""
    try:
        job = runs.read_job(run)
        said = _wrong_zoom(run, job) or _wrong_statistics(job)
    except UNREAD:
        return ""
    return said and f"{said}: `slimray recalibrate {run.name}` writes a run without this fault"


def corrected_recipe(job: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe of a network's samples with the zoom of the `data` section of its run, whose job is `job`."""
    data = job.get("data") or {}
    size, resize = data.get("size"), recipe.get("resize")
    if job.get("kind") != "subnet" or not resize or not size or recipe["size"] == size:
        return dict(recipe)
    whole = dict(recipe) | {"size": size, "resize": data.get("resize") or scaled_resize(*_default_zoom(), size)}
    return dict(recipe) | {"resize": at_size(whole, recipe["size"])["resize"]}


def _default_zoom() -> tuple[int, int]:
    """Return a short side and the side of its crop in the default proportion."""
    return 8 * DataSpec.model_fields["size"].default // 7, DataSpec.model_fields["size"].default


def _wrong_zoom(run: runs.Run, job: Mapping[str, Any]) -> str:
    if job.get("kind") != "subnet" or not runs.exists(run, "model/input.json"):
        return ""
    recipe = runs.read_model(run)[2]["recipe"]
    right = corrected_recipe(job, recipe).get("resize")
    if recipe.get("resize") == right:
        return ""
    return f"its images have another zoom than in its search (short side {recipe['resize']} in place of {right})"


def _wrong_statistics(job: Mapping[str, Any]) -> str:
    trained = job
    if job.get("kind") == "subnet" and "blocks" in job:  # trained as a stage of the run that found it
        trained = runs.read_job(runs.run_at(str(job["supernet"])))
    elif job.get("kind") != "train":
        return ""
    optim = trained.get("optim") or {}
    if not optim.get("ema") or SINCE in optim:
        return ""
    return "its averaged weights have the BatchNorm statistics of other weights"
