"""Archs as values, and spaces as the sets of archs that are allowed."""

import json
import random

import numpy as np
import pytest
from tests.spaces import MOBILE, RESNET

from slimray.arch import Arch, Dimension, Space, Stage
from slimray.encoding import GeneTable
from slimray.spec import UserError

SMALL = Space.of(
    {
        "kernel": Dimension.per_block([(3, 5)] * 4),
        "depth": Dimension.depth([(1, 2)] * 2, [Stage(2)] * 2),
        "resolution": Dimension.number((16, 32), input="side"),
    }
)
SPACES = [MOBILE, RESNET, SMALL]


@pytest.mark.parametrize("space", SPACES)
def test_an_arch_survives_json(space):
    for arch in [space.largest(), space.smallest(), space.sample(random.Random(3))]:
        plain = json.loads(json.dumps(arch.to_dict()))
        again = Arch.from_dict(plain)
        assert again == arch
        assert hash(again) == hash(arch)
        assert again.to_dict() == arch.to_dict()
        assert space.arch(again) == arch


def test_a_mobile_arch_is_plain_lists():
    plain = MOBILE.largest().to_dict()
    assert plain == {"kernel": [7] * 20, "expand": [6] * 20, "depth": [4] * 5, "resolution": 224}
    assert MOBILE.arch({"kernel": 7, "expand": 6, "depth": 4}) == MOBILE.largest()


def test_genes_of_skipped_blocks_do_not_count():
    a = MOBILE.arch({"depth": [2, 4, 4, 4, 4]})
    kernel = list(a["kernel"])
    kernel[3] = 3
    b, c = a.replace(kernel=kernel), a.replace(kernel=[3, *kernel[1:]])
    assert a == b
    assert hash(a) == hash(b)
    assert b.to_dict() != a.to_dict()
    assert a != c
    assert Arch.from_dict(a.to_dict()) == Arch.from_dict(b.to_dict())


def test_blocks_that_always_run_are_not_skipped():
    arch = RESNET.arch({"depth": [2, 0, 1, 2, 0]})
    assert arch.runs("expand") == (
        True,
        True,
        False,
        False,
        True,
        True,
        True,
        False,
        *[True] * 6,
        True,
        True,
        False,
        False,
    )
    expand = [0.35] * 18
    expand[0] = 0.2
    assert arch.replace(expand=expand) != arch
    assert RESNET.arch({"depth": [0, 0, 1, 2, 0]}) != arch


@pytest.mark.parametrize("rng", [random.Random(1), np.random.default_rng(1)])
def test_draws_stay_in_the_space(rng):
    for space in SPACES:
        a, b = space.sample(rng), space.sample(rng)
        for arch in (a, b, space.mutate(a, rng), space.cross(a, b, rng)):
            assert space.arch(arch.to_dict()) == arch


def test_mutation_changes_a_tenth_of_the_blocks_and_half_of_the_resolutions():
    rng, base = random.Random(0), MOBILE.largest()
    mutants = [MOBILE.mutate(base, rng) for _ in range(2000)]
    changed = np.mean([[g != 7 for g in m["kernel"]] for m in mutants])
    together = np.mean([a != 7 or b != 6 for m in mutants for a, b in zip(m["kernel"], m["expand"], strict=True)])
    assert changed == pytest.approx(0.1 * 2 / 3, abs=0.01)
    assert together == pytest.approx(0.1 * 8 / 9, abs=0.01)
    assert np.mean([m["resolution"] != 224 for m in mutants]) == pytest.approx(0.5 * 24 / 25, abs=0.04)


def test_a_child_has_genes_of_both_parents():
    child = MOBILE.cross(MOBILE.largest(), MOBILE.smallest(), random.Random(0))
    assert set(child["kernel"]) == {3, 7}
    assert set(child["expand"]) == {3, 6}


def test_codes_tell_different_archs_apart_and_equal_ones_not():
    archs = list(SMALL.archs())
    assert len(archs) == SMALL.num_archs() == len({tuple(SMALL.encode(a)) for a in archs}) == 2 * (2 + 4) ** 2
    full = [list(arch["kernel"]) for arch in archs if arch["depth"] == (1, 1)]
    assert len(full) == 2 * 2 * 2
    assert len(MOBILE.encode(MOBILE.largest())) == 20 * 3 + 20 * 3 + 25
    skipped = MOBILE.arch({"depth": 2})
    assert SMALL.encode(archs[0]) != SMALL.encode(archs[-1])
    assert MOBILE.encode(skipped) == MOBILE.encode(skipped.replace(kernel=[7, 7, 3, 3] * 5))


