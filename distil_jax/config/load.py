"""Configurations from TOML files: presets by name, and overrides `section.key=value`."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distil_jax.config.run import Config
from distil_jax.config.task import OPTIMIZER, SCHEDULE, FinetuneConfig
from distil_jax.schema import InputError, build, require, set_value, table_of, to_dict, user_path


def preset(path: str | Path, kind: str = "") -> Path:
    """The file itself, or the project's own config of that name (`distilbert_base_uncased`).

    Args:
      path: a file or a name.
      kind: a folder below `configs/`.
    """
    file = user_path(path)
    if file.exists() and not file.is_dir():  # folders may be named as a preset is
        return file
    here = Path(__file__).parents[1]
    folder = next(each for each in (here / "configs", here.parent / "configs") if each.is_dir()) / kind
    named = folder / f"{file}.toml"
    known = sorted(file.stem for file in folder.glob("*.toml"))
    require(named.exists(), f"There is no config {file}: name a TOML file, or one of {', '.join(known)}.")
    return named


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
      InputError: it cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Cannot read the config {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, or numbers and brackets beyond Python's limits
        raise InputError(f"{path} is not valid TOML: {error}.") from error


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a run's configuration from a TOML file.

    Args:
      path: a file, or the name of one of the project's configs; it names only what differs from the defaults.
      overrides: `section.key=value`, applied after the file; the value is read as TOML, or else as a string.

    Raises:
      InputError: no such file, not TOML, an unknown key (the nearest is named), a wrong type, values that exclude
        each other.
    """
    values = read_toml(preset(path))
    for override in overrides:
        set_value(values, override)
    # Without a teacher the terms that need one are off unless asked for, and then refused: the same file
    # with `teacher.path` removed is plain masked-LM training.
    if not table_of(values, "teacher").get("path"):
        values["loss"] = {"kl": 0.0, "cosine": 0.0} | table_of(values, "loss")
        values["student"] = {"init": "random"} | table_of(values, "student")
    resolve_schedule(values, overrides)
    if not {"steps", "epochs"} & table_of(values, "train").keys():
        values["train"] = {"epochs": 3.0} | table_of(values, "train")
    return build(Config, values)


def load_task(name: str | Path, overrides: Sequence[str] = ()) -> FinetuneConfig:
    """Reads a fine-tuning run's configuration.

    Args:
      name: a TOML file, or the name of one of the project's tasks (`sst2`).
      overrides: as for `config.load`.

    Raises:
      InputError: as `config.load`.
    """
    values = read_toml(preset(name, "tasks"))
    for override in overrides:
        set_value(values, override)
    resolve_schedule(values, overrides)
    given = table_of(values, "train")
    schedule = {"epochs": 0.0} if "steps" in given else {}  # one of the two says how long
    values["train"] = to_dict(SCHEDULE) | schedule | given
    values["optimizer"] = to_dict(OPTIMIZER) | table_of(values, "optimizer")
    # A teacher that is named is used: half of each, the published weights of task distillation.
    if table_of(values, "teacher").get("path"):
        values["loss"] = {"task": 0.5, "soft": 0.5} | table_of(values, "loss")
    return build(FinetuneConfig, values)


def resolve_schedule(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Lets an override of train.steps replace the file's train.epochs, and the other way round."""
    named, train = {override.partition("=")[0].strip() for override in overrides}, dict(table_of(values, "train"))
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if f"train.{one}" in named and f"train.{other}" not in named and train.get(one):
            train.pop(other, None)
    values["train"] = train
