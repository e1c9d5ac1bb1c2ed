"""From YAML to jobs, and the mistakes that `check` finds before machines are requested: file, field, next step."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import yaml

from slimray import job, models, runs
from slimray.data.cards import Card
from slimray.data.index import index_table
from slimray.spec import UserError, parse_yaml
from slimray.train import learn
from slimray.verbs import inputs, networks, stages

ROOT = Path(__file__).resolve().parents[1]
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))
CARDS = sorted((ROOT / "datasets").glob("*.yaml"))
CLASSES = ("slow_right", "fast_right", "fast_left", "slow_left")

CHAIN = """
kind: prepare
name: data
data: {card: moving_shapes, clips: 40}
---
kind: train
name: tsm
data: {run: data, size: 32}
model: {name: tsm_resnet18, width: 0.125, num_segments: 4}
batch: {total: 16, per_worker: 4}
optim: {lr: 0.02, reference_batch: 8, epochs: 3}
scale: {workers: 2}
---
kind: train
name: tsn
extends: tsm
model: {name: tsn_resnet18}
---
kind: evaluate
name: eval
runs: [tsm, tsn]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working folder with `chain.yaml` in it; runs lie in its `runs`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chain.yaml").write_text(CHAIN)
    return tmp_path


def write(text: str, name: str = "x.yaml") -> str:
    Path(name).write_text(text)
    return name


def check(*sets: str, file: str = "chain.yaml", look: bool = False) -> dict[str, dict[str, Any]]:
    """The facts of each job of a file, by name."""
    return {one["name"]: one for one in job.check(job.load([file], sets), "runs", look=look)}


def problems(*sets: str, file: str = "chain.yaml", look: bool = False) -> list[str]:
    """What `check` says is to be mended, without the file in front; the same sentence of several jobs once."""
    try:
        found = [problem for one in check(*sets, file=file, look=look).values() for problem in one["problems"]]
    except UserError as error:
        found = str(error).splitlines()
    return list(dict.fromkeys(text.partition(": ")[2] if text.startswith(file) else text for text in found))


def finish(one: job.Loaded, metrics: dict[str, Any] | None = None, state: Any = "finished") -> runs.Run:
    """The run folder of a job as it is after the job."""
    run = runs.open_run("runs", one.job.name)
    with runs.hold(run):
        runs.begin(run, one.document, 1)
        if state == "finished":
            runs.write_card(run, {"metrics": metrics or {}})
        runs.end(run, state, "" if state == "finished" else "it broke")
    return run


def finish_data(one: job.Loaded) -> runs.Run:
    """The run folder of the `prepare` job `one`: 32 clips to train and 8 to validate, all of them empty files."""
    run = finish(one)
    for split, numbers in (("train", range(32)), ("val", range(32, 40))):
        rows = [{"path": f"clips/{i}.mp4", "label": i % 4, "frames": 16} for i in numbers]
        for row in rows:
            runs.write_file(run, f"data/{row['path']}", b"")
        buffer = io.BytesIO()
        pq.write_table(index_table(rows), buffer)
        runs.write_file(run, f"data/{split}.parquet", buffer.getvalue())
    card = Card.model_validate(one.job.data.card).prepared(["train", "val"], None)
    runs.write_file(run, "data/card.yaml", yaml.safe_dump(card.model_dump(mode="json", exclude_defaults=True)).encode())
    return run


def finish_train(one: job.Loaded, classes: tuple[str, ...] = CLASSES) -> runs.Run:
    """The run folder of the `train` job `one`, with a network that was never trained."""
    run = finish(one, {"best": {"val/top1": 50.0, "epoch": 2}, "last": {"val/top1": 40.0, "epoch": 3}})
    card = Card.model_validate(one.job.data.card)
    named = card.model_copy(update={"classes": classes, "num_classes": len(classes)})
    options = networks.model_options(one.job, named)
    segments = models.options_of(one.job.model.name)["num_segments"]
    recipe = inputs.make_recipe(one.job.data, card, options.get("num_segments", segments), "val")
    pixels = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "average": "logits"}
    taken = {"recipe": recipe, "pixels": pixels, "classes": list(classes)}
    runs.write_model(run, safetensors.torch.save(models.build(**options).state_dict()), options, taken)
    return run


def finish_chain(last: int = 3) -> None:
    """The first `last` jobs of chain.yaml as if they had run."""
    loaded = job.load(["chain.yaml"])
    for one, done in zip(loaded[:last], (finish_data, finish_train, finish_train), strict=False):
        done(one)


