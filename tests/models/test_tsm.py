"""Video networks: the online form equals the offline one, export and compile keep values, counts are exact."""

import pytest
import torch
from torch import nn

from slimray import models
from slimray.edge import cost
from slimray.models.mobilenetv2 import MobileNetV2
from slimray.models.tsm import OnlineTSM, Shift, temporal_shift
from slimray.spec import UserError

# the supernets have tests of their own (test_supernets.py)
VIDEO = [name for name, row in models.MODELS.items() if row.input == "clip" and not name.startswith("ofa_")]
PARAMS_400 = {  # classes: 400, all other options by default
    "tsn_resnet18": 11_381_712,
    "tsn_resnet50": 24_327_632,
    "tsn_resnet101": 43_319_760,
    "tsn_resnet50_nl": 31_686_096,
    "tsn_mobilenetv2": 2_736_272,
    "tsm_resnet18": 11_381_712,
    "tsm_resnet50": 24_327_632,
    "tsm_resnet101": 43_319_760,
    "tsm_resnet50_nl": 31_686_096,
    "tsm_mobilenetv2": 2_736_272,
    "i3d_resnet50": 28_043_472,
    "i3d_resnet50_nl": 35_401_936,
}


@torch.no_grad()
def small(name: str, **options) -> nn.Module:
    """A small network in eval mode whose BatchNorms have seen data and differ, so that every layer matters."""
    torch.manual_seed(0)
    net = models.build(name, **{"num_classes": 5, "num_segments": 6, "width": 0.25, "causal": True} | options)
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        nn.init.uniform_(norm.weight, 0.8, 1.2)
        nn.init.normal_(norm.bias, 0, 0.1)
    nn.init.normal_(net.get_submodule(net.head_name).weight, 0, 0.1)
    net.train()(torch.randn(2, 6, 3, 64, 64))
    for norm in norms:
        norm.running_mean += 0.1 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
    return net.eval()


# ------------------------------------------------------------------------------------------------- online


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tsm_mobilenetv2", {}),
        ("tsm_mobilenetv2", {"dropout": 0.0, "shift_div": 4}),
        ("tsm_resnet18", {}),
        ("tsm_resnet18", {"place": "block"}),
        ("tsm_resnet50", {}),
        ("tsn_resnet18", {}),
    ],
)
def test_stepping_frame_by_frame_equals_the_causal_offline_network(name, options):
    net = small(name, **options)
    online = OnlineTSM(net).eval()
    clip = torch.randn(2, 6, 3, 64, 48)
    buffers, steps = online.initial_buffers(2, 64, 48), []
    for frame in clip.unbind(1):
        logits, buffers = online.step(frame, buffers)
        steps.append(logits)
    steps = torch.stack(steps, 1)
    frames = net.base_model(clip.flatten(0, 1))
    frames = frames if net.new_fc is None else net.new_fc(frames)
    assert frames.std(0).min() > 0.01  # the frames differ, so that a wrong buffer would show
    torch.testing.assert_close(steps.flatten(0, 1), frames, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(steps.mean(1), net(clip), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_stream_is_its_buffers_and_nothing_else():
    online = OnlineTSM(small("tsm_resnet18")).eval()
    first, second = torch.randn(5, 1, 3, 32, 32), torch.randn(5, 1, 3, 32, 32)

    def alone(stream):
        buffers, out = online.initial_buffers(1, 32, 32), []
        for frame in stream:
            logits, buffers = online(frame, buffers)
            out.append(logits)
        return torch.stack(out)

    expected, buffers, seen = (alone(first), alone(second)), [online.initial_buffers(1, 32, 32)] * 2, ([], [])
    for frames in zip(first, second):
        for i, frame in enumerate(frames):
            before = [b.clone() for b in buffers[i]]
            logits, after = online(frame, buffers[i])
            assert all(torch.equal(a, b) for a, b in zip(before, buffers[i]))
            buffers[i] = after
            seen[i].append(logits)
    assert torch.equal(torch.stack(seen[0]), expected[0])
    assert torch.equal(torch.stack(seen[1]), expected[1])
    assert online._stream.outgoing == []


def test_buffers_and_counts_of_the_released_online_network():
    net = cost.build_on_meta(lambda: models.build("tsm_mobilenetv2", num_classes=27, num_segments=1, causal=True))
    online = OnlineTSM(net)
    buffers = online.initial_buffers(1, 224, 224)
    expected = [(3, 56)] + [(4, 28)] * 2 + [(8, 14)] * 3 + [(12, 14)] * 2 + [(20, 7)] * 2
    assert [tuple(b.shape) for b in buffers] == [(1, channels, size, size) for channels, size in expected]
    assert sum(b.numel() for b in buffers) == 27_048
    assert [b.shape[0] for b in online.initial_buffers(3, 224, 224)] == [3] * 10
    assert cost.count_params(online) == 2_258_459
    assert cost.count_macs(net, (1, 1, 3, 224, 224)) / 1e6 == pytest.approx(299.5, abs=0.1)


def test_asking_for_buffers_leaves_the_network_as_it_was():
    online = OnlineTSM(small("tsm_resnet18")).train()
    before = {k: v.clone() for k, v in online.state_dict().items()}
    buffers = online.initial_buffers(2, 32, 32)
    assert online.training
    assert all(not b.any() for b in buffers)
    assert all(torch.equal(v, before[k]) for k, v in online.state_dict().items())


def test_a_network_in_eval_mode_streams_in_eval_mode_whatever_its_wrapper():
    net = small("tsm_resnet18").eval()
    online = OnlineTSM(net)
    assert not online.training
    online.training = True  # only the wrapper, as a fresh nn.Module is
    statistics = {name: value.clone() for name, value in online.named_buffers()}
    frame = torch.randn(1, 3, 32, 32)
    expected, _ = online(frame, online.initial_buffers(1, 32, 32))
    again, _ = online(frame, online.initial_buffers(1, 32, 32))
    assert torch.equal(expected, again)
    assert [module.training for module in online.modules()] == [True] + [False] * (len(list(online.modules())) - 1)
    assert all(torch.equal(value, statistics[name]) for name, value in online.named_buffers())


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("tsm_resnet18", {"causal": False}, "causal=True"),
        ("tsm_resnet18", {"temporal_pool": True}, "without temporal_pool"),
        ("tsm_resnet50_nl", {}, "non-local"),
    ],
)
def test_networks_that_look_ahead_have_no_online_form(name, options, reason):
    with pytest.raises(ValueError, match=reason):
        OnlineTSM(small(name, **options))


