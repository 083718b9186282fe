"""The training loop, its step, the averaged weights and checkpoints."""
