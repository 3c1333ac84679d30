"""`distil-jax doctor [RUN]`: checks that the machine works, and that the files of a run are complete."""

from __future__ import annotations

import argparse

from distil_jax.runtime import processes
from distil_jax.runtime.doctor import examine
from distil_jax.schema import user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `distil-jax doctor`."""
    parser.add_argument("run", nargs="?", help="a run folder: its checkpoints, rows and teacher are checked too")


def run(arguments: argparse.Namespace) -> None:
    """Prints one line per check.

    Raises:
      InputError: a check failed; its line says what to do.
    """
    processes.connect()
    examine(user_path(arguments.run) if arguments.run is not None else None)
