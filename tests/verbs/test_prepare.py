"""Preparation by real tasks: damaged files are quarantined, packed ones keep their frames, a killed job continues."""

import json
import os
import re
import signal

import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from tests.verbs.conftest import Shell, end_session, write_list
from tests.waits import wait_for

from slimray import runs
from slimray.data.bytes import read_whole
from slimray.data.video.decoder import Decoder

DISK = pafs.LocalFileSystem()
pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

PACK = """
kind: prepare
name: {name}
data: {{card: my_clips, root: {root}, splits: [train]}}
pack: {{format: {format}, short_side: 64, gop: 4}}
clips_per_shard: 4
"""


@pytest.fixture(scope="module")
def files(shell: Shell, shared) -> list:
    """Make a folder `mixed` of twelve clips, two of which are damaged."""
    good = sorted((shared / "data/video/fight_surv/fight").glob("*.mp4"), key=lambda f: f.stat().st_size)[:10]
    bad = [shared / "data/video/damaged" / name for name in ("truncated_half_no_moov.mp4", "zero_length.mp4")]
    write_list(shell, "mixed", [*good, *bad])
    return good


@pytest.mark.parametrize("format", ["h264", "jpeg"])
def test_packing_keeps_every_frame_and_quarantines_what_is_damaged(shell, files, format):
    name = f"packed-{format}"
    out = shell.ok("run", shell.write(f"{name}.yaml", PACK.format(name=name, root="mixed", format=format)))
    assert "train 10 clips (2 quarantined)" in out
    run = runs.open_run(str(shell.storage), name)
    bad = {row["path"]: row["reason"] for row in runs.read_parts(run, "quarantine")}
    assert set(bad) == {"truncated_half_no_moov.mp4", "zero_length.mp4"}
    index = pq.read_table(shell.storage / name / "data/train.parquet").to_pylist()
    with Decoder() as decoder:
        for row in index:
            original = decoder.probe(row["path"], (shell.folder / "mixed" / row["path"]).read_bytes())
            assert row["frames"] == original.frames
            assert min(row["width"], row["height"]) == 64
            assert re.fullmatch(r"shards/[0-9a-f]{2}/train-00000\d\.parquet", row["shard"])
            by_place = read_whole(DISK, str(shell.storage / name / "data"), row)
            assert by_place == read_whole(DISK, str(shell.storage / name / "data"), row | {"offset": -1})
            shard = (shell.storage / name / "data" / row["shard"]).read_bytes()
            assert by_place in shard[row["offset"] :][: row["length"]]
    packed = (runs.read_card(run) or {})["packed"]
    assert packed["psnr_db"] > 25
    assert packed["bytes_out"] > 0


def test_a_killed_job_goes_on_where_it_stopped(shell, files):
    parts = shell.storage / "resumed" / "data/parts"
    name = shell.write("resumed.yaml", PACK.format(name="resumed", root="mixed", format="h264") + "tasks: 1\n")
    child = shell.start("run", name)
    wait_for("the first part", lambda: any(parts.glob("*.json")))
    os.kill(child.pid, signal.SIGSTOP)  # so that it does not finish in the meantime
    done = {part.name: part.stat().st_mtime_ns for part in parts.glob("*.json")}
    end_session(child)
    shell.ok("run", name)
    after = {part.name: part.stat().st_mtime_ns for part in parts.glob("*.json")}
    assert len(after) == 3
    assert {name: after[name] for name in done} == done
    assert pq.read_table(shell.storage / "resumed" / "data/train.parquet").num_rows == 10


def test_generated_clips_are_the_same_each_time(shell):
    again = "{kind: prepare, name: again, data: {card: moving_shapes, clips: 60, size: 32, frames: 12}}"
    shell.ok("run", shell.write("again.yaml", again))
    for split in ("train", "val"):
        for clip in sorted((shell.storage / "data/data/clips" / split).glob("*.mp4")):
            assert clip.read_bytes() == (shell.storage / "again/data/clips" / split / clip.name).read_bytes()
    card = json.loads((shell.storage / "again/card.json").read_text())
    assert card["metrics"]["train"] == {"clips": 48, "quarantined": 0}
