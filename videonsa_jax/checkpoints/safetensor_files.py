"""The safetensors files of a checkpoint folder, single or sharded: opened memory-mapped, checked, written."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from videonsa_jax.checkpoints.errors import CheckpointError
from videonsa_jax.checkpoints.weight_table import hub_key

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
STORED_DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
SHARD_BYTES = 4 * 2**30


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; `CheckpointError` if there is none."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file, expected one in a checkpoint folder") from None
    except (OSError, ValueError) as error:  # ValueError: neither JSON nor UTF-8
        raise CheckpointError(f"{path}: {error}, expected a JSON object") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, expected an object")
    return content


@dataclass(frozen=True)
class StoredTensors:
    """The tensors of an opened checkpoint, by key in the hub's layout.

    Attributes:
      folder: where they lie.
      shapes: shape of every tensor.
      dtypes: NumPy dtype of every tensor.
    """

    folder: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype]
    _slices: dict[str, Any]

    def read(self, key: str, *index: slice) -> np.ndarray:
        """Copies a part of a tensor out of the mapped file; `index` covers its leading axes."""
        return self._slices[key][tuple(index) or slice(None)]


def _shard_names(folder: Path) -> list[str]:
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(
                f"{folder / INDEX}: weight_map is {weight_map!r:.80}, expected the shard of every key"
            )
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
        if outside:
            raise CheckpointError(f"{folder / INDEX} names the shard {outside[0]!r}, expected a file of this folder")
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise CheckpointError(f"{folder / INDEX} names shards that are not there: {', '.join(absent)}")
        return names
    if (folder / SINGLE).is_file():
        return [SINGLE]
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    if shards:
        raise CheckpointError(
            f"{folder} holds {len(shards)} shard(s) ({shards[0]}, ...) but no {INDEX} that lists them"
        )
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise CheckpointError(
            f"{folder} holds weights in the pickle file {pickles[0]}, which can run code and is never read; "
            f"expected {SINGLE} or {INDEX}"
        )
    raise CheckpointError(f"{folder} holds no weights, expected {SINGLE} or {INDEX}")


@contextlib.contextmanager
def open_tensors(folder: Path) -> Iterator[StoredTensors]:
    """Maps a checkpoint's files and lists what they hold, reading headers only.

    Args:
      folder: holds model.safetensors, or shards and their index.

    Yields:
      The tensors, readable until the context ends.

    Raises:
      CheckpointError: no or several layouts of weights, a missing, damaged or truncated file, a dtype other than
        bfloat16, float16 and float32, a key twice, or an index that disagrees with its shards.
    """
    with contextlib.ExitStack() as opened:
        tensors = StoredTensors(folder, {}, {}, {})
        wrong_dtypes = []
        for name in _shard_names(folder):
            try:
                shard = opened.enter_context(safetensors.safe_open(folder / name, framework="numpy"))
            except (safetensors.SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{folder / name} is damaged or truncated at {(folder / name).stat().st_size} bytes ({error})"
                ) from error
            for stored_key in shard.keys():  # noqa: SIM118, a safe_open is no mapping
                key, tensor = hub_key(stored_key), shard.get_slice(stored_key)
                if key in tensors.shapes:
                    raise CheckpointError(f"{folder / name} holds {stored_key}, which this checkpoint holds already")
                if tensor.get_dtype() not in STORED_DTYPES:
                    wrong_dtypes.append(f"{stored_key} ({tensor.get_dtype()})")
                tensors.shapes[key] = tuple(tensor.get_shape())
                tensors.dtypes[key] = STORED_DTYPES.get(tensor.get_dtype())
                tensors._slices[key] = tensor
        if wrong_dtypes:
            raise CheckpointError(
                f"{folder} holds tensors of a dtype that is not read: {', '.join(wrong_dtypes)}; "
                f"expected one of {', '.join(STORED_DTYPES)} (quantised checkpoints are not)"
            )
        _check_index(folder, tensors)
        yield tensors


def _check_index(folder: Path, tensors: StoredTensors) -> None:
    if not (folder / INDEX).is_file():
        return
    listed = {hub_key(key) for key in read_json(folder / INDEX)["weight_map"]}
    different = sorted(listed ^ set(tensors.shapes))
    if different:
        raise CheckpointError(f"{folder / INDEX} and its shards disagree about {', '.join(different)}")


def write_shards(folder: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes tensors to model.safetensors, or to shards with an index; holds one shard in memory at a time.

    Args:
      folder: an existing folder.
      tensors: (key, array), made one by one as they are written.
    """
    shard: dict[str, np.ndarray] = {}
    shards: list[list[str]] = []
    total = held = 0

    def flush() -> None:
        safetensors.numpy.save_file(shard, folder / _part_name(len(shards)), metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for key, array in tensors:
        if shard and held + array.nbytes > SHARD_BYTES:
            flush()
            held = 0
        shard[key] = array
        held += array.nbytes
        total += array.nbytes
    flush()
    # How many shards there are, which their names say, is known only now.
    if len(shards) == 1:
        (folder / _part_name(0)).rename(folder / SINGLE)
        return
    weight_map = {}
    for number, keys in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / _part_name(number)).rename(folder / name)
        weight_map |= dict.fromkeys(keys, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _part_name(number: int) -> str:
    return f"part-{number:05d}.safetensors"
