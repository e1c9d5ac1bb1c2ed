"""Published weights are loaded by the meaning of their names; a file is read and never executed."""

import argparse
import collections
import contextlib
import cProfile
import datetime
import json
import os
import pickle
import pstats
import re
import signal
import warnings
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from slimray import models
from slimray.edge import cost
from slimray.models import published
from slimray.models.mobilenetv2 import MobileNetV2
from slimray.models.resnet import ResNet
from slimray.models.tsm import OnlineTSM
from slimray.spec import UserError

SMALL = {"num_classes": 7, "width": 0.125}
SMALL_GENERATOR = {"scale": 2, "width": 8}
SMALL_TEXT = {"vocab_size": 20, "preset": "tiny"}


def fill(net: nn.Module, seed: int = 1) -> nn.Module:
    """`net` with other random values in every weight and statistic."""
    generator = torch.Generator().manual_seed(seed)
    for value in net.state_dict().values():
        value.copy_(torch.rand(value.shape, generator=generator) * (1 if value.is_floating_point() else 100))
    return net


def small(name: str, **options) -> nn.Module:
    return fill(models.build(name, **SMALL | options))


def equal(ours: nn.Module, theirs: dict[str, torch.Tensor], names: dict[str, str] | None = None) -> bool:
    """Return whether each weight of `ours` equals that of `theirs` (under the name given by `names`)."""
    return all(torch.equal(v, theirs[(names or {}).get(k, k)]) for k, v in ours.state_dict().items())


def bare(name: str) -> str:
    """Our name of a 2D weight without the video network around it."""
    name = re.sub(r"\.net\b|\.block\b|^base_model\.", "", name)
    return re.sub("^new_fc", "fc", name)


def torchvision_mobilenetv2(name: str) -> str:
    block = re.fullmatch(r"features\.(\d+)\.conv\.(\d)\.(\w+)", name)
    if block:
        first = {"0": "0.0", "1": "0.1", "3": "1", "4": "2"}
        other = {"0": "0.0", "1": "0.1", "3": "1.0", "4": "1.1", "6": "2", "7": "3"}
        return f"features.{block[1]}.conv.{(first if block[1] == '1' else other)[block[2]]}.{block[3]}"
    return name.replace("classifier", "classifier.1")


def mmaction(name: str) -> str:
    name = name.replace("base_model.", "backbone.").replace("new_fc", "cls_head.fc_cls")
    name = re.sub(r"\bconv(\d)\.", r"conv\1.conv.", name)
    name = re.sub(r"\bbn(\d)\.", r"conv\1.bn.", name)
    return name.replace("downsample.0.", "downsample.conv.").replace("downsample.1.", "downsample.bn.")


def renamed(net: nn.Module, rule) -> dict[str, torch.Tensor]:
    out = {rule(name): value for name, value in net.state_dict().items()}
    assert len(out) == len(net.state_dict())
    return out


# --------------------------------------------------------------------------------------------------- by name


@pytest.mark.parametrize("name", models.MODELS)
def test_every_network_takes_its_own_weights_back_through_any_wrapper(name):
    known = models.options_of(name)
    options = SMALL if "num_classes" in known else SMALL_GENERATOR if "scale" in known else SMALL_TEXT
    options = {option: value for option, value in options.items() if option in known}
    trained, net = fill(models.build(name, **options)), models.build(name, **options)
    for wrapped in (
        trained.state_dict(),
        {"epoch": 3, "state_dict": renamed(trained, "module.{}".format), "optimizer": {"state": {}}},
        {"model": {"model_state_dict": renamed(trained, "_orig_mod.module.{}".format)}},
    ):
        fill(net, seed=2)
        report = published.load(net, wrapped)
        assert equal(net, trained.state_dict())
        assert (len(report.loaded), report.missing, report.dropped) == (len(net.state_dict()), [], {})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tsn_resnet50", {}),
        ("tsm_resnet50", {}),
        ("tsm_resnet50", {"dropout": 0.0}),
        ("tsm_resnet50", {"place": "block"}),
        ("tsm_resnet50", {"temporal_pool": True}),
        ("tsm_resnet50_nl", {}),
        ("tsm_resnet50_nl", {"place": "block", "temporal_pool": True}),
        ("i3d_resnet50", {"inflation": "3x3x3"}),
        ("i3d_resnet50_nl", {}),
    ],
)
def test_a_plain_resnet_starts_every_video_network_and_the_other_way_round(name, options):
    plain, net = fill(ResNet(50, 7, width=0.125)), small(name, **options)
    report = published.load(net, plain.state_dict())
    assert all(".nl." in missing for missing in report.missing)
    assert bool(report.missing) == name.endswith("_nl")
    assert report.dropped == {}
    for ours, value in net.state_dict().items():
        if ".nl." not in ours:
            expected = plain.state_dict()[bare(ours)]
            torch.testing.assert_close(value.sum(2) if value.ndim == 5 else value, expected)
    if not name.startswith("i3d"):
        back = fill(ResNet(50, 7, width=0.125), seed=3)
        report = published.load(back, net.state_dict())
        assert equal(back, plain.state_dict())
        assert all(".nl." in dropped for dropped in report.dropped)


