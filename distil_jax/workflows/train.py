"""Trains a student, with or without a teacher, in a run folder, or resumes the run in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from distil_jax.config.run import Config, TrainConfig
from distil_jax.config.step import Objective, Optimizer, OptimizerConfig, StepConfig
from distil_jax.data.loader import open_rows
from distil_jax.evaluation.held_out import HeldOutEvaluator
from distil_jax.io import huggingface
from distil_jax.models.encoder import count_parameters
from distil_jax.objective.distillation import LogitsFromBatch
from distil_jax.runtime.assemble import Parts, assemble, put_teacher
from distil_jax.runtime.loop import run_program
from distil_jax.runtime.program import (
    BatchStream,
    FirstState,
    Program,
    Reference,
    describe_micro_batches,
    describe_models,
    warn_of_few_steps,
)
from distil_jax.schema import require
from distil_jax.structs import Batch, Encoded
from distil_jax.training.sharding import jit_eval, jit_step, make_mesh, replicate, shardings_of
from distil_jax.training.state import abstract_state
from distil_jax.training.step import mask_and_eval_step, mask_and_eval_teacher_step, mask_and_train_step


def train(
    config: Config,
    workdir: str | Path,
    *,
    resume_step: int | None = None,
    objective: Objective | None = None,
    optimizer: Optimizer | None = None,
    teacher: Callable[[Any, Batch], Encoded] | None = None,
    teacher_params: Any = None,
) -> dict[str, float]:
    """Trains a student, or resumes the run in `workdir`.

    Args:
      config: of the run; on resume, only settings that do not affect the result may differ.
      workdir, resume_step: as for `run_program`.
      objective, optimizer, teacher: of one's own, see `StepConfig`; each a frozen dataclass whose fields are numbers,
        texts, tuples or such dataclasses. Class and fields are saved with the run, which resumes only with equal ones.
        `config.loss` or `config.optimizer` is then not used. A teacher needs an objective, and no `teacher.path`.
      teacher_params: of `teacher`; None for a function without parameters.

    Returns and raises what `run_program` does.
    """

    def make() -> Program:
        check_own_optimizer(optimizer)
        require(
            teacher is not None or teacher_params is None,
            "teacher_params are of a teacher of one's own, and there is none: give teacher too.",
        )
        require(
            not isinstance(teacher, LogitsFromBatch),
            "Prepared rows carry no logits: LogitsFromBatch is for steps whose batches you make yourself.",
        )
        parts = assemble(config)
        step, params, identity = parts.step, parts.teacher_params, parts.identity
        if teacher is not None:
            require(not config.teacher.path, "There are two teachers: leave out teacher.path, or the function.")
            require(objective is not None, "A teacher of one's own needs an objective too: give Distillation().")
            params = teacher_params
            if params is not None:
                identity = identity | {"teacher": huggingface.fingerprint(params)}
        step = replace(
            step,
            objective=objective,
            optimizer=step.optimizer if optimizer is None else optimizer,
            teacher=step.teacher if teacher is None else teacher,
        )
        return compile_run(replace(parts, step=step, teacher_params=params, identity=identity))

    return run_program(make, workdir, resume_step=resume_step)


def check_own_optimizer(optimizer: Any) -> None:
    """Raises `InputError` for an `OptimizerConfig`, which belongs into the run's config, where it is written down."""
    require(
        not isinstance(optimizer, OptimizerConfig),
        "optimizer is for an optimiser of one's own: put an OptimizerConfig into the config of the run.",
    )


