"""Shape and type annotations of the library are checked while tests run."""

import os

# Before jax is imported: tests run on the CPU unless the caller names a platform (make test-gpu does).
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Each thread of an interpreted GPU kernel blocks one of the pool: with as few as a small machine has they deadlock.
os.environ.setdefault("PJRT_NPROC", "16")

from jaxtyping import install_import_hook

# Kept for the whole session: every module imported after this line is checked.
install_import_hook(["pallas_kernels", "videonsa_jax"], "beartype.beartype")
