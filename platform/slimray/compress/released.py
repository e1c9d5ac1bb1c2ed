"""Decoder of the compressed networks that the authors of Deep Compression released.

The files have no header and no alignment and are little endian: the number of entries of each layer, uint32; then,
layer by layer, its codebook (float32, 256 values for a convolution, 16 for a linear layer), its biases (float32), the
codes (8 or 4 bits, the first one in the low half) and the gaps (4 bits). The shapes come from the network, whose layers
are taken in the order in which they compute. Positions without an entry have code 0, which is 0.0 in these files.
Invalid data raises UserError before anything of a declared size is allocated.
"""

import numpy as np
import torch
from torch import nn

from slimray.compress import bitstreams
from slimray.compress.sparsity import LAYERS
from slimray.spec import UserError

GAP_BITS = 4
MAX_SHARE = 2  # most entries per weight on average, fillers included


def load(net: nn.Module, data: bytes, where: str) -> dict[str, tuple[int, int]]:
    """Load the weights of a released file into `net`; return (entries, weights) of each layer.

    Raises UserError, with `where`, for a file that is not exactly of this network; `net` is then unchanged.
    """
    layers = {name: one for name, one in net.named_modules() if isinstance(one, LAYERS)}
    try:
        found = read(data, [(one.weight.shape, isinstance(one, nn.Linear)) for one in layers.values()])
    except ValueError as error:
        raise UserError(f"{where}: is not a released file of this network ({error})") from None
    for layer in layers.values():
        if layer.bias is None:
            raise UserError(f"{where}: needs a network whose layers have biases")
    with torch.no_grad():
        for layer, (weight, bias, _) in zip(layers.values(), found, strict=True):
            layer.weight.copy_(torch.from_numpy(weight))
            layer.bias.copy_(torch.from_numpy(bias))  # type: ignore[union-attr]
    return {name: (count, one.weight.numel()) for (name, one), (_, _, count) in zip(layers.items(), found, strict=True)}


def read(
    data: bytes, layers: list[tuple[torch.Size | tuple[int, ...], bool]]
) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Return weights and biases (float32) and the number of entries of each of `layers` (shape, True if linear).

    Raises ValueError for a file of another size, or whose indices exceed a layer.
    """
    at = 4 * len(layers)
    if len(data) < at:
        raise ValueError(f"{len(data):,} bytes are too few for {len(layers)} layers")
    counts = np.frombuffer(data[:at], "<u4").tolist()
    out = []
    for (shape, linear), count in zip(layers, counts, strict=True):
        size, codes, code_bits = int(np.prod(shape)), (16 if linear else 256), (4 if linear else 8)
        sizes = [4 * codes, 4 * shape[0], (count * code_bits + 7) // 8, (count * GAP_BITS + 7) // 8]
        if count > MAX_SHARE * size or at + sum(sizes) > len(data):
            raise ValueError(
                f"a layer of {size:,} weights with {count:,} entries does not fit into {len(data):,} bytes"
            )
        parts = []
        for length in sizes:
            parts.append(data[at : at + length])
            at += length
        book, bias = np.frombuffer(parts[0], "<f4"), np.frombuffer(parts[1], "<f4")
        symbols = bitstreams.unpack(parts[2], code_bits, count)
        positions = bitstreams.to_positions(bitstreams.unpack(parts[3], GAP_BITS, count), size)
        flat = np.full(size, book[0], np.float32)
        flat[positions] = book[symbols]
        out.append((flat.reshape(tuple(shape)), bias.copy(), count))
    if at != len(data):
        raise ValueError(f"it holds {len(data) - at:,} bytes more than its layers")
    return out
