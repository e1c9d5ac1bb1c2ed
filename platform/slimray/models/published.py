"""Published weights, read without running code and loaded into a network by the meaning of their names.

`load` takes a checkpoint (TSM, torchvision, mmaction2, PVCNN, Once-for-All, CIFAR ResNets, our own) or a state dict;
`read` returns its tensors. Wrappers of the network (`module.`, `_orig_mod.`, `_fsdp_wrapped_module.`, `state.model.`)
are found by structure: a component of a name that the network does not have, or a prefix, is ignored if the rest is a
name of the network. So the weights of a 2D network can initialize a shifted, pooled, online or inflated one, and those
of a plain network the supernet of which it is the largest arch. A kernel is inflated by repeating it over time and
dividing by its length (arXiv 1705.07750).
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimray import storage
from slimray.models import checkpoint_files
from slimray.spec import UserError

# Components of a name that do not change the meaning of a weight.
WRAPPERS = ("module", "_orig_mod", "base_model", "backbone", "model", "net", "block")
HEADS = ("new_fc", "classifier", "classifier.1", "cls_head.fc_cls", "classifier.linear", "linear")  # all mean `fc`
# Supernets have one more level than plain networks (`conv.conv.weight`), older ones another name for a block's branch.
ELASTIC = ((r"\bmobile_inverted_conv\.", "conv."), (r"\b(conv|bn|linear)\.(?:\1\.)+", r"\1."))
MMACTION = ((r"\bconv(\d)\.conv\.", r"conv\1."), (r"\bconv(\d)\.bn\.", r"bn\1."))
MMACTION += ((r"\bdownsample\.conv\.", "downsample.0."), (r"\bdownsample\.bn\.", "downsample.1."))
# The layers of a MobileNetV2 block in torchvision -> here, with and without an expansion.
EXPANDED = {"0.0": "0", "0.1": "1", "1.0": "3", "1.1": "4", "2": "6", "3": "7"}
PLAIN = {"0.0": "0", "0.1": "1", "1": "3", "2": "4"}
# Components that the rules above use, and that are therefore never taken for wrappers.
READ_PARTS = {"conv", "bn", "linear", "downsample", "mobile_inverted_conv", *(p for h in HEADS for p in h.split("."))}
# Keys of state dicts in training checkpoints, most likely first, for when several match the network equally well.
STATE_KEYS = ("state_dict", "model_state_dict", "model", "net", "ema_state_dict", "state_dict_ema", "ema", "model_ema")
MAX_DEPTH = 6  # of mappings and lists around a state dict
MAX_PREFIX = 6  # components of a prefix
MAX_PREFIXES = 50  # prefixes that are tried, most frequent first


@dataclass(frozen=True)
class LoadReport:
    """Result of `load`: names of the network that were loaded or missing, and weights that were left out.

    `dropped` maps names of the network (a head with other classes, excluded names), and names in the file that have no
    place in the network, to the reason.
    """

    loaded: list[str]
    missing: list[str]
    dropped: dict[str, str]

    def __str__(self) -> str:
        left = [f"{name} ({reason})" for name, reason in self.dropped.items()]
        parts = [f"{len(self.loaded)} tensors loaded"]
        parts += [f"left out: {_few(left)}"] if left else []
        parts += [f"not in the file: {_few(self.missing)}"] if self.missing else []
        return "; ".join(parts)


def load(model: nn.Module, source: str | Path | Mapping[str, Any], exclude: Sequence[str] = ()) -> LoadReport:
    """Copy the weights of `source`, a checkpoint's path or URI or a state dict, into `model`.

    Names of `model` that start with one of `exclude` keep their values, as does a head for another number of classes. A
    first convolution with another number of channels gets the mean over the file's channels, repeated. Layers of a type
    that the file does not have (non-local blocks for a plain network) keep their values and are `missing`. Raises
    UserError, before anything is copied, for an unreadable file, another network, a type of layer that is only partly
    in the file, a different shape, NaN or values that are not floats, and an `exclude` that matches nothing.
    """
    where = "weights" if isinstance(source, Mapping) else str(source)
    ours = model.state_dict()
    for prefix in exclude:
        if not any(name.startswith(prefix) for name in ours):
            raise UserError(f"exclude: no weight of this network starts with {prefix!r} (it has {_few(ours)})")
    keys, head = _keys(ours), getattr(model, "head_name", "fc") + "."
    theirs, found = _choose(_parse_source(source), set(keys.values()), where)
    body = [n for n in ours if not (n.startswith(head) or keys[n].startswith("fc.") or _is_counter(n))]
    if 3 * sum(keys[name] in found for name in body) < 2 * max(len(body), 1):
        raise UserError(_another_network(where, theirs, keys, found, body))
    first = getattr(model, "first_conv_name", "") + ".weight"
    learned = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    loaded: dict[str, Tensor] = {}
    missing, dropped = [], {}
    for name, target in ours.items():
        if name.startswith(tuple(exclude)):
            dropped[name] = "excluded"
        elif keys[name] not in found:
            missing += [] if _is_counter(name) else [name]
        else:
            value = theirs[found[keys[name]]]
            fitted = _fit(value, target.shape, name == first)
            if fitted is not None:
                is_statistic = name.endswith(("running_mean", "running_var"))
                _require_numbers(fitted, target, f"{where}: {found[keys[name]]}", name in learned or is_statistic)
                loaded[name] = fitted
            elif name not in body and value.ndim == target.ndim and value.shape[1:] == target.shape[1:]:
                dropped[name] = f"{len(value)} classes in the file, {len(target)} here"
            else:
                raise UserError(
                    f"{where}: {found[keys[name]]} has shape {list(value.shape)}, here {name} has "
                    f"{list(target.shape)}: build the network with the options of the file, or exclude {name!r}"
                )
    _require_whole(where, missing, keys, found)
    placed = {found[key] for key in keys.values() if key in found}
    dropped |= {name: "no place in this network" for name in theirs if name not in placed and not _is_counter(name)}
    with torch.no_grad():
        for name, value in loaded.items():
            ours[name].copy_(value)
    return LoadReport(list(loaded), missing, dropped)


def read(source: str | Path) -> dict[str, Tensor]:
    """Return the named tensors of the checkpoint at `source`: safetensors, or a PyTorch file of any version.

    Nothing in the file is executed. Raises UserError if the file is missing, damaged or not a checkpoint, or has
    tensors without values.
    """
    theirs, _ = _choose(_parse_source(source), set(), str(source))
    return theirs


def require_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise UserError if one of the tensors holds NaN, because then so do all outputs of the network."""
    bad = [name for name, value in tensors.items() if value.is_floating_point() and value.isnan().any()]
    if bad:
        raise UserError(
            f"{where}: {len(bad)} of {len(tensors)} tensors hold NaN ({_few(bad)}), as after a training that diverged: "
            "use an earlier checkpoint, or train again with a lower learning rate"
        )


