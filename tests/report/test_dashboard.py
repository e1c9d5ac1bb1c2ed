"""The dashboard in a real browser on real run folders, on a disk and in a bucket; its access control and isolation.

Pictures of the pages are kept in build/dashboard/ (which git ignores).
"""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from dash import html
from playwright.sync_api import expect, sync_playwright
from tests.runs_to_show import metric_row, searched, shrunk, trained, val_row, write_rows
from tests.waits import as_in_a_terminal, patience

from slimray import runs
from slimray.report.dashboard import app, watch
from slimray.report.dashboard.watch import Watch
from slimray.spec import UserError

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
expect.set_options(timeout=patience(20_000))
PICTURES = Path(__file__).resolve().parents[2] / "build/dashboard"
HOSTILE = "<img src=x onerror=window.owned=1>"
SCRIPT = "<script>window.owned=1</script><b>bold</b>"
EVIL_REPORT = """<h1>evil</h1><script>document.title = 'ran';
try { parent.document.title = 'owned'; parent.owned = 1; } catch (error) { document.body.append(error.name); }
fetch('http://192.0.2.1/x').catch(() => document.body.append(' kept-in'));</script>"""


class Page:
    """An open page of a server, which records errors and requests."""

    def __init__(self, browser, dashboard: app.Dashboard, **options):
        self.base = f"http://127.0.0.1:{dashboard.port}"
        self.context = browser.new_context(viewport={"width": 1400, "height": 900}, **options)
        name, value = dashboard.cookie
        self.context.add_cookies([{"name": name, "value": value, "url": self.base}])
        self.page = self.context.new_page()
        self.page.set_default_timeout(patience(20_000))
        self.wrong: list[str] = []
        self.asked: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("dialog", lambda dialog: self.wrong.append(dialog.message))
        self.page.on("console", lambda one: one.type == "error" and self.wrong.append(one.text))

    def go(self, path: str):
        self.page.goto(self.base + path)
        self.page.wait_for_selector("main h1")
        return self.page

    def keep(self, name: str) -> None:
        """Save a picture of the page."""
        PICTURES.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=PICTURES / f"{name}.png", full_page=True)
        assert (PICTURES / f"{name}.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium: install the Debian package chromium, or run `make browser`")
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


def serving(where: str):
    dashboard = app.open_server(where, 0)
    threading.Thread(target=dashboard.server.serve_forever, args=(0.05,), daemon=True).start()
    return dashboard


@pytest.fixture(scope="module")
def storage(tmp_path_factory) -> Path:
    """Write runs of most kinds and states, a damaged one, and one in which every text is hostile."""
    where = tmp_path_factory.mktemp("runs")
    trained(str(where), "good-tsm")
    trained(str(where), "good-tsn", rows=10)
    trained(str(where), "bad", "failed", message="the loss is not finite")
    searched(str(where), "sweep", 120)
    searched(str(where), "sweep-live", 30, finished=False)
    shrunk(str(where), "net")
    quarantined = trained(str(where), "dirty")
    write_rows(
        quarantined,
        [{"path": f"clip{i}.mp4", "split": "train", "sample": i, "reason": "cut off"} for i in range(3)],
        "quarantine",
    )
    (where / "damaged").mkdir()
    (where / "damaged/status.json").write_text('{"state": 3}')
    (where / "torn").mkdir()
    (where / "torn/job.yaml").write_text("kind: [")
    (where / "no-run").mkdir()
    hostile = where / HOSTILE
    shutil.copytree(where / "good-tsm", hostile)
    (hostile / "job.yaml").write_text(json.dumps({"kind": SCRIPT, "arch": {"kernel": [SCRIPT]}}))
    (hostile / "status.json").write_text(
        (hostile / "status.json")
        .read_text()
        .replace('"message": ""', json.dumps("message") + ": " + json.dumps(SCRIPT))
    )
    (hostile / "results.json").write_text(json.dumps({
        "classes": [SCRIPT, HOSTILE], "confusion": {SCRIPT: [[3, 1], [2, 5]]}, "metric": SCRIPT,
        "targets": [{"target": SCRIPT, "run": HOSTILE, "searched": 1.0, SCRIPT: 2.0}],
        "trials": [{"metric": 5.0 + i, SCRIPT: 3.0 * i, "arch": {"kernel": [3, 5], "depth": [1]}} for i in range(3)],
    }))  # fmt: skip
    (hostile / "card.json").write_text(
        json.dumps({"metrics": {"best": {SCRIPT: SCRIPT, "val/top1": SCRIPT}}, SCRIPT: SCRIPT})
    )
    (hostile / "report.html").write_text(EVIL_REPORT)
    return where


