"""The command line as a user types it: output, content of `--json`, exit codes, and never a traceback."""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import typer
from tests.test_job import CARDS, CHAIN, JOBS, ROOT, finish, finish_chain
from tests.waits import patience

import slimray
from slimray import job, runs
from slimray.cli import look, main
from slimray.data.video import moving_shapes
from slimray.train.spec import OptimSpec


@dataclass(frozen=True)
class Done:
    """Exit code and output of a command."""

    code: Any
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


Shell = Callable[..., Done]


@pytest.fixture
def shell(tmp_path, monkeypatch, capsys) -> Shell:
    """`shell("check", "x.yaml")` does what `slimray check x.yaml` does, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLIMRAY_STORAGE", raising=False)
    (tmp_path / "chain.yaml").write_text(CHAIN)

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["slimray", *arguments])
        code: Any = 0
        try:
            main.main()
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return Done(code, printed.out, printed.err)

    return run


# --------------------------------------------------------------------------------------------------------- the verbs


def test_the_version_and_the_help_are_quick_to_come(shell):
    assert shell("--version").out == f"slimray {slimray.__version__}\n"
    for verb in ("run", "check", "init", "evaluate", "predict", "runs", "show", "explain", "schema"):
        assert verb in shell("--help").out
        done = shell(verb, "--help")
        assert (done.code, done.err) == (0, "")
    code = "import sys; from slimray import cli; print({'torch', 'ray', 'pyarrow'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("rum", "No such command 'rum'. Did you mean 'run'?"),
        ("check", "Missing argument 'FILE...'"),
        ("check --sett a=b chain.yaml", "No such option: --sett"),
        ("check gone.yaml", "gone.yaml: no such file (`slimray init DIR` writes examples to start from)"),
        ("check .", ".: cannot be read (is a directory)"),
        ("check chain.yaml --set tsm:optim.lrr=1", "chain.yaml (tsm): optim.lrr: unknown field, did you mean 'lr'?"),
        ("check chain.yaml --set tsm:model.width=0", "chain.yaml (tsm): model.width: must be > 0 (got 0)"),
        ("check chain.yaml --storage s4://x", "s4://x: unknown storage 's4://'"),
        ("run chain.yaml --set tsm:model.width=0", "chain.yaml (tsm): model.width: must be > 0 (got 0)"),
        ("run chain.yaml --set tsm:init.from=gone.pth", "chain.yaml (tsm): init.from: gone.pth: no such weights"),
        ("evaluate gone", "no run 'gone'"),
        ("evaluate ./gone", "./gone: is not a run (it has neither status.json nor job.yaml)"),
        ("predict gone a.mp4", "no run 'gone'"),
        ("predict gone a.mp4 --top 0", "Invalid value for '--top'"),
        ("show gone", "no run 'gone'"),
        ("show ../gone/", "is not a run"),
        ("explain trian", "unknown topic 'trian', did you mean 'train'?"),
        ("explain train.optm", "explain train: has no field 'optm', did you mean 'optim'?"),
        ("explain train.optim.lr.x", "explain train.optim.lr: is a value and has no fields"),
        ("explain models.tsm_resnet19", "unknown model 'tsm_resnet19', did you mean 'tsm_resnet18'?"),
    ],
)
def test_a_mistake_is_one_sentence_and_code_2(shell, command, sentence):
    done = shell(*shlex.split(command))
    assert done.code == 2
    assert sentence in done.err.splitlines()[-1]
    assert not Path("runs").exists(), "nothing was written"


# ----------------------------------------------------------------------------------------------------- init and check


def test_init_copies_what_one_starts_from(shell):
    done = shell("init", "my demo")
    assert done.out == (
        "next: cd 'my demo' && slimray check jobs/quickstart.yaml && slimray run jobs/quickstart.yaml\n"
    )
    assert {path.name for path in Path("my demo/jobs").iterdir()} == {path.name for path in JOBS} | {"schema.json"}
    assert {path.name for path in Path("my demo/datasets").iterdir()} == (
        {path.name for path in CARDS} | {"card.schema.json"}
    )
    os.chdir("my demo")
    assert shell("check", "jobs/quickstart.yaml").code == 0
    again = shell("init", ".")
    assert (again.code, again.err) == (2, f"jobs/{JOBS[0].name}: already exists, choose an empty folder\n")
    Path("file").write_text("")
    assert shell("init", "file").err == "file/jobs: not a directory\n"


def test_check_prints_what_is_known_and_then_what_is_wrong(shell):
    done = shell("check", "chain.yaml")
    assert (done.code, done.err) == (0, "")
    flat = re.sub(r"[^\S\n]+", " ", done.out.replace("│", ""))
    for line in ("tsm (train)", "macs 3,367,936", "input 4 x 3 x 32 x 32", "peak lr 0.04", "steps 6", "runs tsm, tsn"):
        assert line in flat, flat
    wrong = shell("check", "chain.yaml", "--set", "tsm:init.from=gone.pth")
    assert wrong.code == 2
    assert "params" in wrong.out
    assert len(wrong.err.splitlines()) == 1


def test_check_as_json_is_json_also_when_something_is_wrong(shell):
    facts = shell("check", "chain.yaml", "--json").json()
    assert [(one["name"], one["kind"], one["problems"]) for one in facts] == [
        ("data", "prepare", []),
        ("tsm", "train", []),
        ("tsn", "train", []),
        ("eval", "evaluate", []),
    ]
    assert facts[1]["peak_lr"] == pytest.approx(0.04)
    wrong = shell("check", "chain.yaml", "--json", "--set", "tsm:init.from=gone.pth")
    assert wrong.code == 2
    assert wrong.json()[1]["problems"] == wrong.err.splitlines()


def test_the_storage_is_that_of_the_option_or_of_the_environment(shell, monkeypatch):
    assert "no runs in runs" in shell("runs").out
    monkeypatch.setenv("SLIMRAY_STORAGE", "elsewhere")
    assert "no runs in elsewhere" in shell("runs").out
    assert "no runs in there" in shell("runs", "--storage", "there").out


# -------------------------------------------------------------------------------------------- runs that are there


def test_finished_jobs_are_skipped_and_their_numbers_shown(shell):
    finish_chain()
    finish(job.load(["chain.yaml"])[3], {"rows": [{"run": "tsm", "variant": "natural", "top1": 62.5, "macs": 7}]})
    done = shell("run", "chain.yaml")
    assert (done.code, done.err.splitlines()) == (
        0,
        [f"{name}: already finished, skipped" for name in ("data", "tsm", "tsn", "eval")],
    )
    assert "62.50" in done.out
    rows = shell("run", "chain.yaml", "--json").json()
    assert [(row["name"], row["result"]) for row in rows] == [
        (name, "skipped") for name in ("data", "tsm", "tsn", "eval")
    ]
    assert rows[1]["metrics"]["best"]["val/top1"] == 50.0
    again = shell("evaluate", "tsm", "tsn", "--name", "eval", "--json")
    assert again.json()["rows"][0]["top1"] == 62.5
    other = shell("evaluate", "tsm", "--name", "eval")
    assert other.code == 2
    assert 'run \'eval\' exists with other settings (runs: ["tsm", "tsn"] -> ["tsm"]): choose another' in other.err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("data", "evaluate (data-eval): runs: 'data' holds a dataset, not a network"),
        (
            "./runs/tsm --set clips=10",
            "evaluate (tsm-eval): clips: 10 is for dense sampling, but 'tsm' was trained with",
        ),
        ("tsm --set split=tset", "evaluate (tsm-eval): data: moving_shapes has no split 'tset'"),
        ("tsm --set clip=2", "--set clip=2: no document has a field 'clip', did you mean 'clips'?"),
        ("tsm --set data.card=my_clips", "evaluate (tsm-eval): data.root: is required, the folder where my_clips lies"),
        ("tsm --set data.card=nope", "evaluate (tsm-eval): data.card: there is no dataset card 'nope'"),
        ("tsm tsm", "evaluate (tsm-eval): runs: one is named twice (tsm, tsm)"),
        ("tsm --name a/b", "evaluate (a/b): name: run name 'a/b': letters, digits"),
    ],
)
def test_an_evaluation_is_checked_like_one_of_a_file(shell, options, sentence):
    finish_chain(2)
    done = shell("evaluate", *shlex.split(options))
    assert done.code == 2
    assert done.err.startswith(sentence)


@pytest.mark.ray
def test_a_run_that_fails_says_where_its_log_is_and_how_it_is_resumed(no_ray, shell):
    finish_chain(2)
    damaged = Path("runs/tsm/model/weights.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-8])
    done = shell("evaluate", "tsm")
    assert done.code == 2  # a damaged file stays damaged: no retry
    assert re.fullmatch(
        r"evaluate \(tsm-eval\): .+ \(logs: .*/runs/tsm-eval/logs; the same command resumes the run\)\n", done.err
    )
    assert "Traceback" in Path("runs/tsm-eval/logs/0001-driver.log").read_text()
    shown = shell("show", "tsm-eval").out
    assert "state: failed" in shown
    assert "runs/tsm-eval/logs (the command that started it resumes it)" in shown


def test_runs_are_listed_also_beside_damaged_ones(shell):
    finish_chain(2)
    Path("runs/other").mkdir()
    for name, file, content in (
        ("a", "status.json", "{"),
        ("b", "status.json", "[1]"),
        ("c", "card.json", "[1]"),
        ("d", "job.yaml", "a: ["),
    ):
        shutil.copytree("runs/tsm", f"runs/{name}")
        Path(f"runs/{name}/{file}").write_text(content)
    rows = shell("runs", "--json").json()
    assert {row["name"]: row["state"] for row in rows} == {
        **dict.fromkeys("abcd", "damaged"), "data": "finished", "tsm": "finished",
    }  # fmt: skip
    assert next(row["result"] for row in rows if row["name"] == "tsm") == "top1 50.0 %"
    table = shell("runs")
    assert (table.code, table.err) == (0, "")
    assert next(row["message"] for row in rows if row["name"] == "b").endswith(
        "status.json: is not the status of a run"
    )
    for name in "abcd":
        assert "state: damaged" in shell("show", name).out


def test_a_run_is_shown_with_its_numbers_and_its_report(shell, monkeypatch):
    finish_chain(2)
    assert "report: none yet" in shell("show", "tsm").out
    assert shell("show", "tsm", "--open").err.endswith("there is no report yet, it is written when the run finishes\n")
    runs.write_report(runs.open_run("runs", "tsm"), "<p>")
    opened: list[str] = []
    monkeypatch.setattr(look.webbrowser, "open", opened.append)
    done = shell("show", "./runs/tsm", "--open")
    assert done.code == 0
    assert "50.00" in done.out
    assert f"report: {Path.cwd()}/runs/tsm/report.html" in done.out
    assert opened == [Path("runs/tsm/report.html").resolve().as_uri()]
    shown = shell("show", "tsm", "--json").json()
    assert (shown["state"], shown["card"]["metrics"]["best"]["epoch"]) == ("finished", 2)


def test_a_run_that_has_not_finished_shows_how_far_it_is(shell):
    finish_chain(1)
    run = finish(job.load(["chain.yaml"])[1], state="failed")
    with contextlib.closing(runs.PartWriter(run, "metrics", 1, 0)) as writer:
        for step in range(1, 4):
            writer.write({"step": step, "phase": "train", "epoch": step / 2, "train/loss": 1 / step, "time/step_s": 1})
        writer.write({"step": 3, "phase": "val", "epoch": 1, "val/top1": 37.5})
    done = shell("show", "tsm")
    assert "state: failed\nmessage: it broke\n" in done.out
    assert "train: epoch 1.50, loss 0.3333\nval: epoch 1.00, top1 37.5\n" in done.out
    assert shell("show", "tsm", "--json").json()["latest"]["train"]["step"] == 3
    Path("runs/tsm/metrics").joinpath(runs.list_names(run, "metrics")[-1]).write_text("[1]\n")
    assert shell("show", "tsm").code == 0


def test_names_with_brackets_are_text(shell):
    assert "[bold]x: no such file" in shell("check", "[bold]x").err
    assert "no runs in [red]:smile:" in shell("runs", "--storage", "[red]:smile:").out


# -------------------------------------------------------------------------------------------------------- predict


@pytest.fixture
def clip(tmp_path) -> str:
    (tmp_path / "my clip.mp4").write_bytes(moving_shapes.encode_h264(moving_shapes.make_clip(0, 0)[0]))
    return "my clip.mp4"


def test_clips_are_classified_where_ray_is_not_installed(shell, clip):
    finish_chain(2)
    code = "import sys; sys.modules['ray'] = None; from slimray.cli import main; main.main()"
    command = [sys.executable, "-c", code, "predict", "tsm", clip, "--top", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience(60))
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"my clip.mp4: (\w+ [\d.]+ %  ){2}\w+ [\d.]+ %\n", done.stdout)


def test_files_that_cannot_be_read_are_named_and_the_others_answered(shell, clip):
    finish_chain(2)
    Path("text.mp4").write_text("no video")
    Path("empty").mkdir()
    done = shell("predict", "tsm", "gone.mp4", clip, "text.mp4", "empty", "--json")
    assert (done.code, done.err) == (2, "3 of 4 files could not be read; the reasons are above\n")
    rows = done.json()
    assert [row["file"] for row in rows] == ["gone.mp4", clip, "text.mp4", "empty"]
    assert [len(row["top"]) for row in rows] == [0, 4, 0, 0]
    assert (rows[0]["reason"], rows[3]["reason"]) == ("no such file", "is a folder without clips")
    assert sum(p for _, p in rows[1]["top"]) == pytest.approx(1)
    plain = shell("predict", "tsm", "gone.mp4", clip)
    assert plain.out.startswith("gone.mp4: no such file\nmy clip.mp4: ")


def test_a_folder_stands_for_its_samples(shell, clip):
    finish_chain(2)
    for name in ("films/b.mp4", "films/inner/a.MP4", "films/.hidden/c.mp4", "films/notes.txt", "shots/1.jpg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(Path(clip).read_bytes())
    rows = shell("predict", "tsm", "films", "--json").json()
    assert [row["file"] for row in rows] == ["films/b.mp4", "films/inner/a.MP4"]
    assert [len(row["top"]) for row in rows] == [4, 4]
    done = shell("predict", "tsm", "shots")
    assert "shots: is a folder of pictures: to make a clip, name them by number and put them into a .zip" in done.out


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("weights.safetensors", "x"),
        ("weights.safetensors", None),
        ("model.json", '{"name": "tsm_resnet18"}'),
        ("model.json", '{"name": "tsm_resnet18", "num_classes": 3}'),
        ("input.json", "{}"),
        ("input.json", "[1]"),
    ],
)
def test_a_damaged_model_is_one_sentence(shell, clip, file, content):
    finish_chain(2)
    path = Path("runs/tsm/model", file)
    path.unlink() if content is None else path.write_text(content)
    done = shell("predict", "tsm", clip)
    assert done.code == 2
    assert done.err.startswith(f"{Path.cwd()}/runs/tsm")
    assert len(done.err.splitlines()) == 1


def test_a_network_whose_weights_are_not_numbers_answers_nothing(shell, clip):
    finish_chain(2)
    run = runs.open_run("runs", "tsm")
    weights, model, taken = runs.read_model(run)
    tensors = safetensors.torch.load(weights)
    tensors["base_model.bn1.weight"][0] = float("nan")
    runs.write_model(run, safetensors.torch.save(tensors), model, taken)
    done = shell("predict", "tsm", clip, "--json")
    assert (done.code, done.out) == (2, "")
    assert "1 of 122 tensors hold NaN (base_model.bn1.weight), as after a training that diverged" in done.err


def test_check_opens_the_weights_that_a_training_starts_from(shell):
    finish_chain(2)
    weights, _, _ = runs.read_model(runs.open_run("runs", "tsm"))
    Path("cut.pth").write_bytes(weights[: len(weights) // 2])
    tensors = safetensors.torch.load(weights)
    names = [name for name in tensors if ".layer2." in name and name.endswith("weight")][:3]
    safetensors.torch.save_file({k: v for k, v in tensors.items() if k not in names}, "less.safetensors")
    tensors["base_model.bn1.weight"][0] = float("nan")
    safetensors.torch.save_file(tensors, "nan.safetensors")
    for name, said in (
        ("cut.pth", "is not a checkpoint that can be read safely, or is truncated"),
        ("less.safetensors", "3 weights of this network are not in the file, which has others like them ("),
        ("nan.safetensors", "base_model.bn1.weight holds 1 values that are not finite numbers"),
    ):
        tsm = next(part for part in CHAIN.split("---") if "name: tsm\n" in part)
        Path("fine.yaml").write_text(tsm.replace("name: tsm\n", f"name: fine\ninit: {{from: {name}}}\n"))
        done = shell("check", "fine.yaml")
        assert done.code == 2
        assert "init.from: " in done.err
        assert said in done.err
        assert not name.startswith("less") or all(missing in done.err for missing in names)


def test_a_run_without_a_model_is_one_sentence(shell, clip):
    finish_chain(1)
    done = shell("predict", "data", clip)
    assert done.code == 2
    assert "runs/data: has no model: it is not a training run, or it has not finished" in done.err


# ------------------------------------------------------------------------------------------------- explain, schema


def topics() -> Iterator[str]:
    """Return all topics that can be explained: kinds and their sections, the card, the models."""
    yield from (*job.SPECS, "card", "models", "models.tsm_resnet18", "models.i3d_resnet50", "train.optim.lr")
    for kind, spec in job.SPECS.items():
        yield from (f"{kind}.{name}" for name, f in spec.model_fields.items() if job.section_of(f.annotation))


@pytest.mark.parametrize("topic", topics())
def test_every_topic_is_explained(shell, topic):
    done = shell("explain", topic)
    assert (done.code, done.err) == (0, "")
    rows = shell("explain", topic, "--json").json()
    assert rows
    assert all(str(value) in done.out for row in rows for value in row.values() if len(str(value)) < 20)
    assert "typing" not in done.out
    assert "<class" not in done.out


def test_what_is_explained_is_in_the_words_of_the_user(shell):
    fields = {row["field"]: row for row in shell("explain", "train.optim", "--json").json()}
    assert fields["lr"] == {
        "field": "lr",
        "type": "number",
        "default": "required",
        "meaning": OptimSpec.model_fields["lr"].description,
    }
    assert (fields["optimizer"]["type"], fields["optimizer"]["default"]) == ("sgd | adam | adamw | lars", "sgd")
    assert (fields["class_weights"]["type"], fields["class_weights"]["default"]) == (
        "list of number | balanced | null",
        "null",
    )
    assert fields["zero_gamma"]["default"] == "false"
    assert shell("explain", "train.init", "--json").json()[0]["field"] == "from"
    assert "num_classes" not in {row["option"] for row in shell("explain", "models.tsm_resnet18", "--json").json()}
    assert [row["what"] for row in shell("explain", "--json").json()] == [*job.SPECS, "card", "models", "tasks"]


def test_the_schemas_are_printed(shell):
    assert shell("schema").json() == job.json_schema()
    assert shell("schema", "--card").json() == job.card_schema()


# ---------------------------------------------------------------------------------- what the README and headers say


def commands() -> list[str]:
    """Return every `slimray ...` command in the README and in the headers of the shipped jobs."""
    lines = []
    readme = ROOT / "README.md"
    for block in re.findall(r"^```\w*\n(.*?)^```", readme.read_text() if readme.exists() else "", re.M | re.S):
        lines += block.splitlines()
    for path in JOBS:
        lines += [line.partition("# command: ")[2] for line in path.read_text().splitlines()]
    pieces = [piece.strip() for line in lines for piece in re.split(r"\s{2,}|&&|\||;|>|#|\s\(", line)]
    return list(dict.fromkeys(piece for piece in pieces if piece.startswith("slimray ")))


@pytest.mark.parametrize("command", commands())
def test_a_documented_command_exists_with_its_options(command):
    group: Any = typer.main.get_command(main.app)
    with group.make_context("slimray", [], resilient_parsing=True) as context:
        name, verb, rest = group.resolve_command(context, shlex.split(command)[1:])
        assert verb is not None
        verb.make_context(name, rest, parent=context)  # raises for unknown options and arguments
    for file in (word for word in shlex.split(command) if word.startswith("jobs/") and word.endswith(".yaml")):
        assert (ROOT / file).is_file()


# ------------------------------------------------------------------------------------------------------- installed


def test_the_command_is_a_module_too():
    done = subprocess.run([sys.executable, "-m", "slimray.cli", "explain", "trian"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "unknown topic 'trian', did you mean 'train'?\n"


def test_a_reader_that_has_enough_is_no_error():
    line = f"{sys.executable} -m slimray.cli schema | head -c 10"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ('{\n  "$sche', "")


def test_a_wheel_brings_the_examples_along(tmp_path):
    for part in ("platform", "jobs", "datasets", "cluster"):
        shutil.copytree(
            ROOT / part, tmp_path / part, symlinks=True, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__")
        )
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tmp_path)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "-w", tmp_path, tmp_path]
    subprocess.run(command, check=True, timeout=patience(120))
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    for path in (*JOBS, *CARDS, ROOT / "jobs/schema.json", ROOT / "datasets/card.schema.json"):
        assert f"slimray/examples/{path.parent.name}/{path.name}" in names
    for file in ("aws.yaml", "local.yaml", "Dockerfile", "prometheus.yml", "grafana/training.json"):
        assert f"slimray/examples/cluster/{file}" in names
    assert "slimray/report/report.html.j2" in names


def test_what_a_folder_or_a_server_says_cannot_steer_the_terminal(shell):
    from slimray.cli import terminal

    title, link = "\x1b]0;owned\x07", "\x1b]8;;http://evil.example\x1b\\here\x1b]8;;\x1b\\"
    log = f"{title}{link}\x1b[2J\x1b[1;31mred\x1b[0m\x9b5n\r 10 %\ttab\n"
    assert terminal.clean_log(log) == "here\x1b[1;31mred\x1b[0m5n\r 10 %\ttab\n"
    done = shell("show", f"no{title}\x1b[2Jsuch")
    assert done.code == 2
    assert "\x1b]" not in done.out + done.err
    assert "\x1b[2J" not in done.out + done.err
    run = runs.open_run("runs", "loud")
    runs.begin(run, {"kind": "train", "name": "loud"}, 1)
    runs.end(run, "failed", f"cut off{title}\x1b[2J")
    done = shell("runs")
    assert (done.code, "cut off" in done.out) == (0, True)
    assert "\x1b" not in done.out


def test_examples_are_not_written_through_a_link_that_leads_nowhere(shell, tmp_path):
    folder = tmp_path / "demo"
    (folder / "jobs").mkdir(parents=True)
    (folder / "jobs/quickstart.yaml").symlink_to(tmp_path / "elsewhere.yaml")
    done = shell("init", str(folder))
    assert (done.code, "quickstart.yaml: already exists" in done.err) == (2, True)
    assert not (tmp_path / "elsewhere.yaml").exists()
