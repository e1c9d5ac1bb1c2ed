"""The step `finetune`: train the compressed network further; zeros stay zero, shared weights stay equal."""

from dataclasses import replace
from typing import Any

from slimray import runs
from slimray.spec import Spec
from slimray.verbs.compress_specs import RoundedStep

FASTER = False  # True for a step that may make a network faster


def check(step: Spec, net: Any, sample: Any) -> None:
    """Do nothing: the step works for every network."""


def run(step: Any, work: Any, folder: str, before: runs.Run) -> tuple[runs.Run, dict[str, Any]]:
    """Train the network of `before` in the stage `folder`; return the stage and the details of the step."""
    from slimray.train.methods.constrained import Constrained
    from slimray.train.methods.quantized import QuantizationAware

    records = runs.read_model(before)[1].get("compression", [])
    rounded = isinstance(step, RoundedStep)  # the training of a step `quantize`
    shared = {name: None for record in records if record["step"] == "share" for name in record["bits"]}

    def change(config: Any) -> Any:
        method = Constrained(config.method, step.scale_dropout, tuple(shared))
        return replace(config, method=QuantizationAware(method, step.ranges) if rounded else method)

    return work.train(folder, step, before, change), {"epochs": step.epochs, "lr": step.lr}
