"""Text networks in few bits: the recorded codebooks, layers of 8 and 4 bits, the same translations from a file."""

import json
import zlib

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from slimray import compress, models
from slimray.compress import fake_quant as fq
from slimray.compress import quantization
from slimray.compress.channels import cut, masked
from slimray.compress.groups import trace
from slimray.compress.quantized import Quantized, QuantizedTable
from slimray.data.text.vocabulary import EOS
from slimray.edge import cost
from slimray.models.text.decoding import beam_search, continued
from slimray.models.text.layers import Attention
from slimray.spec import UserError

NETWORKS = {
    "transformer": {"vocab_size": 40, "embed": 64, "qkv": 64, "ffn": 128, "encoder_layers": 2, "decoder_layers": 2},
    "hat_small": {"vocab_size": 40, "preset": "tiny", "arch": {"depth": [1]}},
    "transformer_lm": {"vocab_size": 40, "embed": 64, "ffn": 128, "layers": 2},
    "micronet_lm": {"vocab_size": 40, "preset": "tiny", "cache": 8},
}


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codebooks_are_the_recorded_ones(shared, bits):
    recorded = json.loads((shared / "parity/language/kmeans_quant.json").read_text())["cases"][str(bits)]
    weight = np.random.RandomState(zlib.crc32(b"km_w")).standard_normal((16, 24)).astype(np.float32) * np.float32(0.05)
    book, codes = fq.codebook(torch.from_numpy(weight), bits)
    assert book.tolist() == pytest.approx(recorded["centroids"], rel=1e-6, abs=1e-8)
    assert codes.tolist() == recorded["codes"]
    assert float(((book[codes].numpy().astype(float) - weight) ** 2).mean()) == pytest.approx(recorded["mse"], rel=1e-5)


