"""The sections of a job that training reads: optimizer, batch, starting weights, workers, checkpoints, limits.

Plain values with ranges and help texts; this file imports neither Ray nor torch, so that checking a job is quick.
"""

import math
import os
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from slimray.spec import Spec


class OptimSpec(Spec):
    """Optimizer of the weights, and its learning-rate schedule."""

    optimizer: Literal["sgd", "adam", "adamw", "lars"] = "sgd"
    """Stochastic gradient descent with momentum; Adam (weight decay is part of the gradient, as published for PVCNN);
    AdamW; LARS (arXiv 1708.03888: a rate for each layer, for very large batches; `lr` is then about a hundred times
    larger)."""
    lr: float = Field(gt=0)
    """Learning rate for a global batch of `reference_batch`; `scaling` gives the peak rate for batch.total."""
    reference_batch: int = Field(ge=1)
    """Global batch for which `lr` is tuned, and with `scaling: sqrt` also the betas and `eps`."""
    scaling: Literal["linear", "sqrt"] = "linear"
    """Scaling of the rate with the batch: `linear` (arXiv 1706.02677) is lr x batch.total / reference_batch; `sqrt` is
    for Adam and AdamW (arXiv 2205.10287): with k = batch.total / reference_batch, lr x sqrt(k), eps / sqrt(k), and each
    beta becomes 1 - k (1 - beta), at least 0."""
    epochs: int = Field(0, ge=0)
    """Passes over the training split."""
    steps: int | None = Field(None, ge=1)
    """Number of optimizer steps, in place of `epochs`, as in recipes of language models: training ends after the last
    step, and schedules go by steps (`warmup_steps`)."""
    warmup_epochs: float = Field(0, ge=0)
    """Epochs over which the rate rises linearly to its peak, from `lr` or a tenth of the peak, whichever is lower."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps over which the rate rises linearly from `warmup_from` to its peak, as in recipes of language
    models; in place of `warmup_epochs`."""
    warmup_from: float = Field(0.0, ge=0)
    """Rate at the first of the `warmup_steps`; with 0 the first step has the rate peak / warmup_steps."""
    schedule: Literal["step", "cosine", "constant", "inverse_sqrt"] = "step"
    """`step` multiplies by `gamma` at `milestones`, `cosine` falls to `min_lr` after the warm-up; `inverse_sqrt` falls
    with the root of the steps, peak x sqrt(warmup_steps / steps) (arXiv 1706.03762)."""
    min_lr: float = Field(0.0, ge=0)
    """Final rate of a `cosine` schedule."""
    cosine_from: Literal["warmup", "start"] = "warmup"
    """Start of a cosine: the end of the warm-up, or the first step, with the warm-up replacing it while that lasts (the
    recipe of the MicroNet language model)."""
    milestones: tuple[float, ...] = ()
    """Epochs at which a `step` schedule lowers the rate; default 40 % and 80 % of `epochs`."""
    gamma: float = Field(0.1, gt=0, le=1)
    """Factor applied to the rate at each milestone."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of SGD and LARS, or the first beta of Adam if `betas` is not set."""
    nesterov: bool = False
    """Use Nesterov momentum; only for `optimizer: sgd` (the published recipes of OFA and ProxylessNAS)."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] | None = None
    """Both betas of Adam and AdamW; default [momentum, 0.999]."""
    eps: float = Field(1e-8, gt=0)
    """Epsilon of Adam and AdamW."""
    weight_decay: float = Field(1e-4, ge=0)
    """Weight decay of the weights; `groups` decides about biases and BatchNorm."""
    clip_norm: float | None = Field(20.0, gt=0)
    """Largest L2 norm of the gradient over all parameters; null disables clipping."""
    groups: Literal["tsm", "no_norm_decay", "plain"] | None = None
    """Parameter groups. `tsm`: rate of the head x5, of its bias x10, of other biases x2, and no decay on biases and
    BatchNorm (the published TSM recipe); `no_norm_decay`: only the latter; `plain`: all parameters alike. Default:
    `tsm` for clips and images with SGD, else `no_norm_decay`. LARS has no trust ratio for groups without decay."""
    precision: Literal["auto", "bf16", "fp16", "tf32", "fp32"] = "auto"
    """Arithmetic of the forward and backward pass; weights stay float32. `auto`: bf16 on GPUs that have it, else
    float32; `fp16` scales the loss (V100, T4); `tf32` and `fp32` (strict) are for matrix products in float32."""
    norm: Literal["local", "sync", "partial", "frozen"] = "local"
    """BatchNorm statistics: `local` per worker, `sync` over all workers (GPUs only), `partial` frozen except in the
    first layer, `frozen` in all layers."""
    zero_gamma: bool = False
    """Start every residual block as the identity (scale 0 in its last BatchNorm); not with pretrained weights."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that is spread over all classes."""
    class_weights: tuple[float, ...] | Literal["balanced"] | None = None
    """A weight per class in the loss; `balanced` is inverse to the class's share of the training split, mean 1. The
    loss of a step is the weighted mean (over the sum of weights, as in torch), so that they do not change the rate."""
    mutual: float = Field(0.0, ge=0)
    """Weight of deep mutual learning (arXiv 1706.00384; published for PVCNN: 1): above 0, two networks are trained,
    each on the labels and on the outputs of the other, and the first one is kept."""
    hebbian: int = Field(0, ge=0)
    """Hebbian update of an adaptive softmax (arXiv 1803.10049): after each step, words seen fewer than this many times
    move towards the hidden vectors that preceded them (published for MicroNet: 500, with no clear gain). 0: off."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of an exponential moving average of weights and BatchNorm statistics, which is evaluated and shipped in
    place of the last ones; null: off. It warms up: after n steps the decay is at most (1 + n) / (10 + n)."""
    precise_norm: int = Field(0, ge=0)
    """Number of training samples from which BatchNorm statistics are recomputed before each validation and before
    shipping (precise BatchNorm), for small batches on many workers; 0: off, the running statistics are used."""

    @model_validator(mode="after")
    def _schedule_fits(self) -> "OptimSpec":
        if self.steps is not None:
            for name, value in (("epochs", self.epochs), ("warmup_epochs", self.warmup_epochs)):
                if value:
                    raise ValueError(f"steps: cannot be combined with {name}: write one of the two")
            if self.milestones:
                raise ValueError("milestones: count epochs: leave them out with steps (40 % and 80 % of the steps)")
            if self.warmup_steps >= self.steps:
                raise ValueError(f"warmup_steps: must be below steps ({self.steps}), got {self.warmup_steps}")
        elif not self.epochs:
            written = "epochs" in self.model_fields_set
            raise ValueError("epochs: must be >= 1 (got 0)" if written else "epochs: is required, or steps")
        elif self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs: must be below epochs ({self.epochs}), got {self.warmup_epochs:g}")
        if self.warmup_steps and self.warmup_epochs:
            raise ValueError("warmup_steps: cannot be combined with warmup_epochs: write one of the two")
        if self.warmup_from and not self.warmup_steps:
            raise ValueError("warmup_from: requires warmup_steps")
        if self.schedule == "inverse_sqrt" and not self.warmup_steps:
            raise ValueError("warmup_steps: is required by schedule: inverse_sqrt, which peaks after the warm-up")
        for name, default in (("min_lr", 0.0), ("cosine_from", "warmup")):
            if getattr(self, name) != default and self.schedule != "cosine":
                raise ValueError(f"{name}: is only for schedule: cosine, not {self.schedule}")
        if self.milestones and self.schedule != "step":
            raise ValueError(f"milestones: are only for schedule: step, not {self.schedule}")
        for name in ("mutual", "ema"):
            if self.hebbian and getattr(self, name):
                raise ValueError(
                    f"hebbian: is for plain training and cannot be combined with {name}: leave one of the two out"
                )
        adam = self.optimizer in ("adam", "adamw")
        if self.nesterov and (self.optimizer != "sgd" or not self.momentum):
            raise ValueError(f"nesterov: needs optimizer: sgd with a momentum, not {self.optimizer}")
        if self.betas is not None and not adam:
            raise ValueError(f"betas: are only for adam and adamw, not {self.optimizer}")
        if self.scaling == "sqrt" and not adam:
            raise ValueError(f"scaling: sqrt is only for adam and adamw, not {self.optimizer}: use linear")
        return self


