"""Loading and saving models as Hugging Face folders: config.json, safetensors, and the processor's files."""

import functools
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array

from videonsa_jax.checkpoints import hf_config, safetensor_files
from videonsa_jax.checkpoints.errors import CheckpointError
from videonsa_jax.checkpoints.safetensor_files import StoredTensors
from videonsa_jax.checkpoints.weight_table import (
    EMBEDDING_KEY,
    HEAD_KEY,
    PATCH_EMBED,
    Weight,
    is_gate,
    stored_array,
    weights_of,
)
from videonsa_jax.configs import ModelConfig, NSAConfig
from videonsa_jax.models import VideoNSA
from videonsa_jax.training.mesh import state_shardings

if TYPE_CHECKING:
    from videonsa_jax.processor import Processor

DTYPES = ("bfloat16", "float32")
_ROWS_AT_ONCE = 8192  # of the vocabulary, when two matrices are compared


def load_pretrained(
    path: str | os.PathLike,
    dtype: str = "bfloat16",
    nsa: NSAConfig | str | None = "auto",
    mesh: Mesh | None = None,
) -> tuple[VideoNSA, "Processor"]:
    """Loads a model and its processor from a Hugging Face folder; `load_model` has the arguments and errors.

    Returns:
      The model, and the processor that turns messages into its batches.
    """
    from videonsa_jax.processor import load_processor  # needs the tokenizer and image libraries, which weights do not

    model = load_model(path, dtype, nsa, mesh)
    return model, load_processor(Path(path), model.config)


def save_pretrained(model: VideoNSA, processor: "Processor", path: str | os.PathLike) -> None:
    """Saves a model and its processor as a folder that transformers and `load_pretrained` read; see `save_model`."""
    from videonsa_jax.processor import save_processor

    _save(model, path, lambda folder: save_processor(processor, folder))


def load_model(
    path: str | os.PathLike,
    dtype: str = "bfloat16",
    nsa: NSAConfig | str | None = "auto",
    mesh: Mesh | None = None,
) -> VideoNSA:
    """Loads Qwen2.5-VL or VideoNSA weights from a Hugging Face folder straight onto the devices.

    Files are memory-mapped. Each device's part of a parameter is filled on the device, one layer at a time, so the
    host holds the slices of two layers and the one being read, beside page cache.

    Args:
      path: folder with config.json and model.safetensors, or shards with their index; a `videonsa` block in
        config.json says how its gates are to be run.
      dtype: "bfloat16" or "float32", of parameters and activations.
      nsa: "auto" obeys the folder: its `videonsa` block; without one, gates mean the published checkpoint
        (dialect "released") and no gates mean plain Qwen2.5-VL. An `NSAConfig` wins over the folder; gates that are
        not there are then initialised (docs/attention.md). None leaves gates out: dense throughout. Every choice
        that the folder did not make is told in one warning.
      mesh: from `training.mesh.make_mesh`; parameters are split as training splits them. None: the first device.

    Returns:
      The model. `model(batch, attention="dense")` runs a gated one densely.

    Raises:
      CheckpointError: the folder cannot be read; keys that no parameter takes, that are missing or that have another
        shape are all named in one message.
      ValueError: `dtype` or `nsa` is none of the above.
    """
    folder = Path(path)
    if dtype not in DTYPES:
        raise ValueError(f'dtype is {dtype!r}, expected "{DTYPES[0]}" or "{DTYPES[1]}"')
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such folder, expected a local Hugging Face folder (`hf download {folder} --local-dir DIR`)"
        )
    read = hf_config.read_config(folder)
    with safetensor_files.open_tensors(folder) as tensors:
        has_gates = any(map(is_gate, tensors.shapes))
        config, notice = hf_config.choose_nsa(folder, read, has_gates, nsa)
        graphdef, abstract, paths = _abstract_model(config, dtype)
        shardings = _shardings(abstract, mesh)
        leaves, structure = jax.tree.flatten(abstract)
        shapes = {name: leaf.shape for name, leaf in zip(paths, leaves, strict=True)}
        weights = weights_of(config, shapes)
        new_gates = nsa not in ("auto", None) and not has_gates
        _check_keys(tensors, weights, dense=config.nsa is None, new_gates=new_gates)
        if notice:
            warnings.warn(notice, stacklevel=2)
        sharding_of = dict(zip(paths, jax.tree.leaves(shardings), strict=True))
        parts = {name: [weight for weight in weights.values() if weight.path == name] for name in paths}
        gates = {name for name in paths if new_gates and any(is_gate(weight.key) for weight in parts[name])}
        arrays = _initial_values(config, dtype, {name: sharding_of[name] for name in paths if name in gates})
        for name in paths:
            if name not in gates:
                arrays[name] = _fill(shapes[name], jnp.dtype(dtype), sharding_of[name], parts[name], tensors)
    return nnx.merge(graphdef, jax.tree.unflatten(structure, [arrays[name] for name in paths]))


