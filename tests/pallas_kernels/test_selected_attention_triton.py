"""The Triton kernels of selected attention: interpreted against the reference, compiled for Hopper without a GPU."""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from selected_cases import compare
from triton_interpreter import compiled, interpreted, launches

from pallas_kernels import gpu, selected_attention
from pallas_kernels.selected_attention import triton, triton_config, triton_token_major
from pallas_kernels.selected_attention.triton_config import BlockConfig, Config, TileConfig
from pallas_kernels.specs import SPECS

pytest.importorskip("triton", reason="Triton comes with the extra 'gpu', for Linux on x86-64 alone")

DESIGNS = {"triton": triton, "triton_token_major": triton_token_major}
HEURISTICS = {"triton": triton_config.heuristic, "triton_token_major": triton_config.token_major_heuristic}
SMALL = {
    "triton": Config(TileConfig(16, 8, 2), TileConfig(8, 4, 2), BlockConfig(8, 4, 2, part=8)),
    "triton_token_major": Config(TileConfig(1, 4, 2), TileConfig(1, 4, 2), BlockConfig(1, 4, 2, part=8)),
}


@pytest.mark.parametrize("design", DESIGNS)
def test_ragged_rows_later_queries_and_split_lists(design):
    with interpreted():
        compare(
            functools.partial(DESIGNS[design].selected_attention, config=SMALL[design]),
            *(jnp.bfloat16, 7, 64),
            batch=2,
            queries=11,
            keys=150,
            places=2,
            q_offset=139,
            lengths=(150, 146),
        )


def test_wide_heads_and_whole_blocks_in_both_tile_sizes():
    config = Config(TileConfig(8, 4, 1), TileConfig(16, 8, 1), BlockConfig(8, 8, 2, part=64))
    with interpreted():
        compare(
            functools.partial(triton.selected_attention, config=config),
            *(jnp.float16, 8, 128),
            heads=2,
            queries=9,
            keys=215,
            places=3,
            q_offset=206,
        )


def launches_of(design, spec, config=None):
    q, k, v, _ = spec.shapes
    index = jax.ShapeDtypeStruct((*q.shape[:3], spec.block_count), jnp.int32)
    attend = functools.partial(DESIGNS[design].selected_attention, block_size=64, lengths=None, config=config)

    def both(q, k, v, index, do, offset):
        results, back = jax.vjp(lambda q, k, v: attend(q, k, v, index, q_offset=offset), q, k, v)
        return *results, *back((do, results[1]))

    return launches(both, q, k, v, index, q, jax.ShapeDtypeStruct((), jnp.int32))


def spec_of(name):
    return next(spec for spec in SPECS if spec.name.startswith(name))


def test_kernels_for_hopper_use_its_matrix_units():
    for launch in launches_of("triton", spec_of("7B, 128K")):
        built = compiled(launch)
        assert "wgmma.mma_async" in built.ptx
        assert "cp.async.cg" in built.ptx
        # dk and dv keep a few pointers in local memory, at 255 registers; no larger tile would do with less.
        assert built.spills <= (128 if launch.kernel.__name__ == "key_gradients_kernel" else 0)
        # Two programs share a multiprocessor, each with 1 KiB of the system's.
        assert 2 * (built.shared_memory + 1024) <= gpu.SHARED_MEMORY + 1024


def test_token_major_kernels_compile_for_hopper():
    for launch in launches_of("triton_token_major", spec_of("7B, 128K")):
        built = compiled(launch)
        assert "cp.async.cg" in built.ptx
        assert built.spills == 0
        assert built.shared_memory <= gpu.SHARED_MEMORY


@pytest.mark.parametrize("design", DESIGNS)
def test_narrow_heads_fit_shared_memory(design):
    spec = dataclasses.replace(spec_of("7B, 128K"), head_dim=64, dtype="float16")
    for launch in launches_of(design, spec):
        assert compiled(launch).shared_memory <= gpu.SHARED_MEMORY


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": jnp.float32}, "bfloat16 and float16, not float32"),
        ({"size": 32}, "head sizes 64 and 128, not 32"),
        ({"group": 9}, "at most 8 query heads per KV head, not 9"),
        ({"block": 32}, "block_size 64, not 32"),
    ],
)
def test_calls_that_the_kernels_do_not_cover_say_why(design, change, message):
    sizes = {"dtype": jnp.bfloat16, "size": 64, "group": 7, "block": 64} | change
    q = jnp.zeros((1, 4, 1, sizes["group"], sizes["size"]), sizes["dtype"])
    k = jnp.zeros((1, 4, 1, sizes["size"]), sizes["dtype"])
    index = jnp.zeros((1, 4, 1, 1), jnp.int32)
    with pytest.raises(NotImplementedError, match=message):
        DESIGNS[design].selected_attention(q, k, k, index, block_size=sizes["block"], q_offset=0, lengths=None)


def test_more_elements_than_32_bits_count_are_refused():
    spec = dataclasses.replace(spec_of("7B, 128K"), queries=600_000, keys=600_000)
    with pytest.raises(NotImplementedError, match=r"rows of a batch below 2147483648 elements, not q of \(1, 600000"):
        launches_of("triton", spec)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TileConfig(tokens=12, warps=4, stages=2), "no tile configuration, expected 1, 8 or 16 tokens"),
        (lambda: BlockConfig(tokens=8, warps=4, stages=2, part=12), "no block configuration, .* part a multiple of 8"),
    ],
)
def test_configurations_that_no_kernel_runs_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("design", DESIGNS)
def test_another_device_is_named(design):
    q, k = jnp.zeros((1, 4, 1, 2, 64), jnp.bfloat16), jnp.zeros((1, 4, 1, 64), jnp.bfloat16)
    message = r"needs an NVIDIA GPU of compute capability 8.0 or more, not platform 'cpu'"
    with pytest.raises(NotImplementedError, match=message):
        selected_attention(q, k, k, jnp.zeros((1, 4, 1, 1), jnp.int32), block_size=64, implementation=design)


@pytest.mark.parametrize("design", DESIGNS)
def test_nothing_to_attend_to(design):
    q, k = jnp.zeros((1, 3, 1, 2, 64), jnp.bfloat16), jnp.zeros((1, 0, 1, 64), jnp.bfloat16)
    o, lse = DESIGNS[design].selected_attention(
        q, k, k, jnp.zeros((1, 3, 1, 1), jnp.int32), block_size=64, q_offset=0, lengths=jnp.array([0])
    )
    assert not o.any()
    assert (lse == -1e30).all()


def test_importing_the_library_imports_no_triton():
    code = "import sys, pallas_kernels; sys.exit(any(name in sys.modules for name in ('triton', 'jax_triton')))"
    subprocess.run([sys.executable, "-c", code], check=True)
