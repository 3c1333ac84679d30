"""The values that travel between the rooms, and the one legend of axis letters.

Names such as `hidden_BxLxD` carry their shape in these letters:

  B  rows of a batch            D  width of the hidden states     H  attention heads
  L  positions in a row         F  width of the feed-forward      K  width of one head
  V  vocabulary, padded         M  MLM targets kept per row       N  stacked layers
  C  labels of a task
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from distil_jax.schema import require

Array = jax.Array

IGNORED = -100  # the label of a position that is no target (the convention of PyTorch and `transformers`)


@struct.dataclass
class Rows:
    """Packed rows before masking.

    Attributes:
      input_ids: [B, L] int32.
      segment_ids: [B, L] int32; 0 is padding, and tokens see each other only inside one segment: one array is both
        the attention mask and the packing.
      position_ids: [B, L] int32; each segment counts from 0.
      row_index: [B] int32, the row's number in the data set: masks are drawn from it, so they do not depend on
        how the batch is cut.
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
      labels: [B, L] int32 for language modelling, `IGNORED` where a position is no target; whatever a task needs
        otherwise.
      token_type_ids: [B, L] int32, or None for all zeros.
      row_index: [B] int32, as in `Rows`: dropout is drawn from it too. None: the row's place in the batch.
    """

    input_ids: Array
    segment_ids: Array
    position_ids: Array
    labels: Array
    token_type_ids: Array | None = None
    row_index: Array | None = None

    @classmethod
    def from_padded(
        cls, input_ids: Array, attention_mask: Array, labels: Array, token_type_ids: Array | None = None
    ) -> Batch:
        """A batch from ordinary padded arrays, one sequence a row.

        Args:
          input_ids: [B, L] token ids.
          attention_mask: [B, L], 1 at real tokens, 0 at padding, of any type.
          labels: [B, L], `IGNORED` where a position is no target; or a task's, see `TaskObjective`: [B] classes, [B]
            floats of a regression, which stay floats, [B, 2] spans.
          token_type_ids: [B, L], or None for all zeros.

        Raises:
          InputError: a shape or a type is another, or a mask that is not being traced has other values than 0 and 1.
        """
        input_ids = _whole_numbers("input_ids", input_ids)
        require(input_ids.ndim == 2, f"input_ids must be [B, L], one sequence a row, not {list(input_ids.shape)}.")
        given = {"attention_mask": jnp.asarray(attention_mask)}
        if token_type_ids is not None:
            given["token_type_ids"] = _whole_numbers("token_type_ids", token_type_ids)
        for name, array in given.items():
            require(
                array.shape == input_ids.shape,
                f"{name} must be [B, L] as input_ids are, {list(input_ids.shape)}, not {list(array.shape)}.",
            )
        if not isinstance(given["attention_mask"], jax.core.Tracer):
            mask = np.asarray(given["attention_mask"])
            others = mask[(mask != 0) & (mask != 1)]
            require(
                not others.size,
                "attention_mask must be 1 at real tokens and 0 at padding (neither packed nor additive), but holds "
                f"{others[:1].tolist()}.",
            )
        return cls(
            input_ids=input_ids,
            segment_ids=given["attention_mask"].astype(jnp.int32),
            position_ids=jnp.broadcast_to(jnp.arange(input_ids.shape[1], dtype=jnp.int32), input_ids.shape),
            labels=_labels(labels, input_ids.shape),
            token_type_ids=given.get("token_type_ids"),
        )


def _whole_numbers(name: str, values: Array) -> Array:
    array = jnp.asarray(values)
    require(jnp.issubdtype(array.dtype, jnp.integer), f"{name} must be whole numbers, not {array.dtype}.")
    return array.astype(jnp.int32)


def _labels(values: Array, shape: tuple[int, int]) -> Array:
    labels = jnp.asarray(values)
    require(
        labels.shape in (shape, shape[:1], (shape[0], 2)),
        f"labels must be [B, L], [B] or [B, 2] with the B and L of input_ids, {list(shape)}, not {list(labels.shape)}.",
    )
    if not jnp.issubdtype(labels.dtype, jnp.floating):
        return labels.astype(jnp.int32)
    require(
        labels.ndim == 1, f"labels of type {labels.dtype} are a regression's, one a row: [B], not {list(labels.shape)}."
    )
    return labels.astype(jnp.float32)


@struct.dataclass
class Head:
    """The tied vocabulary projection: logits = features @ kernel.T + bias.

    Attributes:
      kernel: [V, D], the word embedding.
      bias: [V]; a large finite negative at the ids that only pad the vocabulary, so that they take no probability
        and leave no trace in a KL, an argmax or a difference of logits.
    """

    kernel: Array
    bias: Array


@struct.dataclass
class Encoded:
    """The output of a model, which stops before the vocabulary: the loss owns the [D, V] product.

    Attributes:
      hidden: [B, L, D], the last hidden states.
      features: [B, L, D], the MLM transform's output, or None without an MLM head.
      head: what turns features into logits, or None.
      pooled: [B, D], tanh of BERT's pooler on each row's first position, or None without a pooler.
    """

    hidden: Array
    features: Array | None
    head: Head | None
    pooled: Array | None = None


@struct.dataclass
class Mean:
    """A mean that is not divided yet: sums and counts add up over micro-batches, devices and evaluation batches."""

    total: Array
    count: Array

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    def value(self) -> Array:
        """The mean, and 0 where nothing was counted."""
        return self.total / jnp.maximum(self.count, 1)

    @classmethod
    def of(cls, values: Array, where: Array) -> Mean:
        """The mean of `values` over the positions where `where` is true.

        What stands elsewhere may be anything and gets a gradient of 0. Whoever made it from numbers that may be
        infinite or NaN sets those aside before: 0 times them is NaN on the way back.
        """
        values = jnp.asarray(values, jnp.float32)
        return cls(jnp.sum(jnp.where(where, values, 0)), jnp.sum(where, dtype=jnp.float32))


Metrics = dict[str, Mean]


def sinusoidal_table(max_positions: int, hidden_size: int) -> np.ndarray:
    """Fixed position embeddings, [max_positions, hidden_size] float32 (Vaswani et al., 2017, section 3.5).

    It stands on the ground floor because a model computes it and a model folder stores it.
    """
    angles = np.arange(max_positions)[:, None] / 10_000 ** (2 * (np.arange(hidden_size) // 2) / hidden_size)
    table = np.empty((max_positions, hidden_size), np.float32)
    table[:, 0::2] = np.sin(angles[:, 0::2])
    table[:, 1::2] = np.cos(angles[:, 1::2])
    return table
