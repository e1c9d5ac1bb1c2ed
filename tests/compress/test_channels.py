"""Structured pruning of all networks: pruned equals masked, costs equal the predicted ones, the record rebuilds."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.compress.networks import PRUNABLE, REFUSED, example, network, options, outputs
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from slimray import compress, models
from slimray.compress.channels import cut, masked
from slimray.compress.groups import Groups, trace
from slimray.edge import cost
from slimray.models.tsm import OnlineTSM
from slimray.spec import UserError


def drawn(groups: Groups, seed: int = 0, least: int = 4) -> dict[str, list[int]]:
    """Return a random policy: how many channels of each group are kept, and which."""
    rng = np.random.default_rng(seed)
    kept = {}
    for group in groups.groups:
        count = int(rng.integers(min(least, group.size), group.size + 1))
        kept[group.name] = np.sort(rng.choice(group.size, count, replace=False)).tolist()
    return kept


def macs(net: nn.Module, x: torch.Tensor) -> float:
    with FlopCounterMode(display=False) as counter:
        outputs(net, x)
    return counter.get_total_flops() / 2 / len(x)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", PRUNABLE)
def test_a_pruned_network_equals_the_masked_one_and_costs_what_was_predicted(name):
    net, x = network(name), example(name)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    groups = trace(net, x)
    kept = drawn(groups)
    small, record = cut(net, groups, kept)
    counts = {group: len(places) for group, places in kept.items()}
    floor = groups.costs(dict.fromkeys(groups.sizes, 1))["macs"] / groups.costs({})["macs"]
    assert floor < 0.3, f"{floor:.0%} of the MACs stay whatever is removed: an operator without a rule?"
    for policy, one in (({}, net), (counts, small)):
        params = cost.count_params(one)
        assert groups.costs(policy) == {"macs": macs(one, x), "params": params, "size_mb": params * 4e-6}
    got, wanted, whole = outputs(small, x), outputs(masked(net, groups, kept), x), outputs(net, x)
    assert distance(got, wanted) < (1e-5 if got.dtype == torch.float32 else 1e-10)
    assert distance(whole, wanted) > 1e-3, "the removed channels do not matter: nothing is shown"
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    again = compress.build(compression=[record], **models.explicit({"name": name, **options(name)}))
    again.load_state_dict(small.state_dict(), strict=True)
    assert distance(outputs(again.to(x.dtype).eval(), x), got) < 1e-6


@pytest.mark.parametrize("name", REFUSED)
def test_supernets_refuse_with_a_sentence(name):
    tiny = {"num_classes": 5, "vocab_size": 20, "preset": "tiny"}
    net = models.build(name, **{option: tiny[option] for option in tiny if option in models.options_of(name)})
    with pytest.raises(UserError, match="supernet, search it or prune one of its subnets"):
        trace(net, torch.zeros(1, 3, 32, 32))


def test_a_subnet_of_a_shifted_supernet_is_pruned():
    supernet = models.build("ofa_tsm_mobilenetv3", num_classes=5, num_segments=4, width=0.25)
    net = supernet.extract(supernet.space.largest()).double().eval()  # type: ignore[operator]
    x = torch.randn(2, net.num_segments, 3, 32, 32, dtype=torch.float64)
    groups = trace(net, x)
    kept = drawn(groups, 1)
    small, record = cut(net, groups, kept)
    assert any("folds" in place for place in record["places"].values())
    assert distance(outputs(small, x), outputs(masked(net, groups, kept), x)) < 1e-10


def test_a_pruned_shift_keeps_its_two_parts_and_the_online_form_equals_it():
    net, x = network("tsm_resnet18", causal=True), example("tsm_resnet18")
    groups = trace(net, x)
    small, record = cut(net, groups, drawn(groups, 2))
    folds = {tuple(place["folds"]) for place in record["places"].values()}
    assert any(first != second for first, second in folds), "both parts lost equally many: nothing is shown"
    online = OnlineTSM(small).eval()  # type: ignore[arg-type]
    buffers, logits = tuple(b.double() for b in online.initial_buffers(2, 32, 32)), []
    with torch.no_grad():
        for frame in x.unbind(1):
            out, buffers = online(frame, buffers)
            logits.append(out)
    assert distance(torch.stack(logits).mean(0).flatten(), outputs(small, x)) < 1e-10


def test_a_pruned_clip_network_exports():
    net, x = network("tsm_mobilenetv2").float(), example("tsm_mobilenetv2").float()
    groups = trace(net, x)
    small, _ = cut(net, groups, drawn(groups, 3))
    exported = torch.export.export(small, (x,)).module()
    assert distance(exported(x).flatten(), outputs(small, x)) < 1e-5


def test_pruning_twice_is_pruning_the_pruned():
    net, x = network("tsm_resnet18"), example("tsm_resnet18")
    records = []
    for seed in (1, 2):
        groups = trace(net, x)
        kept = drawn(groups, seed)
        expected = outputs(masked(net, groups, kept), x)
        net, record = cut(net, groups, kept)
        records.append(record)
        assert distance(outputs(net, x), expected) < 1e-10
    again = compress.build("tsm_resnet18", compression=records, **options("tsm_resnet18")).double().eval()
    again.load_state_dict(net.state_dict())
    assert distance(outputs(again, x), outputs(net, x)) < 1e-12


def test_training_goes_on_after_pruning():
    net, x = network("mobilenetv2"), example("mobilenetv2")
    groups = trace(net, x)
    small, _ = cut(net, groups, drawn(groups, 4))
    small.train()(x).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        ({"conv9": [0]}, "has no group 'conv9'"),
        ({"conv1": []}, "at least one"),
        ({"conv1": [0, 0]}, "distinct indices"),
        ({"conv1": [99]}, "distinct indices from 0 to"),
    ],
)
def test_impossible_choices_are_one_sentence(kept, reason):
    net, x = network("resnet18"), example("resnet18")
    with pytest.raises(UserError, match=reason):
        cut(net, trace(net, x), kept)


@pytest.mark.parametrize(
    "change",
    [
        {"modules": {"conv1": [3, 99, 1]}},
        {"modules": {"conv1": [3, 0, 1]}},
        {"modules": {"conv1": [3]}},
        {"modules": {"nothing": [3, 3, 1]}},
        {"modules": {"relu": [3]}},
        {"modules": {"conv1": "3, 4"}},
        {"places": {"conv1": {"folds": [1, 1]}}},
        {"places": {"layer1": {"low": -1, "high": 0}}},
        {"modules": None},
    ],
)
def test_records_that_do_not_fit_are_refused(change):
    record = {"step": "prune", "channels": {}, "modules": {}, "places": {}} | change
    with pytest.raises(UserError, match=r"compression\[0\]: the record of prune does not match"):
        compress.build("resnet18", num_classes=5, width=0.25, compression=[record])


# ------------------------------------------------------------------------------------- networks of users


class Plain(nn.Module):
    """A network as users write it: an operator between two convolutions."""

    def __init__(self, between, wide: int = 8):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(wide, 8, 3, padding=1)
        self.between, self.head = between, nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.second(self.between(self.first(x))).mean((2, 3)))


@pytest.mark.parametrize(
    ("between", "wide", "free"),
    [
        (lambda x: x.relu(), 8, True),
        (lambda x: x * torch.sigmoid(x), 8, True),
        (lambda x: torch.cat([x, x.flip(-1)], 1), 16, True),
        (lambda x: torch.nn.functional.pixel_shuffle(x, 2), 2, True),
        (lambda x: x - x.mean((2, 3), keepdim=True), 8, True),
        (lambda x: x.amax(3, keepdim=True) * x, 8, True),
        (lambda x: x.unflatten(2, (8, 4)).flatten(2, 3), 8, True),
        (torch.sigmoid, 8, False),  # a removed channel would have to be 1/2
        (lambda x: x + 1, 8, False),
        (lambda x: x.softmax(1), 8, False),
        (lambda x: x - x.mean(1, keepdim=True), 8, False),
        (lambda x: x[:, :4], 4, False),  # by a fixed number
        (lambda x: x.roll(1, 1), 8, False),
        (lambda x: x.unflatten(1, (2, 4)).flatten(1, 2), 8, False),
        (lambda x: x * torch.linspace(0, 1, 8)[:, None, None], 8, False),
        (lambda x: torch.fft.fft2(x).real, 8, False),  # an operator without a rule
        (lambda x: x.sort(1).values, 8, False),
    ],
)
def test_what_stands_between_two_layers_frees_or_keeps_their_channels(between, wide, free):
    torch.manual_seed(0)
    net, x = Plain(between, wide).eval(), torch.randn(2, 3, 32, 32)
    groups = trace(net, x)
    assert ("first" in groups.sizes) == free
    kept = drawn(groups, 5, least=1)
    small, _ = cut(net, groups, kept)
    assert distance(outputs(small, x), outputs(masked(net, groups, kept), x)) < 1e-5


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "mobilenetv3_large"])
def test_the_memory_format_of_the_example_changes_nothing(name):
    net, x = network(name), example(name)
    assert trace(net, x.contiguous(memory_format=torch.channels_last)).sizes == trace(net, x).sizes


def test_layers_that_share_a_tensor_stay_whole():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 6), nn.Linear(6, 2))
    net[2].weight = net[0].weight
    assert trace(net, torch.randn(3, 4)).sizes == {"4": 6}


def test_a_network_of_unknown_layers_refuses_with_a_sentence():
    with pytest.raises(UserError, match="no channel of this network can be removed"):
        trace(nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4))


def test_groups_are_plain_values():
    groups = trace(network("resnet18"), example("resnet18"))
    assert groups.groups[0] == groups.groups[0]
    assert replace(groups.groups[0], name="other").size == groups.groups[0].size


def test_channels_are_masked_where_the_network_is():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))
    groups = trace(net, torch.rand(1, 3, 8, 8))
    same = masked(net.to("meta"), groups, {groups.groups[0].name: [0, 2]})
    assert {one.device.type for one in same.parameters()} == {"meta"}
