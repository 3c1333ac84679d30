"""What the C library does with memory that a step on a CPU gives back."""

from __future__ import annotations

import ctypes
import platform

# mallopt(3), from malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGE = 512 * 2**20


def keep_freed_memory() -> None:
    """Memory that is given back stays with this process; call it before JAX starts its threads.

    XLA asks for the temporaries of a step on a CPU anew each time. glibc takes blocks above 32 MiB from the kernel and
    gives them back, so that every step begins on pages which the kernel must first fill with zeros: 20,000 faults and a
    third of the time of a small step (README, "How fast"). In one arena, because those of other threads are not kept.
    Blocks above 512 MiB still go back: of those, steps in flight would leave the process several times what it needs.
    Elsewhere than under glibc nothing is done, nor before its version 2.35, which refuses so high a threshold.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        if libc.mallopt(_M_MMAP_THRESHOLD, _LARGE):
            libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
            libc.mallopt(_M_ARENA_MAX, 1)
