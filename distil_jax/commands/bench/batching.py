"""The batches of a PyTorch peer: the sequences of packed rows, one a row again, in buckets of length or at random."""

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

_SHORTEST, _WIDTH = 3, 4  # the original's buckets: lengths from 3 on, in steps of 4


class Padded(NamedTuple):
    """Masked sequences, padded to the longest of them; NumPy arrays [n, l]: labels `IGNORED` off the targets."""

    input_ids: np.ndarray
    attention_mask: np.ndarray
    labels: np.ndarray


def unpack(rows: Rows) -> Iterator[np.ndarray]:
    """The sequences that share rows [B, L], in order, each with its own tokens alone."""
    for ids_L, segments_L in zip(rows.input_ids, rows.segment_ids, strict=True):
        for number in range(1, segments_L.max() + 1):
            yield ids_L[segments_L == number]


def group(lengths: np.ndarray, size: int, batching: Batching, *, seed: int) -> list[np.ndarray]:
    """Batches of sequences, as arrays of indices into `lengths`; every sequence comes up once.

    "buckets" draws a batch among sequences of about one length, as the original does; what is left over in the
    buckets is batched in order of length, so that few batches hold several buckets. "random" takes any together.

    Args:
      lengths: [n] of the sequences.
      size: sequences in a batch; the last may be smaller.
      batching: see above.
      seed: of the order.
    """
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(lengths))
    if batching == "random":
        return [order[start : start + size] for start in range(0, len(order), size)]
    bucket, full, left = np.digitize(lengths, np.arange(_SHORTEST, lengths.max() + 1, _WIDTH))[order], [], []
    for number in np.unique(bucket):
        members = order[bucket == number]
        whole = len(members) // size * size
        full += list(members[:whole].reshape(-1, size))
        left.append(members[whole:])
    rest = np.concatenate(left)
    groups = full + [rest[start : start + size] for start in range(0, len(rest), size)]
    return [groups[place] for place in draw.permutation(len(groups))]


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
    """All sequences in batches, masked by our own `mask_tokens`, so that peers have the same share of targets.

    Args:
      sequences: token ids.
      size, batching, seed: see `group`.
      weights, masking: see `mask_tokens`.
      length: no sequence is longer.
    """
    lengths = np.array([len(each) for each in sequences])
    real = (np.arange(length) < lengths[:, None]).astype(np.int32)
    ids = np.zeros(real.shape, np.int32)
    ids[real > 0] = np.concatenate(sequences)
    rows = Rows(ids, real, real, np.arange(len(ids), dtype=np.int32))  # masking reads no positions
    batch = jax.device_get(jax.jit(partial(mask_tokens, weights=weights, config=masking))(jax.random.key(seed), rows))
    padded = []
    for chosen in group(lengths, size, batching, seed=seed):
        longest = lengths[chosen].max()
        padded.append(Padded(*(array[chosen, :longest] for array in (batch.input_ids, real, batch.labels))))
    return padded
