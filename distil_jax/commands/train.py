"""`distil-jax train`: trains a student in a run folder, or resumes the run in it."""

from __future__ import annotations

import argparse
from pathlib import Path

import tomli_w

from distil_jax.config.load import load, presets
from distil_jax.runtime import processes
from distil_jax.runtime.program import keep_compiled
from distil_jax.runtime.run_folder import check_no_own_parts, is_run
from distil_jax.schema import to_dict, user_path
from distil_jax.workflows.train import train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `distil-jax train`."""
    parser.add_argument(
        "config",
        help=f"a TOML file, the name of a preset ({', '.join(presets())}), or the folder of a run, to go on with it",
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="the run folder (default: runs/NAME_OF_CONFIG; for a run, that run). A run and another folder: a new run "
        "with the run's configuration, from the start",
    )
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="override a config key: --set train.steps=100"
    )
    parser.add_argument(
        "--resume-step",
        type=int,
        metavar="STEP",
        help="resume from this checkpoint and set later ones aside (default: the newest valid one)",
    )
    parser.add_argument("--print-config", action="store_true", help="print the complete configuration and exit")


def run(arguments: argparse.Namespace) -> None:
    """Trains a student, or prints the configuration."""
    config = load(arguments.config, arguments.set)
    if arguments.print_config:
        print(tomli_w.dumps(to_dict(config)), end="")
        return
    run_or_file = user_path(arguments.config)
    check_no_own_parts(run_or_file)
    default = run_or_file if is_run(run_or_file) else Path("runs") / run_or_file.stem
    output = user_path(arguments.output or default)
    with processes.first_process_prints():
        keep_compiled(config.compute, output)
        train(config, output, resume_step=arguments.resume_step)
        print(f"Done. The run is in {output}. Next: distil-jax export {output} MODEL_FOLDER")
