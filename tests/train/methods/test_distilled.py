"""A student learns from labels and teacher by the given weights; the teacher does not change."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from slimray.spec import RunFailed
from slimray.tasks.network import Input, to_input
from slimray.train.methods.distilled import Distilled, DistilledReplica
from slimray.train.methods.method import Piece, Setup
from slimray.train.spec import OptimSpec

OPTIM = OptimSpec(lr=0.1, reference_batch=8, epochs=1, groups="plain", clip_norm=None, weight_decay=0.0)
SHAPE, CPU = (3, 4, 4), torch.device("cpu")


def net(seed: int, classes: int = 5) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, classes))


def batch() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (6, 1, 4, 4, 3), dtype=np.uint8), rng.integers(0, 5, 6)


def test_a_step_follows_the_gradient_of_both_terms():
    data, labels = batch()
    method = Distilled("unused", weight=0.7, labels=0.3, temperature=2.0)
    teacher = net(1).eval()
    before = copy.deepcopy(teacher.state_dict())
    replica = DistilledReplica(net(0), teacher, method, Setup(OPTIM, Input(), SHAPE, CPU))
    student = copy.deepcopy(replica.net).train()
    replica.step([Piece(data, labels)], 6, 0.1, (0, 0))
    x, targets = to_input(data, Input(), CPU), torch.from_numpy(labels)
    logits, given = student(x), teacher(x).detach()
    soft = nn.functional.cross_entropy(logits / 2, (given / 2).softmax(1))
    loss = 0.3 * nn.functional.cross_entropy(logits, targets) + 0.7 * 4 * soft
    (gradient,) = torch.autograd.grad(loss, student[3].weight)
    torch.testing.assert_close(replica.net[3].weight.detach(), student[3].weight.detach() - 0.1 * gradient)
    assert all(torch.equal(value, before[name]) for name, value in replica.teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in replica.teacher.parameters())


def test_the_teacher_alone_teaches_its_answers():
    data, labels = batch()
    replica = DistilledReplica(net(0), net(1), Distilled("unused", labels=0.0), Setup(OPTIM, Input(), SHAPE, CPU))
    for step in range(60):
        replica.step([Piece(data, labels)], 6, 0.5, (0, step))
    with torch.no_grad():
        x = to_input(data, Input(), CPU)
        student, teacher = replica.net.train()(x).softmax(1), replica.teacher(x).softmax(1)
    assert (student - teacher).abs().max() < 0.1


def test_a_teacher_of_other_classes_is_one_sentence():
    data, labels = batch()
    replica = DistilledReplica(net(0), net(1, 7), Distilled("unused"), Setup(OPTIM, Input(), SHAPE, CPU))
    with pytest.raises(RunFailed, match=r"teacher\.run: its outputs have shape \[7\], the network's \[5\]"):
        replica.step([Piece(data, labels)], 6, 0.1, (0, 0))


def test_a_rank_without_samples_asks_no_teacher():
    replica = DistilledReplica(net(0), net(1), Distilled("unused"), Setup(OPTIM, Input(), SHAPE, CPU))
    before = replica.net[3].weight.detach().clone()
    report = replica.step([Piece(np.zeros((0,), np.uint8), np.zeros(0, np.int64))], 6, 0.1, (0, 0))
    assert report.finite
    assert torch.equal(replica.net[3].weight, before)