def _abstract_model(config: ModelConfig, dtype: str) -> tuple[Any, Any, list[str]]:
    """The model's structure, the shapes of its parameters, and their paths in the order of the tree's leaves."""
    make = functools.partial(VideoNSA, config, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    return graphdef, state, _paths(state)


def _paths(state: Any) -> list[str]:
    # The last entry of a tree path is the variable's value.
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [jax.tree_util.keystr(path[:-1], simple=True, separator="/") for path, _ in leaves]


def _shardings(abstract: Any, mesh: Mesh | None) -> Any:
    if mesh is not None:
        return state_shardings(abstract, mesh)
    return jax.tree.map(lambda _: SingleDeviceSharding(jax.local_devices()[0]), abstract)


def _check_keys(tensors: StoredTensors, weights: Mapping[str, Weight], *, dense: bool, new_gates: bool) -> None:
    """Raises unless every stored tensor is a parameter's and every parameter's tensor is stored."""
    stored, optional = set(tensors.shapes), set()
    if HEAD_KEY in stored and HEAD_KEY not in weights and EMBEDDING_KEY in stored:  # tied, yet both are written
        _check_tied(tensors)
        optional.add(HEAD_KEY)
    if dense:
        optional |= {key for key in stored if is_gate(key)}
    wanted = {key for key in weights if not (new_gates and is_gate(key))}
    unmapped, missing = sorted(stored - set(weights) - optional), sorted(wanted - stored)
    mis_shaped = [
        f"{key} {list(tensors.shapes[key])} (expected {list(weights[key].shape)})"
        for key in sorted(wanted & stored)
        if tensors.shapes[key] != weights[key].shape
    ]
    faults = {"unmapped": unmapped, "missing": missing, "mis-shaped": mis_shaped}
    if any(faults.values()):
        counted = [f"{len(keys)} {kind}: {', '.join(keys)}" for kind, keys in faults.items() if keys]
        raise CheckpointError(
            f"{tensors.folder}: the tensors do not match {hf_config.CONFIG}; {'; '.join(counted)} (keys in the hub's "
            "layout)"
        )


def _check_tied(tensors: StoredTensors) -> None:
    head, embedding = tensors.shapes[HEAD_KEY], tensors.shapes[EMBEDDING_KEY]
    starts = range(0, embedding[0], _ROWS_AT_ONCE) if head == embedding else ()
    rows = [slice(start, min(start + _ROWS_AT_ONCE, embedding[0])) for start in starts]
    if head != embedding or not all(
        np.array_equal(tensors.read(HEAD_KEY, part), tensors.read(EMBEDDING_KEY, part)) for part in rows
    ):
        raise CheckpointError(
            f"{tensors.folder}: {HEAD_KEY} differs from {EMBEDDING_KEY}, but {hf_config.CONFIG} says "
            "tie_word_embeddings is true"
        )


def _initial_values(config: ModelConfig, dtype: str, shardings: Mapping[str, Sharding]) -> dict[str, Array]:
    """The named parameters as a new model has them; XLA drops the rest of its initialisation."""
    if not shardings:
        return {}

    def initialise() -> dict[str, Array]:
        make = functools.partial(VideoNSA, config, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
        state = nnx.state(make(nnx.Rngs(0)))
        every = dict(zip(_paths(state), jax.tree.leaves(state), strict=True))
        return {name: every[name] for name in shardings}

    return jax.jit(initialise, out_shardings=dict(shardings))()


def _fill(
    shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding, weights: list[Weight], tensors: StoredTensors
) -> Array:
    """One parameter, each device's part filled there.

    `jax.make_array_from_callback` would hold the parts of all of a host's devices at once.
    """
    by_layer = {weight.layer: weight for weight in weights}
    parts = []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = [slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True)]
        if None in by_layer:
            parts.append(_arrange(_read(tensors, by_layer[None], bounds, device), by_layer[None].is_kernel, dtype))
        else:
            layers = [by_layer[layer] for layer in range(bounds[0].start, bounds[0].stop)]
            parts.append(_fill_stack(layers, bounds[1:], dtype, device, tensors))
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def _read(tensors: StoredTensors, weight: Weight, bounds: list[slice], device: jax.Device) -> Array:
    """A part of a stored tensor on a device, `[out, in]` or `[n]`, in the stored dtype."""
    if weight.path == PATCH_EMBED:  # stored [out, channel, frame, row, column]
        array = tensors.read(weight.key, bounds[1])
        array = array.reshape(len(array), -1)[:, bounds[0]]
    else:
        array = tensors.read(weight.key, *(bounds[::-1] if weight.is_kernel else bounds))
    return jax.device_put(array, device)


def _fill_stack(
    layers: list[Weight], bounds: list[slice], dtype: np.dtype, device: jax.Device, tensors: StoredTensors
) -> Array:
    shape = (len(layers), *(part.stop - part.start for part in bounds))
    stacked = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=SingleDeviceSharding(device))(shape, dtype)
    previous = None
    for layer, weight in enumerate(layers):
        array = _read(tensors, weight, bounds, device)
        stacked = _write_layer(stacked, array, layer, weight.is_kernel)
        # The next layer is read while this one is copied, but no further ahead: the host's memory stays bounded.
        if previous is not None:
            previous.block_until_ready()
        previous = array
    return stacked.block_until_ready()


