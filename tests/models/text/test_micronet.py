"""MicroNet's language model computes what the released one did, in chunks or at once, and its cache helps."""

import pytest
import torch
from torch import Tensor, nn

from slimray import models
from slimray.data.text.vocabulary import PAD
from slimray.edge.cost import build_on_meta, count_macs, count_params
from slimray.models.text import adaptive, decoding, micronet
from slimray.models.text.decoding import continued
from slimray.models.text.layers import Cached

WIDTHS, CUTOFFS, WORDS = (16, 8, 4), (10, 20), 37


@pytest.fixture(scope="module")
def recorded(shared):
    return torch.load(shared / "parity/language/micronet_ops.pt", weights_only=True)


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((found - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max())))


def words_of(case) -> tuple[adaptive.AdaptiveEmbedding, adaptive.AdaptiveSoftmax]:
    """The recorded softmax, and the embedding whose weights it shares."""
    embed = adaptive.AdaptiveEmbedding(WORDS, WIDTHS, CUTOFFS)
    softmax = adaptive.AdaptiveSoftmax(WORDS, WIDTHS, CUTOFFS)
    state = case["softmax_state"]
    tables = {name: value for name, value in state.items() if name.startswith("layers.") and name.endswith("weight")}
    embed.load_state_dict(case.get("embed_state", tables), strict="embed_state" in case)
    rest = {name.replace("layers", "biases").removesuffix(".bias"): v for name, v in state.items() if "bias" in name}
    rest = {name if name != "clusters" else "clusters.bias": value for name, value in rest.items()}
    rest |= {name: value for name, value in state.items() if "projections" in name or name == "clusters.weight"}
    softmax.load_state_dict(rest)
    return embed, softmax


@torch.no_grad()
def test_adaptive_embedding_and_softmax_are_those_recorded(recorded):
    case = recorded["adaptive"]
    embed, softmax = words_of(case)
    assert near(embed(case["ids"]), case["embedded"])
    table = softmax(case["hidden"], embed)
    assert near(table, case["full_log_probs"])
    assert torch.allclose(table.exp().sum(-1), torch.ones(9))
    assert near(-softmax.log_probs_of(case["hidden"], case["target"], embed), case["nll"])


def lm(cache: int = 0, adaptively: bool = True) -> micronet.MicroNetLM:
    torch.manual_seed(0)
    net = models.build("micronet_lm", vocab_size=WORDS, preset="tiny", cache=cache, adaptive=adaptively)
    for name, value in net.named_parameters():
        if value.ndim == 2 and "embed" not in name:
            nn.init.normal_(value, 0, value.shape[1] ** -0.5)
        elif name.endswith("bias"):
            nn.init.normal_(value, 0, 0.3)
    if cache:
        nn.init.constant_(net.cache_sharpness, -1.0)
        nn.init.constant_(net.cache_share, -0.5)
    return net.double().eval()


@torch.no_grad()
def test_the_cache_is_the_one_recorded_over_two_calls(recorded):
    case = recorded["cache"]
    embed, softmax = words_of(case)
    net = models.build("micronet_lm", vocab_size=WORDS, preset="tiny", cache=case["n_cache"])
    net.cache_sharpness.fill_(torch.tensor(case["theta"]).expm1().log())
    net.cache_share.fill_(torch.tensor(case["lam"]).logit())
    past, found, mixed = net.start(), [], []
    for hidden, words in ((case["h1"], case["t1"]), (case["h2"], case["t2"])):
        weights, behind = net._cached(past, hidden[None], words[None])
        cached = (weights * (behind[:, None] == words[None, :, None])).sum(-1)
        found.append(cached[0])
        mixed.append(-net._mixed(softmax.log_probs_of(hidden, words, embed)[None], cached)[0])
        past = net._remember(past, hidden[None], words[None])
        assert past.keys.shape[1] == case["n_cache"]
    assert near(torch.cat(found), case["p_cache_target"])
    assert near(torch.cat(mixed), case["nll_mixed"])


