"""Turns plain values into frozen dataclasses and back. Every key and every type is checked.

Configs and the manifests of prepared rows and checkpoints are read with this. Whatever is wrong is an `InputError`.
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
_NEAR = (
    0.65  # of `difflib`: how alike two keys are of which one may be meant for the other; batch_size, batch_rows: 0.7
)
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which may come from JSON or a shell; UTF-8 has none


class InputError(ValueError):
    """A mistake that the user can correct. Its message is one sentence that says what is wrong and what to do.

    The sentence may quote names and values from untrusted files. So characters that could control the terminal are
    escaped, and the middle of a very long sentence is left out.
    """

    def __init__(self, sentence: str) -> None:
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in sentence)
        half = _LONGEST_SENTENCE // 2
        super().__init__(line if len(line) <= _LONGEST_SENTENCE else f"{line[:half]} ... {line[-half:]}")


def require(condition: bool, sentence: str) -> None:
    """Raises `InputError` with the sentence unless the condition holds."""
    if not condition:
        raise InputError(sentence)


def require_finite(name: str, value: float, *, least: float | None = None, above: float | None = None) -> None:
    """Raises `InputError` if a number is infinite or NaN, less than `least`, or not above `above`."""
    require(math.isfinite(value), f"{name} must be a finite number, not {value}.")
    if least == 0:
        require(value >= 0, f"{name} must not be negative, but is {value}.")
    elif least is not None:
        require(value >= least, f"{name} must be at least {least}, not {value}.")
    if above is not None:
        require(value > above, f"{name} must be above {above}, not {value}.")


def require_share(name: str, value: float) -> None:
    """Raises `InputError` unless a number is in [0, 1); NaN is not."""
    require(0 <= value < 1, f"{name} must be in [0, 1), not {value}.")


def short_repr(value: Any) -> str:
    """`repr(value)`, or only its type if Python refuses: thousands of digits, or of nested brackets."""
    try:
        return repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too large to show"


def may_change(default: Any) -> Any:
    """A dataclass field that a resumed run may change, because it affects results only by rounding."""
    return dataclasses.field(default=default, metadata={"may_change": True})


def path_field(default: str, *, may_change: bool = True) -> Any:
    """A dataclass field with the name of a file, folder or source; `build` expands a leading `~` in it."""
    return dataclasses.field(default=default, metadata={"may_change": may_change, "path": True})


def expand_home(text: str) -> str:
    """Expands a leading `~` or `~user` to that home folder, as a shell does.

    The shell leaves it alone in quotes, in `--output=~/run` and in TOML files. A file whose own name begins with `~` is
    written `./~name`.

    Raises:
      InputError: there is no such home folder, and no file of that name.
    """
    expanded = os.path.expanduser(text)
    user = text.partition("/")[0]
    known = expanded != text or not text.startswith("~") or os.path.exists(text)
    require(known, f"There is no home folder {user} for {text}: write the path without ~, or as ./{text}.")
    return expanded


def user_path(name: str | Path) -> Path:
    """The path that a user gave, with its `~` expanded. Use it for every file or folder that a user names.

    A path such as `./~name` becomes absolute: `Path` drops the `./`, so that a second call would expand the `~`.

    Raises:
      InputError: as `expand_home`.
    """
    path = Path(expand_home(os.fspath(name)))
    return path.absolute() if str(path).startswith("~") else path


def build(kind: type, values: Mapping[str, Any], where: str = "", root: type | None = None) -> Any:
    """Makes a dataclass of type `kind` from nested plain values, and checks every key and type.

    Args:
      kind: the class.
      values: from TOML or JSON; a nested dataclass is a mapping.
      where: in front of every key in messages, such as "train.".
      root: the class of the whole, where `kind` is that of a section; among all its keys a mistyped one is looked for.

    Raises:
      InputError: an unknown or missing key, a value of a wrong type, or one that the class refuses.
    """
    types_of, root = _types_of(kind), root or kind
    known = [f.name for f in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            near = _near_keys(where, key, values[key], root)
            hint = f"did you mean {' or '.join(near)}?" if near else f"the keys there are {', '.join(known)}."
            raise InputError(f"Unknown config key {where}{key}: {hint}")
    missing = [f.name for f in dataclasses.fields(kind) if f.name not in values and f.default is dataclasses.MISSING]
    require(not missing, f"The config lacks {where}{', '.join(missing)}.")
    converted = {key: _convert(types_of[key], value, where + key, root) for key, value in values.items()}
    paths = [f.name for f in dataclasses.fields(kind) if f.metadata.get("path") and f.name in converted]
    return kind(**converted | {name: expand_home(converted[name]) for name in paths})


def _near_keys(where: str, key: str, value: Any, root: type) -> list[str]:
    """The keys of all sections whose last part is nearest to a mistyped key; empty where none is near."""
    # A table can only be a mistyped section.
    known = [path for path, is_section in _keys(root) if is_section or not isinstance(value, Mapping)]
    near = difflib.get_close_matches(key, {path.rpartition(".")[2] for path in known}, n=1, cutoff=_NEAR)
    paths = [path for path in known if path.rpartition(".")[2] in near]
    return [path for path in paths if path == f"{where}{near[0]}"] or paths


def _keys(kind: type, where: str = "") -> list[tuple[str, bool]]:
    """The keys of a dataclass and of those in it, each with whether it is a section."""
    keys = []
    for name, hint in _types_of(kind).items():
        is_section = dataclasses.is_dataclass(hint)
        keys += [(where + name, is_section), *(_keys(hint, f"{where}{name}.") if is_section else ())]
    return keys


@functools.cache  # a manifest may list thousands of files
def _types_of(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values without the fields that are None, which TOML cannot write. `build` is the inverse."""
    values = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            values[f.name] = to_dict(value)
        elif value is not None:
            values[f.name] = list(value) if isinstance(value, tuple) else value
    return values


