"""`distil-jax demo`: distils a small student on this machine in minutes; see `workflows/demo.py`."""

from __future__ import annotations

import argparse

from distil_jax.schema import user_path
from distil_jax.workflows.demo import demo


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `distil-jax demo`."""
    parser.add_argument("--output", default="demo", help="the folder to work in (default: %(default)s)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="train both students once per seed (default: 0)"
    )
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="override a key of configs/demo_student.toml"
    )


def run(arguments: argparse.Namespace) -> None:
    """Runs the demonstration, or resumes it if it was started before."""
    demo(user_path(arguments.output), seeds=arguments.seeds, overrides=arguments.set)
