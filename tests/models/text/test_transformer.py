"""A transformer computes what the released layers did; padding changes nothing, the source and the past do."""

import pytest
import torch
from torch import Tensor, nn

from slimray import models
from slimray.data.text.vocabulary import EOS, PAD
from slimray.models.text import layers
from slimray.models.text.transformer import DecoderSize, Design, EncoderSize, Sizes, Transformer
from slimray.spec import UserError

TOLERANCE = 1e-5
KINDS = [(True, False), (True, True), (False, False), (False, True)]  # tied, pre_norm


@pytest.fixture(scope="module")
def recorded(shared):
    return torch.load(shared / "parity/language/hat_ops.pt", weights_only=True)


def near(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> bool:
    return bool((found - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max())))


def released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A released layer's weights by the names they have here: three projections instead of one, `ffn` around both."""
    out = {}
    for name, value in state.items():
        at, _, last = name.rpartition(".")
        dot = "." if at else ""
        if last in ("in_proj_weight", "in_proj_bias"):
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                out[f"{at}{dot}{part}_proj.{last.removeprefix('in_proj_')}"] = rows
        else:
            out[f"ffn.{name}" if name.startswith("fc") else name] = value
    return out


def batch_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1)


def mask_of(padding: Tensor) -> Tensor:
    return ~padding[:, None, None]


def test_the_first_channels_of_a_linear_layer_a_table_and_a_norm_are_those_recorded(recorded):
    case = recorded["linear"]
    linear = nn.Linear(20, 12)
    linear.load_state_dict(case["state"])
    assert near(layers.linear(linear, case["x"], 5), case["y"], 1e-6)
    case = recorded["embedding"]
    table = nn.Embedding.from_pretrained(case["weight"])
    assert torch.equal(layers.embedding(table, case["ids"], 12), case["enc12"])
    assert torch.equal(layers.embedding(table, case["ids"], 16), case["dec16"])
    case = recorded["layernorm"]
    norm = nn.LayerNorm(20)
    norm.load_state_dict(case["state"])
    assert near(layers.layer_norm(norm, case["x"]), case["y"], 1e-6)


def test_positions_count_tokens_and_a_narrow_network_has_the_first_waves_of_a_wide_one(recorded):
    case = recorded["positions"]
    places = layers.positions_of(case["ids"])
    assert near(layers.sinusoids(places, 32), case["full"], 1e-6)
    assert near(layers.sinusoids(places, 32)[..., :24], case["slice24"], 1e-6)
    third = torch.full((2, 1), PAD + 3)
    assert near(layers.sinusoids(third, 32), case["incremental_len3"], 1e-6)
    assert (layers.sinusoids(third, 24) - case["incremental_len3"][..., :24]).abs().max() > 0.1


@pytest.mark.parametrize("heads", [8, 4, 2])
def test_self_attention_divides_the_same_weights_among_more_or_fewer_heads(recorded, heads):
    case = recorded["mha_self"]
    attention = layers.Attention(40, 64, 8)
    attention.load_state_dict(released(case["state"]))
    x = batch_first(case["x"])
    with torch.no_grad():
        cached = attention.project(x)
        padded = attention(x, cached, mask_of(case["key_padding_mask"]), heads=heads)
        causal = attention(x, cached, causal=True, heads=heads)
    assert near(batch_first(padded), case[f"heads{heads}_padmask"])
    assert near(batch_first(causal), case[f"heads{heads}_causal"])
    narrow = layers.Attention(24, 64, 8)
    assert sum(p.numel() for p in narrow.parameters()) == case["params_without_out_proj"] + case["params_out_proj"]


def test_cross_attention_sees_two_outputs_in_a_row(recorded):
    case = recorded["mha_encdec_concat2"]
    attention = layers.Attention(40, 64, 8, 40)
    attention.load_state_dict(released(case["state"]))
    source = torch.cat([batch_first(case["enc_last"]), batch_first(case["enc_second_last"])], 1)
    mask = mask_of(case["key_padding_mask"]).repeat(1, 1, 1, 2)
    with torch.no_grad():
        found = attention(batch_first(case["query"]), attention.project(source), mask, heads=4)
    assert near(batch_first(found), case["y"])


def whole_norm(layer: nn.Module, name: str) -> float:
    """The norm of the gradient of a released parameter, of three projections together."""
    at, _, last = name.rpartition(".")
    names = [f"ffn.{name}" if name.startswith("fc") else name]
    if last.startswith("in_proj_"):
        names = [f"{at}.{part}_proj.{last.removeprefix('in_proj_')}" for part in "qkv"]
    grads = [layer.get_parameter(one).grad for one in names]
    return float(torch.cat([grad.flatten() for grad in grads]).norm())


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_a_layer_of_the_encoder_and_its_gradients_are_those_recorded(recorded, norm):
    case = recorded[f"encoder_layer_{norm}"]
    layer = layers.EncoderLayer(32, 32, 8, 64, norm == "pre", 0.0)
    layer.load_state_dict(released(case["state"]))
    x = case["x"].clone().requires_grad_()
    out = layer(batch_first(x), mask_of(case["kpm"]), layers.Drops(), case["heads"], case["ffn"])
    assert near(batch_first(out), case["y"])
    batch_first(out).backward(case["grad_y"])
    assert near(x.grad, case["x_grad"])
    for name, expected in case["param_grad_norms"].items():
        assert whole_norm(layer, name) == pytest.approx(expected, rel=1e-5), name
    columns = layer.self_attn.q_proj.weight.grad.abs().sum(0)
    assert int((columns > 0).sum()) == case["in_proj_grad_nonzero_cols"]


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_a_layer_of_the_decoder_and_its_gradients_are_those_recorded(recorded, norm):
    case = recorded[f"decoder_layer_{norm}"]
    layer = layers.DecoderLayer(32, 32, 32, 8, 8, 64, norm == "pre", 0.0)
    layer.load_state_dict(released(case["state"]))
    x, sizes = case["x"].clone().requires_grad_(), (case["self_heads"], case["ende_heads"], case["ffn"])

    def run(names: tuple[str, ...]) -> Tensor:
        source = torch.cat([batch_first(case[name]) for name in names], 1)
        cached = layer.encoder_attn.project(source)
        mask = mask_of(case["kpm"]).repeat(1, 1, 1, len(names))
        return batch_first(layer.decode(batch_first(x), None, cached, mask, layers.Drops(), *sizes)[0])

    assert near(run(("enc_last",)), case["y_arb_minus1"])
    out = run(("enc_last", "enc_second", "enc_third"))
    assert near(out, case["y_arb2"])
    assert not near(out, case["y_arb_minus1"], 0.05)
    out.backward(case["grad_y"])
    assert near(x.grad, case["x_grad_arb2"])
    for name, expected in case["param_grad_norms"].items():
        assert whole_norm(layer, name) == pytest.approx(expected, rel=1e-5), name


