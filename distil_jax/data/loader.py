"""Memory-maps the rows that `distil-jax prepare` wrote, and yields them as an endless stream of batches.

The position in the data is one integer: how many rows all processes together have consumed. Row `i` of the stream is in
epoch `i // N`, and is row `order(N, seed, epoch)[i % N]` of the table. Nothing else has to be saved for a resumed run.
The order of the rows does not depend on the number of processes, and it depends on the batch size only for tables that
group rows by length. This module needs only NumPy.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import math
import queue
import re
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar

import numpy as np

from distil_jax.data.manifest import Manifest, Split, read_manifest
from distil_jax.schema import InputError, user_path
from distil_jax.structs import Rows

_JOIN_SECONDS = 2.0  # how long to wait for the reading thread, which ends after its current item unless it is stuck
_EVALUATION_SEED = 2**32  # draws the held-out rows to evaluate on; larger than any run's seed
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
# The header of a .npy file as NumPy writes it. Groups: the length of what follows its first ten bytes, the dtype, and
# the lengths of one or two axes.
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '([<|>]\w+)', 'fortran_order': False, "
    rb"'shape': \((\d{1,18}), ?(\d{0,18})\), \} *\n",
    re.DOTALL,
)


@dataclass(frozen=True, eq=False)
class RowTable:
    """The rows of one split, memory-mapped.

    Attributes:
      input_ids: [N, L] uint16 or uint32.
      segment_ids: [N, L] uint16; 0 is padding.
      pad_id: id of the padding token.
      vocab_size: all ids are below it.
      empty_message: the error message if there are no rows.
    """

    input_ids: np.ndarray
    segment_ids: np.ndarray
    pad_id: int = 0
    vocab_size: int = 2**32
    empty_message: ClassVar[str] = "There are no rows to train on: prepare the data again."

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def padding_values(self) -> dict[str, float]:
        """Field -> its value in a row of padding, for the fields where it is not 0."""
        return {"input_ids": self.pad_id}

    def order(self, seed: int, epoch: int, batch_rows: int) -> np.ndarray:
        """[N] the row indices of one epoch, in reading order."""
        return order(len(self), seed, epoch)

    def take(self, indices: np.ndarray, places: np.ndarray) -> Rows:
        """The rows of a global batch that one process reads.

        Args:
          indices: the row indices of the global batch.
          places: which of them this process reads, as positions in `indices`.
        """
        return self.gather(indices[places])

    def gather(self, indices: np.ndarray) -> Rows:
        """The rows at these indices, as NumPy int32 arrays.

        Raises:
          InputError: a token id outside the vocabulary.
        """
        ids_BxL = self.input_ids[indices]
        largest = int(ids_BxL.max(initial=0))
        if largest >= self.vocab_size:
            row = np.asarray(indices)[(ids_BxL >= self.vocab_size).any(axis=1)][0]
            raise InputError(
                f"Row {row} of input_ids.npy has the token id {largest}, but the vocabulary has {self.vocab_size}: "
                "the rows are damaged; copy their folder again, or prepare them again."
            )
        segments_BxL = self.segment_ids[indices].astype(np.int32)
        return Rows(
            input_ids=ids_BxL.astype(np.int32),
            segment_ids=segments_BxL,
            position_ids=positions(segments_BxL),
            row_index=np.asarray(indices, np.int32),
        )


def positions(segment_ids: np.ndarray) -> np.ndarray:
    """Position ids, [B, L] int32, for these segment ids: they count from 0 in each segment and are 0 at padding."""
    counting_L = np.arange(segment_ids.shape[1], dtype=np.int32)
    starts_BxL = np.zeros(segment_ids.shape, np.int32)
    changes_BxL = segment_ids[:, 1:] != segment_ids[:, :-1]
    np.multiply(changes_BxL, counting_L[1:], out=starts_BxL[:, 1:])
    np.maximum.accumulate(starts_BxL, axis=1, out=starts_BxL)
    return (counting_L - starts_BxL) * (segment_ids != 0)


def open_rows(folder: str | Path, split: Split = "train") -> RowTable:
    """Memory-maps the rows of one split. There may be no held-out rows.

    Raises:
      InputError: as `read_manifest`, or an array is damaged or has another shape or dtype than in the manifest.
    """
    manifest = read_manifest(folder)
    shape = (getattr(manifest, split).rows, manifest.sequence_length)
    arrays = [
        _array(user_path(folder) / split / f"{name}.npy", ("<u2", "<u4"), shape)
        for name in ("input_ids", "segment_ids")
    ]
    return RowTable(*arrays, pad_id=manifest.pad_id, vocab_size=manifest.vocab_size)


def token_counts(folder: str | Path, manifest: Manifest) -> np.ndarray:
    """How often each token occurs in the training rows, [vocab_size] int64.

    Raises:
      InputError: the array is damaged or has another shape or dtype than in the manifest.
    """
    return _array(user_path(folder) / "token_counts.npy", ("<i8",), (manifest.vocab_size,))


def _array(path: Path, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Memory-maps the array of a .npy file, which must have one of these dtypes and this shape.

    The header is matched by a regular expression, because NumPy's reader parses it as Python code, which on damaged
    files may raise any exception.
    """
    again = "copy the folder again, or prepare the rows again"
    try:
        with path.open("rb") as file:
            header = _HEADER.match(file.read(1024))
            size = file.seek(0, io.SEEK_END)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): {again}.") from error
    if header is None or 10 + int.from_bytes(header[1], "little") != header.end():
        raise InputError(f"{path} is damaged (it does not start with the header of a NumPy file): {again}.")
    dtype, stored_shape = header[2].decode(), tuple(int(length) for length in header.groups()[2:] if length)
    if dtype not in dtypes or stored_shape != shape:
        raise InputError(
            f"{path} holds {dtype} {list(stored_shape)} where the manifest says {' or '.join(dtypes)} {list(shape)}: "
            f"{again}."
        )
    if size != header.end() + math.prod(shape) * np.dtype(dtype).itemsize:
        raise InputError(f"{path} is damaged ({size:,} bytes do not fit the shape {list(shape)}): {again}.")
    # As a plain array, because indexing is slower on a memmap.
    return np.memmap(path, dtype, mode="r", offset=header.end(), shape=shape).view(np.ndarray)


