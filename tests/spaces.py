"""The published spaces of MobileNetV3 and ResNet-50 (arXiv 1908.09791), without any network."""

from slimray.arch import Space, Stage

MOBILE = Space.of(
    {
        "kernel": [(3, 5, 7)] * 20,
        "expand": [(3, 4, 6)] * 20,
        "depth": [(2, 3, 4)] * 5,
        "resolution": [tuple(range(128, 225, 4))],
    },
    [Stage(4)] * 5,
)
RESNET = Space.of(
    {"depth": [(0, 2), *[(0, 1, 2)] * 4], "expand": [(0.2, 0.25, 0.35)] * 18, "width": [(0, 1, 2)] * 6},
    [Stage(0), Stage(4, 2), Stage(4, 2), Stage(6, 4), Stage(4, 2)],
)
