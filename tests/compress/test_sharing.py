"""Codebooks: k-means as recorded, summed gradients, equal weights stay equal; the released file of SqueezeNet."""

import hashlib
import json

import numpy as np
import pytest
import torch
from torch import nn

from slimray import models
from slimray.compress import codebooks, released, sharing, sparsity
from slimray.models.squeezenet import SqueezeNet
from slimray.spec import UserError
from slimray.tasks.network import Input
from slimray.train.methods.constrained import Constrained
from slimray.train.methods.method import Piece, Setup
from slimray.train.methods.plain import Plain
from slimray.train.spec import OptimSpec


@pytest.fixture(scope="module")
def recorded(shared) -> dict:
    return json.loads((shared / "parity/compression/deep_compression.json").read_text())


@pytest.mark.parametrize("number", range(3))
def test_centroids_assignments_and_summed_gradients_are_those_recorded(recorded, number):
    weights, case = np.array(recorded["kmeans"]["weights"]), recorded["kmeans"]["cases"][number]
    centroids = codebooks.kmeans(weights, case["k"])
    np.testing.assert_allclose(centroids, case["centroids"], rtol=0, atol=1e-9)
    codes = codebooks.nearest(weights, centroids)
    assert codes.tolist() == case["assignment"]
    layer = nn.Linear(130, 1, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(centroids[codes])[None])
    tied = sharing.Tied(nn.Sequential(layer), ("0",))
    layer.weight.grad = torch.from_numpy(np.random.default_rng(220 + case["k"]).normal(size=130))[None]
    tied.before_step()
    expected = np.array(case["centroid_grad"])[codes]
    np.testing.assert_allclose(layer.weight.grad[0].numpy(), expected, rtol=0, atol=1e-9)


def images(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return models.build("resnet18", num_classes=3, width=0.125)


OPTIMS = [{"optimizer": "sgd", "momentum": 0.9}, {"optimizer": "adamw"}, {"optimizer": "adam"}, {"optimizer": "lars"}]


@pytest.mark.parametrize("optim", OPTIMS, ids=lambda one: one["optimizer"])
@pytest.mark.parametrize("tied", [False, True])
def test_zeros_stay_zero_and_shared_weights_equal_under_every_optimizer(optim, tied):
    net = images(0)
    sparsity.sparsify(net, sparsity.by_layer(net, 0.3, "keep"))
    layers = tuple(sparsity.layers_of(net)) if tied else ()
    if tied:
        sharing.share(net, dict.fromkeys(layers, 3))
    before = {name: weight.detach().clone() for name, weight in sparsity.layers_of(net).items()}
    spec = OptimSpec.model_validate({"lr": 0.01, "reference_batch": 4, "epochs": 1, "weight_decay": 0.01, **optim})
    replica = Constrained(Plain(), shared=layers).replica(
        net, lambda: images(0), Setup(spec, Input(), (3, 32, 32), torch.device("cpu"))
    )
    rng = np.random.default_rng(0)
    for step in range(3):
        data = rng.integers(0, 255, (4, 1, 32, 32, 3), dtype=np.uint8)
        assert replica.step([Piece(data, np.array([0, 1, 2, 0]))], 4, 0.01, (0, step)).finite
    for name, weight in sparsity.layers_of(replica.net).items():
        assert torch.equal(weight == 0, before[name] == 0), name
        assert not torch.equal(weight, before[name]), name
        if tied:
            pairs = torch.stack([before[name].flatten(), weight.detach().flatten()]).unique(dim=1)
            assert pairs.shape[1] == len(before[name].unique()), name


def test_a_layer_keeps_the_largest_weights_and_thresholds_follow_the_deviation():
    layer = nn.Linear(10, 2, bias=False)
    values = torch.arange(-10, 10).float() / 10
    layer.weight = nn.Parameter(values.view(2, 10).clone())
    record = sparsity.sparsify(nn.Sequential(layer), {"0": 0.25})
    assert layer.weight[layer.weight != 0].tolist() == pytest.approx([-1.0, -0.9, -0.8, 0.8, 0.9])
    assert record == {"step": "sparsify", "weights": {"0": [5, 20]}}
    layer.weight = nn.Parameter(values.view(2, 10).clone())
    sparsity.sparsify_below(nn.Sequential(layer), {"0": 1.0})
    kept = values[values != 0]
    assert torch.equal(layer.weight.flatten() != 0, values.abs() >= kept.std(correction=0))
    sparsity.sparsify_below(nn.Sequential(layer), {"0": 1e9})
    assert int((layer.weight != 0).sum()) == 1


def test_weights_in_any_memory_format_lose_the_same_ones():
    found = []
    for memory in (torch.contiguous_format, torch.channels_last):
        net = nn.Sequential(nn.Conv2d(8, 16, 3, bias=False)).double().to(memory_format=memory)
        with torch.no_grad():
            net[0].weight.copy_(torch.arange(16 * 8 * 9).view(16, 8, 3, 3).cos())
        sparsity.sparsify(net, {"0": 0.5})
        sparsity.sparsify_below(net, {"0": 0.9})
        sharing.share(net, {"0": 3})
        tied = sharing.Tied(net, ("0",))
        net[0](torch.ones(1, 8, 5, 5).double().cumsum(1)).square().sum().backward()
        tied.before_clipping()
        tied.before_step()
        tied.after_step()
        assert net[0].weight.is_contiguous(memory_format=memory)
        found.append((net[0].weight.detach(), net[0].weight.grad))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


@pytest.mark.parametrize(
    ("change", "field"),
    [(sparsity.sparsify, "keep"), (sparsity.sparsify_below, "quality"), (sharing.share, "bits")],
)
def test_a_name_that_is_no_layer_is_told_with_those_that_are_near(change, field):
    net = nn.Sequential()
    net.add_module("conv1", nn.Conv2d(1, 1, 1))
    before = net.conv1.weight.detach().clone()
    with pytest.raises(UserError, match=f"{field}: unknown layer 'conv2', did you mean 'conv1'"):
        change(net, {"conv1": 1, "conv2": 1})
    assert torch.equal(net.conv1.weight, before)


def test_dropout_follows_the_density_of_the_layer_behind_it():
    net = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 4))
    sparsity.sparsify(net, {"3": 0.25})
    sparsity.scale_dropout(net)
    assert net[1].p == pytest.approx(0.25)


