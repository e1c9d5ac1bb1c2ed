"""The step `finetune`: the compressed network is trained on, what is zero stays zero, what is shared stays equal."""

from dataclasses import replace
from typing import Any

from slimray import runs
from slimray.spec import Spec

FASTER = False  # whether the step may make a network faster


def check(step: Spec, net: Any, sample: Any) -> None:
    """Nothing depends on the network."""


def run(step: Any, work: Any, folder: str, before: runs.Run) -> tuple[runs.Run, dict[str, Any]]:
    """Train the network of `before` in the stage FOLDER; return the stage and what there is to tell."""
    from slimray.train.methods.constrained import Constrained

    records = runs.read_model(before)[1].get("compression", [])
    shared = {name: None for record in records if record["step"] == "share" for name in record["bits"]}

    def change(config: Any) -> Any:
        return replace(config, method=Constrained(config.method, step.scale_dropout, tuple(shared)))

    return work.train(folder, step, before, change), {"epochs": step.epochs, "lr": step.lr}
