"""`distil-jax export`: a run's student as a folder that `transformers` opens, with a card that holds its numbers."""

from __future__ import annotations

import argparse
from pathlib import Path

from distil_jax.io import huggingface
from distil_jax.io.task_json import architecture
from distil_jax.reporting.card import card as made_card
from distil_jax.runtime.run_folder import Model, open_model
from distil_jax.schema import place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `distil-jax export`."""
    parser.add_argument("model", help="a run folder, or a model folder to write anew")
    parser.add_argument("output", help="the folder to write; must not exist, or be empty")
    parser.add_argument("--step", type=int, help="of a run folder: this checkpoint, not the newest")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of the numbers on disk")


def run(arguments: argparse.Namespace) -> None:
    """Writes the folder and says how to open it."""
    model, output = open_model(arguments.model, arguments.step), place(arguments.output)
    export(model, output, dtype=arguments.dtype)
    print(f"Wrote {output}. Open it with")
    print(f"  transformers.{architecture(model.config, model.head)}.from_pretrained({str(output)!r})")


def export(model: Model, output: str | Path, *, dtype: str = "float32", card: str | None = None) -> None:
    """Writes config.json, model.safetensors, the tokenizer's files and a model card.

    Args:
      model: from `open_model`.
      output: must not exist, or be empty; it appears whole or not at all.
      dtype: "float32" or "float16", on disk.
      card: the card's text; None: made from the run.
    """
    options = {"tokenizer": model.tokenizer, "card": card or made_card(model), "dtype": dtype}
    if model.head is None:
        huggingface.save(output, model.config, model.params, **options)
    else:
        huggingface.save_task(output, model.config, model.head, model.params, **options)
