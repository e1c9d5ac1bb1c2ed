"""Examples of a network's inputs and outputs as stored in results.json: plain values, each with a `type`.

Types: `clip` (frames in a row, or one image, with the most likely classes), `cloud`, `boxes` (a scene from above),
`pair` (pictures side by side), `texts` (one below the other). Tasks create them and the report draws them by type;
neither knows the other. Surprising: points are thinned and lose their unit before they are stored, so that a page of a
hundred clouds is small enough to mail; boxes stay in metres. Needs only numpy and Pillow.
"""

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

MAX_CLOUD_POINTS = 2048
MAX_BLOCKS = 6  # PVConvs whose responses are shown, evenly spaced from the first to the last of a network
MAX_BOX_POINTS = 4096
MAX_TEXT = 2000  # characters shown of a text
BASE64 = re.compile(r"[A-Za-z0-9+/]+=*")


def filmstrip(frames: np.ndarray, height: int = 96) -> str:
    """Return the frames uint8 `[T, H, W, 3]` (or 1 channel) side by side as one JPEG of `height` pixels, in base64."""
    from PIL import Image

    strip = Image.fromarray(np.concatenate(list(frames), axis=1).repeat(3 if frames.shape[-1] == 1 else 1, -1))
    strip = strip.resize((round(strip.width * height / strip.height), height), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    strip.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()


def clip(frames: np.ndarray, truth: str, top: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """Return the example of a clip uint8 `[T, H, W, 3]`, or of an image with T = 1.

    `truth` is its class, `top` the most likely (class, probability 0-1).
    """
    return {"type": "clip", "frames_jpeg_base64": filmstrip(frames), "truth": truth, "top": list(top)}


@dataclass(frozen=True)
class Picture:
    """A picture of a pair: its name, a PNG in base64, and a note shown with it."""

    name: str
    png: str
    note: str = ""


@dataclass(frozen=True)
class Pair:
    """Named pictures of the same thing side by side, such as the input, the output and the target."""

    run: str
    pictures: Sequence[Picture]

    @classmethod
    def of(cls, pictures: Mapping[str, np.ndarray], notes: Mapping[str, str]) -> "Pair":
        """Return the pair of `pictures` uint8 `[H, W, 3]` by name, with `notes` by the same names."""
        return cls("", [Picture(name, png_of(image), notes.get(name, "")) for name, image in pictures.items()])

    def to_plain(self) -> dict[str, Any]:
        """Return an example for results.json."""
        return {"type": "pair", "run": self.run, "pictures": [dict(vars(picture)) for picture in self.pictures]}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "Pair":
        """Return the pair that `to_plain` stored, without pictures that are not valid base64."""
        pictures = [Picture(str(p["name"]), str(p["png"]), str(p.get("note", ""))) for p in plain["pictures"]]
        return cls(plain.get("run", ""), [picture for picture in pictures if BASE64.fullmatch(picture.png)])


@dataclass(frozen=True)
class Texts:
    """Named texts one below the other, such as the input, the output and the reference."""

    run: str
    texts: Sequence[tuple[str, str]]

    def to_plain(self) -> dict[str, Any]:
        """Return an example for results.json; texts longer than MAX_TEXT are cut."""
        cut = [(name, text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " ...") for name, text in self.texts]
        return {"type": "texts", "run": self.run, "texts": cut}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "Texts":
        """Return the texts that `to_plain` stored."""
        return cls(plain.get("run", ""), [(str(name), str(text)) for name, text in plain["texts"]])


def png_of(image: np.ndarray) -> str:
    """Return uint8 `[H, W, 3]` as a PNG in base64."""
    return base64.b64encode(png_bytes(image)).decode()


def png_bytes(image: np.ndarray) -> bytes:
    """Return uint8 `[H, W, 3]` as a PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass(frozen=True, eq=False)
class ResponseView:
    """Responses of one PVConv of a network: `voxel` and `point` `[n]`, the strength of each branch at each point.

    `coords` `[n, 3]` are the points it sees, z up; None means the points of the cloud the response belongs to.
    """

    name: str
    voxel: np.ndarray
    point: np.ndarray
    coords: np.ndarray | None = None

    def thinned(self, cloud: np.ndarray) -> "ResponseView":
        """Keep the points that are kept of the whole `cloud` `[N, 3]`; raise ValueError if the shapes do not match."""
        own = None if self.coords is None or np.array_equal(self.coords, cloud) else np.asarray(self.coords)
        coords = cloud if own is None else own
        shapes = [np.shape(values) for values in (self.voxel, self.point)]
        if np.shape(coords) != (len(coords), 3) or shapes != [(len(coords),)] * 2:
            raise ValueError(f"the response of {self.name!r} has coordinates {np.shape(coords)} and values {shapes}")
        kept = _kept(len(coords), MAX_CLOUD_POINTS)
        voxel, point = (np.nan_to_num(np.asarray(values, np.float64)[kept]) for values in (self.voxel, self.point))
        return replace(self, voxel=voxel, point=point, coords=None if own is None else own[kept])

    def share(self) -> float | None:
        """Return the percentage of the total response due to the voxel branch; None if there is no response."""
        total = float(self.voxel.sum() + self.point.sum())
        return 100 * float(self.voxel.sum()) / total if total > 0 else None

    def correlation(self) -> float | None:
        """Return the correlation of the two branches over the points, from -1 to 1; None if one of them is constant."""
        voxel, point = self.voxel - self.voxel.mean(), self.point - self.point.mean()
        size = float(np.linalg.norm(voxel) * np.linalg.norm(point))
        return float(voxel @ point) / size if size > 1e-9 * float(self.voxel.sum() * self.point.sum()) else None


@dataclass(frozen=True, eq=False)
class CloudView:
    """One cloud with its predictions: `coords` `[N, 3]` in any unit, z up; at most MAX_CLOUD_POINTS of them are shown.

    If points are labelled one by one, `truth` and `predicted` are indices into `classes`, integers `[N]`; a negative
    truth is unknown. If the cloud has one label, `truth` is its class and `top` holds (class, probability 0-1), most
    likely first, of which three are shown. `responses` are those of the network's PVConvs; MAX_BLOCKS are shown.
    """

    run: str
    coords: np.ndarray
    truth: np.ndarray | str
    predicted: np.ndarray | None = None
    classes: Sequence[str] = ()
    top: Sequence[tuple[str, float]] = ()
    responses: Sequence[ResponseView] = ()

    def thinned(self) -> "CloudView":
        """Keep at most MAX_CLOUD_POINTS evenly spaced points; raise ValueError if the shapes do not match."""
        shapes = [np.shape(labels) for labels in (self.truth, self.predicted) if not isinstance(labels, str | None)]
        per_point = not isinstance(self.truth, str)
        if np.shape(self.coords) != (len(self.coords), 3) or shapes != [(len(self.coords),)] * 2 * per_point:
            raise ValueError(f"a cloud of {self.run!r} has coordinates {np.shape(self.coords)} and labels {shapes}")
        kept = _kept(len(self.coords), MAX_CLOUD_POINTS)
        labels = {name: np.asarray(getattr(self, name))[kept] for name in ("truth", "predicted") if per_point}
        coords = np.asarray(self.coords)
        responses = [self.responses[i].thinned(coords) for i in _kept(len(self.responses), MAX_BLOCKS)]
        return replace(self, coords=coords[kept], responses=responses, **labels)

    def to_plain(self) -> dict[str, Any]:
        """Return an example for results.json, without `classes`: thinned, with arrays as base64.

        Coordinates (int16) lose their unit: the centre of their bounding box moves to 0, the farthest point from it to
        a distance of 1. Labels are int16. Responses (float16) are scaled so that the strongest of a PVConv is 1.
        """
        cloud = self.thinned()
        plain: dict[str, Any] = {
            "type": "cloud",
            "run": cloud.run,
            "coords": as_base64(quantised(in_unit_ball(cloud.coords))),
        }
        if cloud.responses:
            plain["responses"] = [_plain_response(response) for response in cloud.responses]
        if isinstance(cloud.truth, str):
            return plain | {"truth": cloud.truth, "top": [[name, float(share)] for name, share in cloud.top]}
        labels = {name: np.asarray(getattr(cloud, name)).clip(-1, 2**15 - 1) for name in ("truth", "predicted")}
        return plain | {name: as_base64(values.astype("<i2")) for name, values in labels.items()}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], classes: Sequence[str]) -> "CloudView":
        """Return the cloud that `to_plain` stored."""
        coords, responses = _coords_of(plain), [_response_of(one) for one in plain.get("responses", [])]
        if "predicted" not in plain:
            top = [(name, share) for name, share in plain["top"]]
            return cls(plain["run"], coords, plain["truth"], top=top, responses=responses)
        truth, predicted = (
            np.frombuffer(base64.b64decode(plain[name]), "<i2").astype(np.int64) for name in ("truth", "predicted")
        )
        return cls(plain["run"], coords, truth, predicted, classes, responses=responses)


@dataclass(frozen=True, eq=False)
class BoxView:
    """One scene with its boxes: `truths` `[n, 7]`, `predictions` `[m, 7]`, `points` `[N, 3]` or more columns.

    All are in rectified camera axes (x right, y down, z forward) in metres; a box is x, y, z of the centre of its
    bottom, length, width, height and heading about y, as in tasks/boxes.py. `truth_names` and `names` (of predictions)
    are classes, `scores` the confidence of predictions; each of them may be empty. `title` identifies the scene.
    """

    run: str
    points: np.ndarray
    truths: np.ndarray
    predictions: np.ndarray
    truth_names: Sequence[str] = ()
    names: Sequence[str] = ()
    scores: Sequence[float] = ()
    title: str = ""

    def checked(self) -> "BoxView":
        """Return the scene as arrays with finite points only; raise ValueError if shapes or lengths do not match."""
        points, truths, predictions = (np.asarray(a, np.float64) for a in (self.points, self.truths, self.predictions))
        wrong = points.ndim != 2 or points.shape[1] < 3 or {truths.shape[1:], predictions.shape[1:]} != {(7,)}
        lengths = (len(self.truth_names), len(self.names), len(self.scores))
        for length, boxes in zip(lengths, (truths, predictions, predictions), strict=True):
            wrong |= length not in (0, len(boxes))
        if wrong:
            shapes = f"{points.shape}, {truths.shape}, {predictions.shape}"
            raise ValueError(f"a scene of {self.run!r} has points, boxes {shapes} and names, scores {lengths}")
        points = points[np.isfinite(points).all(1)]
        return replace(self, points=points, truths=truths, predictions=predictions)

    def to_plain(self) -> dict[str, Any]:
        """Return an example for results.json: at most MAX_BOX_POINTS points, x and z in centimetres (int16, base64)."""
        scene = self.checked()
        points = scene.points[_kept(len(scene.points), MAX_BOX_POINTS)][:, [0, 2]]
        return {
            "type": "boxes",
            "run": scene.run,
            "title": scene.title,
            "points": as_base64(np.round(100 * points).clip(-(2**15), 2**15 - 1).astype("<i2")),
            "truths": _plain_boxes(scene.truths),
            "predictions": _plain_boxes(scene.predictions),
            "truth_names": list(scene.truth_names),
            "names": list(scene.names),
            "scores": [float(score) for score in scene.scores],
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "BoxView":
        """Return the scene that `to_plain` stored, with its points at height 0."""
        x, z = np.frombuffer(base64.b64decode(plain["points"]), "<i2").reshape(-1, 2).T / 100
        boxes = {name: np.array(plain[name], np.float64).reshape(-1, 7) for name in ("truths", "predictions")}
        rest = {name: plain[name] for name in ("run", "title", "truth_names", "names", "scores")}
        return cls(points=np.stack([x, np.zeros_like(x), z], 1), **boxes, **rest)


def _plain_response(response: ResponseView) -> dict[str, Any]:
    peak = max(float(response.voxel.max(initial=0)), float(response.point.max(initial=0)), 1e-30)
    plain = {"name": response.name}
    plain |= {name: as_base64((getattr(response, name) / peak).astype("<f2")) for name in ("voxel", "point")}
    own = response.coords
    return plain if own is None else plain | {"coords": as_base64(quantised(in_unit_ball(own)))}


def _response_of(plain: Mapping[str, Any]) -> ResponseView:
    voxel, point = (np.frombuffer(base64.b64decode(plain[name]), "<f2") for name in ("voxel", "point"))
    return ResponseView(plain["name"], voxel, point, _coords_of(plain) if "coords" in plain else None)


def _plain_boxes(boxes: np.ndarray) -> list[list[float | None]]:
    return [[round(v, 3) if math.isfinite(v) else None for v in box] for box in boxes.tolist()]


def _coords_of(plain: Mapping[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(plain["coords"]), "<i2").reshape(-1, 3) / np.float32(2**15 - 1)


def quantised(places: np.ndarray) -> np.ndarray:
    """Return coordinates in [-1, 1] as little-endian int16."""
    return np.round(places * (2**15 - 1)).astype("<i2")


def _kept(count: int, most: int) -> np.ndarray:
    """Return the indices of at most `most` of `count` items, evenly spaced from the first to the last."""
    return np.linspace(0, count - 1, min(count, most)).astype(np.int64)


def as_base64(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")


def in_unit_ball(coords: np.ndarray) -> np.ndarray:
    """Return the points, float64, moved and scaled: their bounding box is centred at 0, the farthest is at distance 1.

    Coordinates that are not finite become 0 before that.
    """
    points = np.nan_to_num(np.asarray(coords, np.float64), posinf=0.0, neginf=0.0)
    if not len(points):
        return points
    points = points - (points.min(0) + points.max(0)) / 2
    return points / max(float(np.linalg.norm(points, axis=1).max()), 1e-30)
