"""Compiles the losses for a TPU and prints the memory that libtpu plans, as JSON.

Run it as `python -m distil_jax.commands.bench.loss_aot TOPOLOGY`, with a `Job` as JSON on stdin. It is a separate
process, as for `distil-jax plan`, because libtpu needs its own environment variables.
"""

from __future__ import annotations

import json
import sys
from functools import partial

import jax
from jax.experimental import topologies

from distil_jax.commands.bench.loss import KINDS, Job, gradients, inputs
from distil_jax.machines.aot import memory_needed
from distil_jax.schema import build


def temporaries(job: Job, topology: str) -> dict[str, float]:
    """Bytes of temporaries on one chip, by kind of loss; if they do not fit, the compiler's error says how many."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(partial(inputs, job)),
    )
    bytes_of = {}
    for kind in KINDS:
        try:
            bytes_of[kind] = jax.jit(gradients(job, kind)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
        except jax.errors.JaxRuntimeError as error:
            bytes_of[kind] = memory_needed(str(error))
            if bytes_of[kind] is None:
                raise
    return bytes_of


if __name__ == "__main__":
    print(json.dumps(temporaries(build(Job, json.load(sys.stdin)), sys.argv[1])))
