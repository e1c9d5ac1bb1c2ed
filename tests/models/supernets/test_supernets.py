"""Every arch of every supernet: what the supernet computes is what the extracted subnet computes, and costs are exact.

A network of random weights hides mistakes: where BatchNorm's statistics are those of another arch, the smaller subnets
hardly depend on their input. So an arch is compared after a pass in train mode has given it statistics of its own, and
the tests of the mutants show that the comparison notices what it should.
"""

import json
import random
import re
from collections import defaultdict
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slimray import models
from slimray.arch import Arch
from slimray.edge import cost
from slimray.models import published
from slimray.models.supernets import elastic
from slimray.models.supernets.elastic import ElasticDepthwise, sort_channels
from slimray.models.supernets.ofa_mobilenet import MBConvBlock
from slimray.models.supernets.ofa_resnet import BottleneckBlock
from slimray.models.supernets.supernet import Subnet, Supernet
from slimray.models.tsm import temporal_shift
from slimray.spec import UserError
from slimray.train import batchnorm, optimizers

NETS = ("ofa_mobilenetv3", "ofa_proxyless", "ofa_resnet50", "ofa_tsm_mobilenetv3", "ofa_tsm_resnet50")
IMAGES = {
    "ofa_mbv3_d234_e346_k357_w1.0": ("ofa_mobilenetv3", 1.0),
    "ofa_mbv3_d234_e346_k357_w1.2": ("ofa_mobilenetv3", 1.2),
}
IMAGES |= {"ofa_proxyless_d234_e346_k357_w1.3": ("ofa_proxyless", 1.3), "ofa_resnet50": ("ofa_resnet50", 1.0)}
PROXYLESS = ("proxyless_mobile", "proxyless_cpu", "proxyless_gpu", "proxyless_mobile_14")
SIDE = 24  # of the inputs here: far smaller than any resolution of the spaces for ImageNet


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Use few threads, as inputs here are too small for more to be faster."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@torch.no_grad()
def small(name: str, preset: str = "tiny", **options) -> Supernet:
    """A narrow supernet whose every weight matters: kernel matrices are no identity, BatchNorms differ by channel."""
    torch.manual_seed(0)
    net = models.build(name, **{"num_classes": 5, "dropout": 0.0, "preset": preset} | options)
    for module in net.modules():
        if isinstance(module, ElasticDepthwise):
            for parameter in module.parameters(recurse=False):
                parameter += 0.1 * torch.randn_like(parameter)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.normal_(module.bias, 0, 0.3)
    net(batch(net, net.space.largest()))
    return net.eval()


def batch(net: nn.Module, arch: Arch | None = None, seed: int = 0, count: int = 3) -> Tensor:
    """Inputs `[count, (T,) 3, SIDE, SIDE]`."""
    generator = torch.Generator().manual_seed(seed)
    frames = (net.num_segments if arch is None else arch["frames"],) if net.num_segments else ()
    return torch.randn(count, *frames, 3, SIDE, SIDE, generator=generator)


def settle(net: Supernet, arch: Arch) -> None:
    """Give the BatchNorms of `arch` statistics of its own."""
    with torch.no_grad():
        net.train()(batch(net, arch, seed=1), arch)
    net.eval()


def gap(a: Tensor, b: Tensor) -> float:
    """The largest difference relative to the largest value."""
    return float(((a - b).abs().max() / b.abs().max()).detach())


def spread(out: Tensor) -> float:
    """How much the outputs of several inputs differ, relative to their size."""
    return float((out - out.mean(0)).abs().max() / out.abs().max())


def corners(net: Supernet) -> list[Arch]:
    """Largest, smallest, and each dimension alone at its smallest."""
    space = net.space
    single = [space.restrict(**{n: [min(min(values) for values in genes)]}).largest() for n, genes in space.choices]
    return [space.largest(), space.smallest(), *single]


# ------------------------------------------------------------------------------------------------- the contract


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "preset", "count"),
    [(n, p, c) for n, (p, c) in product(NETS, (("tiny", 40), ("imagenet", 10)))]
    + [("ofa_proxyless", "micro", 10)]
    + [
        pytest.param(n, p, c, marks=pytest.mark.benchmark)
        for n, (p, c) in product(NETS, (("tiny", 200), ("imagenet", 20)))
    ],
)
def test_the_supernet_computes_what_the_extracted_subnet_computes(name, preset, count):
    net = small(name, preset, width=0.25 if preset == "imagenet" else 1.0, **clip_options(name))
    rng = random.Random(1)
    for arch in corners(net) + [net.space.sample(rng) for _ in range(count)]:
        settle(net, arch)
        x = batch(net, arch)
        ours, theirs = net(x, arch), net.extract(arch)(x)
        assert spread(theirs) > 0.05, arch
        assert gap(ours, theirs) < 1e-5, arch


