"""Self-attention inside segments: which implementation computes it, and when that is lawful.

Today one does: plain XLA, which is lawful everywhere and is what faster ones will be held to.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from distil_jax.structs import Array


def attend(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array,
    *,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
) -> Array:
    """Scaled dot-product attention in which a position sees only its own segment (Vaswani et al., 2017, eq. 1).

    Padding is segment 0 and sees itself: its output is finite, means nothing, and reaches no other position.

    Args:
      query, key, value: [B, L, H, K].
      segment_ids: [B, L].
      dropout_rate: share of the attention probabilities set to zero.
      dropout_key: a key, needed when `dropout_rate` is above 0.

    Returns:
      [B, L, H, K] in the dtype of `value`.
    """
    scores_BxHxLxL = jnp.einsum("BLHK,BMHK->BHLM", query, key) * query.shape[-1] ** -0.5
    same_segment_Bx1xLxL = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    # The softmax is taken in float32 whatever the compute dtype.
    scores_BxHxLxL = jnp.where(same_segment_Bx1xLxL, scores_BxHxLxL.astype(jnp.float32), -1e9)
    weights_BxHxLxL = jax.nn.softmax(scores_BxHxLxL, axis=-1).astype(value.dtype)
    if dropout_rate > 0:
        kept = jax.random.bernoulli(dropout_key, 1 - dropout_rate, weights_BxHxLxL.shape)
        weights_BxHxLxL = jnp.where(kept, weights_BxHxLxL / (1 - dropout_rate), 0)
    return jnp.einsum("BHLM,BMHK->BLHK", weights_BxHxLxL, value)
