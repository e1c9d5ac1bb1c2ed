"""What a `compress` job may write: its steps, one class each, told apart by `step`. Neither Ray nor torch."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from slimray.data.spec import DataSpec
from slimray.runs.notify import NotifySpec
from slimray.runs.tracking import TrackingSpec
from slimray.spec import Spec
from slimray.train.spec import BatchSpec, CheckpointSpec, InitSpec, ScaleSpec
from slimray.verbs.specs import JudgeSpec, ModelSpec, SharedOptimSpec, WorkerJob

Ratio = Annotated[float, Field(gt=0, le=1)]


class OriginalTeacherSpec(Spec):
    """The uncompressed network, or that of another run, teaches beside the labels (distillation, arXiv 1503.02531)."""

    run: str | None = None
    """Name or URI of a run; default the network that is compressed, as it was."""
    weight: float = Field(1.0, gt=0)
    """Weight of the teacher's answers in the loss."""
    labels: float = Field(1.0, ge=0)
    """Weight of the labels; 0 learns from the teacher alone."""
    temperature: float = Field(1.0, gt=0)
    """Both answers are softened by it; the loss is multiplied by its square, so that gradients keep their size."""


class TrainedSpec(Spec):
    """How long and how fast a step trains."""

    epochs: int = Field(ge=1)
    """Passes over the training split."""
    lr: float = Field(gt=0)
    """Learning rate for a batch of `optim.reference_batch`; usual is a tenth of the rate of training, or less."""
    warmup_epochs: float = Field(0, ge=0)
    """Epochs over which the rate rises to its peak."""
    teacher: OriginalTeacherSpec | None = None
    """Learn from the uncompressed network too; `teacher: {}` takes it with weight 1."""
    scale_dropout: bool = True
    """Lower the dropout in front of a sparse layer: D x sqrt(weights kept / weights)."""


class FinetuneStep(TrainedSpec):
    """Train the network as it is now; pruned weights stay zero."""

    step: Literal["finetune"]


class SensitivitySpec(Spec):
    """Keep as few weights of each layer as cost at most `drop` while all other layers stay as they are."""

    drop: float = Field(ge=0)
    """Points of the first metric that pruning one layer alone may cost."""
    ratios: tuple[Ratio, ...] = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)
    """Shares of a layer's weights that are tried, ascending; a layer that bears none of them stays whole."""

    @model_validator(mode="after")
    def _ascending(self) -> "SensitivitySpec":
        if list(self.ratios) != sorted(set(self.ratios)) or not self.ratios:
            raise ValueError(f"ratios: must be ascending, each once (got {list(self.ratios)})")
        return self


class SparsifyStep(Spec):
    """Unstructured pruning: the smallest weights of a layer become zero. Files shrink, dense kernels get no faster."""

    step: Literal["sparsify"]
    keep: Ratio | dict[str, Ratio] | None = None
    """Share of the weights that stay, for all layers or by name of the layer (those not named stay as they are)."""
    quality: Annotated[float, Field(gt=0)] | dict[str, Annotated[float, Field(gt=0)]] | None = None
    """Threshold in standard deviations of a layer's weights that are not zero, for all layers or by name."""
    sensitivity: SensitivitySpec | None = None
    """Measure how much each layer bears: on `hold_out` samples, or else on the validation split."""
    rounds: int = Field(1, ge=1, le=100)
    """Prune in so many rounds, each followed by `finetune`: the share of `keep` falls by equal factors; `quality` and
    `sensitivity` apply to what is left each time."""
    finetune: TrainedSpec | None = None
    """Training after each round."""

    @model_validator(mode="after")
    def _one_rule(self) -> "SparsifyStep":
        given = [name for name in ("keep", "quality", "sensitivity") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"keep: write one of keep, quality and sensitivity (got {', '.join(given) or 'none'})")
        if self.rounds > 1 and self.finetune is None:
            raise ValueError("rounds: more than one need finetune, the training after each of them")
        return self


