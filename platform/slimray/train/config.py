"""`FitConfig`: everything that a verb hands to the workers of one training run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slimray.data.pipeline import Source
from slimray.data.token_plan import Bags
from slimray.runs import tracking
from slimray.tasks.network import Input
from slimray.train.methods.method import Method
from slimray.train.spec import CheckpointSpec, LimitsSpec, OptimSpec, ScaleSpec


@dataclass(frozen=True)
class FitConfig:
    """Everything the workers of one training run need: plain values, specs and object references.

    `task` is a name in TASKS, `method` decides what a step computes, `dataset` is the fingerprint of the indexes,
    `recipes` maps a split to the plain form of its per-sample recipe, `job` is the resolved job as written to the run,
    `feeder` names a feeder that was started ahead. For batches counted in tokens, `bags` holds the bags of each split,
    and `batch_total` and `per_worker` count tokens.
    """

    run_uri: str
    attempt: int
    model: dict[str, Any]
    init: dict[str, Any] | None
    optim: OptimSpec
    batch_total: int
    per_worker: int
    scale: ScaleSpec
    checkpoint: CheckpointSpec
    tracking: tracking.TrackingSpec
    task: str
    pixels: Input
    classes: tuple[str, ...]
    dataset: str
    sources: dict[str, Source]
    recipes: dict[str, dict[str, Any]]
    decode_slots: int
    decode_timeout_s: float
    max_bad_fraction: float
    seed: int
    log_every: int
    val_every: int
    macs: int
    record_samples: bool
    job: dict[str, Any]
    progress_actor: Any
    method: Method
    drop_last: bool = False
    limits: LimitsSpec | None = None
    feeder: str = ""
    bags: Mapping[str, Bags] = field(default_factory=dict)
    compile: bool = False

    @property
    def window(self) -> int:
        """Return the number of samples that a step consumes, or of bags where batches are counted in tokens."""
        return self.batch_total // self.per_worker if self.bags else self.batch_total