# ---------------------------------------------------------------------------------------- export and compile


@torch.no_grad()
@pytest.mark.parametrize("name", ["tsm_resnet18", "tsm_resnet50_nl", "tsm_mobilenetv2"])
@pytest.mark.parametrize("causal", [False, True])
def test_an_exported_network_equals_the_eager_one_for_any_batch(name, causal):
    net = small(name, causal=causal)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(net, (torch.randn(2, 6, 3, 32, 32),), dynamic_shapes=({0: batch},))
    for size in (1, 2, 3):
        clip = torch.randn(size, 6, 3, 32, 32)
        torch.testing.assert_close(program.module()(clip), net(clip), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_exported_online_step_equals_the_eager_one():
    online = OnlineTSM(small("tsm_mobilenetv2")).eval()
    buffers = online.initial_buffers(1, 32, 32)
    step = torch.export.export(online, (torch.randn(1, 3, 32, 32), buffers)).module()
    theirs = ours = buffers
    for frame in torch.randn(4, 1, 3, 32, 32):
        expected, ours = online(frame, ours)
        logits, theirs = step(frame, theirs)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["tsm_resnet18", "tsm_mobilenetv2"])
def test_a_compiled_network_has_one_graph_and_the_values_and_gradients_of_the_eager_one(name):
    net, clip = small(name, causal=False), torch.randn(2, 6, 3, 32, 32)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    net(clip).square().sum().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    logits = compiled(clip)
    torch.testing.assert_close(logits, net(clip), rtol=1e-5, atol=1e-5)
    logits.square().sum().backward()
    for parameter, grad in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-4 * float(grad.abs().max()))
    torch._dynamo.reset()


@pytest.mark.parametrize("causal", [False, True])
def test_the_shift_writes_to_no_tensor_in_place(causal):
    x = torch.randn(12, 16, 2, 2)
    program = torch.export.export(Shift(nn.Identity(), 6, 8, causal), (x,))
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"aten.cat.default", "aten.slice.Tensor"} <= operators
    names = {operator.split(".")[1] for operator in operators}
    assert not [name for name in names if name.endswith("_") or name in ("slice_scatter", "copy", "index_put")]
    before, version = x.clone(), x._version
    out = temporal_shift(x, 6, 8, causal)
    out.zero_()
    assert torch.equal(x, before)
    assert x._version == version


def test_the_shift_takes_any_memory_order():
    x = torch.randn(12, 16, 4, 4)
    assert torch.equal(temporal_shift(x.to(memory_format=torch.channels_last), 6), temporal_shift(x, 6))


# ------------------------------------------------------------------------------------------------- every row


