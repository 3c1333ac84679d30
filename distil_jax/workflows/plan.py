"""Compiles a run for TPUs that are not there, and says whether it fits and how fast it can be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distil_jax.files import keep, missing_folders, remove_on_exit
from distil_jax.machines.aot import Compiled, Job, compile_for
from distil_jax.machines.workload import Workload
from distil_jax.reporting import plan as show
from distil_jax.schema import InputError


def plan(
    workload: Workload, machines: Sequence[tuple[str, int]], output: Path | None = None, *, sweep: bool = False
) -> None:
    """Compiles for every topology and prints the tables.

    Args:
      workload: the run.
      machines: topologies and their number of slices; several if `sweep`.
      output: gets plan.md, and of a sweep plan.png.
      sweep: whether to show one line for each topology instead of one table of everything.

    Raises:
      InputError: a run that fits none of the topologies.
    """
    if output:  # before minutes are spent on what belongs there
        made = missing_folders(output)
        output.mkdir(parents=True, exist_ok=True)
        remove_on_exit(made)
    jobs = [workload.job(*machine) for machine in machines]
    compiled = []
    for job in jobs:
        print(f"Compiling for {show.name(job)}, which takes a minute or more ...", flush=True)
        compiled.append(compile_for(job))
    pairs = list(zip(jobs, compiled, strict=True))
    lines = show.sweep(workload, pairs) if sweep else show.single(workload, *pairs[0])
    print("\n".join(lines))
    if output:
        keep(output)
        print(f"\nWrote {show.write(workload, pairs, lines, output)}.")
    if not any(each.fits for each in compiled):
        raise InputError(_advice(jobs[0], compiled[0]))


def _advice(job: Job, compiled: Compiled) -> str:
    """The smallest change with which a job fits, found by compiling it."""
    needed = f"{show.name(job)} does not hold this run: {show.memory(compiled)}."
    fits = False
    for change, changed in _changes(job, compiled):
        print(f"It does not fit; trying {change} ...", flush=True)
        with contextlib.suppress(InputError):  # a change that cannot be is no advice
            fits = compile_for(changed).fits
        if fits:
            return f"{needed} It fits with --set {change.replace(' and ', ' --set ')}."
    return f"{needed} Neither micro-batches, nor rematerialisation, nor fsdp makes it fit: take more or larger chips."


def _changes(job: Job, compiled: Compiled) -> Iterator[tuple[str, Job]]:
    """Smaller micro-batches, then computing again what the backward pass needs, then sharded parameters."""
    rows = job.config.train.batch_rows // compiled.shards
    for number in (n for n in range(compiled.accumulation + 1, rows + 1) if rows % n == 0):
        yield f"train.accumulation={number}", _changed(job, train={"accumulation": number})
    least = _changed(job, train={"accumulation": rows})
    again = least
    for remat in ("dots", "full")[("none", "dots", "full").index(job.step.student.remat) :]:
        again = replace(least, step=replace(job.step, student=replace(job.step.student, remat=remat)))
        yield f"train.accumulation={rows} and compute.remat={remat}", again
    fsdp, rows = compiled.chips // job.slices, job.config.train.batch_rows // compiled.chips
    if job.config.train.batch_rows % compiled.chips == 0:
        mesh = {"data": -1, "fsdp": fsdp, "tensor": 1}
        changes = " and ".join(f"mesh.{axis}={size}" for axis, size in mesh.items())
        least = _changed(again, train={"accumulation": rows}, mesh=mesh)
        yield f"train.accumulation={rows} and compute.remat=full and {changes}", least


def _changed(job: Job, **sections: dict[str, Any]) -> Job:
    changed = {name: replace(getattr(job.config, name), **values) for name, values in sections.items()}
    return replace(job, config=replace(job.config, **changed))
