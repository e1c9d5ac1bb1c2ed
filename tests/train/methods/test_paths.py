"""A search step is the published one, the same on any number of ranks (real gloo processes), and resumes exactly."""

import json
import math
import random
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.ranks import run_ranks

from slimray import models
from slimray.models.supernets.mixed import MixedNet
from slimray.tasks.network import Input, to_input
from slimray.train.methods.method import Piece, Setup
from slimray.train.methods.paths import Goal, PathReplica, PathSampling, draw_two, entropy
from slimray.train.spec import OptimSpec

OPTIM = OptimSpec(lr=0.1, reference_batch=8, epochs=1, groups="plain", clip_norm=None, weight_decay=0.0)
SHAPE, SIDE = (3, 16, 16), 16
CUTS = {
    "two ranks of 4": [[(0, 4)], [(4, 8)]],
    "a rank without samples": [[(0, 6)], [(6, 6)]],
    "accumulated, last piece empty": [[(0, 2), (2, 4)], [(4, 6), (6, 6)]],
}
MODES = ("two", "full_v2", "reinforce")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Use one thread: inputs here are too small for more to be faster."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build() -> MixedNet:
    return models.build("proxyless_supernet", num_classes=5, preset="tiny", width=0.5)


@lru_cache
def goal(kind: str = "add_linear", weight: float = 0.1, ref: float = 80.0) -> Goal:
    rng = random.Random(0)
    sizes = [len(block.parts) for block in build().mixed]
    edges = tuple(tuple(rng.uniform(1, 9) for _ in range(6)) + (0.0,) * (size - 6) for size in sizes)
    return Goal(kind, weight, ref, 20.0, edges)


def make(gradient: str = "two", rank: int = 0, world: int = 1, **plan) -> PathReplica:
    torch.manual_seed(0)
    net = build()
    paths = PathSampling(**({"goal": goal(), "gradient": gradient, "nets": 3} | plan))
    return PathReplica(net, paths, Setup(OPTIM, Input(), SHAPE, torch.device("cpu"), rank, world))


def samples(count: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 1, SIDE, SIDE, 3), dtype=np.uint8), rng.integers(0, 5, count)


def steps_of(rank: int, world: int, cuts: list[list[tuple[int, int]]], gradient: str) -> dict[str, torch.Tensor]:
    """Take two steps of each kind, with running BatchNorm statistics so that ranks can be compared."""
    torch.set_default_dtype(torch.float64)
    data, labels = samples()
    replica = make(gradient, rank, world, lr=0.1)
    replica.optim = replica.optim.model_copy(update={"norm": "frozen"})
    pieces = [Piece(data[lo:hi], labels[lo:hi]) for lo, hi in cuts[rank]]
    count = sum(hi - lo for cut in cuts for lo, hi in cut)
    for number in range(2):
        assert replica.step(pieces, count, 0.1, (7, 2 * number)).finite
        assert replica.search_step(pieces, count, (7, 2 * number + 1)).finite
    return {k: v.clone() for k, v in replica.tensors().items() if not k.startswith("norms.")}


# ------------------------------------------------------------------------------------------------- the costs


@pytest.fixture(scope="module")
def recorded(shared: Path) -> dict:
    return json.loads((shared / "parity/proxylessnas_search.json").read_text())


@pytest.mark.parametrize("latency", ["60", "80", "100"])
def test_regularisers_and_reward_are_the_published_ones(recorded, latency):
    loss, cost = torch.tensor(2.5), torch.tensor(float(latency))
    for kind, weight in (("mul_log", 0.3), ("add_linear", 0.1)):
        found = Goal(kind, weight, 80.0, 0.0, ()).joined(loss, cost)
        assert float(found) == pytest.approx(recorded[kind][latency], rel=1e-5)
    reward = Goal("add_linear", 0.1, 80.0, 0.0, ()).reward(0.7, float(latency))
    assert reward == pytest.approx(recorded["rl_reward"][latency], rel=1e-5)


def test_the_expected_cost_is_the_mean_over_all_paths():
    small = Goal("add_linear", 0.1, 5.0, 3.0, ((1.0, 2.0), (4.0, 0.0, 7.0)))
    alphas = [torch.tensor([0.3, -0.1]), torch.tensor([1.0, 0.2, -2.0])]
    chances = [one.softmax(0).tolist() for one in alphas]
    total = sum(chances[0][i] * chances[1][j] * small.of((i, j)) for i in range(2) for j in range(3))
    assert float(small.expected(alphas)) == pytest.approx(total)
    assert small.of((1, 1)) == 5.0


# --------------------------------------------------------------------------------------------------- the step


