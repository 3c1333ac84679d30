"""Writes a model as a folder that `transformers` opens, with a model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distil_jax.io import huggingface
from distil_jax.reporting.card import model_card
from distil_jax.runtime.run_folder import Model


def export(
    model: Model,
    output: str | Path,
    *,
    dtype: str = "float32",
    card: str | None = None,
    licence: str = "",
    languages: Sequence[str] = (),
) -> None:
    """Writes config.json, model.safetensors, the tokenizer's files and a model card.

    Args:
      model: from `open_model`.
      output: the folder to write, which must be new or empty; it is written completely or not at all.
      dtype: "float32" or "float16", for the parameters on disk.
      card: the text of the model card; None: `model_card` writes it.
      licence, languages: for that card.
    """
    options = {
        "tokenizer": model.tokenizer,
        "card": card or model_card(model, licence=licence, languages=languages),
        "dtype": dtype,
    }
    if model.head is None:
        huggingface.save(output, model.config, model.params, **options)
    else:
        huggingface.save_task(output, model.config, model.head, model.params, **options)
