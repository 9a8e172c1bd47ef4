"""Sparse training for CPUs."""
