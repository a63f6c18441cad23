"""Named calls that are compiled ahead of time for TPUs, at the shapes of VideoNSA-7B.

A name is "OPERATION DIRECTION TOKENS", as in "window forward 32768"; the direction "train" is forward and backward.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from pallas_kernels import (
    block_selection,
    compressed_attention,
    nsa_attention,
    prefix_attention,
    selected_attention,
    tpu,
    window_attention,
)
from pallas_kernels.specs import Spec

TOKENS = (8192, 32768, 131072)
DIRECTIONS = ("forward", "train")
TEXT_QUERIES = 512

type Shapes = tuple[jax.ShapeDtypeStruct, ...]
type Built = tuple[Callable[..., Any], Shapes]


def spec(tokens: int) -> Spec:
    """VideoNSA-7B's attention over so many visual tokens."""
    return Spec(f"7B, {tokens} tokens", queries=tokens, keys=tokens)


def build(name: str) -> Built:
    """A function to compile and the shapes of its arguments.

    Args:
      name: "OPERATION DIRECTION TOKENS", "splash DIRECTION TOKENS TILES" or a case of `tpu_calibration`.

    Returns:
      The function and its arguments' shapes.

    Raises:
      ValueError: an unknown name.
    """
    from benchmarks import tpu_calibration

    if name in tpu_calibration.CASES:
        return tpu_calibration.CASES[name].build()
    form = re.fullmatch(r"(\w+) (\w+) (\d+)( \S+)?", name)
    operation, direction, size, tiles = form.groups() if form else ("", "", "", None)
    known = operation in OPERATIONS if tiles is None else operation == "splash" and tiles.strip() in SPLASH_TILES
    if not known or direction not in DIRECTIONS:
        raise ValueError(
            f"case is {name!r}, expected OPERATION DIRECTION TOKENS with one of {', '.join(OPERATIONS)}, "
            f"or splash DIRECTION TOKENS TILES with one of {', '.join(SPLASH_TILES)}"
        )
    if operation == "splash":
        function, shapes = dense_splash(dense_shape(int(size)), SPLASH_TILES[tiles.strip()])
        count = 3
    else:
        function, shapes, count = OPERATIONS[operation](spec(int(size)))
    return with_gradient(function, shapes, count) if direction == "train" else (function, shapes)


def with_gradient(function: Callable[..., Any], shapes: Shapes, count: int) -> Built:
    """Forward and backward in the first `count` arguments, given cotangents of all float results."""
    if count == 0:
        return function, shapes
    results = jax.eval_shape(function, *shapes)

    def run(cotangents: Any, *arguments: Any) -> Any:
        value, pull = jax.vjp(lambda *head: function(*head, *arguments[count:]), *arguments[:count])
        return value, pull(cotangents)

    flat, tree = jax.tree.flatten(results)

    def flattened(*arguments: Any) -> Any:
        return run(jax.tree.unflatten(tree, arguments[: len(flat)]), *arguments[len(flat) :])

    return flattened, (*flat, *shapes)


def _implementation() -> dict[str, Any]:
    return {"implementation": "mosaic_tpu"}


def _blocks(shape: Spec) -> jax.ShapeDtypeStruct:
    count = shape.keys // shape.block_size
    return jax.ShapeDtypeStruct((shape.batch, count, shape.kv_heads, shape.head_dim), shape.dtype)


def _compressed(shape: Spec) -> tuple[Callable[..., Any], Shapes, int]:
    function = functools.partial(compressed_attention, block_size=shape.block_size, **_implementation())
    return function, (shape.shapes[0], _blocks(shape), _blocks(shape)), 3


def _selection(shape: Spec) -> tuple[Callable[..., Any], Shapes, int]:
    function = functools.partial(
        block_selection, block_size=shape.block_size, block_count=shape.block_count, **_implementation()
    )
    q = shape.shapes[0]
    return function, (q, _blocks(shape), jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32)), 0


