"""Trials of Ray Tune, and sweeps: the same work with different settings, of which the best are found.

The work of a sweep's trial is passed in as a function; this file decides the settings to try (a grid, random values,
Optuna), the number of trials at once, and when to stop a trial that lags behind (ASHA, "A System for Massively Parallel
Hyperparameter Tuning", arXiv 1810.05934). A trial leaves a folder `trials/<digest of its settings>/` with
`data/trial.json`. An interrupted sweep continues from those: finished trials are not repeated, started ones come first.
"""

import hashlib
import itertools
import json
import math
import os
import random
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Protocol

import ray
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from slimray import runs, storage
from slimray.spec import RunFailed
from slimray.train import workers
from slimray.train.spec import ScaleSpec
from slimray.verbs.specs import RangeSpec, SweepSpec

OWN_CPU = 0.01  # CPUs of a trial's own process, which waits for its workers, with their own. Tune does not accept 0

Score = Callable[[Any], dict[str, float]]  # an arch or a policy -> metrics
Settings = dict[str, float]
Tell = Callable[[int, float], None]  # (epoch, loss): reports progress
TrialWork = Callable[[Settings, str, Tell], dict[str, Any]]  # (settings, run URI, tell) -> {"score": ..., ...}


# ----------------------------------------------------------------------------------------------- trials of Ray Tune


def resources_of(scale: ScaleSpec) -> dict[str, float]:
    """Return the cluster resources of a trial: those of a worker of the job's scale."""
    return {"cpu": scale.cpus_per_worker} | ({"gpu": scale.gpus_per_worker} if scale.gpus_per_worker else {})


def device() -> str:
    """Return the device of the calling trial: "cuda" if it was given a GPU, else "cpu"."""
    return "cuda" if ray.get_gpu_ids() else "cpu"


class ScoreTrial(tune.Trainable):
    """A trial as Tune runs it: scores the entry `tried` of its config; its process reuses the scorer for the next."""

    def setup(self, config: dict[str, Any], make: Any = None, threads: int = 1) -> None:
        """Create the scorer, with `threads` torch threads in this process."""
        torch.set_num_threads(threads)
        self.score: Score = make()
        self.tried = config["tried"]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Switch to the candidate of the next trial."""
        self.tried = new_config["tried"]
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Save nothing: an interrupted trial is repeated."""
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Do nothing, see `save_checkpoint`."""

    def step(self) -> dict[str, Any]:
        """Score the candidate."""
        return {"metrics": self.score(self.tried), "metric": 0.0, "done": True}


def run_trials(
    name: str, trainable: Any, setup: tune.TuneConfig, space: dict[str, Any] | None = None, retries: int = 0
) -> list[tune.Result]:
    """Run trials without output until all have ended, and return their results.

    Tune's own files are discarded: the trials on storage are the state, and an interrupted trial is repeated. A trial
    whose process dies is retried `retries` times.
    """
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # stopped trials have no score
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    with tempfile.TemporaryDirectory(prefix="slimray-") as scratch:
        tuner = tune.Tuner(
            trainable,
            param_space=space,
            tune_config=setup,
            run_config=tune.RunConfig(
                name=f"{name}-{uuid.uuid4().hex[:8]}",
                storage_path=scratch,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=retries),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        results = tuner.fit()
        return [results[number] for number in range(len(results))]


class Proposals(Protocol):
    """Proposals of trials, a function of the trials before."""

    @property
    def is_done(self) -> bool:
        """True once no trial is left."""
        ...

    def start(self, trial: str) -> dict[str, Any] | None:
        """Return the config for Tune's `trial`; None while nothing can be proposed."""
        ...

    def end(self, trial: str, metrics: dict[str, float]) -> None:
        """Record the metrics of a trial that has ended; {} if it failed."""
        ...


