# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The TPU kernels on a real TPU
#
# These kernels were written without a TPU: interpreted on CPU, compiled ahead of time for v5e, v5p and v6e, their times
# modelled ([docs/tpu.md](../docs/tpu.md)). This notebook does what is left: it checks values and gradients of every
# kernel against the reference on the TPU, times them beside JAX's splash attention, and prints what was measured beside
# what was modelled.
#
# On Colab: Runtime, Change runtime type, a TPU. Then, in a cell before this one,
# `!git clone REPOSITORY videonsa_jax` and `%cd videonsa_jax`; Python 3.12 and
# `%pip install -q "jax[tpu]==0.11.2" jaxtyping`, and a restart of the session. As a script:
# `python notebooks/tpu_kernels_check.py` from the repository's root. Without a TPU everything runs interpreted, at tiny
# sizes.

# %%
import functools
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = next(path for path in (Path.cwd(), *Path.cwd().parents) if (path / "pallas_kernels").is_dir())
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import tpu_cases
from pallas_kernels import block_means, compressed_attention, tpu
from pallas_kernels.specs import Spec

ON_TPU = jax.default_backend() == "tpu"
TOKENS = (8192, 32768, 131072) if ON_TPU else (128,)
RHOS = (0.0, 0.8, 0.98) if ON_TPU else (0.8,)
TIMED = tuple(tpu_cases.OPERATIONS) if ON_TPU else ("selection",)
SAMPLES = 10 if ON_TPU else 1
CHIP = tpu.target_chip().name
print(jax.devices()[0].device_kind, "jax", jax.__version__)

# %% [markdown]
# ## Values and gradients
#
# bfloat16 inputs, the reference on float32 copies of them. 2^-8 is bfloat16's rounding; probabilities, their gradients
# and results are each rounded once, hence the limit of 2 % of the norm. Block choices may differ where two importances
# differ by rounding only.


# %%
def spec(tokens: int) -> Spec:
    if ON_TPU:
        return tpu_cases.spec(tokens)
    sizes = {"kv_heads": 1, "group_size": 2, "head_dim": 64, "block_count": 2, "window_size": 48}
    return Spec("tiny", queries=tokens, keys=tokens, **sizes)


def inputs(operation: str, shape: Spec, rho: float) -> tuple[jax.Array, ...]:
    q, k, v, gates = shape.draw()
    k_blocks, v_blocks = block_means(k, shape.block_size), block_means(v, shape.block_size)
    if operation == "compressed":
        return q, k_blocks, v_blocks
    if operation == "selection":
        attend = functools.partial(compressed_attention, block_size=shape.block_size, implementation="mosaic_tpu")
        return q, k_blocks, jax.jit(attend)(q, k_blocks, v_blocks)[1]
    if operation == "selected":
        chosen = tpu_cases.drawn_selection(shape.queries, rho, block_count=shape.block_count)
        return q, k, v, jnp.asarray(np.repeat(chosen[None, :, None], shape.kv_heads, axis=2))
    if operation == "window":
        return q, k, v
    if operation == "prefix":
        rows = min(tpu_cases.TEXT_QUERIES, shape.queries)
        visible = jnp.full((1, 1, rows), shape.keys, jnp.int32)
        return q[:, None, :rows], k, v, visible
    return q, k, v, gates


def distance(x: jax.Array, y: jax.Array) -> float:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return float(np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30))


def exact(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


def check(operation: str) -> None:
    shape = spec(2048 if ON_TPU else TOKENS[0])
    arrays = inputs(operation, shape, 0.8)
    function, shapes, count = tpu_cases.OPERATIONS[operation](shape)
    reference = functools.partial(function, implementation="reference")
    if operation == "selection":
        actual, expected = jax.jit(function)(*arrays), jax.jit(reference)(*map(exact, arrays))
        equal = float((actual == expected).all(axis=-1).mean())
        assert equal >= 0.99, f"{operation}: {equal:.4f} of the rows choose the same blocks"
        print(f"{operation:12} {equal:.4f} of the rows choose the same blocks")
        return
    if operation == "nsa":
        # A near-tie must not decide a comparison of values.
        chosen = inputs("selected", shape, 0.8)[3]
        function, reference = (functools.partial(x, block_indices=chosen) for x in (function, reference))
    run, run_shapes = tpu_cases.with_gradient(function, shapes, count)
    draws = jax.random.split(jax.random.key(1), len(run_shapes) - len(shapes))
    cotangents = [jax.random.normal(key, x.shape, x.dtype) for key, x in zip(draws, run_shapes, strict=False)]
    actual = jax.jit(run)(*cotangents, *arrays)
    exact_shapes = tuple(jax.ShapeDtypeStruct(x.shape, exact(jnp.zeros((), x.dtype)).dtype) for x in shapes)
    with jax.default_matmul_precision("highest"):
        run, _ = tpu_cases.with_gradient(reference, exact_shapes, count)
        expected = jax.jit(run)(*map(exact, cotangents), *map(exact, arrays))
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    distances = [distance(x, y) for x, y in pairs]
    print(f"{operation:12} relative distances", " ".join(f"{x:.1e}" for x in distances))
    assert max(distances) < 2e-2, f"{operation} differs from the reference: {distances}"


for operation in tpu_cases.OPERATIONS:
    check(operation)

# %% [markdown]
# ## Times
#
# Medians of single calls, the arrays on the device; `train` is forward and backward. Splash attention is JAX's own,
# dense and causal, with the quickest of four settings of tiles. A call that the chip has no memory for says so. The
# whole attention (`nsa`) takes a drawn selection, so that the likeness of neighbours is known; the time of choosing is
# added.


# %%
def milliseconds(function, arrays) -> float:
    compiled = jax.jit(function).lower(*arrays).compile()
    jax.block_until_ready(compiled(*arrays))
    samples = []
    for _ in range(SAMPLES):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arrays))
        samples.append(time.perf_counter() - start)
    return 1e3 * statistics.median(samples)


