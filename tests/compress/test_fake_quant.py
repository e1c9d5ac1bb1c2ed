"""Quantizers: HAQ's recorded values, int8 on the grid of edge runtimes, straight-through gradients, packed bits."""

import pytest
import torch
from torch.nn import functional

from slimray.compress import bitstreams, codebooks
from slimray.compress import fake_quant as fq


def test_linear_quantizers_are_bit_equal_to_haqs(shared):
    kept = torch.load(shared / "parity/compression/haq_linear_quant.pt", weights_only=True)
    cases = [name for name in kept if name.startswith("hw")]
    assert len(cases) == 14
    for name in cases:
        half, bits = name[2] == "1", [int(n) for n in name.partition("_w")[2].split("a")]
        span = fq.weight_range(kept["w"], bits[0], "linear")
        weight = fq.round_weights(kept["w"], span, bits[0])
        reach = fq.input_range(kept["x"], bits[1], "linear", half)
        x = fq.round_inputs(kept["x"], reach, bits[1], "linear")
        assert float(span) == pytest.approx(kept[name]["weight_range"], rel=1e-7), name
        assert float(reach[1]) == pytest.approx(kept[name]["act_range"], rel=1e-7), name
        assert torch.equal(weight, kept[name]["qweight"]), name
        assert torch.equal(x, kept[name]["qact"]), name
        assert torch.allclose(functional.conv2d(x, weight, padding=1), kept[name]["output"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_grid_of_int8_holds_zero_and_every_value_is_half_a_step_away_at_most(bits):
    x = torch.linspace(-0.7, 2.9, 1001)
    span = fq.input_range(x, bits, "int8")
    scale, zero = fq.input_grid(span, bits, "int8")
    out = fq.round_inputs(torch.cat([x, torch.zeros(1)]), span, bits, "int8")
    assert out[-1] == 0
    assert zero == zero.round()
    assert 0 <= float(zero) < 2**bits
    assert len(out.unique()) <= 2**bits
    assert (out[:-1] - x).abs().max() <= 1.01 * scale


def test_weights_of_int8_have_a_scale_per_output_channel():
    weight = torch.randn(4, 3, 3, 3) * torch.tensor([0.01, 1.0, 100.0, 0.0]).view(4, 1, 1, 1)
    span = fq.weight_range(weight, 8, "int8")
    whole = fq.whole_weights(weight, span, 8)
    assert whole.abs().amax((1, 2, 3)).tolist() == [127, 127, 127, 0]
    assert torch.equal(fq.round_weights(weight, span, 8), whole * fq.weight_scale(span, 8).view(4, 1, 1, 1))


def test_gradients_pass_straight_through_and_those_beyond_the_bounds_move_the_bounds():
    x = torch.tensor([-2.0, -0.5, 0.3, 3.0], requires_grad=True)
    span = torch.tensor([-1.0, 1.0], requires_grad=True)
    fq.round_inputs(x, span, 8, "int8").sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 0]
    assert span.grad is not None
    assert span.grad.tolist() == pytest.approx([1 / (4 * 255) ** 0.5] * 2)
    weight = torch.tensor([[0.5, -3.0]], requires_grad=True)
    fq.round_weights(weight, torch.tensor([1.0]), 4).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[1, 0]]


def test_rounding_without_gradient_is_that_with_one():
    x, span = torch.randn(1000), torch.tensor([-1.0, 2.0])
    for scheme in ("int8", "linear"):
        with torch.no_grad():
            plain = fq.round_inputs(x, span, 5, scheme)
        assert torch.equal(plain, fq.round_inputs(x.clone().requires_grad_(), span, 5, scheme))


def test_a_codebook_is_the_mean_of_what_it_stands_for():
    torch.manual_seed(0)
    weight = torch.randn(40, 30)
    book, codes = fq.codebook(weight, 3)
    assert len(book) == 8
    assert (book.diff() >= 0).all()
    assert torch.equal(codes, (weight[..., None] - book).abs().argmin(-1))
    for code in codes.unique():
        assert float(book[code]) == pytest.approx(float(weight[codes == code].mean()), abs=1e-5)
    few, codes = fq.codebook(torch.tensor([1.0, 2.0, 1.0]), 4)
    assert few[codes].tolist() == [1, 2, 1]


def test_codebooks_of_layers_and_of_shared_weights_are_the_same():
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).double()
    book, codes = fq.codebook(weight, 3)
    assert (book.numpy() == codebooks.kmeans(weight.numpy(), 8)).all()
    assert (codes.numpy() == codebooks.nearest(weight.numpy(), book.numpy())).all()


def test_ranges_and_codebooks_are_where_the_weights_are():
    weight = torch.randn(40, 30)
    with torch.device("meta"):  # the default device of tensors made without one
        span = fq.weight_range(weight, 3, "linear")
        book, codes = fq.codebook(weight, 3)
    assert {one.device.type for one in (span, book, codes)} == {"cpu"}


@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_numbers_come_back(bits):
    codes = torch.randint(0, 2**bits, (5, 7), generator=torch.Generator().manual_seed(bits))
    packed = fq.pack(codes, bits)
    assert len(packed) == bitstreams.packed_bytes(35, bits) == -(-35 * bits // 8)
    assert packed.numpy().tobytes() == bitstreams.pack(codes.numpy().reshape(-1), bits)
    assert torch.equal(fq.unpack(packed, bits, 35), codes.flatten())
    with pytest.raises(ValueError, match="fields of"):
        fq.unpack(packed, bits, 36 if bits == 8 else 44)
