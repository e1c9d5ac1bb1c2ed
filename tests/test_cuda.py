"""Tests that need a GPU: networks give there what they give on a CPU; a step trains, repeats and can be dropped."""

import copy
import time

import numpy as np
import pytest
import torch
from torch import nn

from slimray import models
from slimray.compress import pruning
from slimray.edge import latency_table, profiler
from slimray.models.points.ops import normalize_coords, voxelize
from slimray.tasks.network import Input, predict_outputs
from slimray.train import pieces
from slimray.train.methods.method import Piece, Sent, Setup
from slimray.train.methods.plain import PlainReplica
from slimray.train.spec import OptimSpec
from slimray.train.timing import timer_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
S3DIS, CLIPS, IMAGES = (2, 9, 512), (2, 4, 3, 64, 64), (2, 3, 64, 64)
NETS = {
    "pvcnn_s3dis": ({"width": 0.25}, S3DIS),
    "pvcnnpp_s3dis": ({"width": 0.25}, S3DIS),
    "pointnet_s3dis": ({}, S3DIS),
    "dgcnn_s3dis": ({}, S3DIS),
    "pvcnn_cls": ({}, (4, 3, 512)),
    "tsm_resnet50": ({"num_segments": 4}, CLIPS),
    "tsm_mobilenetv2": ({"num_segments": 4}, CLIPS),
    "ofa_mobilenetv3": ({}, IMAGES),
    "ofa_pvcnn": ({}, S3DIS),
}


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Convolutions in float32, as on a CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)