def drawn(shapes) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(2), len(shapes))
    return [jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, shapes, strict=True)]


def measure(operation: str, direction: str, tokens: int, rho: float, tiles: str = "512") -> float | str:
    shape = spec(tokens)
    if operation == "splash":
        dense = tpu_cases.SplashShape(1, tokens, shape.kv_heads * shape.group_size, shape.kv_heads, shape.head_dim)
        function, shapes = tpu_cases.dense_splash(dense, tpu_cases.SPLASH_TILES[tiles])
        count, arrays = 3, drawn(shapes)
    else:
        function, shapes, count = tpu_cases.OPERATIONS[operation](shape)
        arrays = inputs(operation, shape, rho)
        if operation == "nsa":
            function = functools.partial(function, block_indices=inputs("selected", shape, rho)[3])
    if direction == "train":
        function, all_shapes = tpu_cases.with_gradient(function, shapes, count)
        arrays = [*drawn(all_shapes[: len(all_shapes) - len(shapes)]), *arrays]
    try:
        return milliseconds(function, arrays)
    except jax.errors.JaxRuntimeError as refusal:
        return str(refusal).splitlines()[0][:60]


def dense(direction: str, tokens: int) -> float | str:
    """The quickest of the baseline's tiles."""
    times = [
        measure("splash", direction, tokens, 0, tiles) for tiles in tpu_cases.SPLASH_TILES if ON_TPU or tiles == "512"
    ]
    return min((x for x in times if isinstance(x, float)), default=times[0])


results = {}
for tokens in TOKENS:
    for direction in tpu_cases.DIRECTIONS:
        results[f"splash {direction} {tokens}"] = dense(direction, tokens)
        for operation in TIMED:
            if (operation, direction) == ("selection", "train"):
                continue
            for rho in RHOS if operation in ("selected", "nsa") else (None,):
                key = f"{operation} {direction} {tokens}" + ("" if rho is None else f" rho {rho}")
                results[key] = measure(operation, direction, tokens, 0.8 if rho is None else rho)
                choosing = results.get(f"selection forward {tokens}")
                if operation == "nsa" and isinstance(results[key], float) and isinstance(choosing, float):
                    results[key] += choosing
                print(f"{key:36} {results[key]}", flush=True)

# %% [markdown]
# ## The table
#
# Every measured time holds the dispatch of one call (about 0.1 ms), `nsa` that of two. Times were modelled for v5e, v5p
# and v6e; on another TPU those of v5p stand beside.

# %%
record = ROOT / "benchmarks/results/tpu_schedule.json"
modelled = json.loads(record.read_text())["whole"] if record.exists() else {}
print(f"| call | measured, ms | modelled for {CHIP}, ms | splash / this, measured |")
print("|---|---|---|---|")
for key, measured in results.items():
    case, _, rho = key.partition(" rho ")
    guess = modelled.get(case, {}).get(CHIP, {}).get(rho or "None")
    base = results[" ".join(["splash", *case.split()[1:]])]
    ratio = f"{base / measured:.2f}" if isinstance(base, float) and isinstance(measured, float) else ""
    shown = f"{measured:.3f}" if isinstance(measured, float) else measured
    print(f"| {key} | {shown} | {f'{guess:.3f}' if guess else ''} | {ratio} |")

out = ROOT / "tpu_kernels_check.json"
if ON_TPU:
    out.write_text(
        json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__, "ms": results}, indent=1)
    )
    print("written:", out.name, "- please send it to us")
