"""The batches of a PyTorch peer: unpacked sequences, one per row, padded, in buckets of length or at random."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import numpy as np

from distil_jax.config.objective import MaskingConfig
from distil_jax.objective.masking import mask_tokens
from distil_jax.structs import Rows

Batching = Literal["buckets", "random"]

_SHORTEST, _WIDTH = 3, 4  # buckets of the original (PyTorch) DistilBERT code: lengths from 3 on, in steps of 4


class Padded(NamedTuple):
    """Masked sequences padded to the longest, as NumPy arrays [B, L]. Labels are `IGNORED` off the targets."""

    input_ids: np.ndarray
    attention_mask: np.ndarray
    labels: np.ndarray


def unpack(rows: Rows) -> Iterator[np.ndarray]:
    """Yields the sequences of packed rows [B, L] in order, as arrays of token ids without padding."""
    for ids_L, segments_L in zip(rows.input_ids, rows.segment_ids, strict=True):
        for segment in range(1, segments_L.max() + 1):
            yield ids_L[segments_L == segment]


def group(lengths: np.ndarray, size: int, batching: Batching, *, seed: int) -> list[np.ndarray]:
    """Groups sequences into batches, so that every sequence is in one batch.

    "buckets" makes a batch of sequences of similar length, as the original does. What does not fill a batch in its
    bucket is batched in order of length, so that few batches mix buckets. "random" ignores the lengths.

    Args:
      lengths: [N], of the sequences.
      size: sequences per batch; one batch may be smaller.
      batching: see above.
      seed: for the order.

    Returns:
      For each batch, an array of indices into `lengths`.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    if batching == "random":
        return [order[start : start + size] for start in range(0, len(order), size)]
    buckets = np.digitize(lengths, np.arange(_SHORTEST, lengths.max() + 1, _WIDTH))[order]
    groups, leftovers = [], []
    for bucket in np.unique(buckets):
        members = order[buckets == bucket]
        count = len(members) // size * size
        groups += list(members[:count].reshape(-1, size))
        leftovers.append(members[count:])
    rest = np.concatenate(leftovers)
    groups += [rest[start : start + size] for start in range(0, len(rest), size)]
    return [groups[index] for index in rng.permutation(len(groups))]


def masked_batches(
    sequences: Sequence[np.ndarray],
    *,
    size: int,
    batching: Batching,
    weights: np.ndarray,
    masking: MaskingConfig,
    length: int,
    seed: int,
) -> list[Padded]:
    """Masks all sequences with our own `mask_tokens`, so that peers have as many targets, and groups them into batches.

    Args:
      sequences: token ids.
      size, batching, seed: see `group`.
      weights, masking: see `mask_tokens`.
      length: at least the length of every sequence.
    """
    lengths = np.array([len(sequence) for sequence in sequences])
    real = (np.arange(length) < lengths[:, None]).astype(np.int32)
    ids = np.zeros(real.shape, np.int32)
    ids[real > 0] = np.concatenate(sequences)
    rows = Rows(ids, real, real, np.arange(len(ids), dtype=np.int32))  # masking ignores positions
    batch = jax.device_get(jax.jit(partial(mask_tokens, weights=weights, config=masking))(jax.random.key(seed), rows))
    padded = []
    for indices in group(lengths, size, batching, seed=seed):
        longest = lengths[indices].max()
        padded.append(Padded(*(array[indices, :longest] for array in (batch.input_ids, real, batch.labels))))
    return padded