def _selected(shape: Spec) -> tuple[Callable[..., Any], Shapes, int]:
    function = functools.partial(selected_attention, block_size=shape.block_size, **_implementation())
    q, k, v, _ = shape.shapes
    indices = jax.ShapeDtypeStruct((*q.shape[:3], shape.block_count), jnp.int32)
    return function, (q, k, v, indices), 3


def _window(shape: Spec) -> tuple[Callable[..., Any], Shapes, int]:
    function = functools.partial(window_attention, window_size=shape.window_size, **_implementation())
    return function, shape.shapes[:3], 3


def _prefix(shape: Spec) -> tuple[Callable[..., Any], Shapes, int]:
    _, k, v, _ = shape.shapes
    rows = (shape.batch, 1, min(TEXT_QUERIES, shape.queries))
    q = jax.ShapeDtypeStruct((*rows, shape.kv_heads, shape.group_size, shape.head_dim), shape.dtype)
    visible = jax.ShapeDtypeStruct(rows, jnp.int32)
    return functools.partial(prefix_attention, **_implementation()), (q, k, v, visible), 3


def _nsa(shape: Spec) -> tuple[Callable[..., Any], Shapes, int]:
    options = {name: shape.options[name] for name in ("block_size", "block_count", "window_size")}
    return functools.partial(nsa_attention, **options, **_implementation()), shape.shapes, 4


OPERATIONS: dict[str, Callable[[Spec], tuple[Callable[..., Any], Shapes, int]]] = {
    "compressed": _compressed,
    "selection": _selection,
    "selected": _selected,
    "window": _window,
    "prefix": _prefix,
    "nsa": _nsa,
}


def names() -> list[str]:
    """The cases of the table: the whole attention, text queries over the visual keys, and the baseline."""
    found = []
    for tokens in reversed(TOKENS):
        found += [f"nsa {direction} {tokens}" for direction in DIRECTIONS]
        found += [f"splash {direction} {tokens} {tiles}" for direction in DIRECTIONS for tiles in SPLASH_TILES]
        found.append(f"prefix train {tokens}")
    return found


@dataclasses.dataclass(frozen=True)
class SplashTiles:
    """Tile sizes of JAX's splash attention.

    Attributes:
      queries: of the forward kernel's grid step.
      keys: of the forward kernel's grid step.
      compute: keys of one product.
      backward: queries, keys and keys of one product in the kernel of dk and dv.
      dq: queries and keys in the kernel of dq.
    """

    queries: int
    keys: int
    compute: int
    backward: tuple[int, int, int] = (512, 512, 512)
    dq: tuple[int, int] = (512, 512)


SPLASH_TILES = {
    "512": SplashTiles(512, 512, 512),
    "1024": SplashTiles(1024, 1024, 512, backward=(1024, 1024, 512), dq=(1024, 1024)),
    "2048": SplashTiles(2048, 2048, 512, backward=(2048, 1024, 512), dq=(2048, 1024)),
    "2048/256": SplashTiles(2048, 2048, 256, backward=(2048, 1024, 256), dq=(2048, 1024)),
}
"""The baseline takes the quickest of these for each kernel.

The forward tiles of the last two are what tokamax's autotuning chose for long sequences on v6e and v5p
(`tpu_calibration`).
"""


@dataclasses.dataclass(frozen=True)
class SplashShape:
    """A dense call: batch, tokens, query heads, KV heads, head dimension; causal unless told."""

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool = True


def dense_shape(tokens: int) -> SplashShape:
    """The dense call that VideoNSA-7B's attention stands in for."""
    shape = spec(tokens)
    return SplashShape(1, tokens, shape.kv_heads * shape.group_size, shape.kv_heads, shape.head_dim)


