"""The supernet of PVCNNs is its subnets: run or extracted, sliced or with the rest set to zero, sorted or not."""

import copy
import pickle
import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimray.arch import Arch
from slimray.edge import cost
from slimray.models import build
from slimray.models.points.pointnet import CloudNet, PointNet
from slimray.models.points.pvcnn import PVConv, pvcnn_cls, pvcnn_s3dis, pvcnn_shapenet
from slimray.models.supernets.elastic import sort_channels
from slimray.models.supernets.ofa_pvcnn import PRESETS, OfaPVCNN
from slimray.spec import UserError
from slimray.train import batchnorm

CASES = {
    "points": ("ofa_pvcnn", {"preset": "tiny", "voxel": 0.5, "in_channels": 6}),
    "clouds": ("ofa_pvcnn_cls", {"preset": "tiny", "voxel": 0.5, "in_channels": 5}),
    "parts": (
        "ofa_pvcnn",
        {"preset": "parts", "width": 0.25, "voxel": 0.25, "in_channels": 6, "num_shapes": 4},  # with SE
    ),
}
NUM_CLASSES, DEFAULT_CHANNELS = 7, {"ofa_pvcnn": 9, "ofa_pvcnn_cls": 3}


def cloud(net: OfaPVCNN, batch: int = 3, num_points: int = 128, seed: int = 1) -> Tensor:
    """Points on a few planes and a sphere in the unit ball, so that grids have empty voxels, followed by a one-hot."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, net.in_channels, num_points, generator=made)
    x[:, :3] /= x[:, :3].norm(dim=1, keepdim=True)
    x[:, 2, ::2] = x[:, 2, ::2].sign() * 0.3
    shapes = torch.arange(batch) % max(1, net.num_shapes)
    one_hot = F.one_hot(shapes, max(1, net.num_shapes))[:, : net.num_shapes, None].expand(-1, -1, num_points)
    return torch.cat([x, one_hot.float()], 1)


def norms(net: nn.Module) -> list[nn.BatchNorm1d | nn.BatchNorm3d]:
    return [m for m in net.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm3d)]


@torch.no_grad()
def calibrated(net: OfaPVCNN) -> OfaPVCNN:
    """The supernet in eval mode; its norms are no identities, its statistics those of several batches and subnets."""
    rng = random.Random(4)
    for norm in norms(net):
        norm.momentum = None
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-0.5, 0.5)
    for seed in range(8):
        net.train()(cloud(net, 8, seed=seed), net.space.largest() if seed % 2 else net.space.sample(rng))
    for norm in norms(net):
        norm.momentum = 0.1
    return net.eval()


@torch.no_grad()
def recalibrate(net: OfaPVCNN, arch: Arch) -> None:
    """Give a subnet, in place, the statistics of a batch of its own: without them a small one gives constants."""
    for norm in norms(net.train()):
        norm.momentum = 1.0
    net(cloud(net, 6, 64, seed=9), arch)
    net.eval()


def supernet(case: str, **options) -> OfaPVCNN:
    torch.manual_seed(0)
    name, known = CASES[case]
    net = build(name, num_classes=NUM_CLASSES, **(known | options))
    assert isinstance(net, OfaPVCNN)
    return net


@pytest.fixture(scope="module", params=CASES)
def net(request) -> OfaPVCNN:
    """A calibrated supernet in eval mode; tests that change it take a copy."""
    return calibrated(supernet(request.param))


def corners(net: OfaPVCNN) -> list[Arch]:
    """The largest and the smallest arch, and with each dimension alone the other way."""
    low, high = net.space.smallest(), net.space.largest()
    names = list(net.space.dimensions)
    return [low, high, *(low.replace(**{n: high[n]}) for n in names), *(high.replace(**{n: low[n]}) for n in names)]


def some(net: OfaPVCNN, count: int, seed: int = 0) -> list[Arch]:
    rng = random.Random(seed)
    return [net.space.sample(rng) for _ in range(count)]


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# ------------------------------------------------------------------------------------------------ the space


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", DEFAULT_CHANNELS)
def test_a_space_is_large_and_its_ends_are_far_apart(name, preset):
    net = cost.build_on_meta(lambda: build(name, num_classes=13, preset=preset))
    assert isinstance(net, OfaPVCNN)
    assert net.space.num_archs() >= 1000
    shape = (1, DEFAULT_CHANNELS[name], 2048)
    macs = [cost.count_macs(net.extract(arch), shape) for arch in (net.space.largest(), net.space.smallest())]
    assert macs[0] >= 4 * macs[1]
    assert macs[0] == cost.count_macs(net, shape)


def test_every_dimension_costs_something():
    net = supernet("points")
    high, low, shape = net.space.largest(), net.space.smallest(), (1, net.in_channels, 512)
    most = cost.count_macs(net.extract(high), shape)
    for name, genes in net.space.choices:
        for i, values in enumerate(genes):
            changed = [low[name][j] if j == i else gene for j, gene in enumerate(high[name])]
            less = cost.count_macs(net.extract(high.replace(**{name: changed})), shape)
            assert less < most if len(values) > 1 else less == most, (name, i)


def test_widths_that_are_the_same_in_channels_count_once():
    narrow = supernet("points", width=0.2)  # of 16 channels 3: a quarter and a half are one channel
    assert narrow.space.dimensions["width"].choices[0] == (0.5, 0.75, 1.0)
    assert supernet("points").space.dimensions["width"].choices[0] == (0.25, 0.5, 0.75, 1.0)


@pytest.mark.parametrize(
    ("ours", "published"),
    [
        (("ofa_pvcnn", {}), pvcnn_s3dis),
        (("ofa_pvcnn", {"width": 0.25, "voxel": 0.5}), pvcnn_s3dis),
        (("ofa_pvcnn", {"preset": "parts", "in_channels": 6, "num_shapes": 16, "dropout": 0.2}), pvcnn_shapenet),
        (("ofa_pvcnn_cls", {}), pvcnn_cls),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_ordinary_networks_are_subnets(ours, published):
    name, options = ours
    net = cost.build_on_meta(lambda: build(name, num_classes=13, **options))
    assert isinstance(net, OfaPVCNN)
    scale = {key: value for key, value in options.items() if key in ("width", "voxel")}
    plain = cost.build_on_meta(lambda: published(num_classes=13, **scale))
    subnet = net.extract(net.space.arch({"depth": (1, 2, 1, 1)}))
    assert str(subnet) == str(plain)
    grids = [
        [(m.resolution, m.normalize, m.eps) for m in n.modules() if isinstance(m, PVConv)] for n in (subnet, plain)
    ]
    assert grids[0] == grids[1]
    shapes = [[(name, value.shape) for name, value in n.state_dict().items()] for n in (subnet, plain)]
    assert shapes[0] == shapes[1]


def test_the_published_network_within_the_supernet_computes_as_recorded(shared):
    recorded = torch.load(shared / "parity/pvcnn_s3dis_pvcnn_c0p125.pt", weights_only=True)
    net = build("ofa_pvcnn", num_classes=13, width=0.125).eval()
    assert isinstance(net, OfaPVCNN)
    places = {0: 0, 1: 1, 2: 2, 3: 4, 4: 6}  # of its five blocks among our seven
    columns = [*range(24), *range(32, 48), *range(64, 192), *range(192, 208)]  # 8 8 8 (8) 16 (16) 128 + 16 of the cloud
    state = net.state_dict()
    for name, value in recorded["state_dict"].items():
        if name == "classifier.0.layers.0.weight":
            state[name][:, columns] = value
            continue
        if name.startswith("point_features."):
            _, number, rest = name.split(".", 2)
            name = f"point_features.{places[int(number)]}.{rest}"
        state[name].copy_(value)
    with torch.no_grad():
        out = net(recorded["input"], net.space.arch({"depth": (1, 2, 1, 1)}))
    torch.testing.assert_close(out, recorded["eval_output"], rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------ run and extracted


def test_a_subnet_that_runs_is_the_subnet_extracted(net):
    whole, x, other = copy.deepcopy(net), cloud(net), cloud(net, seed=2)
    with torch.no_grad():
        for arch in corners(net) + some(net, 40 if net.num_shapes or not net.dense else 200):
            recalibrate(whole, arch)
            plain, out = whole.extract(arch), whole(x, arch)
            assert distance(whole(other, arch), out) > 0.02, arch  # the output depends on the input
            assert distance(plain(x), out) < 1e-5, arch
            assert not plain.training


def test_without_an_arch_the_largest_runs(net):
    x, (low, high) = cloud(net), corners(net)[:2]
    with torch.no_grad():
        assert torch.equal(net(x), net(x, high))
        assert distance(net(x, low), net(x)) > 0.05
    assert net(x).shape == ((3, NUM_CLASSES, 128) if net.dense else (3, NUM_CLASSES))


def test_every_gene_moves_the_output(net):
    x, high = cloud(net), net.space.largest()
    with torch.no_grad():
        for name, genes in net.space.choices:
            for i, values in enumerate(genes):
                for value in values[:-1]:
                    changed = [value if j == i else gene for j, gene in enumerate(high[name])]
                    assert distance(net(x, high.replace(**{name: changed})), net(x)) > 1e-3, (name, i)


def test_genes_of_blocks_that_do_not_run_move_nothing(net):
    x, arch = cloud(net), net.space.arch({"depth": [min(values) for values in net.space.dimensions["depth"].choices]})
    widths = [w if runs else 0.25 for w, runs in zip(arch["width"], arch.runs("width"), strict=True)]
    with torch.no_grad():
        assert torch.equal(net(x, arch), net(x, arch.replace(width=widths)))


def test_an_extracted_subnet_is_an_ordinary_network_of_its_own(net):
    arch = net.space.smallest()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    plain = net.extract(arch)
    assert type(plain) is (PointNet if net.dense else CloudNet)
    assert {type(m).__module__.split(".")[0] for m in plain.modules()} <= {"torch", "slimray"}
    assert not any("ofa" in type(m).__module__ or "elastic" in type(m).__module__ for m in plain.modules())
    assert all(not value.is_meta and value.is_contiguous() for value in plain.state_dict().values())
    assert isinstance(plain.get_submodule(plain.head_name), nn.Conv1d | nn.Linear)
    assert isinstance(net.get_submodule(net.head_name), nn.Conv1d | nn.Linear)
    with torch.no_grad():
        for value in [*plain.parameters(), *plain.buffers()]:
            value.zero_()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_nothing_of_the_arch_stays_in_the_net(net):
    x, before = cloud(net), pickle.dumps(net)
    with torch.no_grad():
        net(x, net.space.smallest())
        net.extract(net.space.smallest())
    assert pickle.dumps(net) == before


# ------------------------------------------------------------------------------------------------ another way


@torch.no_grad()
def cut(net: OfaPVCNN, arch: Arch) -> nn.Module:
    """The full-width subnet of the depth and grids of `arch` in which all channels beyond its widths are zero."""
    full = net.space.arch({"depth": arch["depth"], "voxel": arch["voxel"]})
    plain = net.extract(full)
    widths = [width for width, runs in zip(arch["width"], arch.runs("width"), strict=True) if runs]
    blocks = plain.point_features if isinstance(plain, PointNet) else plain.features
    makers: list[tuple[nn.Module, float]] = []  # layers and the part of their outputs that stays
    for block, width in zip(blocks, widths, strict=True):
        makers += [(m, width) for m in block.modules() if hasattr(m, "weight")]
    (head,) = arch["head"]
    for part in [plain.classifier, getattr(plain, "cloud_features", nn.Identity())]:
        last = [plain.get_submodule(plain.head_name)]
        makers += [(m, head) for m in part.modules() if hasattr(m, "weight") and m not in last]
    for module, width in makers:
        for value in module.parameters():
            value[max(1, int(len(value) * width)) :] = 0
    return plain


def test_a_slice_is_the_whole_with_the_rest_at_zero(net):
    whole, x = copy.deepcopy(net), cloud(net)
    with torch.no_grad():
        for arch in corners(net) + some(net, 15, seed=1):
            recalibrate(whole, arch)
            assert distance(whole(x, arch), cut(whole, arch)(x)) < 1e-5, arch


def test_of_a_stage_the_first_blocks_run():
    net = calibrated(supernet("points"))
    x, whole = cloud(net), net.extract(net.space.largest())
    assert isinstance(whole, PointNet)
    # 16 | 16 16 | 32 32 | 128 and 32 of the cloud: without the third and the fifth block
    kept, columns = [0, 1, 3, 5], [*range(32), *range(48, 80), *range(112, 272)]
    whole.point_features = nn.ModuleList([whole.point_features[i] for i in kept])
    conv = whole.get_submodule("classifier.0.layers.0")
    conv.weight = nn.Parameter(whole.get_parameter("classifier.0.layers.0.weight")[:, columns])
    with torch.no_grad():
        assert distance(net(x, net.space.arch({"depth": 1})), whole(x)) < 1e-5


# ------------------------------------------------------------------------------------------------ training


def test_gradients_and_statistics_of_a_training_step_are_those_of_the_subnet_extracted(net):
    x = cloud(net, 4)
    for arch in [*corners(net)[:2], *some(net, 8, seed=2)]:
        whole = copy.deepcopy(net).train()
        for value in whole.parameters():  # each parameter's entries are told apart by their values
            value.data.add_(torch.linspace(-1e-3, 1e-3, value.numel()).view_as(value))
        plain, before = whole.extract(arch), copy.deepcopy(whole.state_dict())
        assert plain.training
        outs = []
        for module, args in [(whole, (x, arch)), (plain, (x,))]:
            torch.manual_seed(5)  # the same dropout
            outs.append(module(*args))
            outs[-1].square().mean().backward()
        assert distance(outs[1], outs[0]) < 1e-5
        assert any(isinstance(m, nn.Dropout) and m.p > 0 for m in plain.modules())
        total = torch.stack([p.grad.norm() for p in plain.parameters() if p.grad is not None]).norm()
        # The gradients of the whole, extracted like weights, are those of the subnet; beside them there are none.
        gradients = copy.deepcopy(whole)
        for mine, theirs in zip(gradients.parameters(), whole.parameters(), strict=True):
            mine.data = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        sliced = gradients.extract(arch)
        for (name, mine), theirs in zip(sliced.named_parameters(), plain.parameters(), strict=True):
            assert theirs.grad is not None, name
            assert (mine - theirs.grad).norm() <= 1e-4 * theirs.grad.norm() + 1e-5 * total, name
        counts = [sum(int(v.count_nonzero()) for v in n.parameters()) for n in (gradients, sliced)]
        assert counts[0] == counts[1]
        # So are the running statistics; entries that the subnet has not are as they were.
        after = whole.extract(arch).state_dict()
        for name, value in plain.named_buffers():
            torch.testing.assert_close(after[name], value, rtol=1e-5, atol=1e-6)
        now = whole.state_dict()
        moved = {name: int((now[name] != value).sum()) for name, value in before.items()}
        assert sum(moved.values()) == sum(value.numel() for value in plain.buffers())
        assert not any(moved[name] for name, _ in whole.named_parameters())


def test_subnets_learn_together():
    torch.manual_seed(0)
    net = build("ofa_pvcnn_cls", num_classes=2, preset="tiny", dropout=0.0)
    assert isinstance(net, OfaPVCNN)
    labels = torch.arange(16) % 2
    x = torch.randn(16, 3, 64) * torch.where(labels == 0, 1.0, 0.1)[:, None, None] ** torch.tensor([0, 0, 1])[:, None]
    optimizer, rng, losses = torch.optim.Adam(net.parameters(), 3e-3), random.Random(0), []
    for _ in range(12):
        losses.append([])
        for arch in [net.space.largest(), net.space.smallest(), net.space.sample(rng)]:
            loss = F.cross_entropy(net(x, arch), labels)
            loss.backward()
            losses[-1].append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert all(end < 0.7 * start for start, end in zip(losses[0][:2], losses[-1][:2], strict=True))


def test_another_grid_has_other_statistics():
    net = calibrated(supernet("parts"))
    batches, high = [cloud(net, 8, seed=seed) for seed in range(3)], net.space.largest()
    fine, coarse = (
        batchnorm.recalibrate_norms(net.extract(arch), batches) for arch in (high, high.replace(voxel=[0.5, 0.5]))
    )
    stats = [torch.cat([m.running_mean for m in norms(n) if m.running_mean is not None]) for n in (fine, coarse)]
    assert distance(stats[1], stats[0]) > 0.05
    with torch.no_grad():
        assert distance(net.extract(high.replace(voxel=[0.5, 0.5]))(batches[0]), coarse(batches[0])) > 0.05


# ------------------------------------------------------------------------------------------------ sorting


def full_width(net: OfaPVCNN) -> list[Arch]:
    """Every depth and some grids at full width."""
    high = net.space.largest()
    spaces = net.space.restrict(width=[1.0], head=[1.0], voxel=[0.5, 1.0])
    return [high, spaces.smallest(), *(spaces.sample(random.Random(i)) for i in range(12))]


@torch.no_grad()
def outputs(net: OfaPVCNN, archs: list[Arch]) -> list[Tensor]:
    return [net(cloud(net), arch) for arch in archs]


def test_sorting_leaves_what_full_width_subnets_of_all_depths_compute(net):
    whole, archs = copy.deepcopy(net), full_width(net)
    before = outputs(whole, archs)
    half = whole.space.arch({"width": 0.5})
    (was,) = outputs(whole, [half])
    sort_channels(whole)
    for arch, old, new in zip(archs, before, outputs(whole, archs), strict=True):
        assert distance(new, old) < 1e-5, arch
    (now,) = outputs(whole, [half])
    assert distance(now, was) > 0.01  # the first half are other channels now
    with torch.no_grad():
        assert distance(whole.extract(half)(cloud(net)), now) < 1e-5


def test_sorting_permutes_every_weight_that_has_channels(net):
    whole = copy.deepcopy(net)
    sort_channels(whole)
    moved = {n for n, value in whole.named_parameters() if not torch.equal(value, net.get_parameter(n))}
    last = f"{net.head_name}.bias"
    assert moved == {name for name, _ in net.named_parameters()} - {last}
    for name, value in whole.named_parameters():
        assert torch.equal(value.flatten().sort().values, net.get_parameter(name).flatten().sort().values), name


def test_the_most_important_channels_come_first(net):
    whole = copy.deepcopy(net)
    sort_channels(whole)
    for group in whole.channel_groups():
        importance = sum(judge.weight.abs().transpose(0, 1).flatten(1).sum(1) for judge in group.judges)
        assert isinstance(importance, Tensor)
        assert (importance.diff() <= 1e-5 * importance[:-1]).all()


@pytest.mark.parametrize("dimension", ["width", "head"])
def test_sorting_keeps_channels_within_what_is_freed(net, dimension):
    whole = copy.deepcopy(net)
    archs = full_width(net)
    archs += [arch.replace(**{dimension: [0.5] * len(arch[dimension])}) for arch in archs]
    mixed = [0.5 if i % 2 else 1.0 for i in range(len(archs[0][dimension]))]
    archs.append(archs[0].replace(**{dimension: mixed}))
    before = outputs(whole, archs)
    sort_channels(whole, {dimension: (0.5, 1.0)})
    for arch, old, new in zip(archs, before, outputs(whole, archs), strict=True):
        assert distance(new, old) < 1e-5, arch
    quarter = whole.space.arch({dimension: 0.25})
    assert distance(*outputs(whole, [quarter]), *outputs(net, [quarter])) > 0.01


# ------------------------------------------------------------------------------------------------ units and mistakes


def test_the_units_of_a_subnet_are_all_of_its_work(net):
    for arch in corners(net)[:2] + some(net, 6):
        units = [(unit, cost.build_on_meta(unit.make)) for unit in net.units(arch, 100)]
        plain = net.extract(arch)
        shape = (1, net.in_channels + net.num_shapes, 100)
        macs = sum(cost.count_macs(module, (1, *unit.input)) for unit, module in units)
        assert macs == cost.count_macs(plain, shape)
        assert sum(cost.count_params(module) for _, module in units) == cost.count_params(plain)


def test_units_of_one_key_are_one_unit_and_travel(net):
    found: dict[str, tuple] = {}
    for arch in some(net, 12):
        for unit in net.units(arch, 64):
            what = (unit.input, str(cost.build_on_meta(pickle.loads(pickle.dumps(unit)).make)))
            assert found.setdefault(unit.key, what) == what
    assert len(found) > 20
    wide = net.units(net.space.largest(), 64)
    assert {u.key for u in wide}.isdisjoint(u.key for u in net.units(net.space.largest(), 65))
    with torch.no_grad():
        for unit in wide:
            assert unit.make().eval()(torch.rand(2, *unit.input)).isfinite().all()


def test_what_a_user_gets_wrong_is_said():
    with pytest.raises(UserError, match="unknown preset 'tiney', did you mean 'tiny'"):
        build("ofa_pvcnn", num_classes=3, preset="tiney")
    net, known = supernet("points"), supernet("parts").space.largest().to_dict()
    with pytest.raises(UserError, match=r"width: 0\.3 is not one of 0\.25, 0\.5, 0\.75, 1\.0"):
        net(cloud(net), net.space.largest().replace(width=[0.3] * 6))
    with pytest.raises(UserError, match="depth: 3 is not one of 1, 2"):
        net.extract(Arch.from_dict(known))
    with pytest.raises(ValueError, match="takes clouds of 6 channels"):
        net(cloud(net)[:, :5])