@pytest.mark.parametrize("kind", ["add_linear", "mul_log"])
def test_a_search_step_follows_the_gradient_of_the_joined_loss(kind):
    """Compare with gates written out as factors of the candidates' outputs."""
    torch.set_default_dtype(torch.float64)
    try:
        chosen = goal(kind, 0.3)
        replica = make("full_v2", goal=chosen, lr=1e-3)
        replica.net.eval()
        data, labels = samples()
        _, gradients = replica._through_gates(
            [Piece(data[:5], labels[:5]), Piece(data[5:], labels[5:])],
            8,
            [tuple(range(len(one))) for one in replica.alphas],
            random.Random("7-3-search"),
        )
        rng = random.Random("7-3-search")
        path = tuple(rng.choices(range(len(one)), one)[0] for one in replica.probabilities())
        net, alphas = replica.net, [one.clone().requires_grad_() for one in replica.alphas]
        x = to_input(data, Input(), torch.device("cpu"))
        gates = []
        for block, one, active in zip(net.mixed, alphas, path, strict=True):
            chances = one.softmax(0)
            binary = torch.eye(len(one))[active]
            gates.append((block, binary + chances - chances.detach()))
        number = 0
        for placed in net.plan:
            module = net.get_submodule(placed.name)
            if placed.elastic:
                block, gate = gates[number]
                added = [torch.zeros(()) if part is None else part for part in branches(block, x)]
                mixed = sum(g * part for g, part in zip(gate, added, strict=True))
                x = x + mixed if block.residual else mixed
                number += 1
            else:
                x = module(x)
        task = torch.nn.functional.cross_entropy(x, torch.from_numpy(labels))
        wanted = torch.autograd.grad(chosen.joined(task, chosen.expected(alphas)), alphas)
        skipped = [block.is_nothing(active) for block, active in zip(net.mixed, path, strict=True)]
        assert any(skipped)
        assert not all(skipped)
        for found, expected, left_out in zip(gradients, wanted, skipped, strict=True):
            if left_out:
                assert found is None
            else:
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    finally:
        torch.set_default_dtype(torch.float32)


def branches(block, x):
    return [block._branch(number, x) for number in range(len(block.parts))]


def test_two_candidates_keep_what_they_share_and_a_block_that_is_nothing_keeps_its_alphas():
    replica = make("two", goal=goal(weight=0.0), lr=0.5)
    data, labels = samples()
    moved = kept = 0
    for number in range(6):
        before = [alphas.clone() for alphas in replica.alphas]
        replica.search_step([Piece(data, labels)], 8, (1, number))
        for old, new in zip(before, replica.alphas, strict=True):
            changed = (new != old).nonzero().flatten().tolist()
            if not changed:
                kept += 1
                continue
            moved += 1
            assert len(changed) == 2  # no cost in the loss: the others get no gradient
            torch.testing.assert_close(new[changed].logsumexp(0), old[changed].logsumexp(0), rtol=1e-5, atol=1e-5)
    assert moved > 20
    assert kept > 0


def test_weights_stay_in_a_search_step_and_alphas_in_a_step():
    data, labels = samples()
    for gradient in MODES:
        replica = make(gradient)
        weights = {name: value.clone() for name, value in replica.net.named_parameters()}
        alphas = [one.clone() for one in replica.alphas]
        replica.search_step([Piece(data, labels)], 8, (0, 0))
        assert all(torch.equal(value, weights[name]) for name, value in replica.net.named_parameters())
        assert all(value.grad is None for value in replica.net.parameters())
        if gradient != "reinforce":  # no hits, no reward, so nothing to learn from
            assert sum(not torch.equal(a, b) for a, b in zip(replica.alphas, alphas, strict=True)) > 3
        alphas = [one.clone() for one in replica.alphas]
        replica.step([Piece(data, labels)], 8, 0.1, (0, 1))
        assert all(torch.equal(a, b) for a, b in zip(replica.alphas, alphas, strict=True))
        changed = [name for name, value in replica.net.named_parameters() if not torch.equal(value, weights[name])]
        assert len(changed) > 20


@pytest.mark.parametrize("gradient", MODES)
def test_a_cost_that_counts_a_lot_makes_the_search_choose_what_is_cheap(gradient):
    # all networks are equally good on random labels; rewards need hits, so all samples have the likeliest class
    replica = make(gradient, goal=goal(weight=50.0 if gradient != "reinforce" else 3.0), lr=0.2, nets=4)
    replica.net.classifier.linear.bias.data[2] = 100.0
    data, labels = samples(4)
    labels[:] = 2
    start = replica.numbers()
    for number in range(20):
        replica.search_step([Piece(data, labels)], 4, (0, number))
    end = replica.numbers()
    assert end["search/expected_cost"] < 0.8 * start["search/expected_cost"]
    assert end["search/entropy"] < start["search/entropy"] <= 1.0


