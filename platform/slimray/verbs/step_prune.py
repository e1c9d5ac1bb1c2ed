"""The step `prune`: structured pruning, whole channels go, by a given policy or one that AMC's agent searches."""

from typing import Any

from slimray import runs

FASTER = True


def check(step: Any, net: Any) -> None:
    """Nothing: the groups of a network are found when it runs."""


def run(step: Any, work: Any, folder: str, before: runs.Run) -> tuple[runs.Run, dict[str, Any]]:
    """Prune the network of `before`; return the stage and the policy with what it was chosen by."""
    from slimray.verbs import pruning

    return pruning.prune(step, work, folder, before)