@pytest.fixture(scope="module")
def server(storage):
    server = serving(str(storage))
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture
def open_page(browser, server):
    """`open_page(width=400)` opens a browser window; at the end it must be free of errors and external requests."""
    opened: list[Page] = []

    def make(**options) -> Page:
        opened.append(Page(browser, server, **options))
        return opened[-1]

    yield make
    for one in opened:
        one.context.close()
        assert one.wrong == []
        assert [url for url in one.asked if not url.startswith(one.base) and not url.startswith("data:")] == []


def ask(
    port: int, path: str, method: str = "GET", token: str = "", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=patience(20))
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, headers=sent | ({"Cookie": f"slimray-{port}={token}"} if token else {}))
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, body


# ------------------------------------------------------------------------------------------------ in the browser


def test_runs_are_filtered_by_words_and_states_and_ordered(open_page):
    window = open_page()
    page = window.go("/")
    rows = page.locator("table.runs tbody tr")
    expect(rows).to_have_count(10)
    window.keep("runs")
    page.get_by_label("filter").fill("GOOD train")
    expect(rows).to_have_count(2)
    page.get_by_label("filter").fill("")
    expect(rows).to_have_count(10)
    page.get_by_role("link", name="failed 1").click()
    expect(rows).to_have_count(1)
    expect(rows.first).to_contain_text("the loss is not finite")
    page.get_by_role("link", name=re.compile("^all ")).click()
    page.get_by_role("link", name="result", exact=True).click()
    expect(page.locator("th[aria-sort=descending]")).to_have_text("result")
    results = [
        float(found[0])
        for text in page.locator(".cell-result").all_inner_texts()
        if (found := re.findall(r"[\d.]+(?= %)", text))
    ]
    assert results == sorted(results, reverse=True)
    assert len(results) >= 4


def test_a_click_on_a_run_shows_its_curves_numbers_and_report(open_page):
    window = open_page()
    page = window.go("/")
    page.get_by_role("link", name="good-tsm", exact=True).click()
    expect(page.locator("h1")).to_have_text("good-tsm")
    tiles = page.locator(".tiles")
    for text in ("70.0 %", "10 %", "goodput"):
        expect(tiles).to_contain_text(text)
    for title in ("Loss", "Validation accuracy", "Throughput", "Where a step's time goes", "good-tsm"):
        expect(page.get_by_role("img", name=f"chart: {title}", exact=True).locator(".main-svg").first).to_be_visible()
    window.keep("run")
    page.get_by_role("link", name="report: pictures, clips, clouds").click()
    frame = page.frame_locator("iframe.report")
    expect(frame.get_by_role("heading", name="good-tsm")).to_be_visible()
    page.get_by_role("link", name="job", exact=True).click()
    expect(page.locator("pre")).to_contain_text("kind: train")
    expect(page.locator("table")).to_contain_text("environment cpus")


def test_trials_fronts_and_subnets_of_a_search_are_drawn(open_page):
    window = open_page()
    page = window.go("/run/sweep")
    chart = page.get_by_role("img", name=re.compile("^chart: 120 of 120 trials"))
    expect(chart.locator(".scatterlayer .trace")).to_have_count(6)
    for cost in ("parameters", "MACs", "memory, MB"):
        expect(page.get_by_role("img", name=f"chart: top1 by {cost}", exact=True).locator(".trace")).to_have_count(2)
    subnets = page.locator("figure.subnet")
    expect(subnets).to_have_count(2)
    expect(subnets.first.locator(".block")).to_have_count(9)
    window.keep("search")
    page.get_by_role("link", name="best tenth").click()
    expect(page.get_by_role("img", name=re.compile("^chart: 12 of 120 trials"))).to_be_visible()
    page.get_by_role("link", name="draw").first.click()
    expect(subnets).to_have_count(3)
    said = subnets.first.locator(".block").first.get_attribute("aria-label") or ""
    assert re.fullmatch(r"block 1: kernel [357], expand [346]", said)


def test_a_search_under_way_shows_the_trials_that_are_done_and_their_front(open_page):
    page = open_page().go("/run/sweep-live")
    expect(page.locator(".tiles")).to_contain_text("30")
    expect(page.get_by_role("img", name="chart: top1 by MACs", exact=True).locator(".trace")).to_have_count(1)
    dots = page.get_by_role("img", name="chart: top1 by MACs", exact=True).locator(".shapelayer path")
    assert (dots.first.get_attribute("d") or "").count("M") == 30
    expect(page.get_by_role("img", name=re.compile("30 of 30 trials, of large, small"))).to_be_visible()


