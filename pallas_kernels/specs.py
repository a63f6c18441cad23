"""Named shapes that tests and benchmarks share."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common import Scalar


@dataclasses.dataclass(frozen=True)
class Spec:
    """One call of `nsa_attention`.

    Attributes:
      name: what the shape stands for.
      queries: T.
      keys: S.
      batch: B.
      kv_heads: N.
      group_size: G, query heads per KV head.
      head_dim: D.
      block_size: s.
      block_count: n.
      window_size: w.
      q_offset: absolute index of the first query.
      dtype: of q, k and v.
    """

    name: str
    queries: int
    keys: int
    batch: int = 1
    kv_heads: int = 4
    group_size: int = 7
    head_dim: int = 128
    block_size: int = 64
    block_count: int = 32
    window_size: int = 256
    q_offset: int = 0
    dtype: str = "bfloat16"

    @property
    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of q, k, v and the gate logits, for tracing without data."""
        heads = (self.batch, self.queries, self.kv_heads, self.group_size)
        keys = jax.ShapeDtypeStruct((self.batch, self.keys, self.kv_heads, self.head_dim), self.dtype)
        q = jax.ShapeDtypeStruct((*heads, self.head_dim), self.dtype)
        return q, keys, keys, jax.ShapeDtypeStruct((*heads, 3), jnp.float32)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `nsa_attention`."""
        return {
            "block_size": self.block_size,
            "block_count": self.block_count,
            "window_size": self.window_size,
            "q_offset": self.q_offset,
        }

    def draw(self, seed: Scalar = 0) -> tuple[jax.Array, ...]:
        """Normal q, k, v and gate logits.

        Args:
          seed: same seed, same values.

        Returns:
          The arrays that `shapes` describes.
        """
        keys = jax.random.split(jax.random.key(seed), len(self.shapes))
        return tuple(jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, self.shapes, strict=True))


SPECS = (
    Spec(
        "tiny model, a clip",
        queries=300,
        keys=300,
        batch=8,
        kv_heads=1,
        group_size=4,
        head_dim=32,
        block_size=16,
        block_count=5,
        window_size=32,
        dtype="float32",
    ),
    Spec("7B, ragged", queries=1000, keys=1000, block_count=8),
    Spec("7B, 3K tokens", queries=3072, keys=3072, block_count=16),
    Spec("7B, 36K tokens", queries=36_864, keys=36_864),
    Spec("7B, 128K tokens", queries=131_072, keys=131_072),
    Spec("7B, last of 8 context shards of 128K", queries=16_384, keys=131_072, q_offset=114_688),
    Spec("3B, 36K tokens", queries=36_864, keys=36_864, kv_heads=2, group_size=8),
)