# ------------------------------------------------------------------------------------------------ what is shipped


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_shipped_job_is_right_but_for_the_data_that_is_not_here(path):
    facts = job.check(job.load([path]), "runs")
    assert all(one["state"] == "new" for one in facts)
    said = [problem for one in facts for problem in one["problems"]]
    for sentence in said:
        assert "data.root: is required, the folder where" in sentence or "init.from: " in sentence, sentence
    wanted = {line.split("=")[0] for line in path.read_text().split("--set ")[1:]}
    assert {sentence.split(": ")[1] for sentence in said} == wanted, "the header tells what must be given"


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_shipped_job_points_its_editor_at_the_schema_and_says_how_it_is_run(path):
    lines = path.read_text().splitlines()
    assert lines[0] == "# yaml-language-server: $schema=schema.json"
    assert any(line.startswith(f"# command: slimray run jobs/{path.name}") for line in lines)
    assert all(line.startswith("#") for line in lines[:3])


def test_the_facts_of_the_quickstart():
    facts = {one["name"]: one for one in job.check(job.load([ROOT / "jobs/quickstart.yaml"]), "runs")}
    assert facts["quickstart-data"]["samples"] == {"train": 384, "val": 96}
    tsm = facts["quickstart-tsm"]
    assert (tsm["params"], tsm["macs"], tsm["input"]) == (702_612, 88_477_696, [8, 3, 64, 64])
    assert (tsm["batch"], tsm["accumulation"], tsm["steps_per_epoch"]) == (32, 1, 12)
    assert tsm["steps"] == 12 * tsm["epochs"]
    assert facts["quickstart-eval"]["views"] == 1


# ----------------------------------------------------------------------------------------------- files to documents


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "holds no job (`slimray init DIR` writes examples to start from)"),
        ("kind: trian\nname: a", "unknown kind 'trian', did you mean 'train'?"),
        ("name: a", f"kind: must be one of {', '.join(job.SPECS)} (got None)"),
        ("kind: [train]\nname: a", f"kind: must be one of {', '.join(job.SPECS)} (got ['train'])"),
        ("name: a\nlayout: list", "is a dataset card, not a job: name it in `data: {card: ...}` of a job"),
        ("kind: prepare\nname: a/b\ndata: {card: moving_shapes}", "name: run name 'a/b': letters, digits"),
        ("kind: prepare\nname: " + "a" * 129 + "\ndata: {card: moving_shapes}", "name: run name 'aaa"),
        (
            "kind: prepare\nname: a\ndata: {card: moving_shape}",
            "data.card: there is no dataset card 'moving_shape', did",
        ),
        ("kind: prepare\nname: a\ndata: {card: my.yaml}", "data.card: my.yaml: no such dataset card"),
        ("kind: prepare\nname: a\ndata: {card: {name: a}}", "data.card: layout: is required"),
        ("extends: b\nname: a", "extends: no earlier document is named 'b'"),
        ("extends: [b]\nname: a", "extends: no earlier document is named ['b']"),
    ],
)
def test_a_wrong_document_is_one_sentence(text, sentence):
    with pytest.raises(UserError) as caught:
        job.load([write(text)])
    first = str(caught.value).splitlines()[0]
    assert first.startswith("x.yaml")
    assert sentence in first


def test_a_missing_file_is_one_sentence_with_the_next_step():
    with pytest.raises(UserError, match=r"gone.yaml: no such file \(`slimray init DIR` writes examples"):
        job.load(["gone.yaml"])


def test_a_name_is_used_once():
    with pytest.raises(UserError, match=r"x.yaml: name: 'a' is used twice: each document needs a name of its own"):
        job.load([write("kind: prepare\nname: a\ndata: {card: moving_shapes}\n---\nextends: a\n")])


def test_extends_lays_fields_over_those_of_an_earlier_document_also_of_another_file():
    tsm, tsn = job.load(["chain.yaml"])[1:3]
    assert tsn.job.model.name == "tsn_resnet18"
    assert tsn.job.model.options() == tsm.job.model.options()
    other = write("extends: tsn\nname: more\noptim: {epochs: 9}\n")
    more = job.load(["chain.yaml", other])[-1]
    assert (more.job.kind, more.job.optim.epochs, more.job.optim.lr) == ("train", 9, 0.02)
    assert more.where == "x.yaml (more)"


def test_mistakes_in_several_documents_are_told_at_once():
    said = problems("tsm:optim.lr=0", "tsn:optim.epochs=0", "eval:crops=4")
    assert said == [
        "optim.lr: must be > 0 (got 0)",
        "optim.epochs: must be >= 1 (got 0)",
        "crops: must be 1, 3, 5 or 10 (got 4)",
    ]


