"""`slimray plan` as a user types it, and its stored calibration. No Ray: one worker is measured in this process."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tests.cli.test_cli import shell  # noqa: F401 a fixture

from slimray import job, runs
from slimray.data.modalities import MODALITIES
from slimray.spec import UserError
from slimray.train import calibrate
from slimray.verbs import inputs, networks, plan

TINY = """
kind: train
name: tiny
data: {card: kinetics400, size: 32}
model: {name: tsm_resnet18, width: 0.125, num_segments: 2}
batch: {total: 8, per_worker: 2}
optim: {lr: 0.1, reference_batch: 8, epochs: 3, groups: plain}
"""
MACHINE = "kind: plan\nmachine: {gpus_per_node: 2, gpu: V100, nodes: 2, cores: 8, price: small}\n"
PRICES = "prices:\n  small: {usd_per_hour: 2, source: a page, date: 2026-01-02, unverified: true}\n"


@pytest.fixture
def where(tmp_path, monkeypatch) -> Path:
    """Make a working folder with a job whose dataset is missing, and a cluster of two nodes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    Path("tiny.yaml").write_text(TINY)
    Path("cluster").mkdir()
    Path("cluster/two.yaml").write_text(MACHINE)
    Path("cluster/prices.yaml").write_text(PRICES)
    return tmp_path


def test_a_plan_on_a_cluster_tells_cost_doubts_and_bottleneck(shell, where):  # noqa: F811
    done = shell("plan", "tiny.yaml", "--cluster", "two", "--workers", "4,1", "--samples", "800", "--json")
    assert done.code == 0, done.err
    (found,) = done.json()
    assert [row["workers"] for row in found["rows"]] == [1, 4]
    assert [row["nodes"] for row in found["rows"]] == [1, 2]
    for row in found["rows"]:
        assert row["usd"][1] == pytest.approx(row["nodes"] * 2 * row["hours"][1])
        assert row["bottleneck"] == "decode"
    assert "price of small: 2 USD/h, a page, 2026-01-02 (recalled, unverified)" in found["notes"]
    assert "data sheets" in found["basis"]
    shown = shell("plan", "tiny.yaml", "--cluster", "two", "--workers", "4", "--samples", "800").out
    assert "decoding needs" in shown
    assert "recalled, unverified" in shown


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--workers 4x", "--workers 4x: must be whole numbers above 0, separated by commas, such as 6,96,768"),
        ("--workers 3", "tiny.yaml (tiny): --workers 3: batch.total 8 is not a multiple of 3 workers"),
        ("--cluster tow", "--cluster tow: there is no such cluster file, did you mean 'two'?"),
        ("--cluster two --workers 8 --set batch.total=64", "--workers 8: needs 4 nodes, two has 2"),
        ("--cluster bare", "machine: is required to plan"),
        ("--cluster odd", "odd.yaml: machine: gpuss: unknown field, did you mean 'gpu'?"),
        ("--picture plan.gif", "--picture plan.gif: must end in .png or .svg"),
    ],
)
def test_a_mistake_in_a_plan_is_one_sentence(shell, where, arguments, sentence):  # noqa: F811
    Path("cluster/bare.yaml").write_text("kind: slurm\n")
    Path("cluster/odd.yaml").write_text("kind: plan\nmachine: {gpuss: 2}\n")
    done = shell("plan", "tiny.yaml", "--samples", "800", *arguments.split())
    assert done.code == 2
    assert sentence in done.err.splitlines()[-1]


def test_a_dataset_that_is_not_there_needs_a_number_of_samples(shell, where):  # noqa: F811
    done = shell("plan", "tiny.yaml")
    assert done.code == 2
    assert done.err.strip().endswith("(or give the number of samples: --samples)")
    assert shell("plan", "tiny.yaml", "--samples", "100").code == 0


SHRINK = """
kind: shrink
name: small
data: {card: kinetics400, size: 64}
model: {name: ofa_tsm_mobilenetv3, preset: tiny, num_segments: 2}
batch: {total: 8, per_worker: 2}
optim: {reference_batch: 8}
stages: [{name: largest, epochs: 1, lr: 0.1}, {name: all, epochs: 1, lr: 0.1, free: {depth: [2, 3]}}]
"""


def test_jobs_that_train_but_are_not_planned_are_named(shell, where):  # noqa: F811
    Path("both.yaml").write_text(f"{TINY}---{SHRINK}")
    done = shell("plan", "both.yaml", "--samples", "800", "--workers", "1")
    assert done.code == 0, done.err
    assert "small: not planned, only jobs of kind train are (its kind: shrink)" in done.out
    Path("shrink.yaml").write_text(SHRINK)
    done = shell("plan", "shrink.yaml", "--samples", "800")
    assert done.code == 2
    assert "has no job of kind train, and only those can be planned; small is of kind shrink" in done.err


def test_a_training_of_so_many_steps_takes_its_share_of_epochs(shell, where):  # noqa: F811
    hours = []
    for text in (TINY.replace("epochs: 3", "epochs: 5"), TINY.replace("epochs: 3", "steps: 250")):
        Path("tiny.yaml").write_text(text)
        done = shell("plan", "tiny.yaml", "--cluster", "two", "--workers", "1", "--samples", "800", "--json")
        assert done.code == 0, done.err
        hours.append(done.json()[0]["rows"][0]["hours"][1])
    assert hours[1] == pytest.approx(hours[0] / 2)
    one = job.load(["tiny.yaml"])[0].job
    known = networks.schedule(one, 800).to_plain()
    assert (known["epochs"], known["steps_per_epoch"], known["steps"]) == (3, 100, 250)
    assert networks.schedule(one, None).steps == 250


