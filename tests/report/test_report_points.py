"""Pictures of points: the script turns what the stills show, boxes are drawn in place, odd ones do no harm."""

import base64
import json
import math
import re

import numpy as np
import pytest
from tests.kitti_scenes import corners_of
from tests.pages import Elements, judged_cloud, png, response, street

from slimray.report import points
from slimray.report.pages import render
from slimray.report.points import BoxView, CloudView, ResponseView
from slimray.runs import examples
from slimray.tasks.boxes import box_iou_matrix


def test_a_cloud_shows_prediction_truth_and_error_without_a_script():
    page = render("clouds", clouds=[judged_cloud(["leg", "top"])])
    elements = Elements(page)
    assert [attrs["alt"] for tag, attrs in elements.tags if tag == "img"] == ["prediction", "truth", "error"]
    colours = [
        {f"#{bytes(pixel[:3]).hex()}" for pixel in png(uri)[png(uri)[..., 3] > 0]} for uri in elements.all("src")
    ]
    leg, top = points.class_colour(0), points.class_colour(1)
    assert colours == [{leg, top}, {leg, top, points.QUIET}, {points.WRONG, points.QUIET}]
    text = " ".join(elements.text.split())
    cloud = judged_cloud(["leg", "top"])
    known, right = cloud.truth >= 0, cloud.truth == cloud.predicted
    assert f"{100 * right[known].mean():.1f} % of 290 labelled points right" in text
    both, either = (right & (cloud.truth == 1)).sum(), (known & ((cloud.truth == 1) | (cloud.predicted == 1))).sum()
    assert f"top {100 * both / either:.1f} %" in text
    assert "other class, or no label" in text


def test_what_the_script_turns_is_what_the_still_pictures_show():
    cloud = judged_cloud(["leg", "top"])
    elements = Elements(render("clouds", clouds=[cloud]))
    turned = np.frombuffer(base64.b64decode(elements.all("data-points")[0]), "<i2").reshape(-1, 3) / 32767
    middle = (cloud.coords.min(0) + cloud.coords.max(0)) / 2
    size = np.linalg.norm(cloud.coords - middle, axis=1)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=1), size / size.max(), atol=1e-4)
    assert np.corrcoef(turned[:, 1], cloud.coords[:, 2])[0, 1] > 0.9  # z is up
    prediction, truth, error = (
        np.frombuffer(base64.b64decode(one), np.uint8) for one in elements.all("data-labels")[0].split()
    )
    np.testing.assert_array_equal(prediction, cloud.predicted + 2)
    np.testing.assert_array_equal(truth, np.where(cloud.truth < 0, 0, cloud.truth + 2))
    np.testing.assert_array_equal(error, (cloud.truth >= 0) & (cloud.truth != cloud.predicted))
    assert elements.all("data-colours")[0].split()[2:] == [points.class_colour(0), points.class_colour(1)]


