"""The step `quantize`: few bits after training, or a trainable form (`finetune`) that a second pass makes integer.

The bits of a layer are given, the same everywhere, or found by HAQ's agent under limits (`search: haq`).
"""

from typing import Any

from slimray import runs
from slimray.spec import UserError, did_you_mean, located

FASTER = False  # torch computes rounded numbers as floats; a runtime with int8 kernels may be faster


def check(step: Any, net: Any, sample: tuple[int, ...] | None) -> None:
    """Raise UserError for a layer that `net`, on the meta device, does not have, for unknown hardware, and for limits
    that even the fewest bits exceed.

    `sample` is the shape of an input. Without it, and for networks that index points by their values, limits cannot be
    checked before the step runs.
    """
    import torch

    from slimray.compress import quantization
    from slimray.compress.fold import LAYERS
    from slimray.edge import hardware
    from slimray.verbs import bit_policies

    names = [name for name, module in net.named_modules() if type(module) in LAYERS]
    tables = quantization.tables_of(net, step.embeddings, step.scheme)
    for name in (*step.keep, *(step.bits if isinstance(step.bits, dict) else ())):
        field = "keep" if name in step.keep else "bits"
        if name not in names and not (field == "keep" and name in tables):
            raise UserError(f"{field}: there is no layer {name!r}{did_you_mean(name, names)}")
    if step.hardware is not None:
        try:
            hardware.device(step.hardware)
        except UserError as error:
            raise UserError(located(str(error), "hardware")) from None
    if step.search is None or sample is None:
        return
    try:
        layers = quantization.layers_of(net, torch.empty(2, *sample, device="meta"))
    except (RuntimeError, IndexError):
        return
    layers = [layer for layer in layers if layer.name not in step.keep]
    bit_policies.walk_of(step, layers, bit_policies.Costs(step, layers))


def run(step: Any, work: Any, folder: str, before: runs.Run) -> tuple[runs.Run, dict[str, Any]]:
    """Quantize the network of `before`; return the stage, and the bits by layer with the data behind their choice."""
    from slimray.verbs import quantizing

    return quantizing.quantize(step, work, folder, before)
