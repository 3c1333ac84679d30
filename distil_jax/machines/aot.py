"""Compiles the real train step for TPUs that are not attached, in a separate process for each topology.

`python -m distil_jax.machines.aot` reads a `Job` as JSON and prints what the compiler says as JSON: libtpu wants
the environment to itself, and a compiler that aborts must not take the plan with it.
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

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing of a TPU is used, so several plans may compile at once
}


@dataclass(frozen=True)
class Job:
    """What to compile, and for which machine."""

    topology: str  # as libtpu names it: "v5e:4x4"
    slices: int
    step: StepConfig
    config: Config
    sequence_length: int


@dataclass(frozen=True)
class Compiled:
    """The compiler's numbers for one chip; bytes, FLOPs and counts are those of one optimiser step."""

    kind: str  # of the chip, as JAX calls it
    chips: int
    hosts: int
    shards: int  # into which the batch is cut
    accumulation: int
    attention: str  # which was taken and why
    seconds: float  # to compile
    student: float  # bytes of the student's parameters in all
    parameters: float  # bytes of the student's parameters on a chip
    optimizer: float
    teacher: float
    peak: float  # bytes in all, temporaries and batch among them
    fits: bool
    flops: float = 0.0
    hbm_bytes: float = 0.0
    exchanged: dict[str, float] = field(default_factory=dict)  # bytes by kind of collective
    collectives: dict[str, float] = field(default_factory=dict)  # how many of each kind


def compile_for(job: Job) -> Compiled:
    """Compiles in another process.

    Raises:
      InputError: no such topology, a mesh or a batch that does not fit it, or a compiler that failed otherwise.
    """
    return Compiled(**elsewhere("distil_jax.machines.aot", job, job.topology))


def elsewhere(module: str, job: Any, topology: str) -> dict[str, Any]:
    """Runs `python -m MODULE TOPOLOGY`, which reads a job (a dataclass) as JSON, and returns the JSON that it prints.

    Raises:
      InputError: its own, with status 2, or whatever else libtpu died of.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, topology],
        input=json.dumps(to_dict(job)),
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    if done.returncode == 2 and lines:
        raise InputError(lines[-1])
    if done.returncode:
        message = " ".join(done.stderr.split())[-500:]
        raise InputError(
            f"Compiling for {topology} failed ({message}): try another topology, where libtpu is installed."
        )
    return json.loads(lines[-1])


def _compile_here(job: Job) -> Compiled:
    """Compiles in this process, whose environment must be that of `compile_for`."""
    devices = _devices(job)
    if devices[0].device_kind not in CHIPS:
        raise InputError(f"Nothing is known of the chip {devices[0].device_kind}, only of {', '.join(CHIPS)}.")
    mesh = make_mesh(job.config.mesh, devices)
    step, attention = resolve_step(job.step, job.config, mesh, job.sequence_length)
    state, teacher = abstract_state(step), None
    if step.teacher is not None:
        teacher = teacher_shapes(job.config.teacher, step.teacher)

    def on_chip(abstract: Any) -> float:
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
        "parameters": on_chip(state.params),
        "optimizer": on_chip(state.opt_state),
        "teacher": on_chip(teacher) if teacher is not None else 0.0,
    }
    began = time.monotonic()
    lowered = lower_step(mask_and_train_step, mesh, state, teacher, (job.config.train.batch_rows, job.sequence_length))
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        peak = memory_asked(str(error))
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
        exchanged=dict(costs.exchanged),
        collectives=dict(costs.collectives),
    )


def memory_asked(message: str) -> float | None:
    """The bytes of a chip's memory that a program wants, from what libtpu says where it has less; None: another error.

    It says so in two ways: of all that is in use, or of the temporaries alone where these are too much already.
    """
    asked = re.search(r"(?:Used |temporaries \()([\d.]+)([KMGT])", message)
    if "RESOURCE_EXHAUSTED" not in message or asked is None:
        return None
    return float(asked[1]) * 1024 ** (1 + "KMGT".index(asked[2]))


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
