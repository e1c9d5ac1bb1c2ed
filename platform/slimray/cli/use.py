"""`slimray predict`, `micronet`, `profile`: answers of a finished network for files, its score, its measured costs."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from slimray.cli.jobs import fact
from slimray.cli.look import DAMAGED
from slimray.cli.terminal import AsJson, Storage, console, emit, say, storage_of
from slimray.cli.texts import answer_lines
from slimray.data.modalities import IMAGES, Modality, modality_of
from slimray.spec import UserError, located, set_value

app = typer.Typer()


@app.command()
def predict(
    name: Annotated[
        str,
        typer.Argument(help="A finished training run or an export, by name, URI or folder.", metavar="RUN_OR_EXPORT"),
    ],
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Videos, images, point clouds, or folders of them; text files, or - to type text.", metavar="FILE..."
        ),
    ],
    top: Annotated[int, typer.Option(help="Classes shown per file.", min=1)] = 5,
    columns: Annotated[
        str | None,
        typer.Option(
            help='Of point files: "x y z nx ny nz r g b"; "-" skips one; label=NAME, decimal=comma, delimiter=tab.'
        ),
    ] = None,
    shape: Annotated[
        int | None, typer.Option(help="Class of the clouds, from 0, for a network trained with one_hot.", min=0)
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for the labels of points. Default: beside each file.")
    ] = None,
    format_: Annotated[
        str | None, typer.Option("--format", help="Predict with the run's export of this format, such as onnx.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Options for text: beam=8, max_length=100, max_tokens=30.")
    ] = None,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Print the best classes of each clip, image or cloud with probabilities. Needs no Ray; an export needs no torch.

    A network that labels points writes NAME.labels.npz and NAME.labels.ply, and the share of points of each class is
    printed. An online network is stepped through the frames of a video that it was trained to take, and its scores are
    averaged. A text network answers line by line as lines arrive: it translates each, or continues it.
    """
    from slimray.runtime.answers import Answer

    given: dict[str, Any] = {}
    for assignment in set_ or []:
        set_value(given, assignment)
    answering = _answering(name, storage_of(storage), format_, given)
    if answering.line is not None:
        if columns or shape is not None or folder is not None:
            raise UserError("--columns, --shape, --out: do not apply to text, whose answers are printed")
        answer_lines(answering.line, files, as_json)
        return
    answers_of, modality = answering.files, modality_of(answering.recipe)
    files, reasons = _files_in(files, modality)
    there = [path for path in files if path not in reasons]
    names = (columns or "").replace(",", " ").split()
    answers = answers_of(there, top, columns=names, shape=shape, out=folder)
    rows: list[dict[str, Any]] = []
    for path in files:
        found = next(answers) if path in there else Answer(path, reason=reasons[path])
        written = [str(one) for one in found.written]
        row = {"file": str(path), "top": found.top, "reason": found.reason, "written": written}
        rows.append(row | ({"notes": found.notes} if found.notes else {}))
        if not as_json:
            say(f"{path}: {found.reason or '  '.join(f'{label} {100 * p:.1f} %' for label, p in found.top)}")
        if found.notes and not as_json:
            say(f"  {found.notes}")
        if written and not as_json:
            say(f"  {found.what}: {', '.join(written)}")
    if as_json:
        emit(rows)
    bad = sum(bool(row["reason"]) for row in rows)
    if bad:
        raise UserError(f"{bad} of {len(rows)} files could not be read; the reasons are above")


@dataclass(frozen=True)
class _Answering:
    """The functions that answer for files, or for a line of text, and the recipe of their network."""

    files: Callable[..., Iterator[Any]]
    recipe: Mapping[str, Any]
    line: Callable[[str], str] | None = None


