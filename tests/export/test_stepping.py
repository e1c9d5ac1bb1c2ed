"""A causal TSM stepped in a runtime equals the offline network in torch, frame by frame of a real video."""

import copy
import random
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.export import networks
from torch import Tensor, nn

from slimray import models
from slimray.data.video.movies import open_video
from slimray.export import graph
from slimray.export.formats import FORMATS
from slimray.runtime.inputs import Input, to_input

FRAMES, SIDE, CLASSES = 64, 64, 5
NETWORKS = {
    "tsm_mobilenetv2": {"width": 0.25},
    "tsm_resnet18": {"width": 0.25},
    "tsm_resnet50": {"width": 0.5},
    "ofa_tsm_mobilenetv3": {"preset": "tiny"},
    "ofa_tsm_resnet50": {"preset": "tiny"},
}
QUICK = [("tsm_mobilenetv2", "onnx"), ("tsm_mobilenetv2", "openvino")]  # the others: make soak
STEPPED = [name for name, row in FORMATS.items() if row.precision == "fp32"]


def video(path: Path) -> Tensor:
    """Return the first frames of a video as a clip `[1, FRAMES, 3, SIDE, SIDE]`."""
    with open_video(path.read_bytes()) as opened:
        pictures = opened.frames(list(range(FRAMES)))
    frames = np.stack([np.asarray(Image.fromarray(one).resize((SIDE, SIDE))) for one in pictures])
    return torch.from_numpy(to_input(frames[None, None], Input()))


def of_each_frame(net: nn.Module, clip: Tensor) -> Tensor:
    """Return the logits `[FRAMES, CLASSES]` whose mean is the offline network's output."""
    logits = clip.flatten(0, 1)
    for module in net.per_frame().values():
        logits = module(logits)
    torch.testing.assert_close(logits.mean(0, keepdim=True), net(clip))
    return logits


@cache
@torch.no_grad()
def offline(name: str, path: Path) -> tuple[graph.Graph, Tensor, Tensor, Tensor]:
    """Return the step of a causal network, a video, and the network's logits on all of it, in float32 and float64."""
    torch.manual_seed(0)
    clip = video(path)
    net = models.build(name, num_classes=CLASSES, num_segments=FRAMES, causal=True, **NETWORKS[name])
    if models.MODELS[name].supernet:
        net = net.extract(net.space.sample(random.Random(0)).replace(frames=FRAMES))
    net = networks.ready(net, clip)
    exact = of_each_frame(copy.deepcopy(net).double(), clip.double())
    return graph.step(net, clip, "online"), clip[0], of_each_frame(net, clip), exact


@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(name, form, marks=() if (name, form) in QUICK else pytest.mark.benchmark)
        for name in NETWORKS
        for form in STEPPED
    ],
)
def test_each_of_64_frames_gets_the_logits_that_the_offline_network_gives_it(name, form, shared, tmp_path):
    one, frames, rounded, exact = offline(name, shared / "data/video/mmaction2_samples/demo/demo.mp4")
    row = FORMATS[form]
    networks.require_converter(row)
    row.require(form)
    row.convert(one, tmp_path, ())
    run = row.load(tmp_path / row.file, 1, True)
    zeros = [np.zeros(state.shape, np.float32) for state in one.states]
    states, found, alone = zeros, [], []
    for frame in frames.numpy():
        logits, *states = run([frame[None], *states])
        found.append(logits[0])
        alone.append(run([frame[None], *zeros])[0][0])
    assert all(np.any(state) for state in states)
    for number, logits in enumerate(found):
        assert networks.gap(logits, exact[number]) < networks.bound(rounded[number], exact[number])
        if number > 0:
            apart = networks.gap(alone[number], exact[number])
            assert apart > 10 * networks.RELATIVE, "every frame depends on those before it"
