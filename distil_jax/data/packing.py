"""Sequences into rows of one length, and rows onto disk, in bounded memory."""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from distil_jax.data.manifest import SplitCounts, StoredFile

OPEN_ROWS = 1024  # rows that a sequence may still join
FLUSH_ROWS = 1024  # rows written at a time

Ids = list[int]
Row = list[Ids]  # sequences that share a row


class Packer:
    """Best-fit packing: a sequence joins the open row in which it leaves the least space.

    Rows are filed under their free space, and the bits of one integer say which spaces occur: finding a row takes the
    same time however many are open.
    """

    def __init__(self, length: int, smallest: int, open_rows: int = OPEN_ROWS):
        self._length, self._smallest, self._limit = length, smallest, open_rows
        self._rows: list[list[Row]] = [[] for _ in range(length + 1)]
        self._spaces = 0
        self._open = 0

    def add(self, sequence: Ids) -> list[Row]:
        """Places a sequence; returns the rows that this finishes, one or none."""
        size = len(sequence)
        row, space = self._take(size) if self._spaces >> size else ([], self._length)
        row.append(sequence)
        space -= size
        if space < self._smallest:  # no sequence is so short
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
        """The fullest open row with at least `size` tokens of space, and its space."""
        fitting = self._spaces >> size
        space = size + (fitting & -fitting).bit_length() - 1
        row = self._rows[space].pop()
        if not self._rows[space]:
            self._spaces ^= 1 << space
        self._open -= 1
        return row, space


class RowWriter:
    """Writes the rows of one split and counts."""

    def __init__(self, folder: Path, length: int, vocab_size: int, pad_id: int):
        folder.mkdir()
        ids = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")  # 16 bits would corrupt larger ids silently
        self._columns = (
            _Column(folder / "input_ids.npy", ids, length),
            _Column(folder / "segment_ids.npy", np.dtype("<u2"), length),
        )
        self._waiting: list[Row] = []
        self._length, self._pad_id = length, pad_id
        self.rows = self.sequences = self.tokens = 0
        self.token_counts = np.zeros(vocab_size, np.int64)

    def write(self, row: Row) -> None:
        self._waiting.append(row)
        self.rows += 1
        self.sequences += len(row)
        if len(self._waiting) == FLUSH_ROWS:
            self._flush()

    def close(self) -> list[StoredFile]:
        """Writes the buffered rows and the final headers."""
        self._flush()
        return [column.close() for column in self._columns]

    def counts(self) -> SplitCounts:
        return SplitCounts(self.rows, self.sequences, self.tokens)

    def _flush(self) -> None:
        ids_NxL = np.full((len(self._waiting), self._length), self._pad_id, np.int64)
        segments_NxL = np.zeros_like(ids_NxL)
        for number, row in enumerate(self._waiting):
            lengths = [len(sequence) for sequence in row]
            filled = sum(lengths)
            ids_NxL[number, :filled] = list(itertools.chain.from_iterable(row))
            segments_NxL[number, :filled] = np.repeat(np.arange(1, len(row) + 1), lengths)
            self.tokens += filled
        self.token_counts += np.bincount(ids_NxL[segments_NxL > 0], minlength=len(self.token_counts))
        for column, rows_NxL in zip(self._columns, (ids_NxL, segments_NxL), strict=True):
            column.append(rows_NxL)
        self._waiting = []


class _Column:
    """An [N, L] .npy file that grows: NumPy pads headers so that any N fits, and it is written again at the end."""

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
