"""How often each loop and branch of a kernel runs: from shapes, and for selected attention from drawn tile lists.

Loops are told apart by their order in the kernel, which is that of its source.
"""

import contextvars
import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import tpu_calibration, tpu_cases
from benchmarks.tpu_cases import SplashShape, SplashTiles
from pallas_kernels import tile_lists, tpu, tpu_flash, tpu_flash_kernels, tpu_layout
from pallas_kernels.compressed_attention import mosaic_tpu as compressed_tpu
from pallas_kernels.prefix_attention import mosaic_tpu as prefix_tpu
from pallas_kernels.selected_attention import mosaic_tpu as selected_tpu
from pallas_kernels.selected_attention.mosaic_tpu_forward import body_steps
from pallas_kernels.selected_attention.mosaic_tpu_steps import TILE, TILES, Plan, make_plan
from pallas_kernels.window_attention import mosaic_tpu as window_tpu

RHOS = (0.0, 0.8, 0.98)


@dataclasses.dataclass(frozen=True)
class Work:
    """What one or several runs of a kernel do, on all cores together.

    Attributes:
      steps: of the grid.
      loops: runs of each loop's body in the order of the source, the grid's loop left out.
      products: runs of the branches that multiply and hold no loop.
      rows: runs of the other branches that use vector units: what starts and ends a row of steps.
      hbm_bytes: moved between device memory and VMEM.
      transfers: grid steps that wait for a block of their own.
    """

    steps: float
    loops: tuple[float, ...] = ()
    products: tuple[float, ...] = ()
    rows: float = 0.0
    hbm_bytes: float = 0.0
    transfers: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        """The sum of two, loop by loop."""
        if len(self.loops) != len(other.loops) or len(self.products) != len(other.products):
            raise ValueError(f"works of {self.loops} and {other.loops} are of different kernels")
        return Work(
            self.steps + other.steps,
            tuple(map(sum, zip(self.loops, other.loops, strict=True))),
            tuple(map(sum, zip(self.products, other.products, strict=True))),
            self.rows + other.rows,
            self.hbm_bytes + other.hbm_bytes,
            self.transfers + other.transfers,
        )


def works(case: str, chip: str, kernels: dict[str, int], rho: float) -> dict[str, Work]:
    """The work of each kernel of a case.

    Args:
      case: see `tpu_cases.build`.
      chip: a key of `pallas_kernels.tpu.CHIPS`.
      kernels: runs of each kernel of the compiled program, in program order.
      rho: how alike neighbours choose, see `tpu_cases.drawn_selection`.

    Returns:
      A work per kernel.

    Raises:
      ValueError: a kernel that is not known here.
    """
    with tpu.compiling_for(chip):
        if case in tpu_calibration.CASES:
            published = tpu_calibration.CASES[case]
            if published.product is not None:
                return {name: matmul(*published.product) for name in kernels}
            return {name: splash(name, *published.attention) for name in kernels}
        operation, _, size, *tiles = case.split()
        tokens = int(size)
        if operation == "splash":
            shape = tpu_cases.dense_shape(tokens)
            return {name: splash(name, shape, tpu_cases.SPLASH_TILES[tiles[0]]) for name in kernels}
        found, chunk = {}, {"forward": 0, "backward": 0}
        for name, runs in kernels.items():
            if "selected_attention" in name:
                part = "backward" if "backward" in name else "forward"
                found[name] = functools.reduce(
                    Work.__add__, (selected(part, tokens, chip, rho, chunk[part] + i) for i in range(runs))
                )
                chunk[part] += runs
            elif any(part in name for part in LAYOUT_ARRAYS):
                found[name] = layout(name, tokens)
            elif "block_selection" in name:
                found[name] = selection(tokens)
            elif "tile_lists" in name:
                found[name] = lists(tokens)
            else:
                found[name] = flash(name, tokens)
    return found


