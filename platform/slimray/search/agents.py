"""A search by an agent that walks over a network, as in AMC (arXiv 1802.03494) and HAQ (1811.08886).

A walk (`amc.GroupWalk`, `haq.BitsWalk`) provides states and takes actions; one walk is an episode, and the policy at
its end is a trial, which gets a reward. The agent (ddpg.py) proposes a generation of trials after it has learned from
all generations before, so that a search is a function of its seed and of the rewards: it is the same on any number of
workers, resumed or not. A population of 1 is the sequential search as published. `Climb` can take the place of the
agent: it adds noise to the best policy so far, starting from a policy known to be good.
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
    """Walk of an agent: an action in [0, 1] for each of `num_steps` states, and the policy after the last one."""

    stream: int
    """Number of the random stream of its episodes, besides the seed."""

    @property
    def num_steps(self) -> int:
        """Number of actions of an episode."""
        ...

    def reset(self) -> Floats:
        """Begin an episode and return its first state `[S]`."""
        ...

    def step(self, action: float) -> Floats | None:
        """Take a raw action and return the next state, None after the last."""
        ...

    def policy(self) -> Given:
        """Return the policy of the episode, in plain values, after the last step."""
        ...


@dataclass(frozen=True)
class Climb:
    """Hill climbing: an episode takes the actions of the best one so far, with noise; the first takes `start` `[T]`.

    Actions are in [0, 1]; the noise is normal with standard deviation `spread`, truncated to that range. UserError for
    a `spread` that is not positive.
    """

    start: tuple[float, ...]
    spread: float = 0.1

    def __post_init__(self) -> None:
        if self.spread <= 0:
            raise UserError("search: spread must be > 0")


@dataclass(frozen=True)
class SearchSettings:
    """Settings of a search: the total of `episodes`, of which `population` are proposed at a time (1: in sequence), and
    the `agent` that proposes them."""

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
        """Return plain values for JSON; numbers keep all their digits."""
        values = {"states": self.states.tolist(), "actions": self.actions.tolist()}
        return {"index": self.index, "policy": self.policy, "reward": self.reward, **values}

    @staticmethod
    def from_dict(plain: Mapping[str, Any]) -> "Trial[Any]":
        """Read what `to_dict` returned; in older trials, policies are named `counts` (channels) or `bits`."""
        states, actions = (np.array(plain[name], float) for name in ("states", "actions"))
        policy = next(plain[name] for name in ("policy", "counts", "bits") if name in plain)
        return Trial(int(plain["index"]), policy, states, actions, float(plain["reward"]))


class Climber:
    """Hill-climbing agent for episodes of `num_steps` actions; ValueError if the start has another number of them."""

    def __init__(self, settings: Climb, num_steps: int):
        if len(settings.start) != num_steps:
            raise ValueError(f"search: start: {num_steps} actions are needed, not {len(settings.start)}")
        self.settings, self.best = settings, Episode(np.zeros(0), np.array(settings.start), -math.inf)

    def act(self, place: int, index: int, rng: np.random.Generator) -> float:
        """Return the action at `place` of episode `index`, in [0, 1]."""
        mean = float(self.best.actions[place])
        return mean if index == 0 else truncated_normal(mean, self.settings.spread, rng)

    def take(self, episode: Episode) -> None:
        """Climb to an episode if it is better than all before it; one without a finite reward never is."""
        if math.isfinite(episode.reward) and episode.reward > self.best.reward:
            self.best = episode


def rollout(walk: Walk[Policy], agent: Ddpg | Climber, index: int, seed: int) -> Trial[Policy]:
    """Let an agent walk episode `index`, and return the trial: a function of the agent, the seed and the number."""
    rng, states, actions = np.random.default_rng([seed, walk.stream, index]), [], []
    after: Floats | None = walk.reset()
    while after is not None:
        states.append(after)
        place = len(actions)
        actions.append(agent.act(place, index, rng) if isinstance(agent, Climber) else agent.act(after, index, rng))
        after = walk.step(actions[-1])
    return Trial(index, walk.policy(), np.array(states), np.array(actions))


class Learner(Generic[Policy]):
    """The agent of a search while it learns: it takes every episode once, in order, whatever order they finish in."""

    def __init__(self, walk: Walk[Policy], settings: SearchSettings, seed: int):
        self.walk, self.settings, self.seed, self.taken = walk, settings, seed, 0
        one = settings.agent
        climbs = isinstance(one, Climb)
        self.agent = Climber(one, walk.num_steps) if climbs else Ddpg(one, len(walk.reset()), walk.num_steps, seed)

    def propose(self, history: Mapping[int, Trial[Policy]], number: int) -> list[Trial[Policy]] | None:
        """Return the trials of generation `number`, without rewards; None while an earlier generation is incomplete.

        The result is a function of the seed and of the earlier generations in `history` (trials by number): neither
        their order nor trials of later generations matter. ValueError for a generation before the last one proposed.
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
    """Search in this process, and return all trials with rewards, in order. A repeated policy keeps its reward."""
    learner, done = Learner(walk, settings, seed), dict[int, Trial[Policy]]()
    known: dict[str, float] = {}
    while len(done) < settings.episodes:
        for trial in learner.propose(done, len(done) // settings.population) or []:
            if (key := repr(trial.policy)) not in known:
                known[key] = reward(trial.policy)
            done[trial.index] = replace(trial, reward=known[key])
    return list(done.values())


def best(trials: Sequence[Trial[Policy]]) -> Trial[Policy]:
    """Return the trial with the highest reward, the first of equal ones; ValueError if no trial has a reward."""
    scored = [trial for trial in trials if np.isfinite(trial.reward)]
    if not scored:
        raise ValueError("search: no trial has a reward")
    return max(scored, key=lambda trial: (trial.reward, -trial.index))