def clip_options(name: str) -> dict:
    return {"num_segments": 4} if "tsm" in name else {}


@torch.no_grad()
def _crop_only(sub: Subnet, net: Supernet, arch: Arch) -> None:
    for placed in net.layout.plan(arch):
        source = net.get_submodule(placed.source)
        for name, module in source.named_modules():
            if isinstance(module, ElasticDepthwise):
                conv = sub.get_submodule(f"{placed.name}.{name}")
                edge = (module.kernels[-1] - conv.kernel_size[0]) // 2
                weight = module.conv.weight[: conv.out_channels, :, edge:, edge:]
                conv.weight.copy_(weight[:, :, : conv.kernel_size[0], : conv.kernel_size[0]])


@torch.no_grad()
def _last_inputs(sub: Subnet, net: Supernet, arch: Arch) -> None:
    for placed in net.layout.plan(arch):
        if placed.elastic and placed.name.startswith("blocks."):
            is_mobile = isinstance(sub.get_submodule(placed.name), MBConvBlock)
            name = "conv.point_linear.conv" if is_mobile else "conv3.conv"
            conv = sub.get_submodule(f"{placed.name}.{name}")
            whole = net.get_submodule(f"{placed.source}.{name}").conv.weight
            conv.weight.copy_(whole[: conv.out_channels, -conv.in_channels :])


def _of_middle(change):
    """A mutation of the first BatchNorm inside each elastic block, whose channels are elastic."""

    @torch.no_grad()
    def mutate(sub: Subnet, net: Supernet, arch: Arch) -> None:
        for placed in net.layout.plan(arch):
            if placed.elastic and placed.name.startswith("blocks."):
                name = next(
                    n for n, m in sub.get_submodule(placed.name).named_modules() if isinstance(m, nn.BatchNorm2d)
                )
                change(sub.get_submodule(f"{placed.name}.{name}"), net.get_submodule(f"{placed.source}.{name}").bn)

    return mutate


def _last_features(norm: nn.Module, whole: nn.Module) -> None:
    for key, value in norm.state_dict().items():
        if value.ndim:
            value.copy_(whole.state_dict()[key][-len(value) :])


def _without_squeeze(sub: Subnet, *_) -> None:
    for module in sub.modules():
        if hasattr(module, "se"):
            module.se = nn.Identity()


def _without_shift(sub: Subnet, *_) -> None:
    for module in sub.modules():
        if isinstance(module, MBConvBlock | BottleneckBlock):
            module.shift = None


def _without_residual(sub: Subnet, *_) -> None:
    for module in sub.modules():
        if isinstance(module, MBConvBlock):
            module.residual = False


MUTANTS = {
    "kernel matrices": (_crop_only, ("ofa_mobilenetv3", "ofa_proxyless", "ofa_tsm_mobilenetv3")),
    "input channels": (_last_inputs, NETS),
    "norm features": (_of_middle(_last_features), NETS),
    "squeeze": (_without_squeeze, ("ofa_mobilenetv3", "ofa_tsm_mobilenetv3")),
    "shift": (_without_shift, ("ofa_tsm_mobilenetv3", "ofa_tsm_resnet50")),
    "residual": (_without_residual, ("ofa_mobilenetv3", "ofa_proxyless", "ofa_tsm_mobilenetv3")),
}


@torch.no_grad()
@pytest.mark.parametrize(("what", "name"), [(what, name) for what, (_, names) in MUTANTS.items() for name in names])
def test_the_comparison_notices_a_subnet_that_differs_in(what, name):
    net, rng = small(name), random.Random(2)
    for arch in [net.space.smallest(), *(net.space.sample(rng) for _ in range(4))]:
        settle(net, arch)
        x, sub = batch(net, arch), net.extract(arch)
        before = sub(x)
        MUTANTS[what][0](sub, net, arch)
        assert gap(sub(x), before) > 1e-2, arch


