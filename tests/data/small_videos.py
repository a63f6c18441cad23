"""Small video files, records and tokenizers for the data tests."""

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from videonsa_jax.data.tokenizer import train_tokenizer

GREY_STEP = 4  # grey levels between consecutive frames: more than the codec's rounding


def grey_frames(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frame k is uniformly of grey level k * GREY_STEP."""
    levels = (np.arange(count) * GREY_STEP).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3))


def numbers(frames: np.ndarray) -> list[int]:
    """Which of the `grey_frames` each frame is."""
    return np.rint(frames.reshape(len(frames), -1).mean(1) / GREY_STEP).astype(int).tolist()


def write_video(
    path: Path,
    frames: np.ndarray,
    *,
    rate: int = 10,
    times: Sequence[float] | None = None,
    start: float = 0.0,
    rotation: int = 0,
    hflip: bool = False,
    vflip: bool = False,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    sound_seconds: float = 0.0,
) -> Path:
    """Encodes frames as lossless H.264; `times` (seconds) overrides the constant rate, `start` shifts all."""
    times = np.arange(len(frames)) / rate if times is None else times
    tick = Fraction(1, 12_000)
    with av.open(str(path), "w", options=container or {}) as out:
        stream = out.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv444p"
        stream.options = {"qp": "0", "preset": "ultrafast"} | (options or {})
        stream.codec_context.time_base = tick
        stream.codec_context.thread_count = 1
        if rotation or hflip or vflip:
            stream.set_display_rotation(rotation, hflip=hflip, vflip=vflip)
        sound = out.add_stream("aac", rate=16_000) if sound_seconds else None
        for image, time in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = round((time + start) / tick), tick
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if sound is not None:
            silence = av.AudioFrame.from_ndarray(
                np.zeros((1, int(16_000 * sound_seconds)), np.float32), format="fltp", layout="mono"
            )
            silence.sample_rate = 16_000
            out.mux(sound.encode(silence))
            out.mux(sound.encode(None))
    return path


def write_tokenizer(path: Path) -> Path:
    """A tokenizer of a few hundred tokens with Qwen's special ones."""
    words = "What colour is the ball? Options: red green blue one two three. You are a helpful assistant. system user"
    train_tokenizer([words], path)
    return path


def conversation(*values: str) -> list[dict]:
    """Human and gpt entries in turn."""
    return [{"from": ("human", "gpt")[place % 2], "value": value} for place, value in enumerate(values)]


def record(video: str = "a.mp4", question: str = "What colour?", reply: str = "red", **fields: object) -> dict:
    """A LLaVA-Video style record."""
    entries = conversation(f"<image>\n{question}", reply)
    return {"id": f"{video}-{question}", "video": video, "conversations": entries} | fields


def write_records(path: Path, records: Sequence[object]) -> Path:
    """A JSON file of records."""
    path.write_text(json.dumps(list(records)))
    return path