def test_stages_and_quarantined_files_are_shown(open_page):
    window = open_page()
    page = window.go("/run/net")
    expect(page.locator(".stages li")).to_have_text(["00-teacher finished", "01-kernel stopped"])
    expect(page.get_by_role("img", name="chart: Loss, stage by stage", exact=True).locator(".trace")).to_have_count(2)
    expect(page.locator("table")).to_contain_text("smallest")
    page = window.go("/run/dirty")
    expect(page.get_by_role("heading", name="Quarantined files: 3")).to_be_visible()
    expect(page.locator("section table").last).to_contain_text("clip2.mp4")


def test_runs_that_are_picked_are_compared(open_page):
    window = open_page()
    page = window.go("/")
    page.get_by_title("compare good-tsm").click()
    expect(page.get_by_title("remove good-tsm")).to_be_focused()
    page.get_by_title("compare good-tsn").click()
    page.get_by_role("link", name="Compare 2 runs").click()
    expect(page.locator("h1")).to_have_text("Compare")
    chart = page.get_by_role("img", name="chart: Validation accuracy: top1", exact=True)
    expect(chart.locator(".scatterlayer .trace")).to_have_count(2)
    expect(page.locator("tbody tr")).to_have_count(2)
    window.keep("compare")


def test_all_is_reached_by_the_keyboard_and_a_look_does_not_take_the_focus_away(open_page, storage):
    window = open_page()
    page = window.go("/?state=failed")
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    run = page.get_by_role("link", name="bad", exact=True)
    for _ in range(30):
        if run.evaluate("node => node === document.activeElement"):
            break
        page.keyboard.press("Tab")
    expect(run).to_be_focused()
    assert run.evaluate("node => getComputedStyle(node).outlineStyle") == "solid"
    before = json.loads((storage / "bad/status.json").read_text())
    (storage / "bad/status.json").write_text(json.dumps(before | {"message": "another reason now"}))
    expect(page.locator("table.runs")).to_contain_text("another reason now")
    expect(run).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("bad")


def test_nothing_is_wider_than_a_narrow_screen_in_dark_mode_too(open_page):
    window = open_page(color_scheme="dark")
    window.page.set_viewport_size({"width": 400, "height": 800})
    for path in ("/", "/run/sweep", "/run/good-tsm", "/run/good-tsm?view=report", "/compare?runs=good-tsm,good-tsn"):
        page = window.go(path)
        page.wait_for_timeout(patience(300))
        assert page.evaluate("document.documentElement.scrollWidth") <= 400, path
    window.go("/")
    window.keep("narrow-dark")
    light = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every(part => part > 127)")
    assert not light


def test_a_page_follows_a_run_that_writes(open_page, storage):
    run = trained(str(storage), "live", "running", rows=5)
    try:
        page = open_page().go("/run/live")
        expect(page.locator(".tiles")).to_contain_text("0.5")
        expect(page.locator(".js-plotly-plot").first).to_be_visible()
        page.evaluate("document.querySelector('.js-plotly-plot').marked = true")
        write_rows(run, [metric_row(60, 4.25), val_row(60, 4.25, 88.5)])
        expect(page.locator(".tiles")).to_contain_text("4.25")
        expect(page.locator(".tiles")).to_contain_text("88.5 %")
        marked = (
            "document.querySelector('.js-plotly-plot').marked && document.querySelector('.js-plotly-plot').data[0].x"
        )
        assert page.evaluate(marked) == [10, 20, 30, 40, 50, 60]  # the same chart, longer: its zoom is kept
        runs.end(run, "failed", "out of memory")
        expect(page.locator(".message")).to_have_text("out of memory")
    finally:
        shutil.rmtree(storage / "live")


