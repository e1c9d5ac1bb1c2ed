"""HAT's supernets: sizes of all published subnets, and subnets that compute the same after extraction."""

import json
import random

import pytest
import torch

from slimray import models
from slimray.data.text.vocabulary import EOS, PAD
from slimray.edge.arch_costs import Prices
from slimray.edge.cost import build_on_meta, count_macs, count_params
from slimray.encoding import GeneTable
from slimray.models.text import hat
from slimray.spec import UserError

SPANS = {-1: 1, 1: 2, 2: 3}  # as published configs write it -> outputs attended to


@pytest.fixture(scope="module")
def published(shared):
    return json.loads((shared / "parity/language/hat_counts.json").read_text())


@pytest.fixture(scope="module")
def supernets():
    return {
        name: build_on_meta(lambda name=name: models.build(name, vocab_size=32)) for name in ("hat_wmt", "hat_iwslt")
    }


def of_config(supernets, title, config):
    """Return the supernet and the arch of a published config; layers missing from it get the largest values."""
    net = supernets["hat_iwslt" if "iwslt" in title else "hat_wmt"]
    encoder, decoder = config["encoder"], config["decoder"]
    depth = decoder["decoder_layer_num"]
    lists = {
        "decoder_ffn": decoder["decoder_ffn_embed_dim"],
        "decoder_heads": decoder["decoder_self_attention_heads"],
        "cross_heads": decoder["decoder_ende_attention_heads"],
        "attends": [SPANS[span] for span in decoder["decoder_arbitrary_ende_attn"]],
    }
    largest = net.space.largest()
    return net, net.space.arch(
        {
            "encoder_embed": encoder["encoder_embed_dim"],
            "decoder_embed": decoder["decoder_embed_dim"],
            "encoder_ffn": encoder["encoder_ffn_embed_dim"],
            "encoder_heads": encoder["encoder_self_attention_heads"],
            "depth": [depth],
            **{name: [*genes[:depth], *largest[name][depth:]] for name, genes in lists.items()},
        }
    )


def layers_of(net, arch):
    """The units of the layers: all but the words."""
    return net.units(arch)[:-1]


def test_all_published_subnets_have_the_parameters_and_macs_that_were_counted(published, supernets):
    cases = {title: case for title, case in published.items() if "config" in case}
    assert len(cases) >= 10
    for title, case in cases.items():
        net, arch = of_config(supernets, title, case["config"])
        assert net.layout.length == case["macs_no_last_layer_len"]
        prices = Prices(net)
        units = layers_of(net, arch)
        assert sum(prices.count(unit, "params") for unit in units) == case["params_no_embed"], title
        assert sum(prices.count(unit, "macs") for unit in units) == case["macs_matmul"], title
        with torch.device("meta"):
            plain = hat.Transformer(net.design, hat.sizes_of(arch))
        words = sum(p.numel() for name, p in plain.named_parameters() if "embed" in name or name.startswith("output"))
        assert count_params(plain) - words == case["params_no_embed"]


def test_the_largest_subnets_have_the_parameters_that_were_counted(supernets):
    for name, count in (("hat_wmt", 70_900_992), ("hat_iwslt", 55_160_064)):
        units = layers_of(supernets[name], supernets[name].space.largest())
        assert sum(count_params(build_on_meta(unit.make)) for unit in units) == count


def test_the_space_is_as_large_as_its_author_says(supernets):
    assert supernets["hat_wmt"].space.num_archs() == 4 * 6**12 * sum(36**k for k in range(1, 7)) // 6**6


def test_features_are_those_recorded(shared, supernets):
    recorded = json.loads((shared / "parity/language/hat_recipe.json").read_text())["predictor_features"]
    for title, case in recorded["cases"].items():
        found = hat.features(of_config(supernets, title, case["config"])[1])
        assert found == pytest.approx(case["features"], abs=1e-9)


# ------------------------------------------------------------------------------------------------------- subnets


def tiny(**options):
    torch.manual_seed(0)
    net = hat.hat(vocab_size=19, preset="tiny", **options).double().eval()
    with torch.no_grad():
        for name, value in net.named_parameters():
            if "proj" in name:
                value.mul_(2)
    return net


def pairs(batch=2, length=6):
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(4, 19, (batch, 2, length), generator=generator)
    tokens[:, 1, 0] = EOS
    tokens[0, 0, 4:] = PAD
    tokens[0, 0, 3] = EOS
    return tokens


