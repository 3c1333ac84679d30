"""Fine-tunes an encoder on a task, with or without a fine-tuned teacher."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from distil_jax.config.model import HeadConfig
from distil_jax.config.step import Objective, Optimizer, StepConfig
from distil_jax.config.task import FinetuneConfig, check_head, head_of, task_encoder
from distil_jax.data.summary import summarize
from distil_jax.data.tasks import TaskData, read_task
from distil_jax.evaluation.tasks import DevEvaluator, TaskEvaluator, TaskScores, constant_name, format_scores
from distil_jax.files import write_whole
from distil_jax.io import huggingface
from distil_jax.io.checkpoint import Checkpoints
from distil_jax.io.metrics import read_metrics
from distil_jax.models.heads import with_fresh_head
from distil_jax.reporting.card import model_card
from distil_jax.runtime import processes
from distil_jax.runtime.assemble import (
    cast_teacher,
    check_batch,
    put_teacher,
    resolve_compute,
    resolve_step,
    schedule_of,
    teacher_compute,
    tokenizers_agree,
    with_compute,
)
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
from distil_jax.runtime.run_folder import Model, choose_best_checkpoint, open_model, restore_params
from distil_jax.schema import InputError, require, to_dict, user_path
from distil_jax.training.sharding import jit_step, make_mesh, shardings_of
from distil_jax.training.state import abstract_state
from distil_jax.training.step import train_step
from distil_jax.workflows.export import export
from distil_jax.workflows.train import check_own_optimizer


def finetune(
    config: FinetuneConfig,
    workdir: str | Path,
    *,
    objective: Objective | None = None,
    optimizer: Optimizer | None = None,
) -> dict[str, dict[str, float]]:
    """Fine-tunes a model on a task, or resumes the run in `workdir`, and prints what it reaches.

    Args:
      config: of the run.
      workdir: a run folder. At the end it also has the best checkpoint as `model/`, and its metrics in `scores.json`.
        The best checkpoint is that of the best evaluation on the dev examples; a tie goes to the earlier one.
      objective, optimizer: of one's own, as for `train`.

    Returns:
      The metrics of that checkpoint on "dev" and, if there are test examples, on "test".

    Raises:
      As `run_program`; and InputError if `model/` already holds another checkpoint.
    """
    return finetune_and_score(config, workdir, objective=objective, optimizer=optimizer).splits


def finetune_and_score(
    config: FinetuneConfig,
    workdir: str | Path,
    *,
    objective: Objective | None = None,
    optimizer: Optimizer | None = None,
) -> TaskScores:
    """As `finetune`; the scores have those of the largest class beside them."""
    workdir = user_path(workdir)
    compiled = cache(lambda: compile_task(config, objective, optimizer))
    run_program(lambda: compiled()[0], workdir)
    program, evaluator, data = compiled()
    with contextlib.closing(Checkpoints(workdir / "checkpoints")) as checkpoints:
        best = choose_best_checkpoint(checkpoints)
        _check_exported(workdir, best)
        better = _lost_step(workdir, program, checkpoints)
        if better:
            print(f"Step {better} was better, but its checkpoint no longer exists, so step {best} is used.")
        evaluated = {"step": best, "task": to_dict(program.config.task), "judged": data.eval_digest}
        earlier = _earlier_scores(workdir, evaluated, evaluator, data)
        if earlier is not None:
            print(format_scores(earlier, config.task))
            return earlier
        step, shardings = program.step_config, program.first_state.sharding.params
        params = restore_params(checkpoints, best, step.student, step.head, shardings)
        metadata = checkpoints.metadata(best)
    print(f"Evaluating the checkpoint of step {best} ...", flush=True)
    scores = evaluator.evaluate_splits(params, data)
    print(format_scores(scores, config.task))
    params = multihost_utils.process_allgather(params, tiled=True)  # every process holds only a part of them
    if processes.is_first():
        write_whole(workdir / "scores.json", json.dumps(evaluated | _plain(scores), indent=1) + "\n")
        model = Model(
            step.student, params, workdir / "tokenizer", head=step.head, run=workdir, step=best, metadata=metadata
        )
        if (workdir / "model").exists():
            write_whole(workdir / "model" / "README.md", model_card(model))
        else:
            export(model, workdir / "model")
    processes.barrier("the model is written")
    return scores


def _check_exported(workdir: Path, best: int) -> None:
    """Refuses to write the metrics of one checkpoint next to the model of another."""
    scores = workdir / "scores.json"
    if (workdir / "model").exists() and scores.exists():
        exported = json.loads(scores.read_text(encoding="utf-8"))["step"]
        require(
            exported == best,
            f"{workdir / 'model'} is the checkpoint of step {exported}, but the best valid checkpoint is now that of "
            f"step {best}: keep that folder as it is, or move it away to get the model of step {best}.",
        )


def _lost_step(workdir: Path, program: Program, checkpoints: Checkpoints) -> int | None:
    """The step of the best evaluation if it was better than every remaining checkpoint; otherwise None."""
    criterion, best = program.evaluator.criterion, checkpoints.best()[1]
    evaluations = [line for line in read_metrics(workdir) if line["kind"] == "held_out" and line["step"]]
    better = [line for line in evaluations if criterion(line) < best]
    return min(better, key=criterion)["step"] if better else None


def _plain(scores: TaskScores) -> dict[str, Any]:
    """The scores as scores.json holds them: each split under its name. Older files have the splits alone."""
    values = asdict(scores)
    return values.pop("splits") | values


def _earlier_scores(
    workdir: Path, evaluated: dict[str, Any], evaluator: TaskEvaluator, data: TaskData
) -> TaskScores | None:
    """The scores in scores.json if they are those of the same checkpoint, task and examples; otherwise None."""
    path = workdir / "scores.json"
    if not path.exists() or not (workdir / "model").exists():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    if not json.loads(json.dumps(evaluated)).items() <= values.items():  # through JSON: tuples become lists
        return None
    splits = {split: values[split] for split in ("dev", "test") if split in values}
    return TaskScores(splits, *evaluator.largest_class(data), values.get("only_prediction"))


def compile_task(
    config: FinetuneConfig, objective: Objective | None = None, optimizer: Optimizer | None = None
) -> tuple[Program, TaskEvaluator, TaskData]:
    """Reads models and examples, checks that they fit each other, and makes the program of the run.

    Returns:
      The program, the evaluator for all examples of the task, and the examples.

    Raises:
      InputError: something is missing, or does not fit.
    """
    _check_settings(config)
    check_own_optimizer(optimizer)
    start = open_model(config.model.path)
    teacher = open_model(config.teacher.path) if config.teacher.path and config.loss.needs_teacher else None
    models = [model for model in (start, teacher) if model is not None]
    length = min(config.task.max_length, *(model.config.max_positions for model in models))
    data = read_task(config.task, start.tokenizer, vocab_size=start.config.vocab_size, max_length=length)
    head = head_of(config.task, config.model, start.config, data.label_names)
    compute = resolve_compute(config.compute)
    student = with_compute(task_encoder(config.model, start.config, head), compute)
    teacher_config, teacher_params = None, None
    if teacher is not None:
        _check_teacher(teacher, head, start)
        teacher_config = with_compute(head.encoder(teacher.config), teacher_compute(config.teacher, compute))
    max_length, config = config.task.max_length, _resolved(config, data, head, compute.dtype, length)
    mesh = make_mesh(config.mesh)
    check_batch(config.train, len(data.train), mesh)
    step = StepConfig(
        student=student,
        teacher=teacher_config,
        optimizer=config.optimizer if optimizer is None else optimizer,
        head=head,
        task=config.loss,
        objective=objective,
    )
    step, attention = resolve_step(step, config, mesh, length)
    identity = {"examples": data.digest, "model": huggingface.fingerprint(start.params)}
    if teacher is not None:
        identity["teacher"] = huggingface.fingerprint(teacher.params)
        teacher_params = cast_teacher(step.teacher, teacher.params)
    shapes, teacher_params = put_teacher(teacher_params, config.teacher, step, mesh)
    params = with_fresh_head(jax.random.key(config.seed), student, head, start.params)
    state_shapes, batch_rows = abstract_state(step), config.train.batch_rows
    evaluator = TaskEvaluator(config.task, step, mesh, data.label_names, batch_rows // step.accumulation)
    largest_class, constant = evaluator.largest_class(data, limit=config.train.eval_rows)

    program = Program(
        config=config,
        step_config=step,
        identity=identity,
        tokenizer=start.tokenizer,
        data={"examples": len(data.train), "dev": len(data.dev), "test": len(data.test) if data.test else 0}
        | {"counts": {split: dict(counts) for split, counts in data.counts.items()}},
        description=f"{summarize(data)}\n" + _describe(config, step, attention, data, mesh, max_length),
        warnings=warn_of_few_steps(config.train),
        mesh=mesh,
        step=jit_step(train_step, mesh, state_shapes, shapes),
        teacher_params=teacher_params,
        step_arguments=(),
        stream=BatchStream(lambda: data.train, mesh, batch_rows, config.seed),
        evaluator=DevEvaluator(evaluator, data.dev, config.train.eval_rows, config.task.metric_names[0]),
        first_state=FirstState(step, config.seed, params, shardings_of(state_shapes, mesh)),
        reference=Reference(
            "largest_class",
            f"{constant_name(config.task)} ({constant})",
            lambda state, before_batch: largest_class["dev"],
        ),
    )
    return program, evaluator, data


def _check_settings(config: FinetuneConfig) -> None:
    """Refuses settings that would be ignored."""
    require(
        config.task.kind != "spans" or config.train.eval_rows == 0,
        "train.eval_rows cannot be used with spans, where an example may have several rows: leave it at 0, for all.",
    )
    require(
        not config.teacher.path or config.loss.needs_teacher,
        "teacher.path names a teacher, but loss.soft = 0, so nothing is learned from it: set loss.soft above 0, or "
        "leave the teacher out.",
    )


def _check_teacher(teacher: Model, head: HeadConfig, start: Model) -> None:
    """Refuses a teacher without a head for this task, or with another tokenizer."""
    path = teacher.tokenizer
    require(
        teacher.head is not None,
        f"The teacher {path} has no head for this task: fine-tune it first, with `distil-jax finetune`.",
    )
    check_head(teacher.head, head, f"The teacher {path}")
    if not tokenizers_agree(path, start.tokenizer):
        raise InputError(
            f"The teacher {path} and the model {start.tokenizer} have different tokenizers: they must share one."
        )


def _resolved(config: FinetuneConfig, data: TaskData, head: HeadConfig, dtype: str, length: int) -> FinetuneConfig:
    """The config with every choice filled in that depended on examples, models or machine."""
    steps, schedule = schedule_of(config.train, config.optimizer, len(data.train))
    every = config.train.eval_every or max(1, round(len(data.train) / config.train.batch_rows))
    return replace(
        config,
        task=replace(
            config.task,
            label_names=data.label_names,
            metrics=config.task.metric_names,
            max_length=length,
            stride=min(config.task.stride, length - 1) if config.task.kind == "spans" else config.task.stride,
        ),
        model=replace(config.model, head_dropout=head.dropout),
        teacher=replace(config.teacher, dtype=dtype if config.teacher.dtype == "auto" else config.teacher.dtype),
        optimizer=schedule,
        train=replace(config.train, steps=steps, epochs=0.0, eval_every=every),
        compute=replace(config.compute, dtype=dtype),
    )


def _describe(
    config: FinetuneConfig, step: StepConfig, attention: str, data: TaskData, mesh: Mesh, max_length: int
) -> str:
    """What is printed when the run starts; `max_length` is what the user set."""
    test = f", {len(data.test):,} test examples" if data.test else ""
    examples = f"{len(data.train):,} training examples, {len(data.dev):,} dev examples{test}"
    length = config.task.max_length
    shorter = f"; task.max_length is {length} instead of {max_length}, because the models have no more positions"
    steps = f"{config.train.steps:,} steps of {config.train.batch_rows:,}"
    return (
        f"{describe_models(step, attention)}\n{examples}{shorter if length < max_length else ''}; {steps}"
        f"{describe_micro_batches(config.train, step, mesh, length)}"
    )
