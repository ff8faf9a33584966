"""What is freed stays with the process: getting it again costs no page faults."""

import os
import platform
import subprocess
import sys

import pytest

from splitsam.common.memory import keep_freed_memory

PAGES = 4096  # 16 MiB
COUNT_FAULTS = f"""
import resource, threading
from splitsam.common.memory import keep_freed_memory
keep_freed_memory()
counts = []
def fill():
    bytearray({PAGES} * 4096)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        bytearray({PAGES} * 4096)
    counts.append((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10)
fill()
thread = threading.Thread(target=fill)
thread.start()
thread.join()
print(*counts)
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is not glibc's")


def faults_each_time(**variables: str) -> list[int]:
    """Of memory taken and filled again and again, on the first thread and on another."""
    command = [sys.executable, "-c", COUNT_FAULTS]
    text = subprocess.run(command, env=os.environ | variables, check=True, capture_output=True, text=True).stdout
    return [int(count) for count in text.split()]


def test_freed_memory_is_used_again_on_every_thread():
    first, other = faults_each_time()
    assert max(first, other) < PAGES / 20


def test_a_variable_from_outside_counts():
    assert max(faults_each_time(MALLOC_MMAP_MAX_="65536", MALLOC_MMAP_THRESHOLD_="131072")) > PAGES / 2


def test_another_allocator_is_left_alone(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    keep_freed_memory()
