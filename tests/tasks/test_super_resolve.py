"""Super resolution: published numbers of recorded pictures, comparison with bicubic, NaN scores 0, files enlarged."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from tests.pages import Elements

from slimray import models, runs
from slimray.report import pages
from slimray.runtime.super_resolve import enlarged
from slimray.spec import RunFailed, UserError
from slimray.tasks import TASKS
from slimray.tasks.evaluation import Pass, Samples, Setting
from slimray.tasks.network import Input, Network, load_network
from slimray.tasks.predict import predict_files
from slimray.tasks.super_resolve import PictureScore, bicubic, luma, psnr, shrunk, ssim
from slimray.tasks.task import require_finite
from slimray.train.spec import OptimSpec

TASK = TASKS["super_resolve"]
OPTIM = OptimSpec(lr=0.1, reference_batch=1, epochs=1)
RECIPE = {"kind": "image_pair", "scale": 2, "size": 8, "mode": "val", "flip": False}
SMALL = {"scale": 2, "width": 8, "blocks": 1, "units": 1}


@pytest.fixture(scope="module")
def recorded(shared):
    return np.load(shared / "parity/images/sr_images.npz")


@pytest.fixture(scope="module")
def numbers(shared):
    return json.loads((shared / "parity/images/sr_metrics.json").read_text())


def network() -> Network:
    torch.manual_seed(0)
    net = models.build("carn", **SMALL).eval()
    return Network(net, Input(), RECIPE, (), {"name": "carn", **SMALL}, "super_resolve")


@pytest.mark.parametrize("border", [2, 3, 4])
def test_luma_psnr_and_ssim_are_the_published_ones(recorded, numbers, border):
    found, wanted = (luma(recorded[name][None], border) for name in ("sr", "hr"))
    known = numbers["metrics"][f"shave{border}"]
    assert float(psnr(found, wanted)) == pytest.approx(known["psnr_y_float"], abs=1e-6)
    assert float(ssim(found, wanted)) == pytest.approx(known["ssim_y_float"], abs=1e-8)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_bicubic_interpolation_is_the_published_baseline(recorded, numbers, scale):
    large = bicubic(shrunk(recorded["hr"], scale), scale)
    found, wanted = luma(large[None], scale), luma(recorded["hr"][None], scale)
    known = numbers["bicubic"][f"x{scale}"]
    assert float(psnr(found, wanted)) == pytest.approx(known["bicubic_upscale_psnr_y"], abs=1e-6)
    assert float(ssim(found, wanted)) == pytest.approx(known["bicubic_upscale_ssim_y"], abs=1e-8)


def test_ranks_sum_up_to_what_one_counts_and_a_perfect_picture_beats_bicubic(recorded):
    targets = torch.from_numpy(np.stack([recorded["hr"], recorded["sr"]]))
    outputs = targets.movedim(-1, 1).float() / 255
    outputs[1] += 0.02
    one, first, second = (PictureScore(2) for _ in range(3))
    one.add(outputs, targets)
    first.add(outputs[:1], targets[:1])
    second.add(outputs[1:], targets[1:])
    for mine, other in zip(first.tensors(), second.tensors(), strict=True):
        mine += other
    result = one.result()
    assert first.result() == pytest.approx(result)
    assert result["psnr_gain"] > 0
    assert result["ssim"] > result["ssim_bicubic"]
    assert result["loss"] == pytest.approx(0.01, rel=1e-3)
    assert result["num_samples"] == 2


def test_a_picture_that_is_not_finite_scores_nothing(recorded):
    targets = torch.from_numpy(recorded["hr"][None])
    score = PictureScore(2)
    score.add(torch.full((1, 3, 48, 60), torch.nan), targets)
    assert (score.result()["psnr"], score.result()["ssim"]) == (0, 0)
    with pytest.raises(RunFailed, match="net: the network's outputs are not finite for all 1 samples"):
        require_finite(score.result(), "net")


def test_the_loss_is_the_mean_absolute_error_of_each_picture():
    targets = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    outputs = torch.stack([torch.full((3, 4, 4), 0.5), torch.full((3, 4, 4), -0.25)])
    assert TASK.losses(outputs, targets, OPTIM).tolist() == [0.5, 0.25]
    assert TASK.weights(targets, OPTIM).tolist() == [1, 1]


def test_the_page_shows_pictures_side_by_side_and_bicubic_in_a_table(tmp_path, recorded):
    net = network()
    large = np.ascontiguousarray(recorded["hr"][:16, :16])
    samples = Samples(shrunk(large, 2)[None, None], large[None], ["a.png"], [0])
    one = TASK.start(Setting(TASK, net, RECIPE))
    assert isinstance(one, Pass)
    found = one.show(samples, one.take(samples), [], 3)
    row = {"run": "net", "variant": "natural", **one.result()}
    results = {
        "task": "super_resolve",
        "metrics": [metric.to_plain() for metric in TASK.metrics],
        "rows": [row],
        "classes": [],
        "examples": [example | {"run": "net"} for example in found],
    }
    run = runs.open_run(str(tmp_path), "page")
    runs.write_file(run, "results.json", json.dumps(results).encode())
    elements = Elements(pages.evaluate_report(run))
    assert "Pictures side by side" in elements.text
    assert "Compared with bicubic interpolation" in elements.text
    assert f"{row['psnr']:.4g} dB" in elements.text
    assert sum(src.startswith("data:image/png;base64,") for src in elements.all("src")) == 4


def test_a_large_picture_is_enlarged_in_pieces_without_a_seam():
    net = network()
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    whole, pieces = enlarged(net, picture, 2, tile=256), enlarged(net, picture, 2, tile=24)
    assert whole.shape == (100, 140, 3)
    assert np.abs(whole.astype(int) - pieces).max() <= 1  # of rounding


def test_a_file_becomes_a_png_beside_it_or_in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = runs.open_run(str(tmp_path / "runs"), "net")
    built = network()
    taken = {"recipe": RECIPE, "pixels": vars(Input()), "classes": [], "task": "super_resolve"}
    runs.write_model(run, safetensors.torch.save(built.net.state_dict()), built.model, taken)
    picture = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    Image.fromarray(picture).save("a.png")
    Path("b.png").write_bytes(b"no picture")
    Path("out").mkdir()
    found, bad = predict_files(load_network(run), [Path("a.png"), Path("b.png")], 5)
    assert found.written == (Path("a.x2.png"),)
    assert np.asarray(Image.open("a.x2.png")).shape == (18, 24, 3)
    np.testing.assert_array_equal(np.asarray(Image.open("a.x2.png")), enlarged(built, picture, 2))
    assert bad.reason
    assert not bad.written
    list(predict_files(load_network(run), [Path("a.png")], 5, out=Path("out")))
    assert Path("out/a.x2.png").exists()
    Image.fromarray(picture).save("a.x2.png")
    with pytest.raises(UserError, match="would overwrite it"):
        predict_files(load_network(run), [Path("a.png"), Path("a.x2.png")], 5)
