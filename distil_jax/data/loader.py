"""Reads the rows that `distil-jax prepare` wrote: memory-mapped, and as an endless stream of batches.

The position in the data is one integer, the rows consumed so far over all processes: row `i` of the stream belongs to
epoch `i // N` and is row `order(seed, epoch)[i % N]` of the table. Nothing else needs saving, and the number of
processes does not change the order of the rows; nor does the batch size, unless a table groups rows by length. Needs
NumPy alone.
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

_JOIN_SECONDS = 2.0  # a reader that is not stuck ends after the item that it is reading
_EVALUATION_SEED = 2**32  # for the choice of held-out rows; larger than any run's seed
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
# The header of a .npy file as NumPy writes it: its length after the first ten bytes, the type, and one or two sizes.
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '([<|>]\w+)', 'fortran_order': False, "
    rb"'shape': \((\d{1,18}), ?(\d{0,18})\), \} *\n",
    re.DOTALL,
)


@dataclass(frozen=True, eq=False)
class RowTable:
    """The rows of one split, memory-mapped: [N, L] token ids and segment ids."""

    input_ids: np.ndarray
    segment_ids: np.ndarray
    pad_id: int = 0
    vocab_size: int = 2**32
    if_empty: ClassVar[str] = "There are no rows to train on: prepare the data again."

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def filling(self) -> dict[str, float]:
        """The values of an empty row, by field, where they are not 0."""
        return {"input_ids": self.pad_id}

    def order(self, seed: int, epoch: int, batch_rows: int) -> np.ndarray:
        """[N] the row indices of one epoch, in reading order."""
        return order(len(self), seed, epoch)

    def take(self, indices: np.ndarray, places: np.ndarray) -> Rows:
        """The rows at `places` of a global batch, given the row indices of all of it."""
        return self.gather(indices[places])

    def gather(self, indices: np.ndarray) -> Rows:
        """The rows at these indices, as NumPy int32 arrays.

        Raises:
          InputError: a token id outside the vocabulary.
        """
        ids_BxL = self.input_ids[indices]
        if (largest := int(ids_BxL.max(initial=0))) >= self.vocab_size:
            row = np.asarray(indices)[(ids_BxL >= self.vocab_size).any(axis=1)][0]
            raise InputError(
                f"Row {row} of input_ids.npy holds the token id {largest}, and the vocabulary has {self.vocab_size}: "
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
    """[B, L] segment ids -> [B, L] int32 positions: each segment counts from 0, padding is 0."""
    counting_L = np.arange(segment_ids.shape[1], dtype=np.int32)
    starts_BxL = np.zeros(segment_ids.shape, np.int32)
    changes_BxL = segment_ids[:, 1:] != segment_ids[:, :-1]
    np.multiply(changes_BxL, counting_L[1:], out=starts_BxL[:, 1:])
    np.maximum.accumulate(starts_BxL, axis=1, out=starts_BxL)
    return (counting_L - starts_BxL) * (segment_ids != 0)


def open_rows(folder: str | Path, split: Split = "train") -> RowTable:
    """The rows of one split; held-out rows may be none.

    Raises:
      InputError: as `read_manifest`, or an array of another shape or type than the manifest says.
    """
    manifest = read_manifest(folder)
    shape = (getattr(manifest, split).rows, manifest.sequence_length)
    arrays = [
        _array(user_path(folder) / split / f"{name}.npy", ("<u2", "<u4"), shape)
        for name in ("input_ids", "segment_ids")
    ]
    return RowTable(*arrays, pad_id=manifest.pad_id, vocab_size=manifest.vocab_size)


def token_counts(folder: str | Path, manifest: Manifest) -> np.ndarray:
    """[vocab_size] int64: how often each token occurs in the training rows.

    Raises:
      InputError: an array of another shape or type than the manifest says.
    """
    return _array(user_path(folder) / "token_counts.npy", ("<i8",), (manifest.vocab_size,))


def _array(path: Path, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
    """The array of a .npy file, memory-mapped.

    The header is matched by a pattern: NumPy's reader evaluates it as Python, and on damaged files raises anything.
    """
    again = "copy the folder again, or prepare the rows again"
    try:
        with path.open("rb") as file:
            header = _HEADER.match(file.read(1024))
            size = file.seek(0, io.SEEK_END)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): {again}.") from error
    if header is None or 10 + int.from_bytes(header[1], "little") != header.end():
        raise InputError(f"{path} is damaged (it does not begin as NumPy's files do): {again}.")
    dtype, stored = header[2].decode(), tuple(int(length) for length in header.groups()[2:] if length)
    if dtype not in dtypes or stored != shape:
        raise InputError(
            f"{path} holds {dtype} {list(stored)} where the manifest says {' or '.join(dtypes)} {list(shape)}: {again}."
        )
    if size != header.end() + math.prod(shape) * np.dtype(dtype).itemsize:
        raise InputError(f"{path} is damaged ({size:,} bytes are not those of {list(shape)} numbers): {again}.")
    # A plain array: memmap's own indexing is slower.
    return np.memmap(path, dtype, mode="r", offset=header.end(), shape=shape).view(np.ndarray)


@functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
def order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """[rows] the permutation of one epoch.

    Sorts raw 64-bit draws: NumPy promises the streams of its bit generators for ever, but not
    `Generator.permutation`, and a resumed run may meet a newer NumPy.
    """
    return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(rows), kind="stable")


class Table(Protocol[T_co]):
    """Anything that batches are cut from; the members are those of `RowTable`."""

    if_empty: ClassVar[str]

    @property
    def filling(self) -> dict[str, float]: ...

    def __len__(self) -> int: ...

    def order(self, seed: int, epoch: int, batch_rows: int) -> np.ndarray: ...

    def take(self, indices: np.ndarray, places: np.ndarray) -> T_co: ...


def indices_at(table: Table, start: int, batch_rows: int, *, seed: int) -> np.ndarray:
    """[batch_rows] row indices of the endless stream from `start` on, which may span several epochs."""
    epochs, places = np.divmod(start + np.arange(batch_rows), len(table))
    indices = np.empty(batch_rows, np.int64)
    for epoch in range(epochs[0], epochs[-1] + 1):
        inside = epochs == epoch
        indices[inside] = table.order(seed, epoch, batch_rows)[places[inside]]
    return indices


def batches(
    table: Table[T], *, batch_rows: int, seed: int, position: int = 0, places: np.ndarray | None = None
) -> Iterator[T]:
    """An endless stream of batches, from `position` on.

    Args:
      batch_rows: rows of a global batch.
      position: rows consumed so far, over all processes.
      places: which rows of each global batch this process reads, in order; None: all.

    Raises:
      InputError: the table is empty.
    """
    places = np.arange(batch_rows) if places is None else places
    if not len(table):
        raise InputError(table.if_empty)
    return (
        table.take(indices_at(table, start, batch_rows, seed=seed), places)
        for start in itertools.count(position, batch_rows)
    )


def evaluation_rows(rows: int, limit: int) -> np.ndarray:
    """[min(limit, rows)] indices of the held-out rows to evaluate on, ascending; a limit of 0 means all.

    They are drawn at random, because rows stand in the order of their sources: the first ones may all be of one kind.
    Every run draws the same rows, and a smaller limit draws a subset of those of a larger one.
    """
    if not 0 < limit < rows:
        return np.arange(rows)
    draws_N = np.random.Philox(key=[_EVALUATION_SEED, 0]).random_raw(rows)
    return np.flatnonzero(draws_N <= np.partition(draws_N, limit - 1)[limit - 1])[:limit]


def held_out_batches(
    table: Table[T], *, batch_rows: int, limit: int = 0, places: np.ndarray | None = None
) -> Iterator[T]:
    """The rows of `evaluation_rows`, once, the last batch filled up with empty rows. `places` as in `batches`."""
    places = np.arange(batch_rows) if places is None else places
    indices = evaluation_rows(len(table), limit)
    for start in range(0, len(indices), batch_rows):
        batch = indices[start : start + batch_rows]
        present = places < len(batch)
        empty = len(table) + places[~present] - len(batch)  # indices that no row has
        rows = table.take(batch, places[present])
        yield _fill(rows, np.concatenate([batch[places[present]], empty]), table.filling)


def _fill(rows: T, indices: np.ndarray, filling: dict[str, float]) -> T:
    """Adds empty rows (segment 0 throughout) until there are as many as `indices`, which become the row indices."""
    missing = len(indices) - len(rows.input_ids)

    filled = {}
    for field in dataclasses.fields(rows):
        array = getattr(rows, field.name)
        if array is not None:
            widths = [(0, missing)] + [(0, 0)] * (array.ndim - 1)
            filled[field.name] = np.pad(array, widths, constant_values=filling.get(field.name, 0))
    return rows.replace(**filled | {"row_index": indices.astype(np.int32)})


def prefetch(items: Iterable[T], depth: int = 2) -> Iterator[T]:
    """Reads `depth` items ahead in a background thread, and yields the same items.

    What the source raises is raised here, in its turn. Closing the generator ends the thread; a source that hangs is
    not waited for for long, neither here nor at the end of the process.
    """
    source = iter(items)
    ready: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
    room, closed = threading.Semaphore(depth), threading.Event()

    def read() -> None:
        while room.acquire() and not closed.is_set():
            try:
                ready.put((next(source), None))
            except BaseException as error:  # noqa: BLE001 (raised below, where the item would have been yielded)
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
            room.release()
            yield item
    finally:
        closed.set()
        room.release()
        reader.join(_JOIN_SECONDS)
