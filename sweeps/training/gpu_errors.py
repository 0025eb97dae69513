"""What the errors of a GPU and of the libraries on it say of its state."""

from __future__ import annotations

import torch

GPU_ERRORS = ("CUDA error", "CUDA driver error", "Triton Error [CUDA]")
"""How errors begin that are the device's: of PyTorch, of its launcher of compiled kernels, of
Triton."""


def breaks_device(error: BaseException) -> bool:
    """Whether the process can use its GPU no more, as after an illegal access."""
    text = str(error)
    found = any(name in text for name in GPU_ERRORS)
    return found and not isinstance(error, torch.cuda.OutOfMemoryError)


def gpu_is_full(error: BaseException) -> bool:
    """Whether CUDA or one of its libraries found no memory beside what PyTorch holds for tensors.

    Its own errors carry that in their text alone. On a GPU that others share, fewer workers help;
    elsewhere the device counts as broken, as nobody knows who holds the rest.
    """
    text = str(error)
    return "CUBLAS_STATUS_ALLOC_FAILED" in text or any(
        f"{name}: out of memory" in text for name in GPU_ERRORS
    )
