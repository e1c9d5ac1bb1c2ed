"""Compression: makes a smaller module of a module, and rebuilds compressed networks from plain records."""

from slimray.compress.pruning import Pruned, prune
from slimray.compress.quantization import quantize, sensitivity, size_mb
from slimray.compress.rebuild import build, rebuild, shaping

__all__ = ["Pruned", "build", "prune", "quantize", "rebuild", "sensitivity", "shaping", "size_mb"]
