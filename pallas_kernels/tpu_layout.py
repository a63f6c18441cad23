"""Between the order of the model's arrays [B, T, N, G, D] and that of the TPU kernels [B, N, G, T, D]: both ways.

XLA moves such an axis at a quarter of the memory's bandwidth. Here a tile of queries passes through VMEM in float32,
where a head's tokens are every (G * N)-th row. The model's arrays are read and written as [B, T, G, N, D], which is how
the compiler lays them out on its own where N fills tiles better than G does.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import tpu

QUERIES = 256
"""Queries of a tile, the most that any kernel takes: group-major queries are padded to whole tiles."""

TILE = 128
"""Queries of all heads that a step moves."""

GATE_ROWS = 3 * tpu.SUBLANES
"""Rows of a tile of gates: those of each branch start at a whole register."""


def padded(queries: int) -> int:
    """T in whole tiles."""
    return -(-queries // QUERIES) * QUERIES


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def group_major(queries: int, x: Float[Array, "B T N G D"], valid: Int32[Array, "B"]) -> Float[Array, "B N G padded D"]:
    """Queries in the kernels' order.

    Args:
      queries: T.
      x: in the model's order.
      valid: queries of each row that count; the others, which may hold NaN, give 0 and get a gradient of 0.
    """
    return _to_rows(x, valid)


def _group_major_forward(queries: int, x: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _to_rows(x, valid), valid


def _group_major_backward(queries: int, valid: jax.Array, dx: jax.Array) -> tuple[jax.Array, None]:
    hidden = jnp.arange(dx.shape[3]) >= valid[:, None]
    dx = jnp.where(hidden[:, None, None, :, None], jnp.zeros((), dx.dtype), dx)
    return _from_rows(queries, (dx,), None), None


group_major.defvjp(_group_major_forward, _group_major_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated_sum(
    queries: int,
    outputs: tuple[Float[Array, "B N G padded D"], ...],
    gates: tuple[Float32[Array, "B N G padded"], ...],
    valid: Int32[Array, "B"],
) -> Float[Array, "B T N G D"]:
    """Sum of outputs times gates, in the model's order and the outputs' dtype.

    Args:
      queries: T.
      outputs: of up to three branches.
      gates: one per output.
      valid: queries of each row whose cotangent counts; that of others may hold NaN.
    """
    return _from_rows(queries, outputs, gates)


def _gated_sum_forward(queries: int, outputs: Any, gates: Any, valid: jax.Array) -> tuple[jax.Array, Any]:
    return _from_rows(queries, outputs, gates), (outputs, gates, valid)


def _gated_sum_backward(queries: int, saved: Any, do: jax.Array) -> Any:
    outputs, gates, valid = saved
    do = _to_rows(do, valid).astype(jnp.float32)
    doutputs = tuple((gate[..., None] * do).astype(x.dtype) for gate, x in zip(gates, outputs, strict=True))
    return doutputs, tuple((x.astype(jnp.float32) * do).sum(-1) for x in outputs), None


gated_sum.defvjp(_gated_sum_forward, _gated_sum_backward)


def _specs(shape: tuple[int, ...], queries: int) -> tuple[pl.BlockSpec, pl.BlockSpec]:
    """A tile of [B, N, G, padded, D] and of [B, T * G * N, D], which may end before the last tile."""
    _, heads, group, _, size = shape
    last = (queries - 1) // TILE
    return (
        pl.BlockSpec((1, heads, group, TILE, size), lambda b, i, *_: (b, 0, 0, i, 0)),
        pl.BlockSpec((1, TILE * group * heads, size), lambda b, i, *_: (b, jnp.minimum(i, last), 0)),
    )


def _call(name: str, kernel: Any, grid: tuple[int, ...], specs: Any, out: Any, scalars: Any, arrays: Any) -> jax.Array:
    *in_specs, out_spec = specs
    tile = math.prod(out_spec.block_shape)
    scratch = (tile // out.shape[-1], out.shape[-1])
    limit = tpu.vmem_limit(
        name,
        {
            "tiles": tpu.buffer_bytes(scratch, out.dtype, 2 * (len(arrays) + 1)),
            "a tile in float32": tpu.buffer_bytes(scratch, jnp.float32, 2),
        },
    )
    return pl.pallas_call(
        kernel,
        name=name,
        out_shape=out,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=in_specs,
            out_specs=out_spec,
            scratch_shapes=[pltpu.VMEM(scratch, jnp.float32)],
        ),
        compiler_params=tpu.compiler_params(("parallel",) * 2, limit),
        cost_estimate=tpu.cost(0.0, 0.0, *arrays, out),
        interpret=tpu.interpreted(),
    )(*scalars, *arrays)


def _to_rows(x: jax.Array, valid: jax.Array) -> jax.Array:
    batch, queries, heads, group, size = x.shape
    out = jax.ShapeDtypeStruct((batch, heads, group, padded(queries), size), x.dtype)
    rows, flat = _specs(out.shape, queries)
    x = x.swapaxes(2, 3).reshape(batch, -1, size)
    return _call("group_major", _to_rows_kernel, (batch, out.shape[3] // TILE), (flat, rows), out, (valid,), (x,))


def _to_rows_kernel(valid: Any, x_ref: Any, o_ref: Any, tile_ref: Any) -> None:
    _, heads, group, _, size = o_ref.shape
    tile_ref[...] = x_ref[0].astype(jnp.float32)
    count = valid[pl.program_id(0)] - pl.program_id(1) * TILE
    seen = jax.lax.broadcasted_iota(jnp.int32, (TILE, size), 0) < count
    for n in range(heads):
        for g in range(group):
            rows = tile_ref[pl.ds(g * heads + n, TILE, stride=group * heads)]
            o_ref[0, n, g] = jnp.where(seen, rows, 0.0).astype(o_ref.dtype)


def _from_rows(queries: int, arrays: tuple[jax.Array, ...], gates: tuple[jax.Array, ...] | None) -> jax.Array:
    batch, heads, group, _, size = arrays[0].shape
    rows, flat = _specs(arrays[0].shape, queries)
    out = jax.ShapeDtypeStruct((batch, queries * group * heads, size), arrays[0].dtype)
    specs, inputs = [rows] * len(arrays), list(arrays)
    if gates is not None:
        stacked = jnp.concatenate([tpu.pad_axis(gate, 2, tpu.SUBLANES) for gate in gates], axis=2)
        inputs.append(tpu.pad_axis(stacked, 2, GATE_ROWS))
        specs.append(pl.BlockSpec((1, heads, GATE_ROWS, TILE), lambda b, i: (b, 0, 0, i)))
    name = "model_order" if gates is None else "gated_sum"
    kernel = functools.partial(_from_rows_kernel, len(arrays))
    x = _call(name, kernel, (batch, -(-queries // TILE)), (*specs, flat), out, (), inputs)
    return x.reshape(batch, queries, group, heads, size).swapaxes(2, 3)


def _from_rows_kernel(count: int, *refs: Any) -> None:
    x_refs, gate_refs, (o_ref, tile_ref) = refs[:count], refs[count:-2], refs[-2:]
    _, heads, group, _, _ = x_refs[0].shape
    for n in range(heads):
        for gate_ref in gate_refs:
            unused = jnp.zeros((tpu.LANES - GATE_ROWS, TILE), jnp.float32)
            gates = jnp.concatenate([gate_ref[0, n], unused]).T
        for g in range(group):
            parts = [x_ref[0, n, g].astype(jnp.float32) for x_ref in x_refs]
            if gate_refs:
                parts = [gates[:, i * tpu.SUBLANES + g][:, None] * part for i, part in enumerate(parts)]
            tile_ref[pl.ds(g * heads + n, TILE, stride=group * heads)] = sum(parts[1:], parts[0])
    o_ref[0] = tile_ref[...].astype(o_ref.dtype)
