"""DDPG: the agent of AMC (arXiv 1802.03494) and HAQ (1811.08886), which gives every layer a number in [0, 1].

Deep Deterministic Policy Gradient (1509.02971) with the changes of those two papers' code: every transition of an
episode has the episode's final reward, rewards are relative to a moving average, noise is a normal distribution
truncated to [0, 1], and updates happen at the end of an episode, one per transition. `AMC` and `HAQ` are their settings
as recorded. Surprising: an agent is a function of its seed and of the episodes it took, in order, so a search stores
the episodes, not the networks: a resumed search replays them, with the same result.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from slimray.spec import UserError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class DdpgSettings:
    """Settings of an agent, in which the two searches differ.

    `warmup` is the number of episodes whose actions are uniform; afterwards sigma is `sigma * decay ** (episodes after
    the warm-up)`. `replay` is the number of transitions kept per step of an episode. `last_init`: the last layers start
    uniform in +-last_init (None: torch's default). `dummy`: a transition that is never used separates episodes; without
    it, the first transition of every episode except the first is never drawn.
    """

    warmup: int
    decay: float
    replay: int
    last_init: float | None = None
    dummy: bool = False
    sigma: float = 0.5
    hidden: tuple[int, int] = (300, 300)
    actor_lr: float = 1e-4
    critic_lr: float = 1e-3
    tau: float = 0.01
    gamma: float = 1.0
    batch: int = 64
    baseline: float = 0.5

    def __post_init__(self) -> None:
        if self.warmup < 1 or not 0 < self.decay <= 1 or self.sigma <= 0 or self.replay < 1 or self.batch < 1:
            raise UserError("ddpg: warmup, replay and batch must be >= 1, sigma > 0 and decay in (0, 1]")

    def sigma_of(self, episode: int) -> float:
        """Return the standard deviation of the noise in `episode`, counted from 0; it is not used in the warm-up."""
        return self.sigma * self.decay ** (episode - self.warmup + 1)


AMC = DdpgSettings(warmup=101, decay=0.95, replay=100)
HAQ = DdpgSettings(warmup=21, decay=0.99, replay=128, last_init=3e-3, dummy=True)


@dataclass(frozen=True, eq=False)
class Episode:
    """One walk over the layers: `states` `[T, S]`, raw `actions` `[T]` (before any clip), and the final reward."""

    states: Floats
    actions: Floats
    reward: float


class Actor(nn.Module):
    """Actor network: states `[n, S]` -> actions `[n, 1]` in (0, 1)."""

    def __init__(self, num_states: int, hidden: tuple[int, int]):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(num_states, hidden[0]), nn.ReLU(), nn.Linear(*hidden), nn.ReLU(), nn.Linear(hidden[1], 1)
        )

    def forward(self, states: Tensor) -> Tensor:
        return self.layers(states).sigmoid()


class Critic(nn.Module):
    """Critic network: states `[n, S]` and actions `[n, 1]` -> expected rewards `[n, 1]`."""

    def __init__(self, num_states: int, hidden: tuple[int, int]):
        super().__init__()
        self.state, self.action = nn.Linear(num_states, hidden[0]), nn.Linear(1, hidden[0])
        self.layers = nn.Sequential(nn.ReLU(), nn.Linear(*hidden), nn.ReLU(), nn.Linear(hidden[1], 1))

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        return self.layers(self.state(states) + self.action(actions))


class Replay:
    """Ring buffer of the last `size` transitions; the state after a transition is that of the next one stored."""

    def __init__(self, size: int):
        self.size = size
        self.rows: list[tuple[Floats, float, float, bool]] = []  # state, action, reward, True at the end of an episode

    def add(self, state: Floats, action: float, reward: float, last: bool) -> None:
        """Store a transition; if the buffer is full, the oldest one is dropped."""
        self.rows.append((state, action, reward, last))
        del self.rows[: -self.size]

    def usable(self, place: int) -> bool:
        """Return True if a transition may be drawn: neither the newest, whose next state is unknown, nor one that
        follows the end of an episode."""
        return place < len(self.rows) - 1 and not (place and self.rows[place - 1][3])

    def draw(self, count: int, rng: np.random.Generator) -> tuple[Tensor, ...] | None:
        """Return states, actions, rewards, continuation flags and next states of `count` draws; None if there are too
        few transitions."""
        if len(self.rows) <= count:
            return None
        places: list[int] = []
        while len(places) < count:
            place = int(rng.integers(len(self.rows) - 1))
            if self.usable(place):
                places.append(place)
        now, then = [self.rows[p] for p in places], [self.rows[p + 1] for p in places]
        columns = ([r[1] for r in now], [r[2] for r in now], [not r[3] for r in now])
        numbers = (torch.tensor(column, dtype=torch.float32)[:, None] for column in columns)
        states, after = (torch.tensor(np.array([r[0] for r in rows]), dtype=torch.float32) for rows in (now, then))
        return (states, *numbers, after)


class Ddpg:
    """Agent for episodes of `num_steps` states of `num_states` numbers each. Learns in place."""

    def __init__(self, settings: DdpgSettings, num_states: int, num_steps: int, seed: int):
        self.settings, self.episodes = settings, 0
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.actor, self.critic = Actor(num_states, settings.hidden), Critic(num_states, settings.hidden)
            for net in (self.actor, self.critic):
                last = net.layers[-1]
                if settings.last_init is not None:
                    nn.init.uniform_(last.weight, -settings.last_init, settings.last_init)  # type: ignore[arg-type]
                    nn.init.uniform_(last.bias, -settings.last_init, settings.last_init)  # type: ignore[arg-type]
            self.actor_target = Actor(num_states, settings.hidden)
            self.critic_target = Critic(num_states, settings.hidden)
        self.actor_target.load_state_dict(self.actor.state_dict())
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.optimizers = (
            torch.optim.Adam(self.actor.parameters(), settings.actor_lr),
            torch.optim.Adam(self.critic.parameters(), settings.critic_lr),
        )
        self.replay = Replay(settings.replay * num_steps)
        self.baseline: float | None = None
        self._rng = np.random.default_rng([seed, 1])

    @torch.no_grad()
    def mean_action(self, state: Floats) -> float:
        """Return the actor's action without noise for a state `[S]`."""
        return float(self.actor(torch.tensor(np.asarray(state)[None], dtype=torch.float32)))

    def act(self, state: Floats, episode: int, rng: np.random.Generator) -> float:
        """Return an action in [0, 1] for a state `[S]` of `episode`: uniform in the warm-up, then the actor's, with
        noise."""
        if episode < self.settings.warmup:
            return float(rng.random())
        return truncated_normal(self.mean_action(state), self.settings.sigma_of(episode), rng)

    def take(self, episode: Episode) -> None:
        """Learn from an episode; one without a finite reward is only counted."""
        if math.isfinite(episode.reward):
            self.learn(episode)
        else:
            self.episodes += 1

    def learn(self, episode: Episode) -> None:
        """Store an episode; after the warm-up, update once per transition, right after it is stored."""
        last = len(episode.actions) - 1
        for step, (state, action) in enumerate(zip(episode.states, episode.actions, strict=True)):
            self.replay.add(np.asarray(state), float(action), episode.reward, step == last)
            if self.episodes >= self.settings.warmup:
                self.update()
        if self.settings.dummy:
            self.replay.add(np.asarray(episode.states[-1]), 0.0, 0.0, False)
        self.episodes += 1

    def update(self) -> None:
        """Train critic and actor for one step on a batch of the replay, if it holds more than a batch."""
        drawn = self.replay.draw(self.settings.batch, self._rng)
        if drawn is None:
            return
        states, actions, rewards, goes_on, after = drawn
        mean, rate = float(rewards.mean()), self.settings.baseline
        self.baseline = mean if self.baseline is None else self.baseline + rate * (mean - self.baseline)
        with torch.no_grad():
            future = self.critic_target(after, self.actor_target(after))
            target = rewards - self.baseline + self.settings.gamma * goes_on * future
        of_actor, of_critic = self.optimizers
        of_critic.zero_grad()
        nn.functional.mse_loss(self.critic(states, actions), target).backward()
        of_critic.step()
        of_actor.zero_grad()
        (-self.critic(states, self.actor(states)).mean()).backward()
        of_actor.step()
        for target_net, net in ((self.actor_target, self.actor), (self.critic_target, self.critic)):
            for slow, fast in zip(target_net.parameters(), net.parameters(), strict=True):
                slow.data.lerp_(fast.data, self.settings.tau)


def truncated_normal(mean: float, sigma: float, rng: np.random.Generator) -> float:
    """Draw from the normal distribution of `mean` and `sigma` truncated to [0, 1], by the inverse of its CDF."""
    normal = NormalDist()
    low, high = normal.cdf(-mean / sigma), normal.cdf((1 - mean) / sigma)
    share = low + (high - low) * float(rng.random())
    place = mean + sigma * normal.inv_cdf(min(max(share, 1e-16), 1 - 1e-16))
    return min(max(place, 0.0), 1.0)
