"""Reads the folder that `distil-jax prepare` wrote: a manifest, memory-mapped rows, and an endless stream of batches.

The position in the data is one integer, the rows consumed so far over all processes: row `i` of the stream belongs to
epoch `i // N` and is row `order(seed, epoch)[i % N]` of the table. Nothing else needs saving, and neither the number
of processes nor the batch size changes the order of the rows. Needs NumPy alone.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, TypeVar, get_args

import numpy as np

from distil_jax.schema import InputError, build
from distil_jax.structs import Rows

FORMAT = 1  # of the folder; a reader refuses any other
Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = get_args(Split)
T = TypeVar("T")


@dataclass(frozen=True)
class SplitCounts:
    rows: int
    sequences: int
    tokens: int  # real ones, [CLS] and [SEP] among them


@dataclass(frozen=True)
class StoredFile:
    path: str  # inside the folder, with forward slashes
    bytes: int
    header: int  # bytes at the start that the hash leaves out: a .npy header is written last
    sha256: str  # of the rest


@dataclass(frozen=True)
class Manifest:
    """What a folder of rows holds (`manifest.json`)."""

    format: int
    sequence_length: int
    vocab_size: int  # len(tokenizer)
    pad_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    unk_id: int
    special_ids: tuple[int, ...]  # all special tokens, those five among them
    unused_ids: tuple[int, ...]  # [unused0] and its like, which no text holds
    tokenizer_fingerprint: str
    train: SplitCounts
    held_out: SplitCounts
    files: tuple[StoredFile, ...]
    counts: dict  # documents, sequences, tokens, what was dropped and why
    settings: dict  # the PrepareConfig that made it


def read_manifest(folder: str | Path) -> Manifest:
    """The folder's manifest, checked against the files that lie there (names and sizes; `verify` checks contents).

    Raises:
      InputError: no such folder, a manifest that is missing, damaged or of another format, a file that is missing,
        of another size or outside the folder.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    again = "copy the folder again, or prepare the rows again"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Cannot read {path} ({error.strerror}): write rows with `distil-jax prepare`.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}): {again}.") from error
    version = values.get("format") if isinstance(values, dict) else None
    if version != FORMAT:
        raise InputError(f"{path} has format {version!r}, and this version reads {FORMAT}: prepare the rows again.")
    try:
        manifest = build(Manifest, values)
    except InputError as error:
        raise InputError(f"{path} is damaged ({error}): {again}.") from error
    _check_files(folder, manifest)
    return manifest


def _check_files(folder: Path, manifest: Manifest) -> None:
    needed = {f"{split}/{name}.npy" for split in SPLITS for name in ("input_ids", "segment_ids")} | {"token_counts.npy"}
    if lacking := sorted(needed - {file.path for file in manifest.files}):
        raise InputError(f"{folder}/manifest.json does not list {', '.join(lacking)}: prepare the rows again.")
    for file in manifest.files:
        name = PurePosixPath(file.path)
        if name.is_absolute() or ".." in name.parts or "\\" in file.path:
            raise InputError(f"{folder}/manifest.json names {file.path!r}, outside the folder: do not use this data.")
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            raise InputError(f"{folder / name} cannot be read ({error.strerror}): copy the folder again.") from error
        if size != file.bytes:
            raise InputError(
                f"{folder / name} has {size:,} bytes where the manifest says {file.bytes:,}: copy the folder again."
            )


def verify(folder: str | Path) -> Manifest:
    """Reads every file and compares its sha256 with the manifest's; returns the manifest.

    Raises:
      InputError: as `read_manifest`, or a file whose contents have changed.
    """
    manifest = read_manifest(folder)
    for file in manifest.files:
        path = Path(folder) / file.path
        with path.open("rb") as stream:
            stream.seek(file.header)
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != file.sha256:
            raise InputError(f"{path} has changed since it was written (its sha256 differs): copy the folder again.")
    return manifest


