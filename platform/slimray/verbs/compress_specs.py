"""Fields of a `compress` job: its steps, one class each, distinguished by `step`. Neither Ray nor torch."""

import itertools
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from slimray.data.spec import DataSpec
from slimray.runs.notify import NotifySpec
from slimray.runs.tracking import TrackingSpec
from slimray.spec import Spec
from slimray.train.spec import BatchSpec, CheckpointSpec, InitSpec, ScaleSpec
from slimray.verbs.specs import JudgeSpec, ModelSpec, SharedOptimSpec, WorkerJob, require_shares

Ratio = Annotated[float, Field(gt=0, le=1)]
Bits = Annotated[int, Field(ge=1, le=8)]


class OriginalTeacherSpec(Spec):
    """The uncompressed network, or that of another run, as a teacher besides the labels (distillation, arXiv
    1503.02531)."""

    run: str | None = None
    """Name or URI of a run; default: the uncompressed network."""
    weight: float = Field(1.0, gt=0)
    """Weight of the teacher's outputs in the loss."""
    labels: float = Field(1.0, ge=0)
    """Weight of the labels in the loss; 0 learns from the teacher alone."""
    temperature: float = Field(1.0, gt=0)
    """Temperature that softens both outputs; the loss is multiplied by its square, to keep the size of gradients."""


class TrainedSpec(Spec):
    """Duration and learning rate of a training step."""

    epochs: int = Field(ge=1)
    """Passes over the training split."""
    lr: float = Field(gt=0)
    """Learning rate for a batch of `optim.reference_batch`; usually a tenth of the rate of training, or less."""
    warmup_epochs: float = Field(0, ge=0)
    """Epochs over which the rate rises to its peak."""
    teacher: OriginalTeacherSpec | None = None
    """Learn from the uncompressed network too; `teacher: {}` uses it with weight 1."""
    scale_dropout: bool = True
    """Lower the dropout in front of a sparse layer: D x sqrt(weights kept / weights)."""


class FinetuneStep(TrainedSpec):
    """Train the compressed network: pruned weights stay zero, shared ones equal (their gradients are summed)."""

    step: Literal["finetune"]


class RoundedSpec(TrainedSpec):
    """Quantization-aware training."""

    ranges: Literal["learned", "frozen"] = "learned"
    """Ranges of inputs: learned with the weights, or frozen as calibrated on `samples`."""


class RoundedStep(RoundedSpec, FinetuneStep):
    """The training of a step `quantize`, as a step of its own."""


class SensitivitySpec(Spec):
    """Keep the fewest weights of each layer that lose at most `drop` when only that layer is pruned."""

    drop: float = Field(ge=0)
    """Points of the first metric that pruning one layer alone may cost."""
    ratios: tuple[Ratio, ...] = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)
    """Shares of a layer's weights to try, ascending; a layer that loses more with all of them is not pruned."""

    @model_validator(mode="after")
    def _ascending(self) -> "SensitivitySpec":
        if list(self.ratios) != sorted(set(self.ratios)) or not self.ratios:
            raise ValueError(f"ratios: must be ascending, each once (got {list(self.ratios)})")
        return self


class SparsifyStep(Spec):
    """Unstructured pruning: the smallest weights of a layer become zero. Files shrink, dense kernels get no faster."""

    step: Literal["sparsify"]
    keep: Ratio | dict[str, Ratio] | None = None
    """Share of the weights to keep, for all layers or by layer name (layers not named are not pruned)."""
    quality: Annotated[float, Field(gt=0)] | dict[str, Annotated[float, Field(gt=0)]] | None = None
    """Threshold in standard deviations of a layer's nonzero weights, for all layers or by layer name."""
    sensitivity: SensitivitySpec | None = None
    """Measure the sensitivity of each layer, on `hold_out` samples or else on the validation split."""
    rounds: int = Field(1, ge=1, le=100)
    """Number of pruning rounds, each followed by `finetune`: the share of `keep` falls by equal factors; `quality` and
    `sensitivity` apply to the remaining weights each time."""
    finetune: TrainedSpec | None = None
    """Training after each round."""

    @model_validator(mode="after")
    def _one_rule(self) -> "SparsifyStep":
        given = [name for name in ("keep", "quality", "sensitivity") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"keep: write one of keep, quality and sensitivity (got {', '.join(given) or 'none'})")
        if self.rounds > 1 and self.finetune is None:
            raise ValueError("rounds: more than one round needs finetune, the training after each round")
        return self


class PolicySearchSpec(Spec):
    """A search for the numbers of channels to keep: its budget, and the policies within its range."""

    episodes: int = Field(400, ge=1)
    """Policies to try."""
    population: int = Field(1, ge=1)
    """Policies proposed at a time: the result depends on it, but not on the number of workers."""
    least: float = Field(0.2, gt=0, le=1)
    """Lower bound of the share of channels kept."""
    timed: int = Field(40, ge=10)
    """With a limit on latency_ms: number of policies timed beforehand, to predict the latency of others; the policy
    found is timed again, and the next best is taken if it exceeds the limit."""