def identify(value: Any, where: str) -> Any:
    """Plain values, as JSON has them, by which a static part of a run is recognised when the run resumes.

    Args:
      value: a number, text, None, a tuple of such values, or a dataclass of them, which gives its class's name too.
      where: what it is, in the message.

    Raises:
      InputError: a part that cannot be told from another one, such as a function.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return [identify(item, f"{where}[{index}]") for index, item in enumerate(value)]
    require(
        dataclasses.is_dataclass(value) and not isinstance(value, type),
        f"A run that can be resumed writes down what its {where} is, and {short_repr(value)} cannot be written: put it "
        "into a dataclass with frozen=True, whose fields are numbers, strings, tuples or such dataclasses.",
    )
    fields = {f.name: identify(getattr(value, f.name), f"{where}.{f.name}") for f in dataclasses.fields(value)}
    return {"class": type(value).__qualname__, **fields}


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Lines "key: old -> new" for the fields that differ between two configs and that a resumed run may not change."""
    changes = []
    for f in dataclasses.fields(old):
        before, after = getattr(old, f.name), getattr(new, f.name)
        if dataclasses.is_dataclass(before) and type(before) is type(after):
            changes += differences(before, after, f"{where}{f.name}.")
        elif before != after and not f.metadata.get("may_change"):
            changes.append(f"{where}{f.name}: {before} -> {after}")
    return changes


def table_of(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The table of that name in a config's values; empty if there is none.

    Raises:
      InputError: the name stands for something other than a table.
    """
    table = values.get(name, {})
    require(isinstance(table, dict), f"Config key {name} must be a table: write [{name}], then its keys.")
    return table


def quoted(key: str, text: str | Path) -> str:
    """An override that sets a key to this text, in quotes, so that TOML does not read a text like 42 as a number."""
    return f"{key}={json.dumps(str(text), ensure_ascii=False)}"


def set_value(values: dict[str, Any], override: str) -> None:
    """Applies one override `section.key=value` to a config's values; what is not TOML is taken as a string."""
    path, separator, text = override.partition("=")
    require(bool(separator), f"--set takes section.key=value, not {override!r}.")
    *sections, key = path.strip().split(".")
    for section in sections:
        values[section] = dict(table_of(values, section))
        values = values[section]
    try:
        values[key] = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # not TOML, or more digits or brackets than Python reads
        values[key] = text


def _convert(kind: Any, value: Any, where: str, root: type) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        require(isinstance(value, Mapping), f"Config key {where} must be a table: write [{where}], then its keys.")
        return build(kind, value, where + ".", root)
    if origin is Literal:
        choices = " or ".join(map(repr, arguments))
        require(value in arguments, f"Config key {where} must be {choices}, not {short_repr(value)}.")
        return value
    if origin is tuple:
        require(isinstance(value, (list, tuple)), f"Config key {where} must be a list, not {short_repr(value)}.")
        return tuple(_convert(arguments[0], item, f"{where}[{i}]", root) for i, item in enumerate(value))
    if origin in (types.UnionType, typing.Union):  # `X | None`; it is a typing.Union if X is a Literal
        return None if value is None else _convert(arguments[0], value, where, root)
    if kind in (int, float) and type(value) is int:
        require(abs(value) < 2**63, f"Config key {where} must be a number of at most 63 bits, not {short_repr(value)}.")
        return kind(value)
    require(type(value) is kind, f"Config key {where} must be of type {kind.__name__}, not {short_repr(value)}.")
    if kind is float:
        # TOML and Python's JSON have NaN and infinity, and NaN can slip through a comparison with a bound.
        require(math.isfinite(value), f"Config key {where} must be a finite number, not {value}.")
    if kind is str:
        require(not _SURROGATE.search(value), f"Config key {where} must be text that UTF-8 can hold, not {value!r}.")
    return value
