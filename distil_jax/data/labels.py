"""Labels as class indices: the same from CSV, where everything is text, as from JSON and Parquet."""

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

_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?", re.ASCII)
_WHOLE = re.compile(
    r"(-?(0|[1-9]\d{0,4000}))(\.0*)?", re.ASCII
)  # as JSON writes it, or pandas where a label is missing
_REAL = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)  # Python also reads 1_5, and other digits
_TRUTH = {"false": 0, "true": 1}
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Classes:
    """The classes of a task.

    A label is the class of that name: 1, 1.0, "1" and "1.0" are one name, and so are true and "True". Where no name is
    a number, a number counts the names from 0.

    Attributes:
      names: in the order of their numbers.
      given: by the task, and not found in its source.
      found: among the labels of the training examples, so that no number counts them.
    """

    names: tuple[str, ...]
    given: bool
    found: bool

    def number(self, label: Any, where: str, *, indexed: bool) -> int:
        """The index of a label's class.

        Args:
          label: as it stands in the source.
          where: its place, for messages.
          indexed: the source itself says that its numbers count names from 0.

        Raises:
          InputError: no label, one of no class, or a number that could mean two of them.
        """
        if isinstance(label, str) and label in self.names:  # also where it reads like a number, or like no label
            return self.names.index(label)
        truth = str(label).strip().casefold() if isinstance(label, (bool, str)) else ""
        for number, name in enumerate(self.names):
            if truth in _TRUTH and name.casefold() == truth:
                return number
        meant = _TRUTH[truth] if truth in _TRUTH else meaning(label, where)
        named = [number for number, name in enumerate(self.names) if _of_text(name) == meant]
        counted = isinstance(meant, int) and 0 <= meant < len(self.names)
        if indexed and isinstance(meant, int):
            ambiguous = self.given and named and named != [meant]
            hint = "it may be a name or count the names from 0; give task.label_names no numbers"
            require(not ambiguous, f"{where} has the label {label}: {hint}.")
            named = [meant] if counted else []
        elif not named and counted and not self.found and not any(isinstance(_of_text(n), int) for n in self.names):
            named = [meant]
        if not named and isinstance(meant, int) and meant < 0:
            raise InputError(_no_label(where, meant) if indexed else _below_zero(where, meant, ("-1", "0", "1")))
        labels = ", ".join(self.names)
        require(
            bool(named),
            f"{where} has the label {short_repr(label)}, and the labels are {labels}: see task.label_names.",
        )
        return named[0]


def found_names(labels: Sequence[tuple[Any, str]]) -> tuple[str, ...]:
    """The names of the classes that labels have, each with its place: by number where all are numbers.

    Raises:
      InputError: no label, a fraction, or a number below zero, which may mean a class or none.
    """
    places = {meaning(label, where): where for label, where in reversed(labels)}  # where each stands first
    if all(isinstance(label, str) and label.casefold() in _TRUTH for label in places):
        places = {_TRUTH[label.casefold()]: where for label, where in places.items()}  # CSV's truth values
    for label, where in places.items():
        if isinstance(label, str) and _REAL.fullmatch(label) and re.search("[.eE]", label):
            raise InputError(
                f"{where} has the label {label}: it must be a whole number or a name. For numbers set task.kind to "
                '"regression", for classes name them in task.label_names.'
            )
    names = [str(label) for label in places]
    numeric = all(_NUMBER.fullmatch(name) for name in names)
    names.sort(key=lambda name: (float(name) if numeric else 0.0, name))
    for label, where in places.items():
        require(not (isinstance(label, int) and label < 0), _below_zero(where, label, names))
    return tuple(names)


def meaning(label: Any, where: str) -> int | str:
    """A label as a whole number or a name, whatever format it comes from.

    Raises:
      InputError: there is none, or it is neither.
    """
    if isinstance(label, str):
        meant: Any = _of_text(label)
    elif isinstance(label, float) and math.isfinite(label):
        meant = int(label) if label.is_integer() else repr(label)
    else:
        meant = int(label) if isinstance(label, bool) else label
    nothing = meant is None or (isinstance(meant, (str, float)) and str(meant) in ("", "nan", "NaN"))
    require(not nothing, f"{where} has no label ({short_repr(label)}): leave such examples out.")
    if not isinstance(meant, (int, str)) or (isinstance(meant, str) and SURROGATE.search(meant)):
        raise InputError(f"{where} has the label {short_repr(label)}: it must be a whole number or a name.")
    return meant


def real(label: Any, where: str) -> float:
    """The label of a regression.

    Raises:
      InputError: there is none, or it is no number that float32 holds.
    """
    nothing = label is None or (isinstance(label, str) and not label.strip())
    require(not nothing, f"{where} has no label: leave such examples out.")
    number = isinstance(label, (int, float)) and not isinstance(label, bool)
    value = math.nan
    if number or (isinstance(label, str) and _REAL.fullmatch(label.strip())):
        with contextlib.suppress(OverflowError):
            value = float(label)
    require(abs(value) <= _LARGEST, f"{where} has the label {short_repr(label)}: a regression needs a finite number.")
    return value


def _of_text(text: str) -> int | str:
    """A whole number if the text is one, otherwise the text without surrounding spaces."""
    text = text.strip()
    if whole := _WHOLE.fullmatch(text):
        return int(whole[1])
    if _REAL.fullmatch(text) and "e" in text.lower() and float(text).is_integer():  # 1e+16, as Python writes it
        return int(float(text))
    return text


def _below_zero(where: str, label: Any, names: Sequence[str]) -> str:
    classes = ", ".join(f'"{name}"' for name in names)
    return (
        f"{where} has the label {label}: if that is a class, name all of them as they stand there, such as "
        f"task.label_names = [{classes}]; if it says that there is no label, as in the test examples of public "
        "benchmarks, take a source whose labels are known."
    )


def _no_label(where: str, label: int) -> str:
    return (
        f"{where} has no label ({label}), as the test examples of public benchmarks have none: take a source whose "
        "labels are known."
    )