def test_hostile_names_metrics_and_reports_are_shown_and_never_run(open_page):
    window = open_page()
    page = window.go("/")
    expect(page.get_by_role("link", name=HOSTILE, exact=True)).to_be_visible()
    page.get_by_role("link", name=HOSTILE, exact=True).click()
    expect(page.locator("h1")).to_have_text(HOSTILE)
    expect(page.locator(".message")).to_have_text(SCRIPT)
    expect(page.locator(".main-svg").first).to_be_visible()
    expect(page.locator("figcaption").filter(has_text=SCRIPT).first).to_be_visible()
    page.wait_for_timeout(patience(500))
    assert page.locator("main img, main script, main b").count() == 0
    assert page.evaluate("window.owned") is None
    window.go("/compare?runs=" + "%3Cimg%20src%3Dx%20onerror%3Dwindow.owned%3D1%3E,good-tsm")
    assert window.wrong == []
    page.goto(f"{window.base}/run/%3Cimg%20src=x%20onerror=window.owned=1%3E?view=report")
    frame = page.frame_locator("iframe.report")
    expect(frame.locator("body")).to_contain_text("SecurityError")
    expect(frame.locator("body")).to_contain_text("kept-in")
    assert page.title() == "slimray"
    assert page.evaluate("window.owned") is None
    assert any("192.0.2.1" in text for text in window.wrong)  # the browser reports the refusal
    window.wrong.clear()
    window.asked = [url for url in window.asked if "192.0.2.1" not in url]


def test_damaged_and_missing_runs_have_a_row_or_a_page_that_says_so(open_page):
    window = open_page()
    page = window.go("/?state=damaged")
    expect(page.locator("table.runs tbody tr")).to_have_count(2)
    expect(page.locator("table.runs")).to_contain_text("is not the status of a run")
    for path, text in (
        ("/run/damaged", "is not the status of a run"),
        ("/run/torn", "torn/job.yaml"),
        ("/run/missing", "has no run 'missing'"),
        ("/run/..%2Fother", "has no run '../other'"),
        ("/nowhere", "There is nothing at /nowhere"),
        ("/compare?runs=missing", "There is no run 'missing'"),
    ):
        expect(window.go(path).locator("main")).to_contain_text(text)


def test_a_bucket_is_shown_like_a_disk(browser, bucket):
    where = bucket("dashboard")
    trained(where, "in-s3")
    searched(where, "sweep-s3", 8, finished=False)
    server = serving(where)
    try:
        window = Page(browser, server)
        page = window.go("/")
        expect(page.locator("table.runs tbody tr")).to_have_count(2)
        page.get_by_role("link", name="in-s3", exact=True).click()
        expect(page.get_by_role("img", name="chart: Loss", exact=True).locator(".trace")).to_have_count(2)
        expect(page.locator(".tiles")).to_contain_text("70.0 %")
        page = window.go("/run/sweep-s3")
        expect(page.get_by_role("img", name=re.compile("8 of 8 trials"))).to_be_visible()
        assert window.wrong == []
        window.context.close()
    finally:
        server.server.shutdown()
        server.server.server_close()


# ------------------------------------------------------------------------------------------------ what it lets in


def test_it_answers_on_127_0_0_1_only_and_to_its_own_host_and_origin_only(server):
    port = server.port
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=patience(5))
    for host in (f"127.0.0.1:{port}", f"localhost:{port}"):
        assert ask(port, "/", token=server.token, Host=host)[0] == 200
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1",
        f"127.0.0.1:{port + 1}",
        f"127.0.0.1:{port}.evil",
    ):
        for path in ("/", "/_dash-layout", "/report/good-tsm"):
            status, _, body = ask(port, path, token=server.token, Host=host)
            assert status == 403
            assert b"good" not in body
    assert ask(port, "/_dash-update-component", "POST", server.token, Origin="http://evil.example")[0] == 403
    assert ask(port, "/", token=server.token, Origin=f"http://127.0.0.1:{port}")[0] == 200


def test_another_user_of_the_machine_reads_nothing_without_the_link(server):
    for path in ("/", "/_dash-layout", "/report/good-tsm", "/run/good-tsm", "/open/", "/open/guessed"):
        for token in ("", "guessed"):
            status, headers, body = ask(server.port, path, token=token)
            assert (status, b"good" in body) == (403, False)
            assert "set-cookie" not in headers
    status, headers, _ = ask(server.port, f"/open/{server.token}")
    assert (status, headers["location"]) == (302, "/")
    assert headers["set-cookie"].startswith(f"slimray-{server.port}={server.token}; HttpOnly")
    assert "SameSite=Strict" in headers["set-cookie"]
    assert ask(server.port, f"/open/{server.token}", token=server.token)[0] == 302


