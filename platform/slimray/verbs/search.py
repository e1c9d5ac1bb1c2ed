"""`kind: search`: search a finished supernet for subnets under limits on their costs, as Ray Tune trials.

A trial extracts a subnet, recalibrates it and scores it on samples held out of training (subnets.py), without training
it. The next proposal is a function of the past (search/strategies.py), which a thin adapter passes to Tune. Every
finished trial is a JSON file of the run, and an interrupted search continues from those, never from a pickle. For each
target, the best subnet within its limits is scored once on the final split and becomes the run NAME-TARGET, a network
like any other: it can be evaluated, used for predictions and trained further (`model: {run: NAME-TARGET}`).
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from slimray import runs
from slimray.arch import Arch
from slimray.data.spec import DataSpec
from slimray.data.views import at_size
from slimray.edge import COUNTED, COUNTED_INT8, MEASURED
from slimray.search import pareto, strategies
from slimray.search.problem import Problem, Trial
from slimray.spec import RunFailed, Spec, UserError, did_you_mean, located, parse
from slimray.train.spec import ScaleSpec
from slimray.verbs import inputs
from slimray.verbs.context import CheckContext, Context, Made
from slimray.verbs.specs import JudgeSpec, WorkerJob

if TYPE_CHECKING:
    from slimray.tasks.task import Metric

COSTS = (*COUNTED, *COUNTED_INT8, *MEASURED)
HELD_OUT = "held_out"  # in place of a split: the training samples that the supernet's run held out


class TargetSpec(Spec):
    """Limits on the costs of a subnet, for a device or a budget."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,30}$")
    """Name of the target; its subnet becomes the run NAME-TARGET."""
    limits: dict[str, float] = {}
    """Cost -> upper bound: `params`, `macs` (per sample), `memory_mb` (weights and the largest layer, float32); for
    networks of images in int8 on a microcontroller, `peak_kb` (memory, counted as by TinyEngine's scheduler) and
    `int8_kb` (weights, biases and scales), in 1,000 bytes; with `hardware` also `latency_ms`, and for a described
    device `energy_mj`, both at batch 1."""
    hardware: str | None = None
    """Source of latencies: a `.json` table of `slimray profile`, a device of `slimray.edge.hardware.HARDWARE` (a model
    from its data sheet), or a `.yaml` file that describes a device."""


class SearchJob(WorkerJob):
    """Search a supernet for subnets under limits."""

    streams: ClassVar[bool] = False

    kind: Literal["search"]
    name: str
    """Name of the run, a folder of the storage."""
    supernet: str
    """Name or URI of the shrink run."""
    strategy: strategies.StrategySpec
    """Strategy that proposes archs; its `name` is random, evolution, predictor_guided or nsga2."""
    targets: tuple[TargetSpec, ...] = Field(min_length=1)
    """One search each; an arch that was scored for one target is not scored again for another."""
    judge: JudgeSpec = JudgeSpec.model_validate({})
    split: str = HELD_OUT
    """Samples on which subnets are scored: `held_out` (training samples that the shrink run held out), or a split."""
    final: str | None = None
    """Split on which the chosen subnets are scored, once; default: the validation split of the shrink run."""
    scale: ScaleSpec = ScaleSpec()
    seed: int = Field(0, ge=0)
    """Seed of the proposals."""

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
                        f"targets.{target.name}.limits.{limit}: needs `hardware` besides `limits`: a table of "
                        "`slimray profile`, or a described device"
                    )
        return self


Job = SearchJob


def check(job: SearchJob, ctx: CheckContext) -> dict[str, Any]:
    """Return the targets and the number of trials, and, if the supernet exists, its number of archs."""
    out: dict[str, Any] = {"supernet": job.supernet, "targets": [target.name for target in job.targets]}
    out["evaluations"] = job.strategy.num_evaluations * len(job.targets)
    with ctx.noting():
        _require_free_names(job, ctx.where, ctx.storage)
        made = ctx.require(job.supernet, ("supernet",), "supernet")
        if made is not None:
            _require_held_out(job, made.held_out > 0)
            return out
        found = _find(job, ctx.where, ctx.storage)
        _require_held_out(job, runs.exists(found, "data/held_out.parquet"))
        net = _on_meta(found)
        out["archs"] = net.space.num_archs()
        _require_possible(job, ctx.where, net, _recipe(found))
    return out


def makes(job: SearchJob) -> dict[str, Made]:
    """Return the tables of the search, and a network for each target."""
    return {job.name: Made("table")} | {
        _name(job, target): Made("network", like=job.supernet) for target in job.targets
    }


def _name(job: SearchJob, target: TargetSpec) -> str:
    return f"{job.name}-{target.name}"


