"""Freed memory that stays with the process."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from ptq.hardware import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "keep":
    keep_freed_memory()
for round in range(10):
    if round == 5:
        before = faults()
    torch.ones(2**24)  # 16384 pages
print(faults() - before)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="the C library is not glibc, whose allocator is set"
)
def test_memory_of_tensors_is_used_again() -> None:
    def run(word: str) -> int:
        command = [sys.executable, "-c", FAULTS, word]
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))}
        found = subprocess.run(command, capture_output=True, text=True, check=True, env=plain)
        return int(found.stdout)

    assert run("give back") > 100  # the reason for it, with pages of up to 2 MiB
    assert run("keep") < 100
