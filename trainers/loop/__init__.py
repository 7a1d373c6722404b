"""The one training loop and what it keeps: players, checkpoints, processes, memory, health."""
