"""The sections of a job that training reads: optimizer, batch, starting weights, workers, checkpoints, limits.

Plain values with their ranges and their help; this file imports neither Ray nor torch, so that checking a job is quick.
"""

import math
import os
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from slimray.spec import Spec


class OptimSpec(Spec):
    """Optimizer of the weights, and its schedule."""

    optimizer: Literal["sgd", "adam", "adamw", "lars"] = "sgd"
    """Stochastic gradient descent with momentum, Adam (decay is part of the gradient, as PVCNN is published), AdamW,
    LARS (arXiv 1708.03888: a rate for each layer, for very large batches; `lr` is then some hundred times larger)."""
    lr: float = Field(gt=0)
    """Learning rate for a global batch of `reference_batch`; the peak at batch.total follows from `scaling`."""
    reference_batch: int = Field(ge=1)
    """Global batch for which `lr` is meant, and with `scaling: sqrt` the betas and `eps`."""
    scaling: Literal["linear", "sqrt"] = "linear"
    """How the rate follows the batch: `linear` (arXiv 1706.02677), lr x batch.total / reference_batch; `sqrt` for Adam
    and AdamW (arXiv 2205.10287): with k = batch.total / reference_batch lr x sqrt(k), eps / sqrt(k), and each beta
    becomes 1 - k (1 - beta), at least 0."""
    epochs: int = Field(0, ge=0)
    """Passes over the training split."""
    steps: int | None = Field(None, ge=1)
    """Optimizer steps in place of `epochs`, as the recipes of language networks count: the last pass ends with them and
    schedules follow steps (`warmup_steps`)."""
    warmup_epochs: float = Field(0, ge=0)
    """Epochs over which the rate rises linearly to its peak, from `lr` or a tenth of the peak, whichever is lower."""
    warmup_steps: int = Field(0, ge=0)
    """The same in optimizer steps, from `warmup_from`, as the recipes of language networks count."""
    warmup_from: float = Field(0.0, ge=0)
    """Rate of the first of the `warmup_steps`; 0 begins with one step's part of the rise."""
    schedule: Literal["step", "cosine", "constant", "inverse_sqrt"] = "step"
    """`step` multiplies by `gamma` at `milestones`, `cosine` falls to `min_lr` after the warm-up; `inverse_sqrt` falls
    with the root of the steps, peak x sqrt(warmup_steps / steps) (arXiv 1706.03762)."""
    min_lr: float = Field(0.0, ge=0)
    """What a cosine falls to."""
    cosine_from: Literal["warmup", "start"] = "warmup"
    """Where a cosine begins to fall: at the end of the warm-up, or at the first step, with the warm-up in its place for
    as long as that lasts (the recipe of the MicroNet language model)."""
    milestones: tuple[float, ...] = ()
    """Epochs at which a `step` schedule falls; default 40 % and 80 % of `epochs`."""
    gamma: float = Field(0.1, gt=0, le=1)
    """Factor at each milestone."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of SGD and LARS, or the first beta of Adam where `betas` are not written."""
    nesterov: bool = False
    """Nesterov's momentum, for `optimizer: sgd` (the published recipes of OFA and ProxylessNAS)."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] | None = None
    """Both betas of Adam and AdamW; default [momentum, 0.999]."""
    eps: float = Field(1e-8, gt=0)
    """Epsilon of Adam and AdamW."""
    weight_decay: float = Field(1e-4, ge=0)
    """Weight decay of the weights; biases and BatchNorm as `groups` says."""
    clip_norm: float | None = Field(20.0, gt=0)
    """Largest L2 norm of the gradient over all parameters; null never clips."""
    groups: Literal["tsm", "no_norm_decay", "plain"] | None = None
    """`tsm`: head x5, its bias x10, other biases x2, no decay on biases and BatchNorm (the published TSM recipe);
    `no_norm_decay`: only the latter; `plain`: all parameters alike. Default: `tsm` for clips and images with SGD, else
    `no_norm_decay`. LARS leaves its trust ratio out where there is no decay on biases and BatchNorm."""
    precision: Literal["auto", "bf16", "fp16", "tf32", "fp32"] = "auto"
    """Arithmetic of the forward and backward pass; weights stay float32. `auto`: bf16 on GPUs that have it, else
    float32; `fp16` scales the loss (V100, T4); `tf32` and `fp32` (strict) are for matrix products in float32."""
    norm: Literal["local", "sync", "partial", "frozen"] = "local"
    """BatchNorm: statistics per worker, over all workers (GPUs only), frozen but for the first layer, all frozen."""
    zero_gamma: bool = False
    """Start every residual block as identity (last BatchNorm scale 0); not with pretrained weights."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Part of the target that is spread over all classes."""
    class_weights: tuple[float, ...] | Literal["balanced"] | None = None
    """A weight per class in the loss; `balanced` is inverse to the class's share of the training split, mean 1. A step
    is the weighted mean (divided by the weights, as in torch), so that weights do not change the learning rate."""
    mutual: float = Field(0.0, ge=0)
    """Weight of deep mutual learning (arXiv 1706.00384; as published for PVCNN: 1): above 0 two networks are trained,
    each on the labels and on the other's answers, and the first is kept."""
    hebbian: int = Field(0, ge=0)
    """Hebbian update of an adaptive softmax (arXiv 1803.10049): after each step words seen fewer than so many times are
    drawn to the hidden vectors that preceded them (published for MicroNet: 500, with no clear gain). 0: none."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights and BatchNorm statistics, which is then evaluated and
    shipped; null keeps none. It warms up: after n steps the decay is at most (1 + n) / (10 + n)."""
    precise_norm: int = Field(0, ge=0)
    """Training samples from which BatchNorm statistics are recomputed before each validation and before shipping, in
    place of the running ones (precise BatchNorm): for small batches per worker at large worlds; 0 for none."""

    @model_validator(mode="after")
    def _schedule_fits(self) -> "OptimSpec":
        if self.steps is not None:
            for name, value in (("epochs", self.epochs), ("warmup_epochs", self.warmup_epochs)):
                if value:
                    raise ValueError(f"steps: goes without {name}: write one of the two")
            if self.milestones:
                raise ValueError("milestones: count epochs: with steps leave them out (40 % and 80 % of the steps)")
            if self.warmup_steps >= self.steps:
                raise ValueError(f"warmup_steps: must be below steps ({self.steps}), got {self.warmup_steps}")
        elif not self.epochs:
            written = "epochs" in self.model_fields_set
            raise ValueError("epochs: must be >= 1 (got 0)" if written else "epochs: is required, or steps")
        elif self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs: must be below epochs ({self.epochs}), got {self.warmup_epochs:g}")
        if self.warmup_steps and self.warmup_epochs:
            raise ValueError("warmup_steps: goes without warmup_epochs: write one of the two")
        if self.warmup_from and not self.warmup_steps:
            raise ValueError("warmup_from: belongs to warmup_steps")
        if self.schedule == "inverse_sqrt" and not self.warmup_steps:
            raise ValueError("warmup_steps: is required by schedule: inverse_sqrt, whose peak is at its end")
        for name, default in (("min_lr", 0.0), ("cosine_from", "warmup")):
            if getattr(self, name) != default and self.schedule != "cosine":
                raise ValueError(f"{name}: belongs to schedule: cosine, not {self.schedule}")
        if self.milestones and self.schedule != "step":
            raise ValueError(f"milestones: belong to schedule: step, not {self.schedule}")
        for name in ("mutual", "ema"):
            if self.hebbian and getattr(self, name):
                raise ValueError(
                    f"hebbian: is for plain training, it does not go with {name}: leave one of the two out"
                )
        adam = self.optimizer in ("adam", "adamw")
        if self.nesterov and (self.optimizer != "sgd" or not self.momentum):
            raise ValueError(f"nesterov: needs optimizer: sgd with a momentum, not {self.optimizer}")
        if self.betas is not None and not adam:
            raise ValueError(f"betas: belong to adam and adamw, not {self.optimizer}")
        if self.scaling == "sqrt" and not adam:
            raise ValueError(f"scaling: sqrt is for adam and adamw, not {self.optimizer}: take linear")
        return self


