"""Criteria, policies, reconstruction and the public function `prune`."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.compress.networks import example, network, outputs
from tests.compress.test_channels import distance, drawn
from torch import nn
from torch.nn import functional

from slimray import compress
from slimray.compress import criteria, policies, pruning
from slimray.compress.channels import cut
from slimray.compress.groups import trace
from slimray.compress.reconstruction import patches, reconstruct, solve
from slimray.spec import UserError


@pytest.fixture(scope="module")
def resnet():
    net, x = network("resnet20").float(), example("resnet20").float()
    return net, x, trace(net, x)


def losses(x):
    return lambda net: (functional.cross_entropy(net(x), torch.tensor([i, i])) for i in range(2))


# ------------------------------------------------------------------------------------------------ criteria


@pytest.mark.parametrize("criterion", criteria.CRITERIA)
def test_every_criterion_scores_every_channel(resnet, criterion):
    net, x, groups = resnet
    scores = criteria.importance(net, groups, criterion, losses(x))
    assert {name: len(one) for name, one in scores.items()} == groups.sizes
    for one in scores.values():
        assert (one >= 0).all()
        assert one.std() > 0
    assert all(p.grad is None or not p.grad.any() for p in net.parameters())


@pytest.mark.parametrize("criterion", criteria.CRITERIA)
def test_a_channel_whose_weights_are_zero_is_the_first_to_go(criterion):
    net, x = network("resnet20").float(), example("resnet20").float()
    groups = trace(net, x)
    name = "layer2.0.conv1"
    with torch.no_grad():
        net.layer2[0].conv1.weight[3] = 0  # type: ignore[index, union-attr]
        net.layer2[0].bn1.weight[3] = 0  # type: ignore[index, union-attr]
        net.layer2[0].bn1.bias[3] = 0  # type: ignore[index, union-attr]
        net.layer2[0].conv2.weight[:, 3] = 0  # type: ignore[index, union-attr]
    scores = criteria.importance(net, groups, criterion, losses(x))
    assert scores[name][3] == scores[name].min() == 0
    assert 3 not in criteria.strongest(scores, {name: 5})[name]


def test_the_ranking_of_amc_is_as_recorded(shared):
    for case in json.loads((shared / "parity/compression/amc_env.json").read_text())["ranking"]:
        if "RandomState" not in case["weight_rule"] or case["ties"] != "none":
            continue
        seed = int(case["weight_rule"].split("RandomState(")[1].split(")")[0])
        size = tuple(int(n) for n in case["weight_rule"].split("standard_normal((")[1].split("))")[0].split(","))
        net = nn.Sequential(nn.Conv2d(3, size[1], 1), nn.Conv2d(size[1], size[0], size[2:]))
        net[1].weight.data = torch.from_numpy(np.random.RandomState(seed).standard_normal(size).astype(np.float32))
        groups = trace(net, torch.randn(1, 3, 8, 8))
        scores = criteria.importance(net, groups, "input_l1")["0"]
        assert scores == pytest.approx(case["importance"], rel=1e-5)
        assert criteria.strongest({"0": scores}, {"0": 8})["0"] == sorted(case["order"][:8])


def test_criteria_that_do_not_fit_are_one_sentence(resnet):
    net, _, groups = resnet
    with pytest.raises(UserError, match="unknown criterion 'l3'"):
        criteria.importance(net, groups, "l3")
    with pytest.raises(UserError, match="taylor needs `losses`"):
        criteria.importance(net, groups, "taylor")
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(UserError, match="bn: group 0 has no such weights"):
        criteria.importance(plain, trace(plain, torch.randn(1, 4)), "bn")


# ------------------------------------------------------------------------------------------------ policies


def test_numbers_of_channels_are_multiples_or_all():
    assert policies.choices(20, 8) == [8, 16, 20]
    assert policies.choices(5, 8) == [5]
    assert [policies.rounded(32, ratio, 8) for ratio in (0.1, 0.49, 0.5, 1.0)] == [8, 8, 16, 32]


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_every_policy_comes_close_to_its_budget_and_keeps_it(resnet, share):
    net, _, groups = resnet
    limit = share * groups.costs({})["macs"]
    budget = policies.Budget(groups, {"macs": limit})
    scores = criteria.importance(net, groups, "group")
    curves = policies.sensitivity(groups, lambda c: sum((c or groups.sizes).values()) / 100, 1)
    for of in (
        lambda s: policies.uniform(groups, s, 1),
        lambda s: policies.ranked(groups, scores, s, 1),
        lambda s: policies.by_sensitivity(groups, curves, s, 1),
    ):
        counts = budget.largest(of)
        assert 0.6 * limit < budget.costs(counts)["macs"] <= limit


def test_sensitivity_takes_from_the_group_that_does_not_matter(resnet):
    _, _, groups = resnet
    names = list(groups.sizes)

    def score(counts) -> float:
        return sum((0.0 if name == names[2] else 1.0) * count / groups.sizes[name] for name, count in counts.items())

    curves = policies.sensitivity(groups, lambda c: score(groups.sizes | c), 1)
    counts = policies.by_sensitivity(groups, curves, 0.9, 1)
    assert counts[names[2]] < groups.sizes[names[2]] * 0.4
    assert all(counts[name] == groups.sizes[name] or name == names[2] for name in names if groups.sizes[name] < 10)


def test_a_meter_is_asked_only_where_it_is_limited(resnet):
    _, _, groups = resnet
    asked = []

    def meter(counts):
        asked.append(counts)
        return {"latency_ms": sum(counts.values()) / 100}

    assert "latency_ms" not in policies.Budget(groups, {"macs": 1e9}, meter).costs({})
    assert not asked
    budget = policies.Budget(groups, {"latency_ms": sum(groups.sizes.values()) / 200}, meter)
    counts = budget.largest(lambda s: policies.uniform(groups, s, 1))
    assert sum(counts.values()) <= sum(groups.sizes.values()) / 2
    assert asked


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"mac": 1.0}, "unknown cost 'mac'"),
        ({"macs": 0.0}, "macs: must be > 0"),
        ({"latency_ms": 1.0}, "must be measured: pass `meter`"),
        ({"macs": 10.0}, "the smallest policy has macs"),
    ],
)
def test_limits_that_cannot_be_kept_are_one_sentence(resnet, limits, reason):
    _, _, groups = resnet
    with pytest.raises(UserError, match=reason):
        policies.Budget(groups, limits).largest(lambda s: policies.uniform(groups, s))


# ------------------------------------------------------------------------------------------------ reconstruction


def test_least_squares_are_as_recorded(shared):
    case = json.loads((shared / "parity/compression/amc_env.json").read_text())["reconstruction"]
    rng = np.random.RandomState(150)
    x, w = rng.standard_normal((40, 10)), rng.standard_normal((6, 10))
    y = x @ w.T + 0.05 * rng.standard_normal((40, 6))
    found = solve(x[:, case["keep"]], y)
    assert found == pytest.approx(np.array(case["weight"]), abs=1e-9)


@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2, "padding": 2, "dilation": 2}, {}])
def test_patches_times_weights_are_the_convolution(options):
    conv, x = nn.Conv2d(4, 5, 3, bias=False, **options), torch.randn(2, 4, 9, 11)
    out = conv(x)
    places = [(0, 0), (1, 2), (out.shape[2] - 1, out.shape[3] - 1)]
    rows = patches(conv, x, places) @ conv.weight.flatten(1).T
    wanted = torch.stack([out[:, :, i, j] for i, j in places], 1).flatten(0, 1)
    assert torch.allclose(rows, wanted, atol=1e-5)


def test_reconstruction_brings_the_outputs_back():
    net = network("resnet20", width=1.0).float()
    x = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    groups = trace(net, x[:2])
    inner = {name: size * 3 // 4 for name, size in groups.sizes.items() if name.endswith("conv1") and "." in name}
    kept = criteria.strongest(criteria.importance(net, groups, "input_l1"), inner)
    small, _ = cut(net, groups, kept)
    before = distance(outputs(small, x[32:]), outputs(net, x[32:]))
    fitted = reconstruct(net, small, groups, kept, [x[:16], x[16:32]], points=60)
    assert len(fitted) == len(inner)
    assert distance(outputs(small, x[32:]), outputs(net, x[32:])) < 0.3 * before


def test_every_module_keeps_its_own_mode():
    net, x = network("resnet20").float().train(), example("resnet20").float()
    frozen = [module.eval() for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    compress.prune(net, x, keep=0.5, round_to=1, data=[x])
    compress.quantize(net, x, [x])
    assert [module for module in net.modules() if not module.training] == frozen
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize("data", [[], iter([])])
def test_layers_cannot_be_fitted_to_no_samples(resnet, data):
    net, x, _ = resnet
    with pytest.raises(UserError, match="reconstruct: there are no samples"):
        compress.prune(net, x, keep=0.5, round_to=1, timed=False, data=data)


# ------------------------------------------------------------------------------------------------ the function


def test_prune_leaves_the_network_and_tells_what_it_brings(resnet):
    net, x, _ = resnet
    before = {name: value.clone() for name, value in net.state_dict().items()}
    limit = 0.5 * trace(net, x).costs({})["macs"]
    found = compress.prune(net, x, limits={"macs": limit}, round_to=1)
    assert found.after["macs"] <= limit < found.before["macs"]
    assert found.net(x).shape == net(x).shape
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert found.gain is not None
    assert f"macs: {found.before['macs']:,.6g} -> {found.after['macs']:,.6g}" in str(found)
    assert "latency here" in str(found)


class Slow(nn.Module):
    """Advances a clock by the given seconds, one value per call."""

    def __init__(self, clock, seconds):
        super().__init__()
        self.clock, self.seconds = clock, iter(seconds)

    def forward(self, x):
        assert not self.training
        self.clock[0] += next(self.seconds)
        return x


def test_a_gain_is_told_with_the_interval_of_its_median(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(pruning, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    slow = Slow(clock, [99.0, 3.0, 0.5, 2.0, 8.0, 1.25, 5.0, 0.75, 1.5, 4.0])  # the first call does not count
    gain = pruning.compare(slow, Slow(clock, [1.0] * 10), torch.zeros(1))
    assert (gain.ratio, gain.low, gain.high) == (2.0, 0.75, 5.0)  # of nine ratios the outermost two are left out
    assert not gain.clear  # though six of nine are above 1.2
    assert slow.training


def test_a_gain_that_is_not_clear_is_told():
    from slimray.compress.pruning import Gain, Pruned

    costs = {"macs": 1.0, "params": 1.0, "size_mb": 1.0}
    gains = Gain(1.02, 0.97, 1.1), Gain(1.1, 0.97, 1.2), Gain(1.1, 1.03, 1.2)
    none, open_, fast = (str(Pruned(nn.Identity(), {}, {}, costs, costs, gain)) for gain in gains)
    assert "latency does not improve" in none
    assert "is not clear" in open_
    assert "improve" not in fast
    assert "not clear" not in fast


def test_prune_by_share_by_rank_by_sensitivity_and_by_numbers(resnet):
    net, x, groups = resnet
    whole = sum(groups.sizes.values())
    by_share = compress.prune(net, x, keep=0.5, round_to=1, timed=False)
    assert 0.45 * whole < sum(by_share.counts.values()) <= 0.5 * whole
    by_rank = compress.prune(net, x, policy="ranked", criterion="group", keep=0.5, round_to=1, timed=False)
    assert sum(by_rank.counts.values()) <= 0.5 * whole
    assert len({count / groups.sizes[name] for name, count in by_rank.counts.items()}) > 3
    reference = outputs(net, x)
    curves = compress.prune(
        net,
        x,
        policy="sensitivity",
        score=lambda n: -distance(outputs(n, x), reference),
        keep=0.7,
        round_to=2,
        timed=False,
    )
    assert sum(curves.counts.values()) <= 0.7 * whole
    halved = compress.prune(net, x, shares={"macs": 0.5}, round_to=2, timed=False)
    assert 0.2 < halved.after["macs"] / halved.before["macs"] <= 0.5
    by_numbers = compress.prune(net, x, policy={"layer1.0.conv1": 2}, timed=False, data=[x])
    assert by_numbers.net.layer1[0].conv1.out_channels == 2  # type: ignore[index, union-attr]


def test_channels_are_scored_once(resnet):
    net, x, _ = resnet
    asked = []
    compress.prune(
        net, x, keep=0.5, criterion="taylor", losses=lambda one: asked.append(one) or losses(x)(one), timed=False
    )
    assert asked == [net]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "pass `limits`, `shares` or `keep`"),
        ({"keep": 0.5, "limits": {"macs": 1.0}}, "pass `limits`, `shares` or `keep`"),
        ({"limits": {"macs": 0.5}}, r"the smallest policy has macs \S+ of \S+: raise the limits"),
        ({"shares": {"macs": 50}}, "shares: macs: must be above 0 and at most 1"),
        ({"shares": {"latency_ms": 0.5}}, "shares: latency_ms: cannot be counted"),
        ({"keep": 1.5}, "keep: must be above 0"),
        ({"keep": 0.5, "policy": "unifrom"}, "unknown policy 'unifrom', did you mean 'uniform'"),
        ({"keep": 0.5, "policy": "ranked"}, 'ranked needs the criterion "group"'),
        ({"keep": 0.5, "policy": "sensitivity"}, "sensitivity needs `score`"),
        ({"policy": {"conv1": 99}}, "conv1: must be a number from 1 to"),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(resnet, options, reason):
    net, x, _ = resnet
    with pytest.raises(UserError, match=reason):
        compress.prune(net, x, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_of_half_precision_is_refused(dtype):
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1).to(dtype))
    said = str(dtype).removeprefix("torch.")
    with pytest.raises(UserError, match=rf"prune: the layer 1 is {said}, not float32, call \.float\(\)"):
        compress.prune(net, torch.randn(2, 3, 4, 4), keep=0.5)


class Fixed(nn.Module):
    """A network whose forward relies on 8 channels."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.second(self.first(x).reshape(len(x), 8, -1, x.shape[3]))


def test_a_network_that_counts_on_its_channels_is_refused():
    with pytest.raises(UserError, match="cannot be pruned, because its forward relies on fixed numbers of channels"):
        compress.prune(Fixed(), torch.randn(2, 3, 4, 4), keep=0.5, round_to=1)


def test_clouds_and_clips_are_pruned_by_the_same_call():
    for name in ("pvcnn_cls", "tsm_resnet18"):
        net, x = network(name), example(name)
        found = compress.prune(net, x, keep=0.5, round_to=4, timed=False)
        assert found.after["macs"] < 0.5 * found.before["macs"]
        assert drawn(trace(found.net, x))
