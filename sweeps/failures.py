"""Telling apart what ends a trial by an error: the trial, its memory, or the device."""

from __future__ import annotations

import torch

GPU_ERRORS = ("CUDA error", "CUDA driver error", "Triton Error [CUDA]")
"""How errors begin that are the device's: of PyTorch, of its launcher of compiled kernels, of
Triton."""


class Hopeless(Exception):
    """Another attempt at the trial would end the same way."""


def breaks_device(error: Exception) -> bool:
    """Whether the process can use its GPU no more, as after an illegal access."""
    text = str(error)
    found = any(name in text for name in GPU_ERRORS)
    return found and not isinstance(error, torch.cuda.OutOfMemoryError)


def gpu_is_full(error: Exception) -> bool:
    """Whether CUDA or one of its libraries found no memory beside what PyTorch holds for tensors.

    Its own errors carry that in their text alone. On a GPU that others share, fewer workers help;
    elsewhere the device counts as broken, as nobody knows who holds the rest.
    """
    text = str(error)
    return "CUBLAS_STATUS_ALLOC_FAILED" in text or any(
        f"{name}: out of memory" in text for name in GPU_ERRORS
    )


def out_of_memory(error: Exception) -> bool:
    """Whether PyTorch or Python found no memory for the trial, on the GPU or beside it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def failure_kind(reason: str) -> str:
    """What failures alike have in common: out of memory differs in its numbers each time."""
    return reason.partition(":")[0] if reason.startswith("out of memory") else reason
