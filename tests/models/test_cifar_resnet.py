"""CIFAR ResNets: their sizes, the shortcut without weights, and published weights on real pictures."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from slimray import models
from slimray.data.images.pictures import ImageRecipe, make_image
from slimray.edge import cost
from slimray.models import published
from slimray.models.cifar_resnet import PadShortcut
from slimray.tasks.network import Input, predict_outputs

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "params", "macs"), [("resnet20", 269_722, 40_551_040), ("resnet56", 853_018, 125_485_696)]
)
def test_counts_are_those_of_the_paper(name, params, macs):
    net = models.build(name, num_classes=10)
    assert cost.count_params(net) == params
    assert cost.count_macs(net, (1, 3, 32, 32)) == macs


def test_a_shortcut_takes_every_second_pixel_and_adds_zeros_to_both_sides():
    x = torch.arange(1.0, 33).view(1, 2, 4, 4)
    out = PadShortcut(1, 2, 2)(x)
    assert out.shape == (1, 5, 2, 2)
    assert out[0, 1].tolist() == [[1, 3], [9, 11]]
    assert out[0, [0, 3, 4]].abs().sum() == 0


def test_widths_are_multiples_of_eight_and_one_channel_will_do():
    net = models.build("resnet20", num_classes=3, width=0.5, in_channels=1).eval()
    assert net.conv1.weight.shape[:2] == (8, 1)
    assert net(torch.zeros(2, 1, 32, 32)).shape == (2, 3)


def test_published_weights_answer_as_published(shared):
    """457 of the first 500 test pictures (91.73 % of all 10,000: tests/benchmarks), read and normalised by us."""
    folder = shared / "data/images/cifar10_lossless"
    pictures = np.asarray(Image.open(folder / "test_500.png").convert("RGB")).reshape(-1, 32, 32, 3)
    labels = torch.tensor(json.loads((folder / "test_500_labels.json").read_text()))
    net = models.build("resnet20", num_classes=10).eval()
    weights = shared / "data/models/cifar10_resnet_akamaster/resnet20-12fca82f.th"
    report = published.load(net, weights)
    assert (report.missing, report.dropped) == ([], {})
    recipe = ImageRecipe(32, 32, "val")
    views = np.stack([make_image(picture, recipe, None)[0] for picture in pictures])  # type: ignore[arg-type]
    right = predict_outputs(net, views, Input(), CPU, 250).argmax(1) == labels
    assert int(right.sum()) == 457