@pytest.mark.parametrize("name", VIDEO)
def test_every_network_takes_clips_and_gives_scores_and_gradients(name):
    torch.manual_seed(0)
    segments = 8 if name.startswith("i3d") else 4
    net = models.build(name, num_classes=5, num_segments=segments, width=0.25)
    logits = net(torch.randn(2, segments, 3, 32, 32))
    assert logits.shape == (2, 5)
    nn.functional.cross_entropy(logits, torch.tensor([0, 3])).backward()
    for parameter in net.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    assert net.num_segments == segments
    for what in (net.head_name, net.first_conv_name):
        assert isinstance(net.get_submodule(what), nn.Linear | nn.Conv2d | nn.Conv3d)
    assert net.get_submodule(net.head_name).out_features == 5


@pytest.mark.parametrize("name", VIDEO)
def test_parameters_by_default_are_these(name):
    net = cost.build_on_meta(lambda: models.build(name, num_classes=400))
    assert cost.count_params(net) == PARAMS_400[name]
    assert net.num_segments == (32 if name.startswith("i3d") else 8)


def test_the_image_network_inside_has_the_published_count():
    # MobileNetV2 of arXiv 1801.04381 with 1,000 classes: 3.5 M
    assert cost.count_params(cost.build_on_meta(lambda: MobileNetV2(1000))) == 3_504_872


def test_options_change_what_they_say():
    clip = torch.randn(1, 4, 4, 32, 32)
    net = models.build("tsm_resnet18", num_classes=3, num_segments=4, width=0.25, in_channels=4, temporal_pool=True)
    assert net(clip).shape == (1, 3)
    zeroed = models.build("tsm_resnet18", num_classes=3, width=0.25, zero_gamma=True)
    assert not zeroed.base_model.layer1[0].bn2.weight.any()
    assert zeroed.base_model.layer1[0].bn1.weight.all()
    odd = models.build("tsm_resnet18", num_classes=3, num_segments=5, width=0.25, temporal_pool=True)
    assert odd(torch.randn(1, 5, 3, 32, 32)).shape == (1, 3)


def test_a_clip_of_another_length_is_refused():
    net = small("tsm_resnet18")
    with pytest.raises(ValueError, match="12 frames, but the network takes 6"):
        net(torch.randn(1, 12, 3, 32, 32))


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("tsm_resnet5", {}, "unknown model 'tsm_resnet5', did you mean 'tsm_resnet50'"),
        ("tsm_resnet18", {"widht": 1.0}, "unknown option 'widht', did you mean 'width'"),
        ("tsm_resnet18", {"shift": False}, "unknown option 'shift'"),
        ("i3d_resnet50", {"shift_div": 8}, "unknown option 'shift_div'"),
        ("tsm_resnet18", {"width": 0}, "width: must be > 0"),
        ("tsm_resnet18", {"width": "1"}, "width: must be float"),
        ("tsm_resnet18", {"num_segments": 8.0}, "num_segments: must be int"),
        ("tsm_resnet18", {"num_segments": True}, "num_segments: must be int"),
        ("tsm_resnet18", {"shift_div": 0}, "shift_div: must be > 0"),
        ("tsm_resnet18", {"causal": 1}, "causal: must be bool"),
        ("tsm_resnet18", {"dropout": 1.0}, "dropout: must be at least 0 and below 1"),
        ("tsm_resnet18", {"dropout": float("nan")}, "dropout: must be at least 0 and below 1"),
        ("tsm_resnet18", {"place": "everywhere"}, "place: must be blockres or block"),
        ("tsm_mobilenetv2", {"temporal_pool": True}, "temporal_pool: needs a ResNet"),
        ("tsm_mobilenetv2", {"place": "block"}, "place: block: needs a ResNet"),
        ("i3d_resnet50", {"inflation": "5x5x5"}, "inflation: must be one of 3x1x1"),
        ("i3d_resnet50", {"num_segments": 4}, "num_segments: 4 frames are too few"),
    ],
)
def test_a_wrong_option_is_one_sentence(name, options, reason):
    with pytest.raises(UserError) as said:
        models.build(name, **{"num_classes": 5} | options)
    assert reason in str(said.value)
    assert "\n" not in str(said.value)


def test_the_number_of_classes_is_required():
    with pytest.raises(UserError, match="num_classes is required"):
        models.build("tsm_resnet18")


def test_the_defaults_of_a_row_are_those_it_builds_with():
    for name in VIDEO:
        options = {k: v for k, v in models.options_of(name).items() if k != "num_classes"}
        said = cost.build_on_meta(lambda n=name, o=options: models.build(n, num_classes=5, **o))
        unsaid = cost.build_on_meta(lambda n=name: models.build(n, num_classes=5))
        assert {k: v.shape for k, v in said.state_dict().items()} == {
            k: v.shape for k, v in unsaid.state_dict().items()
        }
        assert said.num_segments == unsaid.num_segments