Step = Annotated[SparsifyStep | FinetuneStep, Field(discriminator="step")]


class TimingSpec(Spec):
    """How the networks of all steps are timed against the original, in turn, on this machine."""

    hardware: Literal["cpu-eager", "cpu-compiled", "cpu-onnx", "cuda"] = "cpu-eager"
    """What runs them; `cpu-onnx` (extra `edge`) is nearest to how networks are shipped."""
    threads: int = Field(1, ge=1)
    """Threads of the network on a CPU."""
    batch: int = Field(1, ge=1)
    """Samples at once."""
    pairs: int = Field(9, ge=9, le=1000)
    """Measurements of each; told is the median of their ratios with its interval."""


class CompressJob(WorkerJob):
    """Make a network smaller, step by step."""

    kind: Literal["compress"]
    name: str
    """Name of the run, a folder of the storage."""
    model: ModelSpec
    """The network: that of a `run`, or a row of MODELS whose weights `init` names."""
    init: InitSpec | None = None
    """Published weights of `model: {name: ...}`; a run brings its own."""
    data: DataSpec | None = None
    """The dataset; default that of the run."""
    batch: BatchSpec | None = None
    """The global batch of steps that train."""
    optim: SharedOptimSpec | None = None
    """What all steps that train share; each has its own rate and epochs."""
    steps: tuple[Step, ...] = Field(min_length=1)
    """What is done, in this order; each is a folder `stages/01-sparsify` of its own and is not done again."""
    hold_out: int = Field(0, ge=0)
    """Training samples kept out of training, by which steps choose; the validation split then serves the table only."""
    judge: JudgeSpec = JudgeSpec.model_validate({})
    """How networks are scored."""
    timing: TimingSpec | None = TimingSpec.model_validate({})
    """How they are timed; null leaves that out."""
    scale: ScaleSpec = ScaleSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    tracking: TrackingSpec = TrackingSpec()
    notify: NotifySpec | None = None
    seed: int = Field(0, ge=0)
    """Seed of order, augmentation, dropout and of what is held out."""
    log_every: int = Field(10, ge=1)
    """Steps between metric rows."""

    @model_validator(mode="after")
    def _sections_fit(self) -> "CompressJob":
        if self.model.run is None and self.init is None:
            raise ValueError("init: is required with model.name: the weights to compress; or write model: {run: NAME}")
        if self.model.run is not None and self.init is not None:
            raise ValueError("init: goes with model.name, a run brings its weights: leave it out")
        if self.model.run is None and self.data is None:
            raise ValueError("data: is required with model.name")
        for number, step in enumerate(self.steps):
            if trains(step) and (self.batch is None or self.optim is None):
                missing = "batch" if self.batch is None else "optim"
                raise ValueError(f"{missing}: is required, steps.{number} ({step.step}) trains")
        return self


def trains(step: Spec) -> bool:
    """Return whether a step trains the network."""
    return isinstance(step, TrainedSpec) or getattr(step, "finetune", None) is not None


def atomic(steps: tuple[Step, ...]) -> list[tuple[str, Step]]:
    """Return the steps one by one, rounds written out, each with the name of its folder: ("01-sparsify", ...)."""
    out: list[Step] = []
    for step in steps:
        if not isinstance(step, SparsifyStep):
            out.append(step)
            continue
        for number in range(1, step.rounds + 1):
            share = number / step.rounds
            keep = {name: ratio**share for name, ratio in step.keep.items()} if isinstance(step.keep, dict) else None
            keep = step.keep**share if isinstance(step.keep, float) else keep
            out.append(step.model_copy(update={"keep": keep, "rounds": 1, "finetune": None}))
            if step.finetune is not None:
                out.append(FinetuneStep.model_validate(step.finetune.model_dump() | {"step": "finetune"}))
    return [(f"{number:02d}-{step.step}", step) for number, step in enumerate(out, 1)]