def test_a_resolved_job_is_a_job():
    for one in job.load(["chain.yaml"]):
        again = job.load([write(json.dumps(one.document), f"{one.job.name}.yaml")])[0]
        assert again.document == one.document
    assert job.load(["tsm.yaml"])[0].document["data"]["card"]["name"] == "moving_shapes"


# ---------------------------------------------------------------------------------------------------------- --set


def values(field: str, *sets: str) -> dict[str, Any]:
    """The value at a dotted field of each job that has it."""
    out = {}
    for one in job.load(["chain.yaml"], sets):
        node: Any = one.document
        for key in field.split("."):
            node = node.get(key, "no") if isinstance(node, dict) else "no"
        if node != "no":
            out[one.job.name] = node
    return out


def test_set_reaches_the_documents_that_have_the_field():
    assert values("optim.lr", "optim.lr=0.5") == {"tsm": 0.5, "tsn": 0.5}
    assert values("optim.lr", "tsn:optim.lr=0.5") == {"tsm": 0.02, "tsn": 0.5}
    assert values("data.flip", "data.flip=false") == {"tsm": False, "tsn": False}
    assert values("data.size", "data.size=48") == {"data": 48, "tsm": 48, "tsn": 48}
    assert values("scale.workers", "scale.workers=1") == {"tsm": 1, "tsn": 1, "eval": 1}
    assert values("model.width", "model.width=0.25") == {"tsm": 0.25, "tsn": 0.25}


def test_set_does_not_give_a_section_to_documents_without_where_others_have_it(tmp_path):
    write("a.mp4 0\n", "train.txt")
    file = write(CHAIN.replace("card: moving_shapes", "card: my_clips").replace(", clips: 40", ""))
    loaded = job.load([file], [f"data.root={tmp_path}", "tsm:init.from=a", "init.exclude=[fc]"])
    assert [getattr(one.job.data, "root", None) for one in loaded] == [str(tmp_path), None, None, None]
    assert [one.job.init and one.job.init.exclude for one in loaded[1:3]] == [("fc",), None]


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("optm.lr=1", "--set optm.lr=1: no document has a field 'optm', did you mean 'optim'?"),
        ("optim.lrr=1", "optim.lrr: unknown field, did you mean 'lr'?"),
        ("tsmm:optim.lr=1", "--set tsmm:optim.lr=1: no document is named 'tsmm', did you mean 'tsm'?"),
        ("optim", "--set optim: must look like section.field=value"),
        ("tsm:optim", "--set optim: must look like section.field=value"),
        ("optim.lr.x=1", "--set optim.lr.x=1: 'lr' is a value and has no fields"),
        ("scale.workers=0", "scale.workers: must be >= 1 or must be a list (got 0)"),
        (
            "scale.storage_timeout_s=900",
            "scale.storage_timeout_s: must be below data_timeout_s (600), got 900: the ranks would give up waiting for "
            "data first",
        ),
        ("optim.lr=fast", "optim.lr: must be a valid number (got 'fast')"),
        ("name=a", "name: 'a' is used twice: each document needs a name of its own"),
        ("data.card=moving_shape", "data.card: there is no dataset card 'moving_shape', did you mean 'moving_shapes'?"),
    ],
)
def test_a_wrong_set_is_one_sentence(assignment, sentence):
    assert problems(assignment) == [sentence]


# ------------------------------------------------------------------------------------- network, batch, optimizer


