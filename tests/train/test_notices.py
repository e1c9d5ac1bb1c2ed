"""A notice of preemption to one rank is enough; ranks without a notice neither send requests nor wait."""

from types import SimpleNamespace

import torch
from ray.train import PreemptionInfo
from ray.train.v2._internal.execution import context
from ray.train.v2._internal.execution.preemption import PreemptionContext
from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker
from tests.ranks import run_ranks

from slimray.train import notices
from slimray.train.checkpoints import Progress
from slimray.train.notices import Notices
from slimray.train.progress_actor import ProgressActor
from slimray.train.ranks import Ranks
from slimray.train.spec import LimitsSpec

WORLD = 3
SOON = PreemptionInfo(deadline_ms=1, preempted_node_to_ranks={"b": [1], "c": [2]})
LATER = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a": [0], "c": [2]})


def ranks(rank: int, world: int = 1) -> Ranks:
    return Ranks(rank, world, torch.device("cpu"), 600, lambda *told: None)


def _step(found: Notices, progress: Progress) -> dict | None:
    """Do as the loop does: a sum at each step, and a `look` if any rank has a notice."""
    (looks,) = found.ranks.sum(found.due(progress))
    return found.look(progress) if looks else None


def _on_a_rank(rank: int) -> None:
    saved: list[int] = []
    said: list[dict] = []
    told: list[PreemptionInfo] = []
    found = Notices(
        None,
        ranks(rank, WORLD),
        lambda: saved.append(rank),
        lambda **what: said.append(what),
        lambda: told[-1] if told else None,
    )
    progress = Progress(total_steps=7)
    assert _step(found, progress) is None
    assert saved == []
    if rank == 1:
        told.append(SOON)
    assert _step(found, progress) == {"leaving": {"b": "is about to be preempted", "c": "is about to be preempted"}}
    assert saved == [rank]
    if rank == 0:
        assert [(one["preempted"], one["total_steps"]) for one in said] == [(True, 7)]
        assert said[0]["note"] == "node preemption announced (ranks 1, 2, in 0 s): saved step 7, starting again"
    else:
        assert said == []
    if rank == 2:
        told.append(LATER)
    end = _step(found, progress)
    assert end is not None
    assert list(end["leaving"]) == ["a", "b", "c"]


def test_what_one_rank_was_told_all_ranks_leave_for():
    run_ranks(_on_a_rank, world=WORLD)


def test_a_limit_ends_the_run_when_its_time_has_come(monkeypatch):
    saved: list[int] = []
    limits = LimitsSpec.model_validate({"cost": 1.0, "worker_hour": 3600})
    found = Notices(limits, ranks(0), lambda: saved.append(1), print, lambda: None)
    progress = Progress(worker_seconds=0.5)
    monkeypatch.setattr(notices, "LOOK_S", 0.0)
    assert _step(found, progress) is None
    assert 0 < progress.seconds == progress.worker_seconds - 0.5
    progress.worker_seconds = 1.5
    assert _step(found, progress) == {"failed": "limits.cost: 1 is used up: raise it, and the same command resumes"}
    assert saved == [1]


def test_a_rank_hears_what_ray_tells_its_process(monkeypatch):
    here = SimpleNamespace(preemption_context=PreemptionContext(), get_world_rank=lambda: 0)
    monkeypatch.setattr(context, "_train_context", here)
    assert notices.told_here() is None
    RayTrainWorker.mark_preempt(None, SOON)
    assert notices.told_here() is SOON


def test_every_sentence_is_kept_for_the_driver_however_fast_the_next_one_follows():
    actor = ProgressActor()
    actor.update(note="node preemption announced", preempted=True, total_steps=9)
    actor.begin(9, 1)
    actor.waits_for("waits for a node")
    actor.waits_for("waits for a node")
    actor.sick("abcdefghij", "has no disk")
    wanted = [("node preemption announced", True), ("waits for a node", False)]
    wanted.append(("node abcdefgh is left out, it has no disk", False))
    state = actor.read()
    assert [(one["note"], one["preempted"]) for one in state["news"]] == wanted
    assert (state["total_steps"], state["waits_for"]) == (9, "waits for a node")
