"""The one data-parallel training loop: place in the plan, exact resume, checkpoints, validation, timers.

`fit` is the worker function that `workers.launch` runs on every rank. The training method (methods/) defines what a
step computes; this file does everything around it. The plan (data/plan.py) decides which samples a step consumes, so
progress is (epoch, step), and a run whose worker was killed ends with the same weights. Metrics never pass through
`ray.train.report` (a barrier drained every 2 s). Checkpoints go to the run folder, in the background and with a marker
of completeness; saving and validating never change training state. A bad sample keeps its slot with weight 0; all ranks
agree on the set of bad samples at the end of an epoch.
"""

import contextlib
import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import ray
import ray.train
import safetensors.torch
import torch
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import get_device
from torch import Tensor

from slimray import runs
from slimray.data.pipeline import Batch, FeedConfig
from slimray.data.plan import SHUFFLE, Phase
from slimray.edge.compiler import without_compiler
from slimray.spec import RunFailed
from slimray.tasks import TASKS
from slimray.tasks.network import Input, predict_outputs
from slimray.tasks.precision import arithmetic_of, judged_in
from slimray.tasks.task import Score, require_finite
from slimray.train import learn, optimizers, pieces, speed
from slimray.train.checkpoints import Progress, Saver
from slimray.train.config import FitConfig
from slimray.train.health import COMPUTING, OTHERS, end_process
from slimray.train.methods.method import part
from slimray.train.metrics import BadSamples, Clock, Dropped, News, Records, training_row
from slimray.train.notices import Notices, tell_stuck
from slimray.train.pieces import Cut
from slimray.train.ranks import Ranks, merge_scores
from slimray.train.shown import Shown
from slimray.train.start import make_replica
from slimray.train.workers import open_stream

MAX_BAD_STEPS = 10  # steps in a row with a non-finite gradient after which the run ends, once it reads the count
ARITHMETIC = 2  # rule for a step's divisor of the loss; a run that began with rule 1 (before 2026-11-29) keeps it