class AmcSpec(PolicySearchSpec):
    """AMC (arXiv 1802.03494): an agent decides group by group and is rewarded for the whole policy at the end."""

    name: Literal["amc"] = "amc"
    """Name of the search."""
    warmup: int = Field(100, ge=1)
    """First episodes, whose actions are random."""
    decay: float = Field(0.95, gt=0, le=1)
    """Factor by which the noise shrinks in each episode after the warm-up."""


class ClimbSpec(PolicySearchSpec):
    """Hill climbing: tries policies near the best so far, each of which uses up the limit. For a few dozen trials."""

    name: Literal["climb"] = "climb"
    """Name of the search."""
    episodes: int = Field(50, ge=1)
    """Policies to try."""
    least: float = Field(0.1, gt=0, le=1)
    """Lower bound of the share of channels kept."""
    start: Literal["uniform", "ranked", "sensitivity"] = "sensitivity"
    """Policy to start from, which is found first (`sensitivity`: from scores of its own, about four per group)."""
    spread: float = Field(0.1, gt=0, le=1)
    """Standard deviation of a group's share of channels around that of the best policy so far."""


Limited = Literal["macs", "params", "size_mb", "latency_ms"]


class PruneStep(Spec):
    """Structured pruning: remove whole channels, for a smaller and faster network; follow it with `finetune`."""

    step: Literal["prune"]
    shares: dict[Limited, Ratio] = {}
    """Limits on `macs`, `params`, `size_mb` or `latency_ms`, as shares of the cost of the network before this step:
    {macs: 0.5}. Latency is measured on this machine, policy by policy, with the settings of `timing`."""
    limits: dict[Limited, Annotated[float, Field(gt=0)]] = {}
    """The same limits in absolute numbers; macs are per sample."""
    keep: Ratio | None = None
    """In place of limits: share of channels to keep in every group (policy uniform)."""
    channels: dict[str, Annotated[int, Field(ge=1)]] | None = None
    """In place of limits: number of channels to keep, by group; groups that are not named keep all."""
    policy: Literal["uniform", "ranked", "sensitivity"] = "uniform"
    """Distribution over groups: `uniform`, the same share everywhere; `ranked`, by the criterion over all groups;
    `sensitivity`, by measured curves."""
    search: Annotated[AmcSpec | ClimbSpec, Field(discriminator="name")] | None = None
    """Search for the policy in place of giving one: `search: amc`, `climb` or `{name: climb, episodes: 80}`."""
    criterion: Literal["l1", "l2", "input_l1", "bn", "taylor", "group"] = "group"
    """Score that decides which channels to keep: norms of the weights that produce (l1, l2) or use (input_l1) them,
    BatchNorm scales (bn), the change in loss without them, estimated on `judge.calibrate` training samples (taylor), or
    all their weights (group)."""
    round_to: int = Field(8, ge=1)
    """Numbers of channels kept are multiples of this, or all channels of a group."""
    reconstruct: bool = False
    """Fit the layers that lost inputs by least squares to `judge.calibrate` training samples."""

    @field_validator("search", mode="before")
    @classmethod
    def _by_name(cls, value: object) -> object:
        if isinstance(value, str):
            return {"name": value}
        return {"name": "amc"} | value if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _one_rule(self) -> "PruneStep":
        limited = bool(self.shares or self.limits)
        given = [name for name in ("keep", "channels") if getattr(self, name) is not None]
        if limited + len(given) != 1:
            raise ValueError("shares: write one of shares (with or without limits), keep and channels")
        if self.search is not None and not limited:
            raise ValueError("search: needs shares or limits")
        if self.search is not None and self.policy != "uniform":
            way = f"write search: {{name: climb, start: {self.policy}}}"
            raise ValueError(f"policy: is found by the search: leave it out, or {way} to start from it")
        if self.keep is not None and self.policy != "uniform":
            raise ValueError(f"keep: is for policy uniform; {self.policy} needs shares or limits")
        start = self.search.start if isinstance(self.search, ClimbSpec) else None
        if "ranked" in (self.policy, start) and self.criterion != "group":
            where = "search.start" if start else "policy"
            raise ValueError(f"{where}: ranked needs criterion: group, whose scores are comparable across groups")
        if both := sorted(self.shares.keys() & self.limits.keys()):
            raise ValueError(f"limits: {', '.join(both)}: is also given in shares: leave one out")
        return self


Width = Annotated[int, Field(ge=2, le=8)]
Widths = tuple[Width, Width | None]  # of the weights, of the inputs


