"""Run by test_nsa_sharded on eight devices: each way to split gives one device's values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from pallas_kernels import nsa_attention, nsa_attention_sharded

SPLITS = {
    "data": {"data_axes": ("data", "fsdp")},
    "context": {"context_axis": "context"},
    "tensor": {"tensor_axis": "tensor"},
    "all": {"data_axes": ("data", "fsdp"), "context_axis": "context", "tensor_axis": "tensor"},
    "none": {},
}
MESHES = {
    "data": (4, 2, 1, 1),
    "context": (1, 1, 8, 1),
    "tensor": (2, 2, 1, 2),
    "all": (2, 1, 2, 2),
    "none": (2, 1, 2, 2),
}


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
        actual = values_and_gradients(functools.partial(nsa_attention_sharded, mesh=mesh, **split))
        for x, y in zip(actual, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 * float(jnp.abs(y).max()), err_msg=name)
        print(name)

    mesh = jax.make_mesh((8,), ("context",), axis_types=(AxisType.Auto,))
    odd = (x[:, :63] for x in arrays)
    with pytest.raises(ValueError, match="split q's axis 1 of 63 into 8 parts"):
        nsa_attention_sharded(*odd, mesh=mesh, context_axis="context")


if __name__ == "__main__":
    main()
