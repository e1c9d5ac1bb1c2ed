"""Weights that others trained, read without running their code and put into a network by what their names mean.

`load` takes a checkpoint (TSM, torchvision, mmaction2, PVCNN, Once-for-All, our own) or a state dict; `read` returns
its tensors. In a pickle every name that is not part of a tensor means an inert value. Names are compared without the
wrappers they passed through (`module.`, `base_model.`, `.net`, `.block`), so a 2D network starts a shifted, pooled,
online or inflated one, and a plain network the supernet whose largest arch it is. A kernel inflates by repetition over
time, divided by its length (arXiv 1705.07750).
"""

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from slimray import storage
from slimray.spec import UserError

# Parts of a name that say through which hands a weight went, not what it is.
WRAPPERS = ("module", "_orig_mod", "base_model", "backbone", "model", "net", "block")
HEADS = ("new_fc", "classifier", "classifier.1", "cls_head.fc_cls", "classifier.linear")  # all mean `fc`
# Supernets have a level more than plain nets (`conv.conv.weight`), and older ones another name for a block's branch.
ELASTIC = ((r"\bmobile_inverted_conv\.", "conv."), (r"\b(conv|bn|linear)\.(?:\1\.)+", r"\1."))
MMACTION = ((r"\bconv(\d)\.conv\.", r"conv\1."), (r"\bconv(\d)\.bn\.", r"bn\1."))
MMACTION += ((r"\bdownsample\.conv\.", "downsample.0."), (r"\bdownsample\.bn\.", "downsample.1."))
# The layers of a MobileNetV2 block in torchvision and here, with an expansion in front and without.
EXPANDED = {"0.0": "0", "0.1": "1", "1.0": "3", "1.1": "4", "2": "6", "3": "7"}
PLAIN = {"0.0": "0", "0.1": "1", "1": "3", "2": "4"}
# Where a training checkpoint keeps the state dict, the likelier first.
STATE_KEYS = ("state_dict", "model_state_dict", "model", "net", "ema_state_dict", "state_dict_ema", "ema", "model_ema")


@dataclass(frozen=True)
class LoadReport:
    """What `load` did: names of the network that were loaded, that were missing, and what was left out and why.

    `dropped` maps names of the network (a head of other classes, excluded ones) and names of the file for which the
    network has no place to the reason.
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

    Names that start with one of `exclude` (names of `model`) keep their values, as does a head of another number of
    classes. A first convolution for other channels gets the mean over the file's channels, repeated. Nothing is copied
    when UserError is raised: unreadable file, another network, another shape, an `exclude` that means nothing.
    """
    where = "weights" if isinstance(source, Mapping) else str(source)
    theirs = _named_tensors(source, where) if isinstance(source, Mapping) else read(source)
    ours = model.state_dict()
    for prefix in exclude:
        if not any(name.startswith(prefix) for name in ours):
            raise UserError(f"exclude: no weight of this network starts with {prefix!r} (it has {_few(ours)})")
    keys, head = _keys(ours), getattr(model, "head_name", "fc") + "."
    found = _find(theirs, set(keys.values()), where)
    body = [n for n in ours if not (n.startswith(head) or keys[n].startswith("fc.") or _is_counter(n))]
    if 3 * sum(keys[name] in found for name in body) < 2 * max(len(body), 1):
        raise UserError(_another_network(where, theirs, keys, found, body))
    first = getattr(model, "first_conv_name", "") + ".weight"
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
                loaded[name] = fitted
            elif name not in body and value.ndim == target.ndim and value.shape[1:] == target.shape[1:]:
                dropped[name] = f"{len(value)} classes in the file, {len(target)} here"
            else:
                raise UserError(
                    f"{where}: {found[keys[name]]} has shape {list(value.shape)}, here {name} has "
                    f"{list(target.shape)}: build the network with the options of the file, or exclude {name!r}"
                )
    placed = {found[key] for key in keys.values() if key in found}
    dropped |= {name: "no place in this network" for name in theirs if name not in placed and not _is_counter(name)}
    with torch.no_grad():
        for name, value in loaded.items():
            ours[name].copy_(value)
    return LoadReport(list(loaded), missing, dropped)


def read(source: str | Path) -> dict[str, Tensor]:
    """The named tensors of the checkpoint at `source`: safetensors, or a PyTorch file old or new.

    Nothing in the file is executed. Raises UserError: no such file, damaged, not a checkpoint.
    """
    fs, path = storage.open_uri(source)
    try:
        data = storage.read_bytes(fs, path)
    except FileNotFoundError:
        raise UserError(f"{source}: no such file") from None
    try:
        content = _parse(data)
    except Exception as error:  # damaged bytes raise whatever a format's reader stumbles over
        raise UserError(
            f"{source}: is no checkpoint that can be read safely, or is cut short: fetch it again, or save its "
            "state_dict() as safetensors"
        ) from error
    tensors = _named_tensors(content, str(source))
    for name, value in tensors.items():
        if value.layout != torch.strided or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(f"{source}: {name} claims more values than the file holds: fetch it from a better place")
    return tensors


# --------------------------------------------------------------------------------------------------- by name


def _key(name: str) -> str:
    """What a name means: without wrappers, in torchvision's form, the classifier as `fc`."""
    key = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    for pattern, plain in (*ELASTIC, *MMACTION):
        key = re.sub(pattern, plain, key)
    stem, _, leaf = key.rpartition(".")
    return f"fc.{leaf}" if stem in HEADS else key


