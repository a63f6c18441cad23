"""Asking the held-out questions."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from videonsa_jax.data.pipeline import Pipeline
from videonsa_jax.training.mesh import place_batch


def evaluate(
    choose: Callable[..., dict[str, jax.Array]],
    params: Any,
    pipeline: Pipeline,
    mesh: Mesh,
    *,
    batches: int,
    stopped: Callable[[], bool],
) -> dict[int, bool]:
    """Asks the questions of the split's first batches.

    Args:
      choose: `choose_options`, compiled, with replicated outputs.
      params: the model's parameters.
      pipeline: of the held-out split.
      mesh: from `make_mesh`.
      batches: how many to read.
      stopped: asked before each batch; once true, the answers so far are returned.

    Returns:
      For each sample id whether the predicted option is the answer.
    """
    right: dict[int, bool] = {}

    def collect(chosen: dict[str, jax.Array]) -> None:
        ids, predicted, answer = (np.ravel(chosen[name]) for name in ("sample_ids", "predicted", "answer"))
        asked = answer >= 0
        right.update(zip(ids[asked].tolist(), (predicted == answer)[asked].tolist(), strict=True))

    pending = None
    with contextlib.closing(pipeline.iterator()) as iterator:
        for _ in range(batches):
            if stopped():
                break
            chosen = choose(params, place_batch(next(iterator), mesh))
            if pending is not None:  # one batch behind, so that the next one is read while the devices work
                collect(pending)
            pending = chosen
    if pending is not None:
        collect(pending)
    return right
