"""HTML pages taken apart, for tests: their elements, texts, scripts and pictures, and what is visible on them."""

import base64
import io
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from slimray.report.points import BoxView, CloudView, ResponseView


class Elements(HTMLParser):
    """Every start tag of a page with its attributes, the text outside style and script, and the scripts."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self.open[-1:] != ["style"]:
            self.text += data

    def handle_endtag(self, tag):
        if tag == "script":
            self.open.append("")

    def all(self, name: str) -> list[str]:
        """The values of an attribute, in their order."""
        return [str(attrs[name]) for _, attrs in self.tags if name in attrs]


def png(uri: str) -> np.ndarray:
    """The pixels [H, W, 4] of a data URI of a PNG."""
    raw = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(raw), formats=["PNG"]).convert("RGBA"))


def judged_cloud(classes: list[str], num_points: int = 300, run: str = "r") -> CloudView:
    """A cloud of two parts, the upper half of the second of which is taken for the first; ten points have no label."""
    coords = np.random.default_rng(0).random((num_points, 3))
    truth = (coords[:, 0] > 0.5).astype(np.int64)
    predicted = np.where(coords[:, 2] > 0.5, 0, truth)
    truth[:10] = -1
    return CloudView(run, coords * 50 + 4e5, truth, predicted, classes)


def response(name: str, num_points: int = 300) -> ResponseView:
    rng = np.random.default_rng(1)
    return ResponseView(name, rng.random(num_points), rng.random(num_points))


def street(name: str = "", num_points: int = 600) -> BoxView:
    """A car and a cyclist, found somewhat beside their places, and what is no pedestrian; `name` for every name."""
    points = np.random.default_rng(0).uniform((-12, 0, 4), (12, 2, 24), (num_points, 3))
    truths = np.array([[3.0, 1.6, 12.0, 3.9, 1.6, 1.5, 0.3], [-4.0, 1.6, 9.0, 1.8, 0.6, 1.7, 1.4]])
    predictions = np.concatenate([truths, truths[1:]]) + np.array([[0.3], [0.1], [0.02]]) * [1, 0, 1, 0, 0, 0, 0.5]
    classes = ["Car", "Cyclist", "Pedestrian"]
    return BoxView(
        run=name or "r",
        title=name or "street 7",
        points=points,
        truths=truths,
        truth_names=[name or one for one in classes[:2]],
        predictions=predictions,
        names=[name or one for one in classes],
        scores=[0.9, 0.5, 0.25],
    )
