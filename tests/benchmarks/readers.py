"""Video readers compared: PyAV as slimray uses it, decord and torchcodec: processor time of a clip, and correctness.

Speed: eight frames of clips of fight_surv, original and packed, from bytes in memory, one thread, in alternating pairs.
Correctness: every video of the shared data, the films that the tests generate, and clips with three flipped bits;
frames are compared with PyAV's, or with those of the intact file, each in a separate process, which is ended if it
hangs or dies. torchcodec is not a dependency (CONTRIBUTING.md says why): install it beside torch, and FFmpeg 4 to 8 as
shared libraries of the system. Run by `python -m tests.benchmarks readers`.
"""

import collections
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from tests.benchmarks.ingest import fight_surv
from tests.benchmarks.pairs import alternate
from tests.data.video.test_decoder import FILMS

from slimray.data.samples import BadSample
from slimray.data.video.clips import ClipRecipe, frame_indices
from slimray.data.video.movies import open_video
from slimray.data.video.repack import Pack, repack

READERS = ("pyav", "decord", "torchcodec")
ENDINGS = (".mp4", ".avi", ".mkv", ".mov", ".gif")
CLIPS, LIMIT_S, FLIPPED = 8, 600, 15


def frames(reader: str, data: bytes, choose: Callable[[int], list[int]]) -> np.ndarray:
    """The frames that `choose` takes of so many, uint8 `[n, H, W, 3]`."""
    if reader == "torchcodec":
        from torchcodec.decoders import VideoDecoder

        video = VideoDecoder(data, seek_mode="exact", num_ffmpeg_threads=1, dimension_order="NHWC")
        return video.get_frames_at(choose(len(video))).data.numpy()
    with open_video(data, reader) as video:
        return np.stack(video.frames(choose(video.num_frames)))


def clip(num_frames: int) -> list[int]:
    recipe = ClipRecipe(num_segments=8, mode="val")
    return np.unique(frame_indices(recipe, num_frames, np.random.default_rng(0))).tolist()


def shrunk(data: bytes) -> bytes:
    with open_video(data) as video:
        return repack(video, Pack("h264", 256))[1]


def speed(here: tuple[str, ...]) -> None:
    originals = [path.read_bytes() for path in sorted(fight_surv().glob("*/*.mp4"))[::26]][:CLIPS]
    for what, videos in (("as it is", originals), ("packed, short side 256", [shrunk(data) for data in originals])):

        def seconds(reader: str, videos: list[bytes] = videos) -> float:
            start = time.process_time()
            for data in videos:
                frames(reader, data, clip)
            return (time.process_time() - start) / len(videos)

        for reader in here[1:]:
            name = f"{what}: processor time of a clip, {reader} / pyav"
            print(alternate(name, lambda reader=reader: seconds(reader), lambda: seconds("pyav")), flush=True)


# ------------------------------------------------------------------------------------------ what is said of files


def files() -> Iterator[tuple[str, bytes, np.ndarray | None]]:
    """Name, bytes, and what the chosen frames are, where that is known from elsewhere."""
    root = fight_surv().parent
    for folder in ("codec_zoo", "damaged", "mmaction2_samples"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in ENDINGS:
                yield str(path.relative_to(root)), path.read_bytes(), None
    for name, make in FILMS.items():
        yield f"film: {name}", make(), None
    data = (root / "fight_surv/fight/fi099.mp4").read_bytes()
    intact, start, rng = frames("pyav", data, clip), data.index(b"mdat") + 4, np.random.default_rng(0)
    for number in range(FLIPPED):
        damaged = bytearray(data)
        for place in rng.integers(start, len(data), 3):
            damaged[place] ^= 1 << int(rng.integers(8))
        yield f"flipped bits: {number}", bytes(damaged), intact


def says(reader: str, data: bytes, wanted: np.ndarray | None) -> str:
    """The word for what a reader makes of a file."""
    try:
        found = frames(reader, data, clip)
    except BadSample:
        return "refused"
    except Exception:  # noqa: BLE001  (readers have errors of their own)
        return "error"
    if wanted is None:
        try:
            with open_video(data) as video:
                numbers = clip(video.num_frames)
                wanted = np.stack([picture for number, picture in enumerate(video.walk()) if number in numbers])
        except BadSample:
            return "frames of a file that PyAV refuses"
    if found.shape != wanted.shape:
        return "frames of another number or size"
    difference = np.abs(found.astype(int) - wanted).mean((1, 2, 3))
    return "same" if not difference.any() else "other pixels" if difference.max() < 8 else "other frames"


def child(reader: str, first: int) -> None:
    for number, (name, data, wanted) in enumerate(files()):
        if number >= first:
            print(json.dumps([number, name]), flush=True)
            print(json.dumps([number, name, says(reader, data, wanted)]), flush=True)


def odd_files(reader: str) -> dict[str, str]:
    """What the reader says of each file."""
    found: dict[str, str] = {}
    first, over = 0, False
    while not over:
        command = [sys.executable, "-m", "tests.benchmarks.readers", reader, str(first)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            last: list[Any] = []
            try:
                out, _ = process.communicate(timeout=LIMIT_S)
                over = process.returncode == 0
            except subprocess.TimeoutExpired:
                process.kill()
                out, _ = process.communicate()
            for line in out.splitlines():
                last = json.loads(line)
                found[last[1]] = last[2] if len(last) > 2 else "process ended or hung"
        if not over:
            assert last, f"{reader} does not start"
            first = last[0] + 1
    return found


def main() -> None:
    here = ["pyav"]
    for reader in READERS[1:]:
        with contextlib.suppress(Exception):
            __import__(reader)
            here.append(reader)
    print("readers:", *here, flush=True)
    speed(tuple(here))
    for reader in here:
        found = odd_files(reader)
        print(reader, dict(collections.Counter(found.values())), flush=True)
        for name, word in found.items():
            if word != "same" and not name.startswith("flipped"):
                print(f"  {name}: {word}", flush=True)
        flipped = collections.Counter(word for name, word in found.items() if name.startswith("flipped"))
        print(f"  of {FLIPPED} with flipped bits: {dict(flipped)}", flush=True)


if __name__ == "__main__":
    child(sys.argv[1], int(sys.argv[2]))
