"""Sweep: hyperparameter sweeps for training without Batch Normalization on non-IID data."""