def test_links_that_lead_out_of_the_storage_are_not_followed(tmp_path):
    where, outside = tmp_path / "runs", tmp_path / "private"
    trained(str(where), "mine")
    trained(str(outside), "theirs")
    (outside / "theirs/report.html").write_text("secret report")
    (where / "whole").symlink_to(outside / "theirs")
    trained(str(where), "partly")
    (where / "partly/report.html").unlink(missing_ok=True)
    (where / "partly/report.html").symlink_to(outside / "theirs/report.html")
    (where / "partly/card.json").unlink()
    (where / "partly/card.json").symlink_to(outside / "theirs/card.json")
    (where / "alias").symlink_to(where / "mine")
    looked = watch.Watch(str(where))
    rows = {row["name"]: row for row in looked.rows(patience(5))}
    assert sorted(rows) == ["alias", "mine", "partly"]
    assert (rows["mine"]["state"], rows["partly"]["state"]) == ("finished", "damaged")
    assert "leads out of the storage" in rows["partly"]["message"]
    assert looked.look("whole", patience(5)) is None
    assert (looked.report("whole"), looked.report("partly")) == (None, None)
    looked.close()


def test_what_a_folder_holds_is_text_on_the_page_and_never_a_component(tmp_path, browser):
    evil = {
        "type": "Location",
        "namespace": "dash_core_components",
        "props": {"id": "url", "href": "http://evil.example/", "refresh": True},
    }
    trained(str(tmp_path), "evil")
    folder = tmp_path / "evil"
    (folder / "job.yaml").write_text(json.dumps({"kind": evil, "name": "evil", "model": evil}))
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps(status | {"message": evil, "state": "finished"}))
    (folder / "card.json").write_text(json.dumps({"metrics": {"best": {"val/top1": evil}}, "goodput": evil, "x": evil}))
    (folder / "results.json").write_text(json.dumps({"rows": [{"run": evil, "top1": evil, "variant": [evil]}]}))
    dashboard = serving(str(tmp_path))
    window = Page(browser, dashboard)
    try:
        for path in ("/", "/run/evil", "/run/evil?view=job", "/compare?runs=evil"):
            window.go(path)
            window.page.wait_for_timeout(patience(500))
            assert window.page.url.startswith(window.base)
        assert [url for url in window.asked if "evil.example" in url] == []
    finally:
        window.context.close()
        dashboard.server.shutdown()
        dashboard.server.server_close()


