"""What a job runs on, how much of its memory it took, and how freed memory is kept."""

from __future__ import annotations

import ctypes
import platform
import resource
import sys

import torch


def device_name(device: torch.device) -> str:
    """The GPU by its name, or the processor and the threads in use."""
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
    )


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of the device's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def keep_freed_memory() -> None:
    """Have this process keep the memory that tensors free, for those that follow.

    glibc gives large blocks back at once, so that the kernel zeroes every page of every intermediate tensor
    again: as much as half of a forward pass on a CPU. After this, blocks come from a heap that is never
    trimmed, whose peak is somewhat higher. What other allocators do is left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, mmap_max = -1, -4  # mallopt's parameters in malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)