def _parse_source(source: str | Path | Mapping[str, Any]) -> Any:
    if isinstance(source, Mapping):
        return source
    fs, path = storage.open_uri(source)
    try:
        data = storage.read_bytes(fs, path)
    except FileNotFoundError:
        raise UserError(f"{source}: no such file") from None
    try:
        return checkpoint_files.parse(data)
    except Exception as error:  # readers of formats raise anything on damaged bytes
        raise UserError(
            f"{source}: is not a checkpoint that can be read safely, or is truncated: fetch it again, or save its "
            "state_dict() as safetensors"
        ) from error


# --------------------------------------------------------------------------------------------------- by name


def _key(name: str) -> str:
    """Return the canonical form of a name: without wrappers, in torchvision's form, with the classifier as `fc`."""
    key = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    for pattern, plain in (*ELASTIC, *MMACTION):
        key = re.sub(pattern, plain, key)
    stem, _, leaf = key.rpartition(".")
    return f"fc.{leaf}" if stem in HEADS else key


def _keys(names: Iterable[str]) -> dict[str, str]:
    """Return `_key` of each name, with torchvision's MobileNetV2 blocks (`conv.0.0`) in our form (`conv.0`).

    Needs all names at once, because `conv.3` of a block is a different layer in each form.
    """
    keys = {name: _key(name) for name in names}
    nested = {m[1] for key in keys.values() if (m := re.match(r"features\.(\d+)\.conv\.0\.0\.", key))}
    expanded = {m[1] for key in keys.values() if (m := re.match(r"features\.(\d+)\.conv\.1\.0\.", key))}
    for name, key in keys.items():
        m = re.fullmatch(r"features\.(\d+)\.conv\.(\d(?:\.\d)?)\.(\w+)", key)
        if m and m[1] in nested:
            place = (EXPANDED if m[1] in expanded else PLAIN).get(m[2], m[2])
            keys[name] = f"features.{m[1]}.conv.{place}.{m[3]}"
    return keys


