"""Training: the loop, the step, losses, optimizers, checkpoints, metrics."""
