"""The report: a page that loads nothing, runs only the script of clouds, handles any name, size or missing file."""

import base64
import hashlib
import io
import json
import math
import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.pages import Elements, judged_cloud, response, street

from slimray import models, runs
from slimray.report import charts, pages, searches, tables
from slimray.report.charts import Clip, Curves, Scatter
from slimray.report.pages import CloudView, render
from slimray.report.tables import Confusion, Table
from slimray.runs import examples

HOSTILE = "<script>alert(1)</script>\"' onerror=alert(1) $x_1$"


def metric_rows(num_steps: int = 40) -> list[dict]:
    rows: list[dict] = []
    for step in range(1, num_steps + 1):
        times = {"data/wait_s": 0.1, "time/transfer_s": 0.1, "time/compute_s": 0.2, "time/communication_s": 0.1}
        train = {"train/loss": 3.0 / step, "train/lr": 0.05, "train/samples_per_s": 100.0 + step}
        rows.append({"step": step, "epoch": step / 10, "phase": "train", **train, **times})
        if step % 10 == 0:
            val = {"val/loss": 4.0 / step, "val/top1": 90.0 - abs(30 - step), "val/top5": 99.0}
            rows.append({"step": step, "epoch": step // 10, "phase": "val", **val})
    return rows


def strip() -> str:
    """Return four square frames side by side, as a base64 JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 4 * 32, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return base64.b64encode(buffer.getvalue()).decode()


def full_page(name: str = "circle", clouds: bool = True) -> str:
    classes = [name, "square"]
    views = [
        judged_cloud(classes, run=name),
        CloudView(name, np.eye(3), name, classes=classes, top=[(name, 0.7)], responses=[response(name, 3)]),
    ]
    return render(
        name,
        subtitle=name,
        headline={name: name},
        curves=[*charts.train_curves(metric_rows()), Curves(name, name, {name: ([1, 2], [3.0, 4.0])})],
        tables=[Table(name, (name, "top1"), [(name, 50.0)], note=name, bars=frozenset({"top1"}))],
        confusions=[Confusion(name, classes, [[3, 1], [2, 4]])],
        clips=[Clip(name, strip(), name, [("square", 0.7), (name, 0.3)]), Clip("", name, name)],
        clouds=views if clouds else [],
        boxes=[street(name)],
        quarantine=[{"path": name, "reason": name}],
        facts={name: name, "versions": {name: name}},
        job=name,
    )


def test_a_hostile_name_is_text_everywhere():
    page = full_page(HOSTILE)
    elements = Elements(page)
    assert [attrs for tag, attrs in elements.tags if tag == "script"] == [{}]
    assert elements.scripts == Elements(full_page("circle")).scripts  # nothing of a name gets into the script
    assert not [name for _, attrs in elements.tags for name in attrs if name.startswith("on")]
    assert elements.text.count(HOSTILE) >= 20
    assert page.count("<script") == 1
    data = "".join(elements.all("data-points") + elements.all("data-labels") + elements.all("data-colours"))
    assert re.fullmatch(r"[\w+/=# ]+", data)


def test_without_clouds_the_page_has_no_script():
    page = full_page(HOSTILE, clouds=False)
    assert "<script" not in page
    assert Elements(page).scripts == []


def test_the_page_loads_nothing_from_outside():
    page = full_page()
    elements = Elements(page)
    links = [
        attrs[name] for _, attrs in elements.tags for name in ("src", "href", "xlink:href", "action") if name in attrs
    ]
    assert all(str(link).startswith(("data:image/", "#")) for link in links)
    assert not re.search(r"url\((?!'?data:image/|#)", page)
    assert "@import" not in page
    (script,) = elements.scripts
    assert not re.search(r"fetch|XMLHttp|WebSocket|import|eval|Function\(|innerHTML|location|https?:", script)


def policy_of(page: str) -> str:
    (policy,) = [attrs["content"] for tag, attrs in Elements(page).tags if tag == "meta" and "http-equiv" in attrs]
    return str(policy)


def test_the_policy_allows_no_script_but_that_of_the_clouds():
    nothing = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert policy_of(full_page(clouds=False)) == nothing
    page = full_page(HOSTILE)
    script = page[page.index("<script>") + len("<script>") : page.index("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy_of(page) == f"{nothing}; script-src 'sha256-{digest}'"


def test_a_picture_that_is_no_jpeg_or_png_is_left_out():
    svg = base64.b64encode(b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>").decode()
    for strip in (svg, "no base64", "", "');background:url(http://example.com"):
        page = render("clips", clips=[Clip("a", strip, "circle", [("circle", 1.0)])])
        assert "no picture" in page
        assert "--picture:url(" not in page


def test_right_and_wrong_are_said_in_words():
    clips = [Clip("a", "", "circle", [("circle", 0.9)]), Clip("a", "", "circle", [("square", 0.9)])]
    text = Elements(render("clips", clips=clips)).text
    assert text.count("✓ right") == 1
    assert text.count("✗ wrong") == 1


def test_a_clip_shows_its_three_likeliest_classes():
    top = [("a1", 0.5), ("b2", 0.25), ("c3", 0.15), ("d4", 0.1)]
    text = Elements(render("clips", clips=[Clip("r", "", "a1", top)])).text
    assert "50.0 %" in text
    assert "c3" in text
    assert "d4" not in text


def test_a_strip_of_square_frames_is_played():
    assert "--frames:4;" in render("clips", clips=[Clip("a", strip(), "circle")])


def test_iou_per_class_begins_with_the_weakest_and_ends_with_the_absent():
    rows = [
        {"run": "a", "variant": "natural", "miou": 60.0, "class_iou": [90.0, 20.0, None, 40.0]},
        {"run": "b", "miou": 70.0, "class_iou": [80.0, 70.0, None, 30.0]},
        {"run": "c", "top1": 70.0},
    ]
    (table,) = tables.task_tables(rows, ["floor", "wall", "beam", "door"])
    assert table.header == ("class", "a · natural", "b")
    assert table.rows == [("door", 40.0, 30.0), ("wall", 20.0, 70.0), ("floor", 90.0, 80.0), ("beam", None, None)]
    assert tables.task_tables(rows[2:], ["floor"]) == []
    assert "class_iou" not in tables.compare(rows).header


def test_iou_per_category_has_a_table_of_its_own():
    rows = [
        {"run": "a", "instance_miou": 80.0, "category_iou": {"Bag": 90.0, "Cap": 20.0, "Mug": None}},
        {"run": "b", "instance_miou": 70.0, "category_iou": {"Bag": 50.0, "Cap": 70.0, "Mug": None}},
    ]
    (table,) = tables.task_tables(rows, [])
    assert table.header == ("category", "a", "b")
    assert table.rows == [("Cap", 20.0, 70.0), ("Bag", 90.0, 50.0), ("Mug", None, None)]
    assert "category_iou" not in tables.compare(rows).header


def test_ious_are_drawn_as_long_bars(tmp_path: Path):
    rows = [{"run": "a", "miou": 45.0, "class_iou": [30.0, 60.0]}]
    page = pages.evaluate_report(run_folder(tmp_path, [], {}, {"rows": rows, "classes": ["floor", "wall"]}))
    chart = page[page.index('<table class="bars" style="--columns:1">') :]
    assert re.findall(r"--share:([\d.]+)", chart[: chart.index("</table>")]) == ["0.300", "0.600"]


def kitti_rows(std: float) -> list[dict]:
    """Return a row as `evaluate` writes it for boxes, with one repeat (`std` 0) or several."""
    names = [
        f"ap{recalls}_{seen}_{kind}_{level}"
        for kind in ("car", "cyclist")
        for seen in ("3d", "bev")
        for level in ("easy", "moderate", "hard")
        for recalls in (11, 40)
    ]
    ap = {name: {"mean": 40.0 + i, "std": std, "max": 90.0} for i, name in enumerate(names)}
    repeats = {"repeats": {"mask_acc": {"mean": 91.0, "std": std, "max": 92.0}}} if std else {}
    return [{"run": "f", "variant": "natural", "class_found_3d": 66.0, "mask_acc": 91.0, "ap": ap, **repeats}]


def test_average_precision_is_told_by_class_and_difficulty():
    (table,) = tables.task_tables(kitti_rows(0.0), [])
    assert table.header == ("run", "class", "boxes", "recalls", "easy", "moderate", "hard")
    assert table.rows[0] == ("f · natural", "car", "in space", "11", 40.0, 42.0, 44.0)
    assert table.rows[-1] == ("f · natural", "cyclist", "from above", "40", 59.0, 61.0, 63.0)
    assert len(table.rows) == 8
    assert tables.task_tables([{"run": "a"}], []) == tables.spreads(kitti_rows(0.0)) == []


def test_numbers_of_several_repeats_come_with_their_deviation():
    (table,) = tables.spreads(kitti_rows(0.5))
    assert table.rows[0] == ("f · natural", "mask_acc", 91.0, 0.5, 92.0)
    assert table.rows[1] == ("f · natural", "ap11_3d_car_easy", 40.0, 0.5, 90.0)
    assert len(table.rows) == 25
    assert table.fold


def test_ids_of_the_charts_are_unique_on_the_page():
    ids = [attrs["id"] for _, attrs in Elements(full_page()).tags if "id" in attrs]
    assert len(ids) == len(set(ids)) > 10


def test_charts_follow_the_theme_and_are_the_same_each_time():
    page = full_page()
    assert not any(colour in page for colour in charts.CSS_COLOURS)
    assert "var(--series-1)" in page[page.index("<svg") :]
    assert page == full_page()


def test_a_long_curve_is_thinned_to_means_with_their_range():
    at, mean, low, high = charts._binned(range(9000), [1.0, 3.0] * 4500)
    assert len(at) == charts.NUM_BINS
    np.testing.assert_allclose([mean.min(), mean.max(), low.max(), high.min()], [2, 2, 1, 3])


def test_the_time_split_is_given_in_shares():
    text = Elements(render("t", curves=charts.train_curves(metric_rows()))).text
    for part in ("data wait 20 %", "transfer 20 %", "compute 40 %", "communication 20 %"):
        assert part in text


def test_time_that_no_timer_saw_is_called_other():
    rows = [row | {"time/step_s": 1.0} for row in metric_rows() if row["phase"] == "train"]
    text = Elements(render("t", curves=charts.train_curves(rows))).text
    assert "compute 20 %" in text
    assert "other 50 %" in text


def test_values_that_are_not_finite_are_left_out_of_a_chart():
    rows = [{"step": i, "train/loss": v} for i, v in enumerate([1.0, math.nan, math.inf, 2.0])]
    assert charts.train_curves(rows)[0].series["train"] == ([0, 3], [1.0, 2.0])


def test_an_empty_chart_is_left_out():
    assert "<figure" not in render("t", curves=[Curves("Loss", "loss", {"train": ([], [])})])


@pytest.mark.parametrize("num_classes", [2, 40, 41, 400])
def test_a_confusion_has_labels_up_to_forty_classes_and_a_picture_above(num_classes: int):
    names = [f"class {i}" for i in range(num_classes)]
    page = render("c", confusions=[Confusion("val", names, (np.eye(num_classes, dtype=int) * 5).tolist())])
    assert ('<table class="matrix' in page) == (num_classes <= 40)
    assert ('<img class="heat"' in page) == (num_classes > 40)
    assert "class 1" in page
    assert len(page) < 250_000


def test_a_confusion_that_is_no_square_is_refused():
    with pytest.raises(ValueError, match=r"'val' has shape \(1, 2\) for 2 classes"):
        render("c", confusions=[Confusion("val", ["a", "b"], [[1, 2]])])


def test_per_class_accuracy_begins_with_the_weakest_and_ends_with_the_unseen():
    table = tables.per_class(Confusion("v", ["a", "b", "c"], [[9, 1, 0], [3, 1, 0], [0, 0, 0]]))
    assert table.rows == [("b", 4, 25.0, "a (3)"), ("a", 10, 90.0, "b (1)"), ("c", 0, None, "–")]


def test_most_confused_pairs_are_sorted_and_without_the_diagonal():
    table = tables.most_confused(Confusion("v", ["a", "b"], [[9, 1], [3, 1]]))
    assert table.rows == [("b", "a", 3, 75.0), ("a", "b", 1, 10.0)]


def test_best_and_last_come_from_the_card_or_else_from_the_rows():
    rows = metric_rows()
    final = tables.final_numbers(rows, {})
    assert (final["best"]["step"], final["last"]["step"]) == (30, 40)
    written = {"metrics": {"best": {"val/top1": 77.0}, "last": {"val/top1": 66.0}}}
    assert tables.final_numbers(rows, written) == written["metrics"]


def test_the_interval_is_wilsons():
    # its ends are the true shares from which the measured one lies 1.96 standard errors away
    low, high = (float(end) / 100 for end in tables._interval(80.0, 10).split(" – "))
    for end in (low, high):
        assert abs(0.8 - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / 10), abs=2e-3)
    assert low < 0.8 < high
    assert tables._interval(100.0, 10).endswith("100.0")
    assert tables._interval(None, 10) == tables._interval(80.0, 0) == "–"


def test_frame_order_is_judged_only_where_both_orders_were():
    rows = [
        {"run": "tsm", "variant": "natural", "top1": 90.0},
        {"run": "tsm", "variant": "shuffled", "top1": 40.0},
        {"run": "tsn", "variant": "natural", "top1": 50.0},
    ]
    (table,) = tables.task_tables(rows, [])
    assert table.rows == [("tsm", 90.0, 40.0, 50.0)]
    assert tables.task_tables(rows[2:], []) == []


def test_a_file_quarantined_in_two_attempts_is_one_file():
    rows = [{"split": "train", "sample": 7, "reason": "torn", "attempt": attempt} for attempt in (1, 2)]
    page = render("q", quarantine=rows)
    assert "Quarantined files: 1<" in page
    assert "attempt" not in Elements(page).text


def test_many_quarantined_files_are_cut_and_counted():
    page = render("q", quarantine=[{"path": f"{i}.mp4", "reason": "torn"} for i in range(1200)])
    assert "Quarantined files: 1,200" in page
    assert "499.mp4" in page
    assert "500.mp4" not in page


def test_a_name_with_bytes_that_are_no_text_can_be_written(tmp_path: Path):
    (tmp_path / "page.html").write_text(render("a\udcffb"), encoding="utf-8")


def test_counts_and_floats_read_well():
    shown = [("params", 24_327_632), ("macs", 33e9), ("x", 0.000012345), ("num", 1234567), ("x", None), ("x", math.nan)]
    assert [tables.show_number(*pair) for pair in shown] == [
        "24.3 M",
        "33 G",
        "1.234e-05",
        "1,234,567",
        "–",
        "not finite",
    ]


def test_importing_the_report_imports_no_matplotlib():
    heavy = "('matplotlib', 'jinja2', 'torch', 'ray')"
    code = f"import sys, slimray.report.pages; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def run_folder(tmp_path: Path, rows: list[dict], card: dict, results: dict) -> runs.Run:
    """Write a finished run named `tsm`."""
    run = runs.open_run(str(tmp_path), "tsm")
    with closing(runs.PartWriter(run, "metrics", 1, 0)) as writer:
        for row in rows:
            writer.write(row)
    with closing(runs.PartWriter(run, "quarantine", 1, 0)) as writer:
        writer.write({"split": "train", "sample": 7, "epoch": 0, "reason": "torn in the middle"})
    runs.write_card(run, card)
    runs.write_file(run, "results.json", json.dumps(results).encode())
    return run


def test_the_page_of_a_train_run_tells_what_its_folder_holds(tmp_path: Path):
    card = {"seconds": 12.5, "params": 11_180_000, "environment": {"torch": "2.13", "git": "0123abc"}, "init": None}
    results = {"classes": ["left", "right"], "confusion": {"tsm": [[5, 1], [2, 4]]}}
    page = pages.train_report(run_folder(tmp_path, metric_rows(), card, results))
    text = " ".join(Elements(page).text.split())
    for told in (
        "best top-1 90.0 %",
        "last top-1 80.0 %",
        "params 11.2 M",
        "torch 2.13, git 0123abc",
        "torn in the middle",
    ):
        assert told in " ".join(re.sub(r"<[^>]+>", " ", page).split()), told
    assert page.count("<svg") == 5
    assert "Confusion: tsm" in text
    assert "Quarantined files: 1" in text


def test_the_page_of_an_evaluate_run_sets_the_runs_side_by_side(tmp_path: Path):
    rows = [
        {"run": run, "variant": order, "top1": top1, "top5": 99.0, "num_samples": 96, "chance": 12.5, "params": 10**7}
        for run, order, top1 in (("a", "natural", 90.0), ("a", "shuffled", 40.0), ("b", "natural", 55.5))
    ]
    clips = [{"run": "a", "frames_jpeg_base64": strip(), "truth": "left", "top": [["right", 0.8], ["left", 0.2]]}]
    results = {"rows": rows, "classes": ["left", "right"], "confusion": {"a (natural)": None}, "clips": clips}
    page = pages.evaluate_report(run_folder(tmp_path, [], {}, results))
    text = Elements(page).text
    for told in ("Side by side", "Value of frame order", "82.4 – 94.5", "55.5 %", "✗ wrong"):
        assert told in text, told
    assert "Confusion" not in text


def test_the_page_of_an_evaluation_of_boxes_shows_ap_and_scenes(tmp_path: Path):
    results = {"rows": kitti_rows(0.5), "classes": ["Car"], "boxes": [street("a").to_plain(), street("b").to_plain()]}
    page = pages.evaluate_report(run_folder(tmp_path, [], {}, results))
    text = " ".join(Elements(page).text.split())
    assert "66.0 %" in text
    assert "Average precision of boxes" in text
    assert page.count('<svg class="drawing"') == 2
    header = text[text.index("Side by side") : text.index("Average precision")]
    assert "mask_acc" in header
    assert "mean" not in header  # no dict in a cell


def test_the_best_epoch_of_boxes_is_the_one_that_found_most(tmp_path: Path):
    rows = [
        {"step": i, "val/class_found_3d": found, "val/mask_acc": 90.0 - i} for i, found in enumerate((10.0, 30.0, 20.0))
    ]
    assert tables.final_numbers(rows, {})["best"]["step"] == 1
    assert "class_found_3d" in charts.train_curves(rows)[1].series
    text = Elements(pages.train_report(run_folder(tmp_path, rows, {}, {}))).text
    assert "best boxes found30.0 %" in text
    assert "last boxes found20.0 %" in text


@pytest.mark.parametrize("per_point", [True, False])
def test_the_page_of_an_evaluation_shows_the_clouds_that_its_workers_saw(tmp_path: Path, per_point: bool):
    import torch

    from slimray.tasks import TASKS
    from slimray.tasks.evaluation import Pass, Samples, Setting
    from slimray.tasks.network import Input, Network

    rng, num_points = np.random.default_rng(0), 3000
    clouds = rng.random((2, 1, 6, num_points), np.float32)
    labels = rng.integers(0, 2, (2, num_points) if per_point else 2)
    task = TASKS["segment" if per_point else "classify"]
    network = Network(torch.nn.Linear(1, 1), Input(), {"kind": "points"}, ("leg", "top"), {}, task.name)
    scores = torch.from_numpy(rng.random((2, 2, num_points) if per_point else (2, 2)))
    samples, one = Samples(clouds, labels, ["a", "b"], [0, 1]), Pass(Setting(task, network, {}), task.score(2, {}))
    found = one.show(samples, scores, [], 5)
    assert [example["type"] for example in found] == ["cloud"] * 2
    assert len(one.show(samples, scores, found[:1], 2)) == 1
    results = {
        "rows": [{"run": "net", "miou": 50.0, "class_iou": [30.0, None]}],
        "classes": ["leg", "top"],
        "examples": [example | {"run": "net"} for example in found],
    }
    elements = Elements(pages.evaluate_report(run_folder(tmp_path, [], {}, results)))
    assert len(elements.all("data-points")) == 2
    if per_point:
        kept = np.linspace(0, num_points - 1, examples.MAX_CLOUD_POINTS).astype(int)
        wrong = np.frombuffer(base64.b64decode(elements.all("data-labels")[1].split()[2]), np.uint8)
        np.testing.assert_array_equal(wrong, (labels[1] != scores[1].argmax(0).numpy())[kept])
    else:
        assert elements.text.count("✓ right") + elements.text.count("✗ wrong") == 2
    assert "IoU per class" in elements.text


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path):
    run = runs.open_run(str(tmp_path), "new")
    for page in (pages.train_report(run), pages.evaluate_report(run)):
        assert "<h1>new</h1>" in page


def test_a_page_says_how_its_run_ended(tmp_path: Path):
    run = runs.open_run(str(tmp_path), "tsm")
    runs.begin(run, {"kind": "train", "name": "tsm"}, 1)
    assert "running · " in pages.train_report(run)
    assert "kind: train" in pages.train_report(run)
    runs.end(run, "failed", "the disk is full")
    assert "failed · the disk is full · " in pages.train_report(run)
    runs.write_card(run, {"seconds": 1.0})
    assert "finished · " in pages.train_report(run)


def test_accuracy_by_batch_is_a_curve_for_each_rule_of_the_rate():
    rows = [
        {"run": "a", "variant": "natural", "top1": 90.0, "batch": 16, "peak_lr": 0.1},
        {"run": "b", "variant": "natural", "top1": 89.0, "batch": 64, "peak_lr": 0.4},
        {"run": "c", "variant": "natural", "top1": 60.0, "batch": 64, "peak_lr": 0.1},
        {"run": "a", "variant": "shuffled", "top1": 1.0, "batch": 16, "peak_lr": 0.1},
    ]
    (curves,) = charts.by_batch(rows)
    assert curves.series == {
        "rate 6.25 per 1,000 samples": ([4.0, 6.0], [90.0, 89.0]),
        "rate 0.1 for any batch": ([4.0, 6.0], [90.0, 60.0]),
    }
    assert charts.by_batch(rows[:1]) == []


def test_texts_are_shown_under_their_names_and_never_run():
    hostile = examples.Texts("net", [("source", "<script>alert(1)</script>"), ("network", "x" * 3000)])
    page = Elements(render("t", texts=[examples.Texts.from_plain(hostile.to_plain()), examples.Texts("", [])]))
    for part in ("Texts", "source", "<script>alert(1)</script>", "x" * 2000 + " ..."):
        assert part in page.text
    assert not any("alert" in script for script in page.scripts)
    assert "Texts" not in Elements(render("t", texts=[examples.Texts("", [])])).text


def test_a_front_goes_up_or_down_as_the_metric_is_better():
    points = [(3, 8.5), (1, 9.0), (2, 7.0), (2, 8.0)]
    assert Scatter("", "x", "y", points, better="lower").front() == [(1, 9.0), (2, 7.0)]
    assert Scatter("", "x", "y", points).front() == [(1, 9.0)]


def test_what_a_search_found_is_drawn_layer_by_layer_with_its_history():
    net: Any = models.build("hat_small", preset="small", vocab_size=50)
    space = net.space
    arch = space.smallest().replace(depth=[2], decoder_ffn=[1024, 256, 512])
    plain, largest = space.arch(arch).to_dict(), {name: max(map(max, genes)) for name, genes in space.choices}
    table = searches.layers({"run": "s-fast", "arch": plain}, largest)
    cells = {row[0]: row[1:] for row in table.rows}
    assert cells["decoder_ffn"][:3] == ["1024 ██████", "256 ██", "–"]
    assert cells["depth"][0] == "2 ████"
    assert {len(row) for row in table.rows} == {len(table.header)}
    values = {"fast": [9.0, None, 8.0, 8.5], "slow": [None, 7.0]}
    drawn = searches.history({"history": values}, {"name": "perplexity", "unit": "", "better": "lower"})
    assert drawn.series == {"fast": ([1, 3, 4], [9.0, 8.0, 8.0]), "slow": ([2], [7.0])}
    trials = [{"arch": plain, "metric": 8.0, "macs": 5.0, "latency_ms": 2.0}]
    row = {"arch": plain, "searched": 8.0, "target": "fast"}
    charts = searches.fronts({"trials": trials, "targets": [row]}, {"name": "perplexity", "better": "lower"})
    assert [(one.x_name, one.named) for one in charts] == [
        ("macs", [(5.0, 8.0, "fast")]), ("latency_ms", [(2.0, 8.0, "fast")])
    ]  # fmt: skip
