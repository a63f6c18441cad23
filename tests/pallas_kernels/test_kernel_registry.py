"""Choice of an implementation: by name, per operation, or by device with a fallback."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import nsa_attention, registry, window_attention
from pallas_kernels.measured_order import FILE, measured_order


@pytest.fixture
def arrays():
    draw = np.random.default_rng(0).standard_normal
    return tuple(jnp.asarray(draw(shape), jnp.float32) for shape in ((1, 8, 1, 2, 4), (1, 8, 1, 4), (1, 8, 1, 4)))


@pytest.fixture
def a_gpu(monkeypatch):
    """A machine whose operations have a Mosaic GPU kernel that covers windows below 4 keys."""

    def kernel(q, k, v, *, window_size, q_offset, lengths):
        if window_size >= 4:
            raise NotImplementedError(f"window_size {window_size}, at most 3")
        return q + 1, q[..., 0]

    table = {name: dict(functions) for name, functions in registry._registered.items()}
    table["window_attention"]["mosaic_gpu"] = kernel
    # The next choice after the kernel is XLA's.
    del table["window_attention"]["triton"]
    monkeypatch.setattr(registry, "_registered", table)
    monkeypatch.setattr(registry, "_warned", set())
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def test_an_unknown_name_lists_the_known_ones(arrays):
    with pytest.raises(ValueError, match=r"'cuda', expected None or one of xla, reference, mosaic_gpu, mosaic_tpu"):
        window_attention(*arrays, window_size=4, implementation="cuda")


def test_an_unknown_name_for_an_unused_operation_is_refused(arrays):
    q, k, v = arrays
    with pytest.raises(ValueError, match="'cuda'"):
        nsa_attention(
            q, k, v, jnp.zeros((*q.shape[:-1], 3)), branches=("window",), implementation={"selected_attention": "cuda"}
        )


def test_an_unknown_operation_lists_the_known_ones(arrays):
    with pytest.raises(ValueError, match=r"'sliding', expected one of block_selection, compressed_attention"):
        window_attention(*arrays, window_size=4, implementation={"sliding": "xla"})


def test_a_name_that_does_not_exist_for_the_operation_says_which_do(arrays):
    name = "triton_token_major"
    assert name not in registry.available("window_attention")
    with pytest.raises(NotImplementedError, match=f"window_attention has no implementation '{name}', only reference"):
        window_attention(*arrays, window_size=4, implementation=name)


def test_a_dict_names_an_implementation_per_operation(arrays, a_gpu):
    q, k, v = arrays
    by_kernel, _ = window_attention(q, k, v, window_size=2, implementation={"window_attention": "mosaic_gpu"})
    np.testing.assert_array_equal(by_kernel, q + 1)
    elsewhere, _ = window_attention(q, k, v, window_size=2, implementation={"selected_attention": "reference"})
    np.testing.assert_array_equal(elsewhere, q + 1)


def test_none_takes_the_devices_best(arrays, a_gpu):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        o, _ = window_attention(*arrays, window_size=2)
    np.testing.assert_array_equal(o, arrays[0] + 1)


def test_none_falls_back_with_one_warning(arrays, a_gpu):
    with pytest.warns(UserWarning, match="mosaic_gpu does not cover this call .window_size 4, at most 3"):
        first, _ = window_attention(*arrays, window_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second, _ = window_attention(*arrays, window_size=5)
    expected, _ = window_attention(*arrays, window_size=4, implementation="xla")
    np.testing.assert_array_equal(first, expected)
    assert not np.array_equal(first, second)


def test_a_named_kernel_does_not_fall_back(arrays, a_gpu):
    with pytest.raises(NotImplementedError, match="at most 3"):
        window_attention(*arrays, window_size=4, implementation="mosaic_gpu")


def test_every_operation_has_the_implementations_that_run_anywhere():
    for operation in registry._registered:
        assert {"reference", "xla"} <= set(registry.available(operation))


def test_none_takes_what_was_measured_fastest_on_the_device(arrays, a_gpu, monkeypatch):
    monkeypatch.setitem(registry._registered["window_attention"], "triton", lambda q, k, v, **_: (q + 2, q[..., 0]))
    measured = {"window_attention": ("triton", "mosaic_gpu", "xla"), "nsa_attention": ("mosaic_gpu", "triton")}
    monkeypatch.setattr(registry, "measured_order", lambda kind, operation: measured.get(operation, ()))
    o, _ = window_attention(*arrays, window_size=2)
    np.testing.assert_array_equal(o, arrays[0] + 2)
    measured["window_attention"] = ("xla", "triton")
    assert registry.first_choice("window_attention", None) == "xla"
    parts = ("window_attention", "selected_attention")
    assert registry.first_choice_of_all("nsa_attention", parts, None) == "mosaic_gpu"
    assert registry.first_choice_of_all("nsa_attention", parts, "triton") == "triton"
    assert registry.first_choice_of_all("another", parts, {"selected_attention": "reference"}) is None


def test_the_table_names_what_exists():
    assert measured_order("a device that nobody measured", "nsa_attention") == ()
    table = json.loads(FILE.read_text())["devices"]
    for operations in table.values():
        for names in operations.values():
            assert set(names) <= set(registry.NAMES)
