"""The settings of glibc's allocator, counted in page faults of a fresh process."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from foundry_ext.utils.allocator import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for step in range(8):
    before = faults()
    tensors = [torch.ones(size, 2**20) for size in (3, 30, 5)]  # 4 MiB each
    del tensors
print(kept, faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults of glibc")
def test_a_second_step_uses_the_memory_of_the_first():
    def run(how: str) -> tuple[str, int]:
        command = [sys.executable, "-c", PROGRAM, how]
        kept, faults = subprocess.run(
            command, capture_output=True, encoding="utf-8", check=True
        ).stdout.split()
        return kept, int(faults)

    kept, faults = run("keep")
    if kept == "False":
        pytest.skip("another C library")
    assert faults < 100
    assert run("default")[1] > 1000