@functools.lru_cache(maxsize=2)  # a batch may contain the end of one epoch and the start of the next
def order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """A random permutation of the row indices for one epoch, [rows] int64.

    It sorts the raw 64-bit output of a bit generator. NumPy guarantees that this output never changes, unlike that of
    `Generator.permutation`, and a resumed run may use a newer NumPy.
    """
    return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(rows), kind="stable")


class Table(Protocol[T_co]):
    """A table of rows from which batches are read. `RowTable` documents the members."""

    empty_message: ClassVar[str]

    @property
    def padding_values(self) -> dict[str, float]: ...

    def __len__(self) -> int: ...

    def order(self, seed: int, epoch: int, batch_rows: int) -> np.ndarray: ...

    def take(self, indices: np.ndarray, places: np.ndarray) -> T_co: ...


def indices_at(table: Table, start: int, batch_rows: int, *, seed: int) -> np.ndarray:
    """The row indices of the `batch_rows` rows of the stream from position `start` on. They may span several epochs."""
    epochs, offsets = np.divmod(start + np.arange(batch_rows), len(table))
    indices = np.empty(batch_rows, np.int64)
    for epoch in range(epochs[0], epochs[-1] + 1):
        inside = epochs == epoch
        indices[inside] = table.order(seed, epoch, batch_rows)[offsets[inside]]
    return indices


def batches(
    table: Table[T], *, batch_rows: int, seed: int, position: int = 0, places: np.ndarray | None = None
) -> Iterator[T]:
    """An endless stream of batches.

    Args:
      table: the rows.
      batch_rows: rows of a global batch.
      seed: of the order of the rows.
      position: rows that all processes together have consumed so far.
      places: which rows of each global batch this process reads, in this order; None: all.

    Raises:
      InputError: the table is empty.
    """
    places = np.arange(batch_rows) if places is None else places
    if not len(table):
        raise InputError(table.empty_message)
    return (
        table.take(indices_at(table, start, batch_rows, seed=seed), places)
        for start in itertools.count(position, batch_rows)
    )


def evaluation_rows(rows: int, limit: int) -> np.ndarray:
    """Indices of the held-out rows to evaluate on, [min(limit, rows)], ascending. A limit of 0 means all rows.

    They are drawn at random, because the rows are in the order of their sources, and the first ones may all be from one
    source. Every run draws the same rows, and a smaller limit draws a subset of those of a larger one.
    """
    if not 0 < limit < rows:
        return np.arange(rows)
    draws_N = np.random.Philox(key=[_EVALUATION_SEED, 0]).random_raw(rows)
    return np.flatnonzero(draws_N <= np.partition(draws_N, limit - 1)[limit - 1])[:limit]


def held_out_batches(
    table: Table[T], *, batch_rows: int, limit: int = 0, places: np.ndarray | None = None
) -> Iterator[T]:
    """Batches of the rows of `evaluation_rows`, each row once. The last batch is padded with empty rows.

    Args:
      table: the rows.
      batch_rows: rows of a global batch.
      limit: how many rows to evaluate on; 0: all.
      places: as in `batches`.
    """
    places = np.arange(batch_rows) if places is None else places
    indices = evaluation_rows(len(table), limit)
    for start in range(0, len(indices), batch_rows):
        batch = indices[start : start + batch_rows]
        present = places < len(batch)
        # Empty rows have indices that no row of the table has.
        padding = len(table) + places[~present] - len(batch)
        rows = table.take(batch, places[present])
        yield _pad(rows, np.concatenate([batch[places[present]], padding]), table.padding_values)


def _pad(rows: T, indices: np.ndarray, padding_values: dict[str, float]) -> T:
    """Appends empty rows (segment 0 throughout) until there is one for each of `indices`, and sets `row_index`."""
    missing = len(indices) - len(rows.input_ids)
    padded = {}
    for field in dataclasses.fields(rows):
        array = getattr(rows, field.name)
        if array is not None:
            widths = [(0, missing)] + [(0, 0)] * (array.ndim - 1)
            padded[field.name] = np.pad(array, widths, constant_values=padding_values.get(field.name, 0))
    return rows.replace(**padded | {"row_index": indices.astype(np.int32)})


def prefetch(items: Iterable[T], depth: int = 2) -> Iterator[T]:
    """Yields the same items, read `depth` items ahead by a background thread.

    An exception of the source is raised here, after the items before it. Closing the generator ends the thread. If the
    source hangs, closing takes two seconds, and the process can still exit.
    """
    source = iter(items)
    ready: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
    free_slots, closed = threading.Semaphore(depth), threading.Event()

    def read() -> None:
        while free_slots.acquire() and not closed.is_set():
            try:
                ready.put((next(source), None))
            except BaseException as error:  # noqa: BLE001 (raised below, in place of the item)
                ready.put((None, error))

    reader = threading.Thread(target=read, name="prefetch", daemon=True)
    reader.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            free_slots.release()
            yield item
    finally:
        closed.set()
        free_slots.release()
        reader.join(_JOIN_SECONDS)
