"""Dynamic masking on the device: pure, row by row, rare words more often (SPEC: the published recipe).

The original draws its targets over a whole micro-batch; here every row gets its own share, drawn from a key that
depends on the row alone, so hosts, devices and micro-batches may cut a batch as they like.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from distil_jax.config.objective import MaskingConfig
from distil_jax.structs import IGNORED, Array, Batch, Rows


def masking_weights(token_counts: np.ndarray, never: Sequence[int], *, smoothing: float) -> np.ndarray:
    """Masking weights, in proportion to which tokens are chosen as targets: max(count, 1) ** -smoothing.

    Args:
      token_counts: [V] occurrences in the training text.
      never: ids with weight 0, because they are no words: special and unused tokens, padding of the vocabulary.
      smoothing: 0.7 in the published recipe; 0 chooses all tokens alike.

    Returns:
      [V] float32.
    """
    weights_V = np.maximum(token_counts, 1).astype(np.float64) ** -smoothing
    weights_V[list(never)] = 0
    return weights_V.astype(np.float32)


def most_targets(length: int, rate: float) -> int:
    """The most targets that `mask_tokens` chooses in a row of `length` positions."""
    return max(1, round(rate * length))


def mask_tokens(key: Array, rows: Rows, *, weights: Array, config: MaskingConfig) -> Batch:
    """Chooses round(rate x real tokens) targets in each row, and hides most of them (Devlin et al., 2018, 3.1).

    Targets are drawn without replacement in proportion to `weights` (Gumbel top-k). Of the targets, `config.mask`
    become [MASK], `config.random` a random word, and the rest stay. A row's draw depends on `key` and its
    `row_index` only.

    Args:
      key: of this step.
      rows: [B, L].
      weights: [V], 0 at ids that are never targets and never random replacements; see `masking_weights`.
      config: `mask_token_id` must be set.

    Returns:
      A `Batch` whose labels are the original ids at the targets and `IGNORED` elsewhere.
    """
    most = most_targets(rows.input_ids.shape[1], config.rate)
    # Every dtype is given: with 64-bit types switched on, draws without one would be different draws.
    log_weights_V = jnp.log(jnp.asarray(weights, jnp.float32))  # -inf where a token is never chosen
    word_counts_V = jnp.cumsum(weights > 0, dtype=jnp.int32)  # words up to each id: a search in it finds the n-th

    def mask_row(row: Rows) -> tuple[Array, Array]:
        choose_key, kind_key, word_key = jax.random.split(jax.random.fold_in(key, row.row_index), 3)
        ids_L, real_L = row.input_ids, row.segment_ids > 0
        scores_L = jnp.where(real_L, log_weights_V[ids_L], -jnp.inf)
        scores_L += jax.random.gumbel(choose_key, scores_L.shape, jnp.float32)
        # A sort, not `top_k`: XLA cuts a sort along the rows of a sharded batch, and gathers them all for a top-k.
        targets_M = jnp.argsort(scores_L, descending=True)[:most]
        scores_M = scores_L[targets_M]
        wanted = jnp.maximum(1, jnp.round(config.rate * jnp.sum(real_L, dtype=jnp.float32)))
        chosen_M = (jnp.arange(most) < wanted) & (scores_M > -jnp.inf)
        original_M = ids_L[targets_M]
        kind_M = jax.random.uniform(kind_key, (most,), jnp.float32)
        nth_M = jax.random.randint(word_key, (most,), 1, word_counts_V[-1] + 1, jnp.int32)
        word_M = jnp.searchsorted(word_counts_V, nth_M)
        input_M = jnp.where(
            kind_M < config.mask,
            config.mask_token_id,
            jnp.where(kind_M < config.mask + config.random, word_M, original_M),
        )
        ids_L = ids_L.at[targets_M].set(jnp.where(chosen_M, input_M, original_M))
        labels_L = jnp.full_like(ids_L, IGNORED).at[targets_M].set(jnp.where(chosen_M, original_M, IGNORED))
        return ids_L, labels_L

    ids_BxL, labels_BxL = jax.vmap(mask_row)(rows)
    return Batch(
        input_ids=ids_BxL,
        segment_ids=rows.segment_ids,
        position_ids=rows.position_ids,
        labels=labels_BxL,
        row_index=rows.row_index,
    )