def test_torchvision_names_of_mobilenetv2_mean_our_layers():
    plain = fill(MobileNetV2(7, width=0.5))
    theirs = renamed(plain, torchvision_mobilenetv2)
    assert {"features.1.conv.1.weight", "features.2.conv.1.0.weight", "features.18.0.weight"} < set(theirs)
    assert theirs["features.2.conv.3.weight"].ndim == 1  # in our layout a convolution has this name
    net = models.build("tsm_mobilenetv2", num_classes=7, width=0.5)
    assert published.load(net, theirs).missing == []
    for name, value in net.state_dict().items():
        assert torch.equal(value, plain.state_dict()[bare(name).replace("fc.", "classifier.")])


@pytest.mark.parametrize("name", ["tsn_resnet18", "tsm_resnet50", "i3d_resnet50"])
def test_names_of_mmaction_mean_our_layers(name):
    trained, net = small(name), models.build(name, **SMALL)
    inflated = name.startswith("i3d")
    rule = (lambda n: mmaction(f"base_model.{n}".replace("base_model.fc", "new_fc"))) if inflated else mmaction
    theirs = renamed(trained, rule)
    assert {"backbone.layer1.0.conv2.conv.weight", "backbone.conv1.bn.weight", "cls_head.fc_cls.bias"} < set(theirs)
    assert published.load(net, {"meta": {"epoch": 1}, "state_dict": theirs}).dropped == {}
    assert equal(net, trained.state_dict())


def test_an_inflated_kernel_sees_in_a_still_clip_what_the_image_network_sees():
    plain = fill(ResNet(50, 7, width=0.125))
    net = models.build("i3d_resnet50", **SMALL, inflation="3x1x1_every")
    published.load(net, plain.state_dict())
    frame = torch.rand(2, 3, 32, 32)
    still = frame.unsqueeze(2).expand(-1, -1, 11, -1, -1)
    middle = net.conv1(still)[:, :, 3]
    torch.testing.assert_close(middle, plain.conv1(frame), rtol=1e-5, atol=1e-4)
    two, three = plain.layer3[1].conv1, net.layer3[1].conv1
    assert three.kernel_size == (3, 1, 1)
    x = torch.rand(2, two.in_channels, 4, 4)
    torch.testing.assert_close(three(x.unsqueeze(2).expand(-1, -1, 5, -1, -1))[:, :, 2], two(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 10])
@pytest.mark.parametrize("name", ["tsm_resnet18", "tsm_mobilenetv2", "i3d_resnet50"])
def test_a_first_convolution_over_other_channels_starts_from_the_mean(name, channels):
    net, rgb = small(name, in_channels=channels), small(name)
    assert published.load(net, rgb.state_dict()).missing == []
    first = net.first_conv_name + ".weight"
    expected = rgb.state_dict()[first].mean(1, keepdim=True)
    assert net.state_dict()[first].shape[1] == channels
    torch.testing.assert_close(net.state_dict()[first], expected.expand_as(net.state_dict()[first]))


