"""The decoder with real files and child processes: an odd file gives a clip or a reason, and harms nothing else."""

import io
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from tests.waits import patience, wait_for

from slimray.data import child
from slimray.data.images.files import zip_frames
from slimray.data.samples import BadSample
from slimray.data.video.clips import ClipRecipe
from slimray.data.video.decoder import Decoder
from slimray.data.video.movies import open_video
from slimray.data.video.repack import Pack, Probe, repack

RECIPE = ClipRecipe(num_segments=8, size=32, resize=32, mode="val")
KEY = (0, 0, 0)
RATE = Fraction(30000, 1001)


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder(timeout_s=patience(30)) as decoder:
        yield decoder


@pytest.fixture(scope="module")
def video(shared) -> Path:
    return shared / "data/video"


@pytest.fixture(scope="module")
def good(video) -> bytes:
    return (video / "codec_zoo/derived/eight_frames.mp4").read_bytes()


@pytest.fixture(scope="module")
def long(video) -> bytes:
    """A video that takes over a second to repack."""
    return (video / "mmaction2_samples/tests/data/test.mp4").read_bytes()


def peak_mb(decoder: Decoder) -> int:
    """Return the peak memory of the child."""
    lines = Path(f"/proc/{decoder.pid}/status").read_text().splitlines()
    return int(next(line for line in lines if "VmHWM" in line).split()[1]) // 1000


# ---------------------------------------------------------------------------------------------- films made by code


def pictures(count: int, height: int = 64, width: int = 96) -> Iterator[np.ndarray]:
    """Pictures that encode their number: ten black or white squares above moving stripes."""
    y, x = np.mgrid[:height, :width]
    for number in range(count):
        wave = 128 + 60 * np.sin((x + 3 * number) / 9) + 50 * np.cos((y - number) / 7)
        picture = np.stack([wave, 255 - wave, np.roll(wave, 7, 0)], -1).clip(0, 255).astype(np.uint8)
        picture[:8] = 0
        for bit in range(10):
            picture[:8, 8 * bit : 8 * bit + 8] = 255 * (number >> bit & 1)
        yield picture


def number_of(picture: np.ndarray) -> int:
    return sum(1 << bit for bit in range(10) if picture[1:7, 8 * bit + 1 : 8 * bit + 7].mean() > 128)


