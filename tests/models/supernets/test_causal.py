"""Causal supernets over clips: a frame sees no later one, and a subnet stepped frame by frame equals that over a clip.

TSM (arXiv 1811.08383): the online form moves an eighth of the channels from the frame before, all else as offline.
"""

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimray import models
from slimray.edge import cost
from slimray.models.supernets.elastic import ElasticDepthwise
from slimray.models.tsm import OnlineTSM, TemporalShift
from slimray.spec import parse
from slimray.verbs import networks
from slimray.verbs.shrink import ShrinkJob, stage_job

NETS = ("ofa_tsm_mobilenetv3", "ofa_tsm_resnet50")
SIDE = 32


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Use few threads, as inputs here are too small for more to be faster."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@torch.no_grad()
def small(name: str, **options: Any) -> Any:
    """A narrow supernet whose every weight matters."""
    torch.manual_seed(0)
    net: Any = models.build(name, num_classes=5, num_segments=8, preset="tiny", **{"causal": True} | options)
    for module in net.modules():
        if isinstance(module, ElasticDepthwise):
            for parameter in module.parameters(recurse=False):
                parameter += 0.1 * torch.randn_like(parameter)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.normal_(module.bias, 0, 0.3)
    return net


def clips(frames: int, count: int = 2) -> Tensor:
    return torch.randn(count, frames, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def settled(net: Any, arch: Any) -> Any:
    """The subnet `arch`, whose BatchNorms have seen clips."""
    net.train()(clips(arch["frames"], 3), arch)
    return net.eval().extract(arch)


def archs(net: Any) -> list[Any]:
    rng = random.Random(0)
    drawn = [net.space.sample(rng).replace(frames=frames) for frames in (8, 4, 2)]
    return [net.space.largest(), net.space.smallest(), *drawn]


def frame_logits(subnet: Any, x: Tensor) -> Tensor:
    """Return a subnet's logits for every frame, `[B, T, classes]`."""
    out = x.flatten(0, 1)
    for module in subnet.per_frame().values():
        out = module(out)
    return out.view(*x.shape[:2], -1)


@torch.no_grad()
@pytest.mark.parametrize("name", NETS)
def test_a_subnet_stepped_frame_by_frame_is_the_offline_causal_subnet(name):
    net = small(name)
    for arch in archs(net):
        subnet = settled(net, arch)
        x = clips(arch["frames"])
        torch.testing.assert_close(subnet(x), net(x, arch), rtol=1e-5, atol=1e-5)
        online, said = OnlineTSM(subnet), []
        buffers = online.initial_buffers(2, SIDE, SIDE)
        shifts = [module for module in subnet.modules() if isinstance(module, TemporalShift)]
        assert len(buffers) == len(shifts) > 0
        for frame in x.unbind(1):
            logits, buffers = online.step(frame, buffers)
            said.append(logits)
        offline = frame_logits(subnet, x)
        assert offline.std(1).min() > 1e-3  # the frames differ, so that a wrong buffer would show
        torch.testing.assert_close(torch.stack(said, 1), offline, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.stack(said, 1).mean(1), subnet(x), rtol=1e-4, atol=1e-5)
        assert online.state_dict().keys() == subnet.state_dict().keys()


@torch.no_grad()
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("causal", [True, False])
def test_no_frame_of_a_causal_subnet_sees_a_later_one(name, causal):
    net = small(name, causal=causal)
    subnet = settled(net, net.space.largest())
    assert subnet.causal is causal
    x = clips(8)
    later = x.clone()
    later[:, 5:] += 1
    gap = (frame_logits(subnet, x) - frame_logits(subnet, later)).abs().amax((0, 2))
    assert (gap[:5] == 0).all() if causal else (gap[4] > 1e-4)
    assert gap[5] > 1e-4
    earlier = x.clone()
    earlier[:, 2] += 1
    gap = (frame_logits(subnet, x) - frame_logits(subnet, earlier)).abs().amax((0, 2))
    assert gap[3] > 1e-4  # the next frame sees the past


def test_subnets_that_look_ahead_or_know_no_frames_have_no_online_form():
    net: Any = models.build("ofa_mobilenetv3", num_classes=5, preset="tiny")
    for other in (small(NETS[0], causal=False), net):
        with pytest.raises(ValueError, match="causal=True"):
            OnlineTSM(other.extract(other.space.largest()))


@torch.no_grad()
def test_an_exported_step_of_a_subnet_equals_the_eager_one():
    net = small(NETS[0])
    online = OnlineTSM(settled(net, net.space.smallest())).eval()
    buffers, frame = online.initial_buffers(1, SIDE, SIDE), torch.randn(1, 3, SIDE, SIDE)
    _, buffers = online(frame, buffers)
    program = torch.export.export(online, (frame, buffers))
    expected, after = online(frame + 1, buffers)
    found, ours = program.module()(frame + 1, buffers)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(ours, after, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NETS)
def test_measured_tables_of_nets_that_look_ahead_keep_their_units(name):
    def keys(**options: Any) -> list[str]:
        net: Any = cost.build_on_meta(lambda: models.build(name, num_classes=5, **options))
        return [unit.key for unit in net.units(net.space.largest())]

    ahead, causal = keys(), keys(causal=True)
    assert not any("causal" in key for key in ahead)
    assert [key.replace("-causal:1", "") for key in causal] == ahead
    assert sum("-causal:1" in key for key in causal) == sum("frames:8" in key for key in ahead) > 10


def test_a_shrink_job_trains_a_causal_supernet_whose_subnets_are_stored_as_causal():
    one = {"epochs": 1, "lr": 0.1}
    plain = {
        "kind": "shrink",
        "name": "net",
        "data": {"card": "my_clips", "size": 64},
        "model": {"name": NETS[0], "preset": "tiny", "num_segments": 8, "causal": True},
        "batch": {"total": 8, "per_worker": 8},
        "optim": {"reference_batch": 8},
        "stages": [one | {"name": "largest"}, one | {"name": "all", "free": {"depth": [2, 3]}}],
    }
    job = parse(ShrinkJob, plain, "x.yaml")
    options = networks.model_options(stage_job(job, 0, None), None)
    assert options["causal"] is True
    net: Any = cost.build_on_meta(lambda: models.build(**options))
    stored = {**options, "arch": net.space.smallest().to_dict()}  # as a search writes what it chose
    found: Any = cost.build_on_meta(lambda: models.build(**stored))
    assert found.causal
    assert cost.count_params(OnlineTSM(found)) == cost.count_params(found)
