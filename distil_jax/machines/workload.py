"""A run's workload for the hardware: the step to compile and its number of steps and tokens, from the run's config."""

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
from distil_jax.runtime.run_folder import is_run, open_model
from distil_jax.schema import InputError, user_path

# Vocabulary sizes of the published BERT-base teachers in the presets, so that `plan` need not download them.
_BERT_BASE = {
    "google-bert/bert-base-uncased": 30_522,
    "google-bert/bert-base-cased": 28_996,
    "google-bert/bert-base-multilingual-cased": 119_547,
}


@dataclass(frozen=True)
class Workload:
    """What a run asks of the hardware.

    Attributes:
      config: of the run.
      step: the step to compile; its accumulation is chosen later, for the topology.
      length: positions in a row.
      row_tokens: mean number of real tokens in a row, without padding.
      steps: optimiser steps of the whole run, or None if they depend on an unknown amount of text.
      assumptions: what was assumed because data or teacher are missing, one sentence each.
    """

    config: Config
    step: StepConfig
    length: int
    row_tokens: float
    steps: int | None
    assumptions: tuple[str, ...]

    def job(self, topology: str, slices: int) -> Job:
        """The job of compiling the step for a topology."""
        return Job(topology, slices, self.step, self.config, self.length)


def read_workload(config: Config, length: int | None = None, tokens: float | None = None) -> Workload:
    """Works out the workload of a run.

    If `data.path` is empty, rows are assumed to be full. The presets' published teachers need not be downloaded.

    Args:
      config: of the run.
      length: positions in a row; None: as in the prepared data, or else 512, or as many as the models have if fewer.
      tokens: in the training text; None: as in the prepared data, or else unknown.

    Raises:
      InputError: the teacher cannot be read, or config, data, teacher and length do not fit each other.
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
        assumptions.append(f"There is no prepared data: rows have {length} tokens, without padding.")
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
        assumptions.append(f"The teacher {path} was not read: it is BERT-base with {_BERT_BASE[path]:,} token ids.")
        return ModelConfig(vocab_size=_BERT_BASE[path])
    return _architecture(path)


def _architecture(path: str) -> ModelConfig:
    folder = local_folder(path)
    return replace(from_json(read_json(folder / "config.json"), folder / "config.json"), pooler=False)


def _student(student: StudentConfig, teacher: ModelConfig | None, manifest: Manifest | None) -> ModelConfig:
    if student.init in ("teacher", "random"):
        return student_model(student, teacher, _vocab_size(manifest, teacher))
    run = user_path(student.init)
    if is_run(run):
        return student_from_folder(run, open_model(run).config, student)
    return student_from_folder(local_folder(student.init), _architecture(student.init), student)


def _vocab_size(manifest: Manifest | None, teacher: ModelConfig | None) -> int:
    if teacher is not None:
        return teacher.vocab_size
    if manifest is None:
        raise InputError(
            "The size of the vocabulary is unknown without a teacher or data: set data.path or teacher.path."
        )
    return manifest.vocab_size
