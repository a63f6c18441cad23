"""Rotary position embeddings: three-axis (M-RoPE) for the decoder, two-axis for the vision tower.

Both follow transformers' half-split convention: channel c of a head is rotated with channel c + D/2. The tables hold
the D/2 distinct angles only.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def _inverse_frequencies(count: int, theta: float) -> Float[np.ndarray, "count"]:
    return (1.0 / theta ** (np.arange(count, dtype=np.float32) / count)).astype(np.float32)


def mrope_tables(
    positions: Int[Array, "3 *L"], sections: tuple[int, int, int], theta: float
) -> tuple[Float[Array, "*L half"], Float[Array, "*L half"]]:
    """Cosines and sines of multimodal rotary embedding.

    Frequency f reads the time, height or width id according to the section it falls into, as transformers'
    `apply_multimodal_rotary_pos_emb` does (modeling_qwen2_5_vl.py).

    Args:
      positions: int32 ids (time, height, width) of each token.
      sections: how many of the D/2 frequencies read each axis.
      theta: base of the frequencies.

    Returns:
      (cos, sin), each float32 `[*L, D/2]`.
    """
    frequencies = _inverse_frequencies(sum(sections), theta)
    axis_of_frequency = np.repeat(np.arange(3), sections)
    ids = jnp.moveaxis(positions.astype(jnp.float32), 0, -1)[..., axis_of_frequency]
    angles = ids * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def grid_tables(
    rows: Int[Array, "*L"], columns: Int[Array, "*L"], head_dim: int, theta: float
) -> tuple[Float[Array, "*L half"], Float[Array, "*L half"]]:
    """Cosines and sines of the vision tower's two-axis rotary embedding.

    The first D/4 frequencies read a patch's row, the next D/4 its column (`Qwen2_5_VisionTransformer.rot_pos_emb`).

    Args:
      rows: int32 row of each patch.
      columns: int32 column of each patch.
      head_dim: size of an attention head (D), a multiple of 4.
      theta: base of the frequencies.

    Returns:
      (cos, sin), each float32 `[*L, D/2]`.
    """
    frequencies = _inverse_frequencies(head_dim // 4, theta)
    angles = jnp.concatenate(
        [rows[..., None].astype(jnp.float32) * frequencies, columns[..., None].astype(jnp.float32) * frequencies],
        axis=-1,
    )
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "*L D"], tables: tuple[Float[Array, "*#L half"], Float[Array, "*#L half"]]
) -> Float[Array, "*L D"]:
    """Rotates the pairs (x[c], x[c + D/2]) by the tables' angles.

    Args:
      x: queries or keys of any floating dtype; computed in float32 and returned in x's dtype.
      tables: (cos, sin) that broadcast against one half of x.

    Returns:
      The rotated array.
    """
    cos, sin = tables
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