PUBLISHED = {
    "tsn_r50": ("tsn_resnet50", {}),
    "tsm_r50_8f": ("tsm_resnet50", {}),
    "tsm_r101_8f": ("tsm_resnet101", {}),
    "tsm_r50_nl_8f": ("tsm_resnet50_nl", {}),
    "tsm_mbv2_8f": ("tsm_mobilenetv2", {}),
    "tsm_r50_8f_tpool": ("tsm_resnet50", {"temporal_pool": True}),
    "online_mbv2_jester": ("tsm_mobilenetv2", {"causal": True}),
}


def recorded(shared, file: str, name: str) -> dict[str, torch.Tensor]:
    shapes = json.loads((shared / "parity" / file).read_text())[name]
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def on_meta(name: str, **options) -> nn.Module:
    return cost.build_on_meta(lambda: models.build(name, **options))


@pytest.mark.parametrize("key", PUBLISHED)
def test_published_checkpoints_fit_their_networks_by_name_and_shape(key, shared):
    theirs = recorded(shared, "tsm_state_dict_keys.json", key)
    classes = next(len(v) for k, v in theirs.items() if k.endswith(("fc.bias", "classifier.bias")))
    name, options = PUBLISHED[key]
    net = on_meta(name, num_classes=classes, **options)
    report = published.load(net, {"module." + k: v for k, v in theirs.items()})
    assert (len(report.loaded), report.missing, report.dropped) == (len(theirs), [], {})
    fewer = published.load(on_meta(name, num_classes=5, **options), theirs)
    assert len(fewer.loaded) == len(theirs) - 2
    assert fewer.dropped == dict.fromkeys(["new_fc.weight", "new_fc.bias"], f"{classes} classes in the file, 5 here")


def test_the_released_online_network_and_the_offline_ones_start_each_other(shared):
    online = OnlineTSM(on_meta("tsm_mobilenetv2", num_classes=27, causal=True))
    for key in ("online_mbv2_jester", "tsm_mbv2_8f"):
        theirs = recorded(shared, "tsm_state_dict_keys.json", key)
        report = published.load(online, theirs)
        assert report.missing == []
        assert len(report.loaded) >= 312
    report = published.load(on_meta("tsm_mobilenetv2", num_classes=27), online.state_dict())
    assert (len(report.loaded), report.missing) == (314, [])


def module_of(tensors: dict[str, torch.Tensor]) -> nn.Module:
    """A module whose state dict has these names and shapes, zero."""
    root = nn.Module()
    for name, value in tensors.items():
        *path, leaf = name.split(".")
        node = root
        for part in path:
            if part not in node._modules:
                node.add_module(part, nn.Module())
            node = node._modules[part]
        node.register_buffer(leaf, torch.zeros_like(value))
    return root


def test_names_of_point_cloud_networks_are_told_apart(shared):
    for name in json.loads((shared / "parity/pvcnn_state_dict_keys_full.json").read_text()):
        theirs = {
            k: torch.tensor(float(i)) for i, k in enumerate(recorded(shared, "pvcnn_state_dict_keys_full.json", name))
        }
        net = module_of(theirs)
        report = published.load(net, {"model": {"module." + k: v for k, v in theirs.items()}, "meters": {}})
        assert equal(net, theirs)
        assert (report.missing, report.dropped) == ([], {})


