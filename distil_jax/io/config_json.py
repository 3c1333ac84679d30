"""Converts the `config.json` of a BERT or DistilBERT to `ModelConfig` and back, by one table of fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distil_jax.config.model import ModelConfig
from distil_jax.schema import InputError

BERT, DISTILBERT = "bert", "distilbert"
SINUSOIDAL_KEY = "sinusoidal_pos_embds"

# Our field, and its key in each kind of file. A field that a file leaves out has the default of ModelConfig, which is
# also that of `transformers`; but a file must have all of _SIZES.
_FIELDS = {
    "vocab_size": {BERT: "vocab_size", DISTILBERT: "vocab_size"},
    "num_layers": {BERT: "num_hidden_layers", DISTILBERT: "n_layers"},
    "hidden_size": {BERT: "hidden_size", DISTILBERT: "dim"},
    "num_heads": {BERT: "num_attention_heads", DISTILBERT: "n_heads"},
    "intermediate_size": {BERT: "intermediate_size", DISTILBERT: "hidden_dim"},
    "max_positions": {BERT: "max_position_embeddings", DISTILBERT: "max_position_embeddings"},
    "token_types": {BERT: "type_vocab_size"},
    "activation": {BERT: "hidden_act", DISTILBERT: "activation"},
    "hidden_dropout": {BERT: "hidden_dropout_prob", DISTILBERT: "dropout"},
    "attention_dropout": {BERT: "attention_probs_dropout_prob", DISTILBERT: "attention_dropout"},
    "layer_norm_eps": {BERT: "layer_norm_eps"},
    "initializer_range": {BERT: "initializer_range", DISTILBERT: "initializer_range"},
    "pad_token_id": {BERT: "pad_token_id", DISTILBERT: "pad_token_id"},
}
_SIZES = ("vocab_size", "num_layers", "hidden_size", "num_heads", "intermediate_size", "max_positions")
_FRACTIONS = ("hidden_dropout", "attention_dropout", "layer_norm_eps", "initializer_range")
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
_ACTIVATION_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}
_ONLY = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}

# DistilBERT fixes these in its code; its config.json has no keys for them.
_DISTILBERT_FIXED = {"token_types": 0, "layer_norm_eps": 1e-12}


def model_type(config: ModelConfig) -> str:
    """The kind of model that is written: a DistilBERT if there is no token-type table, otherwise a BERT."""
    return BERT if config.token_types else DISTILBERT


def from_json(values: Mapping[str, Any], path: Path) -> ModelConfig:
    """The architecture that a config.json describes. Only the weights tell its heads, pooler and kind of positions.

    Raises:
      InputError: another kind of model, an unsupported setting, a missing size, or an impossible value.
    """
    kind = values.get("model_type")
    if kind not in (BERT, DISTILBERT):
        what = "says no model_type" if kind is None else f"holds a model of type {kind!r}, not a BERT"
        raise InputError(
            f'{path.parent} {what}: give a folder whose config.json has model_type "{BERT}" or "{DISTILBERT}".'
        )
    for key, allowed in _ONLY.items():
        if values.get(key, allowed) != allowed:
            raise InputError(
                f"{path} says {key} = {values[key]!r}, but only {allowed!r} is supported: use such a model."
            )
    keys = {field: names[kind] for field, names in _FIELDS.items() if kind in names}
    given = {field: values[key] for field, key in keys.items() if values.get(key) is not None}
    if missing := [keys[field] for field in _SIZES if field not in given]:
        raise InputError(f"{path} lacks {', '.join(missing)}: take the config.json that belongs to the weights.")
    activation = given.pop("activation", "gelu")
    if activation not in list(_ACTIVATIONS):
        raise InputError(
            f"{path} says {keys['activation']} = {activation!r}, but only {', '.join(_ACTIVATIONS)} are supported: "
            "use such a model."
        )
    for field, value in given.items():
        limit = 1 if field in _FRACTIONS else 10_000 if field == "num_layers" else 10_000_000
        is_number = type(value) is int or (type(value) is float and field in _FRACTIONS)
        if not is_number or not 0 <= value <= limit:
            raise InputError(
                f"{path} says {keys[field]} = {value!r}, where a {'' if field in _FRACTIONS else 'whole '}number "
                f"from 0 to {limit} belongs: take the config.json that belongs to the weights."
            )
    if kind == BERT and given.get("token_types") == 0:
        raise InputError(f"{path} says type_vocab_size = 0, but a BERT has at least 1: take another model.")
    given |= {field: float(given[field]) for field in _FRACTIONS if field in given}
    try:
        return ModelConfig(
            **given | (_DISTILBERT_FIXED if kind == DISTILBERT else {}), activation=_ACTIVATIONS[activation]
        )
    except InputError as error:
        raise InputError(f"{path} describes no model: {error}") from error


def to_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a model, with the size of the vocabulary before padding.

    Raises:
      InputError: a model without token types that is no DistilBERT, because of its pooler or layer_norm_eps.
    """
    kind = model_type(config)
    if kind == DISTILBERT and (config.pooler or config.layer_norm_eps != _DISTILBERT_FIXED["layer_norm_eps"]):
        raise InputError(
            "A model without token types is saved as a DistilBERT, which has no pooler and layer_norm_eps "
            f"{_DISTILBERT_FIXED['layer_norm_eps']}, but this one has pooler = {config.pooler} and layer_norm_eps = "
            f"{config.layer_norm_eps}: give it token types, or train it without these."
        )
    ours = dataclasses.asdict(config) | {"activation": _ACTIVATION_NAMES[config.activation]}
    values = {names[kind]: ours[field] for field, names in _FIELDS.items() if kind in names}
    if kind == DISTILBERT:
        values[SINUSOIDAL_KEY] = config.positions == "sinusoidal"
    architecture = {BERT: "Bert", DISTILBERT: "DistilBert"}[kind] + ("ForMaskedLM" if config.mlm_head else "Model")
    return values | {
        "architectures": [architecture],
        "model_type": kind,
        "tie_word_embeddings": True,
        "dtype": dtype,
    }
