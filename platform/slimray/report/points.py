"""Pictures of points for the report: clouds with their predictions, responses of PVConvs, boxes seen from above.

In: numpy arrays, as `CloudView` (with a `ResponseView` per PVConv) and `BoxView`. Out: the values that report.html.j2
draws (`cloud_section`, `box_section`): still pictures, labels, paths, plain numbers; no user's text becomes part of the
markup here. Surprising: points are thinned and lose their unit before they are stored, so that a page of a hundred
clouds can be mailed; boxes keep their metres.
"""

import base64
import colorsys
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from slimray.runs.examples import BoxView, CloudView, ResponseView, as_base64, in_unit_ball, quantised

MAX_CLOUD_CLASSES = 24  # the most frequent classes of a cloud, which get a colour and a name
CLASS_COLOURS = (  # by Okabe and Ito, then the colours farthest from them, also for the colour-blind
    "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7",
    "#5424fc", "#90e490", "#4878fc", "#b42430", "#78e4c0", "#54e4f0",
)  # fmt: skip
QUIET, WRONG = "#8a8f98", "#e0342b"  # the first two colours of a cloud; the quiet one is drawn small and faint
RAMP = ((31, 82, 160), (120, 130, 140), (235, 185, 60))  # from low to high: height, where there are no classes
DEPTHS = np.linspace(0.4, 1, 9)  # opacities of a still picture, from far to near; with 26 colours they fit a palette
STILL = 480  # side of a still picture in pixels


# ---- clouds --------------------------------------------------------------------------------------------------------


def class_colour(place: int) -> str:
    """Return the colour of a class as #rrggbb, the same on every page; after CLASS_COLOURS, hues far apart."""
    if place < len(CLASS_COLOURS):
        return CLASS_COLOURS[place]
    lightness = (0.42, 0.66, 0.54)[place % 3]
    return _hex(255 * value for value in colorsys.hls_to_rgb(place * 0.618034 % 1, lightness, 0.65))


def cloud_section(cloud: CloudView) -> dict[str, Any]:
    """Return the panels of a cloud: still pictures, the data with which the script turns them, and a colour key.

    Coordinates are those of the first view: right, up, and towards the viewer. Raises ValueError if the number of
    labels is not that of the points.
    """
    cloud = cloud.thinned()
    if isinstance(cloud.truth, str):
        height = cloud.coords[:, 2]
        panels, colours, keys = {"points": _ramp_places(height, height.min(), height.max())}, _ramp(), []
        predicted = cloud.top[0][0] if cloud.top else "–"
        verdict = {"truth": cloud.truth, "right": predicted == cloud.truth}
    else:
        panels, colours, keys = _judged_points(cloud)
        right = panels["error"][cloud.truth >= 0] == 0
        verdict = {"num_known": len(right), "share": 100 * float(right.mean()) if len(right) else None}
    return {
        "run": cloud.run,
        "num_points": len(cloud.coords),
        "picture": _picture(cloud.coords, panels, colours),
        "wrong": WRONG,
        "keys": keys,
        "top": [(name, 100.0 * probability) for name, probability in cloud.top[:3]],
        "blocks": [_block_section(response, cloud.coords) for response in cloud.responses if len(response.voxel)],
        "ramp": _ramp()[2:],
        **verdict,
    }


def _block_section(response: ResponseView, cloud: np.ndarray) -> dict[str, Any]:
    """Return the two panels of a PVConv on one colour scale: the rank of a response among those of both branches.

    Ranks rather than magnitudes: otherwise, if one branch is several times stronger, the other has a single colour.
    """
    both = np.sort(np.concatenate([response.voxel, response.point]))
    panels = {}
    for name, values in (("voxel branch", response.voxel), ("point branch", response.point)):
        rank = (np.searchsorted(both, values, "left") + np.searchsorted(both, values, "right")) / 2
        panels[name] = _ramp_places(rank, 0, len(both))
    own = response.coords
    return {
        "name": response.name,
        "picture": _picture(cloud if own is None else own, panels, _ramp()),
        "num_points": None if own is None else len(own),
        "share": response.share(),
        "correlation": response.correlation(),
    }