def test_depth_is_encoded_where_the_genes_of_the_blocks_are_fixed_and_cannot_tell_it():
    depth_alone = MOBILE.restrict(kernel=[7], expand=[6], resolution=[224])
    assert len({tuple(depth_alone.encode(arch)) for arch in depth_alone.archs()}) == depth_alone.num_archs() == 3**5
    clamped = Space.of({"kernel": Dimension.per_block([(3,)] * 2), "depth": Dimension.depth([(1, 2, 3)], [Stage(2)])})
    codes = [clamped.encode(clamped.arch({"depth": depth})) for depth in (1, 2, 3)]
    assert codes[0] != codes[1] == codes[2]


def test_the_published_spaces_have_their_size():
    assert MOBILE.num_archs() == 25 * (9**2 + 9**3 + 9**4) ** 5
    assert RESNET.num_archs() == 2 * (3**2 + 3**3 + 3**4) ** 3 * (3**4 + 3**5 + 3**6) * 3**6


def test_a_restricted_space_keeps_the_largest_where_nothing_is_allowed():
    kernel_only = MOBILE.restrict(expand=(6,), depth=(4,))
    assert kernel_only.smallest()["expand"] == (6,) * 20
    assert kernel_only.smallest()["kernel"] == (3,) * 20
    assert MOBILE.restrict(resolution=(1,)).smallest()["resolution"] == 224
    with pytest.raises(UserError, match="did you mean 'kernel'"):
        MOBILE.restrict(kernl=(3,))


def test_what_is_not_of_the_space_is_named():
    with pytest.raises(UserError, match="kernel: 4 is not one of 3, 5, 7"):
        MOBILE.arch({"kernel": 4})
    with pytest.raises(UserError, match="depth: must be 5 numbers"):
        MOBILE.arch({"depth": [2, 2]})
    with pytest.raises(UserError, match="kernel: '7' is not a number"):
        Arch.from_dict({"kernel": ["7"]})


def test_genes_of_another_part_are_not_taken_for_those_of_skipped_blocks():
    space = Space.of(
        {
            "encoder_ffn": Dimension.per_block([(512, 1024)] * 6, None),
            "decoder_ffn": Dimension.per_block([(512, 1024)] * 6, "decoder_layers"),
            "decoder_layers": Dimension.depth([range(1, 7)], [Stage(6)]),
        }
    )
    two = space.arch({"decoder_layers": 2})
    encoder, decoder = two.replace(encoder_ffn=[1024] * 5 + [512]), two.replace(decoder_ffn=[1024] * 5 + [512])
    assert two != encoder
    assert two == decoder
    assert Arch.from_dict(json.loads(json.dumps(encoder.to_dict()))) == encoder != two
    assert space.num_archs() == 2**6 * sum(2**n for n in range(1, 7))
    table = GeneTable(space)
    assert len(set(table.keys(table.codes([two, encoder, decoder])))) == 2
    assert table.features(table.codes([encoder]))[0].tolist() == space.encode(encoder)


def test_six_genes_of_the_whole_network_beside_twelve_blocks_all_count():
    space = Space.of(
        {
            "kernel": Dimension.per_block([(3, 5)] * 6),
            "depth": Dimension.depth([(1, 2, 3)] * 2, [Stage(3)] * 2),
            "scale": Dimension.per_stage([(1, 2)] * 6),
        }
    )
    shallow = space.arch({"depth": 1})
    other = shallow.replace(scale=[2, 2, 1, 2, 2, 2])
    assert shallow != other
    assert Arch.from_dict(other.to_dict()) == other != Arch.from_dict(shallow.to_dict())


def test_a_dimension_that_does_not_fit_the_blocks_that_skip_it_is_refused():
    with pytest.raises(ValueError, match="kernel: 3 genes do not fit the blocks of depth"):
        Space.of({"kernel": Dimension.per_block([(3, 5)] * 3), "depth": Dimension.depth([(1, 2)] * 2, [Stage(2)] * 2)})
    with pytest.raises(UserError, match="arch: skips: does not fit the genes"):
        Arch.from_dict({"kernel": [3, 5], "d": [1], "skips": {"d": {"stages": [[3, 0]], "skips": ["kernel"]}}})
