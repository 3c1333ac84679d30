"""`distil-jax plan`: whether a run fits TPUs, and how fast it can be on them, before any is paid for."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distil_jax.config.run import Config, ModelConfig, StepConfig, StudentConfig, load
from distil_jax.data.manifest import Manifest, read_manifest
from distil_jax.files import keep, missing, passing
from distil_jax.io.config_json import from_json
from distil_jax.io.tensors import local_folder, read_json
from distil_jax.machines.aot import Compiled, Job, compile_for
from distil_jax.objective.masking import most_targets
from distil_jax.reporting import plan as show
from distil_jax.runtime.assemble import (
    resolve_compute,
    student_in,
    student_model,
    teacher_compute,
    total_steps,
    with_compute,
)
from distil_jax.schema import InputError, place, require

# The published teachers of the presets: BERT-base with so many ids. They are planned for without being downloaded.
_BERT_BASE = {
    "google-bert/bert-base-uncased": 30_522,
    "google-bert/bert-base-cased": 28_996,
    "google-bert/bert-base-multilingual-cased": 119_547,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `distil-jax plan`."""
    parser.add_argument("config", help="a TOML file, or the name of a preset")
    parser.add_argument("--topology", default="v5e:2x4", help="type and shape of a TPU slice (default: %(default)s)")
    parser.add_argument("--slices", type=int, default=1, help="how many such slices (default: %(default)s)")
    parser.add_argument(
        "--sweep", metavar="LIST", help="several topologies instead, with commas between; 2*v5e:4x4 is two slices"
    )
    parser.add_argument("--sequence-length", type=int, help="of a row (default: of the prepared data, or 512)")
    parser.add_argument("--tokens", type=float, help="of the training text (default: of the prepared data)")
    parser.add_argument("--output", metavar="FOLDER", help="also write plan.md there, and plan.png for a sweep")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override a config key")


