"""Rotary embeddings against direct statements of them."""

import jax.numpy as jnp
import numpy as np

from videonsa_jax.models import rope

# Angles reach a few thousand radians, of which float32 keeps 24 bits.
ANGLE_ROUNDING = 2e-3


def _rotate_complex(x, angles):
    """Channel c and c + D/2 as real and imaginary part, turned by angles [..., D/2]."""
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def test_mrope_turns_each_pair_by_its_own_axis():
    rng = np.random.default_rng(0)
    sections, theta, head_dim = (3, 2, 3), 1000.0, 16
    positions = rng.integers(0, 3000, (3, 2, 5)).astype(np.int32)
    angles = np.zeros((2, 5, head_dim // 2))
    for pair in range(head_dim // 2):
        axis = 0 if pair < 3 else 1 if pair < 5 else 2
        angles[..., pair] = positions[axis] / theta ** (2 * pair / head_dim)
    x = rng.standard_normal((2, 5, head_dim)).astype(np.float32)
    turned = rope.rotate(jnp.asarray(x), rope.mrope_tables(jnp.asarray(positions), sections, theta))
    np.testing.assert_allclose(turned, _rotate_complex(x, angles), atol=ANGLE_ROUNDING)


def test_mrope_equals_the_chunked_form_of_transformers():
    """cos and sin of all three axes, cut into sections twice over and taken in turn; then rotate_half."""
    rng = np.random.default_rng(1)
    sections, theta, head_dim = (2, 3, 3), 100.0, 16
    positions = rng.integers(0, 50, (3, 1, 7)).astype(np.int32)
    inverse = 1.0 / theta ** (np.arange(0, head_dim, 2) / head_dim)
    angles = positions[..., None] * inverse
    angles = np.concatenate([angles, angles], axis=-1)
    cuts = np.cumsum([*sections, *sections])[:-1]
    cos, sin = (
        np.concatenate([part[i % 3] for i, part in enumerate(np.split(f(angles), cuts, axis=-1))], axis=-1)
        for f in (np.cos, np.sin)
    )
    x = rng.standard_normal((1, 7, head_dim)).astype(np.float32)
    rotated_half = np.concatenate([-x[..., head_dim // 2 :], x[..., : head_dim // 2]], axis=-1)
    actual = rope.rotate(jnp.asarray(x), rope.mrope_tables(jnp.asarray(positions), sections, theta))
    np.testing.assert_allclose(actual, x * cos + rotated_half * sin, atol=1e-4)  # angles below 50: 24 bits of 50


def test_vision_rope_reads_rows_then_columns():
    rng = np.random.default_rng(2)
    rows, columns = rng.integers(0, 40, (2, 6)).astype(np.int32)
    head_dim, theta = 16, 10_000.0
    inverse = 1.0 / theta ** (np.arange(4) / 4)
    angles = np.concatenate([rows[:, None] * inverse, columns[:, None] * inverse], axis=-1)
    x = rng.standard_normal((6, head_dim)).astype(np.float32)
    tables = rope.grid_tables(jnp.asarray(rows), jnp.asarray(columns), head_dim, theta)
    np.testing.assert_allclose(rope.rotate(jnp.asarray(x), tables), _rotate_complex(x, angles), atol=1e-4)


def test_rotation_keeps_the_dtype():
    tables = rope.mrope_tables(jnp.ones((3, 4), jnp.int32), (1, 1, 2), 100.0)
    assert rope.rotate(jnp.ones((4, 8), jnp.bfloat16), tables).dtype == jnp.bfloat16