@torch.no_grad()
def test_a_layer_is_the_one_recorded_with_and_without_memory(recorded):
    case = recorded["decoder_layer"]
    layer = micronet.Layer(16, 2, 4, 4, 24, 7, 0.0)
    names = {
        "pos_emb": "attention.positions",
        "qkv": "attention.qkv",
        "out": "attention.out",
        "fc.0": "fc1",
        "fc.3": "fc2",
    }
    state = {}
    for name, value in case["state"].items():
        at, dot, last = name.rpartition(".")
        state[names[name] if name in names else f"{names.get(at, at)}{dot}{last}"] = value
    layer.load_state_dict(state)
    out, memory = layer(case["x"].transpose(0, 1), None)
    assert near(out.transpose(0, 1), case["y"])
    recorded_memory = case["memory_kv"].unflatten(1, (2, 2)).permute(1, 2, 0, 3)
    assert near(torch.cat([memory.keys, memory.values], -1), recorded_memory)
    second, _ = layer(case["x2"].transpose(0, 1), memory)
    assert near(second.transpose(0, 1), case["y2"])


@torch.no_grad()
def test_the_hebbian_update_is_the_intended_one(recorded):
    case = recorded["hebbian"]
    sums = adaptive.hebbian_sums(case["weight"], case["hidden"], case["target"])
    weight, counts = adaptive.hebbian_update(case["weight"], *sums, case["counters_before"], case["T"], case["gamma"])
    assert near(weight, case["weight_after_intended"], 1e-6)
    assert torch.equal(counts, case["counters_after"])
    assert not torch.equal(weight, case["weight_after_upstream"])


def test_the_released_network_has_its_number_of_parameters():
    net = build_on_meta(lambda: models.build("micronet_lm", vocab_size=267735))
    assert count_params(net) == 8_304_213
    with_cache = build_on_meta(lambda: models.build("micronet_lm", vocab_size=267735, cache=2000))
    assert count_params(with_cache) == 8_304_215


# ------------------------------------------------------------------------------------------------ whole networks


def stream(length: int = 40, batch: int = 2) -> Tensor:
    return torch.randint(4, WORDS, (batch, length), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("cache", [0, 9])
@pytest.mark.parametrize("chunks", [[39], [20, 19], [1] * 39, [3, 30, 6]])
@torch.no_grad()
def test_chunks_with_memory_and_cache_give_what_the_whole_stream_gives(monkeypatch, cache, chunks):
    net, tokens = lm(cache), stream()
    whole = net.next_words(tokens[:, :-1], net.start())[0]
    expected = whole.gather(-1, tokens[:, 1:, None])[..., 0]
    assert torch.allclose(net(tokens), expected, atol=1e-12)
    monkeypatch.setattr(micronet, "CHUNK", 7)
    assert torch.allclose(net(tokens), expected, atol=1e-9)
    ones = torch.ones(2, 39, dtype=torch.float64)
    ones[:, 0] -= torch.sigmoid(net.cache_share) if cache else 0  # there is nothing in the cache yet
    assert torch.allclose(whole.exp().sum(-1), ones)
    scored, stepped, given, places = [], [], net.start(), torch.tensor(chunks).cumsum(0).tolist()
    past = net.start()
    for end, count in zip(places, chunks, strict=True):
        x, y = tokens[:, end - count : end], tokens[:, end - count + 1 : end + 1]
        found, past = net.score(x, y, past)
        scored.append(found)
        log_probs, given = net.next_words(x, given)
        stepped.append(log_probs)
    assert torch.allclose(torch.cat(stepped, 1), whole, atol=1e-9)
    assert torch.allclose(torch.cat(scored, 1), expected, atol=1e-9)


@torch.no_grad()
def test_a_word_sees_the_past_and_no_further_than_the_windows_of_all_layers():
    net, tokens = lm(), stream()
    other = tokens.clone()
    other[0, 10] = 4 + (other[0, 10] - 3) % 30
    change = (net.next_words(other, net.start())[0] - net.next_words(tokens, net.start())[0]).abs().amax(-1)
    reach = 10 + 2 * 6  # two layers that look six words back
    assert change[0, :10].max() < 1e-12
    assert change[0, 10 : reach + 1].min() > 1e-9
    assert change[0, reach + 1 :].max() < 1e-12
    assert change[1].max() < 1e-12


@torch.no_grad()
def test_the_cache_makes_words_that_were_just_written_likelier():
    plain, cached = lm(), lm(9)
    cached.load_state_dict(plain.state_dict(), strict=False)
    tokens = stream(6).repeat(1, 6)
    seen = [net.score(tokens[:, :-1], tokens[:, 1:], net.start())[0][:, 12:].mean() for net in (plain, cached)]
    assert seen[1] > seen[0]


def test_gradients_reach_every_parameter_and_stop_at_the_memory():
    net, tokens = lm(5).train(), stream()
    (-net(tokens)).mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())
    _, past = net.score(tokens[:, :-1], tokens[:, 1:], net.start())
    assert not any(one.keys.requires_grad for one in past.memories if isinstance(one, Cached))
    assert not past.keys.requires_grad


