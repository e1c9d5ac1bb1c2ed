"""The step `quantize`: few bits after training, or a form that trains (`finetune`), which a second pass makes whole.

The bits of a layer are given, the same everywhere, or found by HAQ's agent under limits (`search: haq`).
"""

from typing import Any

from slimray import runs
from slimray.spec import UserError, did_you_mean, located

FASTER = False  # torch computes rounded numbers as floats; a runtime with int8 kernels may be faster


def check(step: Any, net: Any, sample: Any) -> None:
    """Raise UserError for a layer that `net`, on the meta device, does not have, and for hardware that is not known."""
    from slimray.compress.fold import LAYERS
    from slimray.edge import hardware

    names = [name for name, module in net.named_modules() if type(module) in LAYERS]
    for name in (*step.keep, *(step.bits if isinstance(step.bits, dict) else ())):
        if name not in names:
            field = "keep" if name in step.keep else "bits"
            raise UserError(f"{field}: there is no layer {name!r}{did_you_mean(name, names)}")
    if step.hardware is not None:
        try:
            hardware.device(step.hardware)
        except UserError as error:
            raise UserError(located(str(error), "hardware")) from None


def run(step: Any, work: Any, folder: str, before: runs.Run) -> tuple[runs.Run, dict[str, Any]]:
    """Quantize the network of `before`; return the stage with the bits of its layers, and how they were chosen."""
    from slimray.verbs import quantizing

    return quantizing.quantize(step, work, folder, before)