def run(arguments: argparse.Namespace) -> None:
    """Compiles for every topology and prints the tables.

    Raises:
      InputError: bad input, or a run that fits none of the topologies.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("plan compiles with libtpu, which is not installed: pip install 'distil-jax[tpu]'.")
    if arguments.sweep and arguments.slices != 1:
        raise InputError("--slices goes with --topology; in a sweep write 2*v5e:4x4 for two slices.")
    one = f"{arguments.slices}*{arguments.topology}" if arguments.slices != 1 else arguments.topology
    machines = [_topology(name) for name in (arguments.sweep or one).split(",")]
    finite = arguments.tokens is None or 0 < arguments.tokens < 1e18
    require(finite, f"--tokens must be a number above 0, not {arguments.tokens}.")
    length = arguments.sequence_length
    require(length is None or length >= 1, f"--sequence-length must be at least 1, not {length}.")
    workload = read_workload(load(arguments.config, arguments.set), arguments.sequence_length, arguments.tokens)
    output = place(arguments.output) if arguments.output else None
    if output:  # before minutes are spent on what belongs there
        made = missing(output)
        output.mkdir(parents=True, exist_ok=True)
        passing(made)
    jobs = [workload.job(*machine) for machine in machines]
    found = []
    for job in jobs:
        print(f"Compiling for {show.name(job)}, which takes a minute or more ...", flush=True)
        found.append(compile_for(job))
    pairs = list(zip(jobs, found, strict=True))
    lines = show.sweep(workload, pairs) if arguments.sweep else show.single(workload, *pairs[0])
    print("\n".join(lines))
    if output:
        keep(output)
        print(f"\nWrote {show.write(workload, pairs, lines, output)}.")
    if not any(each.fits for each in found):
        raise InputError(_advice(jobs[0], found[0]))


@dataclass(frozen=True)
class Workload:
    """A run as far as hardware is concerned.

    Attributes:
      config: of the run.
      step: what is compiled; its accumulation is settled by the topology.
      length: positions in a row.
      row_tokens: real tokens in a row, on average.
      steps: of the whole run, or None where nothing says how much text there is.
      assumptions: what was assumed for want of data or teacher, a sentence each.
    """

    config: Config
    step: StepConfig
    length: int
    row_tokens: float
    steps: int | None
    assumptions: tuple[str, ...]

    def job(self, topology: str, slices: int) -> Job:
        """What to compile for a topology."""
        return Job(topology, slices, self.step, self.config, self.length)


def read_workload(config: Config, length: int | None = None, tokens: float | None = None) -> Workload:
    """What a config means for the hardware; where data or teacher are not at hand, the published ones are assumed.

    Args:
      config: of the run.
      length: of a row; None: of the prepared data, or 512 if the student has as many positions.
      tokens: of the training text; None: of the prepared data, or unknown.

    Raises:
      InputError: a teacher of which nothing is known, or parts that do not fit each other.
    """
    assumptions = []
    manifest = read_manifest(config.data.path) if config.data.path else None
    teacher = _teacher(config.teacher.path, assumptions)
    compute = resolve_compute(config.compute, "tpu")
    teacher = teacher and with_compute(teacher, teacher_compute(config.teacher, compute))
    student = with_compute(_student(config.student, teacher, manifest), compute)
    if manifest and length not in (None, manifest.sequence_length):
        raise InputError(f"The rows of {config.data.path} are {manifest.sequence_length} long: leave out the length.")
    positions = min(model.max_positions for model in (student, teacher) if model)
    length = length or (manifest.sequence_length if manifest else min(512, positions))
    if length > positions:
        raise InputError(f"Rows of {length} are longer than the {positions} positions of student and teacher.")
    row_tokens, rows = float(length), None
    if manifest is not None:
        row_tokens, rows = manifest.train.tokens / manifest.train.rows, manifest.train.rows
    else:
        assumptions.append(f"No prepared data is named: rows of {length} tokens, full to the last.")
    rows = tokens / row_tokens if tokens else rows
    steps = total_steps(config.train, rows) if rows else config.train.steps or None
    step = StepConfig(
        student=student,
        teacher=teacher,
        loss=config.loss,
        masking=config.masking,
        optimizer=replace(config.optimizer, steps=config.optimizer.steps or steps or 1),
        targets_per_row=most_targets(length, config.masking.rate),
    )
    return Workload(config, step, length, row_tokens, steps, tuple(assumptions))


def _teacher(path: str, assumptions: list[str]) -> ModelConfig | None:
    if not path:
        return None
    if not Path(path).exists() and path in _BERT_BASE:
        assumptions.append(f"The teacher {path} is not looked at: BERT-base with {_BERT_BASE[path]:,} ids.")
        return ModelConfig(vocab_size=_BERT_BASE[path])
    return _architecture(path)


def _architecture(path: str) -> ModelConfig:
    folder = local_folder(path)
    return replace(from_json(read_json(folder / "config.json"), folder / "config.json"), pooler=False)


def _student(student: StudentConfig, teacher: ModelConfig | None, manifest: Manifest | None) -> ModelConfig:
    if student.init in ("teacher", "random"):
        return student_model(student, teacher, _vocabulary(manifest, teacher))
    return student_in(local_folder(student.init), _architecture(student.init), student)


def _vocabulary(manifest: Manifest | None, teacher: ModelConfig | None) -> int:
    if teacher is not None:
        return teacher.vocab_size
    if manifest is None:
        raise InputError("Neither a teacher nor data says how large the vocabulary is: set data.path or teacher.path.")
    return manifest.vocab_size


def _topology(text: str) -> tuple[str, int]:
    found = re.fullmatch(r"(?:(\d+)\*)?(\w+:\d+(?:x\d+)+)", text.strip())
    if not found or found[1] == "0":
        raise InputError(f"{text!r} is no topology: write v5e:2x4, or 2*v5e:4x4 for two slices.")
    return found[2], int(found[1] or 1)


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
        said = " and ".join(f"mesh.{axis}={size}" for axis, size in mesh.items())
        least = _changed(again, train={"accumulation": rows}, mesh=mesh)
        yield f"train.accumulation={rows} and compute.remat=full and {said}", least


def _changed(job: Job, **sections: dict[str, Any]) -> Job:
    changed = {name: replace(getattr(job.config, name), **values) for name, values in sections.items()}
    return replace(job, config=replace(job.config, **changed))