def test_a_near_point_hides_a_far_one():
    places, colours = (
        np.array([[0, 0, 0.9], [0, 0, -0.9]]),
        [points.QUIET, points.WRONG, "#000002", "#000003"],
    )
    for labels in ([2, 3], [3, 2]):
        picture = png(points._still(places, np.array(labels, np.uint8), colours))
        assert picture[points.STILL // 2, points.STILL // 2].tolist() == [0, 0, labels[0], 255]


def test_a_cloud_comes_back_from_its_results_as_it_was_judged():
    classes = [f"part {i}" for i in range(400)]
    cloud = judged_cloud(classes, num_points=9000)
    labels = np.random.default_rng(1).integers(-1, 400, 9000)
    plain = json.loads(json.dumps(CloudView("r", cloud.coords, labels, labels[::-1], classes).to_plain()))
    back = CloudView.from_plain(plain, classes)
    kept = np.linspace(0, 8999, examples.MAX_CLOUD_POINTS).astype(int)
    np.testing.assert_array_equal(back.truth, labels[kept])
    np.testing.assert_array_equal(back.predicted, labels[::-1][kept])
    coords = cloud.coords[kept] - (cloud.coords[kept].min(0) + cloud.coords[kept].max(0)) / 2
    np.testing.assert_allclose(back.coords, coords / np.linalg.norm(coords, axis=1).max(), atol=2e-5)
    assert len(json.dumps(plain)) < 30_000
    whole = CloudView("r", np.eye(3), "leg", top=[("top", 0.75), ("leg", 0.25)])
    back = CloudView.from_plain(json.loads(json.dumps(whole.to_plain())), classes)
    assert (back.run, back.truth, back.top) == ("r", "leg", [("top", 0.75), ("leg", 0.25)])


def test_a_cloud_judged_as_a_whole_is_right_or_wrong_and_coloured_by_height():
    views = [CloudView("r", np.eye(3), truth, top=[("leg", 0.75), ("top", 0.25)]) for truth in ("leg", "top")]
    elements = Elements(render("clouds", clouds=views))
    assert elements.text.count("✓ right") == elements.text.count("✗ wrong") == 1
    assert "75.0 %" in elements.text
    labels = np.frombuffer(base64.b64decode(elements.all("data-labels")[0]), np.uint8)
    assert labels.tolist() == [2, 2, 13]  # of eye's rows the last is the highest


def test_many_classes_and_odd_clouds_can_be_shown():
    rng, classes = np.random.default_rng(0), ["few"]
    labels = rng.integers(0, 300, 5000)
    odd = [
        CloudView("many", rng.random((5000, 3)), labels, labels, classes),
        CloudView("one", np.zeros((1, 3)), np.array([-1]), np.array([7]), classes),
        CloudView("far", np.array([[np.nan, np.inf, 1e30], [0, 0, -1e30]]), "a"),
        CloudView("none", np.zeros((0, 3)), "a"),
    ]
    elements = Elements(render("odd", clouds=odd))
    assert len(elements.all("data-points")) == 3
    assert len(elements.all("data-colours")[0].split()) == 2 + points.MAX_CLOUD_CLASSES
    assert "no labelled points" in elements.text


def test_a_cloud_whose_labels_are_not_those_of_its_points_is_refused():
    with pytest.raises(ValueError, match=r"a cloud of 'r' has coordinates \(4, 3\) and labels \[\(4,\), \(5,\)\]"):
        render("c", clouds=[CloudView("r", np.zeros((4, 3)), np.zeros(4, int), np.zeros(5, int), ["a"])])


def test_colours_of_classes_differ_for_the_colour_blind_too():
    blind = {  # Machado et al. 2009, severity 1, on linear RGB
        "nobody": np.eye(3),
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    }
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    rgb = np.array([list(bytes.fromhex(colour[1:])) for colour in points.CLASS_COLOURS]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    for eye in blind.values():
        x, y, z = np.cbrt((linear @ np.transpose(eye)).clip(0, 1) @ xyz.T / [0.9505, 1, 1.089]).T
        lab = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)
        apart = np.linalg.norm(lab[:, None] - lab, axis=-1)[np.triu_indices(len(lab), 1)]
        assert apart.min() > 15
    assert len({points.class_colour(place) for place in range(60)}) == 60


# ---- responses -----------------------------------------------------------------------------------------------------


def with_responses(*responses: ResponseView) -> CloudView:
    cloud = judged_cloud(["leg", "top"])
    return CloudView(cloud.run, cloud.coords, cloud.truth, cloud.predicted, cloud.classes, responses=responses)


def labels_of(page: str) -> list[list[np.ndarray]]:
    """Return the colour indices of each panel, of each cloud and block."""
    return [
        [np.frombuffer(base64.b64decode(one), np.uint8) for one in box.split()]
        for box in Elements(page).all("data-labels")
    ]


def test_both_branches_of_a_block_are_coloured_in_one_scale():
    voxel, point = np.linspace(1, 2, 300), np.linspace(2, 0, 300)
    _, (left, right) = labels_of(render("r", clouds=[with_responses(ResponseView("block", voxel, point))]))
    assert (left[-1], right[-1], right[0]) == (13, 2, 13)
    assert left.min() > right.min()
    for value in (1.2, 1.5, 1.8):
        assert left[np.abs(voxel - value).argmin()] == right[np.abs(point - value).argmin()]
    assert (np.diff(left.astype(int)) >= 0).all()


def test_the_pattern_of_a_branch_that_is_much_weaker_can_be_seen():
    rng = np.random.default_rng(0)
    views = [with_responses(ResponseView("block", 100 + rng.random(300), rng.random(300)))]
    _, (voxel, point) = labels_of(render("r", clouds=views))
    assert len(set(point.tolist())) > 4 < len(set(voxel.tolist()))
    assert point.max() <= voxel.min()


def test_share_and_correlation_of_the_branches_are_told():
    rng = np.random.default_rng(0)
    voxel, point = rng.random(300) + 1, rng.random(300)
    text = Elements(render("r", clouds=[with_responses(ResponseView("block.7", voxel, point))])).text
    assert "block.7" in text
    assert f"voxel share {100 * voxel.sum() / (voxel.sum() + point.sum()):.1f} %" in text
    assert f"correlation {np.corrcoef(voxel, point)[0, 1]:.2f}" in text
    assert "how strongly each branch of a PVConv responds" in text
    for odd in (np.zeros(300), np.full(300, 0.3), np.full(300, np.nan)):
        text = Elements(render("r", clouds=[with_responses(ResponseView("block.7", odd, odd))])).text
        assert "· correlation" not in text
        assert ("voxel share 50.0 %" if odd[0] > 0 else "voxel share –") in text
    assert "how strongly each branch of a PVConv responds" not in render("r", clouds=[judged_cloud(["leg", "top"])])


def test_responses_come_back_from_the_results_with_points_of_their_own_only_where_they_have_such():
    rng, cloud = np.random.default_rng(0), judged_cloud(["leg", "top"], num_points=9000)
    same = ResponseView("same", rng.random(9000) * 50, rng.random(9000), cloud.coords.copy())
    own = ResponseView("own", rng.random(64), rng.random(64), rng.random((64, 3)))
    whole = CloudView("r", cloud.coords, "leg", top=[("leg", 1.0)], responses=[same, own])
    plain = json.loads(json.dumps(whole.to_plain()))
    assert ["coords" in one for one in plain["responses"]] == [False, True]
    assert len(json.dumps(plain)) < 30_000
    back = CloudView.from_plain(plain, []).responses
    kept = np.linspace(0, 8999, examples.MAX_CLOUD_POINTS).astype(int)
    for one, given, places in ((back[0], same, kept), (back[1], own, np.arange(64))):
        ratio = one.voxel.astype(float) / given.voxel[places]
        np.testing.assert_allclose(ratio, ratio[0], rtol=2e-3)
        np.testing.assert_allclose(one.point / one.voxel, (given.point / given.voxel)[places], rtol=4e-3, atol=1e-5)
    assert back[1].coords is not None
    assert np.corrcoef(back[1].coords[:, 0], own.coords[:, 0])[0, 1] > 0.9999
    page = render("r", clouds=[CloudView.from_plain(plain, [])])
    assert [len(box[0]) for box in labels_of(page)] == [len(kept), len(kept), 64]
    assert "64 points of its own" in Elements(page).text


def test_of_many_blocks_a_few_are_shown_from_the_first_to_the_last():
    text = Elements(render("r", clouds=[with_responses(*(response(f"block {i};") for i in range(13)))])).text
    shown = re.findall(r"block (\d+);", text)
    assert len(shown) == examples.MAX_BLOCKS
    assert (shown[0], shown[-1]) == ("0", "12")


def test_a_response_that_is_not_that_of_its_points_is_refused():
    odd = ResponseView("block", np.zeros(300), np.zeros(299))
    with pytest.raises(ValueError, match=r"'block' has coordinates \(300, 3\) and values \[\(300,\), \(299,\)\]"):
        with_responses(odd).to_plain()


# ---- boxes ---------------------------------------------------------------------------------------------------------


def to_metres(section: dict, at: np.ndarray) -> np.ndarray:
    """Return positions on the page as x, z, by the lines of the grid."""
    out = []
    for axis, lines in enumerate((section["columns"], section["rows"])):
        (first, low), (last, high) = lines[0], lines[-1]
        out.append(float(low) + (at[..., axis] - first) / (last - first) * (float(high) - float(low)))
    return np.stack(out, -1)


def paths(section: dict, name: str) -> np.ndarray:
    """Return the six points of each outline in metres, `[n, 6, 2]`: four corners, the middle, the tip ahead."""
    numbers = [[float(n) for n in re.findall(r"-?[\d.]+", path)] for path in section[name]]
    return to_metres(section, np.array(numbers).reshape(-1, 6, 2))


@pytest.mark.parametrize("heading", [0.0, 0.4, math.pi / 2, -2.9])
def test_a_box_is_drawn_where_it_is_and_points_where_it_is_heading(heading: float):
    box = np.array([3.0, 1.6, 20.0, 4.0, 1.6, 1.5, heading])
    section = points.box_section(BoxView("r", np.zeros((0, 3)), box[None], np.zeros((0, 7))))
    (outline,) = paths(section, "truths")
    corners = corners_of((box[0], box[1] - box[5] / 2, *box[2:]))[:, [0, 2]]
    for corner in outline[:4]:
        assert np.linalg.norm(corners - corner, axis=1).min() < 0.02
    assert len({tuple(corner) for corner in outline[:4].round(1)}) == 4
    ahead = outline[5] - outline[4]
    np.testing.assert_allclose(ahead / np.linalg.norm(ahead), [math.cos(heading), -math.sin(heading)], atol=0.01)
    assert np.linalg.norm(ahead) > 2.0  # beyond the front
    rows = [float(text) for _, text in section["rows"]]
    assert rows == sorted(rows)
    assert (np.diff([at for at, _ in section["rows"]]) < 0).all()  # ahead is up


def test_points_lie_among_the_boxes_as_they_do_in_the_scene():
    scene = street()
    section = points.box_section(scene)
    steps = np.array([[int(n) for n in re.findall(r"-?\d+", step)[:2]] for step in section["points"].split("m")[1:]])
    places = to_metres(section, steps.cumsum(0) / 2)
    inside = (scene.points[:, [0, 2]] > places.min(0)) & (scene.points[:, [0, 2]] < places.max(0))
    shown = scene.points[inside.all(1)][:, [0, 2]]
    assert len(places) > 100
    assert max(np.abs(places - point).max(1).min() for point in shown) < 0.05


def test_a_scene_comes_back_from_its_results():
    scene = street(num_points=9000)
    plain = json.loads(json.dumps(scene.to_plain(), allow_nan=False))
    assert len(json.dumps(plain)) < 40_000
    back = BoxView.from_plain(plain)
    kept = np.linspace(0, 8999, examples.MAX_BOX_POINTS).astype(int)
    np.testing.assert_allclose(back.points[:, [0, 2]], scene.points[kept][:, [0, 2]], atol=0.0051)
    np.testing.assert_allclose(back.truths, scene.truths, atol=6e-4)
    np.testing.assert_allclose(back.predictions, scene.predictions, atol=6e-4)
    for name in ("run", "title", "truth_names", "names", "scores"):
        assert getattr(back, name) == getattr(scene, name)


def test_boxes_that_are_not_finite_or_far_away_are_counted_and_spoil_nothing():
    scene = street()
    odd = np.array([[np.nan] * 7, [np.inf, 0, 10, 4, 2, 1, 0], [900.0, 1, 9000, 4, 2, 1, 0]])
    predictions = np.concatenate([odd, scene.predictions])
    spoiled = BoxView("r", scene.points, scene.truths, predictions)
    plain = json.loads(json.dumps(spoiled.to_plain(), allow_nan=False))
    for view in (spoiled, BoxView.from_plain(plain)):
        section = points.box_section(view)
        assert section["range"] == points.box_section(scene)["range"]
        assert len(section["predictions"]) == len(scene.predictions)
        assert (section["num_predictions"], section["num_away"]) == (len(predictions), 3)
    assert "3 of them outside the picture or not finite" in Elements(render("b", boxes=[spoiled])).text


def test_a_true_box_is_compared_with_the_best_prediction_of_its_class():
    scene = street()
    ious, _ = box_iou_matrix(scene.truths, scene.predictions)
    text = " ".join(Elements(render("b", boxes=[scene])).text.split())
    assert f"2 true, 3 predicted: Car {100 * ious[0, 0]:.1f} %, Cyclist {100 * ious[1, 1]:.1f} %" in text
    assert ious[1, 2] > ious[1, 1] > 0.2  # a better one is of another class
    nothing = BoxView("r", scene.points, scene.truths, np.zeros((0, 7)), scene.truth_names)
    assert "2 true, 0 predicted: Car 0.0 %, Cyclist 0.0 %" in Elements(render("b", boxes=[nothing])).text
    nameless = BoxView("r", scene.points, scene.truths, scene.predictions)
    assert [iou for _, iou in points.box_section(nameless)["matches"]] == pytest.approx(100 * ious.max(1))


def test_a_prediction_has_its_class_and_score_beside_it():
    section = points.box_section(street())
    assert [text for _, _, text in section["labels"]] == ["Car 0.90", "Cyclist 0.50", "Pedestrian 0.25"]
    tops = [outline[:, 1].max() for outline in paths(section, "predictions")]
    for (x, y, _), top in zip(section["labels"], tops, strict=True):
        assert 0 <= x <= section["width"]
        assert 0 <= y <= section["height"]
        assert abs(to_metres(section, np.array([x, y]))[1] - top) < 3


def test_texts_of_boxes_side_by_side_do_not_lie_over_each_other():
    boxes = np.array([[x, 1.6, z, 4.0, 1.6, 1.5, 0.3] for x in (0, 2) for z in (10, 11)])
    section = points.box_section(BoxView("r", np.zeros((0, 3)), boxes, boxes, names=["Car"] * 4, scores=[0.5] * 4))
    spots = np.array([(x, y) for x, y, _ in section["labels"]])
    apart = np.abs(spots[:, None] - spots)
    assert ((apart[..., 0] > 40) | (apart[..., 1] >= 11) | np.eye(4, dtype=bool)).all()


def test_scenes_without_boxes_points_or_either_can_be_shown():
    none, scene = np.zeros((0, 7)), street()
    odd = [
        BoxView("no boxes", scene.points, none, none),
        BoxView("no points", np.zeros((0, 4)), scene.truths, none),
        BoxView("predictions only", np.zeros((0, 4)), none, scene.predictions),
        BoxView("nothing", np.zeros((0, 3)), none, none),
        BoxView("bad points", np.full((5, 3), np.nan), none, np.full((2, 7), np.nan)),
        BoxView("far", np.zeros((0, 3)), scene.truths + np.array([1e6, 0, 1e6, 0, 0, 0, 0]), none),
    ]
    page = render("odd", boxes=odd)
    assert page.count('<svg class="drawing"') == len(odd)
    assert len(page) < 150_000


def test_a_drawing_says_in_words_what_it_shows():
    (alt,) = (
        attrs["aria-label"]
        for tag, attrs in Elements(render("b", boxes=[street()])).tags
        if tag == "svg" and attrs.get("role") == "img"
    )
    assert "street 7 seen from above, x from " in alt
    assert "2 true and 3 predicted boxes" in alt


def test_of_several_runs_as_many_scenes_are_shown_the_same_places_side_by_side():
    scenes = [BoxView(run, np.zeros((0, 3)), *[street().truths] * 2, title=f"{i};") for run in "ab" for i in range(9)]
    text = Elements(render("b", boxes=scenes)).text
    shown = re.findall(r"(\d);\s*· (\w)", text)
    assert shown == [(str(i), run) for i in range(6) for run in "ab"]
    assert "The first 12 of 18 scenes." in text
    assert "The first" not in Elements(render("b", boxes=scenes[:12])).text


@pytest.mark.parametrize("change", [{"truths": np.zeros((2, 6))}, {"points": np.zeros(3)}, {"scores": [0.5]}])
def test_boxes_that_are_none_are_refused(change: dict):
    fields = vars(street()) | change
    with pytest.raises(ValueError, match="a scene of 'r' has points, boxes"):
        render("b", boxes=[BoxView(**fields)])
