"""The loss of frustum networks: each error as in the paper, the published bins, frustums without an object."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from slimray.models.points.frustum import HEADING_BIN, FrustumNet
from slimray.models.points.table import POINT_MODELS
from slimray.tasks import frustum_boxes, frustum_loss


def network() -> FrustumNet:
    torch.manual_seed(0)
    return POINT_MODELS["frustum_pointnet"][0](num_classes=3, width=0.125)


def mean_loss(*given, **options) -> torch.Tensor:
    return frustum_loss.frustum_losses(*given, **options).mean()


def test_corners_turn_about_the_vertical():
    center, size = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[4.0, 2.0, 1.0]])
    corners = frustum_loss.box_corners(center, torch.tensor([0.0]), size)
    assert corners[0, 0].tolist() == [3.0, 2.5, 4.0]
    assert corners[0, 6].tolist() == [-1.0, 1.5, 2.0]
    turned = frustum_loss.box_corners(torch.zeros(1, 3), torch.tensor([math.pi / 2]), size)
    torch.testing.assert_close(turned[0, 0], torch.tensor([1.0, 0.5, -2.0]))


def perfect(templates: torch.Tensor):
    """Return targets, and the outputs that match them."""
    targets = {
        "mask": torch.tensor([[0, 1, 1], [1, 0, 0]]),
        "center": torch.randn(2, 3),
        "heading_id": torch.tensor([0, 7]),
        "heading_residual": torch.tensor([0.1, -0.2]),
        "size_id": torch.tensor([0, 5]),
        "size_residual": torch.randn(2, 3) * 0.1,
    }
    out = {
        "mask_logits": 50 * F.one_hot(targets["mask"], 2).float().transpose(1, 2),
        "center": targets["center"],
        "center_reg": targets["center"],
        "heading_scores": 50 * F.one_hot(targets["heading_id"], 12).float(),
        "size_scores": 50 * F.one_hot(targets["size_id"], 8).float(),
        "heading_residuals": targets["heading_residual"][:, None].expand(-1, 12),
        "size_residuals": targets["size_residual"][:, None].expand(-1, 8, -1),
    }
    out["heading_residuals_normalized"] = out["heading_residuals"] / (math.pi / 12)
    out["size_residuals_normalized"] = out["size_residuals"] / templates
    return out, targets


def test_a_perfect_box_costs_nothing_and_each_error_what_the_paper_says():
    templates = network().size_templates
    out, targets = perfect(templates)
    assert mean_loss(out, targets, templates).item() == pytest.approx(0, abs=1e-4)
    moved = out | {"center": out["center"] + torch.tensor([0.6, 0.0, 0.8])}  # by 1 m: huber 0.5, corners 10 * 0.5
    assert mean_loss(moved, targets, templates).item() == pytest.approx(0.5 + 10 * 0.5, abs=1e-3)
    assert mean_loss(moved, targets, templates, box_weight=0).item() == pytest.approx(0, abs=1e-4)
    wrong = out | {"heading_residuals_normalized": out["heading_residuals_normalized"] + 0.5}
    assert mean_loss(wrong, targets, templates).item() == pytest.approx(20 * 0.125, abs=1e-3)
    guess = out | {"center_reg": out["center_reg"] + torch.tensor([3.0, 0.0, 0.0])}  # linear: 0.5 + 2
    assert mean_loss(guess, targets, templates).item() == pytest.approx(2.5, abs=1e-3)
    turned = out | {
        "heading_residuals": out["heading_residuals"] + math.pi
    }  # corners of a box rotated by pi count as its own
    assert mean_loss(turned, targets, templates).item() == pytest.approx(0, abs=1e-3)


def test_headings_fall_into_the_published_bins(shared):
    conventions = np.load(shared / "parity/pvcnn_conventions.npz", allow_pickle=False)
    number, residual = frustum_loss.heading_bins(torch.from_numpy(conventions["angles"]).double())
    assert number.tolist() == conventions["bin_id"].tolist()
    np.testing.assert_allclose(residual, conventions["residual"], atol=1e-6)


def test_truths_become_targets_and_frustums_without_object_have_no_loss():
    net = network()
    truth = torch.zeros(3, 20 + 11)
    truth[:, 20:27] = torch.tensor([1.0, 2.0, 10.0, 4.0, 1.7, 1.5, 0.6])
    truth[1, -4] = 2
    truth[2, :20], truth[2, 20:27] = -1, torch.nan
    targets = frustum_boxes.targets_of(truth)
    assert targets["known"].tolist() == [True, True, False]
    assert targets["size_id"].tolist() == [0, 5, 0]
    sizes = net.size_templates[0, targets["size_id"]] + targets["size_residual"]
    torch.testing.assert_close(sizes[:2], truth[:2, 23:26])
    heading = targets["heading_id"] * HEADING_BIN + targets["heading_residual"]
    torch.testing.assert_close(heading[:2], truth[:2, 26])
    points = torch.randn(3, 7, 20)
    losses = frustum_boxes.losses(net(points), truth, None)
    losses.sum().backward()
    assert losses[2] == 0
    assert (losses[:2] > 0).all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