def film(
    codec: str = "libx264", container: str = "mp4", count: int = 40, size: tuple[int, int] = (64, 96),
    pixels: str = "yuv420p", rate: Fraction = RATE, times_ms: list[int] | None = None, movflags: str = "",
    **options: str | int,
) -> bytes:  # fmt: skip
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container, options={"movflags": movflags} if movflags else {}) as output:
        stream = output.add_stream(codec, rate=rate, options={k.replace("_", "-"): str(v) for k, v in options.items()})
        stream.height, stream.width, stream.pix_fmt, stream.thread_count = *size, pixels, 1
        if times_ms:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, picture in enumerate(pictures(count, *size)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times_ms:
                frame.pts, frame.time_base = times_ms[number], Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return buffer.getvalue()


def at_usual_priority(encode: Callable[[], bytes]) -> bytes:
    """Encode; SVT-AV1 gives the thread of a root user real-time priority for good: undo it, or all others starve."""
    policy, param = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        return encode()
    finally:
        os.sched_setscheduler(0, policy, param)


FILMS = {
    "open GOP": lambda: film(bf=3, g=10, x264_params="open-gop=1:b-pyramid=normal:scenecut=0"),
    "pyramid": lambda: film(bf=5, g=12, x264_params="b-pyramid=normal:b-adapt=0"),
    "intra refresh": lambda: film(bf=0, g=10, x264_params="intra-refresh=1"),
    "interlaced": lambda: film(x264_params="tff=1", flags="+ildct+ilme"),
    "fragmented": lambda: film(movflags="frag_keyframe+empty_moov", g=10),
    "MPEG-TS": lambda: film(container="mpegts", bf=3, g=10),
    "raw": lambda: film(container="h264", bf=3, g=10),
    "full range": lambda: film(pixels="yuvj420p"),
    "10 bit 4:2:2": lambda: film(pixels="yuv422p10le"),
    "HEVC open GOP": lambda: film("libx265", x265_params="open-gop=1:keyint=10:bframes=4:log-level=none:pools=1"),
    "VP8": lambda: film("libvpx", "webm", b="300k", g=10),
    "VP9": lambda: film("libvpx-vp9", "webm", b="300k", g=10, cpu_used=8, lag_in_frames=25, auto_alt_ref=1),
    "AV1": lambda: at_usual_priority(lambda: film("libsvtav1", "matroska", preset=12, g=10)),
    "MPEG-2": lambda: film("mpeg2video", "mpeg", b="2M", g=12, bf=2, rate=Fraction(25)),
    "AVI with B-frames": lambda: film("mpeg4", "avi", b="1M", g=20, bf=2, rate=Fraction(25)),
    "WMV": lambda: film("wmv2", "asf", b="1M", g=20, rate=Fraction(25)),
    "FLV": lambda: film("flv", "flv", b="1M", g=20, rate=Fraction(25)),
    "odd size": lambda: film("libvpx-vp9", "webm", size=(63, 97), b="300k", cpu_used=8),
}


@pytest.mark.parametrize("name", FILMS)
def test_the_frame_asked_for_is_the_frame_that_comes(name):
    data, rng = FILMS[name](), np.random.default_rng(0)
    with open_video(data) as opened:
        every = list(opened.walk())
        assert [number_of(picture) for picture in every] == list(range(40))
    for _ in range(6):
        wanted = sorted(rng.choice(40, 6, replace=False).tolist())
        with open_video(data) as opened:
            for index, picture in zip(wanted, opened.frames(wanted), strict=True):
                assert np.array_equal(picture, every[index]), index


def test_frames_equal_those_of_decord_bit_by_bit(video):
    decord = pytest.importorskip("decord")
    files = sorted((video / "fight_surv").glob("*/*.mp4"))[::30]
    files += [video / f"codec_zoo/{name}" for name in ("flipping_a_pancake.mkv", "nasa_13013.mp4", "video_90.mov")]
    files += [video / "codec_zoo/derived/hevc.mp4", video / "mmaction2_samples/tests/data/test.avi"]
    rng = np.random.default_rng(0)
    for file in files:
        reader = decord.VideoReader(str(file), num_threads=1)
        wanted = sorted(rng.choice(len(reader), min(5, len(reader)), replace=False).tolist())
        with open_video(file.read_bytes()) as opened:
            assert opened.num_frames == len(reader), file
            assert np.array_equal(opened.frames(wanted), reader.get_batch(wanted).asnumpy()), file


def test_frames_come_in_the_order_in_which_a_player_shows_them(video):
    data = (video / "mmaction2_samples/tests/data/test.avi").read_bytes()  # its timestamps are guesses and wrong
    with av.open(io.BytesIO(data)) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with open_video(data) as opened:
        assert np.array_equal(opened.frames(range(164)), shown)
    with open_video(data) as opened:
        assert np.array_equal(list(opened.walk()), shown)


def remux(data: bytes, change, **options: str) -> bytes:
    """The same packets in a new file of the same kind, each after `change(packet, number)`."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(data)) as source:
        kind = "webm" if "webm" in source.format.name else "mp4"
        with av.open(buffer, "w", format=kind, options=options) as output:
            stream = output.add_stream_from_template(source.streams.video[0])
            for number, packet in enumerate(packet for packet in source.demux(video=0) if packet.size):
                packet = change(packet, number) or packet
                packet.stream = stream
                output.mux(packet)
    return buffer.getvalue()


def test_what_an_edit_list_cuts_off_is_no_frame():
    def earlier(packet, number):
        shift = round(10 / RATE / packet.time_base)
        packet.pts, packet.dts = packet.pts - shift, packet.dts - shift

    with open_video(remux(film(bf=2), earlier, avoid_negative_ts="disabled")) as opened:
        assert opened.num_frames == 30
        assert [number_of(picture) for picture in opened.frames([0, 7, 29])] == [10, 17, 39]
        assert [number_of(picture) for picture in opened.walk()] == list(range(10, 40))


def test_a_frame_that_vp8_hides_is_no_frame():
    def hidden(packet, number):
        if number == 17:
            body = bytearray(packet)
            body[0] &= ~16
            copy = av.Packet(bytes(body))
            copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
            return copy

    with open_video(remux(film("libvpx", "webm", b="300k", g=100), hidden)) as opened:
        assert [number_of(picture) for picture in opened.walk()] == [n for n in range(40) if n != 17]


def test_files_without_a_usable_timestamp_keep_every_frame():
    data = film(container="matroska", times_ms=[40 * (n - n % 2) for n in range(40)], bf=0)
    with open_video(data) as opened:
        assert [number_of(picture) for picture in opened.walk()] == list(range(40))


# -------------------------------------------------------------------------------------------------- the real files


def test_every_unusual_file_is_probed_and_gives_a_clip(video, decoder):
    found = {}
    for file in sorted((video / "codec_zoo").rglob("*.*")):
        if file.suffix in (".mp4", ".mkv", ".mov", ".avi", ".gif"):
            clip, flipped = decoder.clip(str(file), file.read_bytes(), RECIPE, KEY)
            assert clip.shape == (1, 8, 32, 32, 3)
            assert not flipped
            found[file.name] = decoder.probe(str(file), file.read_bytes())
    assert found == {
        "eight_frames.mp4": Probe(8, 30, 320, 240, "h264"),
        "hevc.mp4": Probe(60, 30, 320, 240, "hevc"),
        "mjpeg.avi": Probe(60, 30, 320, 240, "mjpeg"),
        "mpeg4.avi": Probe(60, 30, 320, 240, "mpeg4"),
        "one_frame.mp4": Probe(1, 30, 320, 240, "h264"),
        "vfr_h264.mp4": Probe(60, 7680 / 553, 320, 240, "h264"),
        "flipping_a_pancake.mkv": Probe(310, 30, 426, 240, "h264"),
        "h264_10bits.mp4": Probe(30, 30, 200, 200, "h264"),
        "h265_video.mp4": Probe(10, 10, 128, 128, "hevc"),
        "minimal.mp4": Probe(1, 25, 320, 240, "h264"),
        "nasa_13013.mp4": Probe(390, 30000 / 1001, 480, 270, "h264"),  # the larger of its two videos; the other has 325
        "newtonscradle.gif": Probe(36, 50, 200, 150, "gif"),
        "realshort.mp4": Probe(36, 45000 / 1499, 320, 240, "h264"),
        "video_0.mov": Probe(3, 30, 568, 320, "h264"),
        "video_90.mov": Probe(3, 30, 320, 568, "h264"),
        "video_colr_nclx_hdr10.mp4": Probe(3, 25, 2, 2, "h264"),
        "video_colr_nclx_rgb.mp4": Probe(3, 25, 2, 2, "h264"),
        "white.mp4": Probe(300, 30, 320, 240, "h264"),
    }


def test_every_damaged_file_is_refused_with_its_reason(video, decoder):
    reasons = {}
    for file in sorted((video / "damaged").glob("*.mp4")):
        for ask in (decoder.probe, lambda path, data: decoder.clip(path, data, RECIPE, KEY)):
            with pytest.raises(BadSample) as refusal:
                ask(str(file), file.read_bytes())
            reasons.setdefault(file.stem, str(refusal.value))
    data = "Invalid data found when processing input"
    assert reasons == {
        "bipbop_cbcs_audio_init": "holds no video that can be decoded",
        "bitflips_in_mdat": "frame 0 of 55 is missing or damaged",
        "chunk_out_of_range": f"does not decode ({data}: error reading header)",
        "corrupted": "frame 28 of 50 is missing or damaged",
        "invalid_userdata": "is truncated: 0 of 5544 frames are there",
        "no_timescale": "frame 0 of 182 is missing or damaged",
        "text_renamed": f"does not decode ({data})",
        "truncated_half_faststart": "is truncated: 26 of 55 frames are there",
        "truncated_half_no_moov": f"does not decode ({data}: moov atom not found)",
        "zero_length": "the file is empty",
    }
    assert decoder.refused == {}


def test_damaged_pixels_are_refused_not_shown(video):
    data = (video / "fight_surv/fight/fi099.mp4").read_bytes()
    with open_video(data) as opened:
        wanted = list(range(3, opened.num_frames, 8))
        intact = np.stack(opened.frames(wanted))
    start, rng, refused = data.index(b"mdat") + 4, np.random.default_rng(0), 0
    for _ in range(15):
        damaged = bytearray(data)
        for place in rng.integers(start, len(data), 3):
            damaged[place] ^= 1 << int(rng.integers(8))
        try:
            with open_video(bytes(damaged)) as opened:
                assert np.array_equal(opened.frames(wanted), intact)
        except BadSample:
            refused += 1
    assert refused >= 10  # decord gave wrong pixels for these


def test_frames_before_the_damage_are_given(video):
    data = (video / "damaged/corrupted.mp4").read_bytes()
    with open_video(data) as opened:
        assert len(opened.frames([0, 13, 27])) == 3
        with pytest.raises(BadSample, match="frame 40 of 50 is missing or damaged"):
            opened.frames([0, 40])


def test_a_file_cut_between_two_frames_breaks_off(video):
    data = (video / "damaged/truncated_half_faststart.mp4").read_bytes()
    with av.open(io.BytesIO(data)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    end = packets[24].pos + packets[24].size
    with pytest.raises(BadSample, match="is truncated: 25 of 55 frames are there"), open_video(data[:end]):
        pass


def test_metadata_in_another_encoding_does_no_harm():
    data = film().replace(b"Lavf", b"L\xe4\xf6f")
    with open_video(data) as opened:
        assert opened.num_frames == 40


def test_a_playlist_opens_no_other_file(video, decoder):
    target = video / "codec_zoo/white.mp4"
    for text in (
        f"ffconcat version 1.0\nfile {target}\n",
        f"ffconcat version 1.0\nfile {str(target)[1:]}\n",  # the child's folder is /
        f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile://{target}\n#EXT-X-ENDLIST\n",
    ):
        with pytest.raises(BadSample, match="does not decode"):
            decoder.probe(text, text.encode())


def test_a_size_too_large_is_refused_before_it_is_allocated(video):
    gif = bytearray((video / "codec_zoo/newtonscradle.gif").read_bytes())
    gif[6:10] = b"\xff\xff\xff\xff"  # the logical screen
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    png = bytearray(buffer.getvalue())
    png[16:24] = struct.pack(">II", 12_000, 12_000)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    with Decoder(timeout_s=patience(20)) as decoder:
        for name, data in (("huge.gif", gif), ("huge.png", png)):
            with pytest.raises(BadSample, match="too large to decode"):
                decoder.probe(name, bytes(data))
        assert peak_mb(decoder) < 150


def test_pictures_left_out_of_a_zip_are_missing_not_shifted(decoder):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 10, 10)).save(buffer, "JPEG")
    data = zip_frames({n: buffer.getvalue() for n in range(0, 16, 2)}, 16, fps=12.5)
    with open_video(data) as opened:
        assert (opened.num_frames, opened.fps) == (16, 12.5)
        assert len(opened.frames([0, 14])) == 2
    with pytest.raises(BadSample, match="frame 1 of 16 is missing"):
        decoder.probe("left_out.zip", data)
    with pytest.raises(BadSample, match="ZIP that does not hold numbered pictures"):
        decoder.probe("other.zip", data.replace(b"000002.jpg", b"report.doc"))
    with pytest.raises(BadSample, match="is not a picture that can be read"):
        decoder.probe("text.zip", zip_frames({0: b"text"}, 1))


# ---------------------------------------------------------------------------------------------- hangs and crashes


def is_gone(pid: int | None, zombie: bool = False) -> bool:
    """Return whether process `pid` is gone, or with `zombie` has ended and only waits for its parent to reap it."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return zombie and state == "Z"


def test_a_child_that_hangs_is_killed_and_costs_one_file(good):
    with Decoder(timeout_s=patience(20)) as decoder:
        expected, _ = decoder.clip("good", good, RECIPE, KEY)
        pid = decoder.pid
        assert pid is not None
        decoder.timeout_s = 0.5
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(BadSample, match=r"took over 0\.5 s"):
            decoder.clip("hangs", good, RECIPE, KEY)
        assert is_gone(pid)  # and no zombie
        assert decoder.pid is None
        decoder.timeout_s = patience(20)
        with pytest.raises(BadSample, match=r"took over 0\.5 s"):
            decoder.clip("hangs", good, RECIPE, KEY)
        assert decoder.pid is None  # refused without another try
        assert np.array_equal(decoder.clip("next", good, RECIPE, KEY)[0], expected)


def test_a_child_busy_in_c_is_killed_in_time(good, long):
    with Decoder(timeout_s=0.3) as decoder:
        with pytest.raises(BadSample, match=r"took over 0\.3 s"):
            decoder.repack("busy", long, Pack())
        decoder.timeout_s = patience(20)
        assert decoder.clip("next", good, RECIPE, KEY)[0].shape == (1, 8, 32, 32, 3)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_crash_costs_one_file(good, long, number):
    with Decoder(timeout_s=patience(20)) as decoder:
        decoder.clip("good", good, RECIPE, KEY)
        pid = decoder.pid
        assert pid is not None
        timer = threading.Timer(0.2, os.kill, (pid, number))
        timer.start()
        with pytest.raises(BadSample, match=f"decoding ended with {number.name}"):
            decoder.repack("crashes", long, Pack())
        assert is_gone(pid)
        decoder.clip("next", good, RECIPE, KEY)
        assert list(decoder.refused) == ["crashes"]


def test_a_child_that_dies_idle_costs_no_file(good):
    with Decoder(timeout_s=patience(20)) as decoder:
        decoder.clip("good", good, RECIPE, KEY)
        assert decoder.pid is not None
        os.kill(decoder.pid, signal.SIGKILL)
        wait_for("the child to end", lambda: is_gone(decoder.pid, zombie=True), 20)
        decoder.clip("good", good, RECIPE, KEY)
        assert decoder.refused == {}


def test_ctrl_c_and_sigterm_are_left_to_the_parent(good):
    with Decoder(timeout_s=patience(20)) as decoder:
        decoder.clip("good", good, RECIPE, KEY)
        pid = decoder.pid
        assert pid is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid, number)
            time.sleep(0.1)
            decoder.clip("good", good, RECIPE, KEY)
        assert decoder.pid == pid


