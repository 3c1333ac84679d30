"""The tokenised examples of a task, in memory. Batches are cut to the length that their longest row needs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from distil_jax.data import loader
from distil_jax.structs import IGNORED, Batch

_SHORTEST = 16  # the least length of a batch; lengths are powers of two, so that XLA compiles few shapes
# How many batches of rows are sorted by length together. With fewer, the rows of a batch would differ more in
# length; with all of them, batches would be much the same in every epoch.
_WINDOW = 50


@dataclass(frozen=True, eq=False)
class TaskTable:
    """Rows `[CLS] a [SEP]` or `[CLS] a [SEP] b [SEP]`, one per example.

    Attributes:
      input_ids: [N, L] uint16 or uint32.
      lengths: [N] int32, tokens of each row.
      second_start: [N] int32, the position at which the second text begins, which has token type 1; the row's length if
        there is only one text.
      labels: class indices, [N] int32; for a regression, [N] float32; for tokens, [N, L] int32, `IGNORED` at positions
        without a label; for spans, [N, 2] int32, the first and the last position of the answer.
      pad_id: id of the padding token.
      by_length: whether to make batches of rows of similar length.
    """

    input_ids: np.ndarray
    lengths: np.ndarray
    second_start: np.ndarray
    labels: np.ndarray
    pad_id: int
    by_length: bool = field(default=False, kw_only=True)
    empty_message: ClassVar[str] = "There are no examples to train on: name others in task.train."

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def padding_values(self) -> dict[str, float]:
        """Field -> its value in a row of padding, for the fields where it is not 0."""
        return {"input_ids": self.pad_id, "labels": 0.0 if self.labels.dtype == np.float32 else IGNORED}

    def order(self, seed: int, epoch: int, batch_rows: int) -> np.ndarray:
        """[N] the row indices of one epoch, in reading order."""
        if self.by_length:
            return _order_by_length(self, seed, epoch, batch_rows)
        return loader.order(len(self), seed, epoch)

    def take(self, indices: np.ndarray, places: np.ndarray) -> Batch:
        """The rows of a global batch that one process reads. All processes cut theirs to the same length.

        Args:
          indices: the row indices of the global batch.
          places: which of them this process reads, as positions in `indices`.
        """
        return self.gather(indices[places], self.bucket(indices))

    def bucket(self, indices: np.ndarray) -> int:
        """The length of a batch of these rows: the least power of two, from 16 on, that fits all; at most L."""
        longest = int(self.lengths[indices].max(initial=_SHORTEST))
        return min(1 << (longest - 1).bit_length(), self.input_ids.shape[1])

    def gather(self, indices: np.ndarray, length: int | None = None) -> Batch:
        """The rows at these indices, as NumPy arrays: [B, length] int32, and labels in their own dtype.

        Args:
          indices: [B] row indices.
          length: positions to keep; None: all. Fewer than `bucket(indices)` may truncate rows.
        """
        length = self.input_ids.shape[1] if length is None else length
        columns_L = np.arange(length, dtype=np.int32)
        real_BxL = columns_L < self.lengths[indices, None]
        has_token_labels = self.labels.shape == self.input_ids.shape
        return Batch(
            input_ids=self.input_ids[indices, :length].astype(np.int32),
            segment_ids=real_BxL.astype(np.int32),
            position_ids=np.tile(columns_L, (len(indices), 1)),
            labels=self.labels[indices, :length] if has_token_labels else self.labels[indices],
            token_type_ids=(real_BxL & (columns_L >= self.second_start[indices, None])).astype(np.int32),
            row_index=np.asarray(indices, np.int32),
        )


@functools.lru_cache(maxsize=2)  # a batch may contain the end of one epoch and the start of the next
def _order_by_length(table: TaskTable, seed: int, epoch: int, batch_rows: int) -> np.ndarray:
    """A permutation of the row indices, [N], such that the rows of a batch are of similar length.

    The batches are in random order. Rows in a batch that has rows of another epoch too are not sorted.
    """
    indices = loader.order(len(table), seed, epoch)
    first = min(-epoch * len(table) % batch_rows, len(table))  # the rows before it complete the last epoch's last batch
    last = first + (len(table) - first) // batch_rows * batch_rows
    whole = indices[first:last]  # the rows of whole batches
    windows = np.split(whole, range(_WINDOW * batch_rows, len(whole), _WINDOW * batch_rows))
    by_length = np.concatenate([window[np.argsort(table.lengths[window], kind="stable")] for window in windows])
    shuffled = by_length.reshape(-1, batch_rows)[loader.order(len(whole) // batch_rows, seed, epoch)]
    return np.concatenate([indices[:first], shuffled.ravel(), indices[last:]])


def pad_rows(rows: Sequence[np.ndarray], length: int, value: int) -> np.ndarray:
    """One array of rows, [N, length], padded with `value`, in the dtype of the first row."""
    table = np.full((len(rows), length), value, rows[0].dtype)
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    return table
