"""LeNets and SqueezeNet: sizes as in the papers, input shapes, and published weights of SqueezeNet."""

import pytest
import torch

from slimray import models
from slimray.compress import released
from slimray.spec import UserError


@pytest.mark.parametrize(
    ("name", "classes", "count"), [("lenet300", 10, 266_610), ("lenet5", 10, 431_080), ("squeezenet", 1000, 1_248_424)]
)
def test_networks_have_as_many_weights_as_published(name, classes, count):
    assert sum(p.numel() for p in models.build(name, num_classes=classes).parameters()) == count


@pytest.mark.parametrize(("name", "channels", "side"), [("lenet300", 3, 20), ("lenet5", 1, 16), ("squeezenet", 1, 64)])
def test_channels_and_sides_are_options(name, channels, side):
    options = {"side": side} if "side" in models.options_of(name) else {}
    net = models.build(name, num_classes=7, in_channels=channels, **options).eval()
    assert net(torch.randn(2, channels, side, side)).shape == (2, 7)


def test_a_picture_that_is_too_small_is_one_sentence():
    with pytest.raises(UserError, match="side: must be at least 16"):
        models.build("lenet5", num_classes=10, side=12)


def test_the_released_file_of_deep_compression_fits_squeezenet(shared):
    net = models.build("squeezenet", num_classes=1000)
    data = (shared / "data/models/squeezenet_deep_compression/compressed_SqueezeNet.net").read_bytes()
    assert len(released.load(net, data, "squeezenet")) == 26
    net.eval()
    with torch.no_grad():
        assert torch.isfinite(net(torch.randn(1, 3, 224, 224))).all()