def matmul(m: int, k: int, n: int, tiles: tuple[int, int, int]) -> Work:
    """The product of `tpu_cases.matmul`."""
    rows, inner, columns = tiles
    steps = (m // rows) * (n // columns) * (k // inner)
    moved = 2 * (steps * inner * (rows + columns) + m * n)
    return Work(steps, products=(steps,), rows=m * n / (rows * columns), hbm_bytes=moved, transfers=steps)


def splash(kernel: str, shape: SplashShape, tiles: SplashTiles) -> Work:
    """A kernel of JAX's splash attention: every step of the rectangle is visited, hidden ones skip the product."""
    queries, keys, inner = tiles.queries, tiles.keys, "keys"
    if "dkv" in kernel:
        queries, keys, inner = tiles.backward[0], tiles.backward[1], "queries"
    elif "dq" in kernel:
        queries, keys = tiles.dq
    queries, keys = min(queries, shape.tokens), min(keys, shape.tokens)
    first = np.arange(0, shape.tokens, keys)[None]
    last = np.arange(queries, shape.tokens + 1, queries)[:, None]
    seen = int((first < last).sum()) if shape.causal else first.size * last.size
    heads = shape.batch * shape.heads
    fetched = keys if inner == "keys" else queries
    size = 2 * shape.head_dim
    moved = heads * (seen * 2 * fetched + 4 * shape.tokens) * size
    rows = heads * (last.size if inner == "keys" else first.size / (shape.heads / shape.kv_heads))
    steps = heads * first.size * last.size
    return Work(steps, products=(heads * seen,), rows=rows, hbm_bytes=moved, transfers=heads * seen)


def _ends(operation: str, tokens: int) -> tuple[np.ndarray, int, tpu_flash.Tiles, int | None]:
    """One past the last key of each query; number of keys; tiles; window."""
    spec, t = tpu_cases.spec(tokens), np.arange(tokens)
    if operation == "compressed_attention":
        return (t + 1) // spec.block_size, tokens // spec.block_size, compressed_tpu._TILES, None
    if operation == "window_attention":
        return t + 1, tokens, window_tpu._TILES, spec.window_size
    # Text after the video sees all of it.
    return np.full(tpu_cases.TEXT_QUERIES, tokens), tokens, prefix_tpu._TILES, None


def flash(kernel: str, tokens: int) -> Work:
    """A kernel of `pallas_kernels.tpu_flash`, whose ranges of chunks the call itself computes from its bounds."""
    known = ("compressed_attention", "window_attention", "prefix_attention")
    operation = next((name for name in known if name in kernel), None)
    if operation is None:
        raise ValueError(f"kernel {kernel} is not known to benchmarks/tpu_trips.py, expected one of {known}")
    spec = tpu_cases.spec(tokens)
    end, keys, tiles, window = _ends(operation, tokens)
    tiles = tpu_flash._fit(tiles, len(end), keys)
    call = tpu_flash_kernels.Call(
        name=operation,
        tiles=tiles,
        window=window,
        batch=1,
        heads=spec.kv_heads,
        group=spec.group_size,
        size=spec.head_dim,
        dtype=jnp.dtype(spec.dtype),
        query_tiles=-(-len(end) // tiles.queries),
        key_tiles=-(-keys // tiles.keys),
    )
    ends = call.ends(jnp.asarray(end, jnp.int32)[None])
    bounds = call.bounds(ends)
    by_key = "dkv" in kernel or "backward" in kernel
    if by_key:
        j, step = np.meshgrid(np.arange(call.key_tiles), np.arange(call.query_steps), indexing="ij")
        first, last = np.asarray(call.reach(bounds)).reshape(2, call.key_tiles)
        i = step if "backward" in kernel else first[j] + step
        active = i <= last[j]
        i = np.minimum(i, call.query_tiles - 1)
    else:
        i, step = np.meshgrid(np.arange(call.query_tiles), np.arange(call.key_steps), indexing="ij")
        j = np.asarray(bounds)[i] // call.tiles.keys + step
        active = np.ones_like(i, bool)
    ranges = [np.asarray(x) for x in call.chunk_ranges(bounds, 0, i, j * call.tiles.keys)]
    runs = [int((np.where(active, stop - start, 0)).sum()) for start, stop in itertools.pairwise(ranges)]
    loops = runs if window is not None else runs[1:]
    heads, size = spec.kv_heads, 2 * spec.head_dim
    row_bytes, key_bytes = call.lanes * size, call.tiles.keys * size
    arrays = 2 if "forward" in kernel else 3
    if by_key:
        moved = i.size * arrays * row_bytes + call.key_tiles * 4 * key_bytes
        # The fused kernel clears and stores its dq in every step.
        rows = i.size if "backward" in kernel else call.key_tiles
    else:
        fetched = 1 if call.key_tiles == 1 else i.size
        moved, rows = call.query_tiles * arrays * row_bytes + fetched * 2 * key_bytes, call.query_tiles
    return Work(
        steps=heads * i.size,
        loops=tuple(heads * run for run in loops),
        rows=heads * rows,
        hbm_bytes=heads * moved,
        transfers=heads * i.size,
    )


LAYOUT_ARRAYS = {"group_major": 2, "model_order": 2, "gated_sum": 4}
"""Arrays of the queries' size that each kernel of `pallas_kernels.tpu_layout` moves."""


def layout(kernel: str, tokens: int) -> Work:
    """A kernel of `pallas_kernels.tpu_layout`: a step per tile, nothing but memory."""
    name = next(part for part in LAYOUT_ARRAYS if part in kernel)
    q = tpu_cases.spec(tokens).shapes[0]
    moved = LAYOUT_ARRAYS[name] * math.prod(q.shape) * q.dtype.itemsize
    if name == "gated_sum":
        moved += tpu_layout.GATE_ROWS * tokens * q.shape[2] * 4
    steps = -(-tokens // tpu_layout.TILE)
    return Work(steps, rows=steps, hbm_bytes=moved, transfers=steps)


def lists(tokens: int) -> Work:
    """The kernel of `pallas_kernels.tile_lists`: 128 tiles a step, no loop."""
    spec = tpu_cases.spec(tokens)
    tiles = -(-tokens // TILE)
    steps = spec.kv_heads * -(-tiles // tpu.LANES)
    moved = spec.kv_heads * tiles * (2 * TILE * spec.block_count + 1) * 4
    return Work(steps, rows=steps, hbm_bytes=moved, transfers=steps)


_SELECTION_TOKENS, _SELECTION_CHUNK = 128, 256


def selection(tokens: int) -> Work:
    """The kernel of block selection, its bisection simulated on drawn importances."""
    spec = tpu_cases.spec(tokens)
    last = (np.arange(_SELECTION_TOKENS, tokens + 1, _SELECTION_TOKENS) - 1) // spec.block_size
    chunks = last // _SELECTION_CHUNK + 1
    tiles = len(last)
    rounds = np.array([bisection_rounds(int(block) + 1, spec.block_count) for block in last[:: max(tiles // 32, 1)]])
    rounds = np.interp(np.arange(tiles), np.arange(0, tiles, max(tiles // 32, 1)), rounds)
    visits, heads = chunks.sum(), spec.kv_heads
    counted = (rounds * chunks).sum()
    blocks = -(-(tokens // spec.block_size + 1) // _SELECTION_CHUNK) * _SELECTION_CHUNK
    tile_bytes = _SELECTION_TOKENS * (spec.group_size * (2 * spec.head_dim + 4) + 4 * spec.block_count)
    # In order: score, bisect (count), bisect a tie's place (count), pack words, find words. Drawn floats do not tie.
    loops = (visits, rounds.sum(), counted, 0, 0, visits, visits)
    return Work(
        steps=heads * tiles,
        loops=tuple(heads * float(run) for run in loops),
        rows=heads * tiles,
        hbm_bytes=heads * (tiles * tile_bytes + blocks * 2 * spec.head_dim),
        transfers=heads * tiles,
    )


@functools.cache
def bisection_rounds(candidates: int, places: int, seed: int = 0) -> int:
    """Halvings until all 128 tokens of a tile separate their best `places` blocks, for drawn softmax importances.

    Args:
      candidates: blocks that the tile's last token may choose.
      places: blocks that it chooses.
      seed: of the logits, standard normal per head.

    Returns:
      Rounds of the kernel's bisection.
    """
    if candidates <= places:
        return 0
    draw = np.random.default_rng(seed)
    weights = np.exp(draw.standard_normal((7, _SELECTION_TOKENS, candidates), np.float32))
    importance = (weights / weights.sum(-1, keepdims=True)).sum(0)
    bits = importance.view(np.int32)
    low, high = np.zeros(_SELECTION_TOKENS, np.int64), np.full(_SELECTION_TOKENS, 0x7F000001, np.int64)
    at_low = np.full(_SELECTION_TOKENS, candidates)
    top, wanted = bits.max(1).astype(np.int64), places - 1  # the current block is forced
    rounds = 0
    while np.any((at_low > wanted) & (high - low > 1)):
        middle = low + (high - low) // 2
        if rounds == 0:
            middle = np.where(top - 8 * 2**23 > low, top - 8 * 2**23, middle)
        reached = (bits >= middle[:, None]).sum(1)
        enough = reached >= wanted
        low, high = np.where(enough, middle, low), np.where(enough, high, middle)
        at_low = np.where(enough, reached, at_low)
        rounds += 1
    return rounds


@functools.cache
def drawn_lists(tokens: int, rho: float) -> tile_lists.TileLists:
    """The lists that the operation builds from a drawn selection of one KV head."""
    spec = tpu_cases.spec(tokens)
    chosen = jnp.asarray(tpu_cases.drawn_selection(tokens, rho))[None, :, None]
    blocks = tokens // spec.block_size
    build = jax.jit(functools.partial(tile_lists.build, blocks=blocks))
    # Here and now, whatever chip is compiled for.
    return contextvars.Context().run(build, chosen, chosen >= 0)


@functools.cache
def chunk_steps(tokens: int, chip: str, rho: float, chunk: int, backward: bool) -> tuple[Plan, np.ndarray]:
    """How a kernel of selected attention is cut on a chip, and the list steps of each grid step of one head."""
    spec, drawn = tpu_cases.spec(tokens), drawn_lists(tokens, rho)
    plans: list[Plan] = []

    def trace(q: jax.Array) -> None:
        places = drawn.entries.shape[-1]
        plans.append(make_plan("selected_attention", q, tokens, places, spec.block_size, backward=backward))

    with tpu.compiling_for(chip):
        jax.eval_shape(trace, spec.shapes[0])
    (plan,) = plans
    _, bounds = jax.jit(selected_tpu._lists_of_chunk, static_argnums=(1, 3))(drawn, tokens, jnp.int32(chunk), plan)
    return plan, np.asarray(bounds)[..., -1].reshape(-1)


def selected(part: str, tokens: int, chip: str, rho: float, chunk: int) -> Work:
    """One chunk of keys of a kernel of selected attention, its lists drawn."""
    spec, backward = tpu_cases.spec(tokens), part == "backward"
    plan, steps = chunk_steps(tokens, chip, rho, chunk, backward)
    heads, grid = spec.kv_heads, len(steps)
    with tpu.compiling_for(chip):
        body = 1 if backward else body_steps()
    # Three stages side by side: two more steps than the lists have.
    walks = steps > 0
    walk = heads * int((walks * ((steps + 1 + body) // body)).sum())
    tiles = heads * int(walks.sum()) * TILES
    loops = (heads * plan.chunk_blocks, tiles, walk) if backward else (walk,)
    carried = plan.chunks > 1
    row_bytes = math.prod(spec.shapes[0].shape) * ((8 + 4 * carried) if backward else (4 + 6 * carried))
    keys = min(plan.chunk_keys, tokens - chunk * plan.chunk_keys)
    key_bytes = 2 * heads * keys * spec.head_dim * (2 + 4 * backward)
    list_bytes = heads * grid * TILES * plan.places * 4
    return Work(
        steps=heads * grid,
        loops=loops,
        # A body has a branch per step that ends a tile; together they take all tiles.
        rows=heads * grid * TILES // body,
        hbm_bytes=row_bytes + key_bytes + list_bytes,
        transfers=heads * grid,
    )