@pytest.mark.parametrize(
    ("sets", "sentence"),
    [
        (["model.name=tsm_resnet19"], "model.name: unknown model 'tsm_resnet19', did you mean 'tsm_resnet18'? ("),
        (["tsm:model.wdith=1"], "model.wdith: tsm_resnet18 has no such option, did you mean 'width'?"),
        (["tsm:model.width=0"], "model.width: must be > 0 (got 0)"),
        (["tsm:model.width=wide"], "model.width: must be "),
        (["tsm:model.num_segments=0"], "model.num_segments: must be > 0 (got 0)"),
        (["tsm:model.place=here"], "model.place: must be blockres or block (got 'here')"),
        (["tsm:model.dropout=1"], "model.dropout: must be at least 0 and below 1 (got 1)"),
        (["tsm:model.num_classes=5"], "model.num_classes: is not an option here, the dataset defines it"),
        (["tsm:model.zero_gamma=true"], "model.zero_gamma: is not an option here, write optim.zero_gamma"),
        (["tsm:model.in_channels=2"], "model.in_channels: the clips have 3 channels (got 2)"),
        (["tsm:model={name: tsm_mobilenetv2, temporal_pool: true}"], "model.temporal_pool: needs a ResNet"),
        (["tsm:model={name: i3d_resnet50, num_segments: 4}"], "model.num_segments: 4 frames are too few for"),
        (["tsm:model={name: i3d_resnet50, inflation: 5x}"], "model.inflation: must be one of 3x1x1, "),
        (["tsm:model={name: tsm_resnet50_nl}", "tsm:data.size=16"], "model: tsm_resnet50_nl does not take clips of"),
        (["tsm:model.num_segments=65", "tsm:data.sampling=dense"], "model.num_segments: at most 64 frames with data"),
        (["tsm:data.size=15"], "data.size: must be >= 16 (got 15)"),
        (["tsm:data.resize=24"], "data.resize: must be at least size (32), got 24"),
        (["tsm:data.scales=[]"], "data.scales: must be numbers above 0 and at most 1, got []"),
        (["scale.workers=3"], "batch.total: 16 must be a multiple of scale.workers x batch.per_worker (3 x 4 = 12)"),
        (["optim.norm=sync"], "optim.norm: sync needs GPUs: set scale.gpus_per_worker, or use local"),
        (["optim.class_weights=[1, 2]"], "optim.class_weights: 2 weights, the dataset has 4 classes"),
        (["optim.class_weights=[1, 2, 3, -4]"], "optim.class_weights: must be numbers >= 0, at least one"),
        (["optim.class_weights=balance"], "optim.class_weights: must be a list or must be 'balanced' (got 'balance')"),
        (["tsm:init.from=gone.pth"], "init.from: gone.pth: no such weights: give a checkpoint file, a URL or"),
        (["tsm:init.from=tsn"], "init.from: runs: no run 'tsn'"),
        (["tsm:init.from=data"], "init.from: 'data' will hold a dataset, not a network or a supernet"),
    ],
)
def test_what_does_not_fit_is_one_sentence(sets, sentence):
    found = problems(*sets)
    assert len(found) == 1
    assert found[0].startswith(sentence)


def test_sync_norm_is_for_gpus():
    assert problems("optim.norm=sync", "scale.gpus_per_worker=1") == []


def test_a_network_for_points_is_refused_for_clips(monkeypatch):
    row = models.Model(lambda **_: None, "takes points", input="points")
    monkeypatch.setitem(models.MODELS, "some_cloud_net", row)
    assert problems("model.name=some_cloud_net") == ["model.name: some_cloud_net takes clouds, the dataset has clips"]


def test_a_network_for_clips_is_refused_for_points():
    card = "{name: clouds, layout: generated, sample: points, splits: {train: a, val: a}, classes: [a, b]}"
    said = problems(file=write(CHAIN.replace("card: moving_shapes", f"card: {card}")))
    assert "model.name: tsm_resnet18 takes clips, the dataset has clouds" in said


def test_balanced_weights_are_counted_in_the_training_index():
    optim = job.load(["chain.yaml"], ["optim.class_weights=balanced"])[1].job.optim
    table = index_table([{"path": str(i), "label": label} for i, label in enumerate([0, 0, 0, 1, 2, 2])])
    weights = stages.resolve_weights(optim, table, 4).class_weights
    assert weights == pytest.approx(learn.balanced_weights([0, 0, 0, 1, 2, 2], 4))
    assert weights == pytest.approx((6 / 11, 18 / 11, 9 / 11, 0))
    given = optim.model_copy(update={"class_weights": (1.0, 2.0)})
    assert stages.resolve_weights(given, table, 4) is given


def test_classes_of_points_are_not_balanced_by_counting_clouds():
    card = "{name: c, layout: generated, sample: points, labels: point, splits: {train: a, val: a}, classes: [a, b]}"
    text = CHAIN.replace("card: moving_shapes", f"card: {card}").replace("tsm_resnet18", "pointnet_cls")
    said = problems("optim.class_weights=balanced", file=write(text))
    assert "optim.class_weights: balanced counts samples, but here points have labels: write numbers" in said


def test_weights_to_start_from_are_looked_for_but_not_fetched():
    finish_chain(2)
    Path("w.pth").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    for source in ("tsm", "runs/tsm", "w.pth", "http://127.0.0.1:1/w.pth"):
        assert problems(f"tsn:init.from={source}") == [], source
    assert problems("tsn:init.from=w.pth", f"tsn:init.sha256={digest}") == []
    assert problems("tsn:init.from=w.pth", "tsn:init.sha256=ab")[0].startswith("init.from: w.pth: has SHA-256")
    assert problems("tsn:init.from=tms")[0] == "init.from: runs: no run 'tms', did you mean 'tsm'?"


def test_weights_of_a_job_ahead_will_be_there():
    assert problems("tsn:init.from=tsm") == []


# ----------------------------------------------------------------------------------------------------------- data


