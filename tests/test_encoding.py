"""Archs as matrices behave like single archs, and looked-up costs are sums over the blocks that run."""

import itertools
import random

import numpy as np
import pytest
from tests.spaces import MOBILE, RESNET

from slimray.arch import Arch, Dimension, Space, Stage
from slimray.encoding import GeneTable, cost_tables, costs_by_arch, part

FRAMES = Dimension.number((4, 8), input="frames")
CLAMPED = Space.of(
    {
        "kernel": Dimension.per_block([(3, 5)] * 4),
        "depth": Dimension.depth([(1, 2, 3)] * 2, [Stage(2), Stage(2, 1)]),
        "frames": FRAMES,
    }
)
FIXED = Space.of(
    {
        "kernel": Dimension.per_block([(3,)] * 4),
        "depth": Dimension.depth([(1, 2, 3)] * 2, [Stage(3), Stage(1)]),
        "frames": FRAMES,
    }
)
FLAT = Space.of({"width": Dimension.per_stage([(8, 16, 24)] * 3), "resolution": Dimension.number((16, 32))})
SPACES = {"mobile": MOBILE, "resnet": RESNET, "clamped": CLAMPED, "fixed": FIXED, "flat": FLAT}


@pytest.fixture(params=SPACES, ids=list(SPACES))
def table(request):
    return GeneTable(SPACES[request.param])


def test_rows_and_archs_are_the_same_thing(table):
    rng = random.Random(1)
    archs = [table.space.sample(rng) for _ in range(50)] + [table.space.largest(), table.space.smallest()]
    codes = table.codes(archs)
    assert [arch.to_dict() for arch in table.archs(codes)] == [arch.to_dict() for arch in archs]
    assert np.array_equal(table.codes(table.archs(codes)), codes)
    assert not codes[-1].any()
    assert table.codes([]).shape == (0, len(table.genes))


def test_features_are_what_the_space_encodes(table):
    codes = table.sample(60, np.random.default_rng(2))
    assert np.array_equal(table.features(codes), np.array([table.space.encode(a) for a in table.archs(codes)]))


def test_keys_are_equal_just_where_archs_are(table):
    rng = np.random.default_rng(3)
    codes = table.sample(40, rng)
    codes = np.concatenate([codes, table.mutate(codes, rng, 0.05, 0.1), table.mutate(codes, rng, 0.02, 0.0)])
    archs, keys = table.archs(codes), table.keys(codes)
    pairs = list(itertools.combinations(range(len(codes)), 2))
    assert [keys[a] == keys[b] for a, b in pairs] == [archs[a] == archs[b] for a, b in pairs]
    assert any(keys[a] == keys[b] for a, b in pairs)
    assert table.archs(table.canonical(codes)) == archs


def test_a_whole_space_has_as_many_keys_as_archs():
    table = GeneTable(CLAMPED)
    every = np.array(list(itertools.product(*(range(size) for size in table.sizes))))
    assert len(set(table.keys(every))) == table.num_archs == len(list(CLAMPED.archs()))


def test_draws_are_those_of_the_space():
    table, rng = GeneTable(MOBILE), np.random.default_rng(4)
    drawn = table.sample(20_000, rng)
    shares = [np.bincount(column, minlength=size) / len(drawn) * size for column, size in zip(drawn.T, table.sizes)]
    assert np.concatenate(shares) == pytest.approx(1, abs=0.2)
    base = np.repeat(table.codes([MOBILE.largest()]), 5000, axis=0)
    changed = table.mutate(base, rng, 0.1, 0.5) != base
    kernel, expand, depth = changed[:, :20], changed[:, 20:40], changed[:, 40:45]
    assert kernel.mean() == pytest.approx(0.1 * 2 / 3, abs=0.005)
    assert (kernel | expand).mean() == pytest.approx(0.1 * 8 / 9, abs=0.005)  # together, not each on its own
    assert depth.mean() == pytest.approx(0.1 * 2 / 3, abs=0.01)
    assert changed[:, 45].mean() == pytest.approx(0.5 * 24 / 25, abs=0.03)
    child = table.cross(base, np.zeros_like(base), rng)
    assert ((child == base) | (child == 0)).all()
    assert (child == 0).mean() == pytest.approx(0.5, abs=0.01)


def test_neighbours_differ_in_one_gene(table):
    row = table.sample(1, np.random.default_rng(5))[0]
    near = table.neighbours(row)
    assert len(near) == (table.sizes - 1).sum() == len(np.unique(near, axis=0))
    assert ((near != row).sum(1) == 1).all()
    assert (near < table.sizes).all()


def cost_of_block(kernel, expand, resolution):
    return kernel**2 * expand * resolution / 100


def test_looked_up_costs_are_sums_over_the_blocks_that_run():
    table = GeneTable(MOBILE)
    parts = [part(table, [("kernel", i), ("expand", i), ("resolution", 0)], cost_of_block) for i in range(20)]
    parts += [part(table, [("resolution", 0)], lambda r: r**2), part(table, [], lambda: 7.0)]
    costs = cost_tables(table, {"latency_ms": parts, "memory_mb": parts}, peaks=("memory_mb",))
    codes = table.sample(100, np.random.default_rng(6))
    found = costs(codes)
    for row, arch in enumerate(table.archs(codes)):
        genes = zip(arch["kernel"], arch["expand"], arch.runs("kernel"))
        each = [cost_of_block(k, e, arch["resolution"]) for k, e, runs in genes if runs]
        assert found["latency_ms"][row] == pytest.approx(sum(each) + arch["resolution"] ** 2 + 7)
        assert found["memory_mb"][row] == pytest.approx(max(*each, arch["resolution"] ** 2, 7))


def test_a_part_over_two_blocks_costs_only_where_both_run():
    table = GeneTable(RESNET)
    pair = part(table, [("expand", 3), ("expand", 10), ("width", 0)], lambda a, b, w: 1 + a * b + w)
    codes = table.sample(300, np.random.default_rng(7))
    found = cost_tables(table, {"macs": [pair]})(codes)["macs"]
    archs = table.archs(codes)
    wanted = [
        1 + a["expand"][3] * a["expand"][10] + a["width"][0] if a.runs("expand")[3] and a.runs("expand")[10] else 0
        for a in archs
    ]
    assert found == pytest.approx(wanted)
    assert 0 in wanted
    always = part(table, [("expand", 0)], lambda e: e)
    assert always.values.shape == (3,)  # a block that always runs needs no depth


def test_costs_of_single_archs_are_asked_for_once():
    table, asked = GeneTable(CLAMPED), []

    def count(arch: Arch) -> dict[str, float]:
        asked.append(arch)
        return {"params": float(sum(k for k, runs in zip(arch["kernel"], arch.runs("kernel")) if runs))}

    costs = costs_by_arch(table, count)
    codes = table.sample(500, np.random.default_rng(8))
    first, second = costs(codes)["params"], costs(codes[::-1])["params"]
    assert np.array_equal(first, second[::-1])
    assert len(asked) == len(set(asked)) == len(set(table.archs(codes)))
    assert costs(codes[:0]) == {}