def _picture(coords: np.ndarray, panels: Mapping[str, np.ndarray], colours: Sequence[str]) -> dict[str, Any]:
    """Return the panels of one cloud (name -> colour index per point) as stills and as data for the page's script."""
    places = in_unit_ball(coords) @ _view().T
    return {
        "panels": [(name, _still(places, labels, colours)) for name, labels in panels.items()],
        "points": as_base64(quantised(places)),
        "labels": " ".join(as_base64(labels) for labels in panels.values()),
        "colours": " ".join(colours),
    }


def _judged_points(
    cloud: CloudView,
) -> tuple[dict[str, np.ndarray], list[str], list[tuple[str, str, float | None]]]:
    """Return panel -> colour index per point, uint8 `[N]`; the colours; and (colour, class, IoU in this cloud)."""
    truth, predicted = np.asarray(cloud.truth), np.asarray(cloud.predicted)
    known = truth >= 0
    found, counts = np.unique(np.concatenate([predicted, truth[known]]), return_counts=True)
    kept = np.sort(found[np.argsort(-counts, kind="stable")[:MAX_CLOUD_CLASSES]]).tolist()
    colours, keys = [QUIET, WRONG], []
    spots = {"prediction": np.zeros(len(truth), np.uint8), "truth": np.zeros(len(truth), np.uint8)}
    for place in kept:
        own, taken = truth == place, predicted == place
        spots["truth"][own], spots["prediction"][taken] = len(colours), len(colours)
        colours.append(class_colour(place))
        union = int(((own | taken) & known).sum())
        iou = 100 * int((own & taken).sum()) / union if union else None
        keys.append((colours[-1], cloud.classes[place] if place < len(cloud.classes) else str(place), iou))
    if len(kept) < len(found) or not known.all():
        keys.append((QUIET, "other class, or no label", None))
    return {**spots, "error": (known & (truth != predicted)).astype(np.uint8)}, colours, keys


