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

from distil_jax.commands.heap import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
step = jax.jit(lambda x: (x @ x.T) @ x)  # 64 MiB between the products
x = jnp.ones((4096, 8))
found = []
for _ in range(6):  # the first ones find out how much is needed
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        step(x).block_until_ready()
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(found))
"""


def faults(how):
    one_device = os.environ | {"XLA_FLAGS": ""}
    command = [sys.executable, "-c", FAULTS, how]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=one_device).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_steps_do_not_begin_on_new_pages():
    usual = faults("as usual")
    assert usual > 5 * 10_000  # 64 MiB are 16,384 pages: else this proves nothing
    assert faults("keep") < usual / 50
