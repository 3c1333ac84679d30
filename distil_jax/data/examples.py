"""Labelled examples of a task: read, checked one by one, and split into train, dev and test."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from distil_jax.config.task import TaskConfig
from distil_jax.data.corpus import is_held_out
from distil_jax.data.labels import Classes, found_names, real
from distil_jax.data.records import SURROGATE, field_of, read_records
from distil_jax.schema import InputError, require, short_repr


class Answer(NamedTuple):
    """The place of an answer in its context."""

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
    """The examples of a task.

    Attributes:
      train, dev, test: `test` None where there are none.
      label_names: in the order of their numbers.
      counts: of each split the examples with an empty text, with the text of another one (and another label), or with
        the text of one that trains, and what its source passed over.
    """

    train: list[Example]
    dev: list[Example]
    test: list[Example] | None
    label_names: tuple[str, ...]
    counts: dict[str, Counter[str]]


def read_splits(task: TaskConfig) -> Splits:
    """Reads the examples of a task.

    Where `task.dev` is empty, the hash of an example's text decides whether it trains or judges, so that equal texts
    fall on one side; of spans it is the context's, which many questions share.

    Raises:
      InputError: a source that cannot be read, an example that is broken or has no or an unknown label, or too few.
    """
    passed_over: dict[str, Counter[str]] = {}
    train, class_names = _read(task, task.train, passed_over)
    classes = _classes(task, class_names, train)

    def labelled(source: str, examples: list[Example], own: tuple[str, ...]) -> list[Example]:
        _check_order(source, own, classes)
        convert = _converter(task, classes, indexed=bool(own))
        return [example._replace(label=convert(example.label, example)) for example in examples]

    def judging(source: str) -> list[Example]:
        examples, others = _read(task, source, passed_over)
        known = not (class_names and others) or class_names == others
        require(known, f"{source} names the labels {', '.join(others)}, and {task.train} {', '.join(class_names)}.")
        examples = labelled(source, examples, others)
        kept_back = task.kind == "regression" and all(example.label == -1 for example in examples)
        require(
            not kept_back,
            f"Every label of {source} is -1, as in the test examples of public benchmarks, whose labels are kept back: "
            "take a source whose labels are known.",
        )
        return examples

    train = labelled(task.train, train, class_names)
    if task.dev:
        dev = judging(task.dev)
    else:
        train, dev = _split(task, train)
    if task.train_rows:
        keys = [_key(example.texts) for example in train]
        chosen = sorted(range(len(train)), key=keys.__getitem__)[: task.train_rows]
        train = [train[number] for number in sorted(chosen)]
    test = judging(task.test) if task.test else None
    read = {"train": (task.train, train), "dev": (task.dev, dev), "test": (task.test, test or [])}
    counts = {
        split: _doubtful(task, examples, [] if split == "train" else train) + passed_over.get(source, Counter())
        for split, (source, examples) in read.items()
    }
    return Splits(train, dev, test, classes.names, counts)


def _doubtful(task: TaskConfig, examples: list[Example], train: list[Example]) -> Counter[str]:
    """Counts the examples that may be mistakes; they are kept."""
    hold_text = any if task.kind == "tokens" else all  # of words, or of one text or two
    counts: Counter[str] = Counter()
    trains = {example.texts for example in train}
    first: dict[tuple[str, ...], Any] = {}
    for example in examples:
        same = first.setdefault(example.texts, example.label) == example.label
        counts["contradicted"] += not same
        counts["empty_texts"] += not hold_text(text.strip() for text in example.texts)
        counts["in_train"] += example.texts in trains
    counts["repeated"] = len(examples) - len(first)
    return +counts


def _split(task: TaskConfig, examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """Splits training examples into train and dev, for a task that names no dev examples."""
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


def _read(task: TaskConfig, source: str, passed_over: dict[str, Counter[str]]) -> tuple[list[Example], tuple[str, ...]]:
    """The examples with their labels as they stand there, and the names that the source itself gives to labels.

    What the source passed over is counted under its name.
    """
    records = read_records(source)
    examples = [
        Example(where, _texts(task, record, where), field_of(record, task.label, where))
        for where, record in records.rows
    ]
    require(bool(examples), f"{source} holds no examples: name another source.")
    passed_over[source] = Counter(unnamed_fields=records.counts["unnamed_fields"])
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


def _classes(task: TaskConfig, class_names: tuple[str, ...], examples: list[Example]) -> Classes:
    """The classes as the task names them, else as the source does, else as they occur."""
    if task.kind not in ("sequence", "tokens"):
        return Classes((), given=False, found=False)
    names = task.label_names or class_names
    found = not names
    if found:
        names = found_names(
            [
                (label, example.where)
                for example in examples
                for label in (_list(example) if task.kind == "tokens" else [example.label])
            ]
        )
    require(
        len(set(names)) == len(names) > 1,
        f"The labels of {task.train} are {', '.join(names)}: a task needs at least two, all different.",
    )
    return Classes(names, given=bool(task.label_names), found=found)


def _check_order(source: str, own: tuple[str, ...], classes: Classes) -> None:
    """Refuses a source that numbers the task's label names in another order."""
    names = classes.names
    counted = names == tuple(map(str, range(len(names))))
    renamed = classes.given and not {*own} & {*names}
    require(
        not own or own == names or counted or renamed,
        f"{source} names the labels {', '.join(own)}, and the task {', '.join(names)}: its numbers would mean others, "
        "so give task.label_names the same names in the same order.",
    )


def _converter(task: TaskConfig, classes: Classes, *, indexed: bool) -> Callable[[Any, Example], Any]:
    """A function from a label in the source to the label to train on."""
    known: dict[tuple[type, Any], int] = {}  # a source has few labels many times

    def number(label: Any, where: str) -> int:
        key = (type(label), label) if isinstance(label, (str, int, float)) else None
        if key not in known:
            known[key] = classes.number(label, where, indexed=indexed)
        return known[key]

    return {
        "sequence": lambda label, example: number(label, example.where),
        "tokens": lambda _, example: [number(label, example.where) for label in _list(example)],
        "regression": lambda label, example: real(label, example.where),
        "spans": lambda label, example: _answers(label, example.texts[1], example.where),
    }[task.kind]


def _list(example: Example) -> list[Any]:
    """The labels of an example's words."""
    labels = example.label
    require(isinstance(labels, list), f"{example.where} must have a list of labels, one a word.")
    words = len(example.texts)
    require(len(labels) == words, f"{example.where} has {len(labels)} labels for {words} words: each needs one.")
    return labels


def _answers(label: Any, context: str, where: str) -> tuple[Answer, ...]:
    """SQuAD's {"text": [...], "answer_start": [...]}, as checked answers."""
    schema = f'{where}: an answer must be {{"text": [...], "answer_start": [...]}}, lists of one length.'
    require(isinstance(label, dict) and {"text", "answer_start"} <= label.keys(), schema)
    texts, starts = label["text"], label["answer_start"]
    require(isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts), schema)
    require(bool(texts), f"{where} has no answer: leave questions without one out.")
    for text, start in zip(texts, starts, strict=True):
        require(isinstance(text, str) and type(start) is int, schema)
        require(
            bool(text) and start >= 0 and context.startswith(text, start),
            f"{where}: the answer {short_repr(text)} does not stand at character {short_repr(start)} of its context.",
        )
    return tuple(Answer(start, text) for text, start in zip(texts, starts, strict=True))