@torch.no_grad()
def test_a_stream_goes_on_with_the_likeliest_words_or_drawn_ones(monkeypatch):
    net, tokens = lm(5), stream(8)
    found = continued(net, tokens, 6)
    whole = torch.cat([tokens, found], 1)
    log_probs, _ = net.next_words(whole, net.start())
    log_probs[..., PAD] = -torch.inf
    assert torch.equal(log_probs[:, 7:-1].argmax(-1), found)
    monkeypatch.setattr(decoding, "CHUNK", 3)
    assert torch.equal(continued(net, tokens, 6), found), "however many words are read at once"
    draws = [continued(net, tokens, 6, 1.0, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_without_bins_all_words_have_as_many_numbers():
    net = lm(adaptively=False)
    assert len(net.embed.layers) == 1
    assert net(stream()).shape == (2, 39)
    assert net.next_words(stream(), net.start())[0].shape == (2, 40, WORDS)


def test_macs_are_those_of_the_whole_vocabulary():
    net = build_on_meta(lambda: models.build("micronet_lm", vocab_size=WORDS, preset="tiny"))
    words = WORDS - 20
    softmax = 10 * 16 + 16 * 8 + 10 * 8 + 16 * 4 + words * 4 + 2 * 16
    layers = 2 * (16 * 24 + 8 * 16 + 2 * 16 * 24)
    embed = 16 * 8 + 16 * 4
    found = count_macs(net, (1, 61))
    window = 2 * 2 * 12 * (4 + 4 + 4)  # blocks of 6 queries and 12 keys, 7 of which count
    assert 60 * (softmax + layers + embed) < found <= 60 * (softmax + layers + embed + window)


# ------------------------------------------------------------------------------------------- what it is compared with


@pytest.mark.parametrize("pre_norm", [True, False])
@torch.no_grad()
def test_a_plain_transformer_goes_on_with_what_is_cached_and_sees_all_that_came_before(pre_norm):
    torch.manual_seed(0)
    net = models.build("transformer_lm", vocab_size=WORDS, embed=16, ffn=24, heads=2, layers=2, pre_norm=pre_norm)
    net, tokens, chunks = net.double().eval(), stream(), []
    whole, past = net(tokens).log_softmax(-1), net.start()
    for part in tokens[:, :-1].split([5, 1, 20, 13], 1):
        found, past = net.next_words(part, past)
        chunks.append(found)
    assert torch.allclose(torch.cat(chunks, 1), whole, atol=1e-10)
    other = tokens.clone()
    other[0, 10] = 4 + (other[0, 10] - 3) % 30
    change = (net(other).log_softmax(-1) - whole).abs().amax(-1)
    assert change[0, :10].max() < 1e-12
    assert change[0, 10:].min() > 1e-6
    assert change[1].max() < 1e-12
    assert continued(net, tokens, 3).shape == (2, 3)