class _Rank:
    """One rank of a training run between its first and its last step."""

    def __init__(self, config: FitConfig):
        context = ray.train.get_context()
        self.config, self.task = config, TASKS[config.task]
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device = get_device()
        torch.set_num_threads(max(1, int(config.scale.cpus_per_worker)))
        self.run = runs.run_at(config.run_uri)
        self.num_train = config.sources["train"].num_samples
        self.progress = Progress()
        self.dropped, self.looks, self.arithmetic, self.shuffle = Dropped(self.device), False, ARITHMETIC, SHUFFLE
        self.saved_at, self.news = time.monotonic(), News(config, self.rank)
        limit_s = config.scale.data_timeout_s + 20
        self.ranks = Ranks(self.rank, self.world, self.device, limit_s, self._stuck, self._reduces)
        self.timer, self.clock = self.ranks.timer, Clock(self.ranks.timer)
        self.ranks.require_all_reduce()
        self.bad = BadSamples(self.num_train, self.ranks)
        self.replica = make_replica(config, self.ranks)
        self.shown = Shown(self.replica, self.ranks, config.pixels)
        self.notices = Notices(config.limits, self.ranks, self._save_now, config.progress_actor.update.remote)
        self.result: Score | None = None
        if "val" in config.recipes:
            self.result = self.task.score(len(config.classes), config.recipes["val"])
        self._restore()
        self.records = Records(config, self.run, self.rank)
        self.best_metric = config.checkpoint.best_metric or f"val/{self.task.best.name}"
        keep = config.checkpoint.keep_last
        best = (self.best_metric, self.task.metric(self.best_metric).better)
        saved = partial(config.progress_actor.saved.remote)
        self.saver = Saver(self.run, keep, best, self.records.flush, saved) if self.rank == 0 else None

    def _stuck(self, doing: str, seconds: float, stacks: str) -> None:
        """Report where the rank is stuck, and end it unless it only waits for others. The watchdog calls this."""
        waits = doing == OTHERS or self._reduces()
        tell_stuck(self.config, self.run, self.rank, OTHERS if waits else doing, seconds, stacks)
        if not waits:
            end_process()

    def _reduces(self) -> bool:
        """Return True while the rank waits for others in the all-reduce of the gradients."""
        replica = getattr(self, "replica", None)  # does not exist yet at the start
        return replica is not None and replica.reduces()

    # ------------------------------------------------------------------------------------ resume and saving

    def _restore(self) -> None:
        """Load the newest complete checkpoint, the same one on every rank. A collective."""
        if not runs.exists(self.run, "status.json"):
            raise RunFailed(f"{self.run.uri}: is another folder on this machine: use a shared folder, s3:// or gs://")
        found = runs.read_newest(self.run) if self.rank == 0 else None  # rank 0 reads for all
        if found is not None:
            runs.drop_after(self.run, found[0].step)
        meta = broadcast_from_rank_zero(None if found is None else found[0].meta)
        if self.rank == 0:
            self.config.progress_actor.begin.remote(0 if found is None else found[0].step, self.world)
        if meta is None:
            return
        tensors = self._shared(None if found is None else found[1])
        if meta.get("dataset", self.config.dataset) != self.config.dataset:
            raise RunFailed("the dataset is not the one the run began with: restore it, or start again with --restart")
        self.replica.load(part(tensors, "replica."))
        self.shown.load(tensors)
        self.arithmetic, self.shuffle = meta.get("arithmetic", 1), meta.get("shuffle", 1)
        for name, count in self._counts().items():
            if name in tensors:
                count.copy_(tensors[name])
        self.bad.load(tensors)
        self.progress = Progress(**meta["progress"])

    def _shared(self, files: dict[str, bytes] | None) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint whose `files` rank 0 has read (None on the others). A collective."""
        return safetensors.torch.load(self.ranks.share(None if files is None else files["state.safetensors"]))

    def _counts(self) -> dict[str, Tensor]:
        """Return the counts of the last validation, by their names in a checkpoint."""
        counts = () if self.result is None else self.result.tensors()
        return {f"score.{number}": count for number, count in enumerate(counts)}

    def _save(self) -> None:
        """Start writing a checkpoint of all ranks' state. A collective."""
        if self.saver is None:  # rank 0 does so in the background
            self.records.flush()
        with self.ranks.waiting():
            tensors = {f"replica.{k}": v for k, v in self.replica.tensors().items()}
        tensors |= self._counts()
        tensors |= self.bad.tensors()
        tensors |= self.shown.tensors()
        self.saved_at = time.monotonic()
        if self.saver is not None:
            progress = self.progress.to_dict()
            meta = {
                "progress": progress,
                "epoch": self.progress.epoch,
                "metrics": progress["last"],
                "world": self.world,
                "dataset": self.config.dataset,
                "arithmetic": self.arithmetic,
                "shuffle": self.shuffle,
            }
            self.ranks.watchdog.beat("saving a checkpoint")
            self.saver.save(tensors, meta)

    def _save_due(self) -> bool:
        """Return True if all ranks save now: by steps, or by rank 0's clock, which it shares at log steps."""
        spec, steps = self.config.checkpoint, self.progress.total_steps
        if spec.every_steps:
            return steps % spec.every_steps == 0
        if steps % self.config.log_every:
            return False
        return self.ranks.agree(time.monotonic() - self.saved_at >= spec.every_s)

    # ------------------------------------------------------------------------------------------- the passes

    @property
    def samples_seen(self) -> int:
        """Number of positions of the plan consumed so far; learning rate and warm-up depend on nothing else."""
        seen = self._training(self.progress.epoch).num_trained(self.progress.step)
        return self.progress.epoch * self.num_learned + seen

    @property
    def num_learned(self) -> int:
        """Number of samples on which an epoch trains the weights."""
        phase = self._training(self.progress.epoch)
        return phase.num_trained(phase.num_steps)

    def _rate(self, phase: Phase) -> float:
        """Return the learning rate of the next step."""
        seen, steps = (self.num_learned, self.samples_seen), (self.progress.total_steps, phase.num_steps)
        return optimizers.learning_rate(self.config.optim, self.config.batch_total, *seen, *steps)

    def phases(self) -> tuple[Phase, ...]:
        """Return the remaining passes: training epochs from the current place on, with validations between them."""
        epochs, passes = self.config.optim.epochs, []
        before = self.progress.epoch - 1
        if self.progress.step == 0 and before >= self.progress.validated:  # its validation may have been interrupted
            passes += self._after(before)
        for epoch in range(self.progress.epoch, epochs):
            first = self.progress.step if epoch == self.progress.epoch else 0
            passes += [self._training(epoch, first), *self._after(epoch)]
        return tuple(passes)

    def _after(self, epoch: int) -> list[Phase]:
        """Return the passes after training `epoch`: precise statistics if wanted, and the validation if it is due."""
        due, last, passes = self._validates(epoch), epoch + 1 == self.config.optim.epochs, []
        if self.config.optim.precise_norm and (due or (last and self.shown.norms is None)):
            passes.append(self._precise(epoch))
        if due:
            passes.append(self._validation(epoch))
        return passes

    def _precise(self, epoch: int) -> Phase:
        """Return the pass over training samples that recomputes BatchNorm statistics."""
        config, rows = self.config, max(2, self.config.per_worker)
        name, recipe, limit = "precise", config.recipes["train"], config.optim.precise_norm
        numbers = (epoch, self.num_train, rows * self.world)
        return Phase(name, "train", *numbers, True, recipe, limit=limit, version=self.shuffle)

    def _training(self, epoch: int, first: int = 0) -> Phase:
        config, recipe = self.config, self.config.recipes["train"]
        bags, numbers = config.bags.get("train"), (epoch, self.num_train, config.window)
        held = config.method.held(epoch)
        phase = Phase("train", "train", *numbers, True, recipe, first, *held, config.drop_last, 0, bags, self.shuffle)
        if config.optim.steps is not None:  # the last pass ends after the last of these steps
            phase = replace(phase, steps=max(0, config.optim.steps - epoch * phase.num_steps))
        if not phase.num_steps:
            raise RunFailed(
                f"batch.drop_last: {self.num_train} training samples do not fill a batch of {config.batch_total}: "
                "lower batch.total, or leave it out"
            )
        return phase

    def _validation(self, epoch: int) -> Phase:
        config = self.config
        num_val, recipe = config.sources["val"].num_samples, config.recipes["val"]
        return Phase("val", "val", epoch, num_val, config.window, False, recipe, bags=config.bags.get("val"))

    def _validates(self, epoch: int) -> bool:
        due = (epoch + 1) % self.config.val_every == 0 or epoch + 1 == self.config.optim.epochs
        return due and "val" in self.config.sources

    def run_all(self) -> dict[str, Any]:
        """Train to the end of the plan; rank 0 returns the final numbers, or what the launch must do next."""
        try:
            phases = self.phases()
            return (self._run(phases) if phases else None) or self._finish()
        finally:
            self.ranks.watchdog.close()
            self.records.close()

    def _run(self, phases: tuple[Phase, ...]) -> dict[str, Any] | None:
        config = self.config
        feed = FeedConfig(
            phases=phases,
            sources=config.sources,
            seed=config.seed,
            world=self.world,
            max_rows=max(2, config.per_worker) if config.optim.precise_norm else config.per_worker,
            decode_slots=config.decode_slots,
            decode_timeout_s=config.decode_timeout_s,
            wait_timeout_s=config.scale.data_timeout_s,
        )
        with open_stream(feed, config.feeder, config.progress_actor, self._cut) as stream:
            score, net, started = None, None, self.timer.now()
            asked = started  # when the data of the next step was requested
            self.ranks.watchdog.beat("waiting for data")
            for phase, step, cut in stream:
                batch = cut.batch
                self.ranks.watchdog.beat(COMPUTING)
                last = step + 1 == phase.num_steps
                if phase.name == "train":
                    self.clock.add(("wait", asked, self.timer.now()))
                    failure = self._train(phase, step, cut)
                    if failure:
                        return {"failed": failure}
                    started = self.clock.end_step(started)  # what follows belongs to the next step
                    self._log(phase, step)
                    if last:
                        self.bad.end_epoch()
                        self.progress.epoch, self.progress.step = self.progress.epoch + 1, 0
                    if self.looks and (end := self.notices.look(self.progress)):
                        return end
                    if self._save_due() if not last else not self._validates(phase.epoch):
                        self._save()
                elif phase.name == "precise":
                    net = self.shown.net() if net is None else net
                    self.shown.collect(net, batch)
                    if last:
                        self.shown.renew(net)
                        if not self._validates(phase.epoch):
                            net = None
                            self._save()
                    self.news.tell(phase, step, self.progress.total_steps, self.clock)
                else:
                    net = self.shown.net() if net is None else net
                    score = self.task.score(len(config.classes), config.recipes["val"]) if score is None else score
                    if batch is not None:
                        self.bad.note(batch, phase, self.records.bad)
                        seed, precision = (config.seed, step, self.rank), config.optim.precision
                        for one in pieces.parts(batch, phase, step, config.per_worker, self.ranks):
                            score_batch(net, one, config.pixels, self.device, config.per_worker, score, seed, precision)
                    self.news.tell(phase, step, self.progress.total_steps, self.clock)
                    self.looks = bool(self.ranks.sum(self.notices.due(self.progress))[0])
                    if last:
                        self._end_validation(phase, score)
                        score = net = None
                    if self.looks and (end := self.notices.look(self.progress)):
                        return end
                    if last:
                        self._save()
                asked = self.timer.now()
                started = started if phase.name == "train" else asked
                self.ranks.watchdog.beat("waiting for data")
        return None

    def _cut(self, phase: Phase, step: int, batch: Batch | None) -> Cut:
        """Cut a batch into microbatches, in the thread that fetched it."""
        keep = np.zeros(0, bool) if batch is None else batch.valid & ~self.bad.is_known(batch.sample)
        if phase.name != "train":
            return Cut(batch, keep, [])
        return pieces.cut(batch, keep, phase, step, self.config.per_worker, self.ranks)

    def _train(self, phase: Phase, step: int, cut: Cut) -> str | None:
        """Take one step over the global batch; return the sentence that ends the run, or None.

        The loss of the step is the sum of the samples' losses over the sum of their weights, times the window's share
        of a full batch: a short last window moves the weights less, and class weights do not change the learning rate.
        """
        config, clock, progress, batch = self.config, self.clock, self.progress, cut.batch
        keep, new_bad = np.zeros(0, bool), 0.0
        if batch is not None:
            known = self.bad.is_known(batch.sample)
            keep, new_bad = batch.valid & ~known, float((~batch.valid & ~known).sum())
            self.bad.note(batch, phase, self.records.bad)
        if not np.array_equal(keep, cut.keep):  # cut before the end of the epoch in which a sample turned out bad
            cut = self._cut(phase, step, batch)
        empty = [float(not len(piece.data)) for piece in cut.pieces] if config.optim.norm == "sync" else []
        start = self.timer.now()
        own = (
            0.0 if batch is None else float(self.task.weights(torch.from_numpy(batch.label[keep]), config.optim).sum())
        )
        looks, counted, lr = self.notices.due(progress), float(keep.sum()), self._rate(phase)
        num_valid, weight, num_bad, looks, *num_empty = self.ranks.sum(counted, own, new_bad, looks, *empty)
        self.looks = bool(looks)
        clock.add(("sum", start, self.timer.now()))
        if num_bad and (failure := self.bad.too_many(config.max_bad_fraction)):
            return failure
        if weight:
            frozen = frozenset(i for i, count in enumerate(num_empty) if count)
            seed = (config.seed, progress.total_steps)
            total = weight / phase.share(step) if self.arithmetic > 1 else num_valid
            report = self.replica.step(cut.pieces, total, lr, seed, frozen, phase.is_held(step))
            clock.loss += report.loss
            clock.add(*report.spans)
            self.dropped.note(report.fits)
        if self.records.samples is not None and batch is not None:
            self.records.samples.write(
                {"step": progress.total_steps, "epoch": phase.epoch, "ids": batch.sample.tolist()}
            )
        progress.step, progress.total_steps = step + 1, progress.total_steps + 1
        clock.samples += int(num_valid)
        clock.weight += weight
        self.shown.weights_changed()
        if self._logs(phase, step) or not self.replica.queued:
            most, dropped = self.dropped.look()
            clock.dropped += dropped
            if most >= MAX_BAD_STEPS:
                return f"the gradient was not finite for {MAX_BAD_STEPS} steps in a row (lr {lr:g}): lower optim.lr"
        return None

    def _logs(self, phase: Phase, step: int) -> bool:
        """Return True if metrics are written, and read off a GPU, after `step`, which is done."""
        return self.progress.total_steps % self.config.log_every == 0 or step + 1 == phase.num_steps

    def _save_now(self) -> None:
        """Save, and return once the checkpoint is on storage. A collective."""
        self._save()
        if self.saver is not None:
            self.saver.wait()
        self.ranks.sum(0.0)

    def _end_validation(self, phase: Phase, score: Score) -> None:
        with self.ranks.waiting():
            merge_scores(score, self.world, self.device)
        counted = score.result()
        if not counted["num_samples"]:
            raise RunFailed("no sample of the validation split decodes: see quarantine/ in the run folder")
        require_finite(counted, "validation")
        if counted.get("num_known", 1) == 0:
            raise RunFailed("data.val: no frustum of this split has a known object: validate on the labels' 2D boxes")
        numbers = {f"val/{k}": v for k, v in counted.items() if isinstance(v, float)}
        metric, progress = self.best_metric, self.progress
        if metric not in numbers:
            raise RunFailed(f"checkpoint.best_metric: {metric!r} is not among {', '.join(sorted(numbers))}")
        progress.validated = progress.epoch
        progress.last = {**numbers, "epoch": progress.epoch, "step": progress.total_steps}
        if self.task.metric(metric).improves(numbers[metric], progress.best.get(metric)):
            progress.best = dict(progress.last)
        self.result = score
        self.records.write_row(self.progress.total_steps, {"phase": "val", "epoch": progress.epoch, **numbers})
        if self.rank == 0:
            self.config.progress_actor.update.remote(last=progress.last, best=progress.best)

    def _take_best(self) -> None:
        """Go back to the state of the best validation, which ships. A collective."""
        files = None
        if self.saver is not None:
            self.saver.wait()
            best = runs.checkpoint_at(self.run, int(self.progress.best["step"]))
            files = runs.read_checkpoint(self.run, best)
        tensors = self._shared(files)
        self.replica.load(part(tensors, "replica."))
        self.shown.load(tensors)

    def _finish(self) -> dict[str, Any]:
        """Write the model folder once every checkpoint is on storage; return the final numbers. A collective."""
        config = self.config
        if config.checkpoint.ship == "best" and self.progress.best:
            self._take_best()
        net = self.shown.net()
        out: dict[str, Any] = {"best": self.progress.best, "last": self.progress.last}
        out["steps"] = self.progress.total_steps
        out["confusion"] = confusion_of(self.result)
        if self.saver is not None:
            self.saver.wait()
            weights = {k: v.detach().cpu().contiguous() for k, v in net.state_dict().items()}
            taken = {
                "recipe": config.recipes.get("val", config.recipes["train"]),
                "pixels": vars(config.pixels),
                "classes": list(config.classes),
                "task": config.task,
                "precision": judged_in(config.optim.precision),
            }
            runs.write_model(self.run, safetensors.torch.save(weights), config.model, taken)
        return out

    # ------------------------------------------------------------------------------------------------ metrics

    def _log(self, phase: Phase, step: int) -> None:
        clock, config = self.clock, self.config
        self.news.tell(phase, step, self.progress.total_steps, self.clock)
        if not self._logs(phase, step):
            return
        row = {
            "phase": "train",
            "epoch": phase.epoch + (step + 1) / phase.num_steps,
            "train/lr": self._rate(phase),
            **training_row(clock, self.ranks),
        }
        arithmetic = arithmetic_of(config.optim.precision, self.device)
        row["train/mfu"] = speed.mfu(config.macs, row["train/samples_per_s"] / self.world, self.device, arithmetic)
        row |= self.replica.numbers()
        self.records.show(self.progress.total_steps, row)
        self.records.write_row(self.progress.total_steps, row)
        if self.rank == 0 and step + 1 == phase.num_steps:
            self.config.progress_actor.update.remote(loss=(phase.epoch + 1, row["train/loss"]))
        self.clock = Clock(self.timer)


