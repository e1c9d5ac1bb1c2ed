"""The sections of a job that several verbs read: a network, a training, a sweep, the scoring of subnets.

A training is a section in its own right: the stages of `shrink` and `proxyless` are trainings too. Plain values with
ranges and help texts; this file imports neither Ray nor torch, so that checking a job is quick.
"""

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import (
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from slimray.data.spec import DataSpec
from slimray.runs.notify import NotifySpec
from slimray.runs.tracking import TrackingSpec
from slimray.spec import Spec
from slimray.train.spec import (
    BatchSpec,
    CheckpointSpec,
    InitSpec,
    LimitsSpec,
    OptimSpec,
    ScaleSpec,
    TeacherSpec,
    TrainScaleSpec,
)

OWNED = {  # arguments of networks that are not options of `model`
    "num_classes": "the dataset defines it",
    "vocab_size": "the dataset defines it",
    "zero_gamma": "write optim.zero_gamma",
}


class WorkerJob(Spec):
    """A job that runs on the workers of its section `scale`."""

    streams: ClassVar[bool] = True  # True if decoders feed its workers while they run

    if TYPE_CHECKING:
        scale: ScaleSpec

    @property
    def local_cpus(self) -> int:
        """Logical CPUs that a local cluster needs for the job."""
        return self.scale.local_cpus


class ModelSpec(Spec):
    """The network: `name`, a row of the MODELS table, with the options of that row (`width`, `num_segments`, ...), or
    `run`, the network that a run holds: trained, found by a search, or a supernet."""

    model_config = ConfigDict(extra="allow")

    name: str | None = None
    """Row of the table of models; `slimray explain models` lists them."""
    run: str | None = None
    """Name or URI of a run, in place of `name`: its architecture, at the resolution and the frames it was made for
    (`data.size` is then the size before that). To start from its weights too, write `init: {from: NAME}`."""

    def options(self) -> dict[str, Any]:
        """Return the options of the network: all fields besides `name` and `run`."""
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _one_network(self) -> "ModelSpec":
        if (self.name is None) == (self.run is None):
            raise ValueError("name: is required: a row of the table of models; or write run, a run with a network")
        if self.run is not None and self.options():
            option = next(iter(self.options()))
            raise ValueError(f"{option}: is for name, the network of a run has its own options: leave it out")
        return self

    @model_serializer(mode="wrap")
    def _written(self, default: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in default(self).items() if value is not None or key not in ("name", "run")}


def require_shares(batch: BatchSpec, scale: ScaleSpec) -> None:
    """Raise ValueError, as validators do, for a batch that cannot be split over the workers."""
    per_pass, elastic = scale.most * batch.per_worker, scale.most > scale.fewest
    if batch.tokens and batch.num_microbatches < scale.most:
        raise ValueError(
            f"batch.tokens: {batch.tokens} leaves some of {scale.most} workers without work: lower "
            "batch.per_worker_tokens"
        )
    if per_pass and batch.total % per_pass and not elastic:
        raise ValueError(
            f"batch.total: {batch.total} must be a multiple of scale.workers x batch.per_worker "
            f"({scale.most} x {batch.per_worker} = {per_pass})"
        )
    if not batch.tokens and batch.total < scale.most:
        raise ValueError(f"batch.total: {batch.total} leaves some of {scale.most} workers without work")


class TrainJob(WorkerJob):
    """Train a network on a dataset."""

    kind: Literal["train"]
    name: str
    """Name of the run, a folder of the storage."""
    data: DataSpec
    model: ModelSpec
    init: InitSpec | None = None
    teacher: str | TeacherSpec | None = None
    """Teacher for distillation: the name or URI of a run with a network, or a section with weights."""
    batch: BatchSpec
    optim: OptimSpec
    scale: TrainScaleSpec = TrainScaleSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    tracking: TrackingSpec = TrackingSpec()
    notify: NotifySpec | None = None
    limits: LimitsSpec = LimitsSpec.model_validate({})
    average: Literal["logits", "prob"] = "logits"
    """Average the views of a validation sample as logits or as probabilities."""
    seed: int = Field(0, ge=0)
    """Seed of order, augmentation, dropout and starting weights."""
    log_every: int = Field(10, ge=1)
    """Steps between metric rows."""
    val_every: int = Field(1, ge=1)
    """Epochs between validations; the last epoch is always validated."""

    @model_validator(mode="after")
    def _sections_fit(self) -> "TrainJob":
        require_shares(self.batch, self.scale)
        if self.batch.tokens and self.optim.precise_norm:
            raise ValueError("optim.precise_norm: counts samples and cannot be combined with batch.tokens")
        if self.optim.zero_gamma and self.init is not None:
            raise ValueError("optim.zero_gamma: would overwrite weights of init: use one of the two")
        if self.optim.mutual and (self.init is not None or self.optim.groups == "tsm"):
            taken = "init" if self.init is not None else "optim.groups: tsm"
            raise ValueError(f"optim.mutual: trains two networks from scratch and cannot be combined with {taken}")
        if self.optim.mutual and self.scale.compile:
            raise ValueError("scale.compile: compiles one network and cannot be combined with optim.mutual")
        if self.optim.norm == "sync" and not self.scale.gpus_per_worker:
            raise ValueError("optim.norm: sync needs GPUs: set scale.gpus_per_worker, or use local")
        if self.optim.precision == "tf32" and not self.scale.gpus_per_worker:
            raise ValueError("optim.precision: tf32 needs GPUs: set scale.gpus_per_worker, or use fp32")
        if 0 < self.optim.precise_norm < 2 * self.scale.most:
            raise ValueError(
                f"optim.precise_norm: {self.optim.precise_norm} samples are too few for {self.scale.most} workers: set "
                f"at least {2 * self.scale.most}; a few thousand are usual"
            )
        for name, given in (("teacher", self.teacher is not None), ("scale.compile", self.scale.compile)):
            if self.optim.hebbian and given:
                raise ValueError(
                    f"optim.hebbian: is for plain training and cannot be combined with {name}: leave one out"
                )
        if self.teacher is not None and self.optim.mutual:
            raise ValueError("optim.mutual: cannot be combined with teacher: use one of the two")
        if self.checkpoint.ship == "best" and self.data.val is None:
            raise ValueError("checkpoint.ship: best needs validations: write data.val, or use last")
        return self


class SharedOptimSpec(OptimSpec):
    """Optimizer of the weights in all stages; each stage has its own learning rate and epochs."""

    lr: float = Field(1.0, exclude=True)
    """Not a field here: each stage has its own."""
    epochs: int = Field(1, exclude=True)
    """Not a field here: each stage has its own."""
    steps: None = Field(None, exclude=True)
    """Not a field here: stages count epochs."""
    warmup_epochs: float = Field(0, exclude=True)
    """Not a field here: each stage has its own."""

    @field_validator("steps", mode="before")
    @classmethod
    def _no_steps(cls, value: object) -> object:
        if value is not None:
            raise ValueError("is for single trainings, stages count epochs: leave it out")
        return value

    @model_validator(mode="after")
    def _stages_decide(self) -> "SharedOptimSpec":
        written = self.model_fields_set if self.milestones else self.model_fields_set - {"milestones"}  # () if resolved
        for name in ("lr", "epochs", "warmup_epochs", "milestones"):
            if name in written:
                raise ValueError(f"{name}: each stage has its own: write it there")
        for name in ("mutual", "hebbian"):
            if getattr(self, name):
                raise ValueError(f"{name}: is for plain training: leave it out here")
        if self.precise_norm:
            raise ValueError("precise_norm: is for plain networks, each subnet is recalibrated: leave it out")
        if self.norm != "local":
            raise ValueError("norm: must be local: a supernet keeps statistics per worker and subnets get their own")
        return self


class JudgeSpec(Spec):
    """Recalibration and scoring of subnets."""

    calibrate: int = Field(2000, ge=16)
    """Training samples from which the BatchNorm statistics of a subnet are recomputed."""
    calibrate_batch: int = Field(100, ge=2)
    """Samples per batch in recalibration."""
    samples: int | None = Field(None, ge=1)
    """Number of samples to score on, the first of the split; null: all."""
    batch: int = Field(64, ge=1)
    """Samples scored at once."""


class RangeSpec(Spec):
    """Values between two bounds."""

    low: float
    """Smallest value."""
    high: float
    """Largest value."""
    log: bool = True
    """Draw uniformly from the logarithms of the values."""

    @model_validator(mode="after")
    def _in_order(self) -> "RangeSpec":
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"low, high: need low < high, and low > 0 with log (got {self.low:g}, {self.high:g})")
        return self


