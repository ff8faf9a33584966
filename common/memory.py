"""Freed memory that stays with the process.

glibc gives the system back what is large or lies at the end of its heap as soon as it is freed. Getting it again is a
page fault for each 4 KiB: 450,000 for an image that ViT-T encodes on a CPU, two fifths of its time; and of the copies
of an embedding, which Python makes while no other thread of it may run, most.
"""

import ctypes
import os

# Of glibc's malloc.h, by the variables that set the same from outside.
_OPTIONS = {
    "MALLOC_MMAP_MAX_": (-4, 0),  # nothing of its own mapping, which freeing would end
    "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1),  # nothing at the end of the heap goes back before it is as much
    "MALLOC_ARENA_MAX": (-8, 1),  # one heap: those of threads end at 64 MiB, and go back when they are empty
}


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for what is wanted next; where it is not glibc, nothing changes.

    A variable that says otherwise counts.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError):
        return
    for name, (number, value) in _OPTIONS.items():
        if name not in os.environ:
            set_option(number, value)