def test_the_warm_up_draws_all_candidates_alike_and_then_the_alphas_decide():
    replica = make(goal=None)
    for alphas in replica.alphas:
        alphas[2] = 5.0
    paths = [replica._draw_path(random.Random(f"{number}")) for number in range(700)]
    counts = np.bincount([path[1] for path in paths], minlength=7)
    assert counts.min() > 60  # 100 are expected, four standard deviations are 37
    replica.method = PathSampling(goal())
    paths = [replica._draw_path(random.Random(f"{number}")) for number in range(200)]
    assert sum(path[1] == 2 for path in paths) > 180
    assert paths[3] == replica._draw_path(random.Random("3"))
    assert replica.numbers()["search/entropy"] < 0.3


def test_two_are_drawn_without_replacement_by_their_probabilities():
    rng = random.Random(0)
    pairs = [draw_two([0.7, 0.2, 0.1], rng) for _ in range(2000)]
    assert all(first != second for first, second in pairs)
    assert sum(first == 0 for first, _ in pairs) / 2000 == pytest.approx(0.7, abs=0.05)
    after = [second for first, second in pairs if first == 0]
    assert sum(second == 1 for second in after) / len(after) == pytest.approx(2 / 3, abs=0.05)
    assert {draw_two([1.0, 0.0, 0.0], rng)[0] for _ in range(20)} == {0}


def test_entropy_is_one_where_all_are_alike_and_zero_where_one_is_certain():
    assert entropy([[0.25] * 4, [0.5, 0.5]]) == pytest.approx(1)
    assert entropy([[1.0, 0.0]]) == 0


# ----------------------------------------------------------------------------------------- ranks and resume


@pytest.mark.parametrize("gradient", MODES)
def test_a_search_that_goes_on_ends_in_the_same_bits(gradient):
    data, labels = samples()

    def advance(replica: PathReplica, numbers: range) -> None:
        for number in numbers:
            replica.step([Piece(data, labels)], 8, 0.05, (3, 2 * number))
            replica.search_step([Piece(data, labels)], 8, (3, 2 * number + 1))

    whole, first, second = make(gradient, lr=0.05), make(gradient, lr=0.05), make(gradient, lr=0.05)
    advance(whole, range(3))
    advance(first, range(2))
    state = {name: value.clone() for name, value in first.tensors().items()}
    assert any(name.startswith("adam.") for name in state)
    second.load(state)
    advance(second, range(2, 3))
    done, again = whole.tensors(), second.tensors()
    assert done.keys() == again.keys()
    for name, value in done.items():
        assert torch.equal(value, again[name]) or (math.isnan(value.sum()) and name == "baseline"), name


def test_a_gradient_that_is_not_finite_moves_nothing():
    replica = make("full_v2", lr=0.5)
    replica.net.classifier.linear.weight.data[0, 0] = float("inf")
    before = [one.clone() for one in replica.alphas]
    data, labels = samples()
    assert not replica.search_step([Piece(data, labels)], 8, (0, 0)).finite
    assert all(torch.equal(a, b) for a, b in zip(replica.alphas, before, strict=True))


def rank_of_two(rank: int, case: str, out: str, gradient: str) -> None:
    torch.save(steps_of(rank, 2, CUTS[case], gradient), f"{out}/{rank}.pt")


@pytest.mark.parametrize(
    ("case", "gradient"),
    list(zip(CUTS, ("reinforce", "full_v2", "two"), strict=True)),
)
def test_two_ranks_search_as_one_does(case: str, gradient: str, tmp_path: Path):
    run_ranks(rank_of_two, case, str(tmp_path), gradient)
    try:
        alone = steps_of(0, 1, [[cut for rank in CUTS[case] for cut in rank if cut[0] < cut[1]]], gradient)
    finally:
        torch.set_default_dtype(torch.float32)
    start = {f"model.{name}": value for name, value in make().net.state_dict().items()}
    moved = [name for name in start if not torch.equal(alone[name].float(), start[name])]
    assert len(moved) > 30
    assert gradient == "reinforce" or sum(name.endswith("alphas") for name in moved) > 3
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, value in alone.items():
        torch.testing.assert_close(both[0][name], value, rtol=1e-9, atol=1e-12, equal_nan=True)
        assert torch.equal(both[0][name], both[1][name]) or name == "baseline"