def _ramp_places(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return the index of each value's colour in `_ramp`, uint8 `[N]`."""
    part = ((values - low) / max(float(high - low), 1e-12)).clip(0, 1)
    return (2 + np.round(part * (len(_ramp()) - 3))).astype(np.uint8)


def _ramp() -> list[str]:
    steps, at = np.linspace(0, 2, 12), np.arange(3)
    shades = np.stack([np.interp(steps, at, channel) for channel in np.transpose(RAMP)], 1)
    return [QUIET, WRONG, *(_hex(shade) for shade in shades)]


def _view() -> np.ndarray:
    """Return the first view, from the front, half left and above, as rows: right, up, and towards the viewer."""
    turn, lift = np.radians((-60, 22))
    towards = np.array([np.cos(lift) * np.cos(turn), np.cos(lift) * np.sin(turn), np.sin(lift)])
    right = np.array([-np.sin(turn), np.cos(turn), 0])
    return np.stack([right, np.cross(towards, right), towards])


def _still(places: np.ndarray, labels: np.ndarray, colours: Sequence[str]) -> str:
    """Return a data URI of a PNG of points `[N, 3]` (right, up, near; within 1) as discs, near ones over far ones.

    Its pixels are palette indices: background, then each colour in each of DEPTHS. Far points are fainter and smaller.
    """
    from PIL import Image

    order = np.argsort(places[:, 2], kind="stable")  # far to near: the last write to a pixel stays
    places, labels = places[order], labels[order].astype(np.int64)
    depth = ((places[:, 2] + 1) / 2).clip(0, 1)
    radius = STILL * float(np.clip(0.33 / np.sqrt(len(places)), 0.007, 0.014))
    radii = radius * (0.7 + 0.6 * depth) * np.where(labels == 0, 0.6, 1)
    reach = np.arange(-math.ceil(1.3 * radius), math.ceil(1.3 * radius) + 1)
    middles = np.stack([STILL / 2 - places[:, 1] * 0.47 * STILL, STILL / 2 + places[:, 0] * 0.47 * STILL], 1)
    pixels = np.floor(middles)[:, None] + np.stack(np.meshgrid(reach, reach, indexing="ij"), -1).reshape(1, -1, 2)
    inside = ((pixels + 0.5 - middles[:, None]) ** 2).sum(-1) <= radii[:, None] ** 2
    value = 1 + labels * len(DEPTHS) + (depth * (len(DEPTHS) - 1)).round().astype(np.int64)
    canvas = np.zeros((STILL, STILL), np.uint8)
    rows, columns = pixels[inside].astype(np.int64).clip(0, STILL - 1).T
    canvas[rows, columns] = np.broadcast_to(value[:, None], inside.shape)[inside]
    faint = [0.5] + [1.0] * (len(colours) - 1)
    opacity = [0, *(round(255 * share * depth) for share in faint for depth in DEPTHS)]
    picture = Image.fromarray(canvas).convert("P")
    picture.putpalette([0, 0, 0, *(value for colour in colours for value in bytes.fromhex(colour[1:]) * len(DEPTHS))])
    return png(picture, bytes(opacity))


# ---- boxes ---------------------------------------------------------------------------------------------------------

WIDTH, LEFT, BOTTOM, EDGE = 400, 34, 34, 8  # of a drawing and its margins, in its own units; text is 11 units high
LINE = 13  # distance between two lines of text
MARGIN = 3.0  # smallest margin around the boxes, in metres
MAX_STEPS = 8  # grid lines along the longer side


def box_section(view: BoxView) -> dict[str, Any]:
    """Return a drawing of a scene from above, x to the right and z up: paths and texts on a `width` x `height` canvas.

    Shows the boxes and a margin, not all points. Boxes that are not finite, or far from all points and true boxes, are
    only counted. Raises ValueError for arrays that do not match.
    """
    scene = view.checked()
    outlines = [_outlines(boxes) for boxes in (scene.truths, scene.predictions)]
    low, high = _extent(scene.points[:, [0, 2]], *outlines)
    scale = (WIDTH - LEFT - EDGE) / (high[0] - low[0])
    height = round(scale * (high[1] - low[1])) + BOTTOM + EDGE

    def to_page(metres: np.ndarray) -> np.ndarray:
        return np.stack([LEFT + scale * (metres[..., 0] - low[0]), EDGE + scale * (high[1] - metres[..., 1])], -1)

    truths, predictions = (np.flatnonzero(((o.max(1) > low) & (o.min(1) < high)).all(1)) for o in outlines)
    drawn = [to_page(outlines[0][truths]), to_page(outlines[1][predictions])]
    texts = [_text(scene, place) for place in predictions.tolist()]
    spots = _text_spots(drawn[1], texts, height)
    inside = ((scene.points[:, [0, 2]] > low) & (scene.points[:, [0, 2]] < high)).all(1)
    step = _step(high - low)
    columns, rows = (np.arange(math.ceil(start / step) * step, end, step) for start, end in zip(low, high, strict=True))
    return {
        "run": scene.run,
        "title": scene.title,
        "width": WIDTH,
        "height": height,
        "frame": (LEFT, EDGE, WIDTH - LEFT - EDGE, height - BOTTOM - EDGE),
        "columns": [(float(LEFT + scale * (x - low[0])), f"{x:g}") for x in columns],
        "rows": [(float(EDGE + scale * (high[1] - z)), f"{z:g}") for z in rows],
        "points": _dots(to_page(scene.points[inside][:, [0, 2]])),
        "truths": [_outline_path(outline) for outline in drawn[0]],
        "predictions": [_outline_path(outline) for outline in drawn[1]],
        "labels": [(x, y, text) for (x, y), text in zip(spots, texts, strict=True) if text],
        "num_points": int(inside.sum()),
        "num_truths": len(scene.truths),
        "num_predictions": len(scene.predictions),
        "num_away": len(scene.truths) + len(scene.predictions) - len(truths) - len(predictions),
        "matches": _matches(scene),
        "range": [round(float(value)) for value in (low[0], high[0], low[1], high[1])],
    }


def _text(scene: BoxView, place: int) -> str:
    """Return the text beside a prediction: its class and score, if known."""
    score = f"{scene.scores[place]:.2f}" if len(scene.scores) else ""
    return " ".join(filter(None, [scene.names[place] if len(scene.names) else "", score]))


def _step(size: np.ndarray) -> float:
    """Return the metres between two grid lines: 1, 2 or 5 times a power of ten."""
    least = float(size.max()) / MAX_STEPS
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least)


