"""The divisor of a step's loss, and the weights and statistics that a run ships, read from its folder."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from tests.verbs.conftest import Shell

from slimray import runs

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

SHORT = """
kind: train
name: {name}
data: {{run: data, size: 32, val: null}}
model: {{name: tsm_resnet18, width: 0.125, num_segments: 2, dropout: 0.0}}
batch: {{total: 20, per_worker: 20}}
optim: {{lr: 0.01, reference_batch: 20, epochs: 1, schedule: constant, momentum: 0, weight_decay: 0, groups: plain,
  clip_norm: null}}
checkpoint: {{every_steps: 1, keep_last: 10}}
log_every: 1
"""

SHIPPED = """
kind: train
name: shipped
data: {run: data, size: 32}
model: {name: tsm_resnet18, width: 0.125, num_segments: 2}
batch: {total: 20, per_worker: 10, drop_last: true}
optim: {lr: 0.05, reference_batch: 20, epochs: 2, schedule: constant, ema: 0.9, precise_norm: 12}
scale: {workers: 2}
checkpoint: {ship: best, keep_last: 1, best_metric: val/top5}
log_every: 1
"""


def state(run: runs.Run, step: int) -> dict[str, torch.Tensor]:
    checkpoint = runs.checkpoint_at(run, step)
    return safetensors.torch.load(runs.read_checkpoint(run, checkpoint)["state.safetensors"])


def weights(run: runs.Run, step: int) -> dict[str, torch.Tensor]:
    named = {name.removeprefix("replica.model."): value for name, value in state(run, step).items()}
    return {name: value for name, value in named.items() if name.endswith("weight")}


def test_a_short_last_batch_counts_by_its_share_and_an_old_run_ends_by_the_law_it_began_with(shell: Shell):
    shell.ok("run", shell.write("short.yaml", SHORT.format(name="short")))
    run = runs.open_run(str(shell.storage), "short")
    before, after = weights(run, 2), weights(run, 3)  # 48 clips: two batches of 20, then 8
    folder = shell.storage / "old"
    shutil.copytree(shell.storage / "short", folder)
    shutil.rmtree(folder / "checkpoints/step_000000003")
    shutil.rmtree(folder / "model")
    (folder / "job.yaml").write_text((folder / "job.yaml").read_text().replace("name: short", "name: old", 1))
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps(status | {"state": "failed"}))
    marker = folder / "checkpoints/step_000000002/complete.json"
    content = json.loads(marker.read_text())
    del content["meta"]["arithmetic"]  # the rule of earlier versions
    marker.write_text(json.dumps(content))
    shell.ok("run", shell.write("old.yaml", SHORT.format(name="old")))
    whole = weights(runs.open_run(str(shell.storage), "old"), 3)
    moved = [name for name in before if not torch.equal(before[name], whole[name])]
    assert len(moved) > 20
    for name in moved:
        ours, theirs = after[name] - before[name], whole[name] - before[name]
        torch.testing.assert_close(ours, 8 / 20 * theirs, rtol=1e-2, atol=1e-6)


def test_the_best_averaged_weights_ship_with_statistics_computed_anew(shell: Shell):
    shell.ok("run", shell.write("shipped.yaml", SHIPPED))
    run = runs.open_run(str(shell.storage), "shipped")
    card = runs.read_card(run)
    assert card is not None
    best = int(card["metrics"]["best"]["step"])
    assert best in (2, 4)  # 48 clips, the last 8 of each epoch left out
    assert card["steps"] == 4
    taken = state(run, best)
    model = safetensors.torch.load(runs.read_model(run)[0])
    for name, value in model.items():
        if f"replica.ema.{name}" in taken:
            assert torch.equal(value, taken[f"replica.ema.{name}"]), name
    means = torch.cat([value for name, value in model.items() if name.endswith("running_mean")])
    assert means.numel() * 2 == taken["precise"].numel()
    assert set(means.tolist()) <= set(taken["precise"].tolist())
    assert not set(means.tolist()) <= set(taken["replica.ema_norms.0"].tolist())
