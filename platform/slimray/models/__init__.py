"""The networks: the table `MODELS`, and `build`, which makes a network from a row and its options.

A new model is one file and one row. Video networks take `[B, T, C, H, W]` and have `num_segments` (T), image networks
take `[B, C, H, W]`; both return `[B, num_classes]` and have `head_name` (prefix of the last linear layer) and
`first_conv_name`, which optimizers use to form groups. Point networks are the rows of points/table.py. Networks of
`text` take tokens: pairs `[B, 2, L]` to logits `[B, L, vocab_size]`, or streams `[B, L + 1]` to log-probabilities of
the last L tokens `[B, L]`. The `ofa_` and `hat_` rows are supernets (supernet.py, ofa_pvcnn.py, hat.py): one network
with a `space` of archs, any of which it can run and extract.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from slimray.models.cifar_resnet import CifarResNet
from slimray.models.generators.carn import carn
from slimray.models.i3d import I3D, INFLATIONS
from slimray.models.lenet import LeNet5, LeNet300
from slimray.models.mobilenetv2 import MobileNetV2
from slimray.models.points.table import POINT_MODELS
from slimray.models.resnet import ResNet
from slimray.models.squeezenet import SqueezeNet
from slimray.models.supernets.mixed import proxyless_found, proxyless_supernet
from slimray.models.supernets.ofa_mobilenet import ofa_mobilenetv3, ofa_proxyless, ofa_tsm_mobilenetv3
from slimray.models.supernets.ofa_pvcnn import ofa_pvcnn, ofa_pvcnn_cls
from slimray.models.supernets.ofa_resnet import ofa_resnet50, ofa_tsm_resnet50
from slimray.models.supernets.static_mobile import mobilenetv3_large, proxyless_net
from slimray.models.text.hat import hat
from slimray.models.text.micronet import micronet_lm
from slimray.models.text.transformer import transformer
from slimray.models.text.transformer_lm import transformer_lm
from slimray.models.tsm import VideoNet2D
from slimray.spec import UserError, did_you_mean, lookup


@dataclass(frozen=True)
class Model:
    """A row of MODELS: its builder, description and input. `defaults` are the options that differ by row.

    A `supernet` has a `space` of archs; with the option `arch` the row builds that subnet.
    """

    make: Callable[..., nn.Module]
    description: str
    input: str = "clip"
    defaults: dict[str, Any] = field(default_factory=dict)
    supernet: bool = False
    sides: int = 0
    """Texts per sample: 1 for a stream, 2 for a pair, 0 if samples are not texts."""
    profiled: Mapping[str, Any] | None = None
    """Options for measuring the operators of a supernet; None if its input depends on the dataset."""


def _video_net(
    backbone: Callable[..., Any],
    shift: bool,
    non_local: bool = False,
    *,
    num_classes: int,
    num_segments: int = 8,
    width: float = 1.0,
    in_channels: int = 3,
    dropout: float = 0.5,
    shift_div: int = 8,
    causal: bool = False,
    place: str = "blockres",
    temporal_pool: bool = False,
    zero_gamma: bool = False,
) -> nn.Module:
    """Build a 2D backbone over frames; the keyword arguments are the options a user may set."""
    if place not in ("blockres", "block"):
        raise UserError(f"place: must be blockres or block (got {place!r})")
    if backbone is MobileNetV2 and (temporal_pool or place == "block"):
        raise UserError(f"{'temporal_pool' if temporal_pool else 'place: block'}: needs a ResNet")
    net = backbone(num_classes=num_classes, width=width, in_channels=in_channels, zero_gamma=zero_gamma)
    return VideoNet2D(
        net, num_classes, num_segments, shift, dropout, shift_div, causal, place, temporal_pool, non_local
    )


def _i3d(non_local: bool = False, *, inflation: str = "3x1x1", **options: Any) -> nn.Module:
    if inflation not in INFLATIONS:
        raise UserError(f"inflation: must be one of {', '.join(INFLATIONS)} (got {inflation!r})")
    return I3D(inflation=inflation, non_local=non_local, **options)


def _resnet(depth: int, *arguments: Any, shift: bool) -> Callable[..., nn.Module]:
    return partial(_video_net, partial(ResNet, depth), shift, *arguments)


_OFA: dict[str, Any] = {"supernet": True, "profiled": {"num_classes": 1000}}
_HAT: dict[str, Any] = {"sides": 2, "supernet": True, "profiled": {"vocab_size": 8000}}
_T8, _T32 = {"num_segments": 8}, {"num_segments": 32, "inflation": "3x1x1"}

MODELS: dict[str, Model] = {
    "tsn_resnet18": Model(_resnet(18, shift=False), "ResNet-18 over frames, logits averaged", defaults=_T8),
    "tsn_resnet50": Model(_resnet(50, shift=False), "ResNet-50 over frames, logits averaged", defaults=_T8),
    "tsn_resnet101": Model(_resnet(101, shift=False), "ResNet-101 over frames, logits averaged", defaults=_T8),
    "tsn_resnet50_nl": Model(_resnet(50, True, shift=False), "TSN ResNet-50, five non-local blocks", defaults=_T8),
    "tsn_mobilenetv2": Model(partial(_video_net, MobileNetV2, False), "MobileNetV2 over frames", defaults=_T8),
    "tsm_resnet18": Model(_resnet(18, shift=True), "TSM: ResNet-18 with temporal shift", defaults=_T8),
    "tsm_resnet50": Model(_resnet(50, shift=True), "TSM: ResNet-50 with temporal shift", defaults=_T8),
    "tsm_resnet101": Model(_resnet(101, shift=True), "TSM: ResNet-101 with temporal shift", defaults=_T8),
    "tsm_resnet50_nl": Model(_resnet(50, True, shift=True), "TSM ResNet-50, five non-local blocks", defaults=_T8),
    "tsm_mobilenetv2": Model(partial(_video_net, MobileNetV2, True), "TSM: MobileNetV2, for devices", defaults=_T8),
    "i3d_resnet50": Model(_i3d, "I3D: ResNet-50 inflated to 3D", defaults=_T32),
    "i3d_resnet50_nl": Model(partial(_i3d, True), "I3D ResNet-50, five non-local blocks", defaults=_T32),
    "resnet18": Model(partial(ResNet, 18), "ResNet-18 for images", "image"),
    "resnet50": Model(partial(ResNet, 50), "ResNet-50 for images", "image"),
    "mobilenetv2": Model(MobileNetV2, "MobileNetV2 for images", "image"),
    "resnet20": Model(partial(CifarResNet, 20), "ResNet-20 for images of 32 pixels (CIFAR)", "image"),
    "resnet56": Model(partial(CifarResNet, 56), "ResNet-56 for images of 32 pixels (CIFAR)", "image"),
    "lenet300": Model(LeNet300, "LeNet-300-100: three linear layers, for images of 28 pixels (MNIST)", "image"),
    "lenet5": Model(LeNet5, "LeNet-5 of Caffe, for images of 28 pixels (MNIST)", "image"),
    "squeezenet": Model(SqueezeNet, "SqueezeNet 1.0 for images", "image"),
}

MODELS |= {
    "mobilenetv3_large": Model(mobilenetv3_large, "MobileNetV3-Large for images", "image"),
    "proxyless_mobile": Model(partial(proxyless_net, "mobile"), "found by ProxylessNAS for phones", "image"),
    "proxyless_cpu": Model(partial(proxyless_net, "cpu"), "found by ProxylessNAS for CPUs", "image"),
    "proxyless_gpu": Model(partial(proxyless_net, "gpu"), "found by ProxylessNAS for GPUs", "image"),
    "proxyless_mobile_14": Model(partial(proxyless_net, "mobile_14"), "proxyless_mobile, widened 1.4 times", "image"),
    "proxyless_supernet": Model(proxyless_supernet, "ProxylessNAS supernet: candidates for every block", "image"),
    "proxyless_found": Model(proxyless_found, "result of a ProxylessNAS search (`blocks`)", "image"),
    "ofa_mobilenetv3": Model(ofa_mobilenetv3, "Once-for-All supernet of MobileNetV3 blocks", "image", **_OFA),
    "ofa_proxyless": Model(ofa_proxyless, "Once-for-All supernet of ProxylessNAS blocks", "image", **_OFA),
    "ofa_resnet50": Model(ofa_resnet50, "Once-for-All supernet of ResNet-50D", "image", **_OFA),
    "ofa_tsm_mobilenetv3": Model(ofa_tsm_mobilenetv3, "Once-for-All over TSM: MobileNetV3 blocks", "clip", **_OFA),
    "ofa_tsm_resnet50": Model(ofa_tsm_resnet50, "Once-for-All over TSM: ResNet-50D", "clip", **_OFA),
}
MODELS |= {
    "ofa_pvcnn": Model(
        ofa_pvcnn, "Once-for-All supernet of PVCNNs for points, our own design", "points", supernet=True
    ),
    "ofa_pvcnn_cls": Model(
        ofa_pvcnn_cls, "Once-for-All supernet of PVCNNs for clouds, our own design", "points", supernet=True
    ),
}
MODELS |= {
    "carn": Model(carn, "CARN: pictures enlarged 2, 3 or 4 times", "image_pair"),
    "carn_m": Model(carn, "CARN-M: grouped and shared, for devices", "image_pair", {"groups": 4, "shared": True}),
}
MODELS |= {
    "transformer": Model(transformer, "Transformer: translates sentences", "text", sides=2),
    "hat_wmt": Model(hat, "HAT supernet of transformers, WMT's space", "text", {"preset": "wmt"}, **_HAT),
    "hat_iwslt": Model(hat, "HAT supernet of transformers, IWSLT's space", "text", {"preset": "iwslt"}, **_HAT),
    "hat_small": Model(hat, "HAT supernet of small transformers, our own space", "text", **_HAT),
    "transformer_lm": Model(transformer_lm, "Transformer: continues a text", "text", sides=1),
    "micronet_lm": Model(micronet_lm, "MicroNet's language model: short window, memory and cache", "text", sides=1),
}
MODELS |= {name: Model(make, text, takes) for name, (make, text, takes) in POINT_MODELS.items()}


def options_of(name: str) -> dict[str, Any]:
    """Return the options of a model with their defaults (`inspect.Parameter.empty` if required).

    Raises UserError for an unknown model.
    """
    row = lookup(MODELS, name, "model")
    make = I3D.__init__ if row.make is _i3d or getattr(row.make, "func", None) is _i3d else row.make
    parameters = inspect.signature(make).parameters
    hidden = ("self", "non_local", "backbone", "shift")
    supernet: dict[str, Any] = {"arch": {}} if row.supernet else {}
    return {k: v.default for k, v in parameters.items() if k not in hidden} | supernet | row.defaults


def required(name: str) -> list[str]:
    """Return the options of a model without a default, which depend on its task and dataset."""
    return [option for option, default in options_of(name).items() if default is inspect.Parameter.empty]


def is_supernet(model: Mapping[str, Any]) -> bool:
    """Return whether `model`, the arguments of `build`, defines a supernet rather than one of its subnets."""
    return lookup(MODELS, str(model.get("name")), "model").supernet and not model.get("arch")


# Options missing from a model.json of an earlier version -> the behaviour of networks of that version.
EARLIER = {"shortcuts": "by_channels"}


def stored(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored model.json with the options that its version did not have (EARLIER) added.

    `model` is returned unchanged if its name is not in MODELS; building it then raises the error.
    """
    known = options_of(str(model["name"])) if model.get("name") in MODELS else {}
    return {option: value for option, value in EARLIER.items() if option in known} | dict(model)