@pytest.mark.parametrize("name", NETS)
def test_gradients_and_statistics_of_a_training_step_agree(name):
    net, rng = small(name, **clip_options(name)), random.Random(3)
    for arch in corners(net)[:2] + [net.space.sample(rng) for _ in range(10)]:
        net.zero_grad(set_to_none=True)
        sub, x = net.extract(arch).train(), batch(net, arch)
        before = {k: v.clone() for k, v in net.named_buffers()}
        outputs = [net.train()(x, arch), sub(x)]
        assert gap(*outputs) < 1e-4
        for out in outputs:
            nn.functional.cross_entropy(out, torch.arange(len(x))).backward()
        touched = set()
        for placed in net.layout.plan(arch):
            for name_there, plain in sub.get_submodule(placed.name).named_parameters():
                touched |= same_gradient(net, placed.source, name_there, plain)
            for name_there, plain in sub.get_submodule(placed.name).named_buffers():
                shared = find(net, f"{placed.source}.{name_there}")
                now, was = net.get_buffer(shared), before[shared]
                first = tuple(slice(size) for size in plain.shape)
                torch.testing.assert_close(now[first], plain, rtol=1e-4, atol=1e-5)
                if plain.ndim:
                    assert torch.equal(now[len(plain) :], was[len(plain) :])
        for name_here, parameter in net.named_parameters():
            assert name_here in touched or parameter.grad is None


def find(net: nn.Module, name: str) -> str:
    """The name in the supernet of a tensor with that name in a plain net."""
    path, _, leaf = name.rpartition(".")
    module = net.get_submodule(path)
    inner = next((n for n in ("conv", "bn", "linear") if path.endswith(n) and hasattr(module, n)), None)
    return f"{path}.{inner}.{leaf}" if inner else name


def same_gradient(net: Supernet, source: str, name: str, plain: nn.Parameter) -> set[str]:
    """Compare the gradient of a plain parameter with that of the weights it was taken from; return their names."""
    shared = find(net, f"{source}.{name}")
    module = net.get_submodule(shared.rpartition(".conv.")[0] or source)
    if isinstance(module, ElasticDepthwise) and shared.endswith(".conv.conv.weight"):
        kernel = module.filter(plain.shape[0], plain.shape[-1])
        used = [(n, p) for n, p in module.named_parameters() if p.grad is not None]
        expected = torch.autograd.grad(kernel, [p for _, p in used], plain.grad, allow_unused=True)
        for (_, parameter), gradient in zip(used, expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, **close(gradient))
        return {f"{shared.removesuffix('.conv.weight')}.{n}" for n, _ in used}
    gradient = net.get_parameter(shared).grad
    assert gradient is not None
    assert plain.grad is not None
    inside = torch.zeros_like(gradient)
    inside[tuple(slice(size) for size in plain.shape)] = plain.grad
    torch.testing.assert_close(gradient, inside, **close(inside))
    return {shared}


def close(expected: Tensor) -> dict[str, float]:
    """Tolerances relative to the largest gradient of a tensor: the smaller ones are sums that cancel."""
    return {"rtol": 1e-3, "atol": 1e-4 * float(expected.abs().max()) + 1e-6}


# ------------------------------------------------------------------------------------------ an arch is a value


@torch.no_grad()
@pytest.mark.parametrize("name", NETS)
def test_without_an_arch_the_largest_runs_and_no_call_leaves_a_trace(name):
    net = small(name)
    x, state = batch(net), {k: v.clone() for k, v in net.state_dict().items()}
    largest = net(x)
    torch.testing.assert_close(net(x, net.space.largest()), largest, rtol=0, atol=0)
    for arch in corners(net)[1:]:
        net(batch(net, arch), arch)
        net.extract(arch)
    assert torch.equal(net(x), largest)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("name", NETS)
def test_an_extracted_net_is_made_of_plain_layers_that_share_nothing(name):
    net = small(name)
    for arch in (net.space.largest(), net.space.smallest()):
        sub = net.extract(arch)
        kinds = {
            type(m).__module__.split(".")[0] + "." + type(m).__name__ for m in sub.modules() if not list(m.children())
        }
        assert all(kind.startswith("torch.") or kind == "slimray.TemporalShift" for kind in kinds)
        assert not sub.training
        before = {k: v.clone() for k, v in net.state_dict().items()}
        with torch.no_grad():
            for value in sub.state_dict().values():
                value.add_(1)
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
        assert sub.get_submodule(sub.head_name).out_features == 5
        assert isinstance(sub.get_submodule(sub.first_conv_name), nn.Conv2d)
        assert sub.num_segments == arch.get("frames", 0)
    assert net.train().extract(net.space.smallest()).training