def _answering(name: str, where: str, format: str | None, given: Mapping[str, Any]) -> _Answering:
    """Return the functions that answer, and their recipe.

    They run an export if `name` is one, if `format` is given or if the run holds nothing else, and otherwise the
    network of the run. `given` are the options of beam search and the like.
    """
    from slimray import runs
    from slimray.runtime import folder, loaded

    if format is not None or folder.is_export(name):
        export = loaded.load(name, storage=where, format=format).searching(given, "--set")
        return _Answering(export.answers, export.recipe, export.line)
    if name.endswith(".slim"):
        return _slim_answering(name, given)
    run = runs.find_run(name, where)
    if not runs.exists(run, "model/model.json") and folder.exports_of(run):
        export = loaded.load(run.uri, storage=where).searching(given, "--set")
        return _Answering(export.answers, export.recipe, export.line)
    from safetensors import SafetensorError

    from slimray.tasks.network import load_network

    try:
        network = load_network(run)
    except UserError as error:
        raise UserError(located(str(error), run.uri)) from None
    except (RuntimeError, SafetensorError, FileNotFoundError, *DAMAGED) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{run.uri}/model: is damaged or of another version ({reason}), train it again") from None
    return _network_answering(network, given)


def _network_answering(network: Any, given: Mapping[str, Any]) -> _Answering:
    from slimray.tasks.predict import answer_lines, predict_files, searching

    network = searching(network, given, "--set")
    return _Answering(functools.partial(predict_files, network), network.recipe, answer_lines(network))


def _slim_answering(name: str, given: Mapping[str, Any]) -> _Answering:
    """Return the functions that answer with the network of a `model.slim` at a path or URI, and their recipe."""
    from slimray import storage
    from slimray.tasks.network import load_slim

    fs, path = storage.open_uri(name)
    try:
        network = load_slim(storage.read_bytes(fs, path), name)
    except FileNotFoundError:
        raise UserError(f"{name}: no such file") from None
    except (RuntimeError, *DAMAGED) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name}: is damaged or of another version ({reason}), compress it again") from None
    return _network_answering(network, given)


def _files_in(paths: list[Path], modality: Modality) -> tuple[list[Path], dict[Path, str]]:
    """Return the files to read, with folders replaced by the samples in them, and why the others cannot be read."""
    files: list[Path] = []
    reasons: dict[Path, str] = {}
    for path in paths:
        if not path.is_dir():
            files.append(path)
            if not path.is_file():
                reasons[path] = "no such file" if not path.exists() else "is not a file"
            continue
        names = sorted(one.relative_to(path) for one in path.rglob("*") if one.suffix.lower() in modality.endings)
        found = [path / name for name in names if not any(part.startswith(".") for part in name.parts)]
        pictures = modality.segmented and bool(found) and all(one.suffix.lower() in IMAGES for one in found)
        if pictures or not found:
            files.append(path)
            reasons[path] = f"is a folder without {modality.plural}"
            if pictures:
                reasons[path] = "is a folder of pictures: to make a clip, name them by number and put them into a .zip"
        else:
            files += found
    return files, reasons


