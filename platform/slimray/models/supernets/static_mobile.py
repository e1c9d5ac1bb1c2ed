"""Published static networks with the blocks of ofa_mobilenet.py: MobileNetV3-Large, and those found by ProxylessNAS.

ProxylessNAS (arXiv 1812.00332), MobileNetV3 (1905.02244): `[B, 3, H, W]` -> `[B, num_classes]`, names as released.
"""

from slimray.models.supernets.elastic import make_divisible
from slimray.models.supernets.ofa_mobilenet import (
    PROXYLESS,
    MBConv,
    by_channels,
    end_parts,
    first_block,
    middle_channels,
)
from slimray.models.supernets.supernet import ConvNorm, Nothing, Part, Subnet, make_subnet

# Channels of the stem, the first block, the stages and the last layer; the blocks of the stages as "kernel/expansion",
# with "-" for a block that is only its shortcut.
PROXYLESS_NETS: dict[str, tuple[tuple[int, ...], str]] = {
    "mobile": (
        (32, 16, 32, 40, 80, 96, 192, 320, 1280),
        "5/3 3/3 - -, 7/3 3/3 5/3 5/3, 7/6 5/3 5/3 5/3, 5/6 5/3 5/3 5/3, 7/6 7/6 7/3 7/3, 7/6",
    ),
    "cpu": (
        (40, 24, 32, 48, 88, 104, 216, 360, 1432),
        "3/6 3/3 3/3 3/3, 3/6 3/3 3/3 5/3, 3/6 - - 3/3, 5/6 3/3 3/3 3/3, 5/6 5/3 5/3 3/3, 5/6",
    ),
    "gpu": (
        (40, 24, 32, 56, 112, 128, 256, 432, 1728),
        "5/3 - - -, 7/3 - - 3/3, 7/6 - - 5/3, 5/6 - 3/3 5/3, 7/6 7/6 7/6 5/6, 7/6",
    ),
    "mobile_14": (
        (48, 24, 40, 56, 112, 136, 256, 448, 1792),
        "5/3 3/3 - -, 7/3 3/3 5/3 5/3, 7/6 5/3 5/3 5/3, 5/6 5/3 5/3 5/3, 7/6 7/6 7/3 7/3, 7/6",
    ),
}
# kernel, middle, outputs, SE, activation, stride of MobileNetV3-Large (arXiv 1905.02244, table 1)
MOBILENETV3_LARGE = (
    (3, 16, 16, False, "relu", 1),
    (3, 64, 24, False, "relu", 2),
    (3, 72, 24, False, "relu", 1),
    (5, 72, 40, True, "relu", 2),
    (5, 120, 40, True, "relu", 1),
    (5, 120, 40, True, "relu", 1),
    (3, 240, 80, False, "h_swish", 2),
    (3, 200, 80, False, "h_swish", 1),
    (3, 184, 80, False, "h_swish", 1),
    (3, 184, 80, False, "h_swish", 1),
    (3, 480, 112, True, "h_swish", 1),
    (3, 672, 112, True, "h_swish", 1),
    (5, 672, 160, True, "h_swish", 2),
    (5, 960, 160, True, "h_swish", 1),
    (5, 960, 160, True, "h_swish", 1),
)


def proxyless_net(
    net: str, num_classes: int, width: float = 1.0, dropout: float = 0.0, shortcuts: str = "defined"
) -> Subnet:
    """Build a network found by ProxylessNAS (arXiv 1812.00332): `mobile`, `cpu`, `gpu` or `mobile_14`."""
    widths, text = PROXYLESS_NETS[net]
    stem, first, *stages, last = (make_divisible(channels * width) for channels in widths)
    eps, act = PROXYLESS.eps, PROXYLESS.act
    parts: dict[str, Part] = {
        "first_conv": ConvNorm(3, stem, 3, 2, act, eps=eps),
        "blocks.0": first_block(stem, first, act, eps, by_channels(shortcuts)),
    }
    channels = first
    for outputs, stage, blocks in zip(stages, PROXYLESS.stages, text.split(","), strict=True):
        for i, code in enumerate(blocks.split()):
            part: Part = Nothing()
            if code != "-":
                kernel, expand = map(int, code.split("/"))
                stride = 1 if i else stage.stride
                part = MBConv(channels, middle_channels(channels, expand), outputs, kernel, stride, act, False, eps=eps)
            parts[f"blocks.{len(parts) - 1}"] = part
            channels = outputs
    return make_subnet(parts | end_parts(channels, 0, last, act, eps, num_classes, dropout), "first_conv.conv")


def mobilenetv3_large(num_classes: int, width: float = 1.0, dropout: float = 0.1) -> Subnet:
    """Build MobileNetV3-Large, the baseline for the supernet of its blocks."""
    stem = channels = make_divisible(16 * width)
    parts: dict[str, Part] = {"first_conv": ConvNorm(3, stem, 3, 2, "h_swish")}
    for kernel, middle, outputs, se, act, stride in MOBILENETV3_LARGE:
        expands = len(parts) > 1
        inner, channels_out = make_divisible(middle * width) if expands else channels, make_divisible(outputs * width)
        block = MBConv(channels, inner, channels_out, kernel, stride, act, se, expands)
        parts[f"blocks.{len(parts) - 1}"] = block
        channels = channels_out
    expand, last = make_divisible(960 * width), make_divisible(1280 * width)
    return make_subnet(
        parts | end_parts(channels, expand, last, "h_swish", 1e-5, num_classes, dropout), "first_conv.conv"
    )
