"""Memory that a step on a CPU gives back."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import sys

import jax
import jax.numpy as jnp

from distil_jax.runtime.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
rows, steps = int(sys.argv[2]), int(sys.argv[3])
step = jax.jit(lambda x: (x @ x.T) @ x)
x = jnp.ones((rows, 8))
faults = []
for _ in range(6):  # the first ones find out how much is needed
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        step(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""


def faults(how, rows, steps):
    """The fewest page faults of so many steps, with 4 * rows**2 bytes between their products."""
    one_device = os.environ | {"XLA_FLAGS": ""}
    command = [sys.executable, "-c", FAULTS, how, str(rows), str(steps)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=one_device).stdout)


NAME, VERSION = platform.libc_ver()
KEEPS = NAME == "glibc" and tuple(map(int, VERSION.split("."))) >= (2, 35)


@pytest.mark.skipif(not KEEPS, reason="only glibc keeps memory on request, since 2.35")
def test_steps_do_not_begin_on_new_pages():
    usual = faults("as usual", 4096, 5)
    assert usual > 5 * 10_000  # 64 MiB are 16,384 pages: else this proves nothing
    assert faults("keep", 4096, 5) < usual / 50


def test_large_memory_goes_back():
    assert faults("keep", 12_288, 1) > 0.9 * faults("as usual", 12_288, 1)  # 576 MiB
