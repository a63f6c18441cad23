"""Training: mesh, optimiser, step, loop, checkpoints, metrics, report."""
