"""MLPerf Tiny's network for visual wake words on the shared pictures: the reference for networks that
`jobs/visual_wake_words.yaml` finds.

MobileNetV1 0.25 in float, trained on COCO, on pictures of 96 px: on all of them, and on the last quarter of the files
of each class, on which a training on the other files may be scored, because near duplicates have neighbouring numbers.
"""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tests.benchmarks.tflite import layers
from torch import Tensor, nn

SHARED = Path(os.environ.get("SLIMRAY_SHARED", Path(__file__).resolve().parents[3] / "shared"))
CLASSES = ("no_person", "person")


def pictures() -> tuple[Tensor, Tensor, Tensor]:
    """All pictures `[N, 3, 96, 96]` of 0 to 1, their classes, and whether each is of the last quarter of its class."""
    found, classes, last = list[np.ndarray](), list[int](), list[bool]()
    for label, name in enumerate(CLASSES):
        files = sorted((SHARED / "data/images/person" / name).iterdir())
        found += [np.asarray(Image.open(file).convert("RGB")) for file in files]
        classes += [label] * len(files)
        last += [number >= len(files) * 3 // 4 for number in range(len(files))]
    return (
        torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 255,
        torch.tensor(classes),
        torch.tensor(last),
    )


@torch.no_grad()
def main() -> None:
    """Print its accuracy on all pictures and on the held-out ones."""
    torch.set_num_threads(1)
    net = nn.Sequential(*layers((SHARED / "data/models/mlperf_tiny/vww_96_float.tflite").read_bytes())).eval()
    x, y, last = pictures()
    right = torch.cat([net(part) for part in x.split(32)]).argmax(1) == y
    for name, rows in (("all", torch.ones_like(last)), ("the last quarter of each class", last)):
        share = 100 * float(right[rows].double().mean())
        print(f"{name}: {int(right[rows].sum())} of {int(rows.sum())}, {share:.1f} %; people in {int(y[rows].sum())}")


if __name__ == "__main__":
    main()
