"""The data structures that all packages share, and the letters that name axes.

A name such as `hidden_BxLxD` gives the shape of an array in these letters:

  B  rows of a batch            D  width of the hidden states     H  attention heads
  L  positions in a row         F  width of the feed-forward      K  width of one head
  V  vocabulary, padded         M  most MLM targets in a row      N  stacked layers; rows of a data set
  C  labels of a task
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from distil_jax.schema import require

Array = jax.Array

IGNORED = -100  # the label of a position that is not a target, as in PyTorch and `transformers`
# The logit of ids that only pad the vocabulary, and the smallest logit of a teacher. exp(-1e9 - x) is exactly 0 in
# float32, and unlike -inf it leaves a KL finite (0 * -1e9 = 0).
PADDING_LOGIT = -1e9


@struct.dataclass
class Rows:
    """Packed rows before masking.

    Attributes:
      input_ids: [B, L] int32.
      segment_ids: [B, L] int32; 0 is padding. Tokens attend only to tokens of their own segment, so this array is
        the attention mask, also for packed rows.
      position_ids: [B, L] int32; they count from 0 in each segment.
      row_index: [B] int32, the index of each row in the data set. Masks are drawn from it, so they do not depend on
        how rows are divided into batches.
    """

    input_ids: Array
    segment_ids: Array
    position_ids: Array
    row_index: Array


@struct.dataclass
class Batch:
    """A masked batch: the input of models and losses.

    Attributes:
      input_ids, segment_ids, position_ids: [B, L] int32, as in `Rows`.
      labels: [B, L] int32 for language modelling, `IGNORED` at positions that are not targets; for a task, see
        `TaskObjective`.
      token_type_ids: [B, L] int32, or None for all zeros.
      row_index: [B] int32, as in `Rows`; dropout is drawn from it too. None: the index of each row in the batch.
      teacher_logits: of a teacher that was run before, see `LogitsFromBatch`: [B, L, V], or a task's.
    """

    input_ids: Array
    segment_ids: Array
    position_ids: Array
    labels: Array
    token_type_ids: Array | None = None
    row_index: Array | None = None
    teacher_logits: Array | None = None

    @classmethod
    def from_padded(
        cls, input_ids: Array, attention_mask: Array, labels: Array, token_type_ids: Array | None = None
    ) -> Batch:
        """Makes a batch from ordinary padded arrays, with one sequence per row.

        Args:
          input_ids: [B, L] token ids.
          attention_mask: [B, L], 1 at tokens and 0 at padding, of any dtype.
          labels: [B, L], `IGNORED` at positions that are not targets; or a task's (see `TaskObjective`): [B] class
            indices, [B] floats of a regression, or [B, 2] spans.
          token_type_ids: [B, L], or None for all zeros.

        Raises:
          InputError: an array has another shape or dtype, or the mask has other values than 0 and 1 (which is not
            checked while tracing).
        """
        input_ids = _int32("input_ids", input_ids)
        require(input_ids.ndim == 2, f"input_ids must be [B, L], one sequence per row, not {list(input_ids.shape)}.")
        mask = jnp.asarray(attention_mask)
        types = None if token_type_ids is None else _int32("token_type_ids", token_type_ids)
        for name, array in (("attention_mask", mask), ("token_type_ids", types)):
            require(
                array is None or array.shape == input_ids.shape,
                f"{name} must be [B, L] like input_ids, {list(input_ids.shape)}, not {list(np.shape(array))}.",
            )
        if not isinstance(mask, jax.core.Tracer):
            host_mask = np.asarray(mask)
            others = host_mask[(host_mask != 0) & (host_mask != 1)]
            require(
                not others.size,
                "attention_mask must be 1 at tokens and 0 at padding (neither packed nor additive), but contains "
                f"{others[:1].tolist()}.",
            )
        return cls(
            input_ids=input_ids,
            segment_ids=mask.astype(jnp.int32),
            position_ids=jnp.broadcast_to(jnp.arange(input_ids.shape[1], dtype=jnp.int32), input_ids.shape),
            labels=_labels(labels, input_ids.shape),
            token_type_ids=types,
        )


def _int32(name: str, values: Array) -> Array:
    array = jnp.asarray(values)
    require(jnp.issubdtype(array.dtype, jnp.integer), f"{name} must be whole numbers, not {array.dtype}.")
    return array.astype(jnp.int32)


def _labels(values: Array, shape: tuple[int, int]) -> Array:
    """Checks that labels fit input_ids of this shape. Integers become int32, floats float32."""
    labels = jnp.asarray(values)
    require(
        labels.shape in (shape, shape[:1], (shape[0], 2)),
        f"labels must be [B, L], [B] or [B, 2] with the B and L of input_ids, {list(shape)}, not {list(labels.shape)}.",
    )
    if not jnp.issubdtype(labels.dtype, jnp.floating):
        return labels.astype(jnp.int32)
    require(
        labels.ndim == 1,
        f"labels of dtype {labels.dtype} are for a regression and must be [B], one per row, not {list(labels.shape)}.",
    )
    return labels.astype(jnp.float32)


@struct.dataclass
class Head:
    """The tied vocabulary projection: logits = features @ kernel.T + bias.

    Attributes:
      kernel: [V, D], the word embedding.
      bias: [V]; a large negative, finite number at the ids that pad the vocabulary, so that these have no probability
        and do not affect a KL divergence, an argmax or a difference of logits.
    """

    kernel: Array
    bias: Array


@struct.dataclass
class Encoded:
    """The output of a model, without logits: the loss computes them from `features` and `head`.

    Attributes:
      hidden: [B, L, D], the last hidden states; None if only the logits of a teacher are known.
      features: [B, L, D], the output of the MLM transform, or None without an MLM head.
      head: projects features to logits; None without an MLM head.
      pooled: [B, D], the output of BERT's pooler (a dense layer and tanh) at each row's first position, or None without
        a pooler.
      logits: [B, L, V] instead of features and head, of a teacher that is not a model of this library. V may be the
        vocabulary's real size: losses pad it. An id may have -inf, which is a probability of 0.
    """

    hidden: Array | None = None
    features: Array | None = None
    head: Head | None = None
    pooled: Array | None = None
    logits: Array | None = None


@struct.dataclass
class Mean:
    """A mean as a sum and a count, which can be added up over micro-batches, devices and evaluation batches."""

    total: Array
    count: Array

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    def value(self) -> Array:
        """The mean, or 0 if the count is 0."""
        return self.total / jnp.maximum(self.count, 1)

    @classmethod
    def of(cls, values: Array, where: Array) -> Mean:
        """The mean of `values` over the positions where `where` is true.

        The values elsewhere may be anything, and their gradient is 0. But if computing them has an infinite or NaN
        derivative, their inputs must be replaced before, because the backward pass multiplies it by 0, which gives NaN.
        """
        values = jnp.asarray(values, jnp.float32)
        return cls(jnp.sum(jnp.where(where, values, 0)), jnp.sum(where, dtype=jnp.float32))


Metrics = dict[str, Mean]


def sinusoidal_table(max_positions: int, hidden_size: int) -> np.ndarray:
    """Fixed position embeddings, [max_positions, hidden_size] float32 (Vaswani et al., 2017, section 3.5).

    They are defined here because both `models`, which adds them, and `io`, which writes them to model folders, need
    them.
    """
    angles = np.arange(max_positions)[:, None] / 10_000 ** (2 * (np.arange(hidden_size) // 2) / hidden_size)
    table = np.empty((max_positions, hidden_size), np.float32)
    table[:, 0::2] = np.sin(angles[:, 0::2])
    table[:, 1::2] = np.cos(angles[:, 1::2])
    return table
