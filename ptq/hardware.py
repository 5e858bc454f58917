"""What a job runs on, and how much of its memory it took."""

from __future__ import annotations

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
