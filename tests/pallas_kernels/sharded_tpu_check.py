"""Run by test_mosaic_tpu_selected on two devices: interpreted TPU kernels inside shard_map give one device's values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from pallas_kernels import nsa_attention, nsa_attention_sharded

SPLITS = {"context": {"context_axis": "devices"}, "tensor": {"tensor_axis": "devices"}}


def main():
    assert jax.device_count() == 2
    draw = np.random.default_rng(0).standard_normal
    shapes = ((1, 64, 2, 2, 64), (1, 64, 2, 64), (1, 64, 2, 64), (1, 64, 2, 2, 3), (1, 64, 2, 2, 64))
    *arrays, do = (jnp.asarray(draw(shape), jnp.float32) for shape in shapes)
    options = {"block_size": 32, "block_count": 2, "window_size": 10, "lengths": jnp.asarray([50])}

    def values_and_gradients(run, implementation):
        def loss(*arrays):
            o = run(*arrays, implementation=implementation, **options)
            return (o * do).sum(), o

        (_, o), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(*arrays)
        return o, *gradients

    expected = values_and_gradients(nsa_attention, "xla")
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(AxisType.Auto,))
    for name, split in SPLITS.items():
        actual = values_and_gradients(functools.partial(nsa_attention_sharded, mesh=mesh, **split), "mosaic_tpu")
        for x, y in zip(actual, expected, strict=True):
            # Some hundred roundings of float32 (6e-8).
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-4 * float(jnp.abs(y).max()), err_msg=name)
        print(name)


if __name__ == "__main__":
    main()