def in_blocks(wrapper: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a network whose residual blocks are wrapped."""
    rule = rf"\1.{wrapper}."
    return {re.sub(r"(layer\d\.\d|features\.\d+)\.", rule, name): value for name, value in tensors.items()}


def after(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


OPTIMIZER = {"state": {i: {"exp_avg": torch.zeros(3), "step": torch.tensor(1.0)} for i in range(9)}}
FSDP, CHECKPOINTED = "_fsdp_wrapped_module", "_checkpoint_wrapped_module._orig_mod"
WRAPPED = {
    "fsdp blocks": lambda tensors: in_blocks(FSDP, tensors),
    "fsdp": lambda tensors: {"model": after(f"{FSDP}.", in_blocks(FSDP, tensors))},
    "checkpointed blocks, compiled": lambda tensors: after("_orig_mod.", in_blocks(CHECKPOINTED, tensors)),
    "in a sequence": lambda tensors: after("0.", tensors),
    "in a sequence, wrapped": lambda tensors: after("module.0.module.", tensors),
    "lightning": lambda tensors: {
        "state_dict": after("learner.student_net.", tensors),
        "optimizer_states": [OPTIMIZER],
    },
    "model_state": lambda tensors: {"model_state": tensors, "optimizer_state": OPTIMIZER},
    "state.model": lambda tensors: {"state": {"model": after("module.", tensors), "optimizers": [OPTIMIZER]}},
    "weights of a list": lambda tensors: {"networks": [after("ddp.", tensors), OPTIMIZER]},
    "averaged": lambda tensors: {"model_ema": after("module.", tensors) | {"n_averaged": torch.tensor(5)}},
    "beside an average": lambda tensors: {"ema": {k: v + 1 for k, v in tensors.items()}, "model": tensors},
    "beside an average, flat": lambda tensors: tensors | after("ema_model.", {k: v + 1 for k, v in tensors.items()}),
}


@pytest.mark.parametrize("style", WRAPPED)
@pytest.mark.parametrize("name", ["tsm_resnet18", "tsm_mobilenetv2", "i3d_resnet50_nl", "pvcnn_s3dis"])
def test_wrappers_are_found_by_structure_and_every_weight_arrives(name, style):
    trained, net = small(name), fill(models.build(name, **SMALL), seed=2)
    report = published.load(net, WRAPPED[style](trained.state_dict()))
    assert equal(net, trained.state_dict())
    assert (len(report.loaded), report.missing) == (len(net.state_dict()), [])


# ------------------------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize("lost", [1, 24])
def test_a_checkpoint_that_lacks_some_of_the_weights_is_refused_with_their_names(lost):
    trained, net = small("tsm_resnet18"), small("tsm_resnet18")
    names = [name for name in trained.state_dict() if ".layer" in name and "num_batches" not in name][5 : 5 + lost]
    theirs = {name: value for name, value in trained.state_dict().items() if name not in names}
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(UserError, match=f"{lost} weights of this network are not in the file, .*{re.escape(names[0])}"):
        published.load(net, theirs)
    assert equal(net, before)
    assert sorted(published.load(net, theirs, exclude=names).dropped) == sorted(names)


def test_two_networks_in_one_file_are_a_question():
    trained = small("tsm_resnet18").state_dict()
    flat = {f"{who}.{name}": value for who in ("student", "teacher") for name, value in trained.items()}
    with pytest.raises(UserError, match=r"student\..* and teacher\..* mean the same weight"):
        published.load(small("tsm_resnet18"), flat)
    with pytest.raises(UserError, match="student and teacher are networks of the same kind"):
        published.load(small("tsm_resnet18"), {"student": trained, "teacher": trained})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["base_model.layer1.0.conv1.net.weight", "base_model.bn1.running_var", "new_fc.bias"])
def test_weights_that_are_no_numbers_are_refused_with_their_name(name, value, tmp_path):
    trained, net = small("tsm_resnet18"), small("tsm_resnet18")
    trained.state_dict()[name].view(-1)[1] = value
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(UserError, match=rf"w\.pth: {re.escape(name)} holds 1 values that are not finite numbers"):
        published.load(net, tmp_path / "w.pth")
    assert equal(net, before)


def test_numbers_that_overflow_on_the_way_are_refused():
    trained = {k: v.double() for k, v in small("tsm_resnet18").state_dict().items()}
    trained["new_fc.bias"][0] = 1e300
    with pytest.raises(UserError, match=r"new_fc\.bias holds 1 values that are not finite"):
        published.load(small("tsm_resnet18"), trained)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_weights_of_other_precision_are_converted(kind):
    trained, net = small("tsm_resnet18").state_dict(), small("tsm_resnet18")
    theirs = {k: v.to(kind) if v.is_floating_point() else v for k, v in trained.items()}
    published.load(net, theirs)
    assert equal(net, {k: v.to(trained[k].dtype) for k, v in theirs.items()})


def test_complex_whole_and_quantized_weights_are_refused():
    trained = small("tsm_resnet18").state_dict()
    for value, said in (
        (torch.complex(trained["new_fc.bias"], trained["new_fc.bias"]), "new_fc.bias holds complex numbers"),
        (trained["new_fc.bias"].to(torch.int8), r"new_fc.bias holds integers \(int8\), as quantized weights do"),
    ):
        with pytest.raises(UserError, match=said):
            published.load(small("tsm_resnet18"), trained | {"new_fc.bias": value})


def test_a_head_of_other_classes_is_left_out_with_a_word():
    net, trained = small("tsm_resnet18"), small("tsm_resnet18", num_classes=9)
    before = net.new_fc.weight.clone()
    report = published.load(net, trained.state_dict())
    assert report.dropped["new_fc.weight"] == "9 classes in the file, 7 here"
    assert torch.equal(net.new_fc.weight, before)
    assert str(report) == (
        "120 tensors loaded; left out: new_fc.weight (9 classes in the file, 7 here), "
        "new_fc.bias (9 classes in the file, 7 here)"
    )


def test_excluded_weights_keep_their_values():
    net, trained = fill(models.build("tsm_resnet18", **SMALL), seed=2), small("tsm_resnet18")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    report = published.load(net, trained.state_dict(), exclude=["base_model.layer4.", "new_fc"])
    kept = {k for k in before if k.startswith(("base_model.layer4.", "new_fc"))}
    assert report.dropped == dict.fromkeys(sorted(kept, key=list(before).index), "excluded")
    now = {k: v for k, v in net.state_dict().items() if v.ndim}  # counters are few and may be equal by chance
    assert {k for k, v in now.items() if torch.equal(v, before[k])} == kept & set(now)
    with pytest.raises(UserError, match="no weight of this network starts with 'layer4'"):
        published.load(net, trained.state_dict(), exclude=["layer4"])


def test_old_checkpoints_without_batch_counters_load_whole():
    trained, net = small("tsm_resnet18"), models.build("tsm_resnet18", **SMALL)
    theirs = {k: v for k, v in trained.state_dict().items() if not k.endswith("num_batches_tracked")}
    report = published.load(net, theirs)
    assert (report.missing, report.dropped) == ([], {})


def test_what_the_network_has_no_place_for_is_named():
    trained = small("tsm_resnet18").state_dict() | {"aux_head.weight": torch.zeros(3)}
    report = published.load(models.build("tsm_resnet18", **SMALL), trained)
    assert report.dropped == {"aux_head.weight": "no place in this network"}


def test_another_shape_is_refused_with_the_name_and_both_shapes_before_anything_changes():
    net = small("tsm_resnet18")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(UserError) as said:
        published.load(net, small("tsn_resnet18", width=0.25).state_dict())
    assert str(said.value) == (
        "weights: base_model.conv1.weight has shape [16, 3, 7, 7], here base_model.conv1.weight has [8, 3, 7, 7]: "
        "build the network with the options of the file, or exclude 'base_model.conv1.weight'"
    )
    trained = fill(models.build("tsm_resnet18", **SMALL), seed=5).state_dict()
    with pytest.raises(UserError, match=r"layer4\.1\.conv2\.weight has shape \[2, 2\]"):
        published.load(net, trained | {"base_model.layer4.1.conv2.weight": torch.zeros(2, 2)})
    assert equal(net, before)


def test_a_head_of_other_features_is_refused():
    net, trained = small("tsm_resnet18"), small("tsm_resnet18").state_dict()
    with pytest.raises(UserError, match=r"new_fc\.weight has shape \[7, 5\]"):
        published.load(net, trained | {"new_fc.weight": torch.zeros(7, 5)})


def test_weights_of_another_network_are_refused_with_names_of_both_sides():
    with pytest.raises(UserError) as said:
        published.load(small("tsm_mobilenetv2"), small("tsm_resnet18").state_dict())
    assert re.search(r"has 0 of the \d+ weights of this network, so it belongs to another one", str(said.value))
    assert "the file has base_model.conv1.weight, base_model.bn1.weight" in str(said.value)
    assert "this network base_model.features.0.0.weight" in str(said.value)
    assert "\n" not in str(said.value)


def test_a_checkpoint_that_holds_a_weight_twice_is_refused():
    trained = small("tsm_resnet18").state_dict()
    with pytest.raises(UserError, match=r"new_fc\.weight and module\.fc\.weight mean the same weight"):
        published.load(small("tsm_resnet18"), trained | {"module.fc.weight": trained["new_fc.weight"]})


# -------------------------------------------------------------------------------------------------- by bytes


def foreign(path) -> dict:
    """A training checkpoint with classes that have nothing to do with tensors, as training programs write them."""
    return {
        "state_dict": small("tsm_resnet18").state_dict(),
        "args": argparse.Namespace(lr=0.1, when=datetime.datetime(2026, 1, 2)),
        "seen": {datetime.date(2026, 1, 2), signal.SIGINT},
        "history": collections.deque([np.float64(1.5), np.arange(3)], maxlen=4),
        "by_name": collections.defaultdict(list, {"a": [1]}),
        "weights": nn.Parameter(torch.ones(2)),
        "path": path,
    }


FORMATS = {
    "safetensors": lambda content, path: safetensors.torch.save_file(content["state_dict"], path),
    "zip": lambda content, path: torch.save({"state_dict": content["state_dict"], "epoch": 3}, path),
    "legacy": lambda content, path: torch.save(content["state_dict"], path, _use_new_zipfile_serialization=False),
    "foreign zip": lambda content, path: torch.save(content, path),
    "foreign legacy": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("format_name", FORMATS)
def test_every_format_is_read_bit_for_bit_from_a_path_or_a_uri(format_name, tmp_path):
    content = foreign(tmp_path)
    FORMATS[format_name](content, tmp_path / "weights.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for source in (tmp_path / "weights.pth", str(tmp_path / "weights.pth"), f"file://{tmp_path}/weights.pth"):
            net = models.build("tsm_resnet18", **SMALL)
            assert len(published.load(net, source).loaded) == 122
            assert equal(net, content["state_dict"])


def test_every_type_of_number_and_every_view_is_read(tmp_path):
    flat = torch.arange(24)
    kinds = (torch.bfloat16, torch.bool, torch.uint8, torch.int8, torch.float64, torch.float32, torch.float16)
    tensors = {str(kind): flat.to(kind) for kind in (*kinds, torch.int32, torch.int64, torch.int16)}
    tensors |= {"part": flat[3:9], "turned": flat.view(4, 6).t(), "empty": torch.zeros(0, 3), "one": torch.tensor(2.5)}
    for zipped in (True, False):
        content = {"model": tensors, "of": argparse.Namespace()}
        torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        found = published.read(tmp_path / "a.pt")
        assert list(found) == list(tensors)
        for name, value in tensors.items():
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value)


class Attack:
    """Calls `function(*arguments)` when unpickled by a reader that executes code."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("writes", ["zip", "legacy", "plain pickle"])
def test_code_in_a_file_is_not_run(writes, tmp_path):
    made, state = tmp_path / "made", {"conv.weight": torch.ones(2)}

    def save(target: str, path) -> None:
        content = {"a": Attack(os.mkdir, target), "b": Attack(eval, f"__import__('os').mkdir({target!r})")}
        content |= {"c": Attack(getattr, Attack(__import__, "os"), "mkdir"), "state_dict": state}
        if writes == "plain pickle":
            path.write_bytes(pickle.dumps(content["a"]))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=writes == "zip")

    save(str(made), tmp_path / "evil.pth")
    if writes == "plain pickle":
        with pytest.raises(UserError, match=r"evil\.pth: is not a checkpoint"):
            published.read(tmp_path / "evil.pth")
        pickle.loads((tmp_path / "evil.pth").read_bytes())
    else:
        assert torch.equal(published.read(tmp_path / "evil.pth")["conv.weight"], torch.ones(2))
        assert not made.exists()
        with pytest.raises(FileExistsError):  # the second call of the unsafe reader finds the result of the first
            torch.load(tmp_path / "evil.pth", weights_only=False)
    assert made.exists()


