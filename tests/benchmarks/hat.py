"""HAT on this machine with the recipe of jobs/multi30k_hat.yaml, beside the Transformer of jobs/multi30k.yaml.

`python -m tests.benchmarks hat` (SLIMRAY_ROWS="supernet table" selects rows; data and scores as in translation.py,
whose trained networks of the same seeds, in the same folder, are the reference). A supernet is trained with a random
subnet each step; the latency table of this machine is measured, and the Transformer on its scale; evolution and random
search look for subnets within LIMIT of the Transformer's latency, scored by the perplexity of validation sentences; the
best one is trained further from the supernet's weights, scored, and timed in turn with the Transformer. One process,
one thread, no Ray; times are processor times, as in the table. What is in `SLIMRAY_BENCH_DIR` is not computed again.
Not included from the job: its first stage, which teaches nothing to the later ones, and its limit in ms.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import safetensors.torch
import torch
import yaml
from tests.benchmarks.kept import Row, row_of
from tests.benchmarks.translation import ROOT, Bench, Split
from tests.benchmarks.translation import ROWS as TRANSFORMER

from slimray import compress, models
from slimray.arch import Arch
from slimray.edge import latency_predictor, latency_table, profiler
from slimray.edge.arch_costs import Prices
from slimray.edge.runtimes import settings
from slimray.models.text.units import Translation
from slimray.runtime.pairs import Pairs, alternate
from slimray.search.problem import Problem
from slimray.search.strategies import Random, search
from slimray.tasks.network import Network
from slimray.tasks.translate import translations
from slimray.train.methods.distilled import Distilled, DistilledReplica
from slimray.train.methods.method import Replica, Setup
from slimray.train.methods.supernet import Supernet
from slimray.train.spec import OptimSpec, TeacherSpec
from slimray.verbs.search import SearchJob
from slimray.verbs.shrink import ShrinkJob, spaces, stage_job

LIMIT = 0.65  # of the Transformer's latency by the table, which errs by 9 %: measured it is to be 0.70 or less
SEEDS = (0, 1, 2)
CALIBRATE, ROUNDS = 40, 9  # of the table
COMPARED, PAIRS, REPEATS = 9, 45, 3
JUDGED, SPOKEN = 256, 4  # validation sentences that judge a subnet; test sentences that are timed
Clocked = Callable[[], Any]


def in_turn(a: Clocked, b: Clocked, pairs: int = PAIRS) -> Pairs:
    """Processor time of `a` and `b` in turn, in ms, the fastest of REPEATS calls after some that are not counted."""

    def once(call: Clocked) -> float:
        times = []
        for _ in range(REPEATS):
            start = time.thread_time()
            call()
            times.append(1e3 * (time.thread_time() - start))
        return min(times)

    with settings(1), torch.inference_mode():
        once(a)
        once(b)
        return alternate(partial(once, a), partial(once, b), pairs)


@dataclass(frozen=True)
class Taught:
    """Distillation from a network at hand, as `Distilled` is from that of a run."""

    teacher: Any
    spec: TeacherSpec

    def replica(self, net: Any, build: Callable[[], Any], setup: Setup) -> Replica:
        """Build the replica of `Distilled`."""
        method = Distilled("", self.spec.weight, self.spec.labels, self.spec.temperature)
        return DistilledReplica(net, self.teacher, method, setup)

    def held(self, epoch: int) -> tuple[int, int]:
        """Hold nothing out."""
        return 0, 0


class Hat:
    """The supernet, what is searched in it and what is found; `bench` has the data."""

    def __init__(self, folder: Path):
        _, _, shrink, search_job, train, _ = yaml.safe_load_all((ROOT / "jobs/multi30k_hat.yaml").read_text())
        self.job, self.searched = ShrinkJob.model_validate(shrink), SearchJob.model_validate(search_job)
        self.folder, self.bench = folder, Bench(folder, 0, "hat")
        self.model = {**shrink["model"], "vocab_size": self.bench.model["vocab_size"]}
        self.batch, self.optim = shrink["batch"], OptimSpec.model_validate(train["optim"])
        self.teacher = TeacherSpec.model_validate(train["teacher"])

    # ------------------------------------------------------------------------------------------------ supernet

    def fit(self) -> Row:
        """Train the supernet, or go on: the last stage of the job."""
        torch.manual_seed(self.job.seed)
        stage, net = self.job.stages[-1], models.build(**self.model)
        space: Any = spaces(self.job, net.space)[-1]  # type: ignore[arg-type]
        optim = stage_job(self.job, len(self.job.stages) - 1, None).optim
        method, largest = Supernet(space, stage.subnets, stage.sandwich, 0.0, None), space.largest()
        return self.bench.learned(method, net, optim, self.batch, lambda net: net.extract(largest))

    @cached_property
    def net(self) -> Any:
        """The trained supernet."""
        net = models.build(**self.model)
        net.load_state_dict(safetensors.torch.load_file(self.bench.file("best.safetensors")))
        return net.eval()

    # ------------------------------------------------------------------------------------------------ latency

    @cached_property
    def fresh(self) -> Any:
        """The supernet as it is built, whose subnets take as long."""
        torch.manual_seed(0)
        return models.build(**self.model).eval()

    @cached_property
    def table(self) -> latency_table.LatencyTable:
        """The table of this machine."""
        path = self.bench.file("table.json")
        return profiler.profile(self.fresh, self.model, path, rounds=ROUNDS, calibrate=CALIBRATE)

    def tabled(self) -> Row:
        """How well the table, and what learns from the subnets measured whole, tells latencies."""
        return {**latency_table.summary(self.table), **latency_predictor.errors(self.fresh, self.table)}

    @cached_property
    def prices(self) -> Prices:
        """What subnets take by the table."""
        return Prices(self.fresh, None, latency_table.meter(self.table, "table"))

    def spoken(self, net: Any) -> Translation:
        """A network translating the sentence of the table."""
        return Translation(net.eval(), self.fresh.spoken)

    def limited(self) -> Row:
        """What the Transformer takes on the scale of the table: by subnets that are timed in turn with it, near it."""
        base, x = self.spoken(models.build(**self.bench.model)), torch.zeros(1)
        near = sorted(map(Arch.from_dict, (row.arch for row in self.calibrated)), key=self.ms)
        guess = median(self.turn(base, arch).ratio * self.ms(arch) for arch in near[:3])
        near = sorted(near, key=lambda arch: abs(self.ms(arch) / guess - 1))[:COMPARED]
        said = sorted(self.turn(base, arch).ratio * self.ms(arch) for arch in near)
        largest = in_turn(lambda: base(x), partial(self.spoken(self.net_of(self.fresh.space.largest())), x))
        return {
            "transformer_ms": median(said),
            "by_subnets_ms": said,
            "over_largest": largest.to_plain("transformer", "largest"),
            "largest_ms": self.ms(self.fresh.space.largest()),
        }

    @property
    def calibrated(self) -> Any:
        assert self.table.calibration is not None
        return self.table.calibration.rows

    def ms(self, arch: Arch) -> float:
        """What the table says of a subnet."""
        return self.prices.metered(arch)["latency_ms"]

    def net_of(self, arch: Arch) -> Any:
        """A subnet as it is built."""
        return self.fresh.extract(arch)

    def turn(self, base: Translation, arch: Arch) -> Pairs:
        """The Transformer in turn with a subnet."""
        x, other = torch.zeros(1), self.spoken(self.net_of(arch))
        return in_turn(lambda: base(x), lambda: other(x), COMPARED)

    # ------------------------------------------------------------------------------------------------- search

    def look(self, seed: int) -> Row:
        """Evolution as the job has it and random search, as many evaluations each."""
        limit = LIMIT * row_of(self.bench, "limit", self.limited)["transformer_ms"]
        problem = Problem(self.prices.table, self.prices.matrix(["latency_ms"]), {"latency_ms": limit})
        path = self.bench.file("judged.jsonl")
        lines = map(json.loads, path.read_text().splitlines() if path.exists() else ())
        known = {Arch.from_dict(one["arch"]): one["perplexity"] for one in lines}
        short = Split(self.bench.val.pairs[:JUDGED], [])

        def perplexity(arch: Arch) -> float:
            if arch not in known:
                known[arch] = self.bench.perplexity(self.bench.network(self.net.extract(arch)), short)
                with path.open("a") as out:
                    out.write(json.dumps({"arch": arch.to_dict(), "perplexity": known[arch]}) + "\n")
            return known[arch]

        def score(codes: Any) -> Any:
            return np.array([-perplexity(arch) for arch in problem.table.archs(codes)])

        start, out = time.process_time(), {}
        evolution = self.searched.strategy
        for name, way in ("evolution", evolution), ("random", Random(evaluations=evolution.num_evaluations)):
            pool = search(problem, way, score, seed, evolution.num_evaluations)
            (best,) = pool.top(1).trials(problem.table)
            told = {"perplexity": -best.metric, "ms": best.costs["latency_ms"], "evaluations": len(pool)}
            out[name] = {**told, "arch": best.arch.to_dict()}
        return {**out, "limit_ms": limit, "core_minutes": (time.process_time() - start) / 60}

    # -------------------------------------------------------------------------------------------------- found

    @cached_property
    def found(self) -> dict[str, Any]:
        """What evolution found first, as a model."""
        return {**self.model, "arch": row_of(self.bench, "search-0", partial(self.look, 0))["evolution"]["arch"]}

    def bench_of(self, seed: int) -> Bench:
        """Files of the subnet trained with a seed."""
        bench = Bench(self.folder, seed, "hat-found")
        bench.model = self.found
        return bench

    def fit_found(self, seed: int) -> Row:
        """Train the subnet on from what it inherits, beside the Transformer of that seed as its teacher."""
        torch.manual_seed(seed)
        method = Taught(Bench(self.folder, seed).trained.net, self.teacher)
        net = self.net.extract(Arch.from_dict(self.found["arch"]))
        return self.bench_of(seed).learned(method, net, self.optim, self.batch)

    def score_found(self, seed: int) -> Row:
        """BLEU of the subnet beside that of the Transformer of the same seed."""
        base, bench = Bench(self.folder, seed), self.bench_of(seed)
        transformer = row_of(base, "trained", partial(TRANSFORMER["trained"], base))["bleu"]
        row = bench.score(bench.trained, "found", base.file("trained.txt"))
        return {"transformer": transformer, "perplexity": bench.perplexity(bench.trained, bench.test), **row}

    def inherited(self) -> Row:
        """BLEU of the subnet as it comes out of the supernet."""
        base, net = Bench(self.folder, 0), self.net.extract(Arch.from_dict(self.found["arch"]))
        network = self.bench.network(net, self.found)
        return self.bench.score(network, "inherited", base.file("trained.txt"))

    def timed(self) -> Row:
        """The subnet in turn with the Transformer: the sentence of the table, and sentences of the test split."""
        base, bench = Bench(self.folder, 0), self.bench_of(0)
        a, b, x = self.spoken(bench.trained.net), self.spoken(base.trained.net), torch.zeros(1)
        lengths = [int((one[:, 0] != 1).sum()) for one, _ in bench.test.pairs]
        rows = np.argsort(np.abs(np.array(lengths) - self.fresh.spoken.length), kind="stable")[:SPOKEN]
        sources = [np.ascontiguousarray(bench.test.piece([row]).data[:, 0, 0]) for row in rows]

        def said(network: Network) -> list[Any]:
            return [translations(network, one) for one in sources]

        whole = in_turn(partial(said, bench.trained), partial(said, base.trained), COMPARED)
        found = in_turn(lambda: a(x), lambda: b(x), PAIRS)
        told = {"table": found.to_plain("found", "transformer"), "beam": whole.to_plain("found", "transformer")}
        sizes = [
            sum(one.numel() for one in compress.build(**model).parameters()) for model in (bench.model, base.model)
        ]
        return {**told, "parameters": sizes}


ROWS: dict[str, Callable[[Hat], Row]] = {
    "supernet": Hat.fit,
    "table": Hat.tabled,
    "limit": Hat.limited,
    **{f"search-{seed}": lambda hat, seed=seed: hat.look(seed) for seed in SEEDS},
    **{f"fit-{seed}": lambda hat, seed=seed: hat.fit_found(seed) for seed in SEEDS},
    **{f"found-{seed}": lambda hat, seed=seed: hat.score_found(seed) for seed in SEEDS},
    "inherited": Hat.inherited,
    "timed": Hat.timed,
}


def main() -> None:
    """Print a line per row."""
    torch.set_num_threads(1)
    hat = Hat(Path(os.environ.get("SLIMRAY_BENCH_DIR", tempfile.gettempdir())))
    for name in os.environ.get("SLIMRAY_ROWS", " ".join(ROWS)).split():
        print(row_of(hat.bench, name, partial(ROWS[name], hat)), flush=True)


if __name__ == "__main__":
    main()
