"""Native Sparse Attention over the visual stream: three branches and their gates."""

import contextlib
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float, Int

from pallas_kernels import gpu, nsa_gpu, nsa_tpu, nsa_triton, registry, triton_calls, validation
from pallas_kernels.block_selection.api import block_selection
from pallas_kernels.block_selection.choice import replaced_choice
from pallas_kernels.common import ArrayLike, Scalar, query_indices, resolve_lengths, zero_where
from pallas_kernels.compressed_attention.api import compressed_attention
from pallas_kernels.selected_attention.api import selected_attention
from pallas_kernels.stripes import gather_stripes, stripe_starts
from pallas_kernels.window_attention.api import window_attention

Branch = Literal["compressed", "selected", "window"]
BRANCHES: tuple[Branch, ...] = ("compressed", "selected", "window")

_OPERATIONS = ("compressed_attention", "block_selection", "selected_attention", "window_attention")


def block_means(x: Float[ArrayLike, "B S N D"], block_size: int) -> Float[jax.Array, "B M N D"]:
    """Means of the complete blocks, accumulated in float32: the compression map of VideoNSA.

    Args:
      x: keys (after M-RoPE) or values.
      block_size: keys per block.

    Returns:
      One mean per complete block, M = S // block_size of them, in x's dtype.
    """
    batch, keys, *rest = x.shape
    blocks = keys // block_size
    whole = jnp.asarray(x)[:, : blocks * block_size].reshape(batch, blocks, block_size, *rest)
    return whole.mean(axis=2, dtype=jnp.float32).astype(x.dtype)


