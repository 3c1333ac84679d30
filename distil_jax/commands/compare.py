"""`distil-jax compare`: what students keep of their teacher on tasks, and what they save."""

from __future__ import annotations

import argparse
from pathlib import Path

from distil_jax.reporting.comparison import into_card, tables, write
from distil_jax.runtime import processes
from distil_jax.schema import user_path
from distil_jax.workflows.compare import compare, named


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `distil-jax compare`."""
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="the teacher, then students: model folders, run folders or hub ids, each as PATH or NAME=PATH",
    )
    parser.add_argument("--tasks", nargs="+", required=True, help="names in configs/tasks, or TOML files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the runs (default: 0 1 2)")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="gets the runs, compare.md, .json and .png")
    parser.add_argument(
        "--distil",
        nargs="*",
        metavar="NAME",
        help="these students (default: all) also learn from the logits of the fine-tuned teacher, in runs of their own",
    )
    parser.add_argument(
        "--baseline",
        action="store_true",
        help="a linear model of TF-IDF beside them, where a task has texts and labels",
    )
    parser.add_argument("--cards", action="store_true", help="put the tables into README.md of the model folders named")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override a config key of every run; [loss] and [teacher], of the runs with a teacher",
    )


def run(arguments: argparse.Namespace) -> None:
    """Compares, and prints the tables; started again, it goes on where it was."""
    output, models = user_path(arguments.output), named(arguments.models)
    with processes.first_process_prints():
        comparison = compare(
            models,
            arguments.tasks,
            seeds=tuple(arguments.seeds),
            output=output,
            overrides=arguments.set,
            distil=list(models)[1:] if arguments.distil == [] else arguments.distil or (),
            baseline=arguments.baseline,
        )
        lines = tables(comparison)
        print("\n".join(["", *lines]))
        if processes.is_first():
            write(comparison, lines, output)
            cards = [user_path(path) / "README.md" for path in models.values() if arguments.cards]
            for card in filter(Path.is_file, cards):
                into_card(card, lines)
        print(f"\nWrote {output / 'compare.md'}, {output / 'compare.json'} and {output / 'compare.png'}.")