def _find(theirs: Iterable[str], wanted: set[str], where: str) -> dict[str, str]:
    """Return the file's name for each wanted key that it has; raise UserError if two names mean the same weight.

    Names are tried unchanged, then without the components that occur nowhere in the network, fewest first, then without
    the prefix that most names share.
    """
    names = list(theirs)
    known = READ_PARTS.union(*(key.split(".") for key in wanted))
    foreign = {name: _foreign_parts(name, known) for name in names}
    bare = {name: _without_parts(name, foreign[name]) for name in names}
    found: dict[str, str] = {}
    cost: dict[str, int] = {}

    def match(renamed: Mapping[str, str], dearer: int = 0) -> None:
        keys = _keys(renamed.values())
        for name, short in renamed.items():
            key, price = keys[short], dearer + len(foreign[name] if short != name else ())
            if key not in wanted or price > cost.get(key, price):
                continue
            if price == cost.get(key) and found[key] != name:
                raise UserError(f"{where}: {found[key]} and {name} mean the same weight: keep one of them in the file")
            found[key], cost[key] = name, price

    match({name: name for name in names if not foreign[name]})
    match({name: bare[name] for name in names if foreign[name]})
    prefix = _shared_prefix(bare, wanted, found)
    if prefix:
        skipped = {name: short.removeprefix(prefix) for name, short in bare.items() if short.startswith(prefix)}
        match({name: short for name, short in skipped.items() if name not in found.values()}, dearer=len(names))
    return found


def _foreign_parts(name: str, known: set[str]) -> set[str]:
    """Return the components of a file's name that neither the network nor a rule has; never the last or a number."""
    parts = name.split(".")[:-1]
    return {p for p in parts if p not in known and p not in WRAPPERS and not re.fullmatch(r"(conv|bn)?\d+", p)}


def _without_parts(name: str, parts: set[str]) -> str:
    *path, leaf = name.split(".")
    return ".".join([*(part for part in path if part not in parts), leaf])


def _shared_prefix(bare: Mapping[str, str], wanted: set[str], found: Mapping[str, str]) -> str:
    """Return the prefix, with its dot, whose removal turns the most unmatched names into names of the network."""
    taken = set(found.values())
    inside: dict[str, list[str]] = {}
    for short in (short for name, short in bare.items() if name not in taken):
        parts = short.split(".")
        for n in range(1, min(len(parts), MAX_PREFIX)):
            inside.setdefault(".".join(parts[:n]) + ".", []).append(short)
    best, most = "", 0
    for prefix, names in sorted(inside.items(), key=lambda one: (-len(one[1]), len(one[0])))[:MAX_PREFIXES]:
        keys = _keys(short.removeprefix(prefix) for short in names) if len(names) > most else {}
        count = sum(key in wanted and key not in found for key in keys.values())
        if count > most:
            best, most = prefix, count
    return best


