"""`distil-jax eval`: evaluates a run's student or a model folder on held-out text or on a task."""

from __future__ import annotations

import argparse

from distil_jax.workflows.evaluate import evaluate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `distil-jax eval`."""
    parser.add_argument("model", help="a run folder, a model folder or a hub id")
    parser.add_argument("--task", help="for a fine-tuned model: a name in configs/tasks, or a TOML file")
    parser.add_argument("--data", help="prepared rows (default for a run folder: the run's own)")
    parser.add_argument("--teacher", help="a model to compare with (default for a run folder: the run's own)")
    parser.add_argument("--step", type=int, help="evaluate this checkpoint of a run folder (default: the newest)")
    parser.add_argument(
        "--rows",
        type=int,
        default=0,
        help="evaluate on this many held-out rows, always the same ones; 0: all of them (default: 0)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Evaluates the model and prints its metrics."""
    evaluate(
        arguments.model,
        step=arguments.step,
        task=arguments.task,
        data=arguments.data,
        teacher=arguments.teacher,
        rows=arguments.rows,
    )
