"""Labelled examples of a task: read, checked one by one, and cut into what trains and what judges."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from distil_jax.data.corpus import is_held_out
from distil_jax.data.records import SURROGATE, field_of, read_records
from distil_jax.schema import InputError, require, shown
from distil_jax.task_config import TaskConfig

_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?", re.ASCII)
_LARGEST = float(np.finfo(np.float32).max)


class Answer(NamedTuple):
    """Where a context answers a question."""

    start: int  # characters before it
    text: str


class Example(NamedTuple):
    """One labelled example.

    Attributes:
      where: its file and line, for messages.
      texts: one or two; of tokens the words.
      label: a label's number; of a regression a float; of tokens one number a word; of spans the answers.
    """

    where: str
    texts: tuple[str, ...]
    label: Any


@dataclass(frozen=True)
class Splits:
    """The examples of a task, `test` None where there are none, and its labels in the order of their numbers."""

    train: list[Example]
    dev: list[Example]
    test: list[Example] | None
    label_names: tuple[str, ...]


def read_splits(task: TaskConfig) -> Splits:
    """Reads the examples of a task.

    Where `task.dev` is empty, the hash of an example's text decides whether it trains or judges, so that equal texts
    fall on one side; of spans it is the context's, which many questions share.

    Raises:
      InputError: a source that cannot be read, an example that is broken or has no or an unknown label, or too few.
    """
    train, class_names = _read(task, task.train)
    names = _label_names(task, class_names, train) if task.kind in ("sequence", "tokens") else ()
    # Numbers index the names that were given, but are themselves the names that were found.
    convert = _converter(task, names, numbers_are_names=not (task.label_names or class_names))

    def labelled(examples: list[Example]) -> list[Example]:
        return [example._replace(label=convert(example.label, example)) for example in examples]

    def judging(source: str) -> list[Example]:
        examples, others = _read(task, source)
        known = not (class_names and others) or class_names == others
        require(known, f"{source} names the labels {', '.join(others)}, and {task.train} {', '.join(class_names)}.")
        return labelled(examples)

    train = labelled(train)
    if task.dev:
        dev = judging(task.dev)
    else:
        train, dev = _split(task, train)
    if task.train_rows:
        keys = [_key(example.texts) for example in train]
        chosen = sorted(range(len(train)), key=keys.__getitem__)[: task.train_rows]
        train = [train[number] for number in sorted(chosen)]
    return Splits(train, dev, judging(task.test) if task.test else None, names)


def _split(task: TaskConfig, examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """What trains and what judges, where the task names nothing to judge by."""
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        key = _key(example.texts[-1:] if task.kind == "spans" else example.texts)
        sides[is_held_out(key, task.dev_share)].append(example)
    require(
        all(sides),
        f"A share of {task.dev_share} of the examples of {task.train} leaves none to "
        f"{'judge by' if sides[0] else 'train on'}: set task.dev_share otherwise, or name task.dev.",
    )
    return sides


def _key(texts: Sequence[str]) -> bytes:
    return hashlib.blake2b("".join(text + "\0" for text in texts).encode(), digest_size=8).digest()


def _read(task: TaskConfig, source: str) -> tuple[list[Example], tuple[str, ...]]:
    """The examples with their labels as they stand there, and the names that the source itself gives to labels."""
    records = read_records(source)
    examples = [
        Example(where, _texts(task, record, where), field_of(record, task.label, where))
        for where, record in records.rows
    ]
    require(bool(examples), f"{source} holds no examples: name another source.")
    return examples, records.class_names.get(task.label, ())


def _texts(task: TaskConfig, record: Any, where: str) -> tuple[str, ...]:
    texts = [field_of(record, field, where) for field in task.text]
    if task.kind == "tokens":
        (texts,) = texts
        require(isinstance(texts, list), f"{where}: the field {task.text[0]!r} must be a list of words.")
    for text in texts:
        if not isinstance(text, str):
            fields = " and ".join(map(repr, task.text))
            raise InputError(f"{where}: the field {fields} must hold text, and not {type(text).__name__}.")
        require(not SURROGATE.search(text), f"{where} holds half a character (\\ud800 to \\udfff), as no text does.")
    return tuple(texts)


def _label_names(task: TaskConfig, class_names: tuple[str, ...], examples: list[Example]) -> tuple[str, ...]:
    """As the task gives them, or the source, or as they are found: by number where all are numbers."""
    names = task.label_names or class_names
    if not names:
        found = {
            str(_class(label, example.where))
            for example in examples
            for label in (_list(example) if task.kind == "tokens" else [example.label])
        }
        numeric = all(_NUMBER.fullmatch(name) for name in found)
        names = tuple(sorted(found, key=lambda name: (float(name) if numeric else 0.0, name)))
    require(
        len(set(names)) == len(names) > 1,
        f"The labels of {task.train} are {', '.join(names)}: a task needs at least two, all different.",
    )
    return names


def _converter(task: TaskConfig, names: tuple[str, ...], *, numbers_are_names: bool) -> Callable[[Any, Example], Any]:
    """What turns a label as it stands in the source into what trains."""
    places = {name: number for number, name in enumerate(names)}

    def number(label: Any, where: str) -> int:
        if isinstance(label, str) and label in places:  # also where it reads like a number, or like no label
            return places[label]
        label = _class(label, where)
        if numbers_are_names:
            found = places.get(str(label))
        else:
            ambiguous = task.label_names and isinstance(label, int) and places.get(str(label), label) != label
            hint = "it may be a name or count the names from 0; give task.label_names no numbers"
            require(not ambiguous, f"{where} has the label {label}: {hint}.")
            counted = re.fullmatch(r"\d{1,9}", str(label), re.ASCII) and int(label) < len(names)
            found = int(label) if counted else None
        if found is None:
            raise InputError(
                f"{where} has the label {shown(label)}, and the labels are {', '.join(names)}: see task.label_names."
            )
        return found

    return {
        "sequence": lambda label, example: number(label, example.where),
        "tokens": lambda _, example: [number(label, example.where) for label in _list(example)],
        "regression": lambda label, example: _float(label, example.where),
        "spans": lambda label, example: _answers(label, example.texts[1], example.where),
    }[task.kind]


def _class(label: Any, where: str) -> int | str:
    """A label as a number or a name."""
    if isinstance(label, float) and label.is_integer():  # what pandas makes of a column that lacks one
        label = int(label)
    require(
        not (label is None or (isinstance(label, (int, str)) and label in ("", "-1", -1))),
        f"{where} has no label ({shown(label)}): leave such examples out.",
    )
    if not isinstance(label, (int, str)) or (isinstance(label, str) and SURROGATE.search(label)):
        raise InputError(f"{where} has the label {shown(label)}: it must be a whole number or a name.")
    return int(label) if isinstance(label, bool) else label


def _list(example: Example) -> list[Any]:
    """The labels of words."""
    labels = example.label
    require(isinstance(labels, list), f"{example.where} must have a list of labels, one a word.")
    words = len(example.texts)
    require(len(labels) == words, f"{example.where} has {len(labels)} labels for {words} words: each needs one.")
    return labels


def _float(label: Any, where: str) -> float:
    require(label is not None and label != "", f"{where} has no label: leave such examples out.")
    try:
        value = float(label) if isinstance(label, (int, float, str)) else math.nan
    except (ValueError, OverflowError):
        value = math.nan
    require(abs(value) <= _LARGEST, f"{where} has the label {shown(label)}: a regression needs a finite number.")
    return value


def _answers(label: Any, context: str, where: str) -> tuple[Answer, ...]:
    """SQuAD's {"text": [...], "answer_start": [...]}, each where it says."""
    schema = f'{where}: an answer must be {{"text": [...], "answer_start": [...]}}, lists of one length.'
    require(isinstance(label, dict) and {"text", "answer_start"} <= label.keys(), schema)
    texts, starts = label["text"], label["answer_start"]
    require(isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts), schema)
    require(bool(texts), f"{where} has no answer: leave questions without one out.")
    for text, start in zip(texts, starts, strict=True):
        require(isinstance(text, str) and type(start) is int, schema)
        require(
            bool(text) and start >= 0 and context.startswith(text, start),
            f"{where}: the answer {shown(text)} does not stand at character {shown(start)} of its context.",
        )
    return tuple(Answer(start, text) for text, start in zip(texts, starts, strict=True))
