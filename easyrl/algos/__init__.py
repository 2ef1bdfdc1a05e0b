"""The equations: arrays in, arrays out. Imports jax and core.masking, nothing else."""
