"""Mixed blocks: the published gradients of gates, one path at a time, and the found network equals the searched one."""

import json
import random
from pathlib import Path

import pytest
import torch
from torch import nn

from slimray import models
from slimray.edge import cost
from slimray.models.supernets.mixed import Gates, MixedBlock, MixedNet, candidates, gated
from slimray.models.supernets.ofa_mobilenet import MBConv
from slimray.spec import UserError
from slimray.train.methods.paths import rescale


@pytest.fixture(scope="module")
def recorded(shared: Path) -> dict:
    return json.loads((shared / "parity/proxylessnas_search.json").read_text())


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Use few threads, as inputs here are too small for more to be faster."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(**options) -> MixedNet:
    torch.manual_seed(0)
    net = models.build("proxyless_supernet", num_classes=5, preset="tiny", **options)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return net


def random_path(net: MixedNet, seed: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(len(block.parts)) for block in net.mixed)


def test_the_published_supernet_has_as_many_weights_and_choices(recorded):
    net = cost.build_on_meta(lambda: models.build("proxyless_supernet", num_classes=1000))
    assert cost.count_params(net) == recorded["supernet_params"] == 16_034_168
    assert [len(block.parts) for block in net.mixed] == recorded["n_choices"]
    assert len(net.mixed) == recorded["n_mixed_edges"] == 21


@pytest.mark.parametrize("mode", [0, 1, 2], ids=["full_v2", "full", "two"])
def test_gradients_of_gates_and_alphas_are_the_published_ones(recorded, mode):
    case = recorded["mixed_edge"][mode]
    alphas = torch.tensor(case["alpha"], requires_grad=True)
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    (active,) = case["active"]
    members = sorted([active, *case["inactive"]])
    chances = alphas[members].softmax(0)
    opened = chances.detach().requires_grad_()
    calls: list[int] = []

    def candidate(number: int):
        def run(x):
            calls.append(number)
            assert not torch.is_grad_enabled()
            return (number + 1) * x

        return run

    others = [None if number == active else candidate(number) for number in members]
    y = gated((active + 1) * x, x, opened, others)
    torch.testing.assert_close(y, (active + 1) * x)
    assert calls == []  # only the active candidate has run until now
    (gates,) = torch.autograd.grad((y**2).sum(), opened)
    assert calls == case["inactive"]
    torch.testing.assert_close(gates, torch.tensor(case["binary_grad"])[members], rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(chances, alphas, gates)
    torch.testing.assert_close(gradient, torch.tensor(case["alpha_grad"]), rtol=1e-5, atol=1e-5)
    if case["mode"] == "two":
        with torch.no_grad():
            moved = alphas - 0.01 * gradient
        torch.testing.assert_close(moved, torch.tensor(case["alpha_after_sgd0.01"]), rtol=1e-5, atol=1e-7)
        rescale(moved, alphas.detach(), members)
        torch.testing.assert_close(moved, torch.tensor(case["alpha_after_rescale"]), rtol=1e-5, atol=1e-6)


def test_gates_weigh_what_the_candidates_of_a_block_would_have_given():
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float64)
    try:
        block = MixedBlock(MBConv(8, 48, 8, 7, 1, "relu6", False)).eval()
        x, target = torch.randn(2, 8, 6, 6), torch.randn(2, 8, 6, 6)
        opened = torch.full((3,), 1 / 3, requires_grad=True)
        out = block(x, 1, Gates((1, 4, 6), opened))
        (found,) = torch.autograd.grad(((out - target) ** 2).sum(), opened)
        soft = torch.tensor([1.0, 0.0, 0.0], requires_grad=True)  # the gates as numbers: their gradient is the same
        mixed = x + soft[0] * (block(x, 1) - x) + soft[1] * (block(x, 4) - x)
        (wanted,) = torch.autograd.grad(((mixed - target) ** 2).sum(), soft)
        torch.testing.assert_close(found, wanted)
        assert found[2] == 0  # nothing adds nothing
        assert found[:2].abs().min() > 1e-3
    finally:
        torch.set_default_dtype(torch.float32)


