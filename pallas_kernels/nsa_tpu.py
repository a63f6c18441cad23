"""Native Sparse Attention on TPU: the operations of `nsa` on one copy of the queries, in the kernels' order throughout.

Called one by one the operations would each lay out the queries and lay back their outputs. Here both happen once: the
gated sum of the branches is what returns to the model's order.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels import tpu, tpu_layout
from pallas_kernels.block_selection import mosaic_tpu as block_selection
from pallas_kernels.common import Scalar
from pallas_kernels.compressed_attention import mosaic_tpu as compressed_attention
from pallas_kernels.selected_attention import mosaic_tpu as selected_attention
from pallas_kernels.window_attention import mosaic_tpu as window_attention


def covers(q: Float[Array, "B T N G D"], k: Float[Array, "B S N D"], block_size: int, branches: Sequence[str]) -> bool:
    """Whether a call has anything to sum, and the queries that a tile needs: fewer ones share it with other heads."""
    return bool(branches) and 0 not in q.shape and q.shape[1] >= tpu.LANES and k.shape[1] >= block_size


def attention(
    q: Float[Array, "B T N G D"],
    k: Float[Array, "B S N D"],
    v: Float[Array, "B S N D"],
    k_blocks: Float[Array, "B M N D"] | None,
    v_blocks: Float[Array, "B M N D"] | None,
    gates: Float32[Array, "B T N G 3"],
    *,
    block_size: int,
    window_size: int,
    q_offset: Scalar,
    lengths: Int[Array, "B"],
    branches: Sequence[str],
    block_indices: Int[Array, "B T N n"] | None,
    choice: dict[str, Any],
) -> Float[Array, "B T N G D"]:
    """The gated sum of the branches; arguments as in `nsa.nsa_attention`.

    Args:
      q: see there, and `covers`.
      k: see there.
      v: see there.
      k_blocks: means of the complete blocks; None where neither the compressed branch nor the choice reads them.
      v_blocks: likewise.
      gates: in the order (compressed, selected, window).
      block_size: see there.
      window_size: see there.
      q_offset: see there.
      lengths: see there.
      branches: see there.
      block_indices: see there.
      choice: further arguments of `block_selection`.

    Raises:
      NotImplementedError: what a kernel does not cover.
    """
    selected_attention.check(q, k, block_size)
    queries = q.shape[1]
    valid = jnp.clip(lengths - jnp.asarray(q_offset, jnp.int32), 0, queries)
    rows = tpu_layout.group_major(queries, q, valid)
    shared = {"q_offset": q_offset, "lengths": lengths}

    outputs = {}
    choose = "selected" in branches and block_indices is None
    if k_blocks is not None:
        outputs["compressed"], lse = compressed_attention.group_major_attention(
            rows, k_blocks, v_blocks, queries=queries, block_size=block_size, **shared
        )
    if choose:
        block_indices = block_selection.group_major_selection(
            *map(jax.lax.stop_gradient, (rows, k_blocks, lse)),
            queries=queries,
            block_size=block_size,
            **choice,
            **shared,
        )
    if "selected" in branches:
        outputs["selected"], _ = selected_attention.group_major_attention(
            rows, k, v, block_indices, block_size=block_size, **shared
        )
    if "window" in branches:
        outputs["window"], _ = window_attention.group_major_attention(
            rows, k, v, queries=queries, window_size=window_size, **shared
        )

    used = [(i, branch) for i, branch in enumerate(("compressed", "selected", "window")) if branch in branches]
    gate_rows = tuple(tpu.group_major(gates[..., i], rows.shape[3]) for i, _ in used)
    return tpu_layout.gated_sum(queries, tuple(outputs[branch] for _, branch in used), gate_rows, valid)
