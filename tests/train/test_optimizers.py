"""Optimizers fit the networks they are for, and scale with the batch as their sources say."""

import math

import pytest
import torch
from torch import nn

from slimray import models
from slimray.edge import cost
from slimray.models import MODELS
from slimray.spec import UserError, parse
from slimray.train import optimizers
from slimray.train.spec import OptimSpec


def spec(**fields) -> OptimSpec:
    return parse(OptimSpec, {"lr": 0.1, "reference_batch": 256, "epochs": 10} | fields, "job.yaml: optim")


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "lars"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_defaults_make_an_optimizer_for_every_network(name, optimizer):
    needed = {"num_classes": 5, "scale": 2, "vocab_size": 50}
    options = {option: needed[option] for option in models.required(name) if option in needed}
    if name == "proxyless_found":
        supernet = cost.build_on_meta(lambda: models.build("proxyless_supernet", num_classes=5))
        options["blocks"] = supernet.describe(supernet.most_likely())
    net = cost.build_on_meta(lambda: models.build(name, **options))
    made = optimizers.make_optimizer(net, spec(optimizer=optimizer))
    assert sum(len(group["params"]) for group in made.param_groups) == len(list(net.parameters()))
    rates = {group["lr_mult"] for group in made.param_groups}
    assert optimizer == "sgd" or rates == {1.0}, "rates of the head are multiplied where nobody asked for it"


def test_groups_that_a_network_has_not_are_one_sentence():
    net = cost.build_on_meta(lambda: models.build("pvcnn_s3dis", num_classes=13))
    with pytest.raises(UserError, match=r"optim\.groups: tsm needs a network of clips or images"):
        optimizers.make_optimizer(net, spec(groups="tsm"))


def test_square_root_scaling_is_the_published_rule():
    optim = spec(optimizer="adam", scaling="sqrt", lr=1e-3, betas=[0.9, 0.999], eps=1e-8)
    assert optimizers.peak_rate(optim, 1024) == pytest.approx(2e-3)
    group = optimizers.make_optimizer(nn.Linear(2, 2), optim, 1024).param_groups[0]
    assert group["betas"] == pytest.approx((1 - 4 * 0.1, 1 - 4 * 0.001))
    assert group["eps"] == pytest.approx(1e-8 / 2)
    same = optimizers.make_optimizer(nn.Linear(2, 2), optim, 256).param_groups[0]
    assert same["betas"] == (0.9, 0.999)
    assert same["eps"] == 1e-8
    wide = optimizers.make_optimizer(nn.Linear(2, 2), optim, 256 * 64).param_groups[0]
    assert wide["betas"][0] == 0.0
    assert math.isclose(wide["betas"][1], 1 - 64 * 0.001)


def test_nesterov_is_that_of_torch():
    one, two = nn.Linear(3, 1, bias=False), nn.Linear(3, 1, bias=False)
    two.load_state_dict(one.state_dict())
    ours = optimizers.make_optimizer(one, spec(nesterov=True, groups="plain", weight_decay=0.1))
    theirs = torch.optim.SGD(two.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True)
    for number in range(3):
        optimizers.set_learning_rate(ours, 0.05)
        for net, optimizer in ((one, ours), (two, theirs)):
            torch.manual_seed(number)
            net.weight.grad = torch.randn_like(net.weight)
            optimizer.step()
    assert torch.equal(one.weight, two.weight)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"nesterov": True, "optimizer": "adam"}, "nesterov: needs optimizer: sgd with a momentum, not adam"),
        ({"nesterov": True, "momentum": 0}, "nesterov: needs optimizer: sgd with a momentum, not sgd"),
        ({"betas": [0.9, 0.99]}, "betas: belong to adam and adamw, not sgd"),
        ({"scaling": "sqrt", "optimizer": "lars"}, "scaling: sqrt is for adam and adamw, not lars: take linear"),
    ],
)
def test_options_of_another_optimizer_are_one_sentence(fields, sentence):
    with pytest.raises(UserError) as error:
        spec(**fields)
    assert str(error.value) == f"job.yaml: optim: {sentence}"
