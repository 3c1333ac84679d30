"""`distil-jax finetune`: fine-tunes an encoder on a task, with or without a fine-tuned teacher."""

from __future__ import annotations

import argparse

import tomli_w

from distil_jax.config.load import load_task, presets
from distil_jax.runtime import processes
from distil_jax.runtime.program import keep_compiled
from distil_jax.runtime.run_folder import check_no_own_parts
from distil_jax.schema import quoted, require, to_dict, user_path
from distil_jax.workflows.finetune import finetune


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `distil-jax finetune`."""
    parser.add_argument("model", help="the encoder to start from: a model folder, a run folder or a hub id")
    parser.add_argument(
        "--task",
        required=True,
        help=f"a TOML file, the name of a preset ({', '.join(presets('tasks'))}), or the run folder of a fine-tuning, "
        "for its task and settings",
    )
    parser.add_argument(
        "--teacher", default="", help="a model fine-tuned on the task, whose logits become soft targets"
    )
    parser.add_argument(
        "--output", metavar="FOLDER", help="the run folder (required); the model is written to FOLDER/model"
    )
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="override a config key: --set task.train=my.csv"
    )
    parser.add_argument("--print-config", action="store_true", help="print the complete configuration and exit")


def run(arguments: argparse.Namespace) -> None:
    """Fine-tunes a model and prints the metrics of its best checkpoint, or prints the configuration."""
    overrides = [quoted("model.path", arguments.model)]
    if arguments.teacher:
        overrides.append(quoted("teacher.path", arguments.teacher))
    config = load_task(arguments.task, [*overrides, *arguments.set])
    if arguments.print_config:
        print(tomli_w.dumps(to_dict(config)), end="")
        return
    require(arguments.output is not None, "finetune needs a folder for its run: name one with --output.")
    check_no_own_parts(user_path(arguments.task))
    output = user_path(arguments.output)
    with processes.first_process_prints():
        keep_compiled(config.compute, output)
        finetune(config, output)
        print(f"Done. {output / 'model'} is the best checkpoint as a folder that transformers opens.")
