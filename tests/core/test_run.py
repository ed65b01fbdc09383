import platform
import subprocess
import sys

import pytest

RETAINED = """
import torch
from poise.core.run import resident_memory, return_freed_memory

if {called}:
    return_freed_memory()
most = 0
for _ in range(4):
    before = resident_memory()
    large = [torch.ones(5_000_000) for _ in range(10)]
    kept = [torch.ones(2000) for _ in range(10)]
    del large
    most = max(most, resident_memory() - before)
print(most)
"""


def retained(called):
    script = RETAINED.format(called=called)
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return int(done.stdout)


glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have other habits")


@glibc
def test_freed_activations_go_back_to_the_system():
    assert retained(called=True) < 15e6  # one tensor has 20 MB


@glibc
def test_the_c_library_would_keep_them():
    assert retained(called=False) > 15e6
