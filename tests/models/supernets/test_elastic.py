"""Layers on their first channels equal plain layers with a copy of these channels, and the published operators."""

import pytest
import torch
from torch import nn

from slimray.models.supernets import elastic
from slimray.models.supernets.elastic import ElasticConv, ElasticDepthwise, ElasticLinear, ElasticNorm, SqueezeExcite
from slimray.spec import UserError


@pytest.fixture(scope="module")
def recorded(shared) -> dict:
    return torch.load(shared / "parity/ofa_ops.pt", weights_only=True)


def fill(module: nn.Module, seed: int = 0) -> nn.Module:
    """`module` with other random values in every weight and statistic."""
    generator = torch.Generator().manual_seed(seed)
    for value in module.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) + 0.1)
    return module


# -------------------------------------------------------------------------------------------- the published ones


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_kernels_are_the_published_ones(recorded, kernel):
    conv = ElasticDepthwise(6, (3, 5, 7), stride=2)
    conv.load_state_dict(recorded["state_dict"])
    torch.testing.assert_close(conv.filter(4, kernel), recorded[f"filter_k{kernel}_c4"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(conv(recorded["input"], kernel), recorded[f"out_k{kernel}"], rtol=1e-5, atol=1e-6)
    plain = nn.Conv2d(6, 6, kernel, 2, kernel // 2, groups=6, bias=False)
    elastic.take(plain, conv)
    torch.testing.assert_close(plain(recorded["input"]), recorded[f"out_k{kernel}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_matrices_start_as_identity_so_that_a_kernel_is_the_centre_of_the_next(recorded, kernel):
    conv = ElasticDepthwise(6, (3, 5, 7))
    conv.conv.weight.data.copy_(recorded["state_dict"]["conv.weight"])
    assert torch.equal(conv.filter(4, kernel), recorded[f"filter_k{kernel}_c4_notransform"])
    if kernel < 7:
        gap = (conv.filter(4, kernel) - recorded[f"filter_k{kernel}_c4"]).abs().max()
        assert gap > 0.1  # so that the test above would notice missing matrices


def test_a_kernel_teaches_the_matrices_it_went_through_and_no_others():
    for kernel, taught in ((7, set()), (5, {"7to5_matrix"}), (3, {"7to5_matrix", "5to3_matrix"})):
        conv = fill(ElasticDepthwise(4, (3, 5, 7)))
        conv(torch.randn(2, 4, 9, 9), kernel).square().sum().backward()
        matrices = {
            name for name, value in conv.named_parameters() if name.endswith("matrix") and value.grad is not None
        }
        assert matrices == taught
        assert conv.conv.weight.grad.abs().sum() > 0


def test_a_kernel_that_is_none_of_the_sizes_is_refused():
    with pytest.raises(ValueError, match="4 is not one of"):
        ElasticDepthwise(4, (3, 5)).filter(4, 4)


def test_squeeze_and_excitation_on_half_the_channels_is_the_published_one(recorded):
    se, half = SqueezeExcite(48), SqueezeExcite(24)
    se.load_state_dict(recorded["se"]["state_dict"])
    expected = recorded["se"]["out24"]
    assert (expected - recorded["se"]["input24"]).abs().max() > 0.1
    torch.testing.assert_close(elastic.sliced_squeeze(se, recorded["se"]["input24"]), expected, rtol=1e-5, atol=1e-6)
    elastic.take(half, se)
    torch.testing.assert_close(half(recorded["se"]["input24"]), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("channels", "rounded"),
    [(16, 16), (19.2, 24), (20, 24), (20.8, 24), (41.6, 40), (1, 8), (67, 64), (124.8, 128), (11, 16), (18, 24)],
)
def test_channels_round_to_multiples_of_eight_and_lose_at_most_a_tenth(channels, rounded):
    assert elastic.make_divisible(channels) == rounded
    assert rounded >= 0.9 * channels


# --------------------------------------------------------------------------------------------------------- slices


LAYERS = {
    "conv1d": (nn.Conv1d(12, 10, 3, 2, 1), nn.Conv1d(8, 6, 3, 2, 1), (2, 8, 9), 6),
    "conv2d": (nn.Conv2d(12, 10, 3, 2, 1), nn.Conv2d(8, 6, 3, 2, 1), (2, 8, 9, 7), 6),
    "conv3d": (nn.Conv3d(12, 10, 3, 1, 1, bias=False), nn.Conv3d(8, 6, 3, 1, 1, bias=False), (2, 8, 4, 5, 6), 6),
    "dilated": (nn.Conv2d(12, 10, 3, dilation=2), nn.Conv2d(8, 6, 3, dilation=2), (2, 8, 9, 7), 6),
    "depthwise": (nn.Conv2d(12, 12, 3, groups=12), nn.Conv2d(8, 8, 3, groups=8), (2, 8, 9, 7), None),
    "all out": (nn.Conv2d(12, 10, 1), nn.Conv2d(8, 10, 1), (2, 8, 3, 3), None),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_sliced_convolution_is_the_plain_one_with_its_first_channels(name):
    wide, plain, shape, out = LAYERS[name]
    fill(wide)
    elastic.take(plain, wide)
    x = torch.randn(shape)
    torch.testing.assert_close(elastic.sliced_conv(wide, x, out), plain(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain.weight, wide.weight[: plain.weight.shape[0], : plain.weight.shape[1]])


def test_a_sliced_linear_layer_is_the_plain_one_with_its_first_features():
    wide, plain = fill(nn.Linear(12, 10)), nn.Linear(8, 6)
    elastic.take(plain, wide)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(elastic.sliced_linear(wide, x, 6), plain(x))


@pytest.mark.parametrize(
    ("wide", "plain"), [(nn.Conv1d(12, 9, 1), nn.Conv1d(5, 7, 1)), (nn.Linear(12, 9), nn.Linear(5, 7))]
)
def test_an_input_of_several_slices_meets_the_columns_of_each(wide, plain):
    spans = [(0, 2), (6, 3)]
    fill(wide)
    elastic.take(plain, wide, spans)
    torch.testing.assert_close(plain.weight[:, 2:], wide.weight[:7, 6:9])
    x = torch.randn(2, 5, 4) if plain.weight.ndim == 3 else torch.randn(2, 5)
    sliced = elastic.sliced_conv if plain.weight.ndim == 3 else elastic.sliced_linear
    torch.testing.assert_close(sliced(wide, x, 7, spans), plain(x))


def test_a_grouped_convolution_that_is_not_depthwise_cannot_be_sliced():
    with pytest.raises(ValueError, match="depthwise"):
        elastic.sliced_conv(nn.Conv2d(8, 8, 1, groups=2), torch.randn(1, 4, 2, 2), 4)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_sliced_norm_in_train_mode_updates_the_first_shared_statistics_as_a_plain_one_its_own(momentum):
    wide, plain = fill(nn.BatchNorm2d(8, momentum=momentum)), nn.BatchNorm2d(5, momentum=momentum)
    elastic.take(plain, wide)
    before = {k: v.clone() for k, v in wide.state_dict().items()}
    for _ in range(2):
        x = 3 * torch.randn(4, 5, 3, 3) + 1
        torch.testing.assert_close(elastic.sliced_norm(wide, x), plain(x))
    assert int(wide.num_batches_tracked) == int(before["num_batches_tracked"]) + 2
    for name in ("running_mean", "running_var"):
        now = wide.get_buffer(name)
        torch.testing.assert_close(now[:5], plain.get_buffer(name))
        assert not torch.equal(now[:5], before[name][:5])
        assert torch.equal(now[5:], before[name][5:])
    before = {k: v.clone() for k, v in wide.state_dict().items()}
    x = torch.randn(4, 5, 3, 3)
    torch.testing.assert_close(elastic.sliced_norm(wide.eval(), x), plain.eval()(x))
    assert all(torch.equal(v, before[k]) for k, v in wide.state_dict().items())


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
def test_norms_without_weights_or_statistics_are_sliced_too(options):
    wide, plain = nn.BatchNorm1d(8, **options).eval(), nn.BatchNorm1d(5, **options).eval()
    x = torch.randn(6, 5)
    torch.testing.assert_close(elastic.sliced_norm(wide, x), plain(x))


def test_synchronised_norms_are_refused_with_a_word():
    with pytest.raises(UserError, match="norm: sync does not work for supernets"):
        elastic.sliced_norm(nn.SyncBatchNorm(4), torch.randn(2, 4, 3, 3))


def test_what_is_taken_shares_nothing_with_its_source_and_has_its_type():
    wide = fill(nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8))).double()
    with torch.device("meta"):
        plain = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8))
    elastic.take(plain, wide)
    assert all(torch.equal(v, wide.state_dict()[k]) for k, v in plain.state_dict().items())
    assert plain[0].weight.dtype == torch.float64
    assert plain[0].weight.is_leaf
    fill(plain, seed=2)
    assert not any(torch.equal(v, wide.state_dict()[k]) for k, v in plain.state_dict().items() if v.ndim)


def test_the_level_of_names_of_elastic_layers_is_left_out():
    wide = nn.ModuleDict(
        {"a": ElasticConv(nn.Conv2d(4, 8, 1)), "b": ElasticNorm(nn.BatchNorm2d(8)), "c": ElasticLinear(nn.Linear(8, 3))}
    )
    plain = nn.ModuleDict({"a": nn.Conv2d(2, 6, 1), "b": nn.BatchNorm2d(6), "c": nn.Linear(6, 3)})
    elastic.take(plain, fill(wide))
    x = torch.randn(4, 2, 1, 1)
    hidden = wide["b"](wide["a"](x, 6))
    torch.testing.assert_close(plain["c"](plain["b"](plain["a"](x)).flatten(1)), wide["c"](hidden.flatten(1)))


def test_more_than_there_is_cannot_be_taken():
    with pytest.raises(ValueError, match=r"\[9, 4\] is not a slice of \[8, 4\]"):
        elastic.take(nn.Linear(4, 9), nn.Linear(4, 8))


# -------------------------------------------------------------------------------------------------------- sorting


def test_channels_are_ordered_by_importance_within_each_tier():
    importance = torch.tensor([1.0, 5, 2, 9, 4, 8])
    assert elastic.channel_order(importance).tolist() == [3, 5, 1, 4, 2, 0]
    assert elastic.channel_order(importance, [3, 6]).tolist() == [1, 2, 0, 3, 5, 4]
    assert elastic.channel_order(importance, [2, 4]).tolist() == [1, 0, 3, 2, 5, 4]


def test_a_user_may_take_the_channels_in_behind_others():
    maker, user = fill(nn.Linear(3, 4)), fill(nn.Linear(6, 2), seed=1)
    x, other = torch.randn(5, 3), torch.randn(5, 2)
    expected = user(torch.cat([other, maker(x)], 1))
    order = torch.tensor([2, 0, 3, 1])
    before = maker.weight.clone()
    elastic.permute_outputs(maker, order)
    elastic.permute_inputs(user, 2, order=order)
    assert torch.equal(maker.weight, before[order])
    torch.testing.assert_close(user(torch.cat([other, maker(x)], 1)), expected)
