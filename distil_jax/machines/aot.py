"""Compiles the real train step for TPUs that are not attached, in a separate process for each topology.

`python -m distil_jax.machines.aot` reads a `Job` as JSON from stdin and prints a `Compiled` as JSON. It needs a process
of its own because libtpu is configured by environment variables, and because its compiler may abort the process.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
from jax.experimental import topologies

from distil_jax.config.run import Config
from distil_jax.config.step import StepConfig
from distil_jax.machines.chips import CHIPS
from distil_jax.machines.hlo import Program
from distil_jax.runtime.assemble import resolve_step, teacher_shapes
from distil_jax.schema import InputError, build, to_dict
from distil_jax.training.sharding import lower_step, make_mesh, shard_count, shardings_of
from distil_jax.training.state import abstract_state
from distil_jax.training.step import mask_and_train_step

# Environment variables with which libtpu compiles on a machine without TPUs.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is used, so several processes may compile at once
}


@dataclass(frozen=True)
class Job:
    """A train step to compile and the topology to compile it for."""

    topology: str  # of one slice, as libtpu names it: "v5e:4x4"
    slices: int  # number of such slices
    step: StepConfig
    config: Config
    sequence_length: int  # tokens per row


@dataclass(frozen=True)
class Compiled:
    """A compiled train step: its memory on one chip, in bytes, and one chip's costs for one optimiser step."""

    kind: str  # the chip's `device_kind` in JAX
    chips: int
    hosts: int
    shards: int  # number of parts that the batch is split into
    accumulation: int  # micro-batches per step
    attention: str  # the chosen implementation, and why
    seconds: float  # compile time
    student: float  # bytes of all the student's parameters, over all chips
    parameters: float  # bytes of the student's parameters on one chip
    optimizer: float
    teacher: float
    peak: float  # bytes on one chip in total, including temporaries and the batch
    fits: bool  # whether `peak` fits; if not, the costs below are missing
    flops: float = 0.0
    hbm_bytes: float = 0.0  # read and written
    collective_bytes: dict[str, float] = field(default_factory=dict)  # by kind of collective
    collective_counts: dict[str, float] = field(default_factory=dict)  # by kind of collective


def compile_for(job: Job) -> Compiled:
    """Compiles a train step in another process.

    Raises:
      InputError: libtpu does not know the topology, the mesh or the batch does not fit it, or the compiler failed.
    """
    return Compiled(**run_with_libtpu("distil_jax.machines.aot", job, job.topology))


def run_with_libtpu(module: str, job: Any, topology: str) -> dict[str, Any]:
    """Runs `python -m MODULE TOPOLOGY` with the environment that libtpu needs, and returns the JSON that it prints.

    Args:
      module: reads the job as JSON from stdin; ends with status 2 after printing the message of an `InputError`.
      job: a dataclass.
      topology: as libtpu names it.

    Raises:
      InputError: the module's own, or the process failed, for example because libtpu aborted it.
    """
    process = subprocess.run(
        [sys.executable, "-m", module, topology],
        input=json.dumps(to_dict(job)),
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = process.stdout.splitlines()
    if process.returncode == 2 and lines:
        raise InputError(lines[-1])
    if process.returncode:
        message = " ".join(process.stderr.split())[-500:]
        raise InputError(
            f"Compiling for {topology} failed ({message}): check that libtpu is installed, or try another topology."
        )
    return json.loads(lines[-1])


def _compile_here(job: Job) -> Compiled:
    """Compiles a train step in this process, which must have been started with `ENVIRONMENT`."""
    devices = _devices(job)
    if devices[0].device_kind not in CHIPS:
        raise InputError(f"There is no data sheet of the chip {devices[0].device_kind}, only of {', '.join(CHIPS)}.")
    mesh = make_mesh(job.config.mesh, devices)
    step, attention = resolve_step(job.step, job.config, mesh, job.sequence_length)
    state, teacher = abstract_state(step), None
    if step.teacher is not None:
        teacher = teacher_shapes(job.config.teacher, step.teacher)

    def bytes_per_chip(abstract: Any) -> float:
        leaves = zip(jax.tree.leaves(nn.unbox(abstract)), jax.tree.leaves(shardings_of(abstract, mesh)), strict=True)
        return float(sum(_bytes(sharding.shard_shape(leaf.shape), leaf.dtype) for leaf, sharding in leaves))

    sizes = {
        "kind": devices[0].device_kind,
        "chips": len(devices),
        "hosts": len({device.process_index for device in devices}),
        "shards": shard_count(mesh),
        "accumulation": step.accumulation,
        "attention": attention,
        "student": float(sum(_bytes(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(nn.unbox(state.params)))),
        "parameters": bytes_per_chip(state.params),
        "optimizer": bytes_per_chip(state.opt_state),
        "teacher": bytes_per_chip(teacher) if teacher is not None else 0.0,
    }
    began = time.monotonic()
    lowered = lower_step(mask_and_train_step, mesh, state, teacher, (job.config.train.batch_rows, job.sequence_length))
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        peak = memory_needed(str(error))
        if peak is None:
            raise
        return Compiled(**sizes, seconds=time.monotonic() - began, peak=peak, fits=False)
    memory, costs = compiled.memory_analysis(), Program(compiled.as_text()).costs
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(
        **sizes,
        seconds=time.monotonic() - began,
        peak=float(peak + memory.temp_size_in_bytes),
        fits=True,
        flops=costs.flops,
        hbm_bytes=costs.hbm_bytes,
        collective_bytes=dict(costs.collective_bytes),
        collective_counts=dict(costs.collective_counts),
    )


def memory_needed(message: str) -> float | None:
    """Reads from an out-of-memory error of libtpu how much memory the program needs on one chip.

    Returns:
      Bytes, or None if it is another error. If the temporaries alone do not fit, libtpu reports only their size.
    """
    size = re.search(r"(?:Used |temporaries \()([\d.]+)([KMGT])", message)
    if "RESOURCE_EXHAUSTED" not in message or size is None:
        return None
    return float(size[1]) * 1024 ** (1 + "KMGT".index(size[2]))


def _bytes(shape: tuple[int, ...], dtype: Any) -> int:
    return math.prod(shape) * dtype.itemsize


def _devices(job: Job) -> list[Any]:
    options = {"num_slices": job.slices} if job.slices > 1 else {}
    if job.topology.endswith(":1x1"):
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=job.topology, **options).devices
    except jax.errors.JaxRuntimeError as error:
        message = " ".join(str(error).split())[:300]
        raise InputError(
            f"libtpu knows no topology {job.topology!r} ({message}): name one such as v5e:2x4, v5p:2x2x2 or v6e:4x4."
        ) from error


def _main() -> int:
    try:
        print(json.dumps(to_dict(_compile_here(build(Job, json.load(sys.stdin))))))
    except InputError as error:
        print(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(_main())
