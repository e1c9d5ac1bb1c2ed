"""A search by an agent that walks over a network, as AMC (arXiv 1802.03494) and HAQ (1811.08886) do it.

A walk (`amc.GroupWalk`, `haq.BitsWalk`) gives states and takes actions; one walk is an episode, the policy that it ends
in a trial, which gets a reward. A generation of trials is proposed by the agent (ddpg.py) that has learned from all
generations before it, so that a search is a function of its seed and of the rewards: on any number of workers, resumed
or not, it is the same. A population of 1 is the sequential search as published. `Climb` takes the
place of an agent: noise around the best policy so far, from one that is known to be good.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from slimray.search.ddpg import Ddpg, DdpgSettings, Episode, truncated_normal
from slimray.spec import UserError

Floats = NDArray[np.float64]
Policy = TypeVar("Policy")
Given = TypeVar("Given", covariant=True)


class Walk(Protocol[Given]):
    """Walk of an agent: an action in [0, 1] for each of `num_steps` states, and the policy after the last."""

    stream: int
    """Which random numbers of a seed its episodes take."""

    @property
    def num_steps(self) -> int:
        """Actions of an episode."""
        ...

    def reset(self) -> Floats:
        """Begin an episode and return its first state `[S]`."""
        ...

    def step(self, action: float) -> Floats | None:
        """Take a raw action and return the next state, None after the last."""
        ...

    def policy(self) -> Given:
        """Return the policy of the episode, plain values, after the last step."""
        ...


@dataclass(frozen=True)
class Climb:
    """Hill climbing: an episode takes the actions of the best one so far, with noise; the first takes `start` `[T]`.

    Actions are in [0, 1]; the noise is normal, of deviation `spread`, cut to that range. UserError for a `spread` that
    is not positive.
    """

    start: tuple[float, ...]
    spread: float = 0.1

    def __post_init__(self) -> None:
        if self.spread <= 0:
            raise UserError("search: spread must be > 0")


@dataclass(frozen=True)
class SearchSettings:
    """A search: `episodes` in all, `population` of them proposed at a time (1: in sequence), who proposes."""

    episodes: int
    population: int
    agent: DdpgSettings | Climb

    def __post_init__(self) -> None:
        if self.population < 1 or self.episodes < 1:
            raise UserError("search: episodes and population must be >= 1")


@dataclass(frozen=True, eq=False)
class Trial(Generic[Policy]):
    """An episode: its number, the policy, states `[T, S]` and raw actions `[T]`, and the reward (nan: failed)."""

    index: int
    policy: Policy
    states: Floats
    actions: Floats
    reward: float = float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; numbers keep all their digits."""
        values = {"states": self.states.tolist(), "actions": self.actions.tolist()}
        return {"index": self.index, "policy": self.policy, "reward": self.reward, **values}

    @staticmethod
    def from_dict(plain: Mapping[str, Any]) -> "Trial[Any]":
        """Read what `to_dict` wrote; trials of before called a policy of channels `counts`, one of bits `bits`."""
        states, actions = (np.array(plain[name], float) for name in ("states", "actions"))
        policy = next(plain[name] for name in ("policy", "counts", "bits") if name in plain)
        return Trial(int(plain["index"]), policy, states, actions, float(plain["reward"]))


class Climber:
    """Agent that climbs over episodes of `num_steps` actions; ValueError where the start has another number."""

    def __init__(self, settings: Climb, num_steps: int):
        if len(settings.start) != num_steps:
            raise ValueError(f"search: start: {num_steps} actions are needed, not {len(settings.start)}")
        self.settings, self.best = settings, Episode(np.zeros(0), np.array(settings.start), -math.inf)

    def act(self, place: int, index: int, rng: np.random.Generator) -> float:
        """An action in [0, 1], that at `place` of episode `index`."""
        mean = float(self.best.actions[place])
        return mean if index == 0 else truncated_normal(mean, self.settings.spread, rng)

    def take(self, episode: Episode) -> None:
        """Climb to an episode that is better than all before it; one without a finite reward is none."""
        if math.isfinite(episode.reward) and episode.reward > self.best.reward:
            self.best = episode


def rollout(walk: Walk[Policy], agent: Ddpg | Climber, index: int, seed: int) -> Trial[Policy]:
    """The episode `index` that an agent walks: a function of the agent, the seed and the number."""
    rng, states, actions = np.random.default_rng([seed, walk.stream, index]), [], []
    after: Floats | None = walk.reset()
    while after is not None:
        states.append(after)
        place = len(actions)
        actions.append(agent.act(place, index, rng) if isinstance(agent, Climber) else agent.act(after, index, rng))
        after = walk.step(actions[-1])
    return Trial(index, walk.policy(), np.array(states), np.array(actions))


class Learner(Generic[Policy]):
    """The agent of a search as it learns: it takes every episode once, in order, whatever order they come in."""

    def __init__(self, walk: Walk[Policy], settings: SearchSettings, seed: int):
        self.walk, self.settings, self.seed, self.taken = walk, settings, seed, 0
        one = settings.agent
        climbs = isinstance(one, Climb)
        self.agent = Climber(one, walk.num_steps) if climbs else Ddpg(one, len(walk.reset()), walk.num_steps, seed)

    def propose(self, history: Mapping[int, Trial[Policy]], number: int) -> list[Trial[Policy]] | None:
        """The trials of generation `number`, without rewards; None while one of an earlier generation is missing.

        A function of the seed and, of `history` (trials by number), of the generations before: neither its order nor
        trials of later generations matter. ValueError for a generation before one that was proposed.
        """
        first = number * self.settings.population
        if first < self.taken:
            raise ValueError(f"search: generation {number} comes before one that was proposed")
        if any(index not in history for index in range(self.taken, first)):
            return None
        for trial in (history[index] for index in range(self.taken, first)):
            self.agent.take(Episode(trial.states, trial.actions, trial.reward))
        self.taken = first
        last = min(first + self.settings.population, self.settings.episodes)
        return [rollout(self.walk, self.agent, index, self.seed) for index in range(first, last)]


def search(
    walk: Walk[Policy], settings: SearchSettings, reward: Callable[[Policy], float], seed: int = 0
) -> list[Trial[Policy]]:
    """Search in this process: all trials with their rewards, in order. A policy that was tried keeps its reward."""
    learner, done = Learner(walk, settings, seed), dict[int, Trial[Policy]]()
    known: dict[str, float] = {}
    while len(done) < settings.episodes:
        for trial in learner.propose(done, len(done) // settings.population) or []:
            if (key := repr(trial.policy)) not in known:
                known[key] = reward(trial.policy)
            done[trial.index] = replace(trial, reward=known[key])
    return list(done.values())


def best(trials: Sequence[Trial[Policy]]) -> Trial[Policy]:
    """The trial of the highest reward, of equal ones the first; ValueError where none has one."""
    scored = [trial for trial in trials if np.isfinite(trial.reward)]
    if not scored:
        raise ValueError("search: no trial has a reward")
    return max(scored, key=lambda trial: (trial.reward, -trial.index))
