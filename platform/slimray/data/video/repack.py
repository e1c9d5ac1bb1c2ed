"""Makes videos and pictures smaller for training, keeping every frame: short-GOP H.264, JPEG frames, smaller JPEGs."""

import io
from collections import deque
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
from PIL import Image

from slimray.data.images.files import read_picture, zip_frames
from slimray.data.samples import BadSample
from slimray.data.video.movies import Video, open_video


@dataclass(frozen=True)
class Probe:
    """Content of a decoded file: number of frames, frames per second (0 if unknown), size in pixels, codec."""

    frames: int
    fps: float
    width: int
    height: int
    codec: str


@dataclass(frozen=True)
class Pack:
    """Format of a clip for training: "h264" (gop, crf) or "jpeg" (quality); `short_side` None keeps the size."""

    format: str = "h264"
    short_side: int | None = 256
    gop: int = 12
    crf: int = 23
    quality: int = 90


class _Loss:
    """Accumulates the loss by encoding over all pixels, without holding pictures, as videos may be long."""

    def __init__(self) -> None:
        self.squares, self.values, self.frames = 0.0, 0, 0

    def add(self, before: np.ndarray, after: np.ndarray) -> None:
        difference = (before.astype(np.float32) - after).ravel()
        self.squares, self.values = self.squares + float(difference @ difference), self.values + before.size
        self.frames, (self.height, self.width) = self.frames + 1, before.shape[:2]

    @property
    def psnr(self) -> float | None:
        """PSNR in dB; None if nothing was lost."""
        return None if self.squares == 0 else 10 * float(np.log10(255**2 * self.values / self.squares))


def repack(video: Video, pack: Pack) -> tuple[dict[str, Any], bytes]:
    """Re-encode every frame; PSNR is over all pixels, against the resized frames given to the encoder.

    Returns the answer of `Decoder.repack`; raises BadSample if frames were lost.
    """
    loss = _Loss()
    encoded = (_encode_jpeg if pack.format == "jpeg" else _encode_h264)(video, pack, loss)
    with open_video(encoded) as again:
        if not video.num_frames == loss.frames == again.num_frames:
            raise BadSample(f"re-encoding kept {again.num_frames} of {video.num_frames} frames")
    found = Probe(loss.frames, video.fps, loss.width, loss.height, pack.format)
    return {"probe": asdict(found), "psnr": loss.psnr}, encoded


def _small(frame: np.ndarray, short_side: int | None, step: int) -> np.ndarray:
    """Return the frame with a short side of at most `short_side` and both sides multiples of `step`.

    A frame that is not scaled is cropped to multiples.
    """
    height, width = frame.shape[:2]
    scale = 1.0 if short_side is None else min(1.0, short_side / min(height, width))
    if scale == 1 and min(height, width) >= step:
        return frame[: height // step * step, : width // step * step]
    w, h = (max(step, round(side * scale / step) * step) for side in (width, height))
    return np.asarray(Image.fromarray(frame).resize((w, h), Image.Resampling.BILINEAR))


def shrink(picture: np.ndarray, short_side: int | None, quality: int) -> tuple[dict[str, Any], bytes]:
    """Return the answer of `Decoder.shrink`; no bytes if the file stays unchanged."""
    small, encoded, loss = _small(picture, short_side, step=1), b"", _Loss()
    if small.shape != picture.shape:
        buffer = io.BytesIO()
        Image.fromarray(small).save(buffer, "JPEG", quality=quality)
        encoded = buffer.getvalue()
        loss.add(small, read_picture(encoded))
    found = Probe(1, 0.0, small.shape[1], small.shape[0], "image")
    return {"probe": asdict(found), "psnr": loss.psnr if encoded else None}, encoded


def _encode_h264(video: Video, pack: Pack, loss: _Loss) -> bytes:
    """Encode an mp4 file with the timestamps of `video`, without lookahead, which makes x264's bytes vary by run."""
    buffer, waiting = io.BytesIO(), deque[np.ndarray]()
    back: Any = av.CodecContext.create("h264", "r")
    with av.open(buffer, "w", format="mp4") as container:
        options = {"crf": str(pack.crf), "g": str(pack.gop), "bf": "0", "rc-lookahead": "0", "threads": "1"}
        rate = Fraction(video.fps or 25).limit_denominator(100_000)
        stream: Any = container.add_stream("libx264", rate=rate, options={**options, "preset": "veryfast"})
        stream.pix_fmt, stream.thread_count, stream.codec_context.time_base = "yuv420p", 1, video.tick

        def put(frame: av.VideoFrame | None) -> None:
            for packet in stream.encode(frame):
                back.extradata = back.extradata or stream.codec_context.extradata
                compare(back.decode(packet))
                container.mux(packet)

        def compare(frames: list[av.VideoFrame]) -> None:
            for frame in frames:
                loss.add(waiting.popleft(), frame.to_ndarray(format="rgb24"))

        for pts, picture in zip(video.ticks, video.walk(), strict=True):
            waiting.append(np.ascontiguousarray(_small(picture, pack.short_side, step=2)))
            if not stream.codec_context.is_open:
                stream.height, stream.width = waiting[-1].shape[:2]
            frame = av.VideoFrame.from_ndarray(waiting[-1], format="rgb24")
            frame.pts, frame.time_base = pts - video.ticks[0], video.tick
            put(frame)
        put(None)
        compare(back.decode(None))
    return buffer.getvalue()


def _encode_jpeg(video: Video, pack: Pack, loss: _Loss) -> bytes:
    """Encode a ZIP of JPEG pictures."""
    encoded = {}
    for number, picture in enumerate(video.walk()):
        small, buffer = _small(picture, pack.short_side, step=1), io.BytesIO()
        Image.fromarray(small).save(buffer, "JPEG", quality=pack.quality)
        encoded[number] = buffer.getvalue()
        loss.add(small, read_picture(encoded[number]))
    return zip_frames(encoded, len(encoded), video.fps)
