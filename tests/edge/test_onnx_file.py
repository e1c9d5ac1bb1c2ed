"""Every network is exported as one ONNX file of standard operators, and ONNX Runtime agrees with torch."""

import copy

import onnx
import pytest
import torch
from tests.export.networks import RELATIVE, bound, gap
from torch import nn

from slimray import models
from slimray.data.modalities import MODALITIES
from slimray.edge import onnx_file
from slimray.export import graph
from slimray.spec import RunFailed

NETWORKS = [name for name, row in models.MODELS.items() if not row.supernet]
QUICK = ("carn", "pvcnn_cls")  # the others: make soak
NO_ONNX = {"proxyless_supernet": "torch.export: Could not extract specialized integer"}
"""Networks that cannot be exported this way: the paths depend on weights at run time (`proxyless_found` can)."""
SMALL = {"width": 0.125, "voxel": 0.5, "blocks": 2, "units": 2, "scale": 2, "num_segments": 4}
NEEDED = {"num_classes": 3, "scale": 2, "vocab_size": 50}
POINT_CHANNELS = {"s3dis": 9, "shapenet": 22, "cls": 3}


def small(name: str, **given) -> nn.Module:
    """A narrow network with seeded weights and statistics of its inputs, so that these matter, in eval mode."""
    known = models.options_of(name)
    options = {key: SMALL[key] for key in ("voxel", "num_segments") if key in known and not name.startswith("unet3d")}
    options |= {"num_segments": 8} if name.startswith("i3d") else {}
    options |= {key: 16 if name.startswith("carn") else SMALL["width"] for key in ("width",) if key in known}
    options |= {key: SMALL[key] for key in ("blocks", "units") if name.startswith("carn")}
    options |= {key: NEEDED[key] for key in models.required(name)}
    torch.manual_seed(0)
    net = models.build(name, **(options | given))
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
            nn.init.normal_(module.weight, 1, 0.1)
            nn.init.normal_(module.bias, 0, 0.1)
    with torch.no_grad():
        net.train()(example(name, net, 4))
    if hasattr(net, "draws_evenly"):
        net.draws_evenly = True
    return net.eval()


def example(name: str, net: nn.Module, batch: int, longer: int = 0) -> torch.Tensor:
    kind, generator = models.MODELS[name].input, torch.Generator().manual_seed(batch)
    if kind == "clip":
        shape = [batch, net.num_segments, 3, 32, 32]
    elif kind == "image":
        shape = [batch, 3, 32, 32]
    elif kind == "image_pair":
        shape = [batch, 3, 20 + longer, 24]
    elif kind == "text":
        shape = ([batch, 2] if models.MODELS[name].sides == 2 else [batch]) + [30 + longer]
        return torch.randint(4, NEEDED["vocab_size"], shape, generator=generator)
    else:
        channels = 7 if kind == "frustum" else POINT_CHANNELS[name.rpartition("_")[2]]
        shape = [batch, channels, 256 + longer]
    x = torch.randn(shape, generator=generator)
    if kind == "frustum":
        x[:, 4:] = torch.tensor([0.0, 1.0, 0.0])[:, None]
    return x


def flat(outputs) -> list[torch.Tensor]:
    return list(outputs.values()) if isinstance(outputs, dict) else [outputs]


def exact(name: str, net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Return the outputs in float64, or in float32 for frustums, which draw points in float32."""
    if models.MODELS[name].input == "frustum":
        return [value.double() for value in flat(net(x))]
    return flat(copy.deepcopy(net).double()(x.double()))


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.benchmark) for name in NETWORKS]
)
def test_a_network_gives_in_onnx_runtime_what_it_gives_in_torch(name):
    net = small(name)
    x = example(name, net, 2)
    varying = graph.whole(net, x, dict(MODALITIES[models.MODELS[name].input].varying)).varying
    with torch.no_grad():
        expected = net(x)
        if name in NO_ONNX:
            with pytest.raises(RunFailed, match=NO_ONNX[name]):
                onnx_file.to_onnx(net, {"input": x}, onnx_file.output_names(expected), varying)
            return
        data = onnx_file.to_onnx(net, {"input": x}, onnx_file.output_names(expected), varying)
        session = onnx_file.open_session(data, 1)
        assert [one.name for one in session.get_outputs()] == onnx_file.output_names(expected)
        free = {axis for axis, size in enumerate(session.get_inputs()[0].shape) if isinstance(size, str)}
        assert 0 in free
        assert gap(flat(net(x.flip(0)))[0], flat(expected)[0]) > 100 * RELATIVE, "inputs matter"
        for other in (x, example(name, net, 3, 8 if len(free) > 1 else 0)):
            found, rounded = session.run(None, {"input": other.numpy()}), flat(net(other))
            for one, ours, wanted in zip(found, rounded, exact(name, net, other), strict=True):
                assert gap(one, wanted) < bound(ours, wanted)
    weights = sum(value.numel() for value in net.state_dict().values()) * 4
    model = onnx.load_from_string(data)
    nodes = sum(len(graph.node) for graph in onnx_file._graphs(model.graph))
    assert len(data) < 1.05 * weights + 600 * nodes, "no tensor but the weights is in the file"
    assert b"/slimray/" not in data
    assert model.opset_import[0].version == onnx_file.OPSET


def test_an_axis_on_which_the_network_decides_stays_fixed():
    class Few(nn.Module):
        def forward(self, x):
            return x.sum(2) if x.shape[2] < 10 else x[:, :, :10].sum(2)

    data = onnx_file.to_onnx(Few(), {"input": torch.ones(1, 3, 5)}, varying={"input": {0: "batch", 2: "points"}})
    assert onnx_file.open_session(data, 1).get_inputs()[0].shape == ["batch", 3, 5]


def test_what_cannot_be_exported_is_said_in_a_sentence():
    class Asks(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(RunFailed, match=r"^torch\.export: "):
        onnx_file.to_onnx(Asks(), {"input": torch.ones(2, 3)})


def test_without_optimisations_the_session_gives_the_same():
    net = small("carn")
    x = example("carn", net, 1)
    data = onnx_file.to_onnx(net, {"input": x})
    plain, fused = (onnx_file.open_session(data, 1, on).run(None, {"input": x.numpy()})[0] for on in (False, True))
    assert gap(plain, torch.from_numpy(fused).double()) < RELATIVE
