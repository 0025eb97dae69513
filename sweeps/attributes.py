"""Attributes of a trial that a worker writes and a pruner reads; `sweeps.status` has the others."""

OUTCOME = "outcome"
"""User attribute: how it ended."""

CURVES = "sweep:curves"
"""System attribute: what was measured, by name, one number for each epoch."""
