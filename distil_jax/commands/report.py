"""`distil-jax report`: writes report.md, report.html and curves.png for one or several runs."""

from __future__ import annotations

import argparse
import os

import jax

from distil_jax.reporting.report import write_report
from distil_jax.schema import InputError, user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `distil-jax report`."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folders; runs that differ only in their seed are shown as one"
    )
    parser.add_argument("--output", metavar="FOLDER", help="the folder to write to (default: the first run)")
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="'A [MASK] B'",
        help="a sentence with a [MASK] for teacher and student to fill (repeatable; default: held-out sentences)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Writes the report and prints where it is."""
    runs = {user_path(folder).resolve().name: user_path(folder) for folder in arguments.runs}
    if len(runs) < len(arguments.runs):
        raise InputError("Two of the runs have the same folder name, so the report could not tell them apart.")
    # The run may still be training, so leave its accelerators alone. A report downloads nothing.
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    output = user_path(arguments.output or arguments.runs[0])
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file: name a folder.")
    written = write_report(runs, output, texts=arguments.text)
    print(f"Wrote {written} and, to open in a browser, {written.with_suffix('.html')}.")