def one_sentence(path) -> str:
    with pytest.raises(UserError) as said:
        published.read(path)
    text = str(said.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_file_cut_short_is_one_sentence(format_name, tmp_path):
    FORMATS[format_name](foreign(tmp_path), tmp_path / "whole.pth")
    data = (tmp_path / "whole.pth").read_bytes()
    for size in (5, 100, len(data) // 3, len(data) * 9 // 10, len(data) - 1):
        (tmp_path / "cut.pth").write_bytes(data[:size])
        assert "truncated: fetch it again" in one_sentence(tmp_path / "cut.pth")


@pytest.mark.parametrize(
    "data",
    [b"", b"<!DOCTYPE html><html>", b"version https://git-lfs.github.com/spec/v1\n", b"PK\x03\x04" * 9, b"8" * 99],
)
def test_what_is_no_checkpoint_is_one_sentence(data, tmp_path):
    (tmp_path / "page.pth").write_bytes(data)
    assert "is not a checkpoint" in one_sentence(tmp_path / "page.pth")


def test_a_missing_file_and_a_file_without_tensors_are_one_sentence(tmp_path):
    assert one_sentence(tmp_path / "none.pth").endswith("none.pth: no such file")
    for content in ({"epoch": 3}, [1, 2], {"state_dict": {}}, argparse.Namespace(a=torch.ones(2))):
        torch.save(content, tmp_path / "a.pth")
        assert "holds no named tensors" in one_sentence(tmp_path / "a.pth")
    around: dict = {}
    around["model"] = around
    torch.save(around, tmp_path / "a.pth")
    assert "holds no named tensors" in one_sentence(tmp_path / "a.pth")


def test_files_that_claim_more_than_they_hold_are_refused(tmp_path):
    path = tmp_path / "bomb.pth"
    torch.save({"a": torch.ones(1).expand(1_000_000), "b": torch.ones(1)}, path)
    assert "a declares more values than the file holds" in one_sentence(path)

    torch.save({"a": torch.zeros(1_000_000), "args": argparse.Namespace()}, path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "deflated", "w", zipfile.ZIP_DEFLATED) as out:
        for name in source.namelist():
            out.writestr(name, source.read(name))
    assert "is not a checkpoint" in one_sentence(tmp_path / "deflated")

    torch.save({"a": torch.zeros(12345), "args": argparse.Namespace()}, path, _use_new_zipfile_serialization=False)
    little, huge = b"M" + (12345).to_bytes(2, "little"), b"\x8a\x06" + (10**13).to_bytes(6, "little")
    data = path.read_bytes()
    assert data.count(little) > 0
    path.write_bytes(data.replace(little, huge))
    assert "is not a checkpoint" in one_sentence(path)


UNUSUAL = {
    "without values": lambda: torch.empty(3, 2, device="meta"),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3, 2), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "sparse": lambda: torch.eye(3).to_sparse(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", UNUSUAL)
def test_tensors_whose_values_are_not_there_one_by_one_are_one_sentence(kind, tmp_path):
    torch.save({"state_dict": {"a": torch.ones(2), "conv.weight": UNUSUAL[kind]()}}, tmp_path / "a.pt")
    assert f"conv.weight is {kind}" in one_sentence(tmp_path / "a.pt")


def test_names_without_end_cost_no_time_without_end():
    """Twice as many names take about twice the time, not four times: counted in calls."""
    calls = []
    for count in (500, 1000):
        theirs = {f"a{i}.b{i % 7}.{i}.conv1.weight{i}": torch.ones(1) for i in range(count)}
        profile = cProfile.Profile()
        profile.enable()
        with contextlib.suppress(UserError):
            published.load(small("tsm_resnet18"), theirs)
        profile.disable()
        calls.append(pstats.Stats(profile).total_calls)
    assert calls[1] < 2.5 * calls[0]


def test_the_training_checkpoint_of_a_point_cloud_network_is_read(shared):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = published.read(shared / "parity/pvcnn_checkpoint_format_s3dis_pvcnn_c0p125.pth.tar")
    same_net = torch.load(shared / "parity/pvcnn_s3dis_pvcnn_c0p125.pt", weights_only=True)["state_dict"]
    assert len(found) == 121
    assert {k: v.shape for k, v in found.items()} == {f"module.{k}": v.shape for k, v in same_net.items()}
    assert all(v.isfinite().all() for v in found.values())
    net = module_of(same_net)
    report = published.load(net, shared / "parity/pvcnn_checkpoint_format_s3dis_pvcnn_c0p125.pth.tar")
    assert (len(report.loaded), report.missing, report.dropped) == (121, [], {})
    assert equal(net, found, {k: f"module.{k}" for k in same_net})