@pytest.mark.parametrize("name", NETS)
def test_supernets_tell_their_head_first_convolution_and_frames(name):
    net = small(name, num_classes=7)
    assert net.get_submodule(net.head_name).out_features == 7
    assert net.get_submodule(net.first_conv_name).in_channels == 3
    assert net.num_segments == (8 if "tsm" in name else 0)
    groups = {group["name"] for group in optimizers.parameter_groups(net, "tsm")}
    assert {"head_weight", "head_bias", "first_conv_weight", "norm", "weight"} <= groups


def test_an_arch_written_as_plain_values_is_the_same_and_another_space_s_is_refused():
    net = small("ofa_mobilenetv3")
    arch = net.space.sample(random.Random(0))
    x = batch(net)
    assert torch.equal(net(x, Arch.from_dict(arch.to_dict())), net(x, arch))
    with pytest.raises(UserError, match="this space has no dimension 'width'"):
        net.extract(small("ofa_resnet50").space.largest())
    with pytest.raises(UserError, match="kernel: 9 is not one of 3, 5, 7"):
        net(x, arch.replace(kernel=[9] * 9))


def test_clips_of_other_lengths_than_the_arch_says_are_refused():
    net = small("ofa_tsm_mobilenetv3")
    arch = net.space.arch({"frames": 4})
    for run in (lambda x: net(x, arch), net.extract(arch)):
        assert run(batch(net, arch)).shape == (3, 5)
        with pytest.raises(ValueError, match="takes clips of 4 frames"):
            run(batch(net))
        with pytest.raises(ValueError, match="takes clips of 4 frames"):
            run(torch.randn(4, 3, SIDE, SIDE))


@torch.no_grad()
@pytest.mark.parametrize("name", ["ofa_tsm_mobilenetv3", "ofa_tsm_resnet50"])
def test_the_shift_acts_where_there_is_a_residual_connection_and_follows_the_active_channels(name, monkeypatch):
    net, seen = small(name), []

    def recording(x, *args):
        seen.append((x.shape[1], *args))
        return temporal_shift(x, *args)

    for module in ("ofa_mobilenet", "ofa_resnet"):
        monkeypatch.setattr(f"slimray.models.supernets.{module}.temporal_shift", recording)
    for arch in (net.space.largest(), net.space.smallest(), net.space.sample(random.Random(1))):
        parts = [
            placed.part for placed in net.layout.plan(arch) if placed.elastic and placed.name.startswith("blocks.")
        ]
        shifted = [p for p in parts if name.endswith("resnet50") or (p.stride == 1 and p.inputs == p.outputs)]
        assert 0 < len(shifted) <= len(parts)
        seen.clear()
        net(batch(net, arch), arch)
        assert seen == [(part.inputs, arch["frames"], 8, False) for part in shifted]


@torch.no_grad()
def test_the_order_of_frames_matters_to_supernets_of_clips():
    for name in ("ofa_tsm_mobilenetv3", "ofa_tsm_resnet50"):
        net = small(name)
        for arch in corners(net):
            settle(net, arch)
            x = batch(net, arch)
            assert gap(net(x.flip(1), arch), net(x, arch)) > 1e-3, arch


# ------------------------------------------------------------------------------------------------ sorted channels


@torch.no_grad()
@pytest.mark.parametrize("name", NETS)
def test_sorting_channels_leaves_the_whole_net_and_the_freed_widths_as_they_are(name):
    net = small(name)
    values = {"expand": sorted({g for genes in net.space.dimensions["expand"].choices for g in genes})}
    if "width" in net.space.dimensions:
        values["width"] = [0, 1, 2]
    whole = net.space.largest()
    freed = {n: v[1:] for n, v in values.items()}
    inside = [whole] + [net.space.restrict(**freed).sample(random.Random(i)) for i in range(3)]
    outside = net.space.restrict(**{n: v[:1] for n, v in values.items()}).largest()

    def outputs(archs):
        return [net(batch(net, arch), arch) for arch in archs]

    settle(net, whole)
    before, smaller, first = outputs(inside), outputs([outside])[0], outputs(inside[1:])
    sort_channels(net, freed)
    for now, then in zip(outputs(inside), before, strict=True):
        assert gap(now, then) < 1e-4
    assert gap(outputs([outside])[0], smaller) > 1e-3  # so something was sorted
    sort_channels(net)
    assert gap(outputs([whole])[0], before[0]) < 1e-4
    assert max(gap(now, then) for now, then in zip(outputs(inside[1:]), first, strict=True)) > 1e-3
    for group in net.channel_groups():
        worth = sum(judge.weight.abs().transpose(0, 1).flatten(1).sum(1) for judge in group.judges)
        assert (worth.diff() <= 1e-4 * worth.max()).all()