def explicit(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return `model`, the arguments of `build`, with the defaults that a model.json must contain: see `stored`."""
    known = options_of(str(model["name"])) if model.get("name") in MODELS else {}
    return dict(model) | {option: known[option] for option in EARLIER if option in known and option not in model}


def build(name: str, **options: Any) -> nn.Module:
    """Build the network `name` of MODELS; raise UserError for an unknown name or option, or a value out of range.

    With `arch` (plain values, see `Arch.to_dict`), build that subnet of a supernet.
    """
    known = options_of(name)
    for option, value in options.items():
        if option not in known:
            raise UserError(f"model {name}: unknown option {option!r}{did_you_mean(option, known)}")
        _check(name, option, value, known[option])
    for option in required(name):
        if option not in options:
            raise UserError(f"model {name}: {option} is required")
    arch = options.pop("arch", None)
    net = MODELS[name].make(**MODELS[name].defaults | options)
    return net.extract(net.space.arch(arch)) if arch else net  # type: ignore[operator]


def _check(name: str, option: str, value: Any, default: Any) -> None:
    """Check the value of an option against the type of its default and the ranges common to all models."""
    where = f"model {name}: {option}"
    kind = int if default is inspect.Parameter.empty else type(default)
    fits = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    if not fits and not (kind is float and isinstance(value, int) and not isinstance(value, bool)):
        raise UserError(f"{where}: must be {kind.__name__} (got {value!r})")
    if option.endswith("dropout") and kind is float:
        if not 0 <= value < 1:
            raise UserError(f"{where}: must be at least 0 and below 1 (got {value!r})")
    elif (
        kind in (int, float)
        and value != default
        and not 0 < value <= (10_000_000 if option == "vocab_size" else 100_000)
    ):
        raise UserError(f"{where}: must be > 0 (got {value!r})")
