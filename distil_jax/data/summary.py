"""Summarises a task's examples: their classes, and what was truncated, lost or may be a mistake."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from distil_jax.data.spans import SpanTable
from distil_jax.data.task_table import TaskTable
from distil_jax.data.tasks import TaskData
from distil_jax.structs import IGNORED

_MOST_CLASSES = 20  # how many classes to list by name
# Each follows a number of examples, unless it says otherwise.
_PROBLEMS = {
    "cut": "truncated to the longest row (task.max_length)",
    "words_cut": "words cut off with their labels",
    "words_lost": "words that the tokenizer gives no token",
    "questions_cut": "questions truncated to half of a row",
    "answers_lost": "answers that no row contains as a whole",
    "empty_texts": "with an empty text",
    "repeated": "with the same text as an earlier one",
    "contradicted": "with the same text as an earlier one, but another label",
    "in_train": "with the same text as a training example",
    "unnamed_fields": "with a value in a column that has no name",
}


def summarize(data: TaskData, splits: Collection[str] = ("train", "dev", "test")) -> str:
    """The classes and the problems of the given splits, one line for each that exists."""
    lines = []
    for split, table in (("train", data.train), ("dev", data.dev), ("test", data.test)):
        if table is not None and split in splits:
            problems = data_problems(data.counts.get(split, {}))
            lines.append("; ".join([f"{split}: {_labels(table, data.label_names)}", *problems]))
    return "\n".join(lines)


def data_problems(counts: Mapping[str, int]) -> list[str]:
    """What was truncated, lost or may be a mistake in a split, each with its count."""
    return [f"{counts[name]:,} {text}" for name, text in _PROBLEMS.items() if counts.get(name)]


def _labels(table: TaskTable, names: tuple[str, ...]) -> str:
    """Describes the labels of a table: the size of each class, or the range of the numbers."""
    if isinstance(table, SpanTable):
        return f"{len(table.contexts):,} questions in {len(table):,} rows"
    if table.labels.dtype == np.float32:
        least, mean, most = table.labels.min(), table.labels.mean(dtype=np.float64), table.labels.max()
        return f"{len(table):,} numbers from {least:g} to {most:g}, {mean:.4g} on average"
    counts = np.bincount(table.labels[table.labels != IGNORED], minlength=len(names))
    largest = sorted(np.argsort(-counts, kind="stable")[:_MOST_CLASSES])
    parts = [f"{names[index]} {counts[index]:,}" for index in largest]
    others = np.delete(counts, largest)
    if len(others):
        parts.append(f"{len(others):,} other classes with {others.min():,} to {others.max():,} each")
    return ", ".join(parts)