def test_the_page_names_no_other_host_and_forbids_scripts_of_others(server):
    _, headers, body = ask(server.port, "/", token=server.token)
    text = body.decode()
    assert re.findall(r"""(?:src|href)=["'](?!/|data:,)[^"']*""", text) == []
    assert not re.search(r"https?://", text)
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert re.fullmatch(r"'self' 'sha256-[\w+/=]+'", policy["script-src"])
    assert policy["frame-ancestors"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"


def test_only_reports_of_runs_are_served_and_they_are_shut_in(server, storage):
    status, headers, body = ask(server.port, "/report/good-tsm", token=server.token)
    assert (status, body) == (200, (storage / "good-tsm/report.html").read_bytes())
    assert headers["content-security-policy"].startswith("sandbox allow-scripts; default-src 'none'")
    assert "allow-same-origin" not in headers["content-security-policy"]
    (storage.parent / "report.html").write_text("secret")
    (storage.parent / "status.json").write_text("{}")
    for name in (
        "..",
        "%2e%2e",
        "..%2f",
        "%2e%2e%2f%2e%2e%2fetc",
        "no-run",
        "sweep",
        "good-tsm%2fstages",
        "missing",
        ".",
        "%00",
    ):
        status, headers, body = ask(server.port, f"/report/{name}", token=server.token)
        assert status in (404, 308) or headers["content-security-policy"].startswith("default-src 'none'"), name
        assert b"secret" not in body


# ------------------------------------------------------------------------------------------------ what it sends


def test_of_two_pages_only_what_differs_is_sent():
    def page(text, title, rows):
        table = html.Table([html.Tr([html.Td(row), html.Td("same")]) for row in rows])
        return app.named([html.H1(text), html.P(html.A("to", href="/x", title=title)), table, None], "page")

    old = page("a", "b", ["c", "d"])
    assert app.changes(old, page("a", "b", ["c", "d"]), "page") == {}
    assert app.changes(old, page("A", "B", ["c", "D"]), "page") == {
        "page-0": {"children": "A"},
        "page-1-0": {"title": "B"},
        "page-2-1-0": {"children": "D"},
    }
    (longer,) = app.changes(old, page("a", "b", ["c", "d", "e"]), "page").items()
    assert longer[0] == "page-2"
    assert len(longer[1]["children"]) == 3
    assert list(app.changes(old, old[:2], "page")) == ["page"]
    assert app.changes([html.P("x", id="i")], [html.P(["x"], id="i")], "page") == {"i": {"children": ["x"]}}
    assert list(app.changes([html.P("x", id="i")], [html.P("x", id="i", title="t")], "page")) == ["page"]


# ------------------------------------------------------------------------------------------------ what it reads


def test_a_part_that_was_read_is_not_read_again(tmp_path):
    run = trained(str(tmp_path), "r", "running", rows=3)
    watch = Watch(str(tmp_path))
    first = watch.look("r", patience(20))
    assert first is not None
    assert watch.look("r", patience(20)) is first
    (part,) = (tmp_path / "r/metrics").iterdir()
    times, size = part.stat(), part.stat().st_size
    part.write_text("x" * size)  # would be visible if it were read
    os.utime(part, ns=(times.st_atime_ns, times.st_mtime_ns))
    write_rows(run, [metric_row(90, 9.0)])
    second = watch.look("r", patience(20))
    watch.close()
    assert second is not None
    assert second.problems == []
    assert [row["step"] for row in second.metrics] == [10, 20, 30, 90]


def test_the_newest_attempt_of_a_step_is_shown(tmp_path):
    run = trained(str(tmp_path), "r", "running", rows=3)
    write_rows(run, [metric_row(20, 7.5)], attempt=2)
    look = Watch(str(tmp_path)).look("r", patience(20))
    assert look is not None
    assert [(row["step"], row["epoch"], row["attempt"]) for row in look.metrics] == [(10, 0.1, 1), (20, 7.5, 2)]


def test_a_storage_that_is_slow_is_read_on_while_the_page_says_so(tmp_path):
    searched(str(tmp_path), "sweep", 400, finished=False)
    watch = Watch(str(tmp_path))
    first = watch.look("sweep", patience_s=0)
    assert first is not None
    assert (first.row["state"], first.trials) == ("reading", {})
    second = watch.look("sweep", patience_s=patience(60))
    assert second is not None
    assert sum(map(len, second.trials.values())) == 400
    assert watch.look("sweep", patience_s=0) is second
    watch.close()


def test_rows_follow_what_changes_on_storage(tmp_path):
    watch = Watch(str(tmp_path / "later"))
    assert watch.rows() == []
    trained(str(tmp_path / "later"), "a")
    watch._listed_at = -99.0  # as if two seconds had passed
    (row,) = watch.rows(patience(20))
    assert (row["name"], row["kind"], row["state"], row["result"]) == ("a", "train", "finished", "top1 70.0 %")
    shutil.rmtree(tmp_path / "later/a")
    watch._listed_at = -99.0
    assert watch.rows(patience(20)) == []
    watch.close()


def test_one_damaged_file_hides_no_other(tmp_path):
    trained(str(tmp_path), "r")
    (tmp_path / "r/results.json").write_text("[1]")
    (tmp_path / "r/metrics/rubbish.jsonl").write_text("no part")
    look = Watch(str(tmp_path)).look("r", patience(20))
    assert look is not None
    assert look.card["seconds"] == 12.5
    assert len(look.problems) == 2
    assert "results.json: is not a JSON object" in look.problems[0]


# ------------------------------------------------------------------------------------------------ the command


@pytest.mark.parametrize("storage_answers", [True, False])
def test_the_command_serves_until_it_is_interrupted(tmp_path, storage_answers):
    trained(str(tmp_path), "mine")
    if not storage_answers:
        trained(str(tmp_path), "late")
        (tmp_path / "late/status.json").unlink()
        os.mkfifo(tmp_path / "late/status.json")  # opening it waits for a writer
    command = [sys.executable, "-m", "slimray.cli", "dashboard", str(tmp_path), "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=as_in_a_terminal
    ) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            port, token = re.search(r"http://127\.0\.0\.1:(\d+)/open/(\S+) ", said).groups()  # type: ignore[union-attr]
            assert ask(int(port), "/", token=token)[0] == 200
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=patience(20))
        finally:
            process.kill()
    assert (process.returncode, out, err) == (0, "", "")


def test_a_port_that_is_taken_and_a_storage_that_is_none_are_one_sentence(server, storage):
    with pytest.raises(UserError, match=f"^--port: {server.port} on 127.0.0.1 is not available"):
        app.open_server(str(storage), server.port)
    with pytest.raises(UserError, match="unknown storage"):
        app.open_server("s4://bucket/runs", 0)
