"""`kind: search`: subnets of a finished supernet looked for under limits on what they cost, as Ray Tune trials.

A trial cuts out a subnet, re-calibrates it and scores it on samples held out of training (jobs/judge.py); it trains
nothing. What is tried next is a function of the past (strategies.py): a thin adapter hands it to Tune. Every finished
trial is a JSON file of the run, and a search that was cut off goes on from those, never from a pickle. For each target
the best subnet within its limits is scored once on the split for the end, and becomes a run of its own, ready to be
evaluated, predicted with, or trained on (`init: {from: NAME-TARGET}`).
"""

import json
import os
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from pydantic import Field, model_validator
from ray import tune
from ray.tune.search import Searcher

from slimray import models, runs
from slimray.arch import Arch
from slimray.data.index import INDEX
from slimray.data.pipeline import Source
from slimray.data.spec import DataSpec
from slimray.edge import cost, hardware
from slimray.edge.arch_costs import COUNTED, MEASURED, Meter, Prices
from slimray.report import pages
from slimray.search import predictor, strategies
from slimray.search.strategies import Problem, Trial
from slimray.spec import RunFailed, Spec, UserError, did_you_mean, located, parse
from slimray.train import workers
from slimray.train.spec import ScaleSpec
from slimray.verbs.inputs import finished_run, open_splits
from slimray.verbs.subnets import Exhibits, Judge, JudgeSpec, decode, judge_all, metric_of

COSTS = (*COUNTED, *MEASURED)
HELD_OUT = "held_out"  # in place of a split: training samples that the shrink run kept out


class TargetSpec(Spec):
    """A device, or a budget: what a subnet may cost."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,30}$")
    """Name of the target; its subnet becomes the run NAME-TARGET."""
    limits: dict[str, float] = {}
    """Cost -> upper bound: `params`, `macs` (per sample), `memory_mb` (weights and the largest layer, float32); with
    `hardware` also `latency_ms` and, of a described device, `energy_mj`, batch 1."""
    hardware: str | None = None
    """What tells latency: a `.json` table of `slimray profile`, a device of `slimray.edge.hardware.HARDWARE` (a model
    from its data sheet), or a `.yaml` file that describes a device."""


class SearchJob(Spec):
    """Search a supernet for subnets under limits."""

    kind: Literal["search"]
    name: str
    """Name of the run, a folder of the storage."""
    supernet: str
    """The shrink run, by name or URI."""
    strategy: strategies.StrategySpec
    """How archs are proposed; its `name`: random, evolution, predictor_guided, nsga2."""
    targets: tuple[TargetSpec, ...] = Field(min_length=1)
    """One search each; an arch that was measured for one target is not measured again for another."""
    judge: JudgeSpec = JudgeSpec.model_validate({})
    split: str = HELD_OUT
    """Where subnets are judged: `held_out` (training samples that the shrink run kept out), or a split."""
    final: str | None = None
    """Split on which the chosen subnets are scored, once; default the validation split of the shrink run."""
    scale: ScaleSpec = ScaleSpec()
    seed: int = Field(0, ge=0)
    """Seed of what is proposed."""

    @model_validator(mode="after")
    def _targets_fit(self) -> "SearchJob":
        names = [target.name for target in self.targets]
        if len(set(names)) < len(names):
            raise ValueError("targets: two have the same name")
        for target in self.targets:
            for limit in target.limits:
                if limit not in COSTS:
                    raise ValueError(
                        f"targets.{target.name}.limits: unknown cost {limit!r}{did_you_mean(limit, COSTS)}"
                    )
                if limit in MEASURED and target.hardware is None:
                    raise ValueError(
                        f"targets.{target.name}.limits.{limit}: needs `hardware` beside `limits`: a table of "
                        "`slimray profile`, or a described device"
                    )
        return self


def facts(job: SearchJob, where: str, storage: str, ahead: Mapping[str, Any]) -> dict[str, Any]:
    """What can be known before machines are asked for; UserError for a supernet or limits that do not fit."""
    out: dict[str, Any] = {"supernet": job.supernet, "targets": [target.name for target in job.targets]}
    out["evaluations"] = job.strategy.num_evaluations * len(job.targets)
    _require_free_names(job, where, storage)
    nothing_held = f"{where}: split: {job.supernet!r} held no samples out (hold_out: 0): name a split, or shrink anew"
    if job.supernet in ahead:
        before = ahead[job.supernet]
        if before.kind != "shrink":
            raise UserError(f"{where}: supernet: {job.supernet!r} is of kind {before.kind}, it makes no supernet")
        if job.split == HELD_OUT and not before.hold_out:
            raise UserError(nothing_held)
        return out
    found = _find(job, where, storage)
    if job.split == HELD_OUT and not runs.exists(found, "data/held_out.parquet"):
        raise UserError(nothing_held)
    net = _on_meta(found)
    out["archs"] = net.space.num_archs()
    _require_possible(job, where, net, _recipe(found))
    return out


def _find(job: SearchJob, where: str, storage: str) -> runs.Run:
    return finished_run(job.supernet, storage, "shrink", "supernet", f"{where}: supernet")


def _require_possible(job: SearchJob, where: str, net: Any, recipe: Mapping[str, Any]) -> None:
    """Raise UserError, with the smallest value there is, for a target whose limits no subnet keeps."""
    of_net = _prices(net, recipe)
    for target in job.targets:
        try:
            _problem(of_net.on(_meter(target)), target, job.strategy).anchor  # noqa: B018  (raises)
        except UserError as error:
            raise UserError(located(str(error), f"{where}: targets.{target.name}")) from None


def _require_free_names(job: SearchJob, where: str, storage: str) -> None:
    """Raise UserError if the run that a target's subnet becomes is there already, and is not of this search."""
    for target in job.targets:
        run = runs.open_run(storage, f"{job.name}-{target.name}")
        if runs.exists(run, "job.yaml") and runs.read_job(run).get("search") != job.name:
            raise UserError(f"{where}: targets.{target.name}: there is a run {run.name!r} already: name it otherwise")