def _find(job: SearchJob, where: str, storage: str) -> runs.Run:
    return inputs.finished_run(job.supernet, storage, ("supernet",), f"{where}: supernet")


def _require_held_out(job: SearchJob, held_out: bool) -> None:
    if job.split == HELD_OUT and not held_out:
        raise UserError(f"split: {job.supernet!r} held out no samples (hold_out: 0): name a split, or shrink again")


def _require_possible(job: SearchJob, where: str, net: Any, recipe: Mapping[str, Any]) -> None:
    """Raise UserError, with the smallest value found, for a target whose limits no subnet keeps."""
    of_net = _prices(net, recipe)
    for target in job.targets:
        try:
            _problem(of_net.on(_meter(target)), target, job.strategy).anchor  # noqa: B018  (raises)
        except UserError as error:
            raise UserError(located(str(error), f"{where}: targets.{target.name}")) from None


def _require_free_names(job: SearchJob, where: str, storage: str) -> None:
    """Raise UserError if the run for a target's subnet exists already and does not belong to this search."""
    for target in job.targets:
        inputs.require_free(storage, _name(job, target), job.name, f"{where}: targets.{target.name}")


def _on_meta(found: runs.Run) -> Any:
    from slimray import models
    from slimray.edge import cost

    model = inputs.read_model(found, found.uri)
    return cost.build_on_meta(lambda: models.build(**model))


def _recipe(found: runs.Run) -> dict[str, Any]:
    return inputs.read_input(found, found.uri)["recipe"]


# --------------------------------------------------------------------------------------------------------- costs


def arch_costs(net: Any, recipe: Mapping[str, Any]) -> Callable[[Arch], dict[str, float]]:
    """Return the function from an arch of `net`, on the meta device, to its counted costs: params, MACs, memory."""
    return _prices(net, recipe).arch_costs


def _prices(net: Any, recipe: Mapping[str, Any]) -> Any:
    from slimray.edge.arch_costs import Prices

    return Prices(net, recipe.get("num_points"))


def _meter(target: TargetSpec) -> Any:
    from slimray.edge import hardware

    return hardware.named(target.hardware, "hardware") if target.hardware else None


def _problem(prices: Any, target: TargetSpec, strategy: strategies.Strategy) -> Problem:
    """Return the search problem of a target, with only the costs that it needs, so that pricing many archs is fast."""
    names = [*target.limits, *(strategy.objectives if isinstance(strategy, strategies.Nsga2) else ())]
    told = (*COUNTED, *(prices.meter.names if prices.meter else ()))
    for name in names:
        if name in MEASURED and name not in told:
            of = prices.meter.name if prices.meter else "a target without `hardware`"
            field = "limits" if name in target.limits else "strategy: objectives"
            raise UserError(f"{field}: {name}: {of} does not provide it: name hardware that does")

    def fit(codes: np.ndarray, metrics: np.ndarray, seed: int) -> Any:
        from slimray.search import predictor

        return predictor.fit_predictor(prices.net.space, codes, metrics, seed)

    return Problem(prices.table, prices.matrix(list(dict.fromkeys(names))), target.limits, fit)


# --------------------------------------------------------------------------------------------------- the search