class SweepSpec(Spec):
    """Settings to try, and the number of trials."""

    over: dict[str, tuple[float, ...] | RangeSpec] = Field(min_length=1)
    """Field -> values to try, or their range `{low, high}`: `{lr: [0.001, 0.003]}`."""
    search: Literal["grid", "random", "optuna"] = "grid"
    """All combinations, random ones, or Optuna's proposals (TPE)."""
    trials: int = Field(8, ge=1, le=1000)
    """Number of trials of `random` and `optuna`."""
    concurrent: int = Field(1, ge=1)
    """Trials at once; each takes `scale.workers` workers."""
    early_stop: bool = False
    """Stop trials whose training loss lags behind that of others after the same number of epochs (ASHA)."""
    by: Literal["mean", "largest", "smallest"] = "mean"
    """Score of a trial: the mean over the scored subnets, or that of the largest or smallest one."""

    @model_validator(mode="after")
    def _searchable(self) -> "SweepSpec":
        for name, values in self.over.items():
            if isinstance(values, RangeSpec) and self.search == "grid":
                raise ValueError(f"over.{name}: a grid needs a list of values, or search: random")
            if isinstance(values, tuple) and not values:
                raise ValueError(f"over.{name}: no value to try")
        return self

    @property
    def count(self) -> int:
        """Number of trials of the sweep."""
        if self.search != "grid":
            return self.trials
        return math.prod(len(values) for values in self.over.values() if isinstance(values, tuple))
