"""The progress actor's class. Its process imports this file and nothing else of slimray: no torch, no Ray Train."""

import time
from collections.abc import Sequence
from typing import Any

HUNG = "had a rank that hung"


class ProgressActor:
    """Progress actor: ranks report their progress to it without waiting, and the driver reads it."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"told": time.time(), "repeated": 0, "stuck": [], "news": []}
        self.state |= {"saved": None, "sick": {}, "hung": {}}
        self.nodes: dict[int, str] = {}
        self.waiting: set[int] = set()

    def update(self, **state: Any) -> None:
        if "note" in state:
            self._add(state.pop("note"), bool(state.pop("preempted", False)))
        self.state.update(state, told=time.time())

    def _add(self, note: str, preempted: bool = False) -> None:
        """Keep a sentence for the driver, which prints each one once, however quickly they arrive."""
        if not self.state["news"] or self.state["news"][-1]["note"] != note:
            self.state["news"].append({"note": note, "preempted": preempted})

    def begin(self, step: int, world: int) -> None:
        """Note that a group of workers starts after `step`; later steps that an earlier group did count as repeated."""
        if "world" in self.state:
            self.state["repeated"] += max(0, self.state.get("total_steps", step) - step)
        self.nodes = {rank: node for rank, node in self.nodes.items() if rank < world}
        self.update(world=world, total_steps=step, waits_for="")

    def waits_for(self, sentence: str) -> None:
        """Note what the launch waits for; this does not count as progress."""
        self.state["waits_for"] = sentence
        self._add(sentence)

    def saved(self, step: int) -> None:
        """Note that a checkpoint of this launch is on storage."""
        self.state["saved"] = step

    def joined(self, rank: int, node: str) -> None:
        """Note the node on which a rank of a new group runs."""
        self.waiting.clear()
        self.nodes[rank] = node

    def places(self) -> dict[int, str]:
        """Return the node of each rank of the group, for the ranks that have reported it."""
        return dict(self.nodes)

    def sick(self, node: str, reason: str) -> None:
        """Note that a node cannot work."""
        self.state["sick"][node] = reason
        self._add(f"node {node[:8]} is left out, it {reason}")

    def unknown(self, nodes: Sequence[str]) -> None:
        """Note which nodes have joined and are being checked."""
        self.state["unknown"] = nodes

    def fed_without(self, nodes: Sequence[str]) -> None:
        """Note the nodes that get no decoding tasks from now on."""
        self.state["fed_without"] = nodes

    def hung(self, node: str) -> None:
        """Note that a rank hung on a node."""
        self.state["hung"][node] = HUNG

    def waits(self, rank: int) -> None:
        """Note that a rank has waited for others too long; if only one rank does not report this, that one hangs."""
        self.waiting.add(rank)
        silent = set(range(self.state.get("world", 0))) - self.waiting
        self.state["silent"] = [self.nodes[one] for one in silent if one in self.nodes] if len(silent) == 1 else []

    def stuck(self, sentence: str) -> None:
        """Note that a rank is stuck."""
        self.state["stuck"].append(sentence)

    def read(self) -> dict[str, Any]:
        silent = dict.fromkeys(self.state.get("silent", ()), HUNG)
        return self.state | {"hung": self.state["hung"] | silent, "nodes": sorted(set(self.nodes.values()))}
