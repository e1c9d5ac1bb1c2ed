"""Rebuilds a compressed network from the arguments of `models.build` and the ordered records of its compression.

A record is a plain JSON object `{"step": NAME, ...}`; a run stores its list in `model/model.json` under `compression`.
`rebuild` gives a freshly built network the structure, names and shapes into which the stored weights load strictly,
also on the meta device. `REBUILD` is the table of steps: a new step is a row.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from slimray import models
from slimray.compress import channels, quantized
from slimray.spec import UserError, lookup

Record = Mapping[str, Any]


def unchanged(net: nn.Module, record: Record) -> nn.Module:
    """Return `net` unchanged, for steps that change values but not names or shapes."""
    return net


REBUILD: dict[str, Callable[[nn.Module, Record], nn.Module]] = {
    "sparsify": unchanged,
    "share": unchanged,
    "prune": channels.rebuild,
    "quantize": quantized.rebuild,
}


def rebuild(net: nn.Module, records: Sequence[Record]) -> nn.Module:
    """Return `net` (from `models.build`) with the structure that results from the steps `records`, in their order.

    It may be changed in place. Raises UserError for an invalid record, an unknown step, or one that does not match
    `net`.
    """
    for number, record in enumerate(_checked(records)):
        where = f"compression[{number}]"
        step = lookup(REBUILD, record["step"], f"{where}: step")
        try:
            net = step(net, record)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise UserError(
                f"{where}: the record of {record['step']} does not match this network ({type(error).__name__}: {error})"
            ) from None
    return net


def build(name: str, compression: Sequence[Record] = (), **options: Any) -> nn.Module:
    """Build the network of a run's `model/model.json`: `name` of MODELS with its compression, if it has one.

    Options missing from files of earlier versions get the values of that time (`models.stored`). Raises UserError as
    `models.build` and `rebuild` do.
    """
    return rebuild(models.build(**models.stored({"name": name, **options})), compression)


def shaping(records: Sequence[Record]) -> list[Record]:
    """Return those `records` that change shapes and apply to other weights too; the others concern values or bits."""
    return [one for one in _checked(records) if REBUILD.get(one["step"]) not in (unchanged, quantized.rebuild)]


def _checked(records: Sequence[Record]) -> Sequence[Record]:
    """Return `records`; UserError if they are not a list of records, each with a step."""
    if isinstance(records, Mapping | str) or not isinstance(records, Sequence):
        raise UserError(f"compression: must be a list of records (got {type(records).__name__})")
    for number, record in enumerate(records):
        if not isinstance(record, Mapping) or not isinstance(record.get("step"), str):
            raise UserError(f"compression[{number}]: must be a record with a step (got {record!r})")
    return records