def compile_run(parts: Parts) -> Program:
    """Puts the models on the mesh and makes the jitted steps, which XLA compiles when they are first called."""
    config, manifest = parts.config, parts.manifest
    mesh, state_shapes = make_mesh(config.mesh), abstract_state(parts.step)
    shapes, teacher_params = put_teacher(parts.teacher_params, config.teacher, parts.step, mesh)
    # Nothing below may keep a reference to `parts`: its models would stay in the host's memory for the whole run.
    train_rows, held_out_rows = (partial(open_rows, config.data.path, split) for split in ("train", "held_out"))
    batch_rows = config.train.batch_rows
    evaluator = HeldOutEvaluator(
        step=jit_eval(mask_and_eval_step, mesh, state_shapes, shapes),
        teacher_params=teacher_params,
        open_table=held_out_rows,
        weights=replicate(parts.held_out_weights, mesh),
        mesh=mesh,
        batch_rows=batch_rows // parts.step.accumulation,
        limit=config.train.eval_rows,
    )
    reference = None
    if parts.step.teacher is not None:
        of_teacher = replace(evaluator, step=jit_eval(mask_and_eval_teacher_step, mesh, state_shapes, shapes))
        reference = Reference("teacher", "teacher", of_teacher.evaluate)
    return Program(
        config=config,
        step_config=parts.step,
        identity=parts.identity,
        tokenizer=parts.tokenizer,
        data={
            "sequence_length": manifest.sequence_length,
            "rows": manifest.train.rows,
            "sequences": manifest.train.sequences,
            "tokens": manifest.train.tokens,
            "held_out_tokens": manifest.held_out.tokens,
            "sources": list(manifest.settings["sources"]),
            "counts": dict(manifest.counts),
        },
        description=_describe(parts, mesh),
        warnings=(*_warn_of_size(parts.step), *warn_of_few_steps(config.train)),
        mesh=mesh,
        step=jit_step(mask_and_train_step, mesh, state_shapes, shapes),
        teacher_params=teacher_params,
        step_arguments=(replicate(parts.weights, mesh),),
        stream=BatchStream(train_rows, mesh, batch_rows, config.seed),
        evaluator=evaluator,
        first_state=FirstState(parts.step, config.seed, parts.student_params, shardings_of(state_shapes, mesh)),
        reference=reference,
        held_out_note=_why_training_is_higher(parts),
    )


def _why_training_is_higher(parts: Parts) -> str:
    """A sentence on the two MLM losses that a run shows: the one in training is higher, and that is no mistake."""
    student, config = parts.step.student, parts.config
    reasons = [
        reason
        for reason, applies in (
            ("rarer words are masked more often", config.masking.smoothing > 0),
            ("dropout is on", student.hidden_dropout > 0 or student.attention_dropout > 0),
        )
        if applies
    ]
    if not reasons or not config.loss.mlm or parts.step.objective is not None:
        return ""
    return f"The MLM loss in training is usually higher than on held-out text: in training, {' and '.join(reasons)}."


def _describe(parts: Parts, mesh: Mesh) -> str:
    config, manifest = parts.config.train, parts.manifest
    row_tokens = manifest.train.tokens / manifest.train.rows
    row_sequences = manifest.train.sequences / manifest.train.rows
    micro_batches = describe_micro_batches(config, parts.step, mesh, manifest.sequence_length)
    return (
        f"{describe_models(parts.step, parts.attention)}\n{config.steps:,} steps of {config.batch_rows:,} rows (about "
        f"{config.batch_rows * row_sequences:,.0f} sequences, {config.batch_rows * row_tokens:,.0f} tokens)"
        f"{micro_batches}{_describe_fold(parts)}; {_describe_intervals(config)}"
    )


def _describe_intervals(config: TrainConfig) -> str:
    when = f"every {config.eval_every:,} steps" if config.eval_every else "at the start and at the end"
    if config.checkpoint_every == config.eval_every > 0:
        return f"evaluated and saved {when}"
    saved = f"saved every {config.checkpoint_every:,}" if config.checkpoint_every else "saved then"
    return f"evaluated {when}, {saved}"


def _warn_of_size(step: StepConfig) -> tuple[str, ...]:
    """A warning if the student is no smaller than its teacher; otherwise nothing."""
    student, teacher = step.student, step.teacher_model
    if teacher is None:
        return ()
    # Parts that a student seldom has make no teacher the larger one.
    alike = replace(student, token_types=teacher.token_types, pooler=teacher.pooler, mlm_head=teacher.mlm_head)
    if count_parameters(alike) < count_parameters(teacher):
        return ()
    return (
        f"the student ({student.num_layers} x {student.hidden_size}) is no smaller than its teacher "
        f"({teacher.num_layers} x {teacher.hidden_size}): leave out student.num_layers for half of its layers.",
    )


def _describe_fold(parts: Parts) -> str:
    """A note if the student starts without the teacher's token-type row; otherwise an empty text."""
    student, teacher = parts.config.student, parts.step.teacher
    if student.init != "teacher" or student.token_types or student.fold_token_types or not teacher.token_types:
        return ""
    why = "sinusoidal positions cannot absorb it" if student.positions == "sinusoidal" else "fold_token_types is false"
    return f"; the student starts without the teacher's token-type row, because {why}"
