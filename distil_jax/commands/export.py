"""`distil-jax export`: writes the student of a run as a model folder for `transformers`, with a model card."""

from __future__ import annotations

import argparse
import shlex

from distil_jax.io.task_json import architecture
from distil_jax.runtime.run_folder import open_model
from distil_jax.schema import user_path
from distil_jax.workflows.export import export


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `distil-jax export`."""
    parser.add_argument("model", help="a run folder, or a model folder to write again")
    parser.add_argument("output", help="the folder to write; it must not exist, or be empty")
    parser.add_argument("--step", type=int, help="export this checkpoint of a run folder (default: the newest)")
    parser.add_argument("--license", default="", metavar="NAME", help="for the model card, such as apache-2.0")
    parser.add_argument(
        "--language", action="append", default=[], metavar="CODE", help="for the model card, such as en (repeatable)"
    )
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of the saved parameters")


def run(arguments: argparse.Namespace) -> None:
    """Writes the folder and prints how to open it."""
    model, output = open_model(arguments.model, arguments.step), user_path(arguments.output)
    export(model, output, dtype=arguments.dtype, licence=arguments.license, languages=arguments.language)
    print(f"Wrote {output}. Open it with")
    print(f"  transformers.{architecture(model.config, model.head)}.from_pretrained({str(output)!r})")
    print(f"Next: read {output / 'README.md'}, then hf upload YOUR_NAME/MODEL {shlex.quote(str(output))}")