def test_an_interrupted_request_leaves_no_answer_behind(good, long):
    def interrupt(*_):
        raise KeyboardInterrupt

    with Decoder(timeout_s=patience(20)) as decoder:
        expected, _ = decoder.clip("good", good, RECIPE, KEY)
        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        try:
            with pytest.raises(KeyboardInterrupt):
                decoder.repack("long", long, Pack())
        finally:
            signal.signal(signal.SIGALRM, before)
        assert decoder.pid is None
        assert np.array_equal(decoder.clip("good", good, RECIPE, KEY)[0], expected)
        assert decoder.refused == {}


def test_a_decoder_outlives_the_thread_that_first_used_it(good):
    with Decoder(timeout_s=patience(20)) as decoder:
        thread = threading.Thread(target=decoder.clip, args=("good", good, RECIPE, KEY))
        thread.start()
        thread.join()
        pid = decoder.pid
        time.sleep(0.2)
        decoder.clip("good", good, RECIPE, KEY)
        assert decoder.pid == pid


def test_close_leaves_no_process(good):
    decoder = Decoder(timeout_s=patience(20))
    decoder.clip("good", good, RECIPE, KEY)
    pid = decoder.pid
    assert pid is not None
    decoder.close()
    assert is_gone(pid)


PARENT = """
import sys, time
from pathlib import Path
from slimray.data.video.decoder import Decoder
from slimray.data.video.repack import Pack
data, decoder = Path(sys.argv[1]).read_bytes(), Decoder(float(sys.argv[2]))
decoder.probe("first", data)
print(decoder.pid, flush=True)
sys.stdin.readline()
decoder.repack("second", data, Pack())
"""


