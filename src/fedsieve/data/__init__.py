"""Datasets: a name and a folder become tensors."""