def _on_meta(found: runs.Run) -> Any:
    model = json.loads(runs.read_file(found, "model/model.json"))
    return cost.build_on_meta(lambda: models.build(**model))


def _recipe(found: runs.Run) -> dict[str, Any]:
    return json.loads(runs.read_file(found, "model/input.json"))["recipe"]


# --------------------------------------------------------------------------------------------------------- costs


def arch_costs(net: Any, recipe: Mapping[str, Any]) -> Callable[[Arch], dict[str, float]]:
    """What an arch of the supernet `net` (on the meta device) costs: parameters, MACs and memory, counted exactly."""
    return _prices(net, recipe).arch_costs


def _prices(net: Any, recipe: Mapping[str, Any]) -> Prices:
    return Prices(net, recipe["num_points"] if recipe["kind"] == "points" else None)


def _meter(target: TargetSpec) -> Meter | None:
    return hardware.named(target.hardware, "hardware") if target.hardware else None


def _problem(prices: Prices, target: TargetSpec, strategy: strategies.Strategy) -> Problem:
    """The search of a target; of the costs only those that it asks for, so that pricing many archs is fast."""
    names = [*target.limits, *(strategy.objectives if isinstance(strategy, strategies.Nsga2) else ())]
    told = (*COUNTED, *(prices.meter.names if prices.meter else ()))
    for name in names:
        if name in MEASURED and name not in told:
            of = prices.meter.name if prices.meter else "no `hardware`"
            field = "limits" if name in target.limits else "strategy: objectives"
            raise UserError(f"{field}: {name}: {of} does not tell it: name a hardware that does")

    def fit(codes: np.ndarray, metrics: np.ndarray, seed: int) -> Any:
        return predictor.fit_predictor(prices.net.space, codes, metrics, seed)

    return Problem(prices.table, prices.matrix(list(dict.fromkeys(names))), target.limits, fit)


# --------------------------------------------------------------------------------------------------- the search


