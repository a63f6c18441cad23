"""Run by test_nsa_sharded on eight devices: each way to split gives one device's values, gradients and choices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels import (
    block_means,
    block_selection,
    compressed_attention,
    nsa_attention,
    nsa_attention_sharded,
)
from pallas_kernels.stripes import gather_stripes, stripe_starts, striped_order

SPLITS = {
    "data": {"data_axes": ("data", "fsdp")},
    "context": {"context_axis": "context"},
    "tensor": {"tensor_axis": "tensor"},
    "all": {"data_axes": ("data", "fsdp"), "context_axis": "context", "tensor_axis": "tensor"},
    "none": {},
    "stripes-8": {"context_axis": "context", "striped": True},
    "stripes-4": {"data_axes": ("data",), "context_axis": "context", "striped": True},
}
MESHES = {
    "data": (4, 2, 1, 1),
    "context": (1, 1, 8, 1),
    "tensor": (2, 2, 1, 2),
    "all": (2, 1, 2, 2),
    "none": (2, 1, 2, 2),
    "stripes-8": (1, 1, 8, 1),
    "stripes-4": (2, 1, 4, 1),
}


def in_order(run, order, *arrays, **options):
    """`run` on a stream laid out in `order`; the result in sequence order again."""
    return run(*(x[:, order] for x in arrays), **options)[:, np.argsort(order)]


def check_chosen_blocks(arrays, lengths, mesh, order):
    """The blocks that queries choose on their rank are those that they choose on one device, exactly."""
    q, k, v = arrays[:3]

    def choose(q, k, v, lengths, start=0):
        shared = {"block_size": 8, "q_offset": start, "lengths": lengths}
        k_blocks = block_means(k, 8)
        _, lse = compressed_attention(q, k_blocks, block_means(v, 8), **shared)
        return block_selection(q, k_blocks, lse, block_count=3, **shared)

    def on_rank(q, k, v, lengths):
        k, v = (gather_stripes(x, "context") for x in (k, v))
        starts = stripe_starts("context", q.shape[1] // 2)
        stripes = zip(jnp.split(q, 2, axis=1), starts, strict=True)
        return jnp.concatenate([choose(q, k, v, lengths, start) for q, start in stripes], axis=1)

    tokens = PartitionSpec("data", "context")
    split = jax.shard_map(
        on_rank, mesh=mesh, in_specs=(tokens,) * 3 + (PartitionSpec("data"),), out_specs=tokens, check_vma=False
    )
    actual = jax.jit(split)(q[:, order], k[:, order], v[:, order], lengths)
    np.testing.assert_array_equal(actual[:, np.argsort(order)], jax.jit(choose)(q, k, v, lengths))


def main():
    assert jax.device_count() == 8
    draw = np.random.default_rng(0).standard_normal
    shapes = ((8, 64, 2, 3, 8), (8, 64, 2, 8), (8, 64, 2, 8), (8, 64, 2, 3, 3), (8, 64, 2, 3, 8))
    *arrays, do = (jnp.asarray(draw(shape), jnp.float32) for shape in shapes)
    lengths = jnp.asarray([64, 0, 33, 50, 64, 7, 64, 21])
    options = {"block_size": 8, "block_count": 3, "window_size": 10, "lengths": lengths}

    def values_and_gradients(run):
        def loss(*arrays):
            o = run(*arrays, **options)
            return (o * do).sum(), o

        (_, o), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(*arrays)
        return o, *gradients

    expected = values_and_gradients(nsa_attention)
    for name, split in SPLITS.items():
        mesh = jax.make_mesh(MESHES[name], ("data", "fsdp", "context", "tensor"), axis_types=(AxisType.Auto,) * 4)
        sharded = functools.partial(nsa_attention_sharded, mesh=mesh, **split)
        order = np.arange(64)
        if split.get("striped"):
            order = striped_order(64, mesh.shape["context"])
            check_chosen_blocks(arrays, lengths, mesh, order)
        actual = values_and_gradients(functools.partial(in_order, sharded, order))
        for x, y in zip(actual, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 * float(jnp.abs(y).max()), err_msg=name)
        print(name)

    mesh = jax.make_mesh((8,), ("context",), axis_types=(AxisType.Auto,))
    odd = (x[:, :63] for x in arrays)
    with pytest.raises(ValueError, match="split q's axis 1 of 63 into 8 parts"):
        nsa_attention_sharded(*odd, mesh=mesh, context_axis="context")
    uneven = (x[:, :56] for x in arrays)
    with pytest.raises(ValueError, match="split q's axis 1 of 56 into 16 parts"):
        nsa_attention_sharded(*uneven, mesh=mesh, context_axis="context", striped=True)


if __name__ == "__main__":
    main()
