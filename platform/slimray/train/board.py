"""The progress actor's class. Its process imports this file and nothing else of slimray: no torch, no Ray Train."""

import time
from typing import Any


class Board:
    """Progress actor: the ranks report to it how far they are, and the driver reads it; nobody waits for it."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"told": time.time(), "repeated": 0, "stuck": []}

    def update(self, **state: Any) -> None:
        self.state.update(state, told=time.time())

    def begin(self, step: int, world: int) -> None:
        """Note that a group of workers starts after `step`; steps that were done before count as repeated."""
        if "world" in self.state:
            self.state["repeated"] += max(0, self.state.get("total_steps", step) - step)
        self.update(world=world, total_steps=step, preempted=False)

    def stuck(self, sentence: str) -> None:
        """Note that a rank is stuck."""
        self.state["stuck"].append(sentence)

    def read(self) -> dict[str, Any]:
        return self.state
