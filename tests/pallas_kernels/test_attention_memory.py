"""The XLA implementations need memory linear in the length, forward and backward."""

import functools
import math
from unittest import mock

import jax
import jax.extend.core
import jax.numpy as jnp
import pytest

from pallas_kernels import chunked, nsa_attention, prefix_attention
from pallas_kernels.specs import SPECS, Spec


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Overrides the folder's fixture: memory is that of a fully optimized program."""


def loss(*arrays, **options):
    return nsa_attention(*arrays, **options, implementation="xla").astype(jnp.float32).sum()


def prefix_loss(q, k, v):
    visible = jnp.broadcast_to(jnp.arange(q.shape[1]) + 1, (q.shape[0], 1, q.shape[1]))
    o, lse = prefix_attention(q[:, None], k, v, visible, implementation="xla")
    return o.astype(jnp.float32).sum() + lse.sum()


def largest_array(jaxpr):
    """Elements of the largest array that a jaxpr makes, inner ones included."""
    largest = 0
    for equation in jaxpr.eqns:
        sizes = [math.prod(variable.aval.shape) for variable in equation.outvars]
        inner = [largest_array(inner) for inner in jax.extend.core.jaxprs_in_params(equation.params)]
        largest = max(largest, *sizes, *inner, 0)
    return largest


def long(length):
    return Spec("one head", length, length, 1, 1, 2, 16, 64, 4, 256, dtype="float32")


def test_the_largest_array_is_seen():
    def outer(x):
        return jax.lax.map(lambda row: jnp.outer(row, row).sum(), x)

    assert largest_array(jax.make_jaxpr(outer)(jnp.zeros((3, 50))).jaxpr) == 2500


@pytest.mark.parametrize("function", [loss, prefix_loss])
def test_no_array_of_all_queries_by_all_blocks_exists(function):
    spec = long(16_384)
    arrays = spec.shapes if function is loss else spec.shapes[:3]
    options = spec.options if function is loss else {}
    with mock.patch.object(chunked, "TILE_ELEMENTS", 2**20):
        gradient = jax.grad(functools.partial(function, **options), argnums=(0, 1, 2))
        jaxpr = jax.make_jaxpr(gradient)(*arrays)
    assert largest_array(jaxpr.jaxpr) <= 2**20 < spec.queries * spec.keys // spec.block_size


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.queries > 1000], ids=lambda spec: spec.name)
def test_nothing_outgrows_the_inputs_or_a_tile(spec):
    """At published sizes. The window pads its keys by as many as there are queries."""
    jaxpr = jax.make_jaxpr(jax.grad(functools.partial(loss, **spec.options), argnums=(0, 1, 2, 3)))(*spec.shapes)
    inputs = sum(math.prod(x.shape) for x in spec.shapes[:2])
    assert largest_array(jaxpr.jaxpr) <= max(inputs, chunked.TILE_ELEMENTS)


@pytest.mark.parametrize("function", [loss, prefix_loss])
def test_compiled_memory_is_linear(function):
    def temporary_bytes(length):
        spec = long(length)
        arrays = spec.shapes if function is loss else spec.shapes[:3]
        options = spec.options if function is loss else {}
        gradient = jax.grad(functools.partial(function, **options), argnums=(0, 1, 2))
        return jax.jit(gradient).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    with mock.patch.object(chunked, "TILE_ELEMENTS", 2**18):
        short, double = temporary_bytes(4096), temporary_bytes(8192)
    assert double <= 2.1 * short
