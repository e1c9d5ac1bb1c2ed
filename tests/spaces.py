"""The published spaces of MobileNetV3 and ResNet-50 (arXiv 1908.09791), without any network."""

from slimray.arch import Dimension, Space, Stage

MOBILE = Space.of(
    {
        "kernel": Dimension.per_block([(3, 5, 7)] * 20),
        "expand": Dimension.per_block([(3, 4, 6)] * 20),
        "depth": Dimension.depth([(2, 3, 4)] * 5, [Stage(4)] * 5),
        "resolution": Dimension.number(range(128, 225, 4), input="side"),
    }
)
RESNET = Space.of(
    {
        "depth": Dimension.depth(
            [(0, 2), *[(0, 1, 2)] * 4], [Stage(0), Stage(4, 2), Stage(4, 2), Stage(6, 4), Stage(4, 2)]
        ),
        "expand": Dimension.per_block([(0.2, 0.25, 0.35)] * 18),
        "width": Dimension.per_stage([(0, 1, 2)] * 6),
    }
)
