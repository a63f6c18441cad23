"""That processes which load the same contexts hold the same."""

from collections.abc import Sequence

import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Bool

from videonsa_jax.data.examples import clear_context
from videonsa_jax.training.mesh import loading_shard, place_batch


def place_agreed[AnyBatch](
    batches: Sequence[AnyBatch], failed_rows: Sequence[Bool[np.ndarray, "B"]], mesh: Mesh
) -> list[AnyBatch]:
    """Puts batches on the devices; of a context that one process could not load, all that load it have none.

    Where processes load the same contexts (`LoadingShard.is_shared`) this is a collective, for the main thread:
    collectives of two threads have no order.

    Args:
      batches: this process' parts, NumPy arrays; a context is emptied in place.
      failed_rows: of each, which contexts could not be loaded here.
      mesh: from `make_mesh`.
    """
    shard = loading_shard(mesh)
    if shard.is_shared:
        everywhere = np.asarray(multihost_utils.process_allgather(np.stack(failed_rows)))
        for batch, failed in zip(batches, everywhere[list(shard.processes)].any(axis=0), strict=True):
            for row in np.flatnonzero(failed):
                clear_context(batch, int(row))
    return [place_batch(batch, mesh) for batch in batches]
