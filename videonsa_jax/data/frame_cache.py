"""Sampled, resized frames of videos kept on disk, so that later epochs need not decode again.

Nothing is evicted: epochs visit every video in turn, and a cache that forgets the oldest would then never be hit. Once
the folder holds its limit, further videos are decoded each time.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

type Frames = UInt8[np.ndarray, "F H W 3"]

# Several processes fill one folder: each looks again at what it holds after this many additions of its own.
_RECOUNT_EVERY = 64


@dataclass
class FrameCache:
    """A folder of frames, which several processes may fill at once.

    Attributes:
      folder: where they are; made when first written to.
      limit: bytes that the folder may hold; a few videos more where several processes write at once.
    """

    folder: Path
    limit: int
    _held: int | None = field(default=None, repr=False)
    _added: int = field(default=0, repr=False)

    def frames(self, video: str | Path, sampling: tuple[object, ...], decode: Callable[[], Frames]) -> Frames:
        """The frames of a video, from the cache or else by `decode`, which then fills the cache.

        A video that has changed in size or time of change is another one. What cannot be read or written counts as not
        there: the cache never fails a sample.

        Args:
          video: path of the file.
          sampling: everything else that the frames depend on.
          decode: makes the frames.
        """
        path = self._path(video, sampling)
        if path is None:
            return decode()
        try:
            with path.open("rb") as file:
                return np.lib.format.read_array(file, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            frames = decode()
            self._keep(path, frames)
            return frames

    def _path(self, video: str | Path, sampling: tuple[object, ...]) -> Path | None:
        try:
            status = os.stat(video)
        except OSError:
            return None  # let the decoder say what is wrong
        told = repr((os.path.abspath(video), status.st_size, status.st_mtime_ns, sampling))
        return self.folder / f"{hashlib.sha256(told.encode()).hexdigest()[:32]}.npy"

    def _keep(self, path: Path, frames: Frames) -> None:
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            if self._held is None or self._added >= _RECOUNT_EVERY:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._held, self._added = sum(entry.stat().st_size for entry in os.scandir(self.folder)), 0
            if self._held + frames.nbytes > self.limit:
                return
            with part.open("wb") as file:
                np.lib.format.write_array(file, frames, allow_pickle=False)
            part.replace(path)
            self._held, self._added = self._held + frames.nbytes, self._added + 1
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink()