def network(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = models.build(name, **NETWORKS[name]).eval()
    tokens = torch.randint(4, 40, (6, 2, 9), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    tokens[:, 1, 0] = tokens[:, 0, -1] = EOS
    return net, tokens if hasattr(net, "encode") else tokens[:, 0]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("scheme", ["kmeans", "int8"])
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_network_of_text_in_8_bits_answers_nearly_the_same_and_in_4_bits_less_so(name, scheme):
    net, tokens = network(name)
    off = {}
    for bits in (8, 4):
        made = compress.quantize(net, tokens, [tokens], (bits, 8), scheme)
        off[bits] = relative(made.net(tokens), net(tokens))
        layers = {at: layer for at, layer in made.net.named_modules() if isinstance(layer, Quantized)}
        assert set(layers) == {at for at, layer in net.named_modules() if type(layer) is nn.Linear}
        record = json.loads(json.dumps(made.record))
        again = compress.rebuild(models.build(name, **NETWORKS[name]), [record]).eval()
        again.load_state_dict(safetensors.torch.load(safetensors.torch.save(made.net.state_dict())))
        assert torch.equal(again(tokens), made.net(tokens))
        if scheme == "kmeans":
            stored = sum(layer.codes.numel() for layer in layers.values())
            assert stored * 8 == pytest.approx(sum(layer.num_weights for layer in layers.values()) * bits, rel=1e-3)
    assert off[8] < 0.05
    assert off[8] < off[4] < 0.8


@pytest.mark.parametrize("scheme", ["kmeans", "int8"])
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_tables_of_embeddings_are_quantized_if_asked_for_and_read_again(name, scheme):
    net, tokens = network(name)
    off = {}
    for bits in (8, 4, None):
        made = compress.quantize(net, tokens, [tokens], 8, scheme, embeddings=bits)
        off[bits] = relative(made.net(tokens), net(tokens))
        tables = {at: one for at, one in made.net.named_modules() if isinstance(one, QuantizedTable)}
        assert set(tables) == {at for at, one in net.named_modules() if bits and type(one) is nn.Embedding}
        assert cost.count_params(made.net) == cost.count_params(net)
        again = compress.rebuild(models.build(name, **NETWORKS[name]), [json.loads(json.dumps(made.record))]).eval()
        again.load_state_dict(safetensors.torch.load(safetensors.torch.save(made.net.state_dict())))
        assert torch.equal(again(tokens), made.net(tokens))
        for at, table in tables.items():
            before, words = net.get_submodule(at).weight, torch.arange(5)
            assert torch.equal(table(words), table.weight[:5]), "the rows are those that the output takes"
            assert relative(table.weight, before) < (0.01 if bits == 8 else 0.2)
            assert table.codes.numel() == -(-before.numel() * bits // 8)
        assert bool([note for note in made.notes if "Embedding" in note]) == (bits is None)
    assert off[None] < off[4]
    assert off[8] < off[4] < 0.8


@torch.no_grad()
def test_tables_stay_float_where_they_are_kept_and_networks_without_any_are_refused():
    net, tokens = network("transformer_lm")
    made = compress.quantize(net, tokens, [tokens], 8, "int8", keep=["embed"], embeddings=8).net
    assert torch.equal(made.embed.weight, net.embed.weight)
    with pytest.raises(UserError, match="has no embedding table"):
        compress.quantize(nn.Linear(4, 4), torch.zeros(1, 4), embeddings=8)
    with pytest.raises(UserError, match="no trained form"):
        quantization.prepare(net, tokens, [tokens], embeddings=8)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_what_is_quantized_is_decoded_by_the_same_code(name):
    net, tokens = network(name)
    made = compress.quantize(net, tokens, [tokens], 8, "kmeans", embeddings=8).net
    if hasattr(net, "encode"):
        logits, _ = made.decode(tokens[:, 1].long(), made.start(made.encode(tokens[:, 0].long())))
        assert torch.allclose(logits, made(tokens), atol=1e-5)
        found = beam_search(made, tokens[:, 0].long(), beam=2, max_length=6)
        assert all(1 <= len(one.tokens) <= 6 for best in found for one in best)
    else:
        assert continued(made, tokens.long(), 4).shape == (6, 4)


def costs_of(net: nn.Module, tokens: Tensor) -> dict[str, float]:
    params = cost.count_params(net)
    return {"macs": cost.count_macs(net, tokens.shape) / len(tokens), "params": params, "size_mb": params * 4 / 1e6}


@pytest.mark.parametrize("name", ["transformer", "hat_small", "transformer_lm"])
@torch.no_grad()
def test_heads_and_feed_forward_channels_are_pruned_and_the_rest_computes_what_it_did(name):
    net, tokens = network(name)
    for at, value in net.named_parameters():
        if "proj" in at:
            value.mul_(2)
    groups = trace(net.double(), tokens)
    heads = {at for at in groups.sizes if at.endswith("k_proj")}
    attentions = [at for at, module in net.named_modules() if isinstance(module, Attention)]
    assert heads == {f"{at}.k_proj" for at in attentions}
    assert {groups.sizes[f"{at}.k_proj"] for at in attentions} <= {2, 4}
    assert groups.costs({}) == pytest.approx(costs_of(net, tokens))
    kept = {group.name: list(range(group.size))[:: 2 if group.name in heads else 3] for group in groups.groups}
    small, record = cut(net, groups, kept)
    assert torch.allclose(small(tokens), masked(net, groups, kept)(tokens), atol=1e-10)
    assert relative(small(tokens), net(tokens)) > 0.01
    counts = {at: len(places) for at, places in kept.items()}
    assert groups.costs(counts) == pytest.approx(costs_of(small, tokens))
    again = (
        compress.build(compression=[json.loads(json.dumps(record))], **{"name": name, **NETWORKS[name]}).double().eval()
    )
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(tokens), small(tokens))
    if hasattr(net, "encode"):
        logits, _ = again.decode(tokens[:, 1].long(), again.start(again.encode(tokens[:, 0].long())))
        assert torch.allclose(logits, small(tokens), atol=1e-10)