@pytest.mark.parametrize("state", ["idle", "busy", "hanging"])
def test_no_child_outlives_a_parent_that_is_killed(video, state):
    file = str(video / "mmaction2_samples/tests/data/test.mp4")
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, file, str(patience(60))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    born = int(parent.stdout.readline())
    if state == "hanging":
        os.kill(born, signal.SIGSTOP)
    if state != "idle":
        parent.stdin.write("go\n")
        time.sleep(0.2)
    assert not is_gone(born)
    parent.kill()
    parent.communicate()
    wait_for("the child to end", lambda: is_gone(born, zombie=True), 20)  # init has to reap it now


# ---------------------------------------------------------------------------------------------- start and protocol


def test_neither_a_slow_start_nor_noise_on_stdout_costs_a_file(good, tmp_path, monkeypatch):
    limit = patience(1)
    site = (
        f"import time; print('hello from the site'); time.sleep({1.5 * limit}); open({str(tmp_path / 'slept')!r}, 'w')"
    )
    (tmp_path / "sitecustomize.py").write_text(site)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Decoder(timeout_s=limit) as decoder:
        assert decoder.clip("good", good, RECIPE, KEY)[0].shape == (1, 8, 32, 32, 3)
    assert (tmp_path / "slept").exists()


def test_a_child_that_cannot_start_is_no_fault_of_the_file(good, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import os; os._exit(3)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Decoder(timeout_s=patience(20)) as decoder:
        with pytest.raises(RuntimeError, match="starting a decoding process ended with code 3"):
            decoder.clip("good", good, RECIPE, KEY)
        monkeypatch.delenv("PYTHONPATH")
        decoder.clip("good", good, RECIPE, KEY)
        assert decoder.refused == {}


def test_bodies_larger_than_any_buffer_pass_both_ways(good, decoder):
    padded = good + struct.pack(">I4s", 50_000_008, b"free") + bytes(50_000_000)
    recipe = ClipRecipe(num_segments=8, size=224, resize=256, mode="test", num_clips=10, crops=3, sampling="dense")
    clip, _ = decoder.clip("padded", padded, recipe, KEY)
    assert clip.shape == (30, 8, 224, 224, 3)
    assert clip.flags.writeable
    assert np.array_equal(clip, decoder.clip("good", good, recipe, KEY)[0])


def test_a_message_that_declares_too_much_is_not_read():
    for sizes in ((12, 1 << 40), (1 << 31, 12)):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(struct.pack("<IQ", *sizes) + b"{}")
            with pytest.raises(EOFError):
                child._receive(ours)


def test_the_memory_of_a_child_is_bounded(good, decoder):
    decoder.clip("good", good, RECIPE, KEY)
    limits = Path(f"/proc/{decoder.pid}/limits").read_text().splitlines()
    assert next(line for line in limits if "address space" in line).split()[3] == str(child.MAX_MEMORY)


def test_a_clip_depends_on_its_key_alone(video, decoder):
    data = (video / "codec_zoo/realshort.mp4").read_bytes()
    recipe = ClipRecipe(num_segments=4, size=64, flip=True)
    first = decoder.clip("a", data, recipe, (1, 2, 3))
    assert np.array_equal(decoder.clip("b", data, recipe, (1, 2, 3))[0], first[0])
    others = [decoder.clip("a", data, recipe, (1, 2, sample)) for sample in range(8)]
    assert len({clip.tobytes() for clip, _ in others}) == 8
    assert {flipped for _, flipped in others} == {True, False}


# --------------------------------------------------------------------------------------------------------- repack


def psnr(before: bytes, after: bytes) -> float:
    with open_video(before) as old, open_video(after) as new:
        difference = np.stack(list(old.walk())).astype(np.float64) - np.stack(list(new.walk()))
    return float(10 * np.log10(255**2 / np.square(difference).mean()))


def test_packing_as_h264_keeps_frames_times_and_states_its_loss(decoder):
    times = np.cumsum(np.random.default_rng(0).integers(17, 200, 40)).tolist()
    data = film(container="matroska", times_ms=times, bf=2)
    packed, probe, loss = decoder.repack("vfr", data, Pack(short_side=None, gop=6))
    with open_video(data) as old, open_video(packed) as new:
        assert new.num_frames == probe.frames == 40
        shown = [float((tick - new.ticks[0]) * new.tick) for tick in new.ticks]
        assert shown == pytest.approx([float((tick - old.ticks[0]) * old.tick) for tick in old.ticks])
    with av.open(io.BytesIO(packed)) as container:
        keys = [n for n, packet in enumerate(container.demux(video=0)) if packet.is_keyframe]
    assert max(np.diff(keys)) <= 6
    assert loss == pytest.approx(psnr(data, packed), abs=0.01)


def test_packing_twice_gives_the_same_bytes(video):
    data = (video / "codec_zoo/realshort.mp4").read_bytes()  # with x264's lookahead every fifth result differed
    rng, packed = np.random.default_rng(0), set()
    for _ in range(15):
        litter = [np.full(int(rng.integers(1, 400_000)), int(rng.integers(256)), np.uint8) for _ in range(20)]
        del litter  # it is what the next allocations find in memory
        with open_video(data) as opened:
            packed.add(repack(opened, Pack())[1])
    assert len(packed) == 1


def test_packing_keeps_fractional_rates(decoder):
    packed, probe, _ = decoder.repack("ntsc", film(), Pack())
    with open_video(packed) as opened:
        assert opened.fps == probe.fps == pytest.approx(30000 / 1001)


@pytest.mark.parametrize(("kind", "size"), [("h264", (96, 62)), ("jpeg", (97, 63))])
def test_packing_odd_sizes_cuts_what_h264_cannot_store(decoder, kind, size):
    data = FILMS["odd size"]()
    packed, probe, loss = decoder.repack("odd", data, Pack(kind, crf=5, quality=98))
    assert (probe.frames, probe.width, probe.height) == (40, *size)
    assert loss > 35
    with open_video(packed) as opened:
        assert [number_of(picture) for picture in opened.walk()] == list(range(40))


def test_packing_makes_the_short_side_smaller_never_larger(decoder, video):
    for name, size in (("video_0.mov", (128, 72)), ("video_90.mov", (72, 128)), ("video_colr_nclx_rgb.mp4", (2, 2))):
        _, probe, _ = decoder.repack(name, (video / "codec_zoo" / name).read_bytes(), Pack(short_side=72))
        assert (probe.width, probe.height) == size


def test_packing_as_jpeg_keeps_every_frame(decoder):
    data = film()
    packed, probe, loss = decoder.repack("jpeg", data, Pack("jpeg"))
    assert probe == Probe(40, pytest.approx(30000 / 1001), 96, 64, "jpeg")
    assert loss == pytest.approx(psnr(data, packed), abs=0.01)


def test_packing_a_long_video_takes_no_more_memory():
    with Decoder(timeout_s=patience(60)) as decoder:
        peaks = []
        for count in (50, 1000):
            decoder.repack(f"{count} frames", film(count=count, size=(256, 344), preset="ultrafast", g=30), Pack())
            peaks.append(peak_mb(decoder))
    assert peaks[1] - peaks[0] < 60  # MB; the frames alone are 264


def test_decord_reads_on_request_and_pyav_what_decord_cannot(shared):
    pytest.importorskip("decord")
    folder = shared / "data/video/codec_zoo"
    with Decoder() as decoder:
        for name in ("derived/eight_frames.mp4", "newtonscradle.gif"):
            data = (folder / name).read_bytes()
            recipe = ClipRecipe(num_segments=8, size=64, resize=73, mode="val")
            ours, _ = decoder.clip(name, data, recipe, (0, 0, 0))
            theirs, _ = decoder.clip(name, data, replace(recipe, reader="decord"), (0, 0, 0))
            assert np.array_equal(ours, theirs), name


# ------------------------------------------------------------------------------- what a container says of its video


def shown_by(data: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """An MP4 whose track is shown by the matrix (a, b, c, d): (x, y) at (a x + c y, b x + d y)."""
    a, b, c, d = (value << 16 for value in matrix)
    at = data.index(b"tkhd") + 4 + 40  # of version 0
    return data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[at + 36 :]


@pytest.mark.parametrize("matrix", [(a, b, c, d) for a in (-1, 0, 1) for b in (-1, 0, 1) for c in (-1, 0, 1)
                                    for d in (-1, 0, 1) if abs(a * d - b * c) == 1 and abs(a) + abs(b) == 1
                                    and abs(c) + abs(d) == 1])  # fmt: skip
def test_a_video_is_turned_and_mirrored_as_its_display_matrix_says(matrix):
    data = film(count=2)
    with open_video(data) as opened:
        plain = opened.frames([1])[0]
    with open_video(shown_by(data, matrix)) as opened:
        size, shown = opened.check(), opened.frames([1])[0]
    a, b, c, d = matrix
    height, width = plain.shape[:2]
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    to_x, to_y = a * x + c * y, b * x + d * y
    expected = np.zeros((height, width, 3) if a else (width, height, 3), np.uint8)
    expected[to_y - to_y.min(), to_x - to_x.min()] = plain
    assert np.array_equal(shown, expected)
    assert size == shown.shape[1::-1]


CUT = {
    **{name: FILMS[name] for name in ("fragmented", "MPEG-TS", "VP8", "AV1", "AVI with B-frames", "WMV", "FLV")},
    "Matroska": lambda: film(container="matroska"),
    "H.264 in FLV": lambda: film(container="flv"),
    "DASH": lambda: film(movflags="dash+frag_keyframe", g=10),
    "GIF": lambda: film("gif", "gif", pixels="rgb8", rate=Fraction(10)),
    "WebP": lambda: film("libwebp_anim", "webp", rate=Fraction(10)),
}


@pytest.mark.parametrize("name", CUT)
def test_a_cut_file_breaks_off_wherever_its_container_says_how_long_it_is(name):
    data = CUT[name]()
    with open_video(data) as opened:
        assert opened.num_frames == 40
    for share in (0.5, 0.6, 0.8, 0.97):
        end = int(len(data) * share) // 188 * 188 + 100  # packets of 188 bytes do not declare those that should follow
        with pytest.raises(BadSample, match="is truncated"), open_video(data[:end]):
            pass


def test_a_recording_that_declares_no_length_is_whole():
    buffer = io.BytesIO()
    live = av.open(buffer, "w", format="matroska", options={"live": "1"})
    with av.open(io.BytesIO(film(container="matroska"))) as source, live as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                output.mux(packet)
    with open_video(buffer.getvalue()) as opened:
        assert [number_of(picture) for picture in opened.walk()] == list(range(40))


def test_a_movie_with_an_empty_sample_keeps_the_others(shared):
    with open_video((shared / "data/reported/V17_zero_size_sample/a.mp4").read_bytes()) as opened:
        assert opened.num_frames == 59
        opened.check()


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
def test_joined_transport_streams_keep_every_frame(codec):
    one = film(codec, "mpegts", bf=2, g=10, rate=Fraction(25))
    with open_video(one + one) as opened:
        assert [number_of(picture) for picture in opened.walk()] == [*range(40), *range(40)]
    with open_video(one + one) as opened:
        assert [number_of(picture) for picture in opened.frames([3, 39, 40, 77])] == [3, 39, 0, 37]


def test_a_transport_stream_with_a_lost_packet_is_refused():
    data = film("mpeg2video", "mpegts", bf=2, g=10, rate=Fraction(25))
    places = [at for at in range(0, len(data), 188) if data[at + 1] & 31 == 1 and data[at + 2] == 0]  # of the video
    for place in places[20:-1:11]:
        lost, refusal = data[:place] + data[place + 188 :], r"is truncated|missing or damaged"
        with pytest.raises(BadSample, match=refusal), open_video(lost) as opened:
            opened.check()


@pytest.mark.parametrize("name", ["two_pieces_reversed", "two_pieces", "same_piece_twice", "trim_both", "trim_the_end"])
def test_the_pieces_of_an_edit_list_are_shown_in_its_order(shared, name):
    data = (shared / f"data/reported/V8_edit_lists/{name}.mp4").read_bytes()
    with av.open(io.BytesIO(data)) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with open_video(data) as opened:
        assert np.array_equal(list(opened.walk()), shown)
    with open_video(data) as opened:
        assert np.array_equal(opened.frames(range(0, len(shown), 3)), shown[::3])


def test_a_cover_picture_is_no_video(shared, decoder):
    for file in sorted((shared / "data/reported/V4_audio_with_cover").iterdir()):
        reason = "only a cover picture" if "cover" in file.name else "that can be decoded"
        with pytest.raises(BadSample, match=f"holds no video,? {reason}"):
            decoder.probe(file.name, file.read_bytes())


@pytest.mark.parametrize(
    ("codec", "container", "options"),
    [("apng", "apng", {"pixels": "rgb24"}), ("libwebp_anim", "webp", {"lossless": 1})],
)
def test_an_animation_keeps_every_frame(codec, container, options):
    with open_video(film(codec, container, rate=Fraction(10), **options)) as opened:
        assert [number_of(picture) for picture in opened.walk()] == list(range(40))
        assert [number_of(picture) for picture in opened.frames([2, 39])] == [2, 39]
        assert opened.fps == 10


def test_a_table_of_samples_that_cannot_be_is_refused_before_it_is_built(decoder):
    data = film()
    at = data.index(b"stsz") + 8
    with pytest.raises(BadSample, match="declares 300,000,000 samples"):
        decoder.probe("a.mp4", data[:at] + struct.pack(">II", 1, 300_000_000) + data[at + 8 :])
    with pytest.raises(BadSample, match="declares 300,000,000 samples"):
        decoder.probe("b.mp4", data[:at] + struct.pack(">II", 0, 300_000_000) + data[at + 8 :])
    assert peak_mb(decoder) < 400


def test_a_video_too_long_and_narrow_is_refused_before_it_is_scaled(decoder):
    frames = {0: png(np.zeros((30_000, 2, 3), np.uint8))}
    with pytest.raises(BadSample, match="is 2 x 30000 pixels, too elongated for a short side of 256"):
        decoder.clip("a.zip", zip_frames(frames, 1), ClipRecipe(mode="val"), KEY)


def test_a_video_of_single_pixels_gives_a_clip(decoder):
    clip, _ = decoder.clip("a.zip", zip_frames({0: png(np.full((1, 1, 3), 7, np.uint8))}, 1), ClipRecipe(size=16), KEY)
    assert (clip == 7).all()


def png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()