def fit(config: FitConfig) -> dict[str, Any]:
    """Run one rank of a training: return {"best", "last", "steps", "confusion"}, or what the launch must do next."""
    with contextlib.nullcontext() if config.compile else without_compiler():
        return _Rank(config).run_all()


# ------------------------------------------------------------------------------------------- shared by verbs


def confusion_of(score: Any) -> list[list[int]] | None:
    """Return the confusion matrix of a score as lists; None without a score, or where it has none (boxes, shapes)."""
    confusion = getattr(score, "confusion", None)
    return None if confusion is None else confusion.tolist()


def score_batch(
    net: torch.nn.Module,
    batch: Batch,
    pixels: Input,
    device: torch.device,
    rows: int,
    score: Score,
    seed: tuple[int, int, int],
    precision: str,
) -> None:
    """Add the valid rows of `batch` to `score`, in the arithmetic `precision` of the training.

    `seed` is (run seed, step, rank): the network's random draws are the same at every validation, also after a resume,
    so that the results of two validations differ by the weights alone.
    """
    if batch.valid.any():
        learn.seed_step(*seed)
        outputs = predict_outputs(net, batch.data[batch.valid], pixels, device, rows, precision)
        score.add(outputs, torch.from_numpy(batch.label[batch.valid]).to(device))
