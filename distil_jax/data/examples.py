"""Reads the labelled examples of a task, checks each of them, and splits them into train, dev and test."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from distil_jax.config.task import TaskConfig
from distil_jax.data.corpus import is_held_out
from distil_jax.data.labels import Classes, infer_class_names, parse_number
from distil_jax.data.records import SURROGATE, field_of, read_records
from distil_jax.schema import InputError, require, short_repr


class Answer(NamedTuple):
    """An answer to a question, and its place in the context."""

    start: int  # offset of its first character
    text: str


class Example(NamedTuple):
    """One labelled example.

    Attributes:
      where: its place, such as a file and a line, for messages.
      texts: one or two texts; for spans, question and context; for tokens, the words.
      label: the index of a class; for a regression, a float; for tokens, an index per word; for spans, a tuple of
        `Answer`. While the examples are read, it is the label as in the source.
    """

    where: str
    texts: tuple[str, ...]
    label: Any


@dataclass(frozen=True)
class Splits:
    """The examples of a task.

    Attributes:
      train, dev, test: lists of examples; `test` is None if the task names none.
      label_names: in the order of the class indices; empty for a regression and for spans.
      counts: for each split, how many examples may be mistakes (`_count_suspicious`), and what its source left out
        (`table_records`).
    """

    train: list[Example]
    dev: list[Example]
    test: list[Example] | None
    label_names: tuple[str, ...]
    counts: dict[str, Counter[str]]


def read_splits(task: TaskConfig) -> Splits:
    """Reads the examples of a task.

    If `task.dev` is empty, some training examples become dev examples. A hash of their text chooses them, so that equal
    texts are not separated. For spans it is a hash of the context, which many questions share.

    Raises:
      InputError: a source that cannot be read, a malformed example, a missing or unknown label, or too few examples.
    """
    source_counts: dict[str, Counter[str]] = {}
    train, class_names = _read(task, task.train, source_counts)
    classes = _classes(task, class_names, train)

    def with_converted_labels(source: str, examples: list[Example], declared: tuple[str, ...]) -> list[Example]:
        _check_order(source, declared, classes)
        convert = _converter(task, classes, indexed=bool(declared))
        return [example._replace(label=convert(example.label, example)) for example in examples]

    def read_evaluation(source: str) -> list[Example]:
        examples, declared = _read(task, source, source_counts)
        same_names = not (class_names and declared) or class_names == declared
        require(
            same_names,
            f"{source} names the labels {', '.join(declared)}, but {task.train} names {', '.join(class_names)}.",
        )
        examples = with_converted_labels(source, examples, declared)
        withheld = task.kind == "regression" and all(example.label == -1 for example in examples)
        require(
            not withheld,
            f"Every label of {source} is -1, as in the test examples of public benchmarks, whose labels are secret: "
            "use a source whose labels are known.",
        )
        return examples

    train = with_converted_labels(task.train, train, class_names)
    if task.dev:
        dev = read_evaluation(task.dev)
    else:
        train, dev = _split(task, train)
    if task.train_rows:
        keys = [_key(example.texts) for example in train]
        chosen = sorted(range(len(train)), key=keys.__getitem__)[: task.train_rows]
        train = [train[index] for index in sorted(chosen)]
    test = read_evaluation(task.test) if task.test else None
    counts = {"train": _count_suspicious(task, train, []) + source_counts[task.train]}
    for split, source, examples in (("dev", task.dev, dev), ("test", task.test, test or [])):
        counts[split] = _count_suspicious(task, examples, train) + source_counts.get(source, Counter())
    return Splits(train, dev, test, classes.names, counts)


def _count_suspicious(task: TaskConfig, examples: list[Example], train: list[Example]) -> Counter[str]:
    """Counts the examples of a split that may be mistakes; they are kept.

    Returns:
      `empty_texts`: an empty text; `repeated`: the texts of an earlier example; `contradicted`: such an example with
      another label; `in_train`: the texts of an example in `train`. Counts of 0 are left out.
    """
    has_text = any if task.kind == "tokens" else all  # one word is enough, but each of two texts is needed
    counts: Counter[str] = Counter()
    train_texts = {example.texts for example in train}
    first_labels: dict[tuple[str, ...], Any] = {}
    for example in examples:
        counts["contradicted"] += first_labels.setdefault(example.texts, example.label) != example.label
        counts["empty_texts"] += not has_text(text.strip() for text in example.texts)
        counts["in_train"] += example.texts in train_texts
    counts["repeated"] = len(examples) - len(first_labels)
    return +counts


def _split(task: TaskConfig, examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """Splits training examples into train and dev, for a task that names no dev examples."""
    train, dev = [], []
    for example in examples:
        key = _key(example.texts[-1:] if task.kind == "spans" else example.texts)
        (dev if is_held_out(key, task.dev_share) else train).append(example)
    require(
        bool(train and dev),
        f"A share of {task.dev_share} of the examples of {task.train} leaves none to "
        f"{'evaluate on' if train else 'train on'}: change task.dev_share, or name task.dev.",
    )
    return train, dev


def _key(texts: Sequence[str]) -> bytes:
    """An 8-byte hash of an example's texts."""
    return hashlib.blake2b("".join(text + "\0" for text in texts).encode(), digest_size=8).digest()


