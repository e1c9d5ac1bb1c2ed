"""What running an export needs: the size of a plain install, and the time and memory of a start.

`python -m tests.benchmarks runtime` installs this package without extras into a separate environment, by pip from the
index, with constraints.txt. Times are of whole processes, by the clock and in processor time, started in turn with an
empty one, TIMES times; memory is the largest resident set. `PLAIN_PYTHON=<an interpreter of such an environment>` uses
an existing one.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import astuple, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from tests.benchmarks.pairs import Ratio
from tests.runtime.exports import export, seeded
from tests.runtime.test_live import taken

from slimray import models
from slimray.data.images.pictures import ImageRecipe

ROOT = Path(__file__).resolve().parents[2]
TIMES = 9
CLEAN = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
IMPORT = "import slimray.runtime.loaded"
HELD = "print(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"  # kB
PREDICT = "import sys; from slimray import runtime; print(runtime.load(sys.argv[1])(sys.argv[2]).top)"


def installed(folder: Path) -> str:
    """An interpreter with a plain install."""
    if there := os.environ.get("PLAIN_PYTHON"):
        return there
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = str(folder / "bin/python")
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, "--constraint", str(ROOT / "constraints.txt"), str(ROOT)], check=True)
    return python


@dataclass(frozen=True)
class Process:
    """Seconds by the clock and of the processor that a process took, and the largest MB it held."""

    wall_s: float
    busy_s: float
    mb: float


def ran(python: str, code: str, *arguments: str) -> Process:
    """Run Python code. The process tells its memory itself: what wait4 tells is its parent's, where that is larger."""
    start = time.perf_counter()
    process = subprocess.Popen([python, "-c", f"{code}\n{HELD}", *arguments], env=CLEAN, stdout=subprocess.PIPE)
    assert process.stdout is not None
    said = process.stdout.read().split()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"{python} -c {code!r} ended with status {status}")
    return Process(time.perf_counter() - start, usage.ru_utime + usage.ru_stime, int(said[-1]) / 1024)


def sizes_mb(python: str) -> dict[str, float]:
    """MB of each distribution of an environment, without pip itself."""
    code = (
        "import importlib.metadata as m, json\n"
        "all = [d for d in m.distributions() if d.name not in ('pip', 'setuptools')]\n"
        "files = lambda d: {f.locate() for f in d.files or () if f.suffix != '.pyc'}\n"
        "print(json.dumps({d.name: sum(f.stat().st_size for f in files(d) if f.exists()) / 1e6 for d in all}))\n"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, env=CLEAN)
    return json.loads(done.stdout)


def main() -> None:
    """Print size, times and memory."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        python = installed(folder / "plain")
        sizes = sizes_mb(python)
        largest = sorted(sizes, key=lambda name: -sizes[name])[:4]
        print(
            f"plain install: {sum(sizes.values()):.0f} MB on disk in {len(sizes)} distributions (Python not counted), "
            + ", ".join(f"{name} {sizes[name]:.0f}" for name in largest),
            flush=True,
        )
        net = seeded(models.build("mobilenetv2", num_classes=3))
        where = export(folder / "net", net, torch.randn(2, 3, 224, 224), taken(ImageRecipe(size=224, resize=224)))
        picture = folder / "a.png"
        pixels = np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)
        Image.fromarray(pixels).save(picture)
        for name, code, arguments in (
            ("import", IMPORT, ()),
            ("load and predict", PREDICT, (str(where), str(picture))),
        ):
            ran(python, code, *arguments)  # from now on its files are in memory
            pairs = [(ran(python, code, *arguments), ran(python, "pass")) for _ in range(TIMES)]
            took, empty = zip(*pairs, strict=True)
            wall, busy, mb = (median(values) for values in zip(*map(astuple, took), strict=True))
            ratio = Ratio(
                f"{name} over an empty process, processor time",
                tuple(one.busy_s for one in took),
                tuple(one.busy_s for one in empty),
            )
            print(f"{name}: {wall:.2f} s ({busy:.2f} s of the processor), {mb:.0f} MB; {ratio}", flush=True)


if __name__ == "__main__":
    main()