def nsa_attention(
    q: Float[ArrayLike, "B T N G D"],
    k: Float[ArrayLike, "B S N D"],
    v: Float[ArrayLike, "B S N D"],
    gate_logits: Float[ArrayLike, "B T N G 3"],
    *,
    block_size: int = 64,
    block_count: int = 32,
    window_size: int = 256,
    gate_temperature: float = 0.3,
    init_blocks: int = 0,
    local_blocks: int = 1,
    q_offset: Scalar = 0,
    lengths: Int[ArrayLike, "B"] | None = None,
    branches: Sequence[Branch] = BRANCHES,
    implementation: registry.Implementation = None,
    block_indices: Int[ArrayLike, "B T N n"] | None = None,
    choose_anyway: bool = False,
) -> Float[jax.Array, "B T N G D"]:
    """Computes g_cmp o_cmp + g_slc o_slc + g_win o_win with g = sigmoid(gate_logits / gate_temperature).

    Per shard and free of collectives; differentiable in q, k, v and gate_logits.

    Source: VideoNSA (arXiv 2510.02295) section 2, on NSA (arXiv 2502.11089) section 3.

    Args:
      q: queries after M-RoPE, N KV heads x G query heads of each; float32, bfloat16 or float16.
      k: keys after M-RoPE, in q's dtype.
      v: values, likewise.
      gate_logits: any floating dtype, last axis in the order (compressed, selected, window).
      block_size: keys per block (s), of compression and selection.
      block_count: selected blocks per query (n), the current one included.
      window_size: keys in the window (w), the query's own included.
      gate_temperature: divides the gate logits.
      init_blocks: leading blocks that are always selected.
      local_blocks: trailing blocks that are always selected; the current one always is.
      q_offset: absolute index of the first query, one scalar.
      lengths: valid keys per row, in absolute indices. Keys at or past are never read, queries at or past give 0 and
        send no gradient. None: S.
      branches: the branches whose output counts. Without "compressed", its probabilities still choose the blocks.
      implementation: a name for all operations, a dict from operation to name, or None for the device's best.
      block_indices: private to tests and benchmarks: the selected blocks, instead of `block_selection`'s choice.
      choose_anyway: private to benchmarks: `block_selection` runs beside `block_indices`, which have its n places.

    Returns:
      The gated sum, in q's dtype.

    Raises:
      ValueError: shapes or sizes that do not fit, unknown branches, an unknown implementation.
      TypeError: a dtype that does not fit.
      NotImplementedError: a named implementation does not exist or does not cover the call.
    """
    validation.check_queries(q)
    validation.check_keys(q, "k", k)
    validation.check_keys(q, "v", v)
    validation.check_same_shape("v", v, "k", k)
    validation.check_shape("gate_logits", gate_logits, (*q.shape[:-1], 3), "[B, T, N, G, 3]")
    validation.check_positive("block_size", block_size)
    validation.check_positive("window_size", window_size)
    validation.check_block_choice(block_count, init_blocks, local_blocks)
    validation.check_integers("lengths", lengths, q.shape[:1], "[B]")
    if gate_temperature <= 0:
        raise ValueError(f"gate_temperature is {gate_temperature}, expected above 0")
    if not set(branches) <= set(BRANCHES) or len(set(branches)) != len(branches):
        raise ValueError(f"branches is {tuple(branches)}, expected distinct names out of {BRANCHES}")
    registry.check(implementation)

    q, k, v, gate_logits = (jnp.asarray(x) for x in (q, k, v, gate_logits))
    ragged = lengths is not None or not isinstance(q_offset, int) or q_offset + q.shape[1] > k.shape[1]
    lengths = resolve_lengths(lengths, q.shape[0], k.shape[1])
    past = query_indices(q.shape[1], q_offset) >= lengths[:, None]
    scaled_logits = zero_where(past, gate_logits).astype(jnp.float32) / gate_temperature
    shared = {"q_offset": q_offset, "lengths": lengths, "implementation": implementation}
    choice = {"block_count": block_count, "init_blocks": init_blocks, "local_blocks": local_blocks}
    choose = "selected" in branches and (block_indices is None or choose_anyway)

    first_choice = registry.first_choice_of_all("nsa_attention", _OPERATIONS, implementation)
    on_gpu = {"mosaic_gpu": (gpu.on_hopper, nsa_gpu.HOPPER), "triton": (triton_calls.on_nvidia, nsa_triton.TRITON)}
    if first_choice in on_gpu and nsa_gpu.covers(q, k, block_size, branches):
        on_device, operations = on_gpu[first_choice]
        # What it does not cover is left to the operations, which say so or fall back.
        with contextlib.suppress(NotImplementedError):
            return on_device(nsa_gpu.attention)(
                q,
                k,
                v,
                scaled_logits,
                block_size=block_size,
                window_size=window_size,
                q_offset=q_offset,
                length=lengths,
                ragged=ragged,
                branches=branches,
                block_indices=None if block_indices is None else jnp.asarray(block_indices),
                choose_anyway=choose_anyway,
                choice=choice,
                operations=operations,
            )

    gates = jax.nn.sigmoid(scaled_logits)
    k_blocks = v_blocks = None
    if choose or "compressed" in branches:
        k_blocks, v_blocks = block_means(k, block_size), block_means(v, block_size)

    if first_choice == "mosaic_tpu" and nsa_tpu.covers(q, k, block_size, branches) and not choose_anyway:
        # As above.
        with contextlib.suppress(NotImplementedError):
            return nsa_tpu.attention(
                q,
                k,
                v,
                k_blocks,
                v_blocks,
                gates,
                block_size=block_size,
                window_size=window_size,
                q_offset=q_offset,
                lengths=lengths,
                branches=branches,
                block_indices=block_indices,
                choice=choice,
            )

    outputs = {}
    if k_blocks is not None:
        outputs["compressed"], lse = compressed_attention(q, k_blocks, v_blocks, block_size=block_size, **shared)
    if choose:
        own = block_selection(q, k_blocks, lse, block_size=block_size, **choice, **shared)
        block_indices = own if block_indices is None else replaced_choice(own, jnp.asarray(block_indices))
    if "selected" in branches:
        outputs["selected"], _ = selected_attention(q, k, v, block_indices, block_size=block_size, **shared)
    if "window" in branches:
        outputs["window"], _ = window_attention(q, k, v, window_size=window_size, **shared)

    o = jnp.zeros(q.shape, jnp.float32)
    for i, branch in enumerate(BRANCHES):
        if branch in branches:
            o = o + gates[..., i, None] * outputs[branch].astype(jnp.float32)
    return o.astype(q.dtype)


