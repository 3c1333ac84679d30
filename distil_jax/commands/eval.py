"""`distil-jax eval`: what held-out text, or a task's examples, say of a run's student or of any model folder."""

from __future__ import annotations

import argparse

from distil_jax.config.load import load_task
from distil_jax.data.summary import summarize
from distil_jax.evaluation.held_out import evaluate
from distil_jax.evaluation.tasks import evaluate_task, examples_for, format_metrics
from distil_jax.models.encoder import count_parameters
from distil_jax.runtime.run_folder import open_model
from distil_jax.schema import InputError, quoted, require


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
        data = examples_for(model, task)
        print(summarize(data, ("dev", "test")))
        print(format_metrics(evaluate_task(model, task, data)))
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
