"""Asking the held-out questions."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from videonsa_jax.data.examples import EvalBatch
from videonsa_jax.training.loading import place_agreed


def evaluate(
    choose: Callable[..., dict[str, jax.Array]],
    params: Any,
    batches: Iterator[tuple[EvalBatch, np.ndarray]],
    mesh: Mesh,
    *,
    stopped: Callable[[], bool],
) -> dict[int, bool]:
    """Asks the questions of some batches.

    Args:
      choose: `choose_options`, compiled, with replicated outputs.
      params: the model's parameters.
      batches: of the held-out split, each with its contexts that could not be loaded.
      mesh: from `make_mesh`.
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
    for batch, failed_rows in batches:
        if stopped():
            break
        chosen = choose(params, *place_agreed([batch], [failed_rows], mesh))
        if pending is not None:  # one batch behind, so that the next one is read while the devices work
            collect(pending)
        pending = chosen
    if pending is not None:
        collect(pending)
    return right
