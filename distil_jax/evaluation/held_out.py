"""`distil-jax eval`: what held-out text, or a task's examples, say of a run's student or of any model folder."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from distil_jax.config.run import (
    ComputeConfig,
    LossConfig,
    MaskingConfig,
    MeshConfig,
    OptimizerConfig,
    StepConfig,
)
from distil_jax.config.task import StartConfig, TaskConfig, check_head, head_of, load_task
from distil_jax.data.loader import RowTable, held_out_batches, open_rows
from distil_jax.data.manifest import read_manifest
from distil_jax.data.tasks import TaskData, read_task
from distil_jax.data.told import told
from distil_jax.evaluation.tasks import Judge, in_words
from distil_jax.io.metrics import Sums, perplexity
from distil_jax.models.encoder import abstract_params, count_parameters
from distil_jax.runtime.assemble import check_tokenizer, resolve_compute, token_weights, with_compute
from distil_jax.runtime.attention import settle_attention
from distil_jax.runtime.run_folder import Model, open_model
from distil_jax.schema import InputError, quoted, require
from distil_jax.training.sharding import (
    jit_eval,
    local_places,
    make_mesh,
    put_everywhere,
    put_params,
    put_rows,
    shardings_of,
)
from distil_jax.training.state import TrainState, abstract_state, judged_state
from distil_jax.training.step import mask_and_eval_step

_BATCH_TOKENS = 8192  # per device and call; the numbers do not depend on it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `distil-jax eval`."""
    parser.add_argument("model", help="a run folder, a model folder or a hub id")
    parser.add_argument("--task", help="of a model with a task's head: a name in configs/tasks, or a TOML file")
    parser.add_argument("--data", help="prepared rows (default for a run folder: the run's own)")
    parser.add_argument("--teacher", help="a model to compare with (default for a run folder: the run's own)")
    parser.add_argument("--step", type=int, help="of a run folder: this checkpoint, not the newest")
    parser.add_argument(
        "--rows",
        type=int,
        default=0,
        help="only so many held-out rows, always the same (default: all)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Evaluates and prints one line a number."""
    if arguments.rows < 0:
        raise InputError(f"--rows must not be negative, but is {arguments.rows}.")
    model = open_model(arguments.model, arguments.step)
    if arguments.task:
        named = [flag for flag in ("data", "teacher", "rows") if getattr(arguments, flag)]
        require(not named, f"--{' and --'.join(named)} are of held-out text: leave them out beside --task.")
        task = load_task(arguments.task, [quoted("model.path", arguments.model)]).task
        data = _examples(model, task)
        print(told(data, ("dev", "test")))
        print(in_words(evaluate_task(model, task, data)))
        return
    if model.head is not None:
        raise InputError(f"{arguments.model} is a task's model, which predicts no words: judge it with --task TASK.")
    data, teacher = arguments.data, arguments.teacher
    if model.run is not None:
        data = data or model.run_config.data.path
        teacher = teacher or model.run_config.teacher.path
    if not data:
        raise InputError("Name the prepared rows to evaluate on: --data FOLDER.")
    numbers = evaluate(model, data, teacher=open_model(teacher) if teacher else None, limit=arguments.rows)
    print(f"{arguments.model}{f', step {model.step:,}' if model.step else ''} on the held-out rows of {data}")
    print(f"  {'parameters':12} {count_parameters(model.config):,}")
    for name, number in numbers.items():
        print(f"  {name:12} {number:.4f}")


def evaluate(model: Model, data: str | Path, *, teacher: Model | None = None, limit: int = 0) -> dict[str, float]:
    """Held-out numbers of any masked language model.

    Args:
      model: whose numbers.
      data: a folder of prepared rows.
      teacher: adds kl and agreement with it.
      limit: only so many rows, see `judged_rows`; 0: all.

    Raises:
      InputError: a model without an MLM head, or rows of another tokenizer.
    """
    manifest, table = read_manifest(data), open_rows(data, "held_out")
    compute = resolve_compute(ComputeConfig())
    for each in (model, teacher):
        if each is not None:
            check_tokenizer(each.tokenizer, each.config, data, manifest)
            if not each.config.mlm_head:
                raise InputError(f"{each.tokenizer} has no MLM head, so it predicts no words: train one first.")
            if manifest.sequence_length > each.config.max_positions:
                raise InputError(
                    f"The rows are {manifest.sequence_length} long and {each.tokenizer} has "
                    f"{each.config.max_positions} positions: prepare shorter rows."
                )
    if not len(table):
        raise InputError(f"{data} has no held-out rows: prepare it with --held-out above 0.")
    config = StepConfig(
        student=with_compute(model.config, compute),
        teacher=with_compute(teacher.config, compute) if teacher else None,
        loss=LossConfig(kl=0, cosine=0),
        masking=MaskingConfig(mask_token_id=manifest.mask_id),
        optimizer=OptimizerConfig(steps=1),
    )
    mesh = make_mesh(MeshConfig())
    config, _ = settle_attention(config, "auto", mesh, manifest.sequence_length)
    shapes = abstract_state(config).replace(opt_state=None)
    params = put_params(model.params, shardings_of(shapes, mesh).params)
    teacher_shapes = abstract_params(config.teacher) if teacher else None
    return held_out_numbers(
        jit_eval(mask_and_eval_step, mesh, shapes, teacher_shapes),
        judged_state(config, params),
        put_params(teacher.params, shardings_of(teacher_shapes, mesh)) if teacher else None,
        table,
        put_everywhere(token_weights(data, manifest, model.config, smoothing=0.0), mesh),
        mesh=mesh,
        batch_rows=mesh.size * max(1, _BATCH_TOKENS // manifest.sequence_length),
        limit=limit,
    )


def _examples(model: Model, task: TaskConfig) -> TaskData:
    """The task's, for a model with a head; labels that the task does not name may come in another order than its.

    Raises:
      InputError: a model without a head or with that of another task, or examples that cannot be read.
    """
    if model.head is None:
        path = model.run or model.tokenizer
        raise InputError(f"{path} has no head for a task: fine-tune it first, with `distil-jax finetune`.")
    length = min(task.max_length, model.config.max_positions)
    data = read_task(task, model.tokenizer, vocab_size=model.config.vocab_size, max_length=length)
    if not task.label_names and sorted(data.label_names) == sorted(model.head.label_names):
        data = data.with_labels(model.head.label_names)
    wanted = head_of(task, StartConfig(), model.config, data.label_names)
    check_head(model.head, wanted, f"The model {model.run or model.tokenizer}")
    return data


def evaluate_task(model: Model, task: TaskConfig, data: TaskData) -> dict[str, dict[str, float]]:
    """The metrics of a model with a task's head, as shares, on the task's "dev" and, where there are such, "test"."""
    length = min(task.max_length, model.config.max_positions)
    mesh, compute = make_mesh(MeshConfig()), resolve_compute(ComputeConfig())
    student = with_compute(model.config, compute)
    step = StepConfig(student, optimizer=OptimizerConfig(steps=1), head=model.head)
    step, _ = settle_attention(step, "auto", mesh, length)
    params = put_params(model.params, shardings_of(abstract_state(step).replace(opt_state=None), mesh).params)
    judge = Judge(task, step, mesh, data.label_names, mesh.size * max(1, _BATCH_TOKENS // length))
    return judge.splits(params, data)


def held_out_numbers(
    step: Callable,
    state: TrainState,
    teacher_params: Any,
    table: RowTable,
    weights: jax.Array,
    *,
    mesh: Mesh,
    batch_rows: int,
    limit: int = 0,
    alive: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Means over the held-out rows: mlm, accuracy, perplexity, and kl and agreement with a teacher.

    Args:
      step: `mask_and_eval_step`, compiled with `jit_eval`.
      state: the student.
      teacher_params: the teacher's tree or None.
      table: held-out rows; the masks are the same at every call, and of a row whatever the limit.
      weights: [V], on the mesh.
      mesh: where the rows go.
      batch_rows: rows per call of `step`.
      limit: only so many rows, see `judged_rows`; 0: all.
      alive: called with every batch.
    """
    sums, places = Sums(), local_places(mesh, batch_rows)
    for rows in held_out_batches(table, batch_rows=batch_rows, limit=limit, places=places):
        alive()
        sums.add(step(state, teacher_params, put_rows(rows, mesh, batch_rows=batch_rows), weights))
    numbers = sums.numbers()
    mlm = numbers.pop("mlm")
    return {"mlm": mlm, "perplexity": perplexity(mlm), **numbers}
