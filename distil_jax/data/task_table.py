"""The tokenised examples of a task in memory; batches are only as wide as their longest row needs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from distil_jax.data import loader
from distil_jax.structs import IGNORED, Batch

_SHORTEST = 16  # columns of a batch; powers of two from here on are few shapes for XLA to compile
_WINDOW = 50  # batches that are sorted together: of few the lengths would mix, and all would be alike in every epoch


@dataclass(frozen=True, eq=False)
class TaskTable:
    """One row an example: `[CLS] a [SEP]` or `[CLS] a [SEP] b [SEP]`.

    Attributes:
      input_ids: [N, L] uint16 or uint32.
      lengths: [N] int32, tokens of each row.
      second: [N] int32, where the second text begins, which is token type 1; the length where there is one text.
      labels: [N] int32; of a regression [N] float32; of tokens [N, L] int32, `IGNORED` where nothing is asked; of spans
        [N, 2] int32, where the answer begins and ends.
      pad_id: of the tokenizer.
      by_length: whether the rows of a batch are of similar length.
    """

    input_ids: np.ndarray
    lengths: np.ndarray
    second: np.ndarray
    labels: np.ndarray
    pad_id: int
    by_length: bool = field(default=False, kw_only=True)
    if_empty: ClassVar[str] = "There are no examples to train on: name others in task.train."

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def filling(self) -> dict[str, float]:
        """The values of an empty row, by field, where they are not 0: the label."""
        return {"input_ids": self.pad_id, "labels": 0.0 if self.labels.dtype == np.float32 else IGNORED}

    def order(self, seed: int, epoch: int, batch_rows: int) -> np.ndarray:
        """[N] the row indices of one epoch, in reading order."""
        return _similar(self, seed, epoch, batch_rows) if self.by_length else loader.order(len(self), seed, epoch)

    def take(self, indices: np.ndarray, places: np.ndarray) -> Batch:
        """The rows at `places` of a global batch; all processes cut them to the same length."""
        return self.gather(indices[places], self.bucket(indices))

    def bucket(self, indices: np.ndarray) -> int:
        """The smallest power of two, from 16 to at most L, that holds the longest of these rows."""
        longest = int(self.lengths[indices].max(initial=_SHORTEST))
        return min(1 << (longest - 1).bit_length(), self.input_ids.shape[1])

    def gather(self, indices: np.ndarray, length: int | None = None) -> Batch:
        """The rows at these indices, as NumPy arrays: [B, L] int32, and labels as they are.

        Args:
          indices: [B] row indices.
          length: columns to keep; None: all. Less than `bucket` cuts tokens off.
        """
        length = self.input_ids.shape[1] if length is None else length
        columns_L = np.arange(length, dtype=np.int32)
        real_BxL = columns_L < self.lengths[indices, None]
        a_token = self.labels.shape == self.input_ids.shape
        return Batch(
            input_ids=self.input_ids[indices, :length].astype(np.int32),
            segment_ids=real_BxL.astype(np.int32),
            position_ids=np.tile(columns_L, (len(indices), 1)),
            labels=self.labels[indices, :length] if a_token else self.labels[indices],
            token_type_ids=(real_BxL & (columns_L >= self.second[indices, None])).astype(np.int32),
            row_index=np.asarray(indices, np.int32),
        )


@functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
def _similar(table: TaskTable, seed: int, epoch: int, batch_rows: int) -> np.ndarray:
    """[N] a permutation whose batches hold rows of similar length, in random order.

    The rows that share a batch with those of another epoch are left as they fall.
    """
    indices = loader.order(len(table), seed, epoch)
    first = min(-epoch * len(table) % batch_rows, len(table))  # they complete the batch that the last epoch began
    last = first + (len(table) - first) // batch_rows * batch_rows
    whole = indices[first:last]
    windows = np.split(whole, range(_WINDOW * batch_rows, len(whole), _WINDOW * batch_rows))
    sorted_ = np.concatenate([window[np.argsort(table.lengths[window], kind="stable")] for window in windows])
    shuffled = sorted_.reshape(-1, batch_rows)[loader.order(len(whole) // batch_rows, seed, epoch)]
    return np.concatenate([indices[:first], shuffled.ravel(), indices[last:]])


def padded(rows: Sequence[np.ndarray], length: int, fill: int) -> np.ndarray:
    """[N, length] rows, filled up with `fill`, in the dtype of the first."""
    table = np.full((len(rows), length), fill, rows[0].dtype)
    for place, row in enumerate(rows):
        table[place, : len(row)] = row
    return table
