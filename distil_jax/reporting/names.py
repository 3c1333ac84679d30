"""Names for what is shared: models, data and configurations without the places that they have on this machine."""

from __future__ import annotations

import re
from pathlib import Path, PurePath
from typing import Any

from distil_jax.config.run import EMBEDDED_TEACHER

_EMBEDDED_NAME = "distil_jax-teacher"
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_DATA_SETS = ("docstrings", "hub:")  # sources that are not paths


def short_name(path: str) -> str:
    """The name of a model: a hub id, or NAME of a folder NAME, NAME/model (of a run) or NAME/SEED/model (of compare).

    Of any other file or folder, it is the name without the folders that it is in.
    """
    parts = PurePath(path).parts
    if parts[-2:] == EMBEDDED_TEACHER.parts[-2:]:
        return _EMBEDDED_NAME
    if _HUB_ID.fullmatch(path) and not Path(path).exists():
        return path
    names = [part for part in parts if part not in ("model", "/", "..") and not part.isdigit()]
    return names[-1] if names else PurePath(path).name


def source_name(source: str) -> str:
    """The name of a source of text or examples: that of a file or folder, or the whole name of a data set."""
    return source if source.startswith(_DATA_SETS) else PurePath(source).name


def without_places(values: Any) -> Any:
    """Plain values, such as those of a config, with `short_name` in place of each absolute path."""
    if isinstance(values, dict):
        return {key: without_places(value) for key, value in values.items()}
    if isinstance(values, list):
        return [without_places(value) for value in values]
    is_place = isinstance(values, str) and PurePath(values).is_absolute()
    return short_name(values) if is_place else values