LIST_JOB = """
kind: train
name: mine
data: {{card: my_clips, root: {root}, size: 32}}
model: {{name: tsm_resnet18, width: 0.125, num_segments: 4}}
batch: {{total: 4, per_worker: 4}}
optim: {{lr: 0.02, reference_batch: 4, epochs: 2}}
"""


@pytest.fixture
def clips(tmp_path) -> str:
    """A job that reads six files of two classes named in lists."""
    root = tmp_path / "clips"
    root.mkdir()
    for i in range(6):
        (root / f"{i}.mp4").write_bytes(b"")
    (root / "train.txt").write_text("".join(f"{i}.mp4 {i % 2}\n" for i in range(5)))
    (root / "val.txt").write_text("5.mp4 1\n")
    return write(LIST_JOB.format(root=root))


def test_lists_say_how_many_classes_and_steps(clips):
    facts = check(file=clips, look=True)["mine"]
    assert (facts["problems"], facts["classes"], facts["train_samples"], facts["steps"]) == ([], 2, 5, 4)
    assert len(facts["fingerprint"].split("-")) == 2


def test_a_root_that_is_missing_is_named(tmp_path, clips):
    gone = problems("data.root=/nowhere", file=clips)
    assert gone == [
        "data.root: /nowhere/train.txt: no such file (split 'train' of my_clips): fix data.root or the card"
    ]
    facts = check("data.root=null", file=clips)["mine"]
    assert facts["problems"] == ["x.yaml (mine): data.root: is required, the folder where my_clips lies"]
    assert facts["input"] == [4, 3, 32, 32], "the network is looked at all the same"
    assert "params" not in facts, "how many classes there are is not known"


def test_files_that_are_not_there_are_found_by_looking(tmp_path, clips):
    (tmp_path / "clips/2.mp4").unlink()
    assert problems(file=clips) == []
    said = problems(file=clips, look=True)
    assert said == [f"data.root: a file of split 'train' is missing ({tmp_path}/clips/2.mp4)"]
    raw = write(f"kind: prepare\nname: raw\ndata: {{card: my_clips, root: {tmp_path}/clips}}\n", "raw.yaml")
    assert problems(file=raw, look=True) == [], "a file that is gone is quarantined by prepare"
    (tmp_path / "clips/5.mp4").unlink()
    said = problems(file=raw, look=True)
    assert said == [
        f"data.root: the files of split 'val' are missing ({tmp_path}/clips/5.mp4): fix data.root or the list"
    ]


def test_a_list_that_is_wrong_is_named_with_its_line(tmp_path, clips):
    (tmp_path / "clips/val.txt").write_text("5.mp4\n")
    assert "clips/val.txt line 1: 1 columns instead of 3" in problems(file=clips)[0]


@pytest.mark.parametrize(
    ("sets", "sentence"),
    [
        (["data.train=trian"], "data: data has no split 'trian', did you mean 'train'?"),
        (["tsm:data.run=tsn"], "data.run: runs: no run 'tsn', nor any other"),
        (["tsn:data.run=tsm"], "data.run: 'tsm' will hold a network, not a dataset"),
        (["tsm:data.card=moving_shapes"], "data: give either card (a dataset card) or run (a prepare run)"),
        (["tsm:data={size: 32}"], "data: give either card (a dataset card) or run (a prepare run)"),
        (["tsm:data={card: moving_shapes}"], "data: moving_shapes: is generated: set data.run to the"),
        (["data:pack={}"], "pack: moving_shapes is generated: leave it out"),
        (["data:data.root=/x"], "data.root: moving_shapes is generated: leave it out"),
        (["data:data.splits=[test]"], "data.splits: 'test' is not a split of moving_shapes (train, val)"),
    ],
)
def test_wrong_data_is_one_sentence(sets, sentence):
    assert any(text.startswith(sentence) for text in problems(*sets)), problems(*sets)


def test_the_data_of_a_finished_run_is_read():
    finish_chain(1)
    facts = check()
    assert facts["data"]["state"] == "finished"
    assert (facts["tsm"]["train_samples"], facts["tsm"]["steps"]) == (32, 6)
    assert facts["tsm"]["problems"] == []
    assert problems("data.train=trian") == ["data: moving_shapes has no split 'trian', did you mean 'train'?"]


def test_data_of_a_run_that_has_not_finished_or_is_no_prepare_is_refused():
    loaded = job.load(["chain.yaml"])
    finish(loaded[0], state="failed")
    finish_train(loaded[1])
    alone = write(CHAIN.split("---")[1])
    assert problems(file=alone) == [], "the run that reads it has finished, also without the data job in its file"
    assert problems("name=other", file=alone) == ["data.run: 'data' has not finished: run it first"]
    said = problems("name=other", "data.run=tsm", file=alone)
    assert said == ["data.run: 'tsm' holds a network, not a dataset"]