# --------------------------------------------------------------------------------------------------- whole networks


def network(tied: bool, pre_norm: bool) -> Transformer:
    """Both sides of other widths, and weights large enough for the source to matter."""
    torch.manual_seed(0)
    layers_of = (EncoderSize(2, 24), EncoderSize(4, 16)), (DecoderSize(4, 2, 16, 2), DecoderSize(2, 4, 24, 1))
    net = Transformer(Design(19, 16, 24, tied, pre_norm), Sizes(16, 12, *layers_of)).double().eval()
    with torch.no_grad():
        for name, value in net.named_parameters():
            if name.endswith("bias"):
                value.normal_(0, 0.2)
            elif "proj" in name:
                value.mul_(2)
    return net


def pairs(batch: int = 3, length: int = 7) -> Tensor:
    """Pairs of sentences of different lengths, filled up with PAD on the right."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, 19, (batch, 2, length), generator=generator, dtype=torch.int32)
    for row in range(batch):
        tokens[row, 0, length - row :] = PAD
        tokens[row, 0, length - row - 1] = EOS
        tokens[row, 1, 0] = EOS
        tokens[row, 1, row + 3 :] = PAD
    return tokens


@pytest.mark.parametrize(("tied", "pre_norm"), KINDS)
def test_padding_on_either_side_changes_nothing_and_the_source_matters(tied, pre_norm):
    net, tokens = network(tied, pre_norm), pairs()
    with torch.no_grad():
        together = net(tokens)
        for row, shown in enumerate(tokens):
            source, target = (side[side != PAD] for side in shown)
            for left, right in ((0, 0), (3, 0), (0, 4)):
                padded = torch.cat([source.new_full((left,), PAD), source, source.new_full((right,), PAD)])[None]
                logits, _ = net.decode(target[None].long(), net.start(net.encode(padded.long())))
                assert torch.allclose(logits[0], together[row, : len(target)], atol=1e-10)
        other = tokens.clone()
        other[0, 0, 1] = 4 + (other[0, 0, 1] - 3) % 15
        changed = (net(other) - together).abs().amax((1, 2))
    assert changed[0] > 1e-3
    assert changed[1:].max() < 1e-10


@pytest.mark.parametrize(("tied", "pre_norm"), KINDS)
def test_a_token_sees_the_past_alone(tied, pre_norm):
    net, tokens = network(tied, pre_norm), pairs()
    other = tokens.clone()
    other[0, 1, 2] = 4 + (other[0, 1, 2] - 3) % 15
    with torch.no_grad():
        change = (net(other) - net(tokens)).abs().amax(-1)[0]
    assert change[:2].max() < 1e-12
    assert change[2] > 1e-3


@pytest.mark.parametrize(("tied", "pre_norm"), KINDS)
def test_token_by_token_with_what_is_cached_gives_what_all_at_once_gives(tied, pre_norm):
    net, tokens = network(tied, pre_norm), pairs().long()
    tokens[:, 1] = torch.where(tokens[:, 1] == PAD, 5, tokens[:, 1])
    with torch.no_grad():
        state, steps = net.start(net.encode(tokens[:, 0])), []
        for place in range(tokens.shape[2]):
            logits, state = net.decode(tokens[:, 1, place : place + 1], state)
            steps.append(logits)
        assert torch.allclose(torch.cat(steps, 1), net(tokens), atol=1e-10)
        assert state.length == tokens.shape[2]


def test_a_sample_that_did_not_decode_gives_finite_numbers_and_gradients():
    net = network(True, False).train()
    tokens = torch.full((2, 2, 5), PAD)
    logits = net(tokens)
    assert logits.isfinite().all()
    logits.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


def test_dropout_follows_the_width_and_as_released_the_attention_of_the_encoder_keeps_all_of_it():
    design = Design(19, 16, 640, dropout=0.3)
    assert design.drops(640).residual == pytest.approx(0.3)
    assert design.drops(512) == layers.Drops(*[pytest.approx(0.24)] * 4)
    released = Design(19, 16, 640, dropout=0.375, released_dropout=True).drops(512)
    assert (released.residual, released.encoder) == (pytest.approx(0.3), 0.375)


def test_options_that_do_not_fit_are_one_sentence():
    with pytest.raises(UserError, match=r"heads: must divide qkv \(256\), got 3"):
        models.build("transformer", vocab_size=50, heads=3)
    with pytest.raises(UserError, match=r"attends: must be at least 1 and at most 3"):
        models.build("transformer", vocab_size=50, attends=4)
