"""`distil-jax demo`: the whole path on this machine in minutes, from an embedded teacher, without a network.

Text that every installation has (the docstrings of its packages), the small BERT that comes with the package, a
student of half its layers trained with and without that teacher from the same beginning, and one table.
"""

from __future__ import annotations

import argparse

from distil_jax.schema import user_path
from distil_jax.workflows.demo import demo


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `distil-jax demo`."""
    parser.add_argument("--output", default="demo", help="where to work (default: %(default)s)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="repeat both trainings with each (default: once, with 0)"
    )
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="override a key of configs/demo_student.toml"
    )


def run(arguments: argparse.Namespace) -> None:
    """Runs the demonstration; started again, it goes on where it was."""
    demo(user_path(arguments.output), seeds=arguments.seeds, overrides=arguments.set)