def test_only_the_path_has_gradients_and_running_statistics():
    net = tiny().train()
    path = random_path(net, 3)
    before = {name: value.clone() for name, value in net.named_buffers()}
    net(torch.randn(4, 3, 32, 32), path).sum().backward()
    for block, number in zip(net.mixed, path, strict=True):
        for place, choice in enumerate(block.choices):
            ran = [parameter.grad is not None for parameter in choice.parameters()]
            assert all(ran) if place == number else not any(ran)
    for name, value in net.named_buffers():
        _, _, rest = name.partition(".choices.")
        block = name.partition(".choices.")[0]
        if not rest or not rest.endswith("running_mean"):
            continue
        number = path[[f"blocks.{i}" for i in range(1, 11)].index(block)]
        assert torch.equal(value, before[name]) == (int(rest.partition(".")[0]) != number)


@pytest.mark.parametrize("seed", range(3))
def test_what_a_path_computes_is_what_its_extracted_net_computes(seed):
    net, x = tiny(), torch.randn(3, 3, 32, 32)
    path = random_path(net, seed)
    with torch.no_grad():
        net.train()(x, path)  # statistics of its own
        net.eval()
        out, plain = net(x, path), net.extract(path)
        torch.testing.assert_close(plain(x), out, rtol=1e-5, atol=1e-5)
        assert out.std(0).min() > 1e-3  # the input matters
        other = models.build("proxyless_found", num_classes=5, preset="tiny", blocks=net.describe(path)).eval()
        other.load_state_dict(plain.state_dict())
        torch.testing.assert_close(other(x), out, rtol=1e-5, atol=1e-5)
    plain.get_parameter("classifier.linear.weight").data.zero_()
    assert net.get_parameter("classifier.linear.weight").abs().sum() > 0


def test_without_a_path_the_likeliest_one_runs():
    net, x = tiny().eval(), torch.randn(2, 3, 32, 32)
    path = random_path(net, 5)
    for block, number in zip(net.mixed, path, strict=True):
        block.alphas[number] = 2.0
    assert net.most_likely() == path
    assert torch.equal(net(x), net(x, path))
    with pytest.raises(ValueError, match="must choose one of"):
        net(x, path[:-1])


def test_alphas_are_saved_with_the_net_and_are_no_parameters():
    net, names = tiny(), [name for name, _ in tiny().named_parameters()]
    assert not any("alphas" in name for name in names)
    assert sum("alphas" in name for name in net.state_dict()) == 10
    assert max(block.alphas.abs().max() for block in net.mixed) < 0.01
    again = tiny()
    again.mixed[0].alphas += 1
    again.load_state_dict(net.state_dict())
    assert torch.equal(again.mixed[0].alphas, net.mixed[0].alphas)


def test_units_add_up_to_what_a_path_costs():
    net = models.build("proxyless_supernet", num_classes=5, preset="tiny")
    fixed, edges = net.units(24)
    assert {unit.key for edge in edges for unit in edge if unit} <= set(
        models.build("ofa_proxyless", num_classes=5, preset="tiny").all_units([24])
    )

    def macs(unit) -> int:
        return cost.count_macs(cost.build_on_meta(unit.make).eval(), (1, *unit.input))

    for seed in range(3):
        path = random_path(net, seed)
        units = [*fixed, *(edge[number] for edge, number in zip(edges, path, strict=True))]
        assert sum(macs(unit) for unit in units if unit) == cost.count_macs(net.extract(path), (1, 3, 24, 24))


def test_a_block_with_a_shortcut_may_be_nothing():
    wide = MBConv(16, 96, 16, 7, 1, "relu6", False)
    assert list(candidates(wide)) == ["3/3", "5/3", "7/3", "3/6", "5/6", "7/6", "-"]
    assert list(candidates(MBConv(16, 96, 24, 7, 1, "relu6", False)))[-1] == "7/6"


def test_blocks_that_are_none_are_refused_with_a_sentence():
    with pytest.raises(UserError, match="blocks: must be stages of 3, 3, 3, 1 blocks"):
        models.build("proxyless_found", num_classes=5, preset="tiny", blocks="3/3 3/3, -")
    with pytest.raises(UserError, match="'-' is not one of"):
        models.build("proxyless_found", num_classes=5, preset="tiny", blocks="- - -, 3/3 - -, 3/3 - -, 3/3")
