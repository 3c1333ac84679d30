"""Reads configurations from TOML files, run folders, or the project's own ones by name; applies `section.key=value`."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distil_jax.config.run import Config
from distil_jax.config.task import OPTIMIZER, SCHEDULE, FinetuneConfig
from distil_jax.schema import InputError, build, require, set_value, table_of, to_dict, user_path

RUN_CONFIG = "config.toml"  # in a run folder: the run's configuration, every choice written out


def presets(kind: str = "") -> dict[str, Path]:
    """The project's own configs, by name; `kind` is a folder below `configs/`."""
    package = Path(__file__).parents[1]  # where the configs are when installed; in a checkout they are beside it
    folder = next(parent / "configs" for parent in (package, package.parent) if (parent / "configs").is_dir()) / kind
    return {file.stem: file for file in sorted(folder.glob("*.toml"))}


def preset(path: str | Path, kind: str = "") -> Path:
    """The path of a TOML file, given as that path, as a run folder, or as the name of one of the project's configs.

    Args:
      path: a file, a run folder (its config.toml is meant), or a name such as `distilbert_base_uncased`.
      kind: the folder below `configs/` in which names are looked up.

    Raises:
      InputError: there is neither such a file nor such a config.
    """
    file = user_path(path)
    if (file / RUN_CONFIG).is_file():
        return file / RUN_CONFIG
    if file.exists() and not file.is_dir():  # another folder may happen to have the name of a preset
        return file
    known = presets(kind)
    require(
        str(file) in known,
        f"There is no config {file}: name a TOML file, a run folder, or one of {', '.join(known)}.",
    )
    return known[str(file)]


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
      path: a file, or the name of one of the project's configs; it holds only what differs from the defaults. Or a run
        folder, whose configuration is meant.
      overrides: `section.key=value`, applied after the file. A value that is not TOML is taken as a string.

    Raises:
      InputError: no such file, not TOML, an unknown key (the message names the nearest one), a wrong type, values that
        exclude each other, or the configuration of a fine-tuning.
    """
    values = _read(path, "", overrides)
    require(
        "task" not in values,
        f"{path} configures a fine-tuning: go on with `distil-jax finetune MODEL --task {path}`, and for a run folder "
        "add `--output` with the same folder.",
    )
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
      name: a TOML file, the name of one of the project's tasks (`sst2`), or the run folder of a fine-tuning.
      overrides: as for `config.load`.

    Raises:
      InputError: as `config.load`.
    """
    values = _read(name, "tasks", overrides)
    resolve_schedule(values, overrides)
    given = table_of(values, "train")
    schedule = {"epochs": 0.0} if "steps" in given else {}  # only one of the two may set the length of the run
    values["train"] = to_dict(SCHEDULE) | schedule | given
    values["optimizer"] = to_dict(OPTIMIZER) | table_of(values, "optimizer")
    # With a teacher, labels and teacher weigh 0.5 each by default: the published weights of task distillation.
    if table_of(values, "teacher").get("path"):
        values["loss"] = {"task": 0.5, "soft": 0.5} | table_of(values, "loss")
    return build(FinetuneConfig, values)


def without_old_keys(values: dict[str, Any]) -> dict[str, Any]:
    """A run's values without a key that earlier versions wrote and never read: it follows from masking."""
    loss = {name: value for name, value in table_of(values, "loss").items() if name != "targets_per_row"}
    return values | {"loss": loss}


def _read(path: str | Path, kind: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The values of a config with its overrides. Of a run's, what followed from its other choices may follow anew."""
    file, folder = preset(path, kind), user_path(path)
    values = read_toml(file)
    of_run = file == folder / RUN_CONFIG
    if of_run:
        values = without_old_keys(values)
        train, optimizer = table_of(values, "train"), table_of(values, "optimizer")
        if optimizer.get("steps") == train.get("steps"):  # the schedule is as long as the run
            values["optimizer"] = optimizer | {"steps": 0}
    before = table_of(values, "student").get("init")
    for override in overrides:
        set_value(values, override)
    student, named = table_of(values, "student"), _named(overrides)
    if of_run and student.get("init") not in (before, "teacher"):  # then nothing is copied from the teacher
        copied = [name for name in ("layers", "fold_token_types") if f"student.{name}" not in named]
        values["student"] = {name: value for name, value in student.items() if name not in copied}
    return values


def _named(overrides: Sequence[str]) -> set[str]:
    return {override.partition("=")[0].strip() for override in overrides}


def resolve_schedule(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Lets an override of train.steps replace the file's train.epochs, and the other way round."""
    named, train = _named(overrides), dict(table_of(values, "train"))
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if f"train.{one}" in named and f"train.{other}" not in named and train.get(one):
            train.pop(other, None)
    values["train"] = train
