"""Compiles a run for TPUs that need not be attached, and reports whether it fits and how fast it can be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distil_jax.files import keep, missing_folders, remove_on_exit
from distil_jax.machines.aot import Compiled, Job, compile_for
from distil_jax.machines.workload import Workload
from distil_jax.reporting import plan as report
from distil_jax.schema import InputError


def plan(
    workload: Workload, machines: Sequence[tuple[str, int]], output: Path | None = None, *, sweep: bool = False
) -> None:
    """Compiles the run for every topology and prints the tables.

    Args:
      workload: the run.
      machines: (topology, number of slices); only the first is shown unless `sweep`.
      output: a folder for plan.md and, after a sweep, plan.png; None: nothing is written.
      sweep: whether to print one line per topology, instead of one detailed table.

    Raises:
      InputError: the run fits on none of the topologies; the message says what would make it fit.
    """
    if output:  # made now, so that a bad path fails before minutes of compilation
        made = missing_folders(output)
        output.mkdir(parents=True, exist_ok=True)
        remove_on_exit(made)
    jobs = [workload.job(*machine) for machine in machines]
    compiled = []
    for job in jobs:
        print(f"Compiling for {report.name(job)}, which takes a minute or more ...", flush=True)
        compiled.append(compile_for(job))
    pairs = list(zip(jobs, compiled, strict=True))
    lines = report.sweep(workload, pairs) if sweep else report.single(workload, *pairs[0])
    print("\n".join(lines))
    if output:
        keep(output)
        print(f"\nWrote {report.write(workload, pairs, lines, output)}.")
    if not any(result.fits for result in compiled):
        raise InputError(_advice(jobs[0], compiled[0]))


def _advice(job: Job, compiled: Compiled) -> str:
    """An error message with the first of `_changes` with which the job fits; each is tried by compiling it."""
    problem = f"This run does not fit on {report.name(job)}: {report.memory(compiled)}."
    fits = False
    for overrides, changed in _changes(job, compiled):
        print(f"It does not fit; trying {' and '.join(overrides)} ...", flush=True)
        with contextlib.suppress(InputError):  # this change does not go together with the rest of the configuration
            fits = compile_for(changed).fits
        if fits:
            return f"{problem} It fits with {' '.join(f'--set {override}' for override in overrides)}."
    return f"{problem} Neither micro-batches, nor rematerialisation, nor fsdp makes it fit: use more or larger chips."


def _changes(job: Job, compiled: Compiled) -> Iterator[tuple[list[str], Job]]:
    """Changes that save memory, the cheapest first, each as overrides and the changed job.

    First smaller micro-batches, then rematerialisation, then sharded parameters.
    """
    rows = job.config.train.batch_rows // compiled.shards
    for accumulation in range(compiled.accumulation + 1, rows + 1):
        if rows % accumulation == 0:
            yield [f"train.accumulation={accumulation}"], _changed(job, train={"accumulation": accumulation})
    one_row = _changed(job, train={"accumulation": rows})  # micro-batches of one row per shard
    remat_job = one_row
    for remat in ("dots", "full")[("none", "dots", "full").index(job.step.student.remat) :]:
        remat_job = replace(one_row, step=replace(job.step, student=replace(job.step.student, remat=remat)))
        yield [f"train.accumulation={rows}", f"compute.remat={remat}"], remat_job
    fsdp, rows = compiled.chips // job.slices, job.config.train.batch_rows // compiled.chips
    if job.config.train.batch_rows % compiled.chips == 0:
        mesh = {"data": -1, "fsdp": fsdp, "tensor": 1}
        overrides = [f"train.accumulation={rows}", "compute.remat=full"]
        overrides += [f"mesh.{axis}={size}" for axis, size in mesh.items()]
        yield overrides, _changed(remat_job, train={"accumulation": rows}, mesh=mesh)


def _changed(job: Job, **sections: dict[str, Any]) -> Job:
    """The job with other values in some sections of its config."""
    changed = {name: replace(getattr(job.config, name), **values) for name, values in sections.items()}
    return replace(job, config=replace(job.config, **changed))
