"""Evaluates a model on held-out text, or a fine-tuned model on its task, and prints the metrics."""

from __future__ import annotations

import sys
from functools import cache

from distil_jax.config.load import load_task
from distil_jax.data.summary import summarize
from distil_jax.evaluation import held_out
from distil_jax.evaluation.tasks import evaluate_task, examples_for, format_scores
from distil_jax.models.encoder import count_parameters
from distil_jax.runtime.run_folder import Model, open_model
from distil_jax.schema import InputError, quoted, require


def evaluate(
    path: str,
    *,
    step: int | None = None,
    task: str | None = None,
    data: str | None = None,
    teacher: str | None = None,
    rows: int = 0,
) -> None:
    """Evaluates a model and prints its metrics.

    Args:
      path: a run folder, a model folder or a hub id.
      step: the checkpoint of a run folder; None: the newest.
      task: evaluates on this task, a name in configs/tasks or a TOML file; None: on held-out text.
      data: a folder of prepared rows; None: the run's own.
      teacher: a model to compare with on held-out text; None: the run's own, if there is one.
      rows: number of held-out rows to evaluate on; 0: all.

    Raises:
      InputError: a model, task or data that cannot be used or do not fit each other, or no data for a model folder.
    """
    require(rows >= 0, f"--rows must not be negative, but is {rows}.")
    model = open_model(path, step)
    if task:
        flags = {"--data": data, "--teacher": teacher, "--rows": rows}
        ignored = " and ".join(flag for flag, value in flags.items() if value)
        require(not ignored, f"--task cannot be combined with {ignored}, which apply to held-out text: leave them out.")
        _evaluate_on_task(model, path, task)
    else:
        _evaluate_on_text(model, path, data, teacher, rows)


def _evaluate_on_task(model: Model, path: str, task: str) -> None:
    config = load_task(task, [quoted("model.path", path)]).task
    examples = examples_for(model, config)
    print(summarize(examples, ("dev", "test")))
    scores = evaluate_task(model, config, examples, before_batch=cache(_announce))
    print(format_scores(scores, config))


def _announce(length: int) -> None:
    print(f"Compiling the evaluation for rows of {length} tokens ...", file=sys.stderr, flush=True)


def _evaluate_on_text(model: Model, path: str, data: str | None, teacher: str | None, rows: int) -> None:
    if model.head is not None:
        raise InputError(f"{path} is a fine-tuned model, which predicts no tokens: evaluate it with --task TASK.")
    if model.run is not None:
        data = data or model.run_config.data.path
        teacher = teacher or model.run_config.teacher.path
    if not data:
        raise InputError("Name the prepared rows to evaluate on: --data FOLDER.")
    other = open_model(teacher) if teacher else None
    metrics = held_out.evaluate(model, data, teacher=other, limit=rows, before_batch=cache(_announce))
    print(f"{path}{f', step {model.step:,}' if model.step else ''} on the held-out rows of {data}")
    print(f"  {'parameters':12} {count_parameters(model.config):,}")
    for name, value in metrics.items():
        print(f"  {name:12} {value:z.4f}")