# -------------------------------------------------------------------------------------------- the released files


class Published(nn.Module):
    """The three layers of the recorded file: a convolution and two linear ones."""

    def __init__(self, layers: list[dict]):
        super().__init__()
        conv, first, last = (one["shape"] for one in layers)
        self.conv1 = nn.Conv2d(conv[1], conv[0], conv[2])
        self.fc6, self.fc8 = nn.Linear(first[1], first[0]), nn.Linear(last[1], last[0])


def digest(weight: torch.Tensor) -> str:
    return hashlib.sha256(weight.detach().numpy().tobytes()).hexdigest()


def test_the_recorded_file_in_the_published_layout_is_read(recorded):
    layout = recorded["published_layout"]
    net, data = Published(layout["layers"]), bytes.fromhex(layout["file_hex"])
    counts = released.load(net, data, "x.net")
    for one in layout["layers"]:
        layer = net.get_submodule(one["layer"])
        assert digest(layer.weight) == one["weight_sha256"]
        assert layer.bias.tolist() == pytest.approx(one["bias"])
        assert counts[one["layer"]][0] == one["entries"]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    broken = bytearray(data)
    broken[0:4] = (2**32 - 1).to_bytes(4, "little")
    for bad in (b"", data[:-1], data + b"\0", bytes(broken), bytes(len(data))):
        with pytest.raises(UserError, match="is not a released file of this network"):
            released.load(net, bad, "x.net")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_released_squeezenet_is_read_exactly(shared):
    folder = shared / "parity/compression"
    known = json.loads((folder / "compressed_SqueezeNet.json").read_text())["layers"]
    net = SqueezeNet(1000)
    counts = released.load(net, (folder / "compressed_SqueezeNet.net").read_bytes(), "compressed_SqueezeNet.net")
    assert [count for count, _ in counts.values()] == [one["entries"] for one in known]
    weights = [net.get_submodule(name).weight for name in counts]
    assert [digest(weight) for weight in weights] == [one["weight_sha256"] for one in known]
    assert net.eval()(torch.rand(1, 3, 224, 224)).shape == (1, 1000)
