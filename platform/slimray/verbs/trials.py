"""Trials of Ray Tune; and a sweep: the same work with other settings, and the best of them.

What a trial of a sweep does is handed in as a function; here is what is tried (a grid, random values, Optuna), how many
at once, when a trial that lags is stopped (ASHA, "A System for Massively Parallel Hyperparameter Tuning", arXiv
1810.05934), and what a trial leaves: a folder `trials/<digest of its settings>/` with `data/trial.json`. A sweep that
was cut off goes on from those: what is finished is not done again, what was begun is tried first.
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

OWN_CPU = 0.01  # of a trial's own process, which waits; its workers ask for themselves. Tune does not take 0

Score = Callable[[Any], dict[str, float]]  # what is tried (an arch, a policy) -> metrics
Settings = dict[str, float]
Tell = Callable[[int, float], None]  # (epoch, loss): how a trial stands
TrialWork = Callable[[Settings, str, Tell], dict[str, Any]]  # (settings, run URI, tell) -> {"score": ..., ...}


# ----------------------------------------------------------------------------------------------- trials of Ray Tune


def resources_of(scale: ScaleSpec) -> dict[str, float]:
    """Return what a trial takes of the cluster: what a worker of the job's scale does."""
    return {"cpu": scale.cpus_per_worker} | ({"gpu": scale.gpus_per_worker} if scale.gpus_per_worker else {})


def device() -> str:
    """The device of the trial that asks: a GPU if it was given one."""
    return "cuda" if ray.get_gpu_ids() else "cpu"


class ScoreTrial(tune.Trainable):
    """A trial as Tune runs it: it scores what its config calls `tried`; its process keeps what scores for the next."""

    def setup(self, config: dict[str, Any], make: Any = None, threads: int = 1) -> None:
        """Make what scores; torch has `threads` here."""
        torch.set_num_threads(threads)
        self.score: Score = make()
        self.tried = config["tried"]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take what the next trial scores."""
        self.tried = new_config["tried"]
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Keep nothing: a trial that was cut off is done again."""
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Do nothing, see `save_checkpoint`."""

    def step(self) -> dict[str, Any]:
        """Score what is tried."""
        return {"metrics": self.score(self.tried), "metric": 0.0, "done": True}


def run_trials(
    name: str, trainable: Any, setup: tune.TuneConfig, space: dict[str, Any] | None = None, retries: int = 0
) -> list[tune.Result]:
    """Run trials quietly until all are over and return their results.

    What Tune itself writes is thrown away: the trials on storage are the state, and a trial that was cut off is done
    again. A trial whose process dies is tried `retries` times more.
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
    """Proposals of what is tried next, a function of what was tried before."""

    @property
    def is_done(self) -> bool:
        """Return whether no trial is left."""
        ...

    def start(self, trial: str) -> dict[str, Any] | None:
        """Return what Tune's `trial` is to do; None while nothing can be proposed."""
        ...

    def end(self, trial: str, metrics: dict[str, float]) -> None:
        """Take the metrics of a trial that is over; none if it failed."""
        ...


class ProposalSearch(Searcher):
    """`Proposals` as Tune asks for them; what was tried is known to them alone."""

    def __init__(self, proposals: Proposals):
        super().__init__(metric="metric", mode="max")
        self.proposals = proposals

    def suggest(self, trial_id: str) -> Any:
        """Return the config of the next trial."""
        chosen = self.proposals.start(trial_id)
        return chosen if chosen is not None else Searcher.FINISHED if self.proposals.is_done else None

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """Hand the metrics over; Tune gives nested results with their names in a row."""
        told = {} if error or result is None else result
        metrics = {name.removeprefix("metrics/"): v for name, v in told.items() if name.startswith("metrics/")}
        self.proposals.end(trial_id, metrics)

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the trials on storage are the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing, see `save`."""


# ------------------------------------------------------------------------------------------------------- sweeps


def proposals(spec: SweepSpec, seed: int) -> list[Settings]:
    """Return what a grid or a random search tries, in order; for Optuna, which looks at scores, nothing."""
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
    """The URI of the folder of a trial with `settings`."""
    text = json.dumps(dict(sorted(settings.items())))
    return f"{stage.uri}/trials/{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def finished_trials(stage: runs.Run) -> list[dict[str, Any]]:
    """The records of the trials that are over, in the order of their folders."""
    found = []
    for name in _folders(stage):
        if runs.exists(stage, f"trials/{name}/data/trial.json"):
            found.append(json.loads(runs.read_file(stage, f"trials/{name}/data/trial.json")))
    return found


def _folders(stage: runs.Run) -> list[str]:
    return storage.list_folders(stage.fs, storage.join(stage.path, "trials"))


def _begun(stage: runs.Run) -> list[Settings]:
    """Settings of trials that were begun and are not over."""
    out = []
    for name in _folders(stage):
        here = f"trials/{name}"
        if runs.exists(stage, f"{here}/data/settings.json") and not runs.exists(stage, f"{here}/data/trial.json"):
            out.append(json.loads(runs.read_file(stage, f"{here}/data/settings.json")))
    return out


def sweep(spec: SweepSpec, stage: runs.Run, work: TrialWork, epochs: int, seed: int) -> list[dict[str, Any]]:
    """Do the trials that are left and return the records of all, the best first.

    `work` runs in the trial's own process. A record: `settings`, `score` (None where the trial was stopped or failed),
    `uri`, what `work` returned. RunFailed if no trial has a score.
    """
    done = finished_trials(stage)
    left = [one for one in proposals(spec, seed) if all(one != record["settings"] for record in done)]
    if spec.count > len(done):
        _tune(spec, stage, work, epochs, seed, left, done)
    records = finished_trials(stage)
    scored = [record for record in records if record["score"] is not None]
    if not scored:
        raise RunFailed("tune: none of the trials came to a score: see logs/ of the folders in trials/")
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
            tune.report({"epoch": epoch, "loss": loss, "score": -loss})  # Optuna: worse than any score of a whole trial

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
    for result in run_trials("sweep", trainable, setup, space):  # trials that were stopped or failed are over too
        settings = {name: float(value) for name, value in (result.config or {}).get("settings", {}).items()}
        run = runs.run_at(folder_of(stage, settings))
        if settings and not runs.exists(run, "data/trial.json"):
            reason = str(result.error).strip().splitlines()[-1] if result.error else "stopped: it lagged behind"
            told = result.metrics or {}
            record = {"settings": settings, "uri": run.uri, "score": None, "note": reason}
            record |= {name: told[name] for name in ("epoch", "loss") if name in told}
            runs.write_file(run, "data/trial.json", json.dumps(record).encode())


def watch_losses(actor: Any, tell: Tell, work: Callable[[], Any]) -> None:
    """Do `work`, a training that reports to `actor`, and tell its loss epoch by epoch; raises what `work` raises."""
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
    """Optuna, told of the trials that are done; those that were begun come first."""
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
