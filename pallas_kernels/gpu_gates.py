"""The passes over whole outputs on Hopper: the gated sum of the branches, and what its gradient needs of them.

Both are bound by device memory, so each reads every output once: a thread block takes 64 rows (query heads of tokens),
and several thread blocks per multiprocessor keep enough copies in flight.
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Float32

from pallas_kernels import gpu
from pallas_kernels.gpu import ROW_LAYOUT, TILE_ROWS


def gated_sum(
    gates: Float32[jax.Array, "branches R"], outputs: tuple[Float[jax.Array, "R D"], ...], *, interpret: Any = None
) -> Float[jax.Array, "R D"]:
    """Sums gates[i] * outputs[i] in float32, in the outputs' dtype.

    Args:
      gates: one value per branch and row.
      outputs: one array per branch.
      interpret: parameters of Pallas's GPU interpreter; None compiles.
    """
    rows, size = outputs[0].shape
    branches = len(outputs)

    def body(gates_ref, *refs):
        output_refs, sum_ref = refs[:branches], refs[branches]
        gate_smem, output_smem, ready = refs[branches + 1 :]
        tile = _tile()
        for i, output_ref in enumerate(output_refs):
            plgpu.copy_gmem_to_smem(gates_ref.at[i, tile], gate_smem.at[i], ready)
            plgpu.copy_gmem_to_smem(output_ref.at[tile], output_smem.at[i], ready)
        plgpu.barrier_wait(ready)
        total = plgpu.layout_cast(jnp.zeros((TILE_ROWS, size), jnp.float32), plgpu.Layout.WGMMA)
        for i in range(branches):
            output = plgpu.load(output_smem.at[i], layout=plgpu.Layout.WGMMA).astype(jnp.float32)
            gate = plgpu.load(gate_smem.at[i], layout=ROW_LAYOUT)
            total = total + output * lax.broadcast_in_dim(gate, output.shape, [0])
        output_smem[0] = total.astype(sum_ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(output_smem.at[0], sum_ref.at[tile])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, size), outputs[0].dtype),
        scratch_types=(
            plgpu.SMEM((branches, TILE_ROWS), jnp.float32),
            gpu.tile_memory((branches, TILE_ROWS, size), outputs[0].dtype),
            plgpu.Barrier(num_arrivals=2 * branches),
        ),
        interpret=interpret,
        **_launch(rows),
    )(gates, *outputs)


def row_products(
    do: Float[jax.Array, "R D"], outputs: tuple[Float[jax.Array, "R D"], ...], *, interpret: Any = None
) -> Float32[jax.Array, "branches R"]:
    """The sums over D of do * outputs[i], in float32; do is read once.

    Args:
      do: the cotangent of the gated sum.
      outputs: one array per branch.
      interpret: parameters of Pallas's GPU interpreter; None compiles.
    """
    rows, size = do.shape
    branches = len(outputs)

    def body(do_ref, *refs):
        output_refs, products_ref = refs[:branches], refs[branches]
        do_smem, output_smem, product_smem, ready = refs[branches + 1 :]
        tile = _tile()
        plgpu.copy_gmem_to_smem(do_ref.at[tile], do_smem, ready)
        for i, output_ref in enumerate(output_refs):
            plgpu.copy_gmem_to_smem(output_ref.at[tile], output_smem.at[i], ready)
        plgpu.barrier_wait(ready)
        do_tile = plgpu.load(do_smem, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
        for i in range(branches):
            output = plgpu.load(output_smem.at[i], layout=plgpu.Layout.WGMMA).astype(jnp.float32)
            product_smem[i] = (do_tile * output).sum(axis=1)
        plgpu.commit_smem()
        for i in range(branches):
            plgpu.copy_smem_to_gmem(product_smem.at[i], products_ref.at[i, tile])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((branches, rows), jnp.float32),
        scratch_types=(
            gpu.tile_memory((TILE_ROWS, size), do.dtype),
            gpu.tile_memory((branches, TILE_ROWS, size), do.dtype),
            plgpu.SMEM((branches, TILE_ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=branches + 1),
        ),
        interpret=interpret,
        **_launch(rows),
    )(do, *outputs)


def _tile() -> Any:
    """The rows of the calling thread block; the copy engine clips those past the last."""
    return pl.ds(lax.axis_index("tile") * TILE_ROWS, TILE_ROWS)


def _launch(rows: int) -> dict[str, Any]:
    return {
        "grid": (-(-rows // TILE_ROWS),),
        "grid_names": ("tile",),
        "compiler_params": plgpu.CompilerParams(approx_math=True),
    }
