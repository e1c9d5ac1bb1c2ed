"""Weight sharing: each weight of a layer has one of a few values, its codebook (Deep Compression, arXiv 1510.00149).

`share` finds a codebook per layer by k-means, initialised evenly over the range of the kept weights (the best of the
paper's three initialisations), and replaces every kept weight by its nearest centroid; zeros stay zero. In training the
gradient of a centroid is the sum of those of its weights: `Tied` takes the codebooks from the weights themselves, where
equal values are one centroid, so that a resumed run needs no further state.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slimray.compress.codebooks import kmeans, nearest
from slimray.compress.sparsity import Masks, by_layer, layers_of


@torch.no_grad()
def share(net: nn.Module, bits: Mapping[str, int]) -> dict[str, Any]:
    """Give each layer named in `bits` a codebook of at most 2**bits - 1 values besides zero; return the record.

    Changes `net` in place. The record holds the bits and the number of used values of each layer. Raises UserError for
    a name that is not a layer.
    """
    by_layer(net, bits, "bits")
    record: dict[str, Any] = {"step": "share", "bits": dict(bits), "values": {}}
    for name, weight in layers_of(net).items():
        if name not in bits:
            continue
        flat = weight.detach().cpu().float().numpy().reshape(-1)
        kept = flat[flat != 0]
        centroids = kmeans(kept, 2 ** bits[name] - 1)
        shared = flat.copy()
        shared[flat != 0] = centroids.astype(np.float32)[nearest(kept, centroids)]
        weight.copy_(torch.from_numpy(shared).view(weight.shape).to(weight))
        record["values"][name] = len(np.unique(shared[shared != 0]))
    return record


@torch.no_grad()
def codebooks(net: nn.Module, layers: Iterable[str]) -> dict[str, list[tuple[float, int]]]:
    """Return the values of each layer, ascending and without zero, and how many of its weights have each value.

    Layers that `net` no longer has, for example because they are quantized, are left out.
    """
    out, found = {}, layers_of(net)
    for name in layers:
        if name in found:
            values, counts = torch.unique(found[name].detach().float(), return_counts=True)
            out[name] = [(float(v), int(n)) for v, n in zip(values, counts, strict=True) if v != 0]
    return out


class Tied(Masks):
    """Training constraint for shared weights: zeros stay zero, and equal weights of a layer stay equal."""

    def __init__(self, net: nn.Module, layers: tuple[str, ...]):
        super().__init__(net)
        found = layers_of(net)
        self.codes: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for name in layers:
            weight = found[name]
            values, codes = torch.unique(weight.detach().reshape(-1), return_inverse=True)
            places = torch.arange(len(codes), device=codes.device)
            first = torch.full_like(values, len(codes), dtype=torch.int64).scatter_reduce(0, codes, places, "amin")
            self.codes[name] = (codes, first, values != 0)
        self.weights = {name: found[name] for name in layers}

    @torch.no_grad()
    def before_step(self) -> None:
        """Give every weight the summed gradient of its centroid, so that all of them change together."""
        for name, weight in self.weights.items():
            if weight.grad is None:
                continue
            codes, _, used = self.codes[name]
            sums = torch.zeros(len(used), dtype=weight.dtype, device=weight.device)
            sums.index_add_(0, codes, weight.grad.reshape(-1))
            weight.grad.copy_((sums * used)[codes].view(weight.shape))

    @torch.no_grad()
    def after_step(self) -> None:
        """Make shared weights equal to the last bit, regardless of the optimizer's order of computation."""
        super().after_step()
        for name, weight in self.weights.items():
            codes, first, _ = self.codes[name]
            flat = weight.reshape(-1)
            weight.copy_(flat[first][codes].view(weight.shape))
