"""Names for what is shared: models, data and configurations without the places that they have on this machine."""

from __future__ import annotations

import re
from pathlib import Path, PurePath
from typing import Any

from distil_jax.config.run import EMBEDDED_TEACHER

_EMBEDDED_NAME = "distil_jax-teacher"
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


def short_name(path: str) -> str:
    """The name of a model: a hub id, or NAME of a folder NAME, NAME/model (of a run) or NAME/SEED/model (of compare).

    Of any other file or folder, it is the name without the folders that it is in.
    """
    parts = PurePath(path).parts
    if parts[-2:] == EMBEDDED_TEACHER.parts[-2:]:
        return _EMBEDDED_NAME
    if _HUB_ID.fullmatch(path) and not Path(path).exists():
        return path
    names = [part for part in parts if part not in ("/", "..")]
    if len(names) > 1 and names[-1] == "model":
        names.pop()
        if len(names) > 1 and names[-1].isdigit():
            names.pop()
    return names[-1] if names else ""


def source_name(source: str) -> str:
    """The name of a source of text or examples: that of a file or folder, or all of `hub:NAME[:CONFIG[:SPLIT]]`.

    NAME may be a folder too.
    """
    if not source.startswith("hub:"):
        return PurePath(source).name
    name, separator, rest = source.removeprefix("hub:").partition(":")
    return f"hub:{PurePath(name).name if PurePath(name).is_absolute() else name}{separator}{rest}"


def without_places(values: Any) -> Any:
    """Plain values, such as those of a config, with a name in place of each absolute path."""
    if isinstance(values, dict):
        return {key: without_places(value) for key, value in values.items()}
    if isinstance(values, list):
        return [without_places(value) for value in values]
    if isinstance(values, str) and PurePath(values).is_absolute():
        return short_name(values)
    return source_name(values) if isinstance(values, str) and values.startswith("hub:") else values