def _read(
    task: TaskConfig, source: str, source_counts: dict[str, Counter[str]]
) -> tuple[list[Example], tuple[str, ...]]:
    """Reads the examples of a source, with their labels as they are there, and the label names that it declares.

    `source_counts[source]` is set to the counts of its reader.
    """
    records = read_records(source)
    examples = [
        Example(where, _texts(task, record, where), field_of(record, task.label, where))
        for where, record in records.rows
    ]
    require(bool(examples), f"{source} has no examples: name another source.")
    source_counts[source] = Counter(unnamed_fields=records.counts["unnamed_fields"])
    return examples, records.class_names.get(task.label, ())


def _texts(task: TaskConfig, record: Any, where: str) -> tuple[str, ...]:
    """The texts of a record; for a task on tokens, its words."""
    texts = [field_of(record, field, where) for field in task.text]
    if task.kind == "tokens":
        (texts,) = texts
        require(isinstance(texts, list), f"{where}: the field {task.text[0]!r} must be a list of words.")
    for text in texts:
        if not isinstance(text, str):
            fields = " and ".join(map(repr, task.text))
            raise InputError(f"{where}: the field {fields} must be text, not {type(text).__name__}.")
        require(
            not SURROGATE.search(text),
            f"{where} has an unpaired surrogate (\\ud800 to \\udfff), which is not valid text: remove it.",
        )
    return tuple(texts)


def _classes(task: TaskConfig, class_names: tuple[str, ...], examples: list[Example]) -> Classes:
    """The classes that the task names; if it names none, those that the source declares or, failing that, uses."""
    if task.kind not in ("sequence", "tokens"):
        return Classes((), given=False, inferred=False)
    names = task.label_names or class_names
    inferred = not names
    if inferred:
        labels = []
        for example in examples:
            of_example = _word_labels(example) if task.kind == "tokens" else [example.label]
            labels += [(label, example.where) for label in of_example]
        names = infer_class_names(labels)
    require(
        len(set(names)) == len(names) > 1,
        f"The labels of {task.train} are {', '.join(names)}: a task needs at least two, all different.",
    )
    return Classes(names, given=bool(task.label_names), inferred=inferred)


def _check_order(source: str, declared: tuple[str, ...], classes: Classes) -> None:
    """Raises `InputError` if a source declares the task's label names in another order, or only some of them."""
    names = classes.names
    are_indices = names == tuple(map(str, range(len(names))))
    renamed = classes.given and not {*declared} & {*names}
    require(
        not declared or declared == names or are_indices or renamed,
        f"{source} names the labels {', '.join(declared)}, but the task names {', '.join(names)}: its indices would "
        "mean other labels, so give task.label_names the same names in the same order.",
    )


def _converter(task: TaskConfig, classes: Classes, *, indexed: bool) -> Callable[[Any, Example], Any]:
    """A function that converts an example's label in the source to the label to train on."""
    known: dict[tuple[type, Any], int] = {}  # the same few labels occur many times

    def class_index(label: Any, where: str) -> int:
        key = (type(label), label) if isinstance(label, (str, int, float)) else None
        if key not in known:
            known[key] = classes.index(label, where, indexed=indexed)
        return known[key]

    return {
        "sequence": lambda label, example: class_index(label, example.where),
        "tokens": lambda _, example: [class_index(label, example.where) for label in _word_labels(example)],
        "regression": lambda label, example: parse_number(label, example.where),
        "spans": lambda label, example: _answers(label, example.texts[1], example.where),
    }[task.kind]


def _word_labels(example: Example) -> list[Any]:
    """The labels of an example's words, checked to be one per word."""
    labels = example.label
    require(isinstance(labels, list), f"{example.where} must have a list of labels, one per word.")
    words = len(example.texts)
    require(len(labels) == words, f"{example.where} has {len(labels)} labels for {words} words: each needs one.")
    return labels


def _answers(label: Any, context: str, where: str) -> tuple[Answer, ...]:
    """Answers in SQuAD's format, {"text": [...], "answer_start": [...]}, checked against their context."""
    schema = f'{where}: an answer must be {{"text": [...], "answer_start": [...]}}, lists of the same length.'
    require(isinstance(label, dict) and {"text", "answer_start"} <= label.keys(), schema)
    texts, starts = label["text"], label["answer_start"]
    require(isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts), schema)
    require(bool(texts), f"{where} has no answer: leave questions without one out.")
    for text, start in zip(texts, starts, strict=True):
        require(isinstance(text, str) and type(start) is int, schema)
        require(
            bool(text) and start >= 0 and context.startswith(text, start),
            f"{where}: the answer {short_repr(text)} is not at character {short_repr(start)} of its context.",
        )
    return tuple(Answer(start, text) for text, start in zip(texts, starts, strict=True))