def _keys(names: Iterable[str]) -> dict[str, str]:
    """`_key` of each name, with torchvision's MobileNetV2 blocks (`conv.0.0`) in our form (`conv.0`).

    It takes all names at once: `conv.3` of a block is another layer in either form.
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


def _find(theirs: Mapping[str, Tensor], wanted: set[str], where: str) -> dict[str, str]:
    """The file's name for each key that is wanted and there; UserError where two names mean the same."""
    found: dict[str, str] = {}
    for name, key in _keys(theirs).items():
        if key in wanted and found.setdefault(key, name) != name:
            raise UserError(f"{where}: {found[key]} and {name} mean the same weight: keep one of them in the file")
    return found


def _fit(value: Tensor, shape: torch.Size, is_first: bool) -> Tensor | None:
    """`value` in `shape`: as it is, over other input channels, inflated over time; None if it does not fit."""
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
    """Whether this is BatchNorm's count of batches, which old checkpoints lack and nothing here reads."""
    return name.endswith("num_batches_tracked")


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# -------------------------------------------------------------------------------------------------- by bytes


def _named_tensors(content: Any, where: str) -> dict[str, Tensor]:
    """The state dict inside a training checkpoint; UserError if there is none."""
    for _ in range(len(STATE_KEYS)):
        if not isinstance(content, Mapping):
            break
        inner = [content[key] for key in STATE_KEYS if isinstance(content.get(key), Mapping)]
        if not inner:
            break
        content = inner[0]
    items = content.items() if isinstance(content, Mapping) else ()
    tensors = {name: value for name, value in items if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{where}: holds no named tensors: save the network's state_dict()")
    return tensors


def _parse(data: bytes) -> Any:
    """What a checkpoint's bytes hold; any exception if they are none."""
    if data[8:9] == b"{":
        return safetensors.torch.load(data)
    if data[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(info.file_size for info in archive.infolist()) > len(data):  # PyTorch never compresses
                raise ValueError("the archive claims more bytes than it has")
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # it names classes beside those of tensors
        return _read_zip(data) if data[:2] == b"PK" else _read_legacy(data)


class _Inert(dict):
    """Stands for every name of a file that is no part of a tensor: takes what a pickle does to it, and does nothing."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, *_: Any, **__: Any):
        super().__init__()

    def __call__(self, *_: Any, **__: Any) -> "_Inert":
        return self

    def __setstate__(self, _: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        pass


def _tensor(flat: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return torch.as_strided(flat, size, stride, offset)


def _parameter(value: Tensor, *_: Any) -> Tensor:
    return value


KNOWN = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
}
DTYPES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}


class _Unpickler(pickle._Unpickler):  # in Python: the one in C reserves as much memory as a file asks for
    """Builds plain values and tensors; `storage` makes the flat tensor of (dtype, key, number of values)."""

    def __init__(self, data: io.BytesIO, make: Callable[[torch.dtype, str, int], Tensor] | None = None):
        super().__init__(data, encoding="utf-8")
        self.make, self.storages = make, {}

    def find_class(self, module_name: str, global_name: str) -> Any:
        if module_name in ("torch", "torch.cuda") and global_name in DTYPES:
            return DTYPES[global_name]
        return KNOWN.get((module_name, global_name), _Inert)

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == "module":  # a class with its source text
            return pid[1]
        _, dtype, key, _, numel, *view = pid
        if self.make is None or any(view):
            raise ValueError(f"unexpected storage {key}")
        if key not in self.storages:
            self.storages[key] = self.make(dtype, key, numel)
        return self.storages[key]


def _flat(data: bytes, dtype: torch.dtype, numel: int) -> Tensor:
    """`numel` values of `dtype` out of exactly as many bytes."""
    if len(data) != numel * dtype.itemsize:
        raise ValueError(f"{len(data)} bytes for {numel} values of {dtype}")
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def _read_zip(data: bytes) -> Any:
    """The content of a PyTorch file since 1.6: `x/data.pkl`, and the storages in `x/data/`."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        (index,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        root = index.removesuffix(".pkl")
        unpickler = _Unpickler(
            io.BytesIO(archive.read(index)),
            lambda dtype, key, numel: _flat(archive.read(f"{root}/{key}"), dtype, numel),
        )
        return unpickler.load()


def _read_legacy(data: bytes) -> Any:
    """The content of a PyTorch file before 1.6: a magic number, version and system, content, keys, storages."""
    file, room = io.BytesIO(data), len(data)

    def reserve(dtype: torch.dtype, _: str, numel: int) -> Tensor:
        nonlocal room
        room -= numel * dtype.itemsize
        if numel < 0 or room < 0:
            raise ValueError("the file claims more bytes than it has")
        return torch.empty(numel, dtype=dtype)

    if _Unpickler(file).load() != torch.serialization.MAGIC_NUMBER:
        raise ValueError("no PyTorch file")
    for _ in ("version", "system"):
        _Unpickler(file).load()
    unpickler = _Unpickler(file, reserve)
    content = unpickler.load()
    for key in _Unpickler(file).load():
        flat, numel = unpickler.storages[key], int.from_bytes(file.read(8), "little")
        flat.copy_(_flat(file.read(flat.numel() * flat.element_size()), flat.dtype, numel))
    return content
