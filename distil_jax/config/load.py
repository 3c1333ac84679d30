"""Reads configurations from TOML files, or from the project's own ones by name, and applies `section.key=value`."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distil_jax.config.run import Config
from distil_jax.config.task import OPTIMIZER, SCHEDULE, FinetuneConfig
from distil_jax.schema import InputError, build, require, set_value, table_of, to_dict, user_path


def preset(path: str | Path, kind: str = "") -> Path:
    """The path of a TOML file, given as that path or as the name of one of the project's configs.

    Args:
      path: a file, or a name such as `distilbert_base_uncased`.
      kind: the folder below `configs/` in which names are looked up.

    Raises:
      InputError: there is neither such a file nor such a config.
    """
    file = user_path(path)
    if file.exists() and not file.is_dir():  # a folder may happen to have the name of a preset
        return file
    package = Path(__file__).parents[1]  # where the configs are when installed; in a checkout they are beside it
    folder = next(parent / "configs" for parent in (package, package.parent) if (parent / "configs").is_dir()) / kind
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
    except (ValueError, RecursionError) as error:  # not TOML or UTF-8, or more digits or brackets than Python reads
        raise InputError(f"{path} is not valid TOML: {error}.") from error


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a run's configuration from a TOML file.

    Args:
      path: a file, or the name of one of the project's configs; it holds only what differs from the defaults.
      overrides: `section.key=value`, applied after the file. A value that is not TOML is taken as a string.

    Raises:
      InputError: no such file, not TOML, an unknown key (the message names the nearest one), a wrong type, or values
        that exclude each other.
    """
    values = read_toml(preset(path))
    for override in overrides:
        set_value(values, override)
    # Without a teacher, the loss terms that need one default to 0. So a file whose `teacher.path` is removed is one of
    # plain masked-LM training. If the file sets such a term itself, `Config` refuses it.
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
    schedule = {"epochs": 0.0} if "steps" in given else {}  # only one of the two may set the length of the run
    values["train"] = to_dict(SCHEDULE) | schedule | given
    values["optimizer"] = to_dict(OPTIMIZER) | table_of(values, "optimizer")
    # With a teacher, labels and teacher weigh 0.5 each by default: the published weights of task distillation.
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
