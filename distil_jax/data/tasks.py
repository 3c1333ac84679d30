"""A task's examples as tables of token ids: read once, tokenised once, and kept in memory."""

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
from distil_jax.data.task_table import TaskTable, padded
from distil_jax.data.tokenizer import check_fits, encodings, id_type, load_tokenizer
from distil_jax.schema import require
from distil_jax.structs import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHORTEST_ROW = 8  # tokens, three of which are special


@dataclass(frozen=True, eq=False)
class TaskData:
    """A task's tables and label names.

    Attributes:
      train, dev, test: tables of examples; of spans `SpanTable`s. `test` may be None.
      label_names: in the order of their numbers; none of a regression or of spans.
      digest: sha256 of what trains and chooses: a resumed run must meet the same.
      judged: sha256 of what is judged at the end, which may be exchanged.
      counts: of each split what was cut, lost or doubtful; see `summary.py`.
    """

    train: TaskTable
    dev: TaskTable
    test: TaskTable | None
    label_names: tuple[str, ...]
    digest: str
    judged: str
    counts: dict[str, Counter[str]]

    def with_labels(self, names: tuple[str, ...]) -> TaskData:
        """The same data with labels numbered in the order of `names`, which must be the same names."""
        if not names:
            return self
        places = np.array([names.index(name) for name in self.label_names], np.int32)

        def renumbered(table: TaskTable | None) -> TaskTable | None:
            if table is None:
                return None
            asked = table.labels != IGNORED
            return replace(table, labels=np.where(asked, places[np.where(asked, table.labels, 0)], IGNORED))

        tables = {name: renumbered(getattr(self, name)) for name in ("train", "dev", "test")}
        return replace(self, **tables, label_names=names)


def read_task(task: TaskConfig, tokenizer_folder: Path, *, vocab_size: int, max_length: int) -> TaskData:
    """Reads and tokenises all examples of a task.

    Args:
      task: its sources, fields and labels.
      tokenizer_folder: of the model.
      vocab_size: tokens that the model knows.
      max_length: tokens of a row: the least of `task.max_length` and the model's positions.

    Raises:
      InputError: as `read_splits`, no tokenizer in the folder, one with more tokens than the model has rows for, or
        rows too short for two texts.
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

    train, dev = replace(table("train", splits.train), by_length=task.group_by_length), table("dev", splits.dev)
    test = None if splits.test is None else table("test", splits.test)
    judged = (dev,) if test is None else (dev, test)
    return TaskData(train, dev, test, splits.label_names, _digest(train, dev), _digest(*judged), splits.counts)


def _digest(*tables: TaskTable) -> str:
    digest = hashlib.sha256()
    for table in tables:
        for array in (table.input_ids, table.lengths, table.second, table.labels):
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
    """Rows of one or two texts; of two, the longer is cut first, as in `transformers`. `counts` counts cut rows."""
    texts = [example.texts if len(example.texts) == 2 else example.texts[0] for example in examples]
    rows, second, dtype = [], [], id_type(tokenizer)
    for encoding in encodings(tokenizer, texts, max_length=max_length):
        counts["cut"] += bool(encoding.overflowing)
        types = np.array(encoding.type_ids)
        rows.append(np.array(encoding.ids, dtype))
        second.append(np.argmax(types) if types.any() else len(types))
    labels = np.array([example.label for example in examples], label_dtype)
    return _table(tokenizer, rows, max_length, second, labels)


def _words_table(
    tokenizer: PreTrainedTokenizerBase, examples: list[Example], max_length: int, counts: Counter[str]
) -> TaskTable:
    """Rows of words; the first token of a word has its label (Devlin et al., 2019, section 5.3).

    Words beyond `max_length` (`counts["words_cut"]`), and those of which the tokenizer leaves nothing
    (`counts["words_lost"]`), are not asked for.
    """
    rows, labels, dtype = [], [], id_type(tokenizer)
    encoded = encodings(tokenizer, [example.texts for example in examples], max_length=max_length, words=True)
    for example, encoding in zip(examples, encoded, strict=True):
        words = encoding.word_ids  # None at [CLS] and [SEP]
        kept, beyond = {*words} - {None}, {word for rest in encoding.overflowing for word in rest.word_ids} - {None}
        counts["cut"] += bool(beyond)
        counts["words_cut"] += len(beyond - kept)
        counts["words_lost"] += len(example.texts) - len(beyond | kept)
        begins = [word is not None and word != before for before, word in itertools.pairwise([None, *words])]
        rows.append(np.array(encoding.ids, dtype))
        asked = [example.label[word] if begin else IGNORED for word, begin in zip(words, begins, strict=True)]
        labels.append(np.array(asked, np.int32))
    return _table(tokenizer, rows, max_length, [len(row) for row in rows], padded(labels, max_length, IGNORED))


def _table(
    tokenizer: PreTrainedTokenizerBase,
    rows: list[np.ndarray],
    max_length: int,
    second: list[int],
    labels: np.ndarray,
) -> TaskTable:
    return TaskTable(
        input_ids=padded(rows, max_length, tokenizer.pad_token_id),
        lengths=np.array([len(row) for row in rows], np.int32),
        second=np.array(second, np.int32),
        labels=labels,
        pad_id=tokenizer.pad_token_id,
    )
