"""What a job runs on, how much of its memory it took, and how freed memory is kept."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import resource
import sys
from pathlib import Path

import torch

PEAK_RESET = Path("/proc/self/clear_refs")  # Linux: what is written there resets counters of the process


def device_name(device: torch.device) -> str:
    """The GPU by its name, or the processor and the threads in use."""
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
    )


def reset_peak_memory(device: torch.device) -> None:
    """Count the peak from here on, so that a job in a process of many is not charged with those before it.

    On a CPU, memory that was freed is given back first. Without effect on a CPU where the system is not
    Linux: the peak is then that of the process's life.
    """
    if device.type == "cuda":
        torch.cuda.init()  # which counters need
        torch.cuda.reset_peak_memory_stats(device)
        return
    if _glibc():
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        PEAK_RESET.write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of the device's allocator, or of the process on a CPU, since `reset_peak_memory`."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def keep_freed_memory() -> None:
    """Have this process keep the memory that tensors free, for those that follow.

    glibc gives large blocks back at once, so that the kernel zeroes every page of every intermediate tensor
    again, in every forward pass. After this, blocks come from a heap that is never
    trimmed, whose peak is somewhat higher. What other allocators do is left alone.
    """
    if not _glibc():
        return
    trim_threshold, mmap_max = -1, -4  # mallopt's parameters in malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)


def _glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
