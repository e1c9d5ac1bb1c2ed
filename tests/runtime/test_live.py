"""`slimray live` on a video file: labels follow the frames, nothing falls behind, the page in a real browser.

A picture of the page is kept in build/live/ (which git ignores).
"""

import http.client
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from playwright.sync_api import expect, sync_playwright
from tests.runtime.exports import export
from tests.waits import as_in_a_terminal, patience, wait_for

from slimray import runtime
from slimray.data.images.pictures import ImageRecipe
from slimray.data.points.recipe import PointRecipe
from slimray.data.video import moving_shapes
from slimray.data.video.camera import Frame
from slimray.data.video.clips import ClipRecipe
from slimray.runtime import live, live_page
from slimray.spec import UserError

HOSTILE = "<img src=x onerror=window.owned=1>"
CLASSES = ["red", HOSTILE, "blue"]
PICTURES = Path(__file__).resolve().parents[2] / "build/live"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Colour(torch.nn.Module):
    """A network with logits for red, green and blue of pictures `[B, 3, H, W]`, or of clips `[B, T, 3, H, W]`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 4 * x.flatten(3).mean(-1).mean(1) if x.ndim == 5 else 4 * x.flatten(2).mean(-1)


class Before(torch.nn.Module):
    """A network whose state is the colour of the previous frame."""

    def forward(self, frame: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return state * 1.0, 4 * frame.flatten(2).mean(-1)


def taken(recipe, classes=CLASSES) -> dict:
    return {"recipe": recipe.to_dict(), "pixels": {}, "classes": classes, "task": "classify"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("live")


@pytest.fixture(scope="module")
def image(folder) -> Path:
    return export(folder / "image", Colour(), torch.randn(2, 3, 32, 32), taken(ImageRecipe(size=32)))


@pytest.fixture(scope="module")
def video(folder) -> Path:
    """Twelve red, twelve green and twelve blue frames."""
    frames = np.zeros((36, 48, 64, 3), np.uint8)
    for place in range(3):
        frames[12 * place : 12 * place + 12, ..., place] = 230
    path = folder / "colours.mp4"
    path.write_bytes(moving_shapes.encode_h264(frames))
    return path


def picture(place: int) -> np.ndarray:
    frame = np.zeros((48, 64, 3), np.uint8)
    frame[..., place] = 230
    return frame


def labels(where: Path, frames: list[np.ndarray]) -> list[str]:
    label = live.labeller(runtime.load(where))
    return [CLASSES[int(label(frame)[0].argmax())] for frame in frames]


def test_a_network_of_images_sees_each_frame_one_of_clips_the_last_ones_and_an_online_one_is_stepped(folder, image):
    red, blue = picture(0), picture(2)
    assert labels(image, [red, blue, red]) == ["red", "blue", "red"]
    recipe = ClipRecipe(num_segments=4, size=32, resize=32)
    clip = export(folder / "clip", Colour(), torch.randn(1, 4, 3, 32, 32), taken(recipe), dynamic=())
    found = labels(clip, [red, blue, blue, blue, blue])
    assert (found[:2], found[3:]) == (["red", "red"], ["blue", "blue"])
    step = export(
        folder / "step", Before(), torch.randn(1, 3, 32, 32), taken(recipe), dynamic=(), states=(torch.zeros(1, 3),)
    )
    assert labels(step, [blue, red, blue, blue])[1:] == ["blue", "red", "blue"]


def test_a_slow_network_drops_frames_and_labels_the_newest():
    release, seen = threading.Semaphore(0), list[int]()

    def slow(frame: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
        release.acquire()
        seen.append(int(frame[0, 0, 0]))
        return np.array([1.0, 0.0], np.float32), ("a", "b")

    def frames() -> Iterator[Frame]:
        for number in range(10):
            while number == 1 and run._newest is not None:
                time.sleep(0.001)  # the first one is being labelled
            yield Frame(np.full((4, 4, 3), number, np.uint8), time.monotonic())
        release.release()
        release.release()

    run = live.Live(slow, frames())
    run.start()
    assert run.wait(patience(30))
    run.stop()
    assert seen == [0, 9]
    assert (run.view.number, run.view.dropped, run.view.ended, run.view.trouble) == (2, 8, True, "")


def test_labels_are_smoothed_over_frames_and_a_damaged_video_ends_with_its_reason(image, folder, video):
    def frames() -> Iterator[Frame]:
        for place in (0, 0, 0, 0, 2):
            before = run.view.number
            yield Frame(picture(place), time.monotonic())
            while run.view.number == before:
                time.sleep(0.001)
        raise ValueError("frame 5 is damaged")

    run = live.Live(live.labeller(runtime.load(image)), frames(), smooth=5)
    run.start()
    assert run.wait(patience(30))
    assert (run.view.label, run.view.smoothed) == ("blue", "red")
    assert run.view.trouble == "frame 5 is damaged"


def test_what_is_no_camera_no_video_or_no_classifier_of_pictures_is_one_sentence(image, folder, tmp_path):
    net, bad = runtime.load(image), tmp_path / "a.mp4"
    bad.write_bytes(b"no video")
    with pytest.raises(UserError, match="give a video, or --camera 0"):
        live.open_live(net, None, None, False, 12)
    with pytest.raises(UserError, match=r"a.mp4: "):
        live.open_live(net, None, bad, False, 12)
    with pytest.raises(UserError, match="--camera 99: cannot be opened"):
        live.open_live(net, 99, None, False, 12)
    points = export(
        folder / "points", torch.nn.Conv1d(3, 3, 1), torch.randn(2, 3, 64), taken(PointRecipe(num_points=64))
    )
    with pytest.raises(UserError, match="takes clouds, but live needs a network of images or clips"):
        live.labeller(runtime.load(points))


def test_only_whoever_has_the_link_sees_anything(image, video):
    run = live.open_live(runtime.load(image), None, video, True, 12)
    page = live_page.open_page(run, "about", 0)
    threading.Thread(target=page.server.serve_forever, args=(0.05,), daemon=True).start()
    cookie = {"Cookie": f"slimray-live-{page.port}={page.token}"}

    def status(path: str, **headers: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=patience(30))
        connection.request("GET", path, headers=headers)
        found = connection.getresponse().status
        connection.close()
        return found

    try:
        assert [status(path) for path in ("/", "/view", "/picture", "/live.js", "/open/wrong")] == [403] * 5
        assert status(f"/open/{page.token}") == 302
        assert [status(path, **cookie) for path in ("/", "/view", "/live.js", "/live.css")] == [200] * 4
        assert [status(path, **cookie) for path in ("/../live.py", "/live.py", "/picture")] == [404] * 3
        assert status("/view", **cookie, Host="evil.example") == 403
        assert status("/view", **cookie, Origin="http://evil.example") == 403
        with pytest.raises(UserError, match="is not available"):
            live_page.open_page(run, "about", page.port)
    finally:
        page.server.shutdown()
        page.server.server_close()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install the Debian package chromium, or run `make browser`")
def test_the_page_shows_a_video_in_a_browser_and_the_command_ends_with_it(image, video):
    code = "import sys; sys.modules.update(torch=None, ray=None); from slimray.cli.main import main; main()"
    command = [sys.executable, "-c", code, "live", str(image), str(video), "--port", "0", "--loop"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=as_in_a_terminal)
    assert process.stdout is not None
    link = re.search(r"http://\S+", process.stdout.readline())[0]  # type: ignore[index]
    wrong, ended, asked = list[str](), list[str](), list[str]()
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page(viewport={"width": 1100, "height": 620})
        page.set_default_timeout(patience(20_000))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda one: one.type == "error" and ended.append(one.text))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(link)
        expect(page.locator("#label")).to_have_text(HOSTILE, timeout=patience(20_000))
        expect(page.locator("#number")).to_have_text(re.compile(r"^(4[1-9]|[5-9]\d|\d{3,})"), timeout=patience(20_000))
        wait_for("a picture", lambda: page.evaluate("document.getElementById('picture').naturalWidth > 0"), 20)
        assert page.evaluate("window.owned === undefined")
        PICTURES.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=PICTURES / "live.png")
        wrong += ended  # once the server ends, requests may fail
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=patience(60))
        expect(page.locator("#trouble")).to_have_text("slimray live has ended", timeout=patience(20_000))
        browser.close()
    assert process.returncode == 0
    assert re.search(r"\d+ frames labelled, \d+ dropped", out)
    assert not wrong
    assert all(url.startswith((link.partition("/open")[0], "blob:", "data:")) for url in asked)


def test_the_command_ends_with_the_video(image, video):
    code = "import sys; sys.modules.update(torch=None, ray=None); from slimray.cli.main import main; main()"
    command = [sys.executable, "-c", code, "live", str(image), str(video), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience(120), check=False)
    assert done.returncode == 0, done.stderr
    labelled, dropped = map(int, re.search(r"(\d+) frames labelled, (\d+) dropped", done.stdout).groups())  # type: ignore[union-attr]
    assert labelled + dropped == 36
    assert labelled > 0
