"""Packs sequences into rows of one length, and writes the rows to disk, in bounded memory."""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from distil_jax.data.manifest import SplitCounts, StoredFile

OPEN_ROWS = 1024  # the number of rows to which sequences may still be added
FLUSH_ROWS = 1024  # rows written at a time

Ids = list[int]
Row = list[Ids]  # the sequences of one row


class Packer:
    """Best-fit packing: a sequence goes into the open row that then has the least free space.

    Open rows are grouped by their free space, and a bit set (one integer) says which groups are not empty. So the time
    to find a row does not depend on the number of open rows.
    """

    def __init__(self, length: int, smallest: int, open_rows: int = OPEN_ROWS):
        """Makes a packer without rows.

        Args:
          length: tokens of a row.
          smallest: tokens of the shortest sequence.
          open_rows: the most rows that are open at a time.
        """
        self._length, self._smallest, self._limit = length, smallest, open_rows
        self._rows: list[list[Row]] = [[] for _ in range(length + 1)]  # by free space
        self._spaces = 0  # bit i is set if there is an open row with i tokens of free space
        self._open = 0

    def add(self, sequence: Ids) -> list[Row]:
        """Adds a sequence to a row, and returns the rows that are now finished: one or none."""
        size = len(sequence)
        row, space = self._take(size) if self._spaces >> size else ([], self._length)
        row.append(sequence)
        space -= size
        if space < self._smallest:  # no other sequence fits
            return [row]
        self._rows[space].append(row)
        self._spaces |= 1 << space
        self._open += 1
        return [self._take(0)[0]] if self._open > self._limit else []

    def close(self) -> Iterator[Row]:
        """Yields the rows that are still open."""
        while self._open:
            yield self._take(0)[0]

    def _take(self, size: int) -> tuple[Row, int]:
        """Removes the fullest open row with at least `size` tokens of free space; returns it and that space."""
        fitting = self._spaces >> size
        space = size + (fitting & -fitting).bit_length() - 1  # the index of the lowest bit of `fitting`, plus `size`
        row = self._rows[space].pop()
        if not self._rows[space]:
            self._spaces ^= 1 << space
        self._open -= 1
        return row, space


class RowWriter:
    """Writes the rows of one split to `input_ids.npy` and `segment_ids.npy`, and counts tokens.

    Attributes:
      rows, sequences: how many have been written.
      tokens: tokens without padding; complete after `close`.
      token_counts: [vocab_size] int64, how often each token occurs; complete after `close`.
    """

    def __init__(self, folder: Path, length: int, vocab_size: int, pad_id: int):
        folder.mkdir()
        ids_dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")  # 16 bits would silently wrap larger ids
        self._files = (
            _ArrayFile(folder / "input_ids.npy", ids_dtype, length),
            _ArrayFile(folder / "segment_ids.npy", np.dtype("<u2"), length),
        )
        self._buffer: list[Row] = []
        self._length, self._pad_id = length, pad_id
        self.rows = self.sequences = self.tokens = 0
        self.token_counts = np.zeros(vocab_size, np.int64)

    def write(self, row: Row) -> None:
        self._buffer.append(row)
        self.rows += 1
        self.sequences += len(row)
        if len(self._buffer) == FLUSH_ROWS:
            self._flush()

    def close(self) -> list[StoredFile]:
        """Writes the buffered rows and the final headers, and returns the entries of the manifest."""
        self._flush()
        return [file.close() for file in self._files]

    def counts(self) -> SplitCounts:
        return SplitCounts(self.rows, self.sequences, self.tokens)

    def _flush(self) -> None:
        ids_NxL = np.full((len(self._buffer), self._length), self._pad_id, np.int64)
        segments_NxL = np.zeros_like(ids_NxL)
        for index, row in enumerate(self._buffer):
            lengths = [len(sequence) for sequence in row]
            tokens = sum(lengths)
            ids_NxL[index, :tokens] = list(itertools.chain.from_iterable(row))
            segments_NxL[index, :tokens] = np.repeat(np.arange(1, len(row) + 1), lengths)
            self.tokens += tokens
        self.token_counts += np.bincount(ids_NxL[segments_NxL > 0], minlength=len(self.token_counts))
        for file, rows_NxL in zip(self._files, (ids_NxL, segments_NxL), strict=True):
            file.append(rows_NxL)
        self._buffer = []


class _ArrayFile:
    """An [N, L] .npy file that grows. `close` writes its header again, which NumPy pads to the same size for any N."""

    def __init__(self, path: Path, dtype: np.dtype, length: int):
        self._path, self._dtype, self._length, self._rows = path, dtype, length, 0
        self._sha256 = hashlib.sha256()
        path.write_bytes(self._header())

    def append(self, rows_NxL: np.ndarray) -> None:
        data = rows_NxL.astype(self._dtype).tobytes()
        with self._path.open("ab") as file:
            file.write(data)
        self._sha256.update(data)
        self._rows += len(rows_NxL)

    def close(self) -> StoredFile:
        header = self._header()
        with self._path.open("r+b") as file:
            file.write(header)
        name = f"{self._path.parent.name}/{self._path.name}"
        return StoredFile(name, self._path.stat().st_size, len(header), self._sha256.hexdigest())

    def _header(self) -> bytes:
        stream = io.BytesIO()
        array = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._rows, self._length)}
        np.lib.format.write_array_header_1_0(stream, array)
        return stream.getvalue()
