"""Runs on disk: the run directory, checkpoints, sweeps, and the trained model in use."""
