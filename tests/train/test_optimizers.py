"""Optimizers fit their networks, and scale with the batch as published."""

import json
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
from slimray.verbs.specs import SharedOptimSpec


def spec(**fields) -> OptimSpec:
    fields = {"lr": 0.1, "reference_batch": 256} | ({} if "steps" in fields else {"epochs": 10}) | fields
    return parse(OptimSpec, fields, "job.yaml: optim")


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
        ({"betas": [0.9, 0.99]}, "betas: are only for adam and adamw, not sgd"),
        ({"scaling": "sqrt", "optimizer": "lars"}, "scaling: sqrt is only for adam and adamw, not lars: use linear"),
    ],
)
def test_options_of_another_optimizer_are_one_sentence(fields, sentence):
    with pytest.raises(UserError) as error:
        spec(**fields)
    assert str(error.value) == f"job.yaml: optim: {sentence}"


IWSLT = {"lr": 5e-4, "warmup_from": 1e-7, "schedule": "inverse_sqrt"}
WMT = {"lr": 1e-3, "warmup_from": 1e-7, "schedule": "cosine", "min_lr": 1e-7}
RECIPES = {
    "wmt_super": (WMT | {"warmup_steps": 10_000}, 40_000),
    "wmt_sub": (WMT | {"warmup_steps": 4_000}, 40_000),
    "iwslt_super": (IWSLT | {"warmup_steps": 10_000}, 50_000),
    "iwslt_sub": (IWSLT | {"warmup_steps": 4_000}, 50_000),
}


@pytest.mark.parametrize("name", RECIPES)
def test_schedules_in_steps_are_those_of_the_published_translation_networks(shared, name):
    fields, last = RECIPES[name]
    recorded = json.loads((shared / "parity/language/hat_recipe.json").read_text())["lr_schedule"][name]
    optim = spec(optimizer="adamw", epochs=10, reference_batch=4096, betas=[0.9, 0.98], **fields)
    for step, rate in recorded.items():
        if not (optim.schedule == "cosine" and int(step) == last):  # where theirs restarts
            found = optimizers.learning_rate(optim, 4096, 1, 0, int(step), last // 10)
            assert found == pytest.approx(rate, rel=1e-9), step
    assert optimizers.learning_rate(optim, 2 * 4096, 1, 0, 20_000, last // 10) > 1.9 * recorded["20000"]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_that_count_steps_have_the_same_rates_however_long_an_epoch_is(shared, name):
    fields, last = RECIPES[name]
    recorded = json.loads((shared / "parity/language/hat_recipe.json").read_text())["lr_schedule"][name]
    optim = spec(optimizer="adamw", steps=last, reference_batch=4096, betas=[0.9, 0.98], **fields)
    for step, rate in recorded.items():
        if not (optim.schedule == "cosine" and int(step) == last):
            for one in (optim, optim.model_copy(update={"epochs": 7})):
                assert optimizers.learning_rate(one, 4096, 1, 0, int(step), 999) == pytest.approx(rate, rel=1e-9), step


@pytest.mark.parametrize("schedule", ["step", "cosine", "constant"])
def test_without_a_warm_up_schedules_of_steps_fall_as_those_of_as_many_epochs(schedule):
    fields = {"lr": 0.4, "reference_batch": 8, "schedule": schedule}
    ways = spec(steps=100, **fields), spec(epochs=10, **fields)
    for step in (0, 1, 39, 40, 50, 79, 80, 99):
        rates = [optimizers.learning_rate(one, 8, 80, 8 * step, step, 10) for one in ways]
        assert rates[0] == pytest.approx(rates[1], rel=1e-12)


def test_the_schedule_of_the_language_model_warms_up_in_the_place_of_its_cosine(shared):
    recorded = json.loads((shared / "parity/language/micronet_score.json").read_text())["lr_cosine_lm"]
    fields = {"lr": 1e-3, "warmup_steps": 1000, "schedule": "cosine", "cosine_from": "start"}
    optim = spec(optimizer="adam", epochs=1, reference_batch=8, **fields)
    steps = {int(step): rate for step, rate in recorded.items() if step.isdigit()}
    assert len(steps) > 3
    for step, rate in steps.items():
        assert optimizers.learning_rate(optim, 8, 1, 0, step, 200_000) == pytest.approx(rate, rel=1e-9, abs=1e-15), step


def test_steps_and_epochs_warm_up_to_the_same_peak_and_fall_alike():
    by_steps = spec(lr=0.4, reference_batch=8, epochs=10, warmup_steps=20, milestones=[5])
    by_epochs = spec(lr=0.4, reference_batch=8, epochs=10, warmup_epochs=2, milestones=[5])
    for step in (20, 30, 49, 50, 99):
        rates = [optimizers.learning_rate(one, 8, 80, 8 * step, step, 10) for one in (by_steps, by_epochs)]
        assert rates[0] == rates[1]
    flat = spec(lr=0.4, reference_batch=8, epochs=10, warmup_steps=20, schedule="constant")
    assert [optimizers.learning_rate(flat, 8, 80, 0, step, 10) for step in (0, 10, 20, 99)] == [0.02, 0.2, 0.4, 0.4]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"epochs": 0}, r"epochs: must be >= 1 \(got 0\)"),
        ({"steps": None}, "epochs: is required, or steps"),
        ({"steps": 5, "epochs": 1}, "steps: cannot be combined with epochs: write one of the two"),
        ({"steps": 5, "warmup_epochs": 1}, "steps: cannot be combined with warmup_epochs: write one of the two"),
        ({"steps": 5, "warmup_steps": 5}, r"warmup_steps: must be below steps \(5\), got 5"),
        ({"steps": 5, "milestones": [1]}, "milestones: count epochs: leave them out with steps"),
        ({"warmup_steps": 5, "warmup_epochs": 0.5}, "warmup_steps: cannot be combined with warmup_epochs"),
        ({"warmup_from": 1e-7}, "warmup_from: requires warmup_steps"),
        ({"schedule": "inverse_sqrt"}, "warmup_steps: is required by schedule: inverse_sqrt"),
        ({"min_lr": 1e-7}, "min_lr: is only for schedule: cosine, not step"),
        ({"cosine_from": "start", "schedule": "constant"}, "cosine_from: is only for schedule: cosine, not constant"),
    ],
)
def test_schedules_that_do_not_fit_are_one_sentence(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        spec(**fields)


def test_stages_have_no_steps():
    with pytest.raises(UserError, match="steps: is for single trainings, stages count epochs"):
        parse(SharedOptimSpec, {"reference_batch": 8, "steps": 5}, "job.yaml: optim")
