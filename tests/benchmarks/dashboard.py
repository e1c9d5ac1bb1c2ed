"""From navigation to visible content: the dashboard over 200 runs and a sweep of 1,000 trials, on disk and in a bucket.

The clock starts when the browser is sent to the address and stops when the last row of the table, or the lines of the
last chart, are painted. Each measurement uses a new browser window with an empty cache; `cold` means the first request
to a server that has just been started. The bucket is a moto server on loopback, in a separate process.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow.fs as pafs
from playwright.sync_api import sync_playwright
from tests.runs_to_show import searched, trained

from slimray.report.dashboard import app

RUNS, TRIALS, TIMES = 200, 1000, 9
PAINTED = """() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        names = ("chromium", "chromium-browser", "google-chrome")
        found = next(filter(None, map(shutil.which, names)), None)
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=found, args=arguments)
        disk = f"{folder}/runs"
        _fill(disk)
        _measure(browser, "disk", disk)
        with _bucket() as where:
            _upload(Path(disk), where)
            _measure(browser, "bucket", where)
        browser.close()


def _fill(where: str) -> None:
    states: list[Any] = ["finished"] * 8 + ["failed", "running"]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: trained(where, f"run-{i:03d}", states[i % 10], rows=50), range(RUNS - 2)))
    searched(where, "sweep", TRIALS)
    searched(where, "sweep-live", TRIALS, finished=False)


def _measure(browser: Any, kind: str, where: str) -> None:
    sweeps = ("sweep, over", "/run/sweep", _fronts), ("sweep, under way", "/run/sweep-live", _fronts)
    for name, path, shown in (("runs", "/", _rows), *sweeps):
        cold, warm, known = [], [], []
        for _ in range(TIMES):
            opened = app.open_server(where, 0)
            server = opened.server
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            address = f"http://127.0.0.1:{server.port}{path}"
            first, all_known = _seconds(browser, opened, address, shown)
            cold.append(first)
            known.append(all_known)
            warm.append(_seconds(browser, opened, address, shown)[0])
            server.shutdown()
            server.server_close()
            time.sleep(1)  # for what that server was still reading
        for title, seconds in (("cold", cold), ("warm", warm), ("cold, until the state of every run is known", known)):
            seconds.sort()
            if seconds is not known or name == "runs":
                spread = f"{seconds[0]:.2f} to {seconds[-1]:.2f}, {len(seconds)} times"
                print(f"{kind}: {name}: {title}: median {median(seconds):.2f} s ({spread})", flush=True)


def _rows(page: Any) -> None:
    page.locator(".cell-state").nth(RUNS - 1).wait_for()


def _fronts(page: Any) -> None:
    page.locator(".scatterlayer").nth(3).wait_for()


def _seconds(browser: Any, opened: Any, address: str, shown: Any) -> tuple[float, float]:
    """Until the content is painted, and until no run is named `reading` any more (the page looks every two seconds)."""
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    name, value = opened.cookie
    context.add_cookies([{"name": name, "value": value, "url": address}])
    page = context.new_page()
    page.set_default_timeout(120_000)
    began = time.perf_counter()
    page.goto(address, wait_until="commit")
    shown(page)
    page.evaluate(PAINTED)
    seconds = time.perf_counter() - began
    page.locator(".state.reading").first.wait_for(state="detached")
    known = time.perf_counter() - began
    context.close()
    return seconds, known


@contextlib.contextmanager
def _bucket() -> Iterator[str]:
    os.environ |= {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret"}
    code = (
        "import sys, time\nfrom moto.server import ThreadedMotoServer\n"
        "server = ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)\nserver.start()\n"
        "print(server.get_host_and_port()[1], flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        fs = pafs.S3FileSystem(endpoint_override=f"http://127.0.0.1:{port}", allow_bucket_creation=True)
        fs.create_dir("team")
        try:
            yield f"s3://team/runs?endpoint_override=127.0.0.1:{port}&scheme=http"
        finally:
            server.terminate()


def _upload(folder: Path, where: str) -> None:
    fs, path = app.Watch(where)._fs, "team/runs"
    files = [file for file in folder.rglob("*") if file.is_file()]

    def put(file: Path) -> None:
        with fs.open_output_stream(f"{path}/{file.relative_to(folder)}") as out:
            out.write(file.read_bytes())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, files))


if __name__ == "__main__":
    main()
