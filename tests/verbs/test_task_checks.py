"""Options that a task does not have are refused before machines are requested, with a sentence."""

import numpy as np
import pytest
from PIL import Image

from slimray import job

JOB = """
kind: train
name: larger
data:
  card: {{name: photographs, layout: files, splits: {{train: "*.png", val: "*.png"}}, sample: image_pair, labels: none, task: super_resolve}}
  root: {root}
  size: 16
model: {{name: carn, width: 8, blocks: 1, units: 1}}
batch: {{total: 2, per_worker: 2}}
optim: {{lr: 0.001, reference_batch: 2, epochs: 1, groups: plain}}
"""  # noqa: E501


@pytest.fixture
def file(tmp_path):
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "job.yaml").write_text(JOB.format(root=tmp_path))
    return tmp_path / "job.yaml"


def problems(file, *sets: str) -> list[str]:
    (known,) = job.check(job.load([str(file)], list(sets)), str(file.parent / "runs"))
    return known.get("problems", [])


def test_a_task_without_classes_is_checked_and_counted(file):
    (known,) = job.check(job.load([str(file)], []), str(file.parent / "runs"))
    assert not known.get("problems")
    assert known["params"] > 0
    assert known["input"] == [3, 16, 16]
    assert "classes" not in known


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("checkpoint.best_metric=val/top1", "checkpoint.best_metric: the task super_resolve has no 'val/top1'"),
        ("checkpoint.best_metric=val/psnrr", "has no 'val/psnrr', did you mean 'val/psnr'?"),
        ("average=prob", "average: prob is for classes, not for super_resolve"),
        ("optim.mutual=1", "optim.mutual: is for classes of samples or points, not for super_resolve"),
        ("optim.class_weights=[1,2]", "optim.class_weights: are for classes, not for super_resolve"),
        ("data.task.scale=5", "data.task.scale: must be"),
        ("data.task.scael=2", "data.task.scael: unknown"),
        ("model={name: resnet18}", "model.name: resnet18 takes images, the dataset has pictures"),
        ("model={name: carn, scale: 3}", "model.scale: is not an option here, write data.task.scale"),
        ("data.card.task=super_resolv", "unknown task 'super_resolv', did you mean 'super_resolve'?"),
    ],
)
def test_what_does_not_fit_the_task_is_one_sentence(file, setting, sentence):
    try:
        said = problems(file, setting)
    except job.UserError as error:
        said = [str(error)]
    assert any(sentence in one for one in said), said
