"""The float weights of a TFLite file as torch layers: chains of convolutions, an average, a linear layer."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

CONV, DEPTHWISE, LINEAR = 3, 4, 9  # operators of a TFLite file


class Table:
    """A table of a TFLite file (a flatbuffer): its fields by their place in the schema."""

    def __init__(self, data: bytes, place: int):
        from flatbuffers.table import Table as Inner

        self.inner = Inner(data, place)

    def tables(self, field: int) -> list["Table"]:
        start, count = self._vector(field)
        return [Table(self.inner.Bytes, self.inner.Indirect(start + 4 * number)) for number in range(count)]

    def numbers(self, field: int, kind: type = np.int32) -> np.ndarray:
        start, count = self._vector(field)
        return np.frombuffer(self.inner.Bytes, kind, count, start)

    def number(self, field: int, kind: type) -> int:
        offset = self.inner.Offset(4 + 2 * field)
        return int(np.frombuffer(self.inner.Bytes, kind, 1, self.inner.Pos + offset)[0]) if offset else 0

    def _vector(self, field: int) -> tuple[int, int]:
        offset = self.inner.Offset(4 + 2 * field)
        return (self.inner.Vector(offset), self.inner.VectorLen(offset)) if offset else (0, 0)


def layers(data: bytes) -> Iterator[nn.Module]:
    """The layers of a chain of convolutions with ReLU, an average over the picture, and a linear layer."""
    model = Table(data, int(np.frombuffer(data, np.uint32, 1)[0]))
    codes = [max(code.number(0, np.int8), code.number(3, np.int32)) for code in model.tables(1)]
    buffers, (whole,) = model.tables(4), model.tables(2)
    tensors = whole.tables(0)

    def read(number: int) -> Tensor:
        values = np.frombuffer(buffers[tensors[number].number(2, np.uint32)].numbers(0, np.uint8).tobytes(), np.float32)
        return torch.from_numpy(values.reshape(tensors[number].numbers(0)).copy())

    for operator in whole.tables(3):
        code, given = codes[operator.number(0, np.uint32)], operator.numbers(1)
        if code == LINEAR:
            weight, bias = read(given[1]), read(given[2])
            layer: nn.Module = nn.Linear(weight.shape[1], weight.shape[0])
            yield from (nn.AdaptiveAvgPool2d(1), nn.Flatten())
        elif code in (CONV, DEPTHWISE):
            weight, bias = read(given[1]).movedim(-1, 1), read(given[2])  # of [out, h, w, in] or [1, h, w, channels]
            groups = len(bias) if code == DEPTHWISE else 1
            weight = weight.transpose(0, 1) if code == DEPTHWISE else weight
            sides = [int(tensors[number].numbers(0)[1]) for number in (given[0], operator.numbers(2)[0])]
            kernel, stride = weight.shape[-1], sides[0] // sides[1]
            rest = max((sides[1] - 1) * stride + kernel - sides[0], 0)  # "SAME": the odd one below and to the right
            before, after = rest // 2, rest - rest // 2
            yield nn.ZeroPad2d((before, after, before, after))
            layer = nn.Conv2d(weight.shape[1] * groups, len(bias), kernel, stride, groups=groups)
        else:
            continue
        with torch.no_grad():
            layer.weight.copy_(weight)  # type: ignore[union-attr,operator]
            layer.bias.copy_(bias)  # type: ignore[union-attr,operator]
        yield layer
        if code != LINEAR:
            yield nn.ReLU()
