"""Searches by an agent, episode by episode (AMC, HAQ): trials on storage, run by Ray Tune.

`search.agents` proposes each trial from the seed and the finished trials before it, so that the result is the same on
any number of workers and after a resume.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from ray import tune

from slimray import runs
from slimray.search.agents import Learner, Trial
from slimray.spec import RunFailed
from slimray.train import connection
from slimray.verbs import trials
from slimray.verbs.compressing import Work

Reward = Callable[[Mapping[str, float]], float]  # metrics -> reward


class Progress:
    """A search in progress: finished trials lie in `trials/` of the stage, and the next one is a function of them.

    A policy that has a reward is not tried again: a later episode with the same policy gets the same reward.
    """

    def __init__(self, stage: runs.Run, learner: Learner[Any], reward: Reward):
        self.stage, self.learner, self.reward, self.settings = stage, learner, reward, learner.settings
        self.history: dict[int, Trial[Any]] = {}
        self.proposed: dict[int, list[Trial[Any]]] = {}
        self.running: dict[str, Trial[Any]] = {}
        self.scored: dict[str, dict[str, float]] = {}  # repr of a policy -> its metrics
        for index in range(self.settings.episodes):
            if runs.exists(stage, self._file(index)):
                self._know(json.loads(runs.read_file(stage, self._file(index))))

    def _know(self, plain: dict[str, Any]) -> None:
        reward = math.nan if plain["reward"] is None else plain["reward"]
        trial = self.history[plain["index"]] = Trial.from_dict(plain | {"reward": reward})
        if math.isfinite(reward):
            self.scored[repr(trial.policy)] = plain["metrics"]

    @staticmethod
    def _file(index: int) -> str:
        return f"trials/{index:06d}.json"

    @property
    def trials(self) -> list[Trial[Any]]:
        """The finished trials, in order of index."""
        return [self.history[index] for index in sorted(self.history)]

    def candidates(self, metric: str, costs: Callable[[Any], Mapping[str, float]]) -> list[dict[str, float]]:
        """Return the metric and the costs of every policy that was scored, once each."""
        policies = {repr(trial.policy): trial.policy for trial in self.trials}
        return [{metric: told[metric], **costs(policies[one])} for one, told in self.scored.items()]

    @property
    def is_done(self) -> bool:
        """True once no trial is left to run."""
        return len(self.history) >= self.settings.episodes

    def next(self) -> Trial[Any] | None:
        """Return the first trial that is neither finished nor running; None while its generation cannot be proposed."""
        busy = {trial.index for trial in self.running.values()} | self.history.keys()
        index = next((i for i in range(self.settings.episodes) if i not in busy), None)
        if index is None:
            return None
        number, place = divmod(index, self.settings.population)
        if number not in self.proposed:
            found = self.learner.propose(self.history, number)
            if found is None:
                return None
            self.proposed[number] = found
        return self.proposed[number][place]

    def start(self, trial: str) -> dict[str, Any] | None:
        """Return the config for Tune's `trial`; None while nothing can be proposed."""
        while (chosen := self.next()) is not None:
            known = self.scored.get(repr(chosen.policy))
            if known is None:
                self.running[trial] = chosen
                return {"tried": chosen.policy}
            self._write(chosen, known)
        return None

    def end(self, trial: str, metrics: dict[str, float]) -> None:
        """Write a trial that has ended, once; without metrics it has failed."""
        known = self.running.pop(trial, None)
        if known is not None:
            self._write(known, metrics)

    def _write(self, trial: Trial[Any], metrics: dict[str, float]) -> None:
        reward = self.reward(metrics) if metrics else math.nan
        plain = trial.to_dict() | {"reward": number_of(reward), "metrics": metrics}
        self._know(plain)
        runs.write_file(self.stage, self._file(trial.index), json.dumps(plain).encode())


def number_of(value: float) -> float | None:
    """Return a reward for JSON, with None for nan."""
    return None if math.isnan(value) else value


def run(
    work: Work, stage: runs.Run, step: str, learner: Learner[Any], reward: Reward, make: Callable[[], trials.Score]
) -> Progress:
    """Run an agent's search, or resume the one in `stage`; return it with all its trials.

    `make` is called in the process of a trial and returns the function that scores policies. RunFailed if every trial
    failed.
    """
    job, progress, settings = work.job, Progress(stage, learner, reward), learner.settings
    if not progress.is_done:
        done = f" ({len(progress.history)} done)" if progress.history else ""
        work.ctx.console.print(f"{job.name}: {settings.episodes} policies to try{done}", highlight=False)
        setup = tune.TuneConfig(
            search_alg=trials.ProposalSearch(progress),
            num_samples=settings.episodes - len(progress.history),
            max_concurrent_trials=min(job.scale.most, settings.population),
            reuse_actors=True,
            metric="metric",
            mode="max",
        )
        trainable = tune.with_resources(
            tune.with_parameters(trials.ScoreTrial, make=make, threads=connection.threads(job.scale)),
            trials.resources_of(job.scale),
        )
        trials.run_trials(job.name, trainable, setup, retries=job.scale.retries)
        if not progress.is_done:
            raise RunFailed(f"{step}: Tune ended after {len(progress.history)} of {settings.episodes} trials")
    if not any(math.isfinite(trial.reward) for trial in progress.trials):
        raise RunFailed(f"{step}: every one of {settings.episodes} trials failed")
    return progress