@pytest.mark.parametrize("options", [{}, {"pre_norm": True}])
@pytest.mark.parametrize("tied", [True, False])
def test_a_subnet_computes_what_it_does_as_a_network_of_its_own(monkeypatch, options, tied):
    monkeypatch.setitem(hat.PRESETS, "tiny", hat.replace(hat.PRESETS["tiny"], tied=tied))
    net, tokens, rng = tiny(**options), pairs(), random.Random(0)
    archs = [net.space.largest(), net.space.smallest(), *(net.space.sample(rng) for _ in range(12))]
    outputs = []
    with torch.no_grad():
        for arch in archs:
            plain = net.extract(arch)
            outputs.append(net(tokens, arch))
            assert torch.allclose(plain(tokens), outputs[-1], atol=1e-10)
            assert not {p.data_ptr() for p in plain.parameters()} & {p.data_ptr() for p in net.parameters()}
        assert torch.equal(net(tokens), outputs[0])
    distinct = dict(zip(archs, outputs, strict=True))
    values = list(distinct.values())
    assert all((a - b).abs().max() > 1e-4 for i, a in enumerate(values) for b in values[:i]), "archs differ"


def test_every_gene_matters():
    net, tokens = tiny(), pairs()
    table = GeneTable(net.space)
    with torch.no_grad():
        whole = net(tokens)
        for arch in table.archs(table.neighbours(table.sizes - 1)):
            assert (net(tokens, arch) - whole).abs().max() > 1e-4, arch


def test_a_subnet_decodes_as_it_translates():
    net, tokens = tiny(), pairs()
    plain = net.extract(net.space.smallest())
    with torch.no_grad():
        state, steps = plain.start(plain.encode(tokens[:, 0])), []
        for place in range(tokens.shape[2]):
            logits, state = plain.decode(tokens[:, 1, place : place + 1], state)
            steps.append(logits)
        assert torch.allclose(torch.cat(steps, 1), net(tokens, net.space.smallest()), atol=1e-10)


def test_a_subnet_is_built_by_its_arch_and_trains_alone():
    net = tiny()
    arch = net.space.sample(random.Random(1))
    plain = models.build("hat_small", vocab_size=19, preset="tiny", arch=arch.to_dict())
    plain.load_state_dict(net.float().extract(arch).state_dict())
    loss = plain.train()(pairs()).logsumexp(-1).sum()
    loss.backward()
    assert all(p.grad is not None for p in plain.parameters())


def test_what_a_subnet_costs_is_what_its_units_cost_together_one_by_one_and_in_a_table():
    net, rng = build_on_meta(lambda: hat.hat(vocab_size=19, preset="tiny")), random.Random(2)
    prices = Prices(net)
    archs = [net.space.largest(), net.space.smallest(), *(net.space.sample(rng) for _ in range(5))]
    rows = prices.matrix(["params", "macs"])(prices.table.codes(archs))
    for number, arch in enumerate(archs):
        with torch.device("meta"):
            plain = hat.Transformer(net.design, hat.sizes_of(arch))
        costs = prices.arch_costs(arch)
        assert costs["params"] == count_params(plain) == rows["params"][number]
        assert costs["macs"] == count_macs(plain, (1, 2, net.layout.length)) == rows["macs"][number]
    assert prices._places is not None, "costs are tabulated"


def test_units_run_and_their_keys_tell_them_apart():
    net = hat.hat(vocab_size=19, preset="tiny")
    archs = [net.space.sample(random.Random(i)) for i in range(20)]
    units = {unit.key: unit for arch in archs for unit in net.units(arch)}
    shapes = {}
    for key, unit in units.items():
        module = unit.make().eval()
        with torch.no_grad():
            out = module(torch.randn(1, *unit.input))
        assert out.isfinite().all()
        shapes[key] = sorted(tuple(p.shape) for p in module.parameters())
    assert {key.partition("-")[0] for key in units} == {"encoder", "decoder", "cross", "words"}
    assert len(units) > 10


@pytest.mark.parametrize("preset", hat.PRESETS)
def test_few_archs_show_every_unit(preset):
    net = build_on_meta(lambda: hat.hat(vocab_size=19, preset=preset))
    cover = list(net.layout.cover())
    shown = {unit.key for arch in cover for unit in net.units(arch)}
    assert shown == {unit.key for seed in range(400) for unit in net.units(net.space.sample(random.Random(seed)))}
    assert len(cover) <= 18


def test_what_is_measured_of_a_subnet_decodes_all_steps_of_all_hypotheses():
    net = hat.hat(vocab_size=19, preset="tiny", length=5, beam=3).eval()
    module, shape = net.measured(net.space.smallest(), net.units(net.space.smallest())[0].input)
    calls = []
    module.net.decoder_layers[0].ffn.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        assert module.eval()(torch.randn(1, *shape)).shape == (3, 1, 19)
    assert len(calls) == net.layout.length == 5


def test_an_unknown_preset_and_an_arch_of_another_space_are_one_sentence():
    with pytest.raises(UserError, match="preset"):
        models.build("hat_small", vocab_size=19, preset="smal")
    with pytest.raises(UserError, match="arch: encoder_embed: 512 is not one of 16, 24"):
        models.build("hat_small", vocab_size=19, preset="tiny", arch={"encoder_embed": 512})