class BatchSpec(Spec):
    """The global batch, counted in samples (`total`, `per_worker`) or, for texts, in tokens. The number of accumulated
    microbatches is total / (workers x per_worker) and must be whole."""

    total: int = Field(0, ge=0)
    """Samples per optimizer step over all workers; the learning rate depends on it."""
    per_worker: int = Field(0, ge=0)
    """Samples that a worker processes at once (a microbatch)."""
    tokens: int | None = Field(None, ge=1)
    """Tokens per optimizer step over all workers, padding included, in place of `total`: a multiple of
    `per_worker_tokens`. The loss of a step is the mean over its tokens."""
    per_worker_tokens: int | None = Field(None, ge=1)
    """Tokens that a worker processes at once, in place of `per_worker`: as many samples of similar length as fit, when
    each one is padded to the longest."""
    drop_last: bool = False
    """Leave out the last samples of an epoch (different ones each time) that do not fill a batch, as some published
    recipes do. Otherwise they form a short step whose loss is weighted by its share of a full batch."""

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
            raise ValueError("tokens: requires per_worker_tokens and the other way round: write both")
        if self.tokens % self.per_worker_tokens:
            raise ValueError(
                f"tokens: {self.tokens} must be a multiple of per_worker_tokens ({self.per_worker_tokens})"
            )
        return self

    @property
    def size(self) -> int:
        """Samples or tokens per step, on which the learning rate depends."""
        return self.tokens or self.total

    @property
    def microbatch(self) -> int:
        """Samples or tokens that a worker processes at once."""
        return self.per_worker_tokens or self.per_worker

    @property
    def num_microbatches(self) -> int:
        """Microbatches of a step over all workers."""
        return -(-self.size // self.microbatch)


class InitSpec(Spec):
    """Source of the starting weights. A head for another number of classes is skipped, with a note."""

    model_config = ConfigDict(populate_by_name=True)

    source: str = Field(alias="from")
    """A checkpoint file (TSM, torchvision, safetensors), or the name or URI of a run."""
    exclude: tuple[str, ...] = ()
    """Prefixes of the names of weights that are not loaded."""
    freeze: tuple[str, ...] = ()
    """Prefixes of the names of parameters that are not trained."""
    sha256: str | None = None
    """SHA-256 digest that the file must have."""


class TeacherSpec(Spec):
    """A network whose outputs are learned besides the labels (distillation, arXiv 1503.02531)."""

    run: str
    """Name or URI of a run whose network has the same inputs and classes."""
    weight: float = Field(1.0, gt=0)
    """Weight of the teacher's outputs in the loss."""
    labels: float = Field(1.0, ge=0)
    """Weight of the labels in the loss; 0 learns from the teacher alone."""
    temperature: float = Field(1.0, gt=0)
    """Temperature that softens both outputs; the loss is multiplied by its square, to keep the size of gradients."""


class ScaleSpec(Spec):
    """Number of workers, their resources, and timeouts."""

    workers: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = 1
    """Data-parallel workers, or [fewest, most] for an elastic run. Learning rate and warm-up depend on `batch.total`
    only, never on this; the number of accumulated microbatches and each worker's share of the data follow it."""
    cpus_per_worker: float = Field(default=1, gt=0)
    """Logical CPUs that each worker reserves; also its number of torch threads."""
    gpus_per_worker: Literal[0, 1] = 0
    """GPUs that each worker reserves; 0 trains on the CPU."""
    decode_slots: int = Field(default=0, ge=0)
    """Blocks of samples decoded at once, one CPU each; 0: the CPUs that the cluster has left, on a laptop one per
    core."""
    retries: int = Field(default=3, ge=0)
    """Worker failures that a run survives in a row. After the loss of a machine, the count starts again once a
    checkpoint is on storage; after an error that the workers raise themselves, it does not."""
    start_timeout_s: float = Field(default=300, gt=0)
    """Longest wait for workers to start on the available nodes; after that they are requested again."""
    capacity_timeout_s: float = Field(default=1800, gt=0)
    """Longest wait for nodes that hold the workers, at the start and after a preemption: a cluster may grow, and spot
    machines may return. The run reports every minute what it waits for."""
    data_timeout_s: float = Field(default=600, gt=0)
    """Longest wait of a rank for the data of one step, and of the ranks for each other; a rank that does not move for
    20 s more writes the stacks of its threads to `logs/` and is ended."""
    storage_timeout_s: float | None = Field(default=None, gt=0)
    """Longest wait, with growing pauses, for a storage that fails or does not answer, before it costs a retry; default:
    half of `data_timeout_s`."""
    resize_s: float = Field(default=600, gt=0)
    """Seconds between checks for more workers in an elastic run: each resize costs a restart."""
    bucket_mb: float = Field(default=25, gt=0)
    """Megabytes of gradients all-reduced at a time; smaller buckets overlap more with the backward pass."""
    compress: Literal["none", "bf16"] = "none"
    """Format in which gradients are all-reduced; `bf16` halves the traffic and rounds them to 8 bits of mantissa."""

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
        """Longest wait for a storage that is out of service, in seconds."""
        return self.storage_timeout_s or self.data_timeout_s / 2

    @property
    def most(self) -> int:
        """The largest number of workers."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def fewest(self) -> int:
        """The smallest number of workers with which the run continues."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def local_cpus(self) -> int:
        """Logical CPUs that a local cluster declares: those of the workers, and one per decoder.

        The machine may have fewer: on a laptop, workers and decoders share the cores.
        """
        return math.ceil(self.most * self.cpus_per_worker) + (self.decode_slots or os.cpu_count() or 1)


class TrainScaleSpec(ScaleSpec):
    """Number of workers of a training, their resources, and timeouts."""

    compile: bool = False
    """Compile the network with torch.compile: fewer and larger kernels, after a first step that may take minutes. Needs
    a C++ compiler on every node, and Triton on a GPU. The network is saved and shipped uncompiled."""


class CheckpointSpec(Spec):
    """Rules for saving training state. Saving runs in the background and does not affect the training."""

    every_s: float = Field(default=300, gt=0)
    """Seconds between checkpoints within an epoch; each epoch ends with one as well."""
    every_steps: int | None = Field(default=None, ge=1)
    """Steps between checkpoints within an epoch, in place of `every_s`."""
    keep_last: int = Field(default=2, ge=1)
    """Number of newest checkpoints to keep, besides the best one by `best_metric`."""
    best_metric: str | None = None
    """Metric that decides which checkpoint is the best (`val/top1`, `val/loss`); the task defines whether higher is
    better. Default: the first metric of the task, see `slimray explain tasks`."""
    ship: Literal["last", "best"] = "last"
    """Weights that the run ships: those of the last step, or of the best validation by `best_metric`."""


class LimitsSpec(Spec):
    """Limits at which a run stops, finished or not; with higher limits it resumes."""

    hours: float | None = Field(None, gt=0)
    """Hours of training over all attempts, from the first step on."""
    cost: float | None = Field(None, gt=0)
    """Highest cost: hours x workers x `worker_hour`."""
    worker_hour: float | None = Field(None, gt=0)
    """Price per worker and hour, in the currency of `cost`."""

    @model_validator(mode="after")
    def _priced(self) -> "LimitsSpec":
        if (self.cost is None) != (self.worker_hour is None):
            raise ValueError("cost: requires worker_hour and the other way round: write both or neither")
        return self

    def reached(self, worker_seconds: float, seconds: float) -> str:
        """Return the sentence that ends a run after so many seconds, "" if it may go on."""
        if self.hours is not None and seconds > 3600 * self.hours:
            return f"limits.hours: {self.hours:g} hours are used up: raise it, and the same command resumes"
        if self.cost is not None and self.worker_hour and worker_seconds / 3600 * self.worker_hour > self.cost:
            return f"limits.cost: {self.cost:g} is used up: raise it, and the same command resumes"
        return ""