@dataclass
class _Progress:
    """The trials of a target: which are done, which run, and what the strategy wants next."""

    job: SearchJob
    run: runs.Run
    target: TargetSpec
    prices: Prices
    problem: Problem
    measured: dict[Arch, dict[str, float]]
    metric: str
    history: dict[int, Trial] = field(default_factory=dict)
    running: dict[str, tuple[int, Arch]] = field(default_factory=dict)
    proposed: dict[int, list[Arch]] = field(default_factory=dict)

    def read(self) -> None:
        """Take over the trials that are on storage."""
        for name in runs.list_names(self.run, f"trials/{self.target.name}"):
            plain = json.loads(runs.read_file(self.run, f"trials/{self.target.name}/{name}"))
            trial = Trial(plain["index"], Arch.from_dict(plain["arch"]), _number(plain["metric"]), plain["costs"])
            self.history[trial.index] = trial
            if plain["metrics"]:
                self.measured[trial.arch] = plain["metrics"]

    @property
    def trials(self) -> list[Trial]:
        """The finished trials in their order, whatever the order in which they finished."""
        return [self.history[index] for index in sorted(self.history)]

    @property
    def total(self) -> int:
        """Trials of the whole search."""
        return self.job.strategy.num_evaluations

    def next(self) -> tuple[int, Arch] | None:
        """The next trial that has to be run, None while a generation is unfinished or nothing is left."""
        busy = {index for index, _ in self.running.values()}
        for index in range(self.total):
            if index in self.history or index in busy:
                continue
            arch = self._proposal(index)
            if arch is None:
                return None
            if arch not in self.measured:
                return index, arch
            self.note(index, arch, self.measured[arch])
        return None

    def _proposal(self, index: int) -> Arch | None:
        number, place = divmod(index, self.job.strategy.population)
        if number not in self.proposed:
            archs = strategies.generation(self.job.strategy, self.problem, self.trials, self.job.seed, number)
            if archs is None:
                return None
            self.proposed[number] = archs
        return self.proposed[number][place]

    def note(self, index: int, arch: Arch, metrics: dict[str, float]) -> None:
        """Write a trial that is over; without metrics it has failed."""
        values = self.problem.costs(self.problem.table.codes([arch]))  # to the last bit what the limits were held to
        costs = self.prices.arch_costs(arch) | {name: float(value[0]) for name, value in values.items()}
        trial = Trial(index, arch, metrics.get(self.metric, float("nan")), costs)
        self.history[index] = trial
        if metrics:
            self.measured[arch] = metrics
        metric = trial.metric if metrics else None
        plain = {"index": index, "arch": arch.to_dict(), "metric": metric, "metrics": metrics, "costs": costs}
        runs.write_file(self.run, f"trials/{self.target.name}/{index:06d}.json", json.dumps(plain).encode())

    @property
    def is_done(self) -> bool:
        """Whether no trial is left to run."""
        return len(self.history) >= self.total


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


