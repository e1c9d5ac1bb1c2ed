"""The step `share`: each weight of a layer takes one of a few values, found by k-means (arXiv 1510.00149)."""

from typing import TYPE_CHECKING, Any

from slimray import runs
from slimray.verbs.compress_specs import ShareStep

if TYPE_CHECKING:
    from torch import nn

    from slimray.verbs.compressing import Work

FASTER = False  # kernels compute with the values, not with their codes


def check(step: ShareStep, net: "nn.Module", sample: tuple[int, ...] | None) -> None:
    """Raise UserError for a layer that `net`, on the meta device, does not have."""
    from slimray.compress import sparsity

    sparsity.by_layer(net, step.bits, "bits")


def run(step: ShareStep, work: "Work", folder: str, before: runs.Run) -> tuple[runs.Run, dict[str, Any]]:
    """Share the weights of the network of `before`; return the stage and the values in use by layer."""
    from slimray.compress import sharing, sparsity
    from slimray.verbs.compressing import read_network, write_network

    def make(stage: runs.Run) -> None:
        net, model, input_json = read_network(before)
        bits = {name: int(value) for name, value in sparsity.by_layer(net, step.bits, "bits").items()}
        write_network(stage, net, model, input_json, sharing.share(net, bits))

    stage = work.write(folder, step.model_dump(mode="json"), make)
    return stage, {"values": runs.read_model(stage)[1]["compression"][-1]["values"]}