def _outlines(boxes: np.ndarray) -> np.ndarray:
    """Return boxes `[n, 7]` from above as x, z `[n, 6, 2]`: four corners, the middle, a point ahead of the front."""
    x, _, z, length, width, _, heading = boxes.T[:, :, None]
    along, across = length / 2 * [1, 1, -1, -1, 0, 1.35], width / 2 * [1, -1, -1, 1, 0, 0]
    cos, sin = np.cos(heading), np.sin(heading)
    return np.stack([x + cos * along + sin * across, z + cos * across - sin * along], -1)


def _extent(points: np.ndarray, truths: np.ndarray, predictions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest and largest x, z to show: all boxes near points or true boxes, otherwise the points."""
    bulk = np.percentile(points, (2, 98), axis=0) if len(points) else np.zeros((0, 2))
    known = np.concatenate([bulk, truths[np.isfinite(truths).all((1, 2))].reshape(-1, 2)])
    found = predictions[np.isfinite(predictions).all((1, 2))]
    if len(known):
        near = ((found > known.min(0) - 10) & (found < known.max(0) + 10)).all((1, 2))
        found = found[near]
    shown = np.concatenate([known[len(bulk) :], found.reshape(-1, 2)])
    shown = shown if len(shown) else known if len(known) else np.zeros((1, 2))
    low, high = shown.min(0), shown.max(0)
    low, high = low - np.maximum(MARGIN, 0.1 * (high - low)), high + np.maximum(MARGIN, 0.1 * (high - low))
    size, middle = high - low, (low + high) / 2
    size = np.maximum(size, [size[1] / 1.2, size[0] / 1.8])  # limits the aspect ratio
    return middle - size / 2, middle + size / 2


def _dots(places: np.ndarray) -> str:
    """Return a path with a dot at each place `[n, 2]`, rounded to half units and drawn in those; duplicates once."""
    halves = np.unique(np.round(2 * places).astype(np.int64), axis=0)
    return "".join(f"m{right} {down}h0" for right, down in np.diff(halves, axis=0, prepend=0).tolist())


def _outline_path(outline: np.ndarray) -> str:
    corners, (middle, front) = outline[:4], outline[4:]
    around = "L".join(f"{x:.1f} {y:.1f}" for x, y in corners)
    return f"M{around}ZM{middle[0]:.1f} {middle[1]:.1f}L{front[0]:.1f} {front[1]:.1f}"


def _text_spots(outlines: np.ndarray, texts: Sequence[str], height: int) -> list[tuple[float, float]]:
    """Return the middle of each text's baseline: above or below its box, at the nearest spot free of other text."""
    taken: list[tuple[float, float, float]] = []
    for outline, text in zip(outlines, texts, strict=True):
        half = 3.1 * len(text) + 2  # about half of its width
        x = float(np.clip(outline[:, 0].mean(), LEFT + half, max(WIDTH - EDGE - half, LEFT + half)))
        top, bottom = float(outline[:, 1].min()) - 4, float(outline[:, 1].max()) + LINE - 2
        tries = [y for n in range(4) for y in (top - n * LINE, bottom + n * LINE)]
        tries = [y for y in tries if EDGE + LINE < y < height - BOTTOM - 2] or [float(EDGE + LINE)]
        free = (y for y in tries if all(abs(y - b) >= LINE or abs(x - a) > half + other for a, b, other in taken))
        taken.append((x, next(free, tries[0]), half))
    return [(x, y) for x, y, _ in taken]


def _matches(scene: BoxView) -> list[tuple[str, float]]:
    """Return the name of each true box and its highest IoU from above, percent, with a prediction of that name."""
    from slimray.tasks.boxes import box_iou_matrix  # imports torch, needed only for pages with boxes

    ious, _ = box_iou_matrix(*(np.nan_to_num(b, posinf=0, neginf=0) for b in (scene.truths, scene.predictions)))
    names = list(scene.truth_names) or [""] * len(scene.truths)
    if len(scene.names) and len(scene.truth_names):
        ious = np.where(np.array(names)[:, None] == np.array(scene.names), ious, 0.0)
    return [(name, 100 * float(row.max(initial=0.0))) for name, row in zip(names, ious, strict=True)]


# ---- files ---------------------------------------------------------------------------------------------------------


def png(picture: Any, opacity: bytes) -> str:
    """Return a data URI of a palette picture, with an `opacity` of 0-255 for each of its colours."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", transparency=opacity, optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _hex(rgb: Iterable[float]) -> str:
    return "#" + bytes(round(value) for value in rgb).hex()