def test_no_channel_that_a_shift_acts_on_is_ever_sorted():
    for name in ("ofa_tsm_mobilenetv3", "ofa_tsm_resnet50"):
        net = small(name)
        into_blocks = {
            net.get_submodule(
                f"{placed.source}.{'conv1' if 'resnet' in name else 'conv.inverted_bottleneck'}.conv"
            ).conv
            for placed in net.layout.plan(net.space.largest())
            if placed.elastic and placed.name.startswith("blocks.")
        }
        users = {user for group in net.channel_groups() for user in group.users}
        assert into_blocks
        assert not users & into_blocks
    with_widths = small("ofa_resnet50")
    assert len(with_widths.channel_groups()) > len(small("ofa_tsm_resnet50").channel_groups())


# ------------------------------------------------------------------------------------------------ re-calibration


@torch.no_grad()
@pytest.mark.parametrize("name", NETS)
def test_a_recalibrated_subnet_sees_a_batch_as_train_mode_does(name):
    net = small(name)
    for arch in (net.space.smallest(), net.space.sample(random.Random(5))):
        sub, x = net.extract(arch), batch(net, arch)
        state = {k: v.clone() for k, v in net.state_dict().items()}
        ready = batchnorm.recalibrate_norms(sub, [x])
        assert gap(ready(x), net.extract(arch).train()(x)) < 1e-4
        assert gap(sub(x), ready(x)) > 1e-2
        assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    with pytest.raises(ValueError, match="extracted subnet"):
        batchnorm.recalibrate_norms(net, [batch(net)])


# --------------------------------------------------------------------------------------------------------- units


@torch.no_grad()
@pytest.mark.parametrize("name", NETS)
def test_units_one_after_another_are_the_extracted_net(name):
    net, rng = small(name), random.Random(6)
    by_key = defaultdict(set)
    everything = net.all_units([SIDE])
    for arch in corners(net)[:2] + [net.space.sample(rng) for _ in range(2)]:
        settle(net, arch)
        sub, out = net.extract(arch), batch(net, arch)
        expected, units = sub(out), net.units(arch, SIDE)
        modules = [unit.make().eval() for unit in units]
        values = list(sub.state_dict().values())
        places = [v for module in modules for v in module.state_dict().values()]
        for place, value in zip(places, values, strict=True):
            place.copy_(value)
        macs = 0
        for unit, module in zip(units, modules, strict=True):
            assert tuple(out.shape[1:]) == unit.input
            out = module(out)
            assert everything[unit.key].input == unit.input
            params = sum(p.numel() for p in module.parameters())
            own = cost.count_macs(module, (1, *unit.input)) if params else 0
            by_key[unit.key].add((own, params))
            macs += own
        assert gap(out, expected) < 1e-5
        assert macs == cost.count_macs(sub, (1, *batch(net, arch).shape[1:]))
    assert all(len(costs) == 1 for costs in by_key.values())  # equal keys, equal work


@pytest.mark.parametrize("name", NETS)
def test_all_units_are_those_of_all_archs_and_no_others(name):
    net, rng = small(name), random.Random(7)
    side = max(net.space.dimensions["resolution"].choices[0])
    seen = {unit.key: unit for _ in range(3000) for unit in net.units(net.space.sample(rng), side)}
    assert net.all_units([side]) == seen


