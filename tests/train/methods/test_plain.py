"""A step is exact whatever the number of ranks: real gloo processes against one process."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.ranks import run_ranks
from torch import nn

from slimray.data.plan import Phase
from slimray.tasks.classify import CLASSIFY
from slimray.tasks.network import Input, to_input
from slimray.train import batchnorm
from slimray.train.methods.method import Piece, Setup
from slimray.train.methods.mutual import Mutual
from slimray.train.methods.plain import PlainReplica
from slimray.train.spec import OptimSpec

OPTIM = OptimSpec(lr=0.1, reference_batch=8, epochs=1, groups="plain", clip_norm=None, weight_decay=0.0)
SHAPE = (2, 3, 8, 8)


class Plain(nn.Module):
    """Convolution and classifier without BatchNorm: `[B, T, 3, H, W]` -> `[B, 4]`."""

    head_name, first_conv_name = "head", "conv"

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 5, 3), nn.Linear(5, 4)

    def forward(self, x):
        features = torch.relu(self.conv(x.flatten(0, 1))).mean((2, 3))
        return self.head(features).view(len(x), -1, 4).mean(1)


def samples(num: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    t, c, h, w = SHAPE
    return rng.integers(0, 256, (num, 1, t, h, w, c), dtype=np.uint8), rng.integers(0, 4, num)


def make(rank: int = 0, world: int = 1, compress: str = "none") -> PlainReplica:
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    return PlainReplica(Plain().double(), Setup(OPTIM, Input(), SHAPE, cpu, rank, world, compress=compress))


def one_step(
    rank: int, world: int, cuts: list[list[tuple[int, int]]], num: int, compress: str = "none"
) -> dict[str, torch.Tensor]:
    torch.set_default_dtype(torch.float64)
    data, labels = samples(num)
    replica = make(rank, world, compress)
    pieces = [Piece(data[lo:hi], labels[lo:hi]) for lo, hi in cuts[rank]]
    replica.step(pieces, num, 0.1, (0, 0))
    return {k: v.clone() for k, v in replica.net.state_dict().items()}


CASES = {
    "two ranks of 4": ([[(0, 4)], [(4, 8)]], 8),
    "uneven: 5 and 2": ([[(0, 5)], [(5, 7)]], 7),
    "a rank without samples": ([[(0, 3)], [(3, 3)]], 3),
    "accumulated, last piece empty": ([[(0, 2), (2, 4)], [(4, 6), (6, 6)]], 6),
}


def rank_of_two(rank: int, case: str, out: str, compress: str) -> None:
    cuts, num = CASES[case]
    torch.save(one_step(rank, 2, cuts, num, compress), f"{out}/{rank}.pt")


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_take_the_step_of_one(case: str, tmp_path: Path):
    alone, together = alone_and_together(case, tmp_path)
    for ours in together:
        for name, value in alone.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-13)


def test_gradients_sent_as_bf16_are_rounded_to_bf16_and_alike_on_all_ranks(tmp_path: Path):
    alone, together = alone_and_together("two ranks of 4", tmp_path, "bf16")
    start = make().net.state_dict()
    for name, value in alone.items():
        assert torch.equal(together[0][name], together[1][name])
        exact, sent = value - start[name], together[0][name] - start[name]
        assert not torch.equal(exact, sent)
        assert (exact - sent).norm() < 2**-7 * exact.norm()


def alone_and_together(case: str, tmp_path: Path, compress: str = "none") -> tuple[dict, list[dict]]:
    """Return the weights after one step of one process, and those after one step of two ranks."""
    run_ranks(rank_of_two, case, str(tmp_path), compress)
    cuts, num = CASES[case]
    default = torch.get_default_dtype()
    try:
        alone = one_step(0, 1, [[cut for rank in cuts for cut in rank if cut[0] < cut[1]]], num)
    finally:
        torch.set_default_dtype(default)
    return alone, [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_peers_learn_from_each_other_and_the_first_is_kept():
    torch.manual_seed(3)
    data, labels = samples(4)
    replica = Mutual(1.0).replica(Plain(), Plain, Setup(OPTIM, Input(), SHAPE, torch.device("cpu")))
    start = copy.deepcopy(replica.net)
    replica.step([Piece(data, labels)], 4, 0.1, (0, 0))
    assert isinstance(replica.averaged(), Plain)
    clips, targets = to_input(data, Input(), torch.device("cpu")), torch.from_numpy(labels)
    own, other = start.first(clips), start.second(clips).detach()
    loss = nn.functional.cross_entropy(own, targets)
    loss = loss + (other.softmax(1) * (other.log_softmax(1) - own.log_softmax(1))).sum(1).mean()
    (gradient,) = torch.autograd.grad(loss, start.first.head.weight)
    expected = start.first.head.weight - 0.1 * gradient
    torch.testing.assert_close(replica.net.first.head.weight, expected, atol=1e-6, rtol=1e-5)
    assert not torch.equal(replica.net.second.head.weight, start.second.head.weight)


def test_state_goes_round_bit_for_bit():
    data, labels = samples(8)
    optim = OptimSpec(lr=0.1, reference_batch=8, epochs=1, ema=0.9)
    setup = Setup(optim, Input(), SHAPE32, torch.device("cpu"))
    first = PlainReplica(_tsm(), setup)
    data = np.repeat(np.repeat(data, 4, 3), 4, 4)
    first.step([Piece(data[:4], labels[:4])], 4, 0.1, (0, 0))
    state = {k: v.clone() for k, v in first.tensors().items()}
    second = PlainReplica(_tsm(seed=1), setup)
    second.load(state)
    for replica in (first, second):
        replica.step([Piece(data[4:], labels[4:])], 4, 0.1, (0, 1))
    for name, value in first.tensors().items():
        assert torch.equal(value, second.tensors()[name]), name


SHAPE32 = (2, 3, 32, 32)
TSM = {"name": "tsm_resnet18", "num_classes": 4, "num_segments": 2, "width": 0.125}


def _tsm(seed: int = 0) -> nn.Module:
    from slimray import models

    torch.manual_seed(seed)
    return models.build(**TSM)


IMAGES = TSM | {"num_segments": 1}
SHAPE_OF_ONE = (1, 3, 32, 32)


def test_a_lone_sample_leaves_the_statistics_of_layers_that_see_one_value_alone():
    """At this size the last stage of a ResNet sees one pixel."""
    from slimray import models

    torch.manual_seed(0)
    net = models.build(**IMAGES)
    lone = [module for name, module in net.named_modules() if "layer4" in name and isinstance(module, nn.BatchNorm2d)]
    for module in lone:
        nn.init.constant_(module.running_var, 2.0)
    replica = PlainReplica(net, Setup(OPTIM, Input(), SHAPE_OF_ONE, torch.device("cpu")))
    data = np.random.default_rng(0).integers(0, 256, (1, 1, 1, 32, 32, 3), dtype=np.uint8)
    first = net.base_model.bn1.running_var.clone()
    weights = lone[-1].weight.detach().clone()
    for step in range(5):
        report = replica.step([Piece(data, np.array([1]))], 1, 0.1, (0, step))
        assert report.finite
        assert np.isfinite(report.loss_sum)
    assert all((module.running_var == 2.0).all() for module in lone)
    assert all(module.training for module in lone)
    assert not torch.equal(net.base_model.bn1.running_var, first)  # it sees 16 x 16 pixels, so it has statistics
    assert not torch.equal(lone[-1].weight, weights)


def test_a_lone_sample_counts_once_where_it_has_statistics_of_its_own():
    """The variance of a layer over one sample is that of its values, each counted once."""
    from slimray import models

    torch.manual_seed(0)
    net = models.build(**TSM)
    data = np.random.default_rng(0).integers(0, 256, (1, 1, 2, 32, 32, 3), dtype=np.uint8)
    with torch.no_grad():
        x = net.base_model.conv1(to_input(data, Input(), torch.device("cpu")).flatten(0, 1))
    replica = PlainReplica(net, Setup(OPTIM, Input(), SHAPE32, torch.device("cpu")))
    replica.step([Piece(data, np.array([1]))], 1, 0.1, (0, 0))
    torch.testing.assert_close(net.base_model.bn1.running_var, 0.9 + 0.1 * x.var((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_class_weights_leave_the_size_of_a_step_alone():
    data, labels = samples(6)
    labels[:] = 1
    moved = []
    for weights in (None, (1.0, 0.02, 1.0, 1.0)):
        torch.manual_seed(0)
        optim = OPTIM.model_copy(update={"class_weights": weights})
        net = Plain()
        start = net.head.weight.detach().clone()
        replica = PlainReplica(net, Setup(optim, Input(), SHAPE, torch.device("cpu")))
        total = float(CLASSIFY.weights(torch.from_numpy(labels), optim).sum())
        replica.step([Piece(data, labels)], total, 0.1, (0, 0))
        moved.append(net.head.weight.detach() - start)
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-4, atol=1e-7)


def test_a_short_window_moves_weights_by_its_share_of_the_batch():
    data, labels = samples(8)
    phase = Phase("train", "train", 0, 10, 8, True, {})
    assert (phase.share(0), phase.share(1)) == (1.0, 0.25)
    moved = []
    for total in (2, 2 / phase.share(1)):
        torch.manual_seed(0)
        net = Plain()
        start = net.head.weight.detach().clone()
        replica = PlainReplica(net, Setup(OPTIM, Input(), SHAPE, torch.device("cpu")))
        replica.step([Piece(data[:2], labels[:2])], total, 0.1, (0, 0))
        moved.append(net.head.weight.detach() - start)
    torch.testing.assert_close(moved[1], 0.25 * moved[0], rtol=1e-4, atol=1e-7)


def test_a_still_piece_trains_without_touching_the_statistics():
    replica = PlainReplica(_tsm(), Setup(OPTIM, Input(), SHAPE32, torch.device("cpu")))
    data = np.random.default_rng(0).integers(0, 256, (2, 1, 2, 32, 32, 3), dtype=np.uint8)
    norms, weights = batchnorm.norm_state(replica.net).clone(), replica.net.new_fc.weight.clone()
    replica.step([Piece(data, np.array([0, 1]))], 2, 0.1, (0, 0), frozenset({0}))
    assert torch.equal(batchnorm.norm_state(replica.net), norms)
    assert not torch.equal(replica.net.new_fc.weight, weights)
    replica.step([Piece(data, np.array([0, 1]))], 2, 0.1, (0, 1))
    assert not torch.equal(batchnorm.norm_state(replica.net), norms)


def test_a_step_that_is_not_finite_leaves_no_trace():
    replica = PlainReplica(_tsm(), Setup(OPTIM, Input(std=(1e-45,) * 3), SHAPE32, torch.device("cpu")))
    before = {k: v.clone() for k, v in replica.tensors().items()}
    data = np.random.default_rng(0).integers(0, 256, (2, 1, 2, 32, 32, 3), dtype=np.uint8)
    assert not replica.step([Piece(data, np.array([0, 1]))], 2, 0.1, (0, 0)).finite
    assert all(torch.equal(v, before[k]) for k, v in replica.tensors().items())


def test_validation_copy_and_state_leave_training_untouched():
    replica = PlainReplica(_tsm(), Setup(OPTIM, Input(), SHAPE32, torch.device("cpu")))
    before = {k: v.clone() for k, v in replica.tensors().items()}
    net = replica.averaged()
    net(torch.zeros(1, *SHAPE32))
    assert all(torch.equal(v, before[k]) for k, v in replica.tensors().items())
