"""Reads checkpoint files as plain values and tensors, without running their code: safetensors, and PyTorch files.

In: bytes. Out: mappings, lists, tensors on the CPU. In a pickle, every name that is not part of a tensor becomes an
inert value, and sizes are checked against the bytes of the file before memory is reserved.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch
from torch import Tensor


def parse(data: bytes) -> Any:
    """Return the content of a checkpoint's bytes; raises various exceptions for other bytes."""
    if data[8:9] == b"{":
        return safetensors.torch.load(data)
    if data[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(info.file_size for info in archive.infolist()) > len(data):  # PyTorch never compresses
                raise ValueError("the archive claims more bytes than it has")
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # it contains classes other than those of tensors
        return _read_zip(data) if data[:2] == b"PK" else _read_legacy(data)


class _Inert(dict):
    """Stand-in for every name in a file that is not part of a tensor: accepts all pickle operations, does nothing."""

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


class _Unpickler(pickle._Unpickler):  # the Python one, as the C one reserves any amount of memory a file declares
    """Builds plain values and tensors; `make` returns the flat tensor for (dtype, key, number of values)."""

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
    """Return `numel` values of `dtype` from exactly as many bytes; raise ValueError for another number of bytes."""
    if len(data) != numel * dtype.itemsize:
        raise ValueError(f"{len(data)} bytes for {numel} values of {dtype}")
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def _read_zip(data: bytes) -> Any:
    """Read a PyTorch file since version 1.6: `x/data.pkl`, and the storages in `x/data/`."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        (index,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        root = index.removesuffix(".pkl")
        unpickler = _Unpickler(
            io.BytesIO(archive.read(index)),
            lambda dtype, key, numel: _flat(archive.read(f"{root}/{key}"), dtype, numel),
        )
        return unpickler.load()


def _read_legacy(data: bytes) -> Any:
    """Read a PyTorch file from before version 1.6: a magic number, version and system, content, keys, storages."""
    file, room = io.BytesIO(data), len(data)

    def reserve(dtype: torch.dtype, _: str, numel: int) -> Tensor:
        nonlocal room
        room -= numel * dtype.itemsize
        if numel < 0 or room < 0:
            raise ValueError("the file claims more bytes than it has")
        return torch.empty(numel, dtype=dtype)

    if _Unpickler(file).load() != torch.serialization.MAGIC_NUMBER:
        raise ValueError("not a PyTorch file")
    for _ in ("version", "system"):
        _Unpickler(file).load()
    unpickler = _Unpickler(file, reserve)
    content = unpickler.load()
    for key in _Unpickler(file).load():
        flat, numel = unpickler.storages[key], int.from_bytes(file.read(8), "little")
        flat.copy_(_flat(file.read(flat.numel() * flat.element_size()), flat.dtype, numel))
    return content