# ------------------------------------------------------------------------------------------------ state and storage


def test_check_tells_what_a_run_would_do():
    loaded = job.load(["chain.yaml"])
    finish_data(loaded[0])
    finish(loaded[1], state="failed")
    assert [one["state"] for one in check().values()] == ["finished", "resume", "new", "new"]
    said = problems("tsm:optim.lr=0.5")
    assert said == [
        "run 'tsm' exists with other settings (optim.lr: 0.02 -> 0.5): choose another name, or clear it with --restart"
    ]
    changed = job.load(["chain.yaml"], ["tsm:optim.lr=0.5"])
    assert [one["state"] for one in job.check(changed, "runs", restart=True)] == ["new"] * 4
    assert problems("tsm:scale.workers=1") == [], "may change"


def test_a_job_of_before_the_upgrade_is_the_same_job():
    loaded = job.load(["chain.yaml"])
    finish_data(loaded[0])
    finish(loaded[1], state="failed")
    for name in ("data", "tsm"):
        stored = runs.read_job(runs.open_run("runs", name))
        stored["data"]["card"] |= {"description": "of then", "source": "elsewhere", "licence": "another"}
        for section, field in (("optim", "zero_gamma"), ("checkpoint", "last"), ("data", "decode_timeout_s")):
            stored.get(section, {}).pop(field, None)  # there was none then
        stored.pop("seed", None)
        runs.write_job(runs.open_run("runs", name), stored)
    assert [one["state"] for one in check().values()][:2] == ["finished", "resume"]
    assert problems() == []
    assert "seed: 0 -> 3" in problems("tsm:seed=3")[0]


def test_a_run_that_another_process_writes_is_refused():
    loaded = job.load(["chain.yaml"])
    run = runs.open_run("runs", "data")
    with runs.hold(run):
        runs.begin(run, loaded[0].document, 1)
        assert problems()[0].startswith("run 'data' is being written by process ")


def test_a_finished_job_has_no_problems_any_more(tmp_path, clips):
    finish(job.load([clips])[0])
    (tmp_path / "clips/0.mp4").unlink()
    facts = check(file=clips, look=True)["mine"]
    assert (facts["state"], facts["problems"]) == ("finished", [])


def test_a_damaged_run_folder_is_one_sentence():
    finish(job.load(["chain.yaml"])[0], state="failed")
    for content, sentence in (
        ("[1]", "is not a lock"),
        ("{}", "is not a lock"),
    ):
        Path("runs/data/lock").write_text(content)
        assert sentence in problems()[0]
    Path("runs/data/lock").unlink()
    Path("runs/data/job.yaml").write_text("a: [")
    assert "runs/data/job.yaml: line 1: expected the node content" in problems()[0]


@pytest.mark.parametrize(
    ("storage", "sentence"),
    [
        ("s4://bucket/x", "s4://bucket/x: unknown storage 's4://'"),
        ("s3://key:secret@bucket/x", "credentials do not belong in a URI"),
        ("s3://", "s3://: names no bucket"),
        ("", "storage: the path is empty"),
    ],
)
def test_a_storage_that_cannot_be_is_one_sentence(storage, sentence):
    with pytest.raises(UserError) as caught:
        job.check(job.load(["chain.yaml"]), storage)
    assert sentence in str(caught.value)
    assert "secret" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------- evaluations


@pytest.mark.parametrize(
    ("sets", "sentence"),
    [
        ("eval:runs=[data]", "runs: 'data' will hold a dataset, not a network"),
        ("eval:runs=[tms]", "runs: runs: no run 'tms'"),
        ("eval:runs=[]", "runs: must have at least 1 item, not 0"),
        ("eval:runs=[tsm, tsm]", "runs: one is named twice (tsm, tsm)"),
        ("eval:frame_orders=[natural, natural]", "frame_orders: one is named twice (natural, natural)"),
        ("eval:clips=10", "clips: 10 is for dense sampling, but 'tsm' was trained with uniform"),
        ("eval:size=4", "size: must be >= 16 (got 4)"),
        ("eval:data={card: my_clips}", "data.root: is required, the folder where my_clips lies"),
        ("eval:data.card=nope", "data.card: there is no dataset card 'nope'"),
        ("eval:scale.workers=0", "scale.workers: must be >= 1 or must be a list (got 0)"),
    ],
)
def test_a_wrong_evaluation_is_one_sentence(sets, sentence):
    found = problems(sets)
    assert len(found) == 1
    assert found[0].startswith(sentence)


