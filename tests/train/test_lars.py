"""LARS follows its formula, and its steps do not depend on the size of the gradient."""

import pytest
import torch
from torch import nn

from slimray import models
from slimray.train import optimizers
from slimray.train.lars import TRUST, Lars
from slimray.train.spec import OptimSpec


def test_a_step_is_the_formula_of_the_paper():
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = Lars([{"params": [weight], "weight_decay": 0.1}], lr=2.0, momentum=0.5)
    weight.grad = torch.tensor([0.6, 0.8])
    optimizer.step()
    share = TRUST * 5.0 / (1.0 + 0.1 * 5.0)
    first = 2.0 * share * (torch.tensor([0.6, 0.8]) + 0.1 * torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(weight.detach(), torch.tensor([3.0, 4.0]) - first)
    before = weight.detach().clone()
    weight.grad = torch.tensor([0.0, 1.0])
    optimizer.step()
    share = TRUST * before.norm() / (1.0 + 0.1 * before.norm())
    second = 0.5 * first + 2.0 * share * (torch.tensor([0.0, 1.0]) + 0.1 * before)
    torch.testing.assert_close(weight.detach(), before - second)


def test_a_group_that_is_not_adapted_is_sgd():
    one, two = nn.Parameter(torch.tensor([1.0, -2.0])), nn.Parameter(torch.tensor([1.0, -2.0]))
    lars, sgd = (
        Lars([{"params": [one], "adapt": False}], lr=0.1, momentum=0.9),
        torch.optim.SGD([two], lr=0.1, momentum=0.9),
    )
    for gradient in ([1.0, 2.0], [0.5, -1.0], [3.0, 0.0]):
        one.grad, two.grad = torch.tensor(gradient), torch.tensor(gradient)
        lars.step()
        sgd.step()
        torch.testing.assert_close(one.detach(), two.detach())


def test_the_size_of_the_gradient_does_not_matter_to_weights():
    moved = []
    for size in (1.0, 1000.0):
        weight = nn.Parameter(torch.ones(4))
        optimizer = Lars([{"params": [weight], "weight_decay": 1e-9}], lr=1.0)
        weight.grad = size * torch.ones(4)
        optimizer.step()
        moved.append((1 - weight.detach()).norm())
    torch.testing.assert_close(moved[0], moved[1])


@pytest.mark.parametrize("weight_decay", [0.0, 1e-4])
@pytest.mark.parametrize("groups", ["no_norm_decay", "tsm", "plain"])
def test_weights_are_adapted_with_and_without_decay_and_what_is_excluded_learns_as_under_sgd(weight_decay, groups):
    torch.manual_seed(0)
    net = models.build("tsm_resnet18", num_classes=3, num_segments=2, width=0.125)
    optim = OptimSpec(
        optimizer="lars", lr=1.0, reference_batch=1, epochs=1, groups=groups, weight_decay=weight_decay, momentum=0.0
    )
    optimizer = optimizers.make_optimizer(net, optim)
    optimizers.set_learning_rate(optimizer, 1.0)
    before = {name: value.detach().clone() for name, value in net.named_parameters()}
    for value in net.parameters():
        value.grad = torch.randn_like(value) * 100
    optimizer.step()
    for group in optimizer.param_groups:
        wanted = groups == "plain" or group["decay_mult"] > 0
        assert group["adapt"] == wanted, group["name"]
    moved = {name: float((value.detach() - before[name]).norm()) for name, value in net.named_parameters()}
    convolution = float(before["base_model.conv1.weight"].norm())
    assert moved["base_model.conv1.weight"] <= 5 * 1.01 * TRUST * convolution
    if groups != "plain":
        assert moved["base_model.bn1.bias"] > 100


def test_a_zero_weight_or_gradient_makes_no_nan():
    weight = nn.Parameter(torch.zeros(3))
    optimizer = Lars([{"params": [weight], "weight_decay": 0.1}], lr=1.0)
    weight.grad = torch.zeros(3)
    optimizer.step()
    assert torch.isfinite(weight).all()


def test_its_state_goes_through_a_checkpoint():
    optim = OptimSpec.model_validate({"optimizer": "lars", "lr": 0.1, "reference_batch": 8, "epochs": 2})
    nets = [nn.Sequential(nn.Linear(3, 2)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    made = [optimizers.make_optimizer(net, optim.model_copy(update={"groups": "no_norm_decay"})) for net in nets]
    assert all(isinstance(one, Lars) for one in made)

    def step(index: int, seed: int) -> None:
        for number, parameter in enumerate(nets[index].parameters()):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed + number))
        made[index].step()

    step(0, 1)
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers.load_optimizer_tensors(made[1], optimizers.optimizer_tensors(made[0]))
    for index in range(2):
        step(index, 7)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b)