def through(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    out = net(x)
    (out.float() ** 2).mean().backward()
    return [out.detach().cpu(), *(p.grad.cpu() for p in net.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", NETS)
def test_values_and_gradients_are_those_of_a_cpu(name):
    options, shape = NETS[name]
    net, x = models.build(name, num_classes=13, **options).eval(), torch.rand(shape)
    other = copy.deepcopy(net).cuda()
    expected, *grads = through(net, x)
    ours, *ours_grads = through(other, x.cuda())
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    one, other = (torch.cat([g.flatten() for g in tensors]).double() for tensors in (ours_grads, grads))
    difference = (one - other).norm() / other.norm()
    assert difference < 2e-3


@pytest.mark.parametrize(
    ("precision", "computed"),
    [
        ("fp32", (torch.float32, False)),
        ("tf32", (torch.float32, True)),
        ("auto", (torch.bfloat16, False)),
        ("fp16", (torch.float16, False)),
    ],
)
def test_a_judgement_computes_in_the_precision_that_it_is_told(precision, computed):
    layer, seen = nn.Conv2d(3, 8, 4).cuda(), []
    layer.register_forward_hook(lambda *found: seen.append((found[2].dtype, torch.backends.cudnn.allow_tf32)))
    views = np.random.default_rng(0).integers(0, 256, (4, 1, 4, 4, 3), dtype=np.uint8)
    predict_outputs(layer, views, Input(), torch.device("cuda"), 4, precision)
    assert seen == [computed]


def batch(rng: np.random.Generator, num: int) -> Piece:
    return Piece(rng.integers(0, 256, (num, 1, 4, 64, 64, 3), dtype=np.uint8), rng.integers(0, 5, num))


def replica(compile: bool = False) -> PlainReplica:
    torch.manual_seed(0)
    net = models.build("tsm_resnet50", num_classes=5, num_segments=4)
    optim = OptimSpec(lr=0.002, reference_batch=8, epochs=1, groups="plain")
    return PlainReplica(net, Setup(optim, Input(), (4, 3, 64, 64), torch.device("cuda"), compile=compile))


def test_a_step_trains_in_bfloat16_and_repeats():
    piece = batch(np.random.default_rng(0), 8)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            one = replica()
            runs.append([one.step([piece], 8, 0.002, (0, i)).loss_sum for i in range(20)])
    finally:
        torch.use_deterministic_algorithms(False)
    assert runs[0] == runs[1]
    assert max(runs[0][-3:]) < 0.85 * runs[0][0]
    assert {p.dtype for p in one.net.parameters()} == {torch.float32}


def test_a_resumed_replica_goes_on_in_the_same_bits():
    piece = batch(np.random.default_rng(0), 8)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = replica(), replica()
        for i in range(3):
            first.step([piece], 8, 0.002, (0, i))
        second.load({name: value.cpu().clone() for name, value in first.tensors().items()})
        reports = [one.step([piece], 8, 0.002, (0, 3)).loss_sum for one in (first, second)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert reports[0] == reports[1]
    for name, value in first.tensors().items():
        assert torch.equal(value, second.tensors()[name]), name


def test_a_gradient_that_is_not_finite_leaves_no_trace():
    one = replica()
    piece = batch(np.random.default_rng(0), 8)
    one.step([piece], 8, 0.002, (0, 0))
    with torch.no_grad():
        weight = one.net.get_parameter(f"{one.net.head_name}.bias")
        weight[0] = torch.inf
    before = {name: value.clone() for name, value in one.tensors().items()}
    assert not one.step([piece], 8, 0.002, (0, 1)).finite
    for name, value in one.tensors().items():
        assert torch.equal(value, before[name]) or name.endswith("num_batches_tracked"), name


def test_a_step_does_not_wait_for_the_gpu():
    device, rng = torch.device("cuda"), np.random.default_rng(0)
    data, labels = rng.integers(0, 256, (8, 1, 4, 64, 64, 3), dtype=np.uint8), rng.integers(0, 5, 8)
    one = replica()
    one.step([Piece(pieces.sent(data, device), pieces.sent(labels, device))], 8, 0.002, (0, 0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        report = one.step([Piece(pieces.sent(data, device), pieces.sent(labels, device))], 8, 0.002, (0, 1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert report.finite


def test_moments_are_those_of_the_gpu_not_of_who_queues():
    timer, busy = timer_of(torch.device("cuda")), torch.randn(8192, 8192, device="cuda")
    busy = busy @ busy / 90
    timer.finish()
    start, began = timer.now(), time.perf_counter()
    for _ in range(20):
        busy = busy @ busy / 90
    end, queued_s = timer.now(), time.perf_counter() - began
    assert not timer.has_passed(end)
    assert timer.seconds(start, end) > 5 * queued_s
    assert timer.has_passed(end)
    idle = timer.now()
    time.sleep(0.2)
    assert timer.seconds(idle, timer.now()) > 0.1  # waiting for data, where nothing is queued


def test_determinism_on_request_leaves_the_kernels_that_add():
    places = normalize_coords(torch.rand(2, 3, 5000, device="cuda"), 4)
    features = torch.randn(2, 16, 5000, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (voxelize(features, places, 4) for _ in range(5))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first, other) for other in others)


def test_a_latency_table_is_measured(tmp_path):
    options = {"name": "ofa_mobilenetv3", "num_classes": 10, "width": 0.5}
    net = models.build(**options).eval()
    table = profiler.profile(net, options, tmp_path / "t.json", hardware="cuda", resolutions=(128,), rounds=3)
    assert table.device == torch.cuda.get_device_name()
    assert table.calibration is not None
    assert latency_table.read_table(tmp_path / "t.json") == table


def test_a_pruned_network_is_timed_until_the_gpu_has_finished():
    x = torch.randn(8192, 8192, device="cuda")
    wide, narrow = nn.Linear(8192, 8192).cuda(), nn.Linear(8192, 8).cuda()
    assert pruning.compare(wide, narrow, x).low > 3  # to launch them takes as long


def test_samples_go_to_the_gpu_beside_what_it_computes_and_a_step_is_the_same():
    device, rng = torch.device("cuda"), np.random.default_rng(0)
    data = rng.integers(0, 256, (8, 1, 4, 64, 64, 3), dtype=np.uint8)
    busy = torch.randn(8192, 8192, device=device)
    for _ in range(20):
        busy = busy @ busy / 90
    queued = torch.cuda.current_stream().record_event()
    found = pieces.sent(data[::2], device)
    assert isinstance(found, Sent)
    found.done.synchronize()
    assert not queued.query(), "the copy waited for what is computed"
    assert torch.equal(found.arrived().cpu(), torch.from_numpy(data[::2]))
    labels, losses = rng.integers(0, 5, 8), []
    torch.use_deterministic_algorithms(True)
    try:
        for piece in (Piece(data, labels), Piece(pieces.sent(data, device), pieces.sent(labels, device))):
            one = replica()
            losses.append([one.step([piece], 8, 0.002, (0, i)).loss_sum for i in range(3)])
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses[0] == losses[1]


def test_a_compiled_network_learns_as_the_plain_one_does():
    piece = batch(np.random.default_rng(0), 8)
    plain, fast = replica(), replica(compile=True)
    for i in range(3):
        wanted, found = (one.step([piece], 8, 0.002, (0, i)).loss_sum for one in (plain, fast))
        assert found == pytest.approx(wanted, rel=0.05), "bfloat16, other kernels"
    assert plain.tensors().keys() == fast.tensors().keys()