@pytest.mark.parametrize("name", ["plan.png", "plan.svg"])
def test_a_plan_is_drawn(shell, where, name):  # noqa: F811
    done = shell("plan", "tiny.yaml", "--samples", "800", "--workers", "1,2,4", "--picture", name)
    assert done.code == 0, done.err
    head = Path(name).read_bytes()
    assert head.startswith(b"\x89PNG") if name.endswith(".png") else b"stragglers" in head


def test_one_worker_is_measured_and_later_plans_and_runs_know(shell, where):  # noqa: F811
    measured = shell("plan", "tiny.yaml", "--samples", "8", "--measure", "--json")
    assert measured.code == 0, measured.err
    (found,) = measured.json()
    assert found["calibration"] == "runs/calibration.json"
    assert found["basis"].startswith("measured on one worker (cpu, 1 threads")
    (row,) = json.loads(Path("runs/calibration.json").read_text()).values()
    assert 0 < row["compute_s"] < 5
    assert row["decode_s"] is None
    again = shell("plan", "tiny.yaml", "--samples", "8")
    assert "times: measured on one worker" in again.out

    one = job.load(["tiny.yaml"])[0].job
    recipe = inputs.make_recipe(one.data, plan._card(one, "x"), 2, "train")
    config = SimpleNamespace(model=networks.model_options(one, plan._card(one, "x")), recipes={"train": recipe})
    summary = networks.summary(one, plan._card(one, "x"), 8)
    run = runs.open_run("runs", "tiny")
    rows = [{"phase": "train", "step": step, "train/samples_per_s": 2.0} for step in (1, 2)]
    runs.write_file(run, "metrics/0001-00000-1-0001.jsonl", "\n".join(map(json.dumps, rows)).encode())
    ctx = SimpleNamespace(storage="runs", run=run)
    compared = calibrate.compared(one, summary, config, ctx)
    assert compared is not None
    assert compared["measured_samples_per_s"] == 2.0
    assert compared["ratio"] == pytest.approx(compared["predicted_samples_per_s"] / 2, rel=1e-3)
    other = SimpleNamespace(model=config.model | {"width": 0.25}, recipes=config.recipes)
    assert calibrate.compared(one, summary, other, ctx) is None, "another network was never measured"
    os.environ["RAY_ADDRESS"] = "10.0.0.1:6379"
    try:
        assert calibrate.compared(one, summary, config, ctx) is None, "a cluster is not this machine"
    finally:
        del os.environ["RAY_ADDRESS"]


def test_decoding_is_measured_on_samples_that_are_there(tmp_path):
    from slimray.data.index import INDEX
    from slimray.data.video import moving_shapes
    from slimray.data.video.clips import ClipRecipe

    (tmp_path / "a.mp4").write_bytes(moving_shapes.encode_h264(moving_shapes.make_clip(0, 0)[0]))
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    rows = [{"path": path, "label": 0} for path in ("a.mp4", "bad.mp4", "a.mp4")]
    empty = {"frames": 0, "fps": 0.0, "width": 0, "height": 0, "shard": "", "row": -1}
    import pyarrow as pa

    table = pa.Table.from_pylist([row | empty for row in rows], schema=INDEX)
    recipe = ClipRecipe(num_segments=2, size=32, resize=36, mode="train").to_dict()
    seconds, megabytes = calibrate._decode_times(table, str(tmp_path), recipe)
    assert 0 < seconds < 5
    assert megabytes == pytest.approx((tmp_path / "a.mp4").stat().st_size / 1e6)
    with pytest.raises(UserError, match="no sample decodes"):
        calibrate._decode_times(table.slice(1, 1), str(tmp_path), recipe)


def test_a_calibration_file_of_other_content_is_refused_by_name(tmp_path):
    assert calibrate.find(str(tmp_path), "x") is None
    (tmp_path / "calibration.json").write_text("[]")
    with pytest.raises(UserError, match=r"calibration\.json: was not written by slimray: delete it"):
        calibrate.find(str(tmp_path), "x")
    (tmp_path / "calibration.json").write_text('{"x": {"a": 1}}')
    with pytest.raises(UserError, match="measure again"):
        calibrate.find(str(tmp_path), "x")


def test_the_key_of_a_calibration_tells_networks_inputs_and_microbatches_apart():
    recipe = {"kind": "clip", "num_segments": 8, "size": 64, "resize": 72, "mode": "train"}
    model = {"name": "tsm_resnet18", "num_classes": 4}
    keys = {
        calibrate.key_of(model, recipe, 8, "cpu"),
        calibrate.key_of(model, recipe, 4, "cpu"),
        calibrate.key_of(model, recipe | {"size": 72}, 8, "cpu"),
        calibrate.key_of(model | {"width": 0.5}, recipe, 8, "cpu"),
        calibrate.key_of(model, recipe, 8, "NVIDIA H100"),
    }
    assert len(keys) == 5
    assert np.unique([len(key) for key in keys]).tolist() == [16]


def test_packed_clips_are_assumed_to_decode_faster_than_raw_ones(shell, where):  # noqa: F811
    chain = "kind: prepare\nname: packed\ndata: {card: kinetics400}\npack: {format: h264}\n---\n"
    Path("chain.yaml").write_text(chain + TINY.replace("card: kinetics400", "run: packed"))
    found = [
        shell("plan", file, "--samples", "800", "--workers", "1", "--json").json()[0]["rows"][0]
        for file in ("tiny.yaml", "chain.yaml")
    ]
    raw, packed = (row["decode_cores"] / row["samples_per_s"][1] for row in found)
    assert raw == pytest.approx(MODALITIES["clip"].decode_s)
    assert packed == pytest.approx(MODALITIES["clip"].packed["h264"][0])
