"""HTTP in, runtime calls out, and nothing else."""
