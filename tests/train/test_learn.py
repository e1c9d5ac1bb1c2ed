"""Schedules, groups, losses, BatchNorm and scores follow their published definitions."""

import json
import math

import pytest
import torch
from torch import nn

from slimray import models
from slimray.edge import cost
from slimray.spec import UserError, parse
from slimray.tasks import classify, segment
from slimray.tasks.classify import ClassScore
from slimray.tasks.network import merge_views
from slimray.train import batchnorm, learn, optimizers, speed
from slimray.train.spec import OptimSpec


def spec(**fields) -> OptimSpec:
    return parse(OptimSpec, {"lr": 0.1, "reference_batch": 256, "epochs": 10} | fields, "job.yaml: optim")


def rates(optim: OptimSpec, batch: int, epochs: list[float]) -> list[float]:
    return [optimizers.learning_rate(optim, batch, 1000, round(1000 * epoch)) for epoch in epochs]


def test_the_rate_scales_linearly_with_the_batch_and_nothing_else():
    assert optimizers.peak_rate(spec(lr=0.02, reference_batch=128), 12_288) == pytest.approx(1.92)
    assert optimizers.peak_rate(spec(lr=0.01, reference_batch=64), 12_288) == pytest.approx(1.92)


def test_warm_up_rises_from_the_reference_rate_to_the_peak():
    optim = spec(warmup_epochs=5, schedule="constant")
    assert rates(optim, 256 * 32, [0, 2.5, 5, 9]) == pytest.approx([0.1, 1.65, 3.2, 3.2])
    assert rates(optim, 256, [0, 5]) == pytest.approx([0.01, 0.1])


def test_steps_fall_at_their_milestones():
    assert rates(spec(epochs=50), 256, [0, 19.9, 20, 39.9, 40]) == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001])
    assert rates(spec(milestones=(2, 3), gamma=0.5), 256, [1, 2, 3]) == pytest.approx([0.1, 0.05, 0.025])


def test_cosine_falls_from_the_peak_after_the_warm_up_to_zero():
    optim = spec(schedule="cosine", warmup_epochs=2)
    assert rates(optim, 256, [2, 6, 10]) == pytest.approx([0.1, 0.05, 0.0], abs=1e-12)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"warmup_epochs": 10}, "optim: warmup_epochs: must be below epochs (10), got 10"),
        ({"schedule": "cosine", "milestones": [3]}, "optim: milestones: are only for schedule: step, not cosine"),
        ({"lr": 0}, "optim: lr: must be > 0 (got 0)"),
        ({"momentun": 0.9}, "optim: momentun: unknown field, did you mean 'momentum'?"),
    ],
)
def test_an_impossible_section_is_one_sentence(fields, sentence):
    with pytest.raises(UserError) as error:
        spec(**fields)
    assert str(error.value) == f"job.yaml: {sentence}"


RECORDED_NAMES = {
    "first_conv_weight": "first_conv_weight",
    "weight": "normal_weight",
    "norm": "BN scale/shift",
    "head_weight": "lr5_weight",
    "head_bias": "lr10_bias",
}


@pytest.mark.parametrize(
    ("recorded", "name", "norm"),
    [
        ("optim_groups_tsm_r50", "tsm_resnet50", "local"),
        ("optim_groups_tsm_r50_partialbn", "tsm_resnet50", "partial"),
        ("optim_groups_tsm_mbv2", "tsm_mobilenetv2", "local"),
    ],
)
def test_parameter_groups_are_the_published_ones(recorded, name, norm, shared):
    groups = json.loads((shared / "parity/tsm_stats.json").read_text())[recorded]
    expected = {g["name"]: g for g in groups if g["n_tensors"]}
    net = cost.build_on_meta(lambda: models.build(name, num_classes=400))
    batchnorm.set_norm_policy(net, norm)
    ours = optimizers.parameter_groups(net, "tsm")
    assert {RECORDED_NAMES[g["name"]] for g in ours} == set(expected)
    for group in ours:
        want = expected[RECORDED_NAMES[group["name"]]]
        got = (len(group["params"]), sum(p.numel() for p in group["params"]), group["lr_mult"], group["decay_mult"])
        assert got == (want["n_tensors"], want["n_params"], want["lr_mult"], want["decay_mult"]), group["name"]


def test_a_flow_network_learns_its_first_layer_five_times_as_fast():
    net = cost.build_on_meta(lambda: models.build("tsm_resnet50", num_classes=4, in_channels=10))
    first = next(g for g in optimizers.parameter_groups(net, "tsm") if g["name"] == "first_conv_weight")
    assert first["lr_mult"] == 5


