"""The head of a model card: its title, and the metadata that the Hugging Face hub reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distil_jax.io.names import short_name, source_name
from distil_jax.io.task_json import architecture
from distil_jax.runtime.run_folder import Model
from distil_jax.schema import InputError

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

_PIPELINES = {"sequence": "text-classification", "tokens": "token-classification", "spans": "question-answering"}


def head_lines(model: Model, licence: str, languages: Sequence[str]) -> list[str]:
    """The metadata and the title; see `model_card` for the arguments."""
    return ["---", _metadata(model, licence, languages).to_yaml(), "---", "", f"# {_title(model)}", ""]


def _title(model: Model) -> str:
    """What the model is; its folder may have any name."""
    size = f"A {model.config.num_layers}-layer"
    if model.run is None:
        return f"{size} {architecture(model.config, model.head)}"
    config = model.run_config
    if model.head is not None:
        return f"{short_name(config.model.path)} fine-tuned on {source_name(config.task.train)}"
    return f"{size} student of {short_name(config.teacher.path)}" if model.metadata["teacher"] else f"{size} BERT"


def _metadata(model: Model, licence: str, languages: Sequence[str]) -> ModelCardData:
    """What the hub reads at the head of a card. Of a model folder that is written again, its own card is asked too."""
    from huggingface_hub import ModelCardData

    values = _earlier_terms(model.tokenizer / "README.md") if model.run is None else {}
    if base := _base_model(model):
        values["base_model"] = base
    if licence:
        values["license"] = licence
    if languages:
        values["language"] = list(languages)
    pipeline = "feature-extraction" if model.head is None and not model.config.mlm_head else "fill-mask"
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=_PIPELINES[model.head.kind] if model.head else pipeline,
        tags=["distil_jax", *(["distillation"] if model.run and _has_teacher(model) else [])],
        **values,
    )


def _earlier_terms(card: Path) -> dict[str, Any]:
    """The licence, language and base model that a model's card names; empty without a card.

    Raises:
      InputError: the card has a head that cannot be read.
    """
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    if not card.is_file():
        return {}
    try:
        data = ModelCard.load(card, ignore_metadata_errors=True).data
    except (YAMLError, ValueError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise InputError(
            f"{card} begins with lines that are not a card's ({reason}): correct or remove them."
        ) from error
    return {name: data.get(name) for name in ("license", "language", "base_model")}


def _has_teacher(model: Model) -> bool:
    return bool(model.metadata["teacher"]) and model.run_config.loss.needs_teacher


def _base_model(model: Model) -> str:
    """The model that this one begins with or learns from, as the hub spells names; empty: there is none."""
    if model.run is None:
        return ""
    config = model.run_config
    if model.head is not None:
        name = short_name(config.model.path)
    elif model.metadata["teacher"]:
        name = short_name(config.teacher.path)
    else:
        name = "" if config.student.init == "random" else short_name(config.student.init)
    return re.sub(r"[^\w./-]+", "-", name)
