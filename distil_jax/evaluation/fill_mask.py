"""The words that a model predicts for a [MASK]: the quickest look at whether it has learnt anything."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distil_jax.config.model import ModelConfig
from distil_jax.data.tokenizer import check_fits, load_tokenizer
from distil_jax.models.encoder import MaskedLm
from distil_jax.objective.vocabulary import logits
from distil_jax.runtime.run_folder import Model
from distil_jax.schema import InputError
from distil_jax.structs import Batch


def fill_mask(model: Model, texts: list[str], *, best: int = 3) -> list[list[tuple[str, float]]]:
    """The `best` words, and their probabilities, for the [MASK] of each text.

    Raises:
      InputError: a text without exactly one [MASK], or too long for the model, or a model without an MLM head.
    """
    if not model.config.mlm_head:
        raise InputError(f"{model.tokenizer} has no MLM head, so it fills no gap: train one first.")
    tokenizer = load_tokenizer(model.tokenizer)
    check_fits(tokenizer, model.tokenizer, model.config.vocab_size)
    # Positions are counted from the left, whichever side the tokenizer would pad.
    encoded = tokenizer(texts, padding=True, padding_side="right", return_tensors="np")
    is_gap = encoded["input_ids"] == tokenizer.mask_token_id
    if (is_gap.sum(axis=1) != 1).any() or is_gap.shape[1] > model.config.max_positions:
        raise InputError(
            f"Each text needs exactly one {tokenizer.mask_token} and at most {model.config.max_positions} tokens."
        )
    batch = Batch.from_padded(encoded["input_ids"], encoded["attention_mask"], np.zeros_like(encoded["input_ids"]))
    values, ids = _best(model.config, model.params, batch, is_gap.argmax(axis=1), best)
    return [
        [(tokenizer.decode([int(i)]), float(value)) for i, value in zip(row_ids, row_values, strict=True)]
        for row_ids, row_values in zip(ids, values, strict=True)
    ]


@partial(jax.jit, static_argnums=(0, 4))  # one compilation for models of one shape, not one an operation
def _best(config: ModelConfig, params: Any, batch: Batch, gaps_B: jax.Array, best: int) -> tuple[jax.Array, jax.Array]:
    """[B, best] the largest probabilities at each row's gap, and their ids."""
    output = MaskedLm(config).apply({"params": params}, batch)
    features_BxD = output.features[jnp.arange(len(gaps_B)), gaps_B]
    return jax.lax.top_k(jax.nn.softmax(logits(features_BxD, output.head)), best)