class BatchSpec(Spec):
    """The global batch, counted in samples (`total`, `per_worker`) or, for texts, in tokens; accumulation is total /
    (workers x per_worker) and must divide."""

    total: int = Field(0, ge=0)
    """Samples per optimizer step over all workers; the learning rate depends on it."""
    per_worker: int = Field(0, ge=0)
    """Samples a worker handles at once (a microbatch)."""
    tokens: int | None = Field(None, ge=1)
    """Tokens per optimizer step over all workers, padding included, in place of `total`: a multiple of
    `per_worker_tokens`. The loss of a step is the mean over its tokens."""
    per_worker_tokens: int | None = Field(None, ge=1)
    """Tokens that a worker handles at once, in place of `per_worker`: samples of similar length, so many that the
    longest of them times their number stays within it."""
    drop_last: bool = False
    """Leave out the last samples of an epoch (others each time) that do not fill a batch, as some published recipes do.
    Else they make a short step whose loss counts as much as its share of the batch."""

    @model_validator(mode="after")
    def _counted(self) -> "BatchSpec":
        if self.tokens is None and self.per_worker_tokens is None:
            for name in ("total", "per_worker"):
                if not getattr(self, name):
                    raise ValueError(f"{name}: is required, in samples (for texts write tokens and per_worker_tokens)")
            return self
        if self.total or self.per_worker:
            raise ValueError("tokens: batches are counted in samples or in tokens: leave out total and per_worker")
        if self.tokens is None or self.per_worker_tokens is None:
            raise ValueError("tokens: goes with per_worker_tokens, write both")
        if self.tokens % self.per_worker_tokens:
            raise ValueError(
                f"tokens: {self.tokens} must be a multiple of per_worker_tokens ({self.per_worker_tokens})"
            )
        return self

    @property
    def size(self) -> int:
        """Return what the learning rate depends on: samples or tokens of a step."""
        return self.tokens or self.total

    @property
    def microbatch(self) -> int:
        """Samples or tokens that a worker handles at once."""
        return self.per_worker_tokens or self.per_worker

    @property
    def num_microbatches(self) -> int:
        """Microbatches of a step over all workers."""
        return -(-self.size // self.microbatch)


class InitSpec(Spec):
    """Source of the starting weights. A head of another class count is left out, with a word."""

    model_config = ConfigDict(populate_by_name=True)

    source: str = Field(alias="from")
    """A checkpoint file (TSM, torchvision, safetensors), or the name or URI of a run."""
    exclude: tuple[str, ...] = ()
    """Prefixes of names that are not loaded."""
    freeze: tuple[str, ...] = ()
    """Prefixes of parameters that are not trained."""
    sha256: str | None = None
    """Digest the file must have."""


class TeacherSpec(Spec):
    """A network that teaches beside the labels (distillation, arXiv 1503.02531)."""

    run: str
    """Name or URI of a run that holds a network of the same inputs and classes."""
    weight: float = Field(1.0, gt=0)
    """Weight of the teacher's answers in the loss."""
    labels: float = Field(1.0, ge=0)
    """Weight of the labels; 0 learns from the teacher alone."""
    temperature: float = Field(1.0, gt=0)
    """Both answers are softened by it; the loss is multiplied by its square, so that gradients keep their size."""


class ScaleSpec(Spec):
    """Number of workers, their resources, and patience with them."""

    workers: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = 1
    """Data-parallel workers, or [fewest, most] for an elastic run. Learning rate and warm-up depend on `batch.total`
    only, never on this; accumulation and the place in the data follow it."""
    cpus_per_worker: float = Field(default=1, gt=0)
    """Logical CPUs each worker reserves; also its torch threads."""
    gpus_per_worker: Literal[0, 1] = 0
    """GPUs each worker reserves; 0 trains on the CPU."""
    decode_slots: int = Field(default=0, ge=0)
    """Clips blocks decoded at once, a CPU each; 0 = as many as the cluster has left, on a laptop one per core."""
    retries: int = Field(default=3, ge=0)
    """Worker failures survived in a row. When a machine was lost the count begins anew once a checkpoint is on storage;
    an error that the workers raise themselves is counted for good."""
    start_timeout_s: float = Field(default=300, gt=0)
    """Longest wait for the workers to start on nodes that are there; then they are asked for again."""
    capacity_timeout_s: float = Field(default=1800, gt=0)
    """Longest wait for nodes that hold the workers, at the start and after a preemption: a cluster that grows, spot
    machines that come back. What is waited for is told every minute."""
    data_timeout_s: float = Field(default=600, gt=0)
    """Longest wait of a rank for the data of one step, and of the ranks for each other; a rank that does not move for
    20 s more leaves the stacks of its threads in `logs/` and is ended."""
    storage_timeout_s: float | None = Field(default=None, gt=0)
    """Longest wait for a storage that fails or does not answer, with growing pauses, before a retry is spent on it;
    default half of `data_timeout_s`."""
    resize_s: float = Field(default=600, gt=0)
    """Seconds between looks whether an elastic run can have more workers: each resize costs a restart."""
    bucket_mb: float = Field(default=25, gt=0)
    """Gradients all-reduced at a time, in MB: smaller overlaps more of it with the backward pass."""
    compress: Literal["none", "bf16"] = "none"
    """All-reduce gradients as bf16: half the traffic, rounded to 8 bits of mantissa."""

    @model_validator(mode="after")
    def _fits(self) -> "ScaleSpec":
        if self.storage_s >= self.data_timeout_s:
            raise ValueError(
                f"storage_timeout_s: must be below data_timeout_s ({self.data_timeout_s:g}), got {self.storage_s:g}: "
                "the ranks would give up waiting for data first"
            )
        if isinstance(self.workers, tuple) and self.workers[0] > self.workers[1]:
            raise ValueError(f"workers: [fewest, most], got [{self.workers[0]}, {self.workers[1]}]")
        return self

    @property
    def storage_s(self) -> float:
        """Return how long an outage of the storage is waited for, seconds."""
        return self.storage_timeout_s or self.data_timeout_s / 2

    @property
    def most(self) -> int:
        """The largest number of workers."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def fewest(self) -> int:
        """The smallest number of workers with which the run goes on."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def local_cpus(self) -> int:
        """Logical CPUs wanted of a local cluster: those of the workers and one per decoder.

        They are counted, not owned: on a laptop workers and decoders share the cores.
        """
        return math.ceil(self.most * self.cpus_per_worker) + (self.decode_slots or os.cpu_count() or 1)


class TrainScaleSpec(ScaleSpec):
    """Number of workers of a training, their resources, and patience with them."""

    compile: bool = False
    """Compile the network with torch.compile: fewer and larger kernels, after a first step that may take minutes. Needs
    a C++ compiler on every node, and Triton on a GPU. What is saved and shipped is the network as it is."""


class CheckpointSpec(Spec):
    """Times at which training state is saved; saving runs in the background and changes nothing in the run."""

    every_s: float = Field(default=300, gt=0)
    """Seconds between checkpoints within an epoch; each epoch ends with one as well."""
    every_steps: int | None = Field(default=None, ge=1)
    """Steps between checkpoints within an epoch, in place of `every_s`."""
    keep_last: int = Field(default=2, ge=1)
    """Newest checkpoints kept; the best one by `best_metric` is kept besides."""
    best_metric: str | None = None
    """Metric by which a checkpoint is the best (`val/top1`, `val/loss`), higher or lower as the task says; default the
    first one of the task: `slimray explain tasks`."""
    ship: Literal["last", "best"] = "last"
    """Which weights the run ships: those of the last step, or those of the best validation by `best_metric`."""


class LimitsSpec(Spec):
    """Limits at which a run ends by itself, whatever it has reached; it resumes with higher limits."""

    hours: float | None = Field(None, gt=0)
    """Hours of training over all attempts, from the first step on."""
    cost: float | None = Field(None, gt=0)
    """Money: hours x workers x `worker_hour`."""
    worker_hour: float | None = Field(None, gt=0)
    """Price of a worker for an hour, in the currency of `cost`."""

    @model_validator(mode="after")
    def _priced(self) -> "LimitsSpec":
        if (self.cost is None) != (self.worker_hour is None):
            raise ValueError("cost: goes together with worker_hour, write both or none")
        return self

    def reached(self, worker_seconds: float, seconds: float) -> str:
        """The sentence that ends a run of so many seconds, "" if it may go on."""
        if self.hours is not None and seconds > 3600 * self.hours:
            return f"limits.hours: {self.hours:g} hours are over: raise it, and the same command resumes"
        if self.cost is not None and self.worker_hour and worker_seconds / 3600 * self.worker_hour > self.cost:
            return f"limits.cost: {self.cost:g} are spent: raise it, and the same command resumes"
        return ""