class _Adapter(Searcher):
    """A strategy as Tune asks for it; what was tried is known to `progress` alone."""

    def __init__(self, progress: _Progress):
        super().__init__(metric="metric", mode="max")
        self.progress = progress

    def suggest(self, trial_id: str) -> Any:
        chosen = self.progress.next()
        if chosen is None:
            return Searcher.FINISHED if self.progress.is_done else None
        self.progress.running[trial_id] = chosen
        return {"index": chosen[0], "arch": chosen[1].to_dict()}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        known = self.progress.running.pop(trial_id, None)
        if known is None:
            return  # Tune says so twice where it stops a trial that says itself that it is done
        index, arch = known
        told = {} if error or result is None else result  # Tune hands nested results over with names in a row
        metrics = {name.removeprefix("metrics/"): v for name, v in told.items() if name.startswith("metrics/")}
        self.progress.note(index, arch, metrics)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the trials on storage are the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, see `save`."""


class _Trainable(tune.Trainable):
    """A trial; its process keeps the judge for the next one."""

    def setup(self, config: dict[str, Any], run_uri: str = "", exhibits: Any = None, spec: Any = None) -> None:
        self.judge = Judge(run_uri, exhibits, spec, "cuda" if ray.get_gpu_ids() else "cpu")
        self.arch = config["arch"]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.arch = new_config["arch"]
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Nothing to keep: a trial that was cut off is done again."""
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Nothing, see `save_checkpoint`."""

    def step(self) -> dict[str, Any]:
        metrics = self.judge.score(self.arch)
        return {"metrics": metrics, "metric": 0.0, "done": True}


def run(job: SearchJob, ctx: Any) -> None:
    """Search for every target of `job` in the run folder `ctx.run`."""
    found = _find(job, ctx.where, ctx.storage)
    net, recipe = _on_meta(found), _recipe(found)
    metric, measured = metric_of(recipe), {}
    _require_possible(job, ctx.where, net, recipe)
    searches, of_net = [], _prices(net, recipe)
    for target in job.targets:
        prices = of_net.on(_meter(target))
        problem = _problem(prices, target, job.strategy)
        searches.append(_Progress(job, ctx.run, target, prices, problem, measured, metric))
    for progress in searches:
        progress.read()
    workers.connect(ctx.cpus)
    workers.require(job.scale, 0)
    exhibits: dict[str, Exhibits] = {}
    for progress in searches:
        if progress.next() is not None or not progress.is_done:
            exhibits["search"] = exhibits.get("search") or _exhibits(job, ctx, found, job.split)
            ctx.console.print(f"{job.name}: {progress.target.name}: {progress.total} archs to try", highlight=False)
            _tune(job, found, progress, exhibits["search"])
    chosen = {progress.target.name: _best(progress) for progress in searches}
    final = job.final or _data(found, ctx.where).val or _data(found, ctx.where).train
    archs = [chosen[target.name].arch for target in job.targets]
    judged = dict(judge_all(found.uri, _exhibits(job, ctx, found, final), job.judge, archs, job.scale, weights=True))
    rows = []
    for number, target in enumerate(job.targets):
        trial, (scored, weights) = chosen[target.name], judged[number]
        run_of = _write_subnet(job, ctx, found, target, trial, scored, weights)
        rows.append({"target": target.name, "run": run_of.name, "searched": trial.metric, metric: scored[metric]})
        rows[-1] |= {**trial.costs, "limits": target.limits, "arch": trial.arch.to_dict()}
        meter = searches[number].prices.meter
        if meter is not None:
            rows[-1] |= {"hardware": meter.name, "how": meter.how, "source": meter.source}
    _finish(job, ctx, searches, rows, metric)


def _tune(job: SearchJob, found: runs.Run, progress: _Progress, exhibits: Exhibits) -> None:
    """Run the trials of a target that are left."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    resources = {"cpu": job.scale.cpus_per_worker} | (
        {"gpu": job.scale.gpus_per_worker} if job.scale.gpus_per_worker else {}
    )
    trainable = tune.with_parameters(_Trainable, run_uri=found.uri, exhibits=exhibits, spec=job.judge)
    with tempfile.TemporaryDirectory(prefix="slimray-") as scratch:
        tuner = tune.Tuner(
            tune.with_resources(trainable, resources),
            tune_config=tune.TuneConfig(
                search_alg=_Adapter(progress),
                num_samples=progress.total - len(progress.history),
                max_concurrent_trials=job.scale.most,
                reuse_actors=True,
                metric="metric",
                mode="max",
            ),
            run_config=tune.RunConfig(
                name=f"{job.name}-{uuid.uuid4().hex[:8]}",
                storage_path=scratch,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=job.scale.retries),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        tuner.fit()
    if not progress.is_done and progress.next() is not None:
        raise RunFailed(f"{progress.target.name}: Tune ended after {len(progress.history)} of {progress.total} trials")


def _best(progress: _Progress) -> Trial:
    best = strategies.best_under(progress.trials, progress.target.limits)
    if best is None:
        raise RunFailed(f"{progress.target.name}: every one of {progress.total} trials failed")
    return best


def _data(found: runs.Run, where: str) -> DataSpec:
    return parse(DataSpec, runs.read_job(found).get("data") or {}, f"{where}: supernet: {found.uri}/job.yaml: data")


def _exhibits(job: SearchJob, ctx: Any, found: runs.Run, split: str) -> Exhibits:
    """Training samples to calibrate with and samples of `split` to score, decoded once."""
    data = _data(found, ctx.where)
    wanted = [data.train] if split == HELD_OUT else list(dict.fromkeys([data.train, split]))
    splits = open_splits(data, ctx.where, ctx.storage, wanted)
    recipe, table = _recipe(found), splits.tables[data.train]
    if split == HELD_OUT:
        kept = pq.read_table(pa.BufferReader(runs.read_file(found, "data/held_out.parquet")))
        out = set(kept.column("path").to_pylist())
        table = table.filter(pa.array([path not in out for path in table.column("path").to_pylist()]))
    else:
        kept = splits.tables[split]

    def source(rows: pa.Table) -> Source:
        return Source(splits.root, ray.put(rows.select(INDEX.names)), rows.num_rows)

    timeout, count = data.decode_timeout_s, min(job.judge.calibrate, table.num_rows)
    calibrate = decode(source(table), recipe | {"mode": "train"}, count, job.seed, True, timeout)
    count = min(job.judge.samples or kept.num_rows, kept.num_rows)
    return Exhibits(calibrate, decode(source(kept), recipe, count, job.seed, False, timeout))


def _write_subnet(
    job: SearchJob,
    ctx: Any,
    found: runs.Run,
    target: TargetSpec,
    trial: Trial,
    scored: Mapping[str, float],
    weights: bytes,
) -> runs.Run:
    """The chosen subnet as a finished run."""
    run, arch = runs.open_run(ctx.storage, f"{job.name}-{target.name}"), trial.arch
    _, model, taken = runs.read_model(found)
    document = {"kind": "subnet", "name": run.name, "search": job.name, "supernet": found.uri, "arch": arch.to_dict()}
    runs.begin(run, document | {"data": runs.read_job(found).get("data")}, ctx.attempt)
    sizes = {"resolution": "size", "frames": "num_segments"}
    recipe = taken["recipe"] | {field: int(arch[name]) for name, field in sizes.items() if arch.get(name) is not None}
    runs.write_model(run, weights, model | {"arch": arch.to_dict()}, taken | {"recipe": recipe})
    runs.write_card(run, {"metrics": {"last": dict(scored)}, "costs": dict(trial.costs), "supernet": found.uri})
    runs.write_report(run, pages.train_report(run))
    runs.end(run, "finished")
    return run


def _finish(job: SearchJob, ctx: Any, searches: Sequence[_Progress], rows: list[dict], metric: str) -> None:
    trials = [trial for progress in searches for trial in progress.trials if trial.metric == trial.metric]
    different = {trial.arch: trial for trial in trials}
    fronts = {name: strategies.front(different.values(), [name]) for name in COUNTED}
    plain = {name: [_plain(trial) for trial in front] for name, front in fronts.items()}
    runs.write_file(ctx.run, "front.json", json.dumps({"metric": metric, "fronts": plain}).encode())
    predictors = {}
    if isinstance(job.strategy, strategies.PredictorGuided):
        predictors = {
            progress.target.name: strategies.predictor_reports(
                job.strategy, progress.problem, progress.trials, job.seed
            )
            for progress in searches
        }
    results = {"targets": rows, "metric": metric, "trials": [_plain(t) for t in different.values()]}
    ctx.finish({"metrics": {"rows": rows}, "supernet": job.supernet}, results | {"predictors": predictors})
    runs.write_report(ctx.run, pages.search_report(ctx.run))


def _plain(trial: Trial) -> dict[str, Any]:
    return {"arch": trial.arch.to_dict(), "metric": trial.metric, **trial.costs}