@pytest.mark.parametrize("groups", ["tsm", "no_norm_decay", "plain"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_optimizer_goes_on_where_it_stopped(groups, optimizer):
    def net_after(steps: int, net: nn.Module, opt: torch.optim.Optimizer) -> nn.Module:
        for i in range(steps):
            opt.zero_grad()
            torch.manual_seed(i)
            net(torch.randn(4, 2, 3, 32, 32)).square().sum().backward()
            optimizers.set_learning_rate(opt, 0.01)
            opt.step()
        return net

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return models.build("tsm_resnet18", num_classes=3, num_segments=2, width=0.125, dropout=0.0)

    optim = spec(groups=groups, optimizer=optimizer)
    first = fresh()
    opt = optimizers.make_optimizer(first, optim)
    net_after(2, first, opt)
    second = fresh()
    second.load_state_dict(first.state_dict())
    other = optimizers.make_optimizer(second, optim)
    optimizers.load_optimizer_tensors(other, optimizers.optimizer_tensors(opt))
    a, b = net_after(2, first, opt).state_dict(), net_after(2, second, other).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_no_decay_on_biases_and_batchnorm():
    net = cost.build_on_meta(lambda: models.build("tsm_resnet18", num_classes=4, width=0.125))
    optimizer = optimizers.make_optimizer(net, spec(groups="no_norm_decay", weight_decay=0.5))
    decays = {g["name"]: g["weight_decay"] for g in optimizer.param_groups}
    assert decays == {"weight": 0.5, "no_decay": 0.0}


def test_losses_are_smoothed_and_weighted_per_sample():
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
    plain = classify.losses(logits, labels, spec())
    assert plain.tolist() == pytest.approx([math.log(1 + math.exp(-2)), math.log(1 + math.exp(1))])
    weighted = classify.losses(logits, labels, spec(class_weights=[3.0, 1.0]))
    assert torch.allclose(weighted, 3 * plain)
    smooth = classify.losses(logits, labels, spec(label_smoothing=0.1))
    assert smooth[0] == pytest.approx(plain[0].item() + 0.05 * 2.0)  # half of it is spread to the other class


def test_weights_of_samples_are_those_of_their_losses():
    labels = torch.tensor([0, 1, 1])
    assert classify.weights(labels, spec()).tolist() == [1, 1, 1]
    assert classify.weights(labels, spec(class_weights=[3.0, 0.5])).tolist() == [3, 0.5, 0.5]
    points = torch.tensor([[0, 1, -1, -1], [1, 1, 1, 0]])
    weighted = spec(class_weights=[3.0, 0.5])
    assert segment.weights(points, weighted).tolist() == pytest.approx([1.75, 1.125])
    logits = torch.randn(2, 2, 4)
    step = segment.losses(logits, points, weighted).sum() / segment.weights(points, weighted).sum()
    one = segment.losses(logits[:1], points[:1], weighted).sum() / segment.weights(points[:1], weighted).sum()
    torch.testing.assert_close(
        one, nn.functional.cross_entropy(logits[:1], points[:1], torch.tensor([3.0, 0.5]), ignore_index=-1)
    )
    assert step > 0


def test_balanced_weights_are_inverse_to_counts_with_mean_one():
    assert learn.balanced_weights([0, 0, 0, 1], 3) == pytest.approx((0.5, 1.5, 0.0))


def test_partial_batchnorm_trains_the_first_layer_only():
    net = models.build("tsm_resnet18", num_classes=4, num_segments=2, width=0.125)
    batchnorm.set_norm_policy(net, "partial")
    batchnorm.train_mode(net, "partial")
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [m.training for m in norms] == [True] + [False] * (len(norms) - 1)
    assert not norms[1].weight.requires_grad


def test_merged_statistics_are_those_of_all_the_data():
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(3))
    halves = [torch.randn(500, 3) * 2 + 1, torch.randn(500, 3) - 4]
    states = torch.stack([torch.cat([h.mean(0), h.var(0, correction=0)]) for h in halves])
    merged = batchnorm.merge_norm_states(states, net)
    both = torch.cat(halves)
    assert torch.allclose(merged, torch.cat([both.mean(0), both.var(0, correction=0)]), atol=1e-5)
    batchnorm.load_norm_state(net, merged)
    assert torch.equal(batchnorm.norm_state(net), merged)
    assert torch.equal(batchnorm.merge_norm_states(states[:1], net), states[0])


def test_views_are_averaged_as_logits_or_as_probabilities():
    logits = torch.tensor([[4.0, 0.0], [0.0, 1.0]])
    assert merge_views(logits, 2, "logits").tolist() == [[2.0, 0.5]]
    probabilities = torch.softmax(logits, 1).mean(0)
    assert torch.allclose(merge_views(logits, 2, "prob").exp()[0], probabilities)


def test_scores_count_hits_classes_and_unknown_labels():
    score = ClassScore(6)
    logits = torch.eye(6)[[0, 0, 1, 5]] * 9 - torch.arange(6) / 10
    score.add(logits, torch.tensor([0, 1, 1, -1]))
    result = score.result()
    assert result["num_samples"] == 3
    assert result["top1"] == pytest.approx(200 / 3)
    assert result["mean_class_accuracy"] == pytest.approx(75.0)
    assert score.confusion[1, 0] == 1
    assert result["top5"] == 100.0


def test_utilisation_counts_forward_and_backward_of_every_multiply_and_add():
    device = torch.device("cpu")
    assert speed.mfu(10**9, 2.0, device) == pytest.approx(12e9 / speed.peak_flops(device))
    assert 1e9 < speed.peak_flops(device) < 1e13


def test_dropout_is_a_function_of_seed_step_and_rank():
    def draw(*key: int) -> float:
        learn.seed_step(*key)
        return torch.rand(1).item()

    assert draw(0, 1, 2) == draw(0, 1, 2)
    assert len({draw(s, t, r) for s in range(3) for t in range(3) for r in range(3)}) == 27


def test_divergence_teaches_one_network_at_a_time():
    a, b = torch.randn(2, 5, 7, requires_grad=True), torch.randn(2, 5, 7, requires_grad=True)
    learn.divergences(a, b).mean().backward()
    expected = (b.softmax(1) - a.softmax(1)) / (2 * 7)
    assert a.grad is None
    torch.testing.assert_close(b.grad, expected.detach())
    assert learn.divergences(a, a).tolist() == pytest.approx([0, 0], abs=1e-6)
    assert learn.divergences(a[:, :, 0], b[:, :, 0]).shape == (2,)


def test_adam_adds_its_decay_to_the_gradient():
    weights = {}
    for name in ("adam", "adamw"):
        net = torch.nn.Linear(2, 1, bias=False)
        torch.nn.init.ones_(net.weight)
        optim = OptimSpec(optimizer=name, lr=0.1, reference_batch=1, epochs=1, groups="plain", weight_decay=0.5)
        optimizer = optimizers.make_optimizer(net, optim)
        optimizers.set_learning_rate(optimizer, 0.1)
        net.weight.grad = torch.tensor([[1.0, -0.25]])
        optimizer.step()
        weights[name] = net.weight.detach()[0].tolist()
    assert weights["adam"] == pytest.approx([0.9, 0.9], abs=1e-4)  # the sign of the gradient with decay decides
    assert weights["adamw"] == pytest.approx([0.95 - 0.1, 0.95 + 0.1], abs=1e-4)


# ------------------------------------------------------------------------------------------------- re-calibration


def two_norms() -> torch.nn.Sequential:
    """Return a network with two BatchNorms, the second after dropout and an activation, that has seen other data."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3),
        torch.nn.BatchNorm2d(3),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.5),
        torch.nn.Conv2d(3, 4, 1),
        torch.nn.BatchNorm2d(4),
    )
    net(torch.randn(8, 2, 5, 5) * 5 + 2)
    return net.eval()


def some_batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [i + torch.randn(i, 2, 6, 6, generator=generator) for i in (2, 5, 3)]


@torch.no_grad()
def test_recalibrated_norms_hold_the_weighted_mean_of_what_each_batch_is_like():
    net, batches = two_norms(), some_batches()
    means, variances, samples = [], [], []
    for x in batches:  # computed here: every batch is normalised by its own statistics, dropout is off
        hidden = net[0](x)
        inner = torch.nn.functional.batch_norm(hidden, None, None, net[1].weight, net[1].bias, training=True)
        outer = net[4](inner.relu())
        means.append(torch.cat([hidden.mean((0, 2, 3)), outer.mean((0, 2, 3))]))
        variances.append(torch.cat([v.var((0, 2, 3), correction=0) for v in (hidden, outer)]))
        samples.append(len(x))
    weights = torch.tensor(samples)[:, None] / sum(samples)
    ready = batchnorm.recalibrate_norms(net, batches)
    found = [torch.cat([ready[i].get_buffer(f"running_{what}") for i in (1, 5)]) for what in ("mean", "var")]
    torch.testing.assert_close(found[0], (weights * torch.stack(means)).sum(0))
    torch.testing.assert_close(found[1], (weights * torch.stack(variances)).sum(0))
    pooled = net[0](torch.cat(batches)).var((0, 2, 3), correction=0)
    assert (found[1][:3] < 0.9 * pooled).all()  # the batches differ, so the variance of all together is another number


def test_recalibration_makes_a_copy_and_leaves_the_network_as_it_is():
    net = two_norms()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x = some_batches()[0]
    ready = batchnorm.recalibrate_norms(net, [x])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not torch.equal(ready[1].running_mean, net[1].running_mean)
    assert not ready.training
    assert batchnorm.recalibrate_norms(net.train(), [x]).training
    assert all(parameter.requires_grad for parameter in ready.parameters())
    assert not any(module._forward_pre_hooks for module in [*net.modules(), *ready.modules()])
    assert net(x).requires_grad


def test_sums_of_several_workers_make_the_statistics_of_one_however_batches_are_dealt_out():
    net, batches = two_norms(), some_batches()
    alone = batchnorm.norm_state(batchnorm.recalibrate_norms(net, batches))
    for deal in ([[0], [1, 2]], [[2, 0], [1]], [[1], [0], [2]]):
        sums = sum(batchnorm.norm_sums(net, [batches[i] for i in mine]) for mine in deal)
        batchnorm.load_norm_sums(net, sums)
        torch.testing.assert_close(batchnorm.norm_state(net), alone)
    nothing = batchnorm.norm_sums(net, [])
    assert nothing.shape == sums.shape
    assert not nothing.any()


def test_without_batches_there_are_no_statistics():
    with pytest.raises(ValueError, match="a BatchNorm saw no input"):
        batchnorm.recalibrate_norms(two_norms(), [])