@dataclass
class _Progress:
    """The trials of a target: finished, running and proposed."""

    job: SearchJob
    run: runs.Run
    target: TargetSpec
    prices: Any
    problem: Problem
    measured: dict[Arch, dict[str, float]]
    metric: "Metric"
    history: dict[int, Trial] = field(default_factory=dict)
    running: dict[str, tuple[int, Arch]] = field(default_factory=dict)
    proposed: dict[int, list[Arch]] = field(default_factory=dict)

    def read(self) -> None:
        """Load the finished trials from storage."""
        for name in runs.list_names(self.run, f"trials/{self.target.name}"):
            plain = json.loads(runs.read_file(self.run, f"trials/{self.target.name}/{name}"))
            metric = self.metric.sign * _number(plain["metric"])
            trial = Trial(plain["index"], Arch.from_dict(plain["arch"]), metric, plain["costs"])
            self.history[trial.index] = trial
            if plain["metrics"]:
                self.measured[trial.arch] = plain["metrics"]

    @property
    def trials(self) -> list[Trial]:
        """The finished trials by index, whatever the order in which they finished."""
        return [self.history[index] for index in sorted(self.history)]

    @property
    def total(self) -> int:
        """Number of trials of the whole search."""
        return self.job.strategy.num_evaluations

    def next(self) -> tuple[int, Arch] | None:
        """Return the next trial to run; None while a generation is unfinished, or if none is left."""
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
        """Write a trial that has ended; without metrics it has failed."""
        values = self.problem.costs(self.problem.table.codes([arch]))  # bit for bit as when limits were checked
        costs = self.prices.arch_costs(arch) | {name: float(value[0]) for name, value in values.items()}
        metric = metrics.get(self.metric.name)
        trial = Trial(index, arch, self.metric.sign * _number(metric), costs)
        self.history[index] = trial
        if metrics:
            self.measured[arch] = metrics
        plain = {"index": index, "arch": arch.to_dict(), "metric": metric, "metrics": metrics, "costs": costs}
        runs.write_file(self.run, f"trials/{self.target.name}/{index:06d}.json", json.dumps(plain).encode())

    def start(self, trial: str) -> dict[str, Any] | None:
        """Return the config for Tune's `trial`; None while nothing can be proposed."""
        chosen = self.next()
        if chosen is None:
            return None
        self.running[trial] = chosen
        return {"index": chosen[0], "tried": chosen[1].to_dict()}

    def end(self, trial: str, metrics: dict[str, float]) -> None:
        """Write a trial that has ended, once: Tune reports it twice if it stops a trial that reports `done` itself."""
        known = self.running.pop(trial, None)
        if known is not None:
            self.note(*known, metrics)

    @property
    def is_done(self) -> bool:
        """True once no trial is left to run."""
        return len(self.history) >= self.total


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def run(job: SearchJob, ctx: Context) -> None:
    """Search for every target of `job` in the run folder `ctx.run`."""
    from slimray.train import workers
    from slimray.verbs import subnets

    found = _find(job, ctx.where, ctx.storage)
    net, recipe = _on_meta(found), _recipe(found)
    metric, measured = subnets.best_of(inputs.read_input(found, f"{ctx.where}: supernet")), {}
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
    exhibits: Any = None
    for progress in searches:
        if progress.next() is not None or not progress.is_done:
            exhibits = exhibits or _exhibits(job, ctx, found, job.split)
            ctx.console.print(f"{job.name}: {progress.target.name}: {progress.total} archs to try", highlight=False)
            _tune(job, found, progress, exhibits)
    chosen = {progress.target.name: _best(progress) for progress in searches}
    final = job.final or _data(found, ctx.where).val or _data(found, ctx.where).train
    archs = [chosen[target.name].arch for target in job.targets]
    last = _exhibits(job, ctx, found, final)
    judged = dict(subnets.judge_all(found.uri, last, job.judge, archs, job.scale, weights=True))
    rows = []
    for number, target in enumerate(job.targets):
        trial, (scored, weights) = chosen[target.name], judged[number]
        _write_subnet(job, ctx, found, target, trial, scored, weights)
        rows.append({"target": target.name, "run": _name(job, target), "searched": metric.sign * trial.metric})
        rows[-1] |= {metric.name: scored[metric.name], **trial.costs, "limits": target.limits}
        rows[-1] |= {"arch": trial.arch.to_dict()}
        meter = searches[number].prices.meter
        if meter is not None:
            rows[-1] |= {"hardware": meter.name, "how": meter.how, "source": meter.source}
    _finish(job, ctx, searches, rows, metric)


def _tune(job: SearchJob, found: runs.Run, progress: _Progress, exhibits: Any) -> None:
    """Run the remaining trials of a target."""
    from ray import tune

    from slimray.train import connection
    from slimray.verbs import subnets, trials

    make = functools.partial(subnets.scorer, found.uri, exhibits, job.judge)
    trainable = tune.with_parameters(trials.ScoreTrial, make=make, threads=connection.threads(job.scale))
    setup = tune.TuneConfig(
        search_alg=trials.ProposalSearch(progress),
        num_samples=progress.total - len(progress.history),
        max_concurrent_trials=job.scale.most,
        reuse_actors=True,
        metric="metric",
        mode="max",
    )
    trials.run_trials(
        job.name, tune.with_resources(trainable, trials.resources_of(job.scale)), setup, retries=job.scale.retries
    )
    if not progress.is_done and progress.next() is not None:
        raise RunFailed(f"{progress.target.name}: Tune ended after {len(progress.history)} of {progress.total} trials")


def _best(progress: _Progress) -> Trial:
    best = pareto.best_under(progress.trials, progress.target.limits)
    if best is None:
        raise RunFailed(f"{progress.target.name}: every one of {progress.total} trials failed")
    return best


def _data(found: runs.Run, where: str) -> DataSpec:
    return parse(DataSpec, runs.read_job(found).get("data") or {}, f"{where}: supernet: {found.uri}/job.yaml: data")