def test_units_of_a_space_are_few_enough_to_be_measured():
    net = cost.build_on_meta(lambda: models.build("ofa_mobilenetv3", num_classes=1000))
    assert len(net.all_units([224])) == 1 + 1 + 10 * 9 + 4  # stem, first block, two kinds per stage, the end
    sizes = [len({-(-side // 2**k) for side in range(128, 225, 4)}) for k in range(6)]  # of inputs halved k times
    assert sizes == [25, 25, 25, 13, 7, 4]
    blocks = sum(sizes[k] for k in (1, 2, 2, 3, 3, 4, 4, 4, 4, 5))  # the first block of each stage, and the others
    assert len(net.all_units()) == 25 + 25 + 9 * blocks + 4 + 4 + 1 + 1
    assert [unit.key for unit in net.units(net.space.smallest())][1] == (
        "MBConv-64x64-inputs:16-middle:16-outputs:16-kernel:3-stride:1-act:relu-se:0-expands:0-frames:0"
    )


# -------------------------------------------------------------------------------------------------------- counts


def parity(shared, file: str) -> dict:
    return json.loads((shared / "parity" / file).read_text())


def on_meta(name: str, **options) -> nn.Module:
    return cost.build_on_meta(lambda: models.build(name, **{"num_classes": 1000} | options))


def released_arch(net: Supernet, config: dict) -> Arch:
    """An arch out of a released configuration: `ks`, `e`, `d`, `w`, a number for all or a list."""
    depth = config["d"]
    if isinstance(depth, int):
        depth = [min(max(choices), depth) for choices in net.space.dimensions["depth"].choices]
    names = {"kernel": "ks", "expand": "e", "width": "w"}
    return net.space.arch({"depth": depth} | {n: config[old] for n, old in names.items() if old in config})


def shapes(net: nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in net.state_dict().items()}


def assert_macs(found: int, recorded: int) -> None:
    """Recorded MACs are sums in float32, which are off by some tens at 10^9."""
    assert found == pytest.approx(recorded, rel=3e-7)


@pytest.mark.parametrize("key", IMAGES)
def test_parameters_and_macs_are_the_published_ones(key, shared):
    name, width = IMAGES[key]
    record = parity(shared, "ofa_counts.json")[key]
    net = on_meta(name, width=width)
    assert cost.count_params(net) == record["supernet_params"]
    assert sum(value.numel() for value in net.state_dict().values()) == record["supernet_state_numel"]
    assert len(record["subnets"]) == 8
    for subnet in record["subnets"]:
        sub = net.extract(released_arch(net, subnet["config"]))
        assert cost.count_params(sub) == subnet["params"], subnet["name"]
        for side, macs in subnet["macs_hook"].items():
            found = cost.count_macs(sub, (1, 3, int(side), int(side)))
            assert found == round(subnet["mflops_formula"][side] * 1e6), (subnet["name"], side)
            assert_macs(found, macs)


def test_the_teacher_and_mobilenetv3_have_the_published_counts(shared):
    record, net = parity(shared, "ofa_counts.json"), on_meta("ofa_mobilenetv3")
    teacher, plain = net.extract(net.space.largest()), on_meta("mobilenetv3_large")
    for found, key in ((teacher, "teacher_D4_E6_K7"), (plain, "mobilenet_v3_large_default")):
        assert cost.count_params(found) == record[key]["params"]
        assert_macs(cost.count_macs(found, (1, 3, 224, 224)), record[key]["macs_224"])


@pytest.mark.parametrize("name", PROXYLESS)
def test_the_nets_proxylessnas_found_have_the_published_counts_blocks_and_names(name, shared):
    record, net = parity(shared, "ofa_counts.json")[name], on_meta(name)
    assert cost.count_params(net) == record["params"]
    assert_macs(cost.count_macs(net, (1, 3, 224, 224)), record["macs_224"])
    assert shapes(net) == parity(shared, "ofa_state_dict_keys.json")[name]
    for block, text in zip(net.blocks, record["blocks"], strict=True):
        if isinstance(block, MBConvBlock):
            conv = block.conv.depth_conv.conv
            assert text.startswith(f"{conv.kernel_size[0]}x{conv.kernel_size[1]} ")
            assert f" s{conv.stride[0]}" in text
            assert block.residual == text.endswith("+skip")
        else:
            assert text.startswith("Zero")
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(record["bn"]["eps"], record["bn"]["momentum"])}


@pytest.mark.parametrize("key", IMAGES)
def test_names_and_shapes_are_the_published_ones(key, shared):
    record, (name, width) = parity(shared, "ofa_state_dict_keys.json"), IMAGES[key]
    net = on_meta(name, width=width)
    assert list(shapes(net).items()) == list(record[key].items())
    for which, arch in (("max", net.space.largest()), ("min", net.space.smallest())):
        assert list(shapes(net.extract(arch)).items()) == list(record[f"{key}/subnet_{which}"].items())
    if width == 1.0 and name == "ofa_mobilenetv3":
        assert shapes(net.extract(net.space.largest())) == record["teacher_D4_E6_K7"]


def test_the_spaces_are_the_published_ones():
    def space(name, **options):
        return on_meta(name, **options).space

    mobile, proxyless, resnet = space("ofa_mobilenetv3"), space("ofa_proxyless"), space("ofa_resnet50")
    assert mobile.dimensions["kernel"].choices == ((3, 5, 7),) * 20
    assert mobile.dimensions["expand"].choices == ((3, 4, 6),) * 20
    assert mobile.dimensions["depth"].choices == ((2, 3, 4),) * 5
    assert mobile.dimensions["resolution"].choices == (tuple(range(128, 225, 4)),)
    assert mobile.num_archs() == 25 * (9**2 + 9**3 + 9**4) ** 5
    assert len(proxyless.dimensions["kernel"].choices) == len(proxyless.dimensions["expand"].choices) == 21
    assert [stage.blocks for stage in proxyless.depths[0].stages] == [4, 4, 4, 4, 4, 1]
    assert resnet.dimensions["depth"].choices == ((0, 2), *((0, 1, 2),) * 4)
    assert resnet.dimensions["expand"].choices == ((0.2, 0.25, 0.35),) * 18
    assert resnet.dimensions["width"].choices == ((0, 1, 2),) * 6
    assert [sum(arch.runs("expand")) for arch in (resnet.smallest(), resnet.largest())] == [10, 18]
    clips = space("ofa_tsm_mobilenetv3", num_segments=16)
    assert clips.dimensions["frames"].choices == ((4, 8, 16),)
    assert clips.restrict(frames=[16]).num_archs() == mobile.num_archs()
    assert space("ofa_tsm_resnet50", num_segments=6).dimensions["frames"].choices == ((3, 6),)


@pytest.mark.parametrize("name", NETS)
def test_tiny_spaces_hold_many_archs_of_very_different_cost(name):
    net = on_meta(name, preset="tiny", num_classes=10)
    largest, smallest = net.space.largest(), net.space.smallest()
    alike = {n: largest[n] for n in ("resolution", "frames") if n in net.space.dimensions}
    shape = (1, *([alike["frames"]] if "frames" in alike else []), 3, alike["resolution"], alike["resolution"])
    most, least = (cost.count_macs(net.extract(a), shape) for a in (largest, smallest.replace(**alike)))
    assert net.space.restrict(**{n: [v] for n, v in alike.items()}).num_archs() > 1000
    assert most / least > 4
    assert most < (12e6 if len(shape) == 4 else 100e6)  # trains in minutes on two cores
    assert alike["resolution"] == (64 if "frames" in alike else 32)


class _Written(TorchDispatchMode):
    """Counts the values that operators write outside of the meta device."""

    def __init__(self):
        super().__init__()
        self.num_values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {one.untyped_storage().data_ptr() for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        for one in tree_leaves(out):
            if isinstance(one, Tensor) and not one.is_meta and one.untyped_storage().data_ptr() not in given:
                self.num_values += one.numel()
        return out


@pytest.mark.parametrize("name", NETS)
def test_extracting_copies_the_values_of_the_subnet_once_and_draws_none(name):
    net = models.build(name, num_classes=1000)
    before = torch.get_rng_state()
    for arch in (net.space.largest(), net.space.smallest(), net.space.sample(random.Random(8))):
        with _Written() as written:
            subnet = net.extract(arch)
        num_values = sum(value.numel() for value in subnet.state_dict().values())
        # beyond the copy, kernels of smaller sizes are made by a product with a matrix: of depthwise weights only
        assert num_values <= written.num_values < 1.1 * num_values
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------------- released weights


def released(shared, key: str) -> dict[str, Tensor]:
    """Named tensors of the recorded shapes, all different."""
    record = parity(shared, "ofa_state_dict_keys.json")[key]
    return {name: torch.full(shape, float(i)) for i, (name, shape) in enumerate(record.items())}


@pytest.mark.parametrize("key", ["ofa_mbv3_d234_e346_k357_w1.0", "ofa_proxyless_d234_e346_k357_w1.3", "ofa_resnet50"])
def test_released_supernets_load_whole_under_old_names_and_new(key, shared):
    name, width = IMAGES[key]
    theirs = released(shared, key)
    net = models.build(name, num_classes=1000, width=width)
    old = {re.sub(r"^(blocks\.\d+)\.conv\.", r"\1.mobile_inverted_conv.", n): v for n, v in theirs.items()}
    for given in (theirs, old, {f"module.{n}": v for n, v in theirs.items()}):
        with torch.no_grad():
            for value in net.state_dict().values():
                value.zero_()
        report = published.load(net, {"state_dict": given, "epoch": 1})
        assert (len(report.loaded), report.missing, report.dropped) == (len(theirs), [], {})
        assert all(torch.equal(v, theirs[n].to(v.dtype)) for n, v in net.state_dict().items())


@pytest.mark.parametrize("key", ["ofa_mbv3_d234_e346_k357_w1.0", "ofa_proxyless_d234_e346_k357_w1.3", "ofa_resnet50"])
def test_a_plain_teacher_starts_its_supernet_and_the_other_way_round(key, shared):
    name, width = IMAGES[key]
    theirs = released(shared, f"{key}/subnet_max")
    net = models.build(name, num_classes=1000, width=width)
    report = published.load(net, theirs)
    assert all(missing.endswith("_matrix") for missing in report.missing)
    assert len(report.loaded) == len(theirs)
    teacher = net.extract(net.space.largest())
    assert all(torch.equal(v, theirs[n].to(v.dtype)) for n, v in teacher.state_dict().items())
    back = models.build(name, num_classes=1000, width=width).extract(net.space.largest())
    report = published.load(back, net.state_dict())
    assert report.missing == []
    assert all(torch.equal(v, teacher.state_dict()[n]) for n, v in back.state_dict().items())


def test_specialised_nets_and_those_of_proxylessnas_load_under_old_names_and_new(shared):
    net = models.build("ofa_proxyless", num_classes=1000, width=1.3)
    cases = [("ofa_proxyless_d234_e346_k357_w1.3/subnet_min", net.extract(net.space.smallest()))]
    for key, sub in [*cases, ("proxyless_gpu", models.build("proxyless_gpu", num_classes=1000))]:
        theirs = released(shared, key)
        old = {re.sub(r"^(blocks\.\d+)\.conv\.", r"\1.mobile_inverted_conv.", n): v for n, v in theirs.items()}
        for given in (theirs, old):
            with torch.no_grad():
                for value in sub.state_dict().values():
                    value.zero_()
            report = published.load(sub, {"state_dict": given})
            assert (len(report.loaded), report.missing, report.dropped) == (len(theirs), [], {})
            assert all(torch.equal(v, theirs[n].to(v.dtype)) for n, v in sub.state_dict().items())
    fewer = models.build("proxyless_gpu", num_classes=10)
    report = published.load(fewer, theirs)
    assert list(report.dropped) == ["classifier.linear.weight", "classifier.linear.bias"]


def test_images_teach_clips_the_supernet_over_frames_starts_from_that_over_images():
    images, clips = small("ofa_mobilenetv3"), models.build("ofa_tsm_mobilenetv3", num_classes=9, preset="tiny")
    report = published.load(clips, images.state_dict())
    assert report.missing == []
    assert set(report.dropped) == {"classifier.linear.weight", "classifier.linear.bias"}


# ------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"preset": "huge"}, "preset: must be imagenet or tiny (got 'huge')"),
        ({"width": 0}, "model ofa_mobilenetv3: width: must be > 0 (got 0)"),
        ({"dropout": 1.0}, "model ofa_mobilenetv3: dropout: must be at least 0 and below 1 (got 1.0)"),
        ({"presett": "tiny"}, "model ofa_mobilenetv3: unknown option 'presett', did you mean 'preset'?"),
        ({"num_segments": 8}, "model ofa_mobilenetv3: unknown option 'num_segments'"),
    ],
)
def test_what_an_option_may_not_be_is_one_sentence(options, sentence):
    with pytest.raises(UserError) as said:
        models.build("ofa_mobilenetv3", num_classes=3, **options)
    assert str(said.value).startswith(sentence)


def test_options_change_what_they_say():
    assert models.options_of("ofa_tsm_resnet50")["num_segments"] == 8
    assert models.build("ofa_proxyless", num_classes=3, preset="tiny").classifier.dropout.p == 0.1
    assert models.build("ofa_resnet50", num_classes=3, preset="tiny", dropout=0.4).classifier.dropout.p == 0.4
    for name in NETS:
        net, plain = (models.build(name, num_classes=3, preset="tiny", zero_gamma=zero) for zero in (True, False))
        zeroed = [n for n, v in net.named_parameters() if n.endswith("bn.weight") and not v.any()]
        assert zeroed
        assert all("point_linear" in n or "conv3" in n for n in zeroed)
        assert all(v.any() for n, v in plain.named_parameters() if n.endswith("bn.weight"))


@pytest.mark.parametrize("name", ["ofa_mobilenetv3", "ofa_tsm_resnet50"])
def test_an_extracted_net_exports_with_the_same_values(name):
    net = small(name)
    arch = net.space.smallest()
    settle(net, arch)
    sub, x = net.extract(arch), batch(net, arch)
    exported = torch.export.export(sub, (x,)).module()
    torch.testing.assert_close(exported(x), sub(x), rtol=1e-5, atol=1e-5)


def test_the_narrowest_width_keeps_every_slice_within_its_weights():
    for name in NETS:
        net = models.build(name, num_classes=3, width=0.01)
        for arch in (net.space.largest(), net.space.smallest()):
            net.extract(arch)
        assert elastic.make_divisible(0.16) == 8
