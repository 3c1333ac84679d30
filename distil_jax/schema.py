"""Plain values <-> frozen dataclasses: every key and every type is checked, and what is wrong is said in a sentence.

Configs, manifests and the metadata of checkpoints are all read through here.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import os
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

_LONGEST_SENTENCE = 1_500  # characters; ten tensors with their shapes have about a thousand
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: JSON can escape it and a shell pass it, no file holds it


class InputError(ValueError):
    """Something the person running the command can mend: one sentence that says what is wrong and what to do.

    It may quote names and values from anybody's files, so characters that move a terminal's cursor are escaped, and
    the middle of what is too long is left out.
    """

    def __init__(self, sentence: str) -> None:
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in sentence)
        half = _LONGEST_SENTENCE // 2
        super().__init__(line if len(line) <= _LONGEST_SENTENCE else f"{line[:half]} ... {line[-half:]}")


def require(condition: bool, sentence: str) -> None:
    """Raises `InputError` with the sentence where the condition does not hold."""
    if not condition:
        raise InputError(sentence)


def require_finite(name: str, value: float, *, least: float | None = None, above: float | None = None) -> None:
    """Raises `InputError` where a number is infinite, none at all (NaN), or below its bound."""
    require(math.isfinite(value), f"{name} must be a finite number, not {value}.")
    if least == 0:
        require(value >= 0, f"{name} must not be negative, but is {value}.")
    elif least is not None:
        require(value >= least, f"{name} must be at least {least}, not {value}.")
    if above is not None:
        require(value > above, f"{name} must be above {above}, not {value}.")


def require_share(name: str, value: float) -> None:
    """Raises `InputError` where a number is not in [0, 1); NaN is in no range."""
    require(0 <= value < 1, f"{name} must be in [0, 1), not {value}.")


def short_repr(value: Any) -> str:
    """`repr`, or only the type where Python refuses: thousands of digits or nested brackets."""
    try:
        return repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too large to show"


def may_change(default: Any) -> Any:
    """A dataclass field that a resumed run may set differently, because it changes no number beyond rounding."""
    return dataclasses.field(default=default, metadata={"may_change": True})


def path_field(default: str, *, may_change: bool = True) -> Any:
    """A dataclass field that names a file, a folder or a source; `build` expands a `~` in it with `expand_home`."""
    return dataclasses.field(default=default, metadata={"may_change": may_change, "path": True})


def expand_home(text: str) -> str:
    """Replaces a leading `~` or `~user` in the name of a file, folder, source or hub id by that home.

    A shell does not do so for quoted words, for `--output=~/run` or in TOML files. A file that is really called `~` is
    written `./~`.

    Raises:
      InputError: there is no such home, and no file of that name.
    """
    home = os.path.expanduser(text)
    user = text.partition("/")[0]
    known = home != text or not text.startswith("~") or os.path.exists(text)
    require(known, f"There is no home {user}, as {text} says: write that path without ~, or ./{text}.")
    return home


def user_path(name: str | Path) -> Path:
    """The path for a name that a user gave; everything that opens or makes files goes through here.

    `./~x` comes back as an absolute path, because `Path` drops the `./`, and later code would expand the `~`.

    Raises:
      InputError: as `expand_home`.
    """
    path = Path(expand_home(os.fspath(name)))
    return path.absolute() if str(path).startswith("~") else path


def build(kind: type, values: Mapping[str, Any], where: str = "") -> Any:
    """The dataclass `kind` from nested plain values; every key and type is checked."""
    types_of = _types_of(kind)
    known = [f.name for f in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise InputError(f"Unknown config key {where}{key}: did you mean {where}{near}?")
    missing = [f.name for f in dataclasses.fields(kind) if f.name not in values and f.default is dataclasses.MISSING]
    require(not missing, f"The config lacks {where}{', '.join(missing)}.")
    converted = {key: _convert(types_of[key], value, where + key) for key, value in values.items()}
    paths = [f.name for f in dataclasses.fields(kind) if f.metadata.get("path") and f.name in converted]
    return kind(**converted | {name: expand_home(converted[name]) for name in paths})


@functools.cache  # a manifest may list thousands of files
def _types_of(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values, None left out (TOML has none): `build(type(config), to_dict(config)) == config`."""
    values = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            values[f.name] = to_dict(value)
        elif value is not None:
            values[f.name] = list(value) if isinstance(value, tuple) else value
    return values


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """The differences between two configs in fields that a resumed run may not change, as texts."""
    changes = []
    for f in dataclasses.fields(old):
        before, after = getattr(old, f.name), getattr(new, f.name)
        if dataclasses.is_dataclass(before) and type(before) is type(after):
            changes += differences(before, after, f"{where}{f.name}.")
        elif before != after and not f.metadata.get("may_change"):
            changes.append(f"{where}{f.name}: {before} -> {after}")
    return changes


def table_of(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    table = values.get(name, {})
    require(isinstance(table, dict), f"Config key {name} must be a table: write [{name}], then its keys.")
    return table


def quoted(key: str, text: str | Path) -> str:
    """An override that sets a key to exactly this text, even if TOML would read a number in it, such as 42."""
    return f"{key}={json.dumps(str(text), ensure_ascii=False)}"


def set_value(values: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    require(bool(separator), f"--set takes section.key=value, not {override!r}.")
    *sections, key = path.strip().split(".")
    for section in sections:
        values[section] = dict(table_of(values, section))
        values = values[section]
    try:
        values[key] = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # not TOML, or numbers and brackets beyond what Python reads
        values[key] = text


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        require(isinstance(value, Mapping), f"Config key {where} must be a table: write [{where}], then its keys.")
        return build(kind, value, where + ".")
    if origin is Literal:
        choices = " or ".join(map(repr, arguments))
        require(value in arguments, f"Config key {where} must be {choices}, not {short_repr(value)}.")
        return value
    if origin is tuple:
        require(isinstance(value, (list, tuple)), f"Config key {where} must be a list, not {short_repr(value)}.")
        return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin in (types.UnionType, typing.Union):  # with a Literal in it, `X | None` is the older of the two
        return None if value is None else _convert(arguments[0], value, where)
    if kind in (int, float) and type(value) is int:
        require(abs(value) < 2**63, f"Config key {where} must be a number of at most 63 bits, not {short_repr(value)}.")
        return kind(value)
    require(type(value) is kind, f"Config key {where} must be of type {kind.__name__}, not {short_repr(value)}.")
    if kind is float:
        # TOML and JSON can hold NaN and infinity, and NaN may pass a comparison with a bound.
        require(math.isfinite(value), f"Config key {where} must be a finite number, not {value}.")
    if kind is str:
        require(not _SURROGATE.search(value), f"Config key {where} must be text that UTF-8 can hold, not {value!r}.")
    return value
