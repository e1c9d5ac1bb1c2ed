"""Votes on the points of scenes, for `evaluate`: many draws of a room or shape, the surest answer at each point wins.

As published for PVCNN (arXiv 1907.03739) and PointNet: S3DIS uses the windows of both offsets, ShapeNet ten draws of a
shape, whose answers are limited to its own parts. The rows of an index are ordered by scene, so a scene is settled as
soon as the step of its last row is over, and only the few unfinished scenes are in memory, 16 bytes per point. If its
rows are spread over ranks, they settle it together. The result does not depend on their number: if two answers are
equally sure, the lower class wins (as published it is the first, which depends on the order of the windows).
"""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

UNKNOWN = -1
Count = Callable[[np.ndarray, np.ndarray, int], None]


class SceneVotes:
    """The unfinished scenes of this rank; `count` is called with those that are settled.

    `paths` are those of the whole index; the part before `#` is the scene. `parts` are the labels of each shape, if
    scenes are shapes. `count(predicted, labels, shape)` takes int64 `[N]` arrays. All ranks take every step, and call
    `settle` after it.
    """

    def __init__(self, paths: Sequence[str], batch: int, count: Count, parts: Sequence[range] = ()):
        self.scenes = [path.partition("#")[0] for path in paths]
        self.last = {scene: row // batch for row, scene in enumerate(self.scenes)}  # step of its last row
        self.alone = {scene for scene, count in Counter(self.scenes).items() if count == 1}
        self.parts, self.batch, self.count = tuple(parts), batch, count
        self.open: dict[str, Scene] = {}

    def add(self, sample: int, scores: Tensor, labels: np.ndarray) -> None:
        """Add the views of row `sample`: scores `[v, C, N]`, labels and rows int64 `[2, v, N]`.

        Scores that are not finite do not count as votes.
        """
        truth, rows = labels
        shape = self._shape_of(truth)
        sure, chosen = confident(scores, self.parts[shape] if self.parts else None)
        scene = self.open.setdefault(self.scenes[sample], Scene(shape))
        scene.add(rows.reshape(-1), sure.reshape(-1), chosen.reshape(-1), truth.reshape(-1))

    def _shape_of(self, truth: np.ndarray) -> int:
        """Return the index of the shape that a sample's labels belong to; 0 without parts."""
        known = truth[truth >= 0]
        return next((i for i, part in enumerate(self.parts) if len(known) and known.max() in part), 0)

    def settle(self, step: int, world: int, device: torch.device) -> None:
        """Count the scenes whose last row was part of `step`. A collective if a scene has several rows."""
        start = step * self.batch
        ended = dict.fromkeys(s for s in self.scenes[start : start + self.batch] if self.last[s] == step)
        for name in ended:
            scene = self.open.pop(name, None)
            if name not in self.alone and world > 1:
                scene = _merged(scene, device)
                if dist.get_rank() != 0:
                    continue  # the first rank counts it
            if scene is None:
                continue  # none of its rows could be decoded, or another rank has it
            self.count(*scene.result(), scene.shape)


class Scene:
    """The surest answer so far for each point of a scene, as a number that grows with its probability, see `_packed`.

    `best` int64 `[N]` is that number, 0 without a vote; `truth` holds the labels, -1 if unknown.
    """

    def __init__(self, shape: int = 0):
        self.shape = shape
        self.best = np.zeros(0, np.int64)
        self.truth = np.full(0, UNKNOWN, np.int64)

    def add(self, rows: np.ndarray, sure: np.ndarray, chosen: np.ndarray, truth: np.ndarray) -> None:
        """Add answers for the points `rows`: probability, class, label, all `[n]`. Of equally sure answers the lower
        class is kept; answers that are not finite do not count."""
        self.grow(int(rows.max()) + 1)
        np.maximum.at(self.best, rows, np.where(np.isfinite(sure), _packed(sure, chosen), 0))
        self.truth[rows] = truth

    def grow(self, size: int) -> None:
        """Extend the arrays to `size` points without votes."""
        more = max(0, size - len(self.best))
        self.best = np.pad(self.best, (0, more))
        self.truth = np.pad(self.truth, (0, more), constant_values=UNKNOWN)

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the winning class of each point, -1 without a vote, and its label, -1 if unknown."""
        return np.where(self.best > 0, 0xFFFF - (self.best & 0xFFFF), -1), self.truth


def _packed(sure: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return probabilities float32 above 0 and classes packed into int64; the bits of a positive float grow with it."""
    bits = np.maximum(sure.astype(np.float32), np.finfo(np.float32).tiny).view(np.int32).astype(np.int64)
    return (bits << 16) | (0xFFFF - chosen.astype(np.int64))


def _merged(scene: Scene | None, device: torch.device) -> Scene | None:
    """Return the scene with the votes of all ranks. A collective."""
    scene = scene or Scene()
    facts = torch.tensor([len(scene.best), scene.shape], device=device)
    dist.all_reduce(facts, dist.ReduceOp.MAX)
    size, scene.shape = facts.tolist()
    if not size:
        return None
    scene.grow(size)
    both = torch.from_numpy(np.stack([scene.best, scene.truth])).to(device)
    dist.all_reduce(both, dist.ReduceOp.MAX)
    scene.best, scene.truth = both.cpu().numpy()
    return scene


def confident(scores: Tensor, parts: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the probability and index of the likeliest class per point: scores `[n, C, N]` -> float32, int64 `[n, N]`.

    With `parts`, only those classes are considered; probabilities are still those over all classes.
    """
    probabilities = scores.float().softmax(1)
    if parts is None:
        best, chosen = probabilities.max(1)
        return best.cpu().numpy(), chosen.cpu().numpy()
    labels = torch.tensor(list(parts), device=scores.device)
    best, chosen = probabilities.index_select(1, labels).max(1)
    return best.cpu().numpy(), labels[chosen].cpu().numpy()
