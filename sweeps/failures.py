"""Telling apart what ends a trial by an error: the trial, its memory, or the device."""

from __future__ import annotations

import torch


class Hopeless(Exception):
    """Another attempt at the trial would end the same way."""


def out_of_memory(error: Exception) -> bool:
    """Whether PyTorch or Python found no memory for the trial, on the GPU or beside it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # The latter within the error of `Module.load_state_dict`, which is of no kind of its own.
    words = ("can't allocate memory", "CUDA out of memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def failure_kind(reason: str) -> str:
    """What failures alike have in common: out of memory differs in its numbers each time."""
    return reason.partition(":")[0] if reason.startswith("out of memory") else reason