def test_runs_come_before_their_evaluation():
    parts = CHAIN.split("---")
    said = problems(file=write("---".join([parts[3], *parts[:3]])))
    assert said[0].startswith("runs: runs: no run 'tsm'")


def test_finished_runs_are_looked_at_without_their_weights():
    finish_chain(3)
    facts = check("eval:clips=2", "eval:crops=3")["eval"]
    assert (facts["problems"], facts["views"], facts["split"], facts["samples"]) == ([], 6, "val", 8)
    assert problems("eval:split=tset") == ["data: moving_shapes has no split 'tset' (known: train, val)"]
    assert problems("eval:clips=10")[0].startswith("clips: 10 is for dense sampling, but 't")


def test_runs_that_cannot_be_scored_are_named():
    finish_chain(3)
    loaded = job.load(["chain.yaml"])
    alone = write(CHAIN.split("---")[3])
    Path("runs/tsn/model/input.json").write_text('{"recipe": {}}')
    assert "runs/tsn/model/input.json is damaged ('classes'): train it again" in problems(file=alone)[0]
    Path("runs/tsn/model/weights.safetensors").unlink()
    assert problems(file=alone) == ["runs: 'tsn' has lost its model/weights.safetensors: train it again"]
    assert problems("runs=[data]", file=alone) == ["runs: 'data' holds a dataset, not a network or an export"]
    assert problems("runs=[tsm, ./runs/tsm]", file=alone) == [
        "runs: two of them are named 'tsm': score them separately"
    ]
    runs.clear(runs.open_run("runs", "tsn"))
    finish_train(loaded[2], ("a", "b", "c", "d"))
    assert problems(file=alone) == ["runs: 'tsn' has other classes than moving_shapes: score it separately"]
    runs.clear(runs.open_run("runs", "tsn"))
    finish(loaded[2], state="failed")
    assert problems(file=alone) == ["runs: 'tsn' has not finished: run it first"]


# ----------------------------------------------------------------------------------------------------- the schemas


def schema(path: str) -> jsonschema.Draft7Validator:
    document = json.loads((ROOT / path).read_text())
    jsonschema.Draft7Validator.check_schema(document)
    return jsonschema.Draft7Validator(document)


@pytest.mark.parametrize(
    ("path", "make"), [("jobs/schema.json", job.json_schema), ("datasets/card.schema.json", job.card_schema)]
)
def test_a_schema_is_up_to_date(path, make):
    assert json.loads((ROOT / path).read_text()) == make(), "run `make schema`"


@pytest.mark.parametrize("path", [*JOBS, *CARDS], ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_shipped_file_fits_its_schema(path):
    validator = schema("jobs/schema.json" if path in JOBS else "datasets/card.schema.json")
    for document in parse_yaml(path.read_text(), str(path)):
        validator.validate(json.loads(json.dumps(document)))


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        ({"name": "a"}, "'kind' is a required property"),
        ({"kind": "trian", "name": "a"}, "'trian' is not one of"),
        ({"kind": "evaluate", "name": "a"}, "'runs' is a required property"),
        ({"kind": "evaluate", "name": "a", "runs": ["b"], "epochs": 3}, "'epochs' was unexpected"),
        ({"kind": "train", "extends": "b", "optim": {"lrr": 1}}, "'lrr' was unexpected"),
        ({"kind": "train", "extends": "b", "optim": {"lr": 0}}, "0 is less than or equal to the minimum of 0"),
        ({"kind": "train", "extends": "b", "model": {"name": "tsm_resnet19"}}, "'tsm_resnet19' is not one of"),
        ({"kind": "train", "extends": "b", "model": {"wdith": 1}}, "'wdith' was unexpected"),
    ],
)
def test_the_schema_finds_what_is_wrong(document, complaint):
    assert any(complaint in error.message for error in schema("jobs/schema.json").iter_errors(document))


def test_a_document_that_extends_another_may_leave_out_what_is_required():
    for document in ({"extends": "a", "name": "b"}, {"kind": "train", "extends": "a", "name": "b", "optim": {"lr": 1}}):
        schema("jobs/schema.json").validate(document)


def test_the_schema_helps_with_the_words_of_the_docstrings():
    definitions = job.json_schema()["definitions"]
    assert definitions["OptimSpec"]["properties"]["epochs"]["description"] == "Passes over the training split."
    assert definitions["ModelSpec"]["properties"]["name"]["enum"] == list(models.MODELS)
    assert "Used by" in definitions["ModelSpec"]["properties"]["inflation"]["description"]
    assert "from" in definitions["InitSpec"]["properties"]