class HaqSpec(Spec):
    """HAQ (arXiv 1811.08886): an agent chooses the bits of each layer, rewarded for the whole policy after rounding."""

    name: Literal["haq"] = "haq"
    """Name of the search."""
    episodes: int = Field(200, ge=1)
    """Policies to try (published: 600, each trained for an epoch; here none is trained)."""
    population: int = Field(1, ge=1)
    """Policies proposed at a time, published: 1. The result depends on it, but not on the number of workers."""
    warmup: int = Field(20, ge=1)
    """First episodes, whose actions are random."""
    decay: float = Field(0.99, gt=0, le=1)
    """Factor by which the noise shrinks in each episode after the warm-up."""
    low: Width = 2
    """Fewest bits of a layer."""
    high: Width = 8
    """Most bits of a layer; the first and the last layer always have 8 (with `kmeans`, no layer is special)."""

    @model_validator(mode="after")
    def _ordered(self) -> "HaqSpec":
        if self.low >= self.high:
            raise ValueError(f"low: must be less than high (got {self.low} and {self.high})")
        return self


BitCost = Literal["size_mb", "latency_ms", "energy_mj"]


class QuantizeStep(Spec):
    """Weights as whole numbers of few bits, rounded inputs of layers, folded BatchNorm; after training, or with
    quantization-aware training."""

    step: Literal["quantize"]
    bits: Width | Widths | dict[str, Widths] = 8
    """Bits of all layers, or `[weights, inputs]` (inputs null: they stay float), or such pairs by layer name; layers
    that are not named stay float. The first and the last layer have at least 8 bits unless they are named."""
    scheme: Literal["int8", "linear", "kmeans"] = "int8"
    """`int8`: scales per channel, a zero point for inputs, as in runtimes; `linear`: as in HAQ; `kmeans`: codebooks."""
    search: HaqSpec | None = None
    """Search for the bits of each layer in place of giving them: `search: haq` or
    `search: {name: haq, episodes: 100}`."""
    shares: dict[BitCost, Ratio] = {}
    """With `search`: limits on the costs of its policy, as shares of those of 8 bits everywhere: {size_mb: 0.5}."""
    limits: dict[BitCost, Annotated[float, Field(gt=0)]] = {}
    """The same limits in absolute numbers; megabytes count the weights and their codebooks (`kmeans`)."""
    hardware: str | None = None
    """Device that determines latency and energy of bits: a row of HARDWARE such as bit_serial, or a YAML file."""
    embeddings: Bits | None = None
    """Bits of the weights of embedding tables (networks of text), which have a scale per row, or codebooks; null: they
    stay float."""
    keep: tuple[str, ...] = ()
    """Names of layers that stay float."""
    max_loss: float | None = Field(None, ge=0)
    """Quantize each layer alone first; layers that lose more than this many points of the first metric stay float."""
    samples: int = Field(256, ge=2)
    """Training samples, prepared as in validation, on which the ranges of inputs are calibrated."""
    finetune: RoundedSpec | None = None
    """Quantization-aware training: round in every step, and pass gradients straight through the rounding."""

    @field_validator("search", mode="before")
    @classmethod
    def _by_name(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits(self) -> "QuantizeStep":
        limited = [*self.shares, *self.limits]
        if self.search is None and limited:
            raise ValueError("search: is required with shares and limits; without it write bits")
        if self.search is not None and not limited:
            raise ValueError("search: needs shares or limits: without them it keeps all bits")
        if twice := sorted(set(self.shares) & set(self.limits)):
            raise ValueError(f"limits: {twice[0]} is also given in shares: leave one of the two out")
        if self.search is not None and ("bits" in self.model_fields_set or self.max_loss is not None):
            given = "bits" if "bits" in self.model_fields_set else "max_loss"
            raise ValueError(f"{given}: is decided by the search: leave one of the two out")
        modelled = [name for name in limited if name != "size_mb"]
        if modelled and (self.hardware is None or self.scheme == "kmeans"):
            wrong = "kmeans has codes in place of numbers" if self.scheme == "kmeans" else "write hardware"
            raise ValueError(f"{modelled[0]}: needs a device that computes with few bits: {wrong}")
        if self.hardware is not None and not modelled:
            raise ValueError("hardware: is for shares or limits on latency_ms and energy_mj: leave it out")
        if self.scheme == "kmeans" and self.finetune is not None:
            raise ValueError("finetune: cannot train codebooks: train before, or use int8 or linear")
        if self.embeddings is not None and self.finetune is not None:
            raise ValueError("embeddings: cannot be trained in few bits: leave out embeddings or finetune")
        if self.embeddings == 1 and self.scheme != "kmeans":
            raise ValueError(f"embeddings: must be 2 to 8 with scheme: {self.scheme}, got 1")
        return self


class ShareStep(Spec):
    """Weight sharing: each weight of a layer takes one of a few values, found by k-means. Files shrink after `code`."""

    step: Literal["share"]
    bits: Bits | dict[str, Bits]
    """Bits of a weight's code, for all layers or by layer name; a layer gets at most 2^bits - 1 values besides zero."""
    finetune: TrainedSpec | None = None
    """Training of the centroids afterwards; a centroid's gradient is a sum, so use a lower rate than for weights."""


class CodeStep(Spec):
    """Write `model/model.slim`: the whole network as codebooks, relative indices and Huffman codes in one file."""

    step: Literal["code"]


Step = Annotated[
    PruneStep | SparsifyStep | FinetuneStep | QuantizeStep | ShareStep | CodeStep, Field(discriminator="step")
]


class TimingSpec(Spec):
    """Timing of the network of each step, in turn with the original, on this machine."""

    hardware: Literal["cpu-eager", "cpu-compiled", "cpu-onnx", "cuda"] = "cpu-eager"
    """Device and runtime; `cpu-onnx` (extra `edge`) is closest to how networks are deployed."""
    threads: int = Field(1, ge=1)
    """Threads of the network on a CPU."""
    batch: int = Field(1, ge=1)
    """Samples per forward pass."""
    pairs: int = Field(9, ge=9, le=1000)
    """Pairs of measurements; the result is the median of their ratios, with its interval."""


class CompressJob(WorkerJob):
    """Make a network smaller, step by step."""

    kind: Literal["compress"]
    name: str
    """Name of the run, a folder of the storage."""
    model: ModelSpec
    """The network: that of a `run`, or a row of MODELS with the weights of `init`."""
    init: InitSpec | None = None
    """Published weights of `model: {name: ...}`; a run has its own."""
    data: DataSpec | None = None
    """The dataset; default: that of the run."""
    batch: BatchSpec | None = None
    """The global batch of steps that train."""
    optim: SharedOptimSpec | None = None
    """Optimizer settings shared by all steps that train; each has its own rate and epochs."""
    steps: tuple[Step, ...] = Field(min_length=1)
    """The steps, in order; each has a folder of its own (`stages/01-sparsify`) and is not repeated once finished."""
    hold_out: int = Field(0, ge=0)
    """Training samples kept out of training, on which steps make choices; the validation split is then used for the
    table only."""
    judge: JudgeSpec = JudgeSpec.model_validate({})
    """Scoring of networks."""
    timing: TimingSpec | None = TimingSpec.model_validate({})
    """Timing of networks; null: no timing."""
    scale: ScaleSpec = ScaleSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    tracking: TrackingSpec = TrackingSpec()
    notify: NotifySpec | None = None
    seed: int = Field(0, ge=0)
    """Seed of order, augmentation, dropout and the choice of held-out samples."""
    log_every: int = Field(10, ge=1)
    """Steps between metric rows."""

    @model_validator(mode="after")
    def _sections_fit(self) -> "CompressJob":
        if self.model.run is None and self.init is None:
            raise ValueError("init: is required with model.name: the weights to compress; or write model: {run: NAME}")
        if self.model.run is not None and self.init is not None:
            raise ValueError("init: is for model.name, a run has its own weights: leave it out")
        if self.model.run is None and self.data is None:
            raise ValueError("data: is required with model.name")
        if self.batch is not None:
            require_shares(self.batch, self.scale)
        for number, step in enumerate(self.steps):
            if trains(step) and (self.batch is None or self.optim is None):
                missing = "batch" if self.batch is None else "optim"
                raise ValueError(f"{missing}: is required, as steps.{number} ({step.step}) trains")
        for number, (before, step) in enumerate(itertools.pairwise(self.steps), 1):
            if isinstance(before, QuantizeStep) and not isinstance(step, CodeStep):
                raise ValueError(f"steps.{number}: only code may follow quantize: move {step.step} before it")
        return self


def trains(step: Spec) -> bool:
    """Return True if a step trains the network."""
    return isinstance(step, TrainedSpec) or getattr(step, "finetune", None) is not None


def atomic(steps: tuple[Step, ...]) -> list[tuple[str, Step]]:
    """Return the steps one by one, with rounds expanded, each with the name of its folder: ("01-sparsify", ...)."""
    out: list[Step] = []
    for step in steps:
        if isinstance(step, QuantizeStep) and step.finetune is not None:  # round, train, convert to whole numbers
            trained = RoundedStep.model_validate(step.finetune.model_dump() | {"step": "finetune"})
            out += [step, trained, step.model_copy(update={"finetune": None})]
            continue
        if isinstance(step, ShareStep) and step.finetune is not None:
            out.append(step.model_copy(update={"finetune": None}))
            out.append(FinetuneStep.model_validate(step.finetune.model_dump() | {"step": "finetune"}))
            continue
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
