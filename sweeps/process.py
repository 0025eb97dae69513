"""What a process that trains sets once: threads, memory, and the same numbers every time."""

from __future__ import annotations

import contextlib
import ctypes
import os

import torch


def prepare_process(device: torch.device, threads: int, gpu_memory: int | None = None) -> None:
    """Set PyTorch up for a worker process: its threads, and the same numbers every time.

    Args:
        device: where it trains.
        threads: of the CPU.
        gpu_memory: bytes of a GPU that it may allocate; beyond, a training is out of memory. None
            sets no limit.
    """
    torch.set_num_threads(threads)
    _keep_freed_memory()
    if device.type == "cuda":
        # cuBLAS gives equal sums every time only with a workspace of fixed size.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.cuda.set_device(device)
        if gpu_memory is not None:
            whole = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, gpu_memory / whole), device)
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True


def return_freed_memory() -> None:
    """Hand back what `prepare_process` has it keep: the next trial may need less than the last.

    So is a GPU's memory that PyTorch keeps: kernels that the next trial has compiled, and cuBLAS's
    and cuDNN's own, are loaded beside it.
    """
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next one.

    By default it hands batches and maps back to the system, which clears them page by page when
    they are asked for again: batches of images came at 122k instead of 324k images/s. No size is
    left out, as would be with a threshold, of 32 MiB at most: a step of ResNet-18 on 128 images of
    32x32, whose first maps are as large, met with 40,000 to 400,000 new pages, up to a third of
    its time, and meets with none.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_trim_threshold, 2**30)
        mallopt(m_mmap_max, 0)