@pytest.mark.parametrize("spec", [*job.SPECS.values(), Card], ids=lambda spec: spec.__name__)
def test_every_field_is_documented(spec):
    for name, field in spec.model_fields.items():
        inner = job.section_of(field.annotation)
        if inner is not None:
            assert inner.__doc__
            test_every_field_is_documented(inner)
        elif name not in ("kind", "run"):
            assert field.description, f"{spec.__name__}.{name}"


SHRINK = """
kind: prepare
name: pictures
data: {card: image_shapes, clips: 60, size: 32}
---
kind: shrink
name: ofa
data: {run: pictures, size: 32}
model: {name: ofa_mobilenetv3, preset: tiny}
batch: {total: 8, per_worker: 8}
optim: {reference_batch: 8}
stages: [{name: teacher, epochs: 1, lr: 0.1}, {name: rest, epochs: 1, lr: 0.1, free: {kernel: [3, 5, 7]}}]
hold_out: 10
---
kind: search
name: found
supernet: ofa
strategy: {name: random, evaluations: 5}
targets: [{name: small, limits: {macs: 2.0e+6}}]
"""


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("size: 32}\nmodel", "size: 40}\nmodel", "data.size: must be 32, the largest resolution of the space (got 40)"),
        ("kernel: [3", "kernels: [3", "stages.rest.free: no dimension 'kernels', did you mean 'kernel'?"),
        ("kernel: [3, 5", "kernel: [3, 4", "stages.rest.free.kernel: 4 is not one of 3, 5, 7"),
        ("reference_batch: 8", "reference_batch: 8, lr: 1", "optim.lr: each stage has its own: write it there"),
        (
            "{macs: 2",
            "{flops: 2",
            "targets.small.limits: unknown cost 'flops' "
            "(known: energy_mj, int8_kb, latency_ms, macs, memory_mb, params, peak_kb)",
        ),
        ("hold_out: 10", "hold_out: 48", "hold_out: 48 of 48 training samples leave none to train on"),
        (
            "hold_out: 10",
            "hold_out: 0",
            "split: 'ofa' held out no samples (hold_out: 0): name a split, or shrink again",
        ),
        ("supernet: ofa", "supernet: pictures", "supernet: 'pictures' will hold a dataset, not a supernet"),
    ],
)
def test_what_does_not_fit_a_supernet_is_one_sentence(old, new, sentence):
    assert problems(file=write(SHRINK, "ofa.yaml")) == []
    assert sentence in problems(file=write(SHRINK.replace(old, new), "ofa.yaml"))


def test_a_subnet_is_trained_at_its_own_resolution_and_overwrites_no_run():
    arch = {"kernel": [3] * 9, "expand": [3] * 9, "depth": [2] * 3, "resolution": 24}
    train = f"""
kind: train
name: tuned
data: {{run: pictures, size: 32}}
model: {{name: ofa_mobilenetv3, preset: tiny, arch: {json.dumps(arch)}}}
batch: {{total: 8, per_worker: 8}}
optim: {{lr: 0.1, reference_batch: 8, epochs: 1}}
"""
    text = SHRINK.partition("---")[0] + "---" + train
    assert problems(file=write(text)) == ["data.size: must be 24, the resolution of model.arch (got 32)"]
    assert problems(file=write(text.replace("size: 32}\nmodel", "size: 24}\nmodel"))) == []
    runs.begin(runs.open_run("runs", "found-small"), {"kind": "train", "name": "found-small"}, 1)
    said = "targets.small: there is a run 'found-small' already: choose another name"
    assert problems(file=write(SHRINK, "ofa.yaml")) == [said]


def test_check_says_how_many_clips_are_shorter_than_what_is_taken(clips):
    root = Path(clips).parent.resolve() / "clips"
    (root / "train.txt").write_text("".join(f"{i}.mp4 {frames} {i % 2}\n" for i, frames in enumerate([7, 8, 1, 9, 30])))
    (root / "val.txt").write_text("5.mp4 8 1\n")
    splits = "splits: {train: train.txt, val: val.txt}"
    columns = f"data.card={{name: short, layout: list, {splits}, columns: [path, frames, label]}}"
    (facts,) = check(columns, "model.num_segments=8", file=clips).values()
    assert facts["notes"] == [
        "train: 2 of 5 clips have 7 frames or fewer (1 only one): 8 are taken, some several times"
    ]
    (facts,) = check(columns, "model.num_segments=8", "data.short_clips=published", file=clips).values()
    assert facts["notes"] == [
        "train: 3 of 5 clips have 8 frames or fewer (1 only one): 8 are taken, which may make stills",
        "val: 1 of 1 clips have 8 frames or fewer: 8 are taken, which may make stills",
    ]
    (facts,) = check(columns, "model.num_segments=1", file=clips).values()
    assert "notes" not in facts
