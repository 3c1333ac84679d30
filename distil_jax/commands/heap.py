"""What the C library does with memory that a step on a CPU gives back."""

from __future__ import annotations

import ctypes
import platform

# mallopt(3), from malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Memory that is given back stays with this process; call it before JAX starts its threads.

    XLA asks for the temporaries of a step on a CPU anew each time. glibc takes such large blocks from the kernel and
    gives them back, so that every step begins on pages which the kernel must first fill with zeros: 20,000 faults and a
    third of the time of a small step (README, "How fast"). In one arena, because those of other threads are not kept.
    Elsewhere than under glibc nothing is done.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
