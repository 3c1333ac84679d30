"""Converts labels to class indices or numbers. The result does not depend on the file format: CSV has only strings."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distil_jax.data.records import SURROGATE
from distil_jax.schema import InputError, require, short_repr

_DECIMAL = re.compile(r"[+-]?\d+(\.\d*)?", re.ASCII)
# An integer as JSON has it, or as pandas writes it in a column with missing labels ("1.0").
_INTEGER = re.compile(r"(-?(0|[1-9]\d{0,4000}))(\.0*)?", re.ASCII)
# `float` also accepts 1_5 and the digits of other scripts.
_FLOAT = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_BOOLEANS = {"false": 0, "true": 1}
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Classes:
    """The classes of a task, and the conversion of labels to class indices.

    A label is the name of its class. Different spellings of a number or boolean are the same name: 1, 1.0, "1" and
    "1.0", or true and "True". If no name is a number, a label that is a number is an index, from 0.

    Attributes:
      names: in the order of their indices.
      given: whether the task's config sets the names.
      inferred: whether the names come from the labels of the training examples, so that a number is never an index.
    """

    names: tuple[str, ...]
    given: bool
    inferred: bool

    def index(self, label: Any, where: str, *, indexed: bool) -> int:
        """The index of a label's class.

        Args:
          label: as read from the source.
          where: its place, for messages.
          indexed: whether the source declares its class names, so that its numbers are indices.

        Raises:
          InputError: no label, the label of no class, or a number that is the index of one class and the name of
            another.
        """
        if isinstance(label, str) and label in self.names:  # even if it looks like a number or like a missing label
            return self.names.index(label)
        boolean = str(label).strip().casefold() if isinstance(label, (bool, str)) else ""
        for index, name in enumerate(self.names):
            if boolean in _BOOLEANS and name.casefold() == boolean:
                return index
        value = _BOOLEANS[boolean] if boolean in _BOOLEANS else parse_label(label, where)
        values = [_parse_text(name) for name in self.names]
        matches = [index for index, name in enumerate(values) if name == value]
        is_index = isinstance(value, int) and 0 <= value < len(self.names)
        if indexed and isinstance(value, int):
            ambiguous = self.given and matches and matches != [value]
            hint = "it may be the name or the index of a label; use no numbers in task.label_names"
            require(not ambiguous, f"{where} has the label {label}: {hint}.")
            matches = [value] if is_index else []
        elif not matches and is_index and not self.inferred and not any(isinstance(name, int) for name in values):
            matches = [value]
        if not matches and isinstance(value, int) and value < 0:
            raise InputError(_withheld(where, value) if indexed else _negative(where, value, ("-1", "0", "1")))
        labels = ", ".join(self.names)
        require(
            bool(matches),
            f"{where} has the label {short_repr(label)}, but the labels are {labels}: see task.label_names.",
        )
        return matches[0]


def infer_class_names(labels: Sequence[tuple[Any, str]]) -> tuple[str, ...]:
    """The names of the classes that occur among labels, sorted by number if all are numbers, otherwise as text.

    Args:
      labels: each with its place, for messages.

    Raises:
      InputError: a label that is missing or a fraction, or a negative one, which may be a class or mean no label.
    """
    places = {parse_label(label, where): where for label, where in reversed(labels)}  # the first place of each
    if all(isinstance(label, str) and label.casefold() in _BOOLEANS for label in places):
        places = {_BOOLEANS[label.casefold()]: where for label, where in places.items()}  # booleans from CSV
    for label, where in places.items():
        if isinstance(label, str) and _FLOAT.fullmatch(label) and re.search("[.eE]", label):
            raise InputError(
                f"{where} has the label {label}: it must be a whole number or a name. For a regression, set task.kind "
                'to "regression"; for classes, name them in task.label_names.'
            )
    names = [str(label) for label in places]
    numeric = all(_DECIMAL.fullmatch(name) for name in names)
    names.sort(key=lambda name: (float(name) if numeric else 0.0, name))
    for label, where in places.items():
        require(not (isinstance(label, int) and label < 0), _negative(where, label, names))
    return tuple(names)


def parse_label(label: Any, where: str) -> int | str:
    """A class label from any file format, as an integer or a name.

    Args:
      label: as read from the source.
      where: its place, for messages.

    Raises:
      InputError: it is missing, or neither an integer nor a name.
    """
    if isinstance(label, str):
        value: Any = _parse_text(label)
    elif isinstance(label, float) and math.isfinite(label):
        value = int(label) if label.is_integer() else repr(label)
    else:
        value = int(label) if isinstance(label, bool) else label
    missing = value is None or (isinstance(value, (str, float)) and str(value) in ("", "nan", "NaN"))
    require(not missing, f"{where} has no label ({short_repr(label)}): leave such examples out.")
    if not isinstance(value, (int, str)) or (isinstance(value, str) and SURROGATE.search(value)):
        raise InputError(f"{where} has the label {short_repr(label)}: it must be a whole number or a name.")
    return value


def parse_number(label: Any, where: str) -> float:
    """The label of a regression, as a number that fits float32.

    Args:
      label: as read from the source.
      where: its place, for messages.

    Raises:
      InputError: it is missing or not such a number.
    """
    missing = label is None or (isinstance(label, str) and not label.strip())
    require(not missing, f"{where} has no label: leave such examples out.")
    is_number = isinstance(label, (int, float)) and not isinstance(label, bool)
    value = math.nan
    if is_number or (isinstance(label, str) and _FLOAT.fullmatch(label.strip())):
        with contextlib.suppress(OverflowError):
            value = float(label)
    require(abs(value) <= _LARGEST, f"{where} has the label {short_repr(label)}: a regression needs a finite number.")
    return value


def _parse_text(text: str) -> int | str:
    """An integer if the text is one, otherwise the text without surrounding spaces."""
    text = text.strip()
    if integer := _INTEGER.fullmatch(text):
        return int(integer[1])
    if _FLOAT.fullmatch(text) and "e" in text.lower() and float(text).is_integer():  # 1e+16, as Python writes it
        return int(float(text))
    return text


def _negative(where: str, label: Any, names: Sequence[str]) -> str:
    """The message about a negative label that may be a class or mean that there is no label."""
    classes = ", ".join(f'"{name}"' for name in names)
    return (
        f"{where} has the label {label}: if that is a class, name all classes as the source does, such as "
        f"task.label_names = [{classes}]; if it means that there is no label, as in the test examples of public "
        "benchmarks, use a source whose labels are known."
    )


def _withheld(where: str, label: int) -> str:
    """The message about a negative label in a source whose labels are indices."""
    return (
        f"{where} has no label ({label}), as in the test examples of public benchmarks: use a source whose labels are "
        "known."
    )
