"""`distil-jax compare`: compares students with their teacher on tasks, and in size and speed."""

from __future__ import annotations

import argparse

from distil_jax.runtime import processes
from distil_jax.schema import user_path
from distil_jax.workflows.compare import compare, models_by_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `distil-jax compare`."""
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="the teacher, then the students: model folders, run folders or hub ids, each as PATH or NAME=PATH",
    )
    parser.add_argument("--tasks", nargs="+", required=True, help="names in configs/tasks, or TOML files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the runs (default: 0 1 2)")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="for the runs, compare.md, .json and .png")
    parser.add_argument(
        "--distil",
        nargs="*",
        metavar="NAME",
        help="fine-tune these students (default: all) a second time, with the logits of the fine-tuned teacher",
    )
    parser.add_argument(
        "--baseline",
        action="store_true",
        help="add a linear model on TF-IDF features, on classification and regression tasks",
    )
    parser.add_argument("--cards", action="store_true", help="also add the tables to README.md of the model folders")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override a config key of every run; keys of [loss] and [teacher] apply to the runs with a teacher only",
    )


def run(arguments: argparse.Namespace) -> None:
    """Runs the comparison, or resumes it if it was started before."""
    models = models_by_name(arguments.models)
    every_student = arguments.distil == []  # --distil without names
    with processes.first_process_prints():
        compare(
            models,
            arguments.tasks,
            seeds=tuple(arguments.seeds),
            output=user_path(arguments.output),
            overrides=arguments.set,
            distil=list(models)[1:] if every_student else arguments.distil or (),
            baseline=arguments.baseline,
            cards=arguments.cards,
        )
