"""`slimray live` over minutes: do the delay and the memory grow, and do the labels follow the picture?

`SLIMRAY_BENCH_MINUTES=10 python -m tests.benchmarks live`. The command runs in a process without torch, on a video of
30 frames per second that restarts at its end: a second of red, one of green, one of blue; its page is requested ten
times a second, as a browser does. The network names the colour: a view is right if its label is that of its picture.
Memory is the resident set; its growth is counted from the end of the first quarter, when all buffers are full.
"""

import http.client
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from tests.runtime.exports import export
from tests.runtime.test_live import Colour, taken
from tests.waits import as_in_a_terminal

from slimray.data.images.pictures import ImageRecipe
from slimray.data.video import moving_shapes

MINUTES = float(os.environ.get("SLIMRAY_BENCH_MINUTES", "10"))
COLOURS = ["red", "green", "blue"]
ASKED_S = 0.1


def video(path: Path) -> Path:
    frames = np.zeros((90, 360, 640, 3), np.uint8)
    for place in range(3):
        frames[30 * place : 30 * place + 30, ..., place] = 230
    path.write_bytes(moving_shapes.encode_h264(frames, fps=30))
    return path


def resident_mb(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024  # type: ignore[index]


class Asked:
    """The page, as a browser sees it."""

    def __init__(self, link: str):
        port, token = re.search(r":(\d+)/open/(\S+)", link).groups()  # type: ignore[union-attr]
        self.connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)
        self.headers = {"Cookie": f"slimray-live-{port}={token}"}

    def get(self, path: str) -> tuple[int, bytes]:
        self.connection.request("GET", path, headers=self.headers)
        response = self.connection.getresponse()
        return response.status, response.read()


def main() -> None:
    """Print what was seen, quarter by quarter."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        net = export(
            folder / "net", Colour(), torch.randn(2, 3, 224, 224), taken(ImageRecipe(size=224, resize=224), COLOURS)
        )
        code = "import sys; sys.modules.update(torch=None, ray=None); from slimray.cli.main import main; main()"
        command = [sys.executable, "-c", code, "live", str(net), str(video(folder / "a.mp4")), "--port", "0", "--loop"]
        command += ["--smooth", "1"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=as_in_a_terminal)
        assert process.stdout is not None
        page = Asked(re.search(r"http://\S+", process.stdout.readline())[0])  # type: ignore[index]
        seen: list[tuple[float, ...]] = []
        followed = asked = 0
        start, end = time.monotonic(), time.monotonic() + 60 * MINUTES
        while time.monotonic() < end:
            before = json.loads(page.get("/view")[1])
            status, picture = page.get("/picture")
            after = json.loads(page.get("/view")[1])
            if status == 200 and before["label"] == after["label"]:  # the picture lies between two views
                mean = np.asarray(Image.open(io.BytesIO(picture))).mean((0, 1))
                asked += 1
                followed += COLOURS[int(mean.argmax())] == after["label"]
            seen.append((time.monotonic() - start, resident_mb(process.pid), *after["latency_ms"][:2], after["fps"]))
            time.sleep(ASKED_S)
        last = json.loads(page.get("/view")[1])
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    quarter = 60 * MINUTES / 4
    for number in range(4):
        rows = [row for row in seen if number * quarter <= row[0] < (number + 1) * quarter]
        mb, middle, high, fps = (median(values) for values in list(zip(*rows, strict=True))[1:])
        print(
            f"quarter {number + 1}: {mb:.1f} MB, latency {middle:.2f} ms, of one frame in ten more than {high:.2f} ms, "
            f"{fps:.1f} frames per second",
            flush=True,
        )
    full = [row[1] for row in seen if row[0] >= quarter]
    count = max(1, len(full) // 10)
    print(
        f"{MINUTES:g} minutes: memory {median(full[-count:]) - median(full[:count]):+.2f} MB after the first quarter; "
        f"{followed} of {asked} views carry the label of their picture; {last['number']} frames labelled, "
        f"{last['dropped']} dropped; it says: {said.strip().splitlines()[-1]}"
    )


if __name__ == "__main__":
    main()
