"""`distil-jax report`: what a run did, as report.md, report.html and curves.png beside its numbers."""

from __future__ import annotations

import argparse
import os

import jax

from distil_jax.reporting.report import write_report
from distil_jax.schema import InputError, user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `distil-jax report`."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folders; those that differ in their seed alone are shown as one"
    )
    parser.add_argument("--output", metavar="FOLDER", help="where to write (default: into the first run)")
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="'A [MASK] B'",
        help="a sentence whose gap teacher and student fill (repeatable; default: sentences of the held-out rows)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Writes the report and says where."""
    runs = {user_path(folder).resolve().name: user_path(folder) for folder in arguments.runs}
    if len(runs) < len(arguments.runs):
        raise InputError("Two of the runs have the same folder name, so a report could not tell them apart.")
    # The run may still be going: its accelerators are its own. And a report fetches nothing.
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    output = user_path(arguments.output or arguments.runs[0])
    if not output.is_dir():
        raise InputError(f"{output} is no folder to write into: make it first, or leave --output out.")
    written = write_report(runs, output, texts=arguments.text)
    print(f"Wrote {written} and, to open in a browser, {written.with_suffix('.html')}.")
