"""A compressed network, built again: what `models.build` takes, and the ordered records of what was done to it.

A record is a plain JSON object `{"step": NAME, ...}`; a run keeps its list in `model/model.json` under `compression`.
`rebuild` brings a freshly built network into the structure, names and shapes in which the stored weights load strictly,
also on the meta device. `REBUILD` is the table of steps: a new one is a row.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from slimray import models
from slimray.compress import channels, quantized
from slimray.spec import UserError, lookup

Record = Mapping[str, Any]


def unchanged(net: nn.Module, record: Record) -> nn.Module:
    """Return `net` as it is: the step changed values, not names and shapes."""
    return net


REBUILD: dict[str, Callable[[nn.Module, Record], nn.Module]] = {
    "sparsify": unchanged,
    "share": unchanged,
    "prune": channels.rebuild,
    "quantize": quantized.rebuild,
}


def rebuild(net: nn.Module, records: Sequence[Record]) -> nn.Module:
    """Return `net` (as `models.build` gives it) in the structure that the steps `records` left, in their order.

    It may be changed in place. UserError for a record that is none, of an unknown step or that does not fit `net`.
    """
    for number, record in enumerate(_checked(records)):
        where = f"compression[{number}]"
        step = lookup(REBUILD, record["step"], f"{where}: step")
        try:
            net = step(net, record)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise UserError(
                f"{where}: the record of {record['step']} does not fit this network ({type(error).__name__}: {error})"
            ) from None
    return net


def build(name: str, compression: Sequence[Record] = (), **options: Any) -> nn.Module:
    """Build what a run's `model/model.json` says: the network `name` of MODELS with its compression, if it has one.

    What a file of an earlier version does not say is what its network did (`models.stored`). UserError as of
    `models.build` and `rebuild`.
    """
    return rebuild(models.build(**models.stored({"name": name, **options})), compression)


def shaping(records: Sequence[Record]) -> list[Record]:
    """Return those `records` that a network of other weights has too; the others tell of values, or of their bits."""
    return [one for one in _checked(records) if REBUILD.get(one["step"]) not in (unchanged, quantized.rebuild)]


def _checked(records: Sequence[Record]) -> Sequence[Record]:
    """Return `records`; UserError if they are no list of records, each with a step."""
    if isinstance(records, Mapping | str) or not isinstance(records, Sequence):
        raise UserError(f"compression: must be a list of records (got {type(records).__name__})")
    for number, record in enumerate(records):
        if not isinstance(record, Mapping) or not isinstance(record.get("step"), str):
            raise UserError(f"compression[{number}]: must be a record with a step (got {record!r})")
    return records
