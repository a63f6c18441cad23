"""Attention of the vision tower: patches of one frame, or of one window of a frame, attend to each other.

Patches stand window by window, so a window's patches are at most a window apart: a windowed layer cuts each frame into
blocks of a full window's size, and a block needs its own keys (where no window crosses a block's border) or its
neighbours' as well. Frames of different grids share a batch; what is computed never depends on one's padding.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from pallas_kernels.chunked import attend, attend_gradient, over_query_chunks

PADDING = jnp.iinfo(jnp.int32).max  # the number of the window of padded patches; sorts last
GPU_TILE_ELEMENTS = 2**28  # 1 GiB of float32 logits: two minutes of video whole, without the copies of a loop


@dataclass(frozen=True)
class Windows:
    """Which window each patch lies in.

    Attributes:
      number: equal for patches of the same window, which are contiguous; `PADDING` where there is no patch.
      size: patches of a full window; none has more.
    """

    number: Int[Array, "F P"]
    size: int

    def stay_in_blocks(self) -> Bool[Array, ""]:
        """Whether no window crosses from one block of `size` patches into the next, in any frame."""
        last, first = self.number[:, self.size - 1 : -1 : self.size], self.number[:, self.size :: self.size]
        return jnp.all((last != first) | (first == PADDING))


def attend_patches(
    q: Float[Array, "F P H D"],
    k: Float[Array, "F P H D"],
    v: Float[Array, "F P H D"],
    windows: Windows,
    is_full: Bool[Array, ""],
) -> Float[Array, "F P H D"]:
    """Attends among all patches of a frame if `is_full`, else among those of a window.

    Args:
      q: queries, H heads.
      k: keys.
      v: values.
      windows: see there.
      is_full: one traced scalar, so that a scanned stack of layers compiles one layer.

    Returns:
      Output in q's dtype, 0 where there is no patch. Softmax in float32.
    """
    # Tiles are whole, or a frame lies within one. Only here: products with weights have no padded patches to see.
    patches = q.shape[1]
    fill = -patches % windows.size if patches > windows.size else 0
    number = jnp.pad(windows.number, [(0, 0), (0, fill)], constant_values=PADDING)
    q, k, v = (jnp.pad(x, [(0, 0), (0, fill), (0, 0), (0, 0)]) for x in (q, k, v))
    kind = jnp.where(is_full, 0, jnp.where(Windows(number, windows.size).stay_in_blocks(), 1, 2))
    return _attend(q, k, v, number, kind, windows.size)[:, :patches]


@dataclass(frozen=True)
class _Form:
    """A way to cut frames into tiles.

    Attributes:
      size: patches of a tile.
      neighbours: whether a tile sees the keys of the tiles beside it.
      windowed: whether a patch sees its own window only.
    """

    size: int
    neighbours: bool
    windowed: bool

    def queries(self, x: Float[Array, "F P H *D"]) -> Float[Array, "F H tiles size 1 *D"]:
        """Rows of the tiles: queries, outputs or log-sum-exps."""
        return self._cut(x)[:, :, :, :, None]

    def patches(self, x: Float[Array, "F H tiles size 1 *D"]) -> Float[Array, "F P H *D"]:
        """The inverse of `queries`."""
        frames, heads, tiles, size, _, *rest = x.shape
        return jnp.swapaxes(x.reshape(frames, heads, tiles * size, *rest), 1, 2)

    def keys(self, x: Float[Array, "F P H D"]) -> Float[Array, "F H tiles keys D"]:
        """Keys or values that the tiles see."""
        return self._reach(self._cut(x), 0)

    def visible(self, number: Int[Array, "F P"]) -> Bool[Array, "F 1 tiles size 1 keys"]:
        """Which keys a tile's queries see."""
        own = self._cut(number[:, :, None])
        query, key = own[:, :, :, :, None], self._reach(own, PADDING)[:, :, :, None, :]
        seen = (query != PADDING) & (key != PADDING)
        if self.windowed:
            seen &= query == key
        return seen[:, :, :, :, None, :]

    def _cut(self, x: Shaped[Array, "F P H *D"]) -> Shaped[Array, "F H tiles size *D"]:
        # Heads before tiles: one transposition serves windows and whole frames alike, and XLA makes it where rotary
        # embedding writes its result.
        x = jnp.swapaxes(x, 1, 2)
        return x.reshape(*x.shape[:2], x.shape[2] // self.size, self.size, *x.shape[3:])

    def _reach(self, x: Shaped[Array, "F H tiles size *D"], fill: int) -> Shaped[Array, "F H tiles keys *D"]:
        if not self.neighbours:
            return x
        padded = jnp.pad(x, [(0, 0), (0, 0), (1, 1)] + [(0, 0)] * (x.ndim - 3), constant_values=fill)
        return jnp.concatenate([padded[:, :, :-2], x, padded[:, :, 2:]], axis=3)


def _over_forms(function: Callable[..., Any], kind: Array, size: int, arrays: tuple[Array, ...]) -> Any:
    """`function(form, *arrays)`, a chunk of frames at a time, in the form that `kind` says."""
    patches, heads = arrays[0].shape[1:3]
    block = min(size, patches)

    def in_form(form: _Form) -> Callable[..., Any]:
        def run(*arrays: Array) -> Any:
            def body(chunk: tuple[Array, ...]) -> Any:
                return jax.tree.map(lambda x: x[None], function(form, *(x[0] for x in chunk)))

            logits = heads * patches * form.size * (3 if form.neighbours else 1)
            most = GPU_TILE_ELEMENTS if jax.default_backend() == "gpu" else None
            results = over_query_chunks(body, tuple(x[None] for x in arrays), logits, most)
            return jax.tree.map(lambda x: x[0], results)

        return run

    forms = (_Form(patches, False, False), _Form(block, False, True), _Form(block, True, True))
    # In a frame no larger than a window, no window can cross a border.
    return jax.lax.switch(kind, [in_form(form) for form in forms[: 2 if patches <= size else 3]], *arrays)


def _tile_forward(form: _Form, q: Array, k: Array, v: Array, number: Array) -> tuple[Array, Array]:
    o, lse = attend(form.queries(q), form.keys(k), form.keys(v), form.visible(number))
    return form.patches(o), form.patches(lse)


def _tile_backward(
    form: _Form, q: Array, k: Array, v: Array, number: Array, o: Array, lse: Array, do: Array
) -> tuple[Array, Array, Array]:
    rows = (form.queries(x) for x in (o, lse, do))
    gradients = attend_gradient(
        form.queries(q), form.keys(k), form.keys(v), form.visible(number), *rows, jnp.zeros_like(form.queries(lse))
    )
    add_up = jax.linear_transpose(form.keys, k)
    return form.patches(gradients[0]), *(add_up(x)[0] for x in gradients[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(
    q: Float[Array, "F P H D"],
    k: Float[Array, "F P H D"],
    v: Float[Array, "F P H D"],
    number: Int[Array, "F P"],
    kind: Int[Array, ""],
    size: int,
) -> Float[Array, "F P H D"]:
    return _over_forms(_tile_forward, kind, size, (q, k, v, number))[0]


def _attend_forward(
    q: Array, k: Array, v: Array, number: Array, kind: Array, size: int
) -> tuple[Array, tuple[Array, ...]]:
    o, lse = _over_forms(_tile_forward, kind, size, (q, k, v, number))
    return o, (q, k, v, number, o, lse, kind)


def _attend_backward(size: int, residuals: tuple[Array, ...], do: Array) -> tuple[Array | None, ...]:
    *arrays, kind = residuals
    return *_over_forms(_tile_backward, kind, size, (*arrays, do)), None, None


_attend.defvjp(_attend_forward, _attend_backward)