def _require_whole(where: str, missing: Sequence[str], keys: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raise UserError if the file has only some weights of a type, because it is incomplete or uses other names.

    All weights of a type may be missing (non-local blocks), because networks can start from others without them.
    """
    there = {re.sub(r"\d+", "*", key) for key in found}
    partly = [name for name in missing if re.sub(r"\d+", "*", keys[name]) in there]
    if partly:
        raise UserError(
            f"{where}: {len(partly)} weights of this network are not in the file, which has others like them "
            f"({_few(partly)}): choose the network it was trained as, rename its weights, or exclude these"
        )


def _require_numbers(value: Tensor, target: Tensor, name: str, is_learned: bool) -> None:
    """Raise UserError for values that cannot be copied without loss, or that a network cannot compute with."""
    if value.is_complex() and not target.is_complex():
        raise UserError(
            f"{name} holds complex numbers, but this network has real ones: save its real part, if intended"
        )
    if target.is_floating_point() and not value.is_floating_point() and value.dtype != torch.bool and is_learned:
        kind = str(value.dtype).removeprefix("torch.")
        raise UserError(f"{name} holds integers ({kind}), as quantized weights do: save the weights as floats")
    if not value.is_floating_point() or value.is_meta:
        return
    value = value.to(target.dtype if target.is_floating_point() else torch.float32)
    bad = ~value.isfinite() if is_learned else value.isnan()
    if bad.any():
        raise UserError(
            f"{name} holds {int(bad.sum())} values that are not finite numbers (NaN or infinite), as after a training "
            "that diverged: use an earlier checkpoint"
        )


def _fit(value: Tensor, shape: torch.Size, is_first: bool) -> Tensor | None:
    """Return `value` in `shape`: unchanged, for other input channels, or inflated over time; None if impossible."""
    if is_first and value.ndim in (4, 5) and value.shape[1] != shape[1]:
        value = value.float().mean(1, keepdim=True).expand(-1, shape[1], *value.shape[2:])
    if value.ndim == 4 and len(shape) == 5:
        value = value.unsqueeze(2).expand(-1, -1, shape[2], -1, -1) / shape[2]
    return value if value.shape == shape else None


def _another_network(
    where: str, theirs: Mapping[str, Tensor], keys: dict[str, str], found: dict[str, str], body: list[str]
) -> str:
    here = [name for name in body if keys[name] not in found]
    there = [name for name in theirs if name not in found.values() and not _is_counter(name)]
    return (
        f"{where}: has {len(body) - len(here)} of the {len(body)} weights of this network, so it belongs to another "
        f"one: choose the network it was trained as (the file has {_few(there)}; this network {_few(here)})"
    )


def _is_counter(name: str) -> bool:
    """Return whether this is BatchNorm's count of batches, which old checkpoints lack and nothing here uses."""
    return name.endswith("num_batches_tracked")


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ------------------------------------------------------------------------------------ state dicts of checkpoints


def _choose(content: Any, wanted: set[str], where: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the state dict of a checkpoint that has most of the `wanted` keys, and the file's name of each key.

    Raises UserError if there is none, or if two match equally well and STATE_KEYS does not decide.
    """
    candidates = list(_state_dicts(content))
    if not candidates:
        raise UserError(f"{where}: holds no named tensors: save the network's state_dict()")
    ranked, problem = [], None
    for path, tensors in candidates:
        try:
            found = _find(tensors, wanted, where)
        except UserError as error:
            problem = problem or error
            continue
        place = max((STATE_KEYS.index(part) for part in path if part in STATE_KEYS), default=len(STATE_KEYS))
        ranked.append((-len(found), place, -len(tensors) if not wanted else 0, path, tensors, found))
    if not ranked:
        raise problem or UserError(f"{where}: holds no named tensors: save the network's state_dict()")
    ranked.sort(key=lambda one: one[:3])
    best = ranked[0]
    if len(ranked) > 1 and ranked[1][:2] == best[:2] and best[0]:
        names = " and ".join(".".join(one[3]) or "its top" for one in ranked[:2])
        raise UserError(f"{where}: {names} are networks of the same kind: save only the one you mean")
    if problem is not None and not best[0] and wanted:
        raise problem
    _require_values(best[4], where)
    return best[4], best[5]


def _state_dicts(content: Any, path: tuple[str, ...] = (), seen: frozenset[int] = frozenset()) -> Iterator[Any]:
    """Yield (path, named tensors) of every mapping inside a checkpoint that holds tensors by name."""
    if len(path) > MAX_DEPTH or id(content) in seen:
        return
    if isinstance(content, Mapping):
        named = {name: one for name, one in content.items() if isinstance(name, str) and isinstance(one, Tensor)}
        if named:
            yield path, named
    items = content.items() if isinstance(content, Mapping) else ()
    items = enumerate(content) if isinstance(content, list | tuple) else items
    for key, inner in items:
        if isinstance(inner, Mapping | list | tuple):
            yield from _state_dicts(inner, (*path, str(key)), seen | {id(content)})


def _require_values(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise UserError for tensors without values, or that do not store each value (quantized, nested, sparse)."""
    for name, value in tensors.items():
        if value.is_meta and where == "weights":
            continue  # a state dict of shapes only, as checks and plans use
        kind = "without values (meta)" if value.is_meta else "quantized" if value.is_quantized else ""
        kind = "nested" if value.is_nested else kind
        kind = "sparse" if not kind and value.layout != torch.strided else kind
        if kind:
            raise UserError(f"{where}: {name} is {kind}: save the network's state_dict() with ordinary float tensors")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(f"{where}: {name} declares more values than the file holds: get the file from elsewhere")