class ProposalSearch(Searcher):
    """Adapter that gives `Proposals` to Tune as a search algorithm; they alone hold the state."""

    def __init__(self, proposals: Proposals):
        super().__init__(metric="metric", mode="max")
        self.proposals = proposals

    def suggest(self, trial_id: str) -> Any:
        """Return the config of the next trial."""
        chosen = self.proposals.start(trial_id)
        return chosen if chosen is not None else Searcher.FINISHED if self.proposals.is_done else None

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """Pass the metrics on; Tune flattens nested results into names like `metrics/top1`."""
        told = {} if error or result is None else result
        metrics = {name.removeprefix("metrics/"): v for name, v in told.items() if name.startswith("metrics/")}
        self.proposals.end(trial_id, metrics)

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the trials on storage are the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing, see `save`."""


# ------------------------------------------------------------------------------------------------------- sweeps


def proposals(spec: SweepSpec, seed: int) -> list[Settings]:
    """Return the settings that a grid or random search tries, in order; [] for Optuna, which depends on scores."""
    if spec.search == "grid":
        names = list(spec.over)
        values = [v for v in spec.over.values() if isinstance(v, tuple)]
        return [dict(zip(names, row, strict=True)) for row in itertools.product(*values)]
    if spec.search == "random":
        draw = random.Random(f"sweep-{seed}")
        return [{name: _draw(values, draw) for name, values in spec.over.items()} for _ in range(spec.trials)]
    return []


def _draw(values: tuple[float, ...] | RangeSpec, draw: random.Random) -> float:
    if isinstance(values, tuple):
        return draw.choice(values)
    if values.log:
        return math.exp(draw.uniform(math.log(values.low), math.log(values.high)))
    return draw.uniform(values.low, values.high)


def folder_of(stage: runs.Run, settings: Mapping[str, float]) -> str:
    """Return the URI of the folder of a trial with `settings`."""
    text = json.dumps(dict(sorted(settings.items())))
    return f"{stage.uri}/trials/{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def finished_trials(stage: runs.Run) -> list[dict[str, Any]]:
    """Return the records of the trials that have ended, in the order of their folders."""
    found = []
    for name in _folders(stage):
        if runs.exists(stage, f"trials/{name}/data/trial.json"):
            found.append(json.loads(runs.read_file(stage, f"trials/{name}/data/trial.json")))
    return found


def _folders(stage: runs.Run) -> list[str]:
    return storage.list_folders(stage.fs, storage.join(stage.path, "trials"))


def _begun(stage: runs.Run) -> list[Settings]:
    """Return the settings of trials that were started but have not ended."""
    out = []
    for name in _folders(stage):
        here = f"trials/{name}"
        if runs.exists(stage, f"{here}/data/settings.json") and not runs.exists(stage, f"{here}/data/trial.json"):
            out.append(json.loads(runs.read_file(stage, f"{here}/data/settings.json")))
    return out


def sweep(spec: SweepSpec, stage: runs.Run, work: TrialWork, epochs: int, seed: int) -> list[dict[str, Any]]:
    """Run the remaining trials and return the records of all, the best first.

    `work` runs in the trial's own process. A record has `settings`, `score` (None if the trial was stopped or failed),
    `uri` and the entries that `work` returned. RunFailed if no trial has a score.
    """
    done = finished_trials(stage)
    left = [one for one in proposals(spec, seed) if all(one != record["settings"] for record in done)]
    if spec.count > len(done):
        _tune(spec, stage, work, epochs, seed, left, done)
    records = finished_trials(stage)
    scored = [record for record in records if record["score"] is not None]
    if not scored:
        raise RunFailed("tune: none of the trials has a score: see logs/ of the folders in trials/")
    return sorted(scored, key=lambda r: -r["score"]) + [record for record in records if record["score"] is None]


def _tune(
    spec: SweepSpec,
    stage: runs.Run,
    work: TrialWork,
    epochs: int,
    seed: int,
    left: Sequence[Settings],
    done: Sequence[dict[str, Any]],
) -> None:
    def trial(config: dict[str, Any], work: TrialWork) -> None:
        settings = {name: float(value) for name, value in config["settings"].items()}
        uri = folder_of(stage, settings)
        run = runs.run_at(uri)
        runs.write_file(run, "data/settings.json", json.dumps(settings).encode())

        def tell(epoch: int, loss: float) -> None:
            tune.report({"epoch": epoch, "loss": loss, "score": -loss})  # Optuna: worse than a score of a whole trial

        result = work(settings, uri, tell)
        record = {"settings": settings, "uri": uri, **result}
        runs.write_file(run, "data/trial.json", json.dumps(record).encode())
        tune.report({"epoch": epochs + 1, "loss": result.get("loss", 0.0), "score": result["score"]})

    search, space, count = None, {}, 1
    if spec.search == "optuna":
        search, count = _optuna(spec, stage, seed, done), spec.trials - len(done)
    else:
        space = {"settings": tune.grid_search(list(left))}
    scheduler = None
    if spec.early_stop:
        scheduler = ASHAScheduler(time_attr="epoch", metric="loss", mode="min", max_t=epochs + 2, grace_period=1)
    trainable = tune.with_resources(tune.with_parameters(trial, work=work), {"cpu": OWN_CPU})
    setup = tune.TuneConfig(
        search_alg=search, scheduler=scheduler, num_samples=count, max_concurrent_trials=spec.concurrent
    )
    for result in run_trials("sweep", trainable, setup, space):  # also record trials that were stopped or failed
        settings = {name: float(value) for name, value in (result.config or {}).get("settings", {}).items()}
        run = runs.run_at(folder_of(stage, settings))
        if settings and not runs.exists(run, "data/trial.json"):
            reason = str(result.error).strip().splitlines()[-1] if result.error else "stopped: it lagged behind"
            told = result.metrics or {}
            record = {"settings": settings, "uri": run.uri, "score": None, "note": reason}
            record |= {name: told[name] for name in ("epoch", "loss") if name in told}
            runs.write_file(run, "data/trial.json", json.dumps(record).encode())


def watch_losses(actor: Any, tell: Tell, work: Callable[[], Any]) -> None:
    """Run `work`, a training that reports to `actor`, and pass its loss to `tell` epoch by epoch.

    Errors of `work` are raised here.
    """
    with ThreadPoolExecutor(1) as pool:
        running, told = pool.submit(work), 0
        while True:
            finished, _ = wait([running], timeout=1.0)
            epoch, loss = workers.progress_state(actor).get("loss", (0, 0.0))
            if epoch > told:
                tell(epoch, loss)
                told = epoch
            if finished:
                running.result()
                return


def _optuna(spec: SweepSpec, stage: runs.Run, seed: int, done: Sequence[dict[str, Any]]) -> OptunaSearch:
    """Return Optuna's search with the results of finished trials; trials that were started before come first."""
    space: dict[str, Any] = {}
    for name, values in spec.over.items():
        if isinstance(values, tuple):
            space[name] = tune.choice(list(values))
        else:
            space[name] = (tune.loguniform if values.log else tune.uniform)(values.low, values.high)
    begun = [{f"settings/{name}": v for name, v in one.items()} for one in _begun(stage)]
    search = OptunaSearch(
        OptunaSearch.convert_search_space({"settings": space}),
        metric="score",
        mode="max",
        seed=seed + len(done),
        points_to_evaluate=begun or None,
    )
    for record in done:
        if record["score"] is not None:
            known = {f"settings/{name}": value for name, value in record["settings"].items()}
            search.add_evaluated_point(known, record["score"])
    return search
