"""Stand-ins for reading a video's header, in a module that reader processes can import."""

import os
import time
from pathlib import Path

from videonsa_jax.data.frames import VideoError, VideoInfo


def by_name(video: str, *, seconds_limit: float) -> VideoInfo:
    """What the file's name asks for; every call leaves a line in the folder's `calls`."""
    path = Path(video)
    with (path.parent / "calls").open("a") as calls:
        calls.write(f"{path.name}\n")
    kind = path.stem.partition("-")[0]
    if kind == "hangs":
        time.sleep(3600)
    if kind == "overruns":
        time.sleep(seconds_limit)
        raise VideoError(f"{video}: reading took longer than the limit")
    if kind == "crashes":
        os.abort()
    if kind == "broken":
        raise VideoError(f"{video}: nonsense, expected a readable video")
    if kind == "slow":
        time.sleep(0.3)
    return VideoInfo(width=640, height=360, duration=path.stat().st_size / 10, fps=30.0)