@app.command()
def micronet(
    what: Annotated[
        str, typer.Argument(help="A finished run of micronet_lm, or `submitted`.", metavar="RUN")
    ] = "submitted",
    shares: Annotated[
        str | None, typer.Option(help="Shares of words in the tails: 0.14,0.05. Default: every word uses all tails.")
    ] = None,
    all_heads: Annotated[bool, typer.Option("--all-heads", help="Count every head, not one of each layer.")] = False,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Print the score of the MicroNet challenge: what is stored and computed for a word, component by component.

    `submitted` is the best submission, scored by the sparsities that its pruning aimed at. A run is scored by its own
    zeros and bits.
    """
    from dataclasses import replace

    from slimray.edge import micronet_score as scores
    from slimray.models.text.micronet import PRESETS, MicroNetLM

    if what == "submitted":
        counting = replace(scores.submitted(), all_heads=all_heads)
        found = scores.micronet_score(PRESETS["wikitext103"], 267_735, scores.SUBMITTED_CACHE, counting)
    else:
        from slimray.tasks.network import load_network
        from slimray.verbs import inputs

        run = inputs.finished_run(what, storage_of(storage), ("network",), f"micronet {what}")
        net = load_network(run).net
        if not isinstance(net, MicroNetLM):
            raise UserError(f"micronet {what}: must be a run of micronet_lm")
        tails = len(net.shape.cutoffs)
        try:
            given = [float(word) for word in shares.split(",")] if shares else [1.0] * tails
            counting = scores.counting_of(net, given, all_heads=all_heads)
            found = scores.micronet_score(net.shape, net.vocab_size, net.cache, counting)
        except ValueError:
            raise UserError(f"--shares {shares}: must be {tails} numbers separated by commas, one per tail") from None
    rows = [vars(term) for term in found.terms]
    totals = {"storage": found.storage, "operations": found.operations, "score": found.score}
    if as_json:
        emit({"terms": rows} | totals)
        return
    for row in rows:
        say("  ".join([f"{row['name']:32}", *(f"{key} {row[key]:,.0f}" for key in list(row)[1:] if row[key])]))
    say(f"storage {found.storage:,.2f} and operations {found.operations:,.2f}, in words of 32 bits")
    say(f"score {found.score:.7f}")


@app.command()
def profile(
    what: Annotated[
        str, typer.Argument(help="A finished shrink run, a supernet of MODELS, or an export.", metavar="RUN_OR_MODEL")
    ],
    hardware: Annotated[str, typer.Option(help="cpu-eager, cpu-compiled, cpu-onnx or cuda.")] = "cpu-eager",
    threads: Annotated[int, typer.Option(help="Threads of the network on a CPU.", min=1)] = 1,
    table: Annotated[str | None, typer.Option("--out", help="The table. Default: WHAT.HARDWARE.json here.")] = None,
    preset: Annotated[str | None, typer.Option(help="Preset of a model, which sets its space.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Option of a model: width=1.2, num_classes=10.")
    ] = None,
    resolutions: Annotated[
        str | None, typer.Option(help="Resolutions to measure: 128,176,224; others are interpolated. Default: all.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Readings of every operator.", min=2)] = 15,
    calibrate: Annotated[int, typer.Option(help="Whole subnets to measure for calibration.", min=4)] = 12,
    device: Annotated[
        str | None, typer.Option(help="Measure on the device whose `slimray agent` is at http://HOST:PORT.")
    ] = None,
    plain_http: Annotated[
        bool, typer.Option("--plain-http", help="Send the token unencrypted over the network to the device.")
    ] = False,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Measure the latency of every operator of a supernet on this machine, as a table for the targets of a search.

    Takes minutes with cpu-eager; cpu-compiled and cpu-onnx take seconds per operator, so by default they measure few
    resolutions. The same command resumes an interrupted table. A single thread is timed by its processor time.
    With --device the operators are sent as ONNX files to an agent, whose token is in SLIMRAY_AGENT_TOKEN; an export, or
    a run that has one, is timed there as a whole. Needs no Ray.
    With --calibrate 20 or more it also prints how large the errors on unseen subnets are for the table, for a network
    and least squares on features of the subnets, and for a line over MACs.
    In a job: `targets: [{name: here, hardware: TABLE.json, limits: {latency_ms: 12}}]`.
    """
    from slimray import models
    from slimray.edge import latency_predictor, latency_table, profiler

    remote = None
    if device is not None:
        from slimray.edge import remote as remotes

        remote = remotes.connect(device, plain_http)
        hardware = remotes.HARDWARE
        if what not in models.MODELS and (where := _export_of(what, storage_of(storage))):
            _time_export(remote, where, rounds, as_json)
            return
    options, num_points = _supernet_of(what, [f"preset={preset}", *(set_ or [])] if preset else set_ or [], storage)
    words = [word.strip() for word in (resolutions or "").split(",") if word.strip()]
    if not all(word.isdecimal() for word in words):
        raise UserError(f"--resolutions {resolutions}: must be whole numbers separated by commas, such as 128,176,224")
    path = table or f"{what.rstrip('/').rpartition('/')[2]}.{hardware}.json"
    found = profiler.profile(
        models.build(**options).eval(), options, path, hardware=hardware,
        runtime=None if remote is None else remotes.runtime(remote), threads=threads, num_points=num_points,
        resolutions=[int(word) for word in words] or None, rounds=rounds, calibrate=calibrate,
        say=lambda text: console.print(f"{path}: {text}", soft_wrap=True),
    )  # fmt: skip
    facts = latency_table.summary(found)
    if calibrate >= latency_predictor.FEWEST:
        told = latency_predictor.errors(models.build(**options), found)
        facts |= {f"{how}_error_percent": value for how, value in told.items()}
    if as_json:
        emit({"table": path} | facts)
        return
    for key, value in facts.items():
        say(f"{key.replace('_', ' ')}: {fact(key, value)}")
    say(f"table: {path}")


def _supernet_of(what: str, sets: list[str], storage: str | None) -> tuple[dict[str, Any], int | None]:
    """Return the model options of a supernet of MODELS with `sets`, or of a run, and the points per sample."""
    from slimray import models
    from slimray.verbs import inputs

    where = f"profile {what}"
    if what not in models.MODELS:
        if sets:
            raise UserError(f"{where}: --preset and --set are for models, a run already has its options")
        run = inputs.finished_run(what, storage_of(storage), ("supernet",), where)
        return inputs.read_model(run, where), inputs.read_input(run, where)["recipe"].get("num_points")
    usual = models.MODELS[what].profiled
    if usual is None:
        known = ", ".join(name for name, row in models.MODELS.items() if row.profiled is not None)
        raise UserError(f"{where}: must be one of {known}, or a run of kind shrink")
    options: dict[str, Any] = {"name": what} | dict(usual)
    for assignment in sets:
        set_value(options, assignment)
    return options, None


def _export_of(name: str, where: str) -> str | None:
    """Return the export folder that `name` is, or that of the run of this name; None if there is none."""
    from slimray import runs
    from slimray.runtime import folder

    if folder.is_export(name):
        return name
    return folder.preferred_export(runs.find_run(name, where))


def _time_export(remote: Any, where: str, rounds: int, as_json: bool) -> None:
    """Time an exported network on a device with 1, 2, 4, ... threads, up to its number of cores."""
    from slimray.data.modalities import input_shape
    from slimray.edge import remote as remotes
    from slimray.runtime import folder, loaded, onnx_file

    facts, data = folder.read_export(where)
    loaded.check_facts(facts, where)
    if facts.step is not None:
        raise UserError(f"{where}: is an encoder and a decoder step, a device times networks of a single graph")
    onnx_file.check_onnx(data, f"{where}/{facts.file}")
    whole, states = input_shape(facts.input["recipe"]), {state.input: state for state in facts.states}
    feeds: dict[str, Any] = {}
    for one in facts.inputs:
        usual = states[one.name].shape if one.name in states else (1, *whole[len(whole) + 1 - len(one.shape) :])
        sides = [given if given is not None else own for given, own in zip(one.shape, usual, strict=True)]
        feeds[one.name] = [sides, one.dtype]
    most, rows = int(remote.about.get("cores") or 1), []
    for threads in [2**power for power in range(most.bit_length())]:
        rows.append(remotes.time_export(remote, data, feeds, threads, max(rounds, 9)))
        if not as_json:
            say("  ".join(f"{key.replace('_', ' ')} {fact(key, value)}" for key, value in rows[-1].items()))
    if as_json:
        emit({"device": remote.about["device"], "export": where, "rows": rows})