@dataclass(frozen=True, eq=False)
class RowTable:
    """The rows of one split, memory-mapped: [N, L] token ids and segment ids."""

    input_ids: np.ndarray
    segment_ids: np.ndarray
    pad_id: int = 0
    vocab_size: int = 2**32

    def __len__(self) -> int:
        return len(self.input_ids)

    def gather(self, indices: np.ndarray) -> Rows:
        """The rows with these numbers, as NumPy int32 arrays.

        Raises:
          InputError: an id that the vocabulary does not have.
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
    rows = getattr(manifest, split).rows
    arrays = []
    for name in ("input_ids", "segment_ids"):
        path = Path(folder) / split / f"{name}.npy"
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise InputError(f"{path} is damaged ({error}): copy the folder again.") from error
        if array.shape != (rows, manifest.sequence_length) or array.dtype not in (np.uint16, np.uint32):
            raise InputError(
                f"{path} holds {array.dtype} {list(array.shape)} where the manifest says "
                f"{[rows, manifest.sequence_length]}: copy the folder again."
            )
        arrays.append(array.view(np.ndarray))  # a plain array: memmap's own indexing is slower
    return RowTable(*arrays, pad_id=manifest.pad_id, vocab_size=manifest.vocab_size)


@functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
def order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """[rows] the permutation of one epoch.

    Sorts raw 64-bit draws: NumPy promises the streams of its bit generators for ever, but not
    `Generator.permutation`, and a resumed run may meet a newer NumPy.
    """
    return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(rows), kind="stable")


def numbers_at(rows: int, positions: np.ndarray, *, seed: int) -> np.ndarray:
    """Which of so many rows stand at these positions of the endless stream: rising, and maybe of several epochs."""
    epochs, places = np.divmod(positions, rows)
    numbers = np.empty(len(positions), np.int64)
    for epoch in range(epochs[0], epochs[-1] + 1):
        inside = epochs == epoch
        numbers[inside] = order(rows, seed, epoch)[places[inside]]
    return numbers


def rows_at(table: RowTable, positions: np.ndarray, *, seed: int) -> Rows:
    """The rows at these positions of the endless stream, see `numbers_at`."""
    return table.gather(numbers_at(len(table), positions, seed=seed))


def batches(
    table: RowTable, *, batch_rows: int, seed: int, position: int = 0, places: np.ndarray | None = None
) -> Iterator[Rows]:
    """Batches without end, from `position` on.

    Args:
      batch_rows: rows of a global batch.
      position: rows consumed so far, over all processes.
      places: which rows of each global batch this process reads, in order; None: all.

    Raises:
      InputError: no rows.
    """
    places = np.arange(batch_rows) if places is None else places
    if not len(table):
        raise InputError("There are no rows to train on: prepare the data again.")
    return (rows_at(table, start + places, seed=seed) for start in itertools.count(position, batch_rows))


def held_out_batches(
    table: RowTable, *, batch_rows: int, limit: int = 0, places: np.ndarray | None = None
) -> Iterator[Rows]:
    """The first `limit` rows (0: all) in order, once; empty rows fill the last batch up. `places` as in `batches`."""
    places = np.arange(batch_rows) if places is None else places
    rows = min(limit or len(table), len(table))
    for start in range(0, rows, batch_rows):
        numbers = start + places
        yield _fill(table.gather(numbers[numbers < rows]), numbers, table.pad_id)


def _fill(rows: Rows, numbers: np.ndarray, pad_id: int) -> Rows:
    """Adds empty rows (segment 0 throughout) until there are as many as `numbers`, which become the row indices."""
    missing = ((0, len(numbers) - len(rows.input_ids)), (0, 0))
    return Rows(
        input_ids=np.pad(rows.input_ids, missing, constant_values=pad_id),
        segment_ids=np.pad(rows.segment_ids, missing),
        position_ids=np.pad(rows.position_ids, missing),
        row_index=numbers.astype(np.int32),
    )


def prefetch(items: Iterable[T], depth: int = 2) -> Iterator[T]:
    """The same items, read ahead by one background thread.

    An exception of the source is raised here, in its turn. Closing the generator ends the thread.
    """
    source, end = iter(items), object()
    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
    try:
        ahead = deque(worker.submit(next, source, end) for _ in range(depth))
        while (item := ahead.popleft().result()) is not end:
            ahead.append(worker.submit(next, source, end))
            yield item
    finally:
        worker.shutdown(cancel_futures=True)