def _exhibits(job: SearchJob, ctx: Context, found: runs.Run, split: str) -> Any:
    """Return training samples for recalibration and samples of `split` for scoring, decoded once."""
    from slimray.verbs import subnets

    data = _data(found, ctx.where)
    wanted = [data.train] if split == HELD_OUT else list(dict.fromkeys([data.train, split]))
    splits = inputs.open_splits(data, ctx.where, ctx.storage, wanted)
    recipe, table = _recipe(found), splits.tables[data.train]
    if split == HELD_OUT:
        kept = pq.read_table(pa.BufferReader(runs.read_file(found, "data/held_out.parquet")))
        out = set(kept.column("path").to_pylist())
        table = table.filter(pa.array([path not in out for path in table.column("path").to_pylist()]))
    else:
        kept = splits.tables[split]
    train = (subnets.put_table(splits.root, table), recipe | {"mode": "train"})
    score = (subnets.put_table(splits.root, kept), recipe)
    return subnets.make_exhibits(job.judge, train, score, job.seed, data.decode_timeout_s)


def _write_subnet(
    job: SearchJob,
    ctx: Context,
    found: runs.Run,
    target: TargetSpec,
    trial: Trial,
    scored: Mapping[str, float],
    weights: bytes,
) -> None:
    """Write the chosen subnet as a finished run, with the resolution and frames of its arch in the recipe."""
    from slimray.verbs import subnets

    arch = trial.arch
    _, model, taken = runs.read_model(found)
    recipe = subnet_recipe(_on_meta(found).space, arch, taken["recipe"])
    source = {"search": job.name, "supernet": found.uri, "arch": arch.to_dict()}
    held = (weights, model | {"arch": arch.to_dict()}, taken | {"recipe": recipe})
    source |= {"data": runs.read_job(found).get("data")}
    subnets.write_subnet(ctx, _name(job, target), source, held, scored, trial.costs)


def subnet_recipe(space: Any, arch: Arch, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe of a subnet's samples: that of the supernet with the same zoom, at the subnet's resolution and
    with its frames."""
    side, frames = space.input_of(arch, "side"), space.input_of(arch, "frames")
    out = dict(recipe) if side is None else at_size(recipe, side)
    return out if frames is None else out | {"num_segments": frames}


def _finish(job: SearchJob, ctx: Context, searches: Sequence[_Progress], rows: list[dict], metric: "Metric") -> None:
    from slimray.report import pages

    trials = [trial for progress in searches for trial in progress.trials if trial.metric == trial.metric]
    different = list(_priced_everywhere(searches, {trial.arch: trial for trial in trials}).values())
    fronts = {name: pareto.front(different, [name]) for name in dict.fromkeys(n for t in different for n in t.costs)}
    plain = {name: [_plain(trial, metric) for trial in front] for name, front in fronts.items()}
    runs.write_file(ctx.run, "front.json", json.dumps({"metric": metric.name, "fronts": plain}).encode())
    predictors = {}
    if isinstance(job.strategy, strategies.PredictorGuided):
        predictors = {
            progress.target.name: strategies.predictor_reports(
                job.strategy, progress.problem, progress.trials, job.seed
            )
            for progress in searches
        }
    results = {"targets": rows, "metric": metric.name, "metrics": [metric.to_plain()]}
    results |= {"trials": [_plain(trial, metric) for trial in different]}
    results["history"] = {
        one.target.name: [metric.sign * t.metric if t.metric == t.metric else None for t in one.trials]
        for one in searches
    }
    choices = searches[0].prices.net.space.choices
    results["largest"] = {name: max(map(max, genes)) for name, genes in choices}
    ctx.finish({"metrics": {"rows": rows}, "supernet": job.supernet}, results | {"predictors": predictors})
    runs.write_report(ctx.run, pages.search_report(ctx.run))


def _priced_everywhere(searches: Sequence[_Progress], trials: Mapping[Arch, Trial]) -> dict[Arch, Trial]:
    """Return the trials with their costs on the devices of all targets, as far as the targets need them.

    With several devices, the name of a measured cost includes the device: `latency_ms (DEVICE)`.
    """
    devices = list(dict.fromkeys(one.prices.meter.name for one in searches if one.prices.meter is not None))
    out = {}
    for arch, trial in trials.items():
        costs = {name: value for name, value in trial.costs.items() if name in COUNTED}
        for progress in searches:
            values = progress.problem.costs(progress.problem.table.codes([arch]))
            meter = progress.prices.meter
            for name, value in values.items():
                named = f"{name} ({meter.name})" if name in MEASURED and len(devices) > 1 else name
                costs[named] = float(value[0])
        out[arch] = replace(trial, costs=costs)
    return out


def _plain(trial: Trial, metric: "Metric") -> dict[str, Any]:
    return {"arch": trial.arch.to_dict(), "metric": metric.sign * trial.metric, **trial.costs}
