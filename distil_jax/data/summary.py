"""A summary of a task's examples: their classes, and what was cut, lost or doubtful among them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from distil_jax.data.spans import SpanTable
from distil_jax.data.task_table import TaskTable
from distil_jax.data.tasks import TaskData
from distil_jax.structs import IGNORED

_MOST_CLASSES = 20  # shown by name
_PROBLEMS = {
    "cut": "cut at the longest row (task.max_length)",
    "words_cut": "words cut off with their labels",
    "words_lost": "words of which the tokenizer leaves nothing",
    "questions_cut": "questions cut to half of a row",
    "answers_lost": "answers that no row holds whole",
    "empty_texts": "with an empty text",
    "repeated": "with the text of another one",
    "contradicted": "with the text of another one, but another label",
    "in_train": "with the text of one that trains",
    "unnamed_fields": "with something in a field that the first line does not name",
}


def summarize(data: TaskData, splits: Collection[str] = ("train", "dev", "test")) -> str:
    """One line for each of these splits that exists: its classes and its problems."""
    tables = {"train": data.train, "dev": data.dev, "test": data.test}
    return "\n".join(
        "; ".join([f"{split}: {_labels(table, data.label_names)}", *data_problems(data.counts.get(split, {}))])
        for split, table in tables.items()
        if table is not None and split in splits
    )


def data_problems(counts: Mapping[str, int]) -> list[str]:
    """What was cut, lost or doubtful in a split, each with its count."""
    return [f"{counts[name]:,} {text}" for name, text in _PROBLEMS.items() if counts.get(name)]


def _labels(table: TaskTable, names: tuple[str, ...]) -> str:
    if isinstance(table, SpanTable):
        return f"{len(table.contexts):,} questions in {len(table):,} rows"
    if table.labels.dtype == np.float32:
        least, mean, most = table.labels.min(), table.labels.mean(dtype=np.float64), table.labels.max()
        return f"{len(table):,} numbers from {least:g} to {most:g}, {mean:.4g} on average"
    counts = np.bincount(table.labels[table.labels != IGNORED], minlength=len(names))
    shown = (
        range(len(names)) if len(names) <= _MOST_CLASSES else sorted(np.argsort(-counts, kind="stable")[:_MOST_CLASSES])
    )
    others = np.delete(counts, list(shown))
    rest = [f"{len(others):,} other classes, of {others.min():,} to {others.max():,} each"] if len(others) else []
    return ", ".join([*(f"{names[number]} {counts[number]:,}" for number in shown), *rest])
