"""PVCNN and PointNet are exported for any number of points, in formats that can vary."""

import pytest
import torch
from tests.edge.test_onnx_file import exact, example, flat, small
from tests.export import networks

from slimray.data.modalities import MODALITIES
from slimray.export import graph
from slimray.export.formats import FORMATS
from slimray.models import MODELS

NETWORKS = [name for name in MODELS if name.startswith(("pvcnn", "pointnet", "frustum")) and not MODELS[name].supernet]
QUICK = ("pointnet_cls", "onnx")  # the others: make soak
VARYING = [name for name, row in FORMATS.items() if row.varies and row.precision == "fp32"]
COUNTS = ((1, -61), (3, 0), (2, 444))  # clouds, and numbers of points other than that of the export


@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(name, form, marks=[] if (name, form) == QUICK else pytest.mark.benchmark)
        for name in NETWORKS
        for form in VARYING
    ],
)
def test_a_point_network_takes_any_number_of_points(name, form, tmp_path):
    net = graph.ready(small(name))
    x, row = example(name, net, 2), FORMATS[form]
    row.require(form)
    one = graph.whole(net, x, dict(MODALITIES[MODELS[name].input].varying))
    row.convert(one, tmp_path, ())
    run = row.load(tmp_path / row.file, 1, True)
    for batch, more in COUNTS:
        clouds = example(name, net, batch, more)
        assert clouds.shape[2] == x.shape[2] + more
        with torch.no_grad():
            rounded, wanted = flat(net(clouds)), exact(name, net, clouds)
        for found, ours, best in zip(run([clouds.numpy()]), rounded, wanted, strict=True):
            assert found.shape == ours.shape
            assert networks.gap(found, best) < networks.bound(ours, best)
