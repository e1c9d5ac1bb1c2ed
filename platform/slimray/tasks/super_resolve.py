"""Super resolution: a picture enlarged by an integer factor.

Outputs are RGB `[n, 3, H, W]` in [0, 1], targets uint8 `[n, H, W, 3]`. The loss is the mean absolute error. PSNR and
SSIM follow the published protocol: of luma (Y = 16 + (65.481 R + 128.553 G + 24.966 B) / 255, not rounded) of pictures
rounded to uint8, without `scale` pixels at each border; SSIM with a Gaussian of 11 pixels, sigma 1.5 (Wang et al.
2004), only inside the picture. The scores of bicubic interpolation on the same pictures are reported too.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from slimray.data.images.pairs import as_pixels, resize
from slimray.data.modalities import Target, read_recipe
from slimray.runs.examples import Pair
from slimray.runtime import super_resolve as files
from slimray.spec import Spec
from slimray.tasks.evaluation import Pass, Setting
from slimray.tasks.network import Network
from slimray.tasks.task import LOSS, LossOptions, Metric, Table, Task

LUMA = (65.481, 128.553, 24.966)
LEAST_ERROR = 1e-10  # mean square, so that equal pictures have a PSNR of 148 dB instead of infinity


class SuperResolveOptions(Spec):
    """Options of super resolution."""

    scale: int = Field(2, ge=2, le=4)
    """Factor by which a picture is enlarged."""
    val_size: int | None = Field(None, ge=16, le=1024)
    """Side of the small centre crop in validations, in pixels. Default: `data.size`."""


def losses(outputs: Tensor, targets: Tensor, options: LossOptions) -> Tensor:
    """Return the mean absolute error of each picture `[n]`, for values in [0, 1]."""
    return (outputs.float() - targets.movedim(-1, 1).float() / 255).abs().flatten(1).mean(1)


def weights(targets: Tensor, options: LossOptions) -> Tensor:
    """Return the weight of each picture `[n]`, 1."""
    return torch.ones(len(targets), device=targets.device)


def target(recipe: Mapping[str, Any]) -> Target:
    """Return the target: the large picture, uint8; zeros if there is none."""
    side = read_recipe(dict(recipe)).size * recipe["scale"]
    return Target((side, side, 3), "uint8", 0)


def luma(pictures: np.ndarray | Tensor, border: int) -> Tensor:
    """Return luma float64 `[n, 1, H - 2b, W - 2b]` of pictures uint8 `[n, H, W, 3]`."""
    rgb = torch.as_tensor(pictures).double()
    y = 16 + (rgb * rgb.new_tensor(LUMA)).sum(-1) / 255
    return y[:, None, border : y.shape[1] - border, border : y.shape[2] - border]


def psnr(found: Tensor, wanted: Tensor) -> Tensor:
    """Return the PSNR in dB of each of two stacks of luma `[n]`, peak 255."""
    return 10 * torch.log10(255**2 / (found - wanted).square().flatten(1).mean(1).clamp(min=LEAST_ERROR))


def ssim(found: Tensor, wanted: Tensor) -> Tensor:
    """Return the SSIM of each of two stacks of luma `[n]`, 1 for equal ones."""
    places = torch.arange(11, dtype=found.dtype, device=found.device) - 5
    line = torch.exp(-places.square() / (2 * 1.5**2))
    line = line / line.sum()
    window = (line[:, None] * line)[None, None]

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(x, window)

    a, b = blur(found), blur(wanted)
    aa, bb, ab = blur(found * found) - a * a, blur(wanted * wanted) - b * b, blur(found * wanted) - a * b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ratio = (2 * a * b + c1) * (2 * ab + c2) / ((a * a + b * b + c1) * (aa + bb + c2))
    return ratio.flatten(1).mean(1)


def bicubic(small: np.ndarray, scale: int) -> np.ndarray:
    """Return a picture uint8 `[h, w, 3]` enlarged by bicubic interpolation, uint8."""
    return as_pixels(resize(small, small.shape[0] * scale, small.shape[1] * scale))


def shrunk(large: np.ndarray, scale: int) -> np.ndarray:
    """Return a picture uint8 `[H, W, 3]` at 1 / `scale` of its size, as the data path makes it, uint8."""
    return as_pixels(resize(large, large.shape[0] // scale, large.shape[1] // scale))


def to_pixels(outputs: Tensor) -> np.ndarray:
    """Return outputs `[n, 3, H, W]` as pictures uint8 `[n, H, W, 3]`."""
    return files.to_pixels(outputs.float().cpu().numpy())


class PictureScore:
    """Sums over pictures, added up over ranks. A picture that is not finite has a PSNR and an SSIM of 0."""

    def __init__(self, scale: int):
        self.scale = scale
        self.sums = torch.zeros(7, dtype=torch.float64)  # psnr, ssim, both of bicubic, loss, pictures, not finite

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Count outputs `[n, 3, H, W]` against pictures uint8 `[n, H, W, 3]`."""
        finite = outputs.isfinite().flatten(1).all(1).cpu()
        wanted, large = luma(targets.cpu(), self.scale), targets.cpu().numpy()
        plain = luma(np.stack([bicubic(shrunk(one, self.scale), self.scale) for one in large]), self.scale)
        error = (outputs.float().cpu() - targets.cpu().movedim(-1, 1).float() / 255).abs().flatten(1).mean(1)
        found = luma(to_pixels(outputs.nan_to_num()), self.scale)
        rows = [psnr(found, wanted) * finite, ssim(found, wanted) * finite, psnr(plain, wanted), ssim(plain, wanted)]
        ones = torch.ones(len(large), dtype=torch.float64)
        self.sums += torch.stack([*rows, error.double(), ones, (~finite).double()]).sum(1)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return what must be summed over ranks, in place."""
        return (self.sums,)

    def result(self) -> dict[str, Any]:
        """Return psnr, psnr_gain over bicubic (dB), ssim, psnr_bicubic, ssim_bicubic, loss, num_samples, and
        num_not_finite if there are any."""
        *sums, total, lost = self.sums.tolist()
        ours, ssim_ours, plain, ssim_plain, error = (value / max(total, 1) for value in sums)
        return {
            "psnr": ours,
            "psnr_gain": ours - plain,
            "ssim": ssim_ours,
            "psnr_bicubic": plain,
            "ssim_bicubic": ssim_plain,
            "loss": error,
            "num_samples": int(total),
        } | ({"num_not_finite": int(lost)} if lost else {})


def start(setting: Setting) -> Pass:
    """Return a pass that scores pictures."""
    return Pass(setting, PictureScore(setting.recipe["scale"]))


def examples(
    network: Network, views: np.ndarray, outputs: Tensor, targets: np.ndarray, shown: int
) -> Iterable[dict[str, Any]]:
    """Yield small pictures enlarged by bicubic interpolation and by the network, side by side with the large ones."""
    scale = network.recipe["scale"]
    for small, large, wanted in zip(views, to_pixels(outputs.nan_to_num()), targets, strict=True):
        plain, truth = bicubic(small, scale), luma(wanted[None], scale)
        given = np.repeat(np.repeat(small, scale, 0), scale, 1)
        pictures = {"input": given, "bicubic": plain, "network": large, "truth": wanted}
        notes = {
            name: f"{float(psnr(luma(pictures[name][None], scale), truth)):.2f} dB" for name in ("bicubic", "network")
        }
        yield Pair.of(pictures, notes).to_plain()


def tables(rows: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> list[Table]:
    """Return a table of the runs and of bicubic interpolation on the same pictures."""
    known = [row for row in rows if "psnr_bicubic" in row]
    if not known:
        return []
    cells = [("bicubic interpolation", known[0]["psnr_bicubic"], known[0]["ssim_bicubic"], "")]
    cells += [(row["run"], row["psnr"], row["ssim"], row["psnr_gain"]) for row in known]
    note = "Of luma without the border; PSNR in dB, mean over pictures. Gain: over bicubic interpolation."
    return [Table("Compared with bicubic interpolation", ("picture by", "PSNR", "SSIM", "gain"), cells, note)]


SUPER_RESOLVE = Task(
    name="super_resolve",
    metrics=(
        Metric("psnr", "PSNR", "dB"),
        Metric("psnr_gain", "PSNR over bicubic", "dB"),
        Metric("ssim", "SSIM", ""),
        LOSS,
    ),
    target=target,
    arguments=lambda card, options: {"scale": options["scale"]},
    losses=losses,
    weights=weights,
    score=lambda num_classes, recipe: PictureScore(recipe["scale"]),
    start=start,
    examples=examples,
    answer=files.answer,
    spec=SuperResolveOptions,
    tables=tables,
    writes=True,
)
