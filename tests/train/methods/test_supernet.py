"""A step on subnets is exact whatever the number of ranks: real gloo processes against one process."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.ranks import run_ranks

from slimray import models
from slimray.arch import Dimension, Space
from slimray.tasks.network import Input, to_input
from slimray.train import learn
from slimray.train.methods.method import Piece, Setup
from slimray.train.methods.supernet import Supernet, SupernetReplica
from slimray.train.spec import OptimSpec

OPTIM = OptimSpec(lr=0.1, reference_batch=8, epochs=1, groups="plain", clip_norm=None, weight_decay=0.0)
SHAPE, SIDE = (3, 32, 32), 32
CUTS = {
    "two ranks of 4": [[(0, 4)], [(4, 8)]],
    "a rank without samples": [[(0, 6)], [(6, 6)]],
    "accumulated, last piece empty": [[(0, 2), (2, 4)], [(4, 6), (6, 6)]],
}


def make(rank: int = 0, world: int = 1, sandwich: bool = True) -> SupernetReplica:
    torch.manual_seed(0)
    net = models.build("ofa_mobilenetv3", num_classes=5, preset="tiny", dropout=0.0)
    teacher = models.build("ofa_mobilenetv3", num_classes=5, preset="tiny", dropout=0.0)
    method = Supernet(net.space, 3, sandwich)
    return SupernetReplica(net, method, teacher, Setup(OPTIM, Input(), SHAPE, torch.device("cpu"), rank, world))


def freeze_norms(replica: SupernetReplica) -> None:
    """Running BatchNorm statistics: the output of a sample does not depend on its batch, so ranks can be compared."""
    replica.optim = replica.optim.model_copy(update={"norm": "frozen"})
    for module in replica.teacher.modules():
        module.eval()


def one_step(rank: int, world: int, cuts: list[list[tuple[int, int]]]) -> dict[str, torch.Tensor]:
    torch.set_default_dtype(torch.float64)
    rng = np.random.default_rng(0)
    data, labels = rng.integers(0, 256, (8, 1, SIDE, SIDE, 3), dtype=np.uint8), rng.integers(0, 5, 8)
    replica = make(rank, world)
    freeze_norms(replica)
    pieces = [Piece(data[lo:hi], labels[lo:hi]) for lo, hi in cuts[rank]]
    count = sum(hi - lo for cut in cuts for lo, hi in cut)
    report = replica.step(pieces, count, 0.1, (7, 3))
    assert report.finite
    return {k: v.clone() for k, v in replica.net.state_dict().items()}


def rank_of_two(rank: int, case: str, out: str) -> None:
    torch.save(one_step(rank, 2, CUTS[case]), f"{out}/{rank}.pt")


@pytest.mark.parametrize("case", CUTS)
def test_two_ranks_train_subnets_as_one_does(case: str, tmp_path: Path):
    run_ranks(rank_of_two, case, str(tmp_path))
    try:
        alone = one_step(0, 1, [[cut for rank in CUTS[case] for cut in rank if cut[0] < cut[1]]])
    finally:
        torch.set_default_dtype(torch.float32)
    start = make().net.state_dict()
    moved = [name for name, value in alone.items() if not torch.equal(value.float(), start[name])]
    assert len(moved) > 50
    for rank in (0, 1):
        together = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in alone.items():
            torch.testing.assert_close(together[name], value, rtol=1e-9, atol=1e-12)


def test_subnets_of_a_step_are_a_function_of_seed_and_step():
    space = models.build("ofa_mobilenetv3", num_classes=5, preset="tiny").space
    method = Supernet(space, 4, sandwich=True)
    assert method.draw((0, 5)) == method.draw((0, 5))
    assert method.draw((0, 5)) != method.draw((0, 6))
    archs = method.draw((0, 5))
    assert len({arch["resolution"] for arch in archs}) == 1
    assert archs[0] == space.largest().replace(resolution=archs[0]["resolution"])
    assert archs[-1] == space.smallest().replace(resolution=archs[0]["resolution"])


def test_gradients_of_subnets_add_up_and_the_teacher_is_left_alone():
    replica = make(sandwich=False)
    freeze_norms(replica)
    start = {name: value.clone() for name, value in replica.net.named_parameters()}
    teacher = {name: value.clone() for name, value in replica.teacher.named_parameters()}
    rng = np.random.default_rng(1)
    data, labels = rng.integers(0, 256, (4, 1, SIDE, SIDE, 3), dtype=np.uint8), rng.integers(0, 5, 4)
    net = copy.deepcopy(replica.net).eval()
    targets, archs = torch.from_numpy(labels), replica.method.draw((0, 0))
    x = learn.fit_input(to_input(data, Input(), torch.device("cpu")), net.space, archs[0])
    with torch.no_grad():
        given = replica.teacher(x).softmax(1)
    for arch in archs:
        logits = net(x, arch)
        loss = torch.nn.functional.cross_entropy(logits, targets) - (given * logits.log_softmax(1)).sum(1).mean()
        loss.backward()
    replica.step([Piece(data, labels)], 4, 0.1, (0, 0))
    moved = dict(replica.net.named_parameters())
    for name, parameter in net.named_parameters():
        step = torch.zeros_like(parameter) if parameter.grad is None else 0.1 * parameter.grad
        torch.testing.assert_close(moved[name], start[name] - step, rtol=1e-4, atol=1e-5)
    assert sum(not torch.equal(moved[name], start[name]) for name in start) > 50
    assert all(torch.equal(value, teacher[name]) for name, value in replica.teacher.named_parameters())
    assert all(parameter.grad is None for parameter in replica.teacher.parameters())


def test_inputs_are_made_as_an_arch_takes_them():
    images, clips = torch.rand(2, 3, 32, 32), torch.rand(2, 8, 3, 32, 32)
    side = Dimension.number((16, 20, 32), input="side")
    of_images = Space.of({"resolution": side})
    of_clips = Space.of({"resolution": side, "frames": Dimension.number((2, 4, 8), input="frames")})
    assert learn.fit_input(images, of_images, of_images.arch({"resolution": 20})).shape == (2, 3, 20, 20)
    assert learn.fit_input(images, of_images, of_images.arch({"resolution": 32})) is images
    small = learn.fit_input(clips, of_clips, of_clips.arch({"resolution": 16, "frames": 2}))
    assert small.shape == (2, 2, 3, 16, 16)
    kept = learn.fit_input(clips, of_clips, of_clips.arch({"resolution": 32, "frames": 4}))
    assert torch.equal(kept, clips[:, [1, 3, 5, 7]])
    cloud, of_clouds = torch.rand(2, 3, 64), Space.of({"voxel": Dimension.per_stage([(0.5, 1.0)])})
    assert learn.fit_input(cloud, of_clouds, of_clouds.largest()) is cloud