def dense_splash(shape: SplashShape, tiles: SplashTiles) -> Built:
    """JAX's splash attention, its multi-query kernel mapped over rows and KV heads.

    Args:
      shape: of the call.
      tiles: of the kernels; dq has a kernel of its own, as the fused one keeps tokens / keys copies of dq.

    Returns:
      A function of q [B, N, G, T, D], k and v [B, N, T, D], head-major as the kernel takes them.
    """
    group = shape.heads // shape.kv_heads
    kind = splash_mask.CausalMask if shape.causal else splash_mask.FullMask
    mask = splash_mask.MultiHeadMask([kind((shape.tokens, shape.tokens)) for _ in range(group)])
    fit = functools.partial(min, shape.tokens)
    sizes = splash.BlockSizes(
        block_q=fit(tiles.queries),
        block_kv=fit(tiles.keys),
        block_kv_compute=fit(tiles.compute),
        block_q_dkv=fit(tiles.backward[0]),
        block_kv_dkv=fit(tiles.backward[1]),
        block_kv_dkv_compute=fit(tiles.backward[2]),
        block_q_dq=fit(tiles.dq[0]),
        block_kv_dq=fit(tiles.dq[1]),
    )
    kernel = splash.make_splash_mqa(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=tpu.interpreted())
    heads = (shape.batch, shape.kv_heads)
    q = jax.ShapeDtypeStruct((*heads, group, shape.tokens, shape.head_dim), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((*heads, shape.tokens, shape.head_dim), jnp.bfloat16)
    return jax.vmap(jax.vmap(kernel)), (q, k, k)


def matmul(m: int, k: int, n: int, tiles: tuple[int, int, int] | None) -> Built:
    """A bfloat16 product: XLA's own, or a Pallas kernel of tiles (m, k, n) that accumulates in float32."""
    shapes = jax.ShapeDtypeStruct((m, k), jnp.bfloat16), jax.ShapeDtypeStruct((k, n), jnp.bfloat16)
    if tiles is None:
        return jnp.matmul, shapes
    rows, inner, columns = tiles

    def kernel(x_ref: Any, y_ref: Any, o_ref: Any, sum_ref: Any) -> None:
        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            sum_ref[...] = jnp.zeros_like(sum_ref)

        sum_ref[...] += jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32)

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _() -> None:
            o_ref[...] = sum_ref[...].astype(o_ref.dtype)

    call = pl.pallas_call(
        kernel,
        name="matmul",
        out_shape=jax.ShapeDtypeStruct((m, n), jnp.bfloat16),
        grid=(m // rows, n // columns, k // inner),
        in_specs=[
            pl.BlockSpec((rows, inner), lambda i, j, k: (i, k)),
            pl.BlockSpec((inner, columns), lambda i, j, k: (k, j)),
        ],
        out_specs=pl.BlockSpec((rows, columns), lambda i, j, k: (i, j)),
        scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    )
    return call, shapes


def drawn_selection(
    tokens: int, rho: float, *, block_size: int = 64, block_count: int = 32, seed: int = 0
) -> np.ndarray:
    """Chosen blocks of one KV head whose neighbours are alike to the degree rho.

    A block's score for a token is sqrt(rho) times a normal draw shared by the 64 tokens of the token's own block, plus
    sqrt(1 - rho) times one of its own; the own block and the best scored earlier ones are taken.

    Args:
      tokens: queries and keys.
      rho: share of the variance that neighbours have in common, 0 to 1.
      block_size: keys per block (s).
      block_count: places (n).
      seed: of the draws.

    Returns:
      Block indices int32 [tokens, n], ascending, padded with -1.
    """
    draw = np.random.default_rng(seed)
    blocks = tokens // block_size
    chosen = np.full((tokens, block_count), -1, np.int32)
    for own in range(blocks):
        rows = slice(own * block_size, (own + 1) * block_size)
        shared, single = draw.standard_normal(own, np.float32), draw.standard_normal((block_size, own), np.float32)
        score = np.sqrt(rho) * shared + np.sqrt(1 - rho) * single
        places = min(block_count - 1, own)
        if places:
            best = np.argpartition(-score, places - 1, axis=1)[:, :places]
            chosen[rows, :places] = np.sort(best, axis=1)
        chosen[rows, places] = own
    return chosen