def nsa_attention_sharded(
    q: Float[ArrayLike, "B T N G D"],
    k: Float[ArrayLike, "B T N D"],
    v: Float[ArrayLike, "B T N D"],
    gate_logits: Float[ArrayLike, "B T N G 3"],
    *,
    mesh: Mesh,
    data_axes: str | tuple[str, ...] | None = None,
    context_axis: str | None = None,
    tensor_axis: str | None = None,
    striped: bool = False,
    block_size: int = 64,
    block_count: int = 32,
    window_size: int = 256,
    gate_temperature: float = 0.3,
    init_blocks: int = 0,
    local_blocks: int = 1,
    lengths: Int[ArrayLike, "B"] | None = None,
    branches: Sequence[Branch] = BRANCHES,
    implementation: registry.Implementation = None,
) -> Float[jax.Array, "B T N G D"]:
    """Runs `nsa_attention` on every device of a mesh, for its share of rows, queries and KV heads.

    Each context shard holds a contiguous range of the T tokens or, `striped`, two ranges that balance the causal work;
    keys and values are all-gathered over the context axis (and their gradients reduce-scattered).

    Args:
      q: queries of the whole batch, as in `nsa_attention`.
      k: keys, as many as queries.
      v: values, likewise.
      gate_logits: as in `nsa_attention`.
      mesh: the devices.
      data_axes: mesh axes over which rows are split; None: not split.
      context_axis: mesh axis over which tokens are split; None: not split.
      tensor_axis: mesh axis over which KV heads are split; None: not split.
      striped: tokens of q, k, v and gate_logits lie in the order of `stripes.striped_order`, and so does the result.
      block_size: as in `nsa_attention`; so are the arguments below.
      block_count: see there.
      window_size: see there.
      gate_temperature: see there.
      init_blocks: see there.
      local_blocks: see there.
      lengths: see there.
      branches: see there.
      implementation: see there.

    Returns:
      The gated sum, in q's dtype, split as q is.

    Raises:
      ValueError: an axis that the mesh lacks or that does not divide its array axis, and what `nsa_attention` raises.
      TypeError: a dtype that does not fit.
      NotImplementedError: a named implementation does not exist or does not cover the call.
    """
    validation.check_queries(q)
    validation.check_shape("k", k, (*q.shape[:3], q.shape[4]), "[B, T, N, D]")
    validation.check_shape("v", v, k.shape, "[B, T, N, D]")
    validation.check_integers("lengths", lengths, q.shape[:1], "[B]")
    data_axes = (data_axes,) if isinstance(data_axes, str) else data_axes
    for argument, axes, dimension in (
        ("data_axes", data_axes or (), 0),
        ("context_axis", (context_axis,) if context_axis else (), 1),
        ("tensor_axis", (tensor_axis,) if tensor_axis else (), 2),
    ):
        parts = 2 if striped and argument == "context_axis" else 1
        for axis in axes:
            if axis not in mesh.shape:
                raise ValueError(f"{argument} names {axis!r}, expected an axis of the mesh {tuple(mesh.shape)}")
            parts *= mesh.shape[axis]
        if q.shape[dimension] % parts:
            raise ValueError(
                f"{argument} {axes} split q's axis {dimension} of {q.shape[dimension]} into {parts} parts, "
                "expected a divisor"
            )

    def local(
        q: jax.Array, k: jax.Array, v: jax.Array, gate_logits: jax.Array, lengths: jax.Array
    ) -> Float[jax.Array, "B T N G D"]:
        starts: Sequence[Scalar] = (0,)
        if context_axis is not None and striped:
            starts = stripe_starts(context_axis, q.shape[1] // 2)
            k, v = (gather_stripes(x, context_axis) for x in (k, v))
        elif context_axis is not None:
            starts = (jax.lax.axis_index(context_axis) * q.shape[1],)
            k, v = (jax.lax.all_gather(x, context_axis, axis=1, tiled=True) for x in (k, v))
        ranges = zip(*(jnp.split(x, len(starts), axis=1) for x in (q, gate_logits)), starts, strict=True)
        outputs = [
            nsa_attention(
                q,
                k,
                v,
                gate_logits,
                block_size=block_size,
                block_count=block_count,
                window_size=window_size,
                gate_temperature=gate_temperature,
                init_blocks=init_blocks,
                local_blocks=local_blocks,
                q_offset=start,
                lengths=lengths,
                branches=branches,
                implementation=implementation,
            )
            for q, gate_logits, start in ranges
        ]
        return jnp.concatenate(outputs, axis=1)

    rows = PartitionSpec(data_axes)
    tokens = PartitionSpec(data_axes, context_axis, tensor_axis)
    # Kernels' results do not say over which mesh axes they vary, so that the check cannot follow them.
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(tokens,) * 4 + (rows,), out_specs=tokens, check_vma=False)
    return sharded(q, k, v, gate_logits, resolve_lengths(lengths, q.shape[0], k.shape[1]))
