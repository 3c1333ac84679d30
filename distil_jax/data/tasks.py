"""Reads and tokenises the examples of a task, into tables of token ids in memory."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distil_jax.config.task import TaskConfig
from distil_jax.data.examples import Example, read_splits
from distil_jax.data.spans import span_table
from distil_jax.data.task_table import TaskTable, pad_rows
from distil_jax.data.tokenizer import check_fits, encode_texts, id_type, load_tokenizer
from distil_jax.schema import require
from distil_jax.structs import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHORTEST_ROW = 8  # the least tokens of a row; up to three of them are special


@dataclass(frozen=True, eq=False)
class TaskData:
    """The tokenised examples of a task.

    Attributes:
      train, dev, test: tables of examples, for spans `SpanTable`s. `test` may be None.
      label_names: in the order of the class indices; empty for a regression and for spans.
      digest: sha256 of train and dev, which a resumed run must find unchanged.
      eval_digest: sha256 of dev and test, on which the final model is evaluated. `test` may change on resume.
      counts: for each split, what was truncated, lost or may be a mistake; see `summary.py`.
    """

    train: TaskTable
    dev: TaskTable
    test: TaskTable | None
    label_names: tuple[str, ...]
    digest: str
    eval_digest: str
    counts: dict[str, Counter[str]]

    def with_labels(self, names: tuple[str, ...]) -> TaskData:
        """The same data with class indices in the order of `names`, a permutation of `label_names`."""
        if not names:
            return self
        new_indices = np.array([names.index(name) for name in self.label_names], np.int32)

        def reindexed(table: TaskTable | None) -> TaskTable | None:
            if table is None:
                return None
            labelled = table.labels != IGNORED
            labels = np.where(labelled, new_indices[np.where(labelled, table.labels, 0)], IGNORED)
            return replace(table, labels=labels)

        tables = {split: reindexed(getattr(self, split)) for split in ("train", "dev", "test")}
        return replace(self, **tables, label_names=names)


def read_task(task: TaskConfig, tokenizer_folder: Path, *, vocab_size: int, max_length: int) -> TaskData:
    """Reads and tokenises all examples of a task.

    Args:
      task: its sources, fields and labels.
      tokenizer_folder: the folder with the model's tokenizer.
      vocab_size: rows of the model's embedding, without padding.
      max_length: tokens of a row: `task.max_length`, or the model's positions if they are fewer.

    Raises:
      InputError: as `read_splits`, or the folder has no tokenizer, the tokenizer has more tokens than the model, or
        rows are too short for two texts.
    """
    require(max_length >= _SHORTEST_ROW, f"A row of {max_length} tokens is too short for a task: choose another model.")
    tokenizer = load_tokenizer(tokenizer_folder)
    check_fits(tokenizer, tokenizer_folder, vocab_size)
    splits = read_splits(task)

    def table(split: str, examples: list[Example]) -> TaskTable:
        counts = splits.counts[split]
        if task.kind == "spans":
            return span_table(tokenizer, examples, max_length=max_length, stride=task.stride, counts=counts)
        if task.kind == "tokens":
            return _words_table(tokenizer, examples, max_length, counts)
        dtype = np.float32 if task.kind == "regression" else np.int32
        return _texts_table(tokenizer, examples, max_length, dtype, counts)

    train = replace(table("train", splits.train), by_length=task.group_by_length)
    dev = table("dev", splits.dev)
    test = None if splits.test is None else table("test", splits.test)
    eval_digest = _digest(dev) if test is None else _digest(dev, test)
    return TaskData(train, dev, test, splits.label_names, _digest(train, dev), eval_digest, splits.counts)


def _digest(*tables: TaskTable) -> str:
    digest = hashlib.sha256()
    for table in tables:
        for array in (table.input_ids, table.lengths, table.second_start, table.labels):
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def _texts_table(
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    max_length: int,
    label_dtype: type,
    counts: Counter[str],
) -> TaskTable:
    """Makes rows of one or two texts. The longer one of two is truncated first, as in `transformers`.

    `counts["cut"]` is incremented for every truncated row.
    """
    texts = [example.texts if len(example.texts) == 2 else example.texts[0] for example in examples]
    rows, second_starts, dtype = [], [], id_type(tokenizer)
    for encoding in encode_texts(tokenizer, texts, max_length=max_length):
        counts["cut"] += bool(encoding.overflowing)
        types = np.array(encoding.type_ids)
        rows.append(np.array(encoding.ids, dtype))
        second_starts.append(np.argmax(types) if types.any() else len(types))
    labels = np.array([example.label for example in examples], label_dtype)
    return _table(tokenizer, rows, max_length, second_starts, labels)


def _words_table(
    tokenizer: PreTrainedTokenizerBase, examples: list[Example], max_length: int, counts: Counter[str]
) -> TaskTable:
    """Makes rows of words. The first token of a word has its label (Devlin et al., 2019, section 5.3).

    Words have no label in the table if they are beyond `max_length` (`counts["words_cut"]`), or if the tokenizer gives
    them no token (`counts["words_lost"]`). `counts["cut"]` is incremented for every truncated row.
    """
    rows, labels, dtype = [], [], id_type(tokenizer)
    encodings = encode_texts(tokenizer, [example.texts for example in examples], max_length=max_length, words=True)
    for example, encoding in zip(examples, encodings, strict=True):
        words = encoding.word_ids  # the word of each token; None at [CLS] and [SEP]
        kept = {*words} - {None}
        cut = {word for rest in encoding.overflowing for word in rest.word_ids} - {None}
        counts["cut"] += bool(cut)
        counts["words_cut"] += len(cut - kept)
        counts["words_lost"] += len(example.texts) - len(cut | kept)
        rows.append(np.array(encoding.ids, dtype))
        row_labels = [
            IGNORED if word is None or word == previous else example.label[word]
            for previous, word in itertools.pairwise([None, *words])
        ]
        labels.append(np.array(row_labels, np.int32))
    return _table(tokenizer, rows, max_length, [len(row) for row in rows], pad_rows(labels, max_length, IGNORED))


def _table(
    tokenizer: PreTrainedTokenizerBase,
    rows: list[np.ndarray],
    max_length: int,
    second_starts: list[int],
    labels: np.ndarray,
) -> TaskTable:
    return TaskTable(
        input_ids=pad_rows(rows, max_length, tokenizer.pad_token_id),
        lengths=np.array([len(row) for row in rows], np.int32),
        second_start=np.array(second_starts, np.int32),
        labels=labels,
        pad_id=tokenizer.pad_token_id,
    )
