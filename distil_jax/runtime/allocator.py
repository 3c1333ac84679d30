"""Settings of the C library's memory allocator, for steps on CPUs."""

from __future__ import annotations

import ctypes
import platform

# mallopt(3), from malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGE = 512 * 2**20


def keep_freed_memory() -> None:
    """Tells malloc to keep freed memory in this process; call it before JAX starts its threads.

    XLA allocates the temporaries of a step on a CPU anew for every step. glibc gets blocks above 32 MiB from the kernel
    and returns them, so every step begins on pages that the kernel must first fill with zeros: a third of the time of a
    small step (`commands/bench/README.md`). One arena, because malloc does not keep the memory of the others. Blocks
    above 512 MiB are still returned: with several steps in flight, the process would keep several times what it needs.
    Does nothing without glibc 2.35 or later; older versions refuse so high a threshold.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        if libc.mallopt(_M_MMAP_THRESHOLD, _LARGE):
            libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
            libc.mallopt(_M_ARENA_MAX, 1)
