"""The tokenised examples of a task in memory, and their batches: no wider than the longest row asks for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from distil_jax.data.loader import numbers_at
from distil_jax.schema import require
from distil_jax.structs import IGNORED, Batch

_SHORTEST = 16  # columns of a batch; powers of two from here on are few shapes for XLA to compile


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
    """

    input_ids: np.ndarray
    lengths: np.ndarray
    second: np.ndarray
    labels: np.ndarray
    pad_id: int

    def __len__(self) -> int:
        return len(self.input_ids)

    def bucket(self, indices: np.ndarray) -> int:
        """The smallest power of two, from 16 to at most L, that holds the longest of these rows."""
        longest = int(self.lengths[indices].max(initial=_SHORTEST))
        return min(1 << (longest - 1).bit_length(), self.input_ids.shape[1])

    def gather(self, indices: np.ndarray, length: int | None = None) -> Batch:
        """The rows with these numbers, as NumPy arrays: [B, L] int32, and labels as they are.

        Args:
          indices: [B] row numbers.
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


def padded(rows: Sequence[np.ndarray], length: int, fill: int) -> np.ndarray:
    """[N, length] of the first one's type: rows of at most that many numbers, filled up."""
    table = np.full((len(rows), length), fill, rows[0].dtype)
    for place, row in enumerate(rows):
        table[place, : len(row)] = row
    return table


def task_batches(
    table: TaskTable, *, batch_rows: int, seed: int, position: int = 0, places: np.ndarray | None = None
) -> Iterator[Batch]:
    """Batches without end, in the order of `loader.batches`.

    All processes cut a global batch to the same length, that of its longest row.

    Args:
      batch_rows: rows of a global batch.
      position: rows consumed so far, over all processes.
      places: which rows of each global batch this process reads, in order; None: all.

    Raises:
      InputError: no rows.
    """
    require(len(table) > 0, "There are no examples to train on: name others in task.train.")
    everywhere = np.arange(batch_rows)
    places = everywhere if places is None else places

    def batch(start: int) -> Batch:
        numbers = numbers_at(len(table), start + everywhere, seed=seed)
        return table.gather(numbers[places], table.bucket(numbers))

    return (batch(start) for start in itertools.count(position, batch_rows))


def task_eval_batches(
    table: TaskTable, *, batch_rows: int, limit: int = 0, places: np.ndarray | None = None
) -> Iterator[Batch]:
    """The first `limit` rows (0: all) in order, once; empty rows fill the last batch up. `places` as in `task_batches`.

    An empty row is padding throughout, with labels of `IGNORED`, or of 0.0 in a regression.
    """
    places = np.arange(batch_rows) if places is None else places
    rows = min(limit or len(table), len(table))
    for start in range(0, rows, batch_rows):
        length = table.bucket(np.arange(start, min(start + batch_rows, rows)))
        numbers = start + places
        yield _fill(table.gather(numbers[numbers < rows], length), numbers, table.pad_id)


def _fill(batch: Batch, numbers: np.ndarray, pad_id: int) -> Batch:
    """Adds empty rows until there are as many as `numbers`, which become the row indices."""
    missing = len(numbers) - len(batch.input_ids)

    def longer(array: np.ndarray, value: float) -> np.ndarray:
        return np.pad(array, ((0, missing), *((0, 0),) * (array.ndim - 1)), constant_values=value)

    return Batch(
        input_ids=longer(batch.input_ids, pad_id),
        segment_ids=longer(batch.segment_ids, 0),
        position_ids=longer(batch.position_ids, 0),
        labels=longer(batch.labels, 0.0 if batch.labels.dtype == np.float32 else IGNORED),
        token_type_ids=longer(batch.token_type_ids, 0),
        row_index=numbers.astype(np.int32),
    )
