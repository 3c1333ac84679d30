"""What a run means for the hardware, read from its config."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from distil_jax.config.model import ModelConfig
from distil_jax.config.run import Config, StudentConfig
from distil_jax.config.step import StepConfig
from distil_jax.data.manifest import Manifest, read_manifest
from distil_jax.io.config_json import from_json
from distil_jax.io.tensors import local_folder, read_json
from distil_jax.machines.aot import Job
from distil_jax.objective.masking import most_targets
from distil_jax.runtime.assemble import (
    resolve_compute,
    student_from_folder,
    student_model,
    teacher_compute,
    total_steps,
    with_compute,
)
from distil_jax.schema import InputError

# The published teachers of the presets: BERT-base with so many ids. They are planned for without being downloaded.
_BERT_BASE = {
    "google-bert/bert-base-uncased": 30_522,
    "google-bert/bert-base-cased": 28_996,
    "google-bert/bert-base-multilingual-cased": 119_547,
}


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
    """The workload of a config; without its data or teacher at hand, the published ones are assumed.

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
    return student_from_folder(local_folder(student.init), _architecture(student.init), student)


def _vocabulary(manifest: Manifest | None, teacher: ModelConfig | None) -> int:
    if teacher is not None:
        return teacher.vocab_size
    if manifest is None:
        raise InputError("Neither a teacher nor data says how large the vocabulary is: set data.path or teacher.path.")
    return manifest.vocab_size