@functools.partial(jax.jit, static_argnames=("is_kernel", "dtype"))
def _arrange(array: Array, is_kernel: bool, dtype: np.dtype) -> Array:
    return (array.T if is_kernel else array).astype(dtype)


@functools.partial(jax.jit, donate_argnums=0, static_argnames="is_kernel")
def _write_layer(stacked: Array, array: Array, layer: int | Array, is_kernel: bool) -> Array:
    return stacked.at[layer].set(_arrange(array, is_kernel, stacked.dtype))


def save_model(model: VideoNSA, path: str | os.PathLike) -> None:
    """Saves weights and config.json as a folder that transformers' `from_pretrained` and `load_model` read.

    Tensors keep their dtype and have the keys of the hub's checkpoints (`model.layers.*`, `visual.*`), which
    transformers 4.49 and newer releases read; gates are `self_attn.g_proj_1` and `g_proj_2`, as in the published
    checkpoint (plain transformers leaves them out, with a warning). config.json is flat, with a `videonsa` block. The
    folder appears under its name only when whole; parameters may lie on several devices of one process.

    Args:
      model: any `VideoNSA` whose parameters are all bfloat16 or all float32.
      path: a folder that does not exist yet, or is empty.

    Raises:
      CheckpointError: the folder is not empty, parameters have another dtype, or transformers has no place for a
        value of the config.
      NotImplementedError: there are several processes.
    """
    _save(model, path, lambda folder: None)


def _save(model: VideoNSA, path: str | os.PathLike, write_processor) -> None:
    folder = Path(path)
    if jax.process_count() > 1:
        raise NotImplementedError(f"saving from {jax.process_count()} processes is not implemented, expected one")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists already, expected a new or empty folder")
    state = nnx.state(model)
    arrays = dict(zip(_paths(state), jax.tree.leaves(state), strict=True))
    dtypes = sorted({array.dtype.name for array in arrays.values()})
    if len(dtypes) > 1 or dtypes[0] not in DTYPES:
        raise CheckpointError(
            f"the model's parameters are {' and '.join(dtypes)}, expected all {' or all '.join(DTYPES)}"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".unfinished", dir=folder.parent))
    try:
        write_processor(unfinished)
        hf_config.write_config(unfinished, model.config, dtypes[0])
        weights = weights_of(model.config, {name: array.shape for name, array in arrays.items()})
        safetensor_files.write_shards(unfinished, _stored_tensors(weights, arrays))
        unfinished.chmod(0o755)  # mkdtemp's is 0o700
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _stored_tensors(weights: Mapping[str, Weight], arrays: Mapping[str, Array]) -> Iterator[tuple[str, np.ndarray]]:
    for key, weight in weights.items():
        array = arrays[weight.path]
        yield key, stored_array(weight, np.asarray(array if weight.layer is None else _layer_of(array, weight.layer)))


def _layer_of(stacked: Array, layer: int) -> Array:
    if isinstance(stacked.sharding, NamedSharding):
        return _replicated_layer(stacked, layer, NamedSharding(stacked.sharding.mesh, PartitionSpec()))
    return _replicated_layer(stacked, layer, stacked.sharding)


@functools.partial(jax.jit, static_argnames="sharding")
def _replicated_layer(stacked: Array, layer: int | Array, sharding: Sharding) -> Array:
    return jax.lax.with_sharding_constraint(stacked[layer], sharding)
