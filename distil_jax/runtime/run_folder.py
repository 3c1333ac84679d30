"""A run's folder: config.toml, metrics.jsonl, checkpoints/, tokenizer/, tensorboard/, report.md."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import tomli_w

from distil_jax import __version__
from distil_jax.config.load import RUN_CONFIG, read_toml, without_old_keys
from distil_jax.config.model import HeadConfig, ModelConfig
from distil_jax.config.run import Config, StudentConfig
from distil_jax.config.step import StepConfig
from distil_jax.config.task import FinetuneConfig
from distil_jax.files import copy_tokenizer, write_whole
from distil_jax.io import huggingface
from distil_jax.io.checkpoint import Checkpoints
from distil_jax.io.tensors import local_folder, read_json
from distil_jax.models.heads import abstract_model
from distil_jax.runtime import processes
from distil_jax.runtime.divergence import Divergence
from distil_jax.runtime.program import Program
from distil_jax.schema import InputError, build, differences, identify, require, to_dict, user_path
from distil_jax.training.state import TrainState, init_state

_CUSTOM = "custom.json"  # in a run folder: the `custom_parts` of a run that has some


@dataclass(frozen=True, eq=False)
class Model:
    """A model that a command works with, from a run or a model folder.

    Attributes:
      config, params: as `huggingface.load` (or, of a task, `load_task`) returns them.
      tokenizer: the folder with its tokenizer files.
      head: the task's, or None for a language model.
      run: the run folder it was read from, or None for a model folder.
      step: the checkpoint's, or None.
      metadata: what was saved beside the checkpoint, or None.
    """

    config: ModelConfig
    params: Any
    tokenizer: Path
    head: HeadConfig | None = None
    run: Path | None = None
    step: int | None = None
    metadata: dict[str, Any] | None = None

    @property
    def run_config(self) -> Config | FinetuneConfig:
        return config_from(self.metadata["config"])


def is_run(folder: Path) -> bool:
    """Whether the folder is a run's."""
    return (folder / RUN_CONFIG).exists() and (folder / "tokenizer").is_dir()


def check_folder(folder: Path, program: Program | None = None) -> None:
    """Refuses a folder that the run cannot use; writes nothing.

    Args:
      folder: of the run.
      program: of the run, once it is compiled.

    Raises:
      InputError: a file, a folder with other contents, or a run with another configuration, data or teacher.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: name a folder for the run.")
    # Left behind by a run that was killed while it started.
    begun = {"tokenizer", ".config.toml", ".lock", "compiled", _CUSTOM, f".{_CUSTOM}"}
    if folder.is_dir() and not is_run(folder) and {path.name for path in folder.iterdir()} - begun:
        raise InputError(f"{folder} holds something other than a run: name a new folder; nothing was changed.")
    if program is None:
        return
    custom = custom_parts(program.step_config)
    if not is_run(folder):
        return
    before, newest = read_config(folder), _newest_metadata(folder)
    if type(before) is not type(program.config):
        raise InputError(f"{folder} holds a run of another command: name a new folder; nothing was changed.")
    if isinstance(before, Config):
        before = replace(before, student=_student(before.student, program, newest))
    steps = program.config.train.steps
    if before.train.steps != steps:  # a run may become longer or shorter, and its schedule with it
        schedule = replace(before.optimizer, steps=program.config.optimizer.steps)
        before = replace(before, train=replace(before.train, steps=steps), optimizer=schedule)
    changed = differences(before, program.config)
    saved = newest.get("custom", {}) if newest else own_parts_of(folder)
    changed += [
        f"{name}: {saved.get(name, 'as configured')} -> {custom.get(name, 'as configured')}"
        for name in sorted(saved.keys() | custom.keys())
        if saved.get(name) != custom.get(name)
    ]
    if changed:
        way_on = _way_on(folder, before, own_parts=bool(saved))
        raise InputError(f"{folder} holds a run with another configuration ({'; '.join(changed)}): {way_on}")
    identity = newest["identity"] if newest else program.identity
    for name in identity | program.identity:
        if identity.get(name) != program.identity.get(name):
            what = {"rows": "prepared rows", "examples": "examples", "teacher": "teacher weights", "model": "weights"}
            raise InputError(
                f"The run was started with other {what[name]}: point the config at the ones it began with, or start a "
                "new run folder."
            )


def _way_on(folder: Path, config: Config | FinetuneConfig, *, own_parts: bool) -> str:
    """What somebody can do who wants to go on with a run, or to go on from it in another way."""
    if own_parts:
        return "go on with it from Python, with equal parts of your own, or name a new folder."
    new = "name a new folder with --output"
    if isinstance(config, FinetuneConfig):
        return f"give it the same one to go on (`--task {folder}`), or {new}; {folder} can be the MODEL to begin with."
    return (
        f"`distil-jax train {folder}` goes on with it as it is; to begin a changed run with its student, {new} and add "
        f"--set student.init={folder} (leave that out to begin anew)."
    )


def custom_parts(step: StepConfig) -> dict[str, Any]:
    """The parts of a step that its user wrote, as plain values: class and fields of objective, optimiser and teacher.

    Raises:
      InputError: one of them cannot be written down, so a resumed run could not tell it from another.
    """
    parts = {"objective": step.objective}
    if step.has_own_optimizer:
        parts["optimizer"] = step.optimizer
    if step.teacher_model is None:
        parts["teacher"] = step.teacher
    return {name: identify(part, name) for name, part in parts.items() if part is not None}


def own_parts_of(folder: Path) -> dict[str, Any]:
    """The `custom_parts` that a run was started with; empty for a run of the published recipe."""
    file = folder / _CUSTOM
    return read_json(file) if file.exists() else {}


def check_no_own_parts(folder: Path) -> None:
    """Refuses a run with parts of its user's own where these cannot be given, as on the command line.

    Raises:
      InputError: it has some.
    """
    parts = own_parts_of(folder)
    require(
        not parts,
        f"{folder} is a run with parts of its user's own ({', '.join(sorted(parts))}), which the command line does not "
        "know: go on with it from Python (`distil_jax.workflows`), with equal parts.",
    )


def _newest_metadata(folder: Path) -> dict[str, Any] | None:
    """The metadata of the newest readable checkpoint; None without one."""
    if not (folder / "checkpoints").is_dir():
        return None
    with contextlib.closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        for step in reversed(checkpoints.steps()):
            with contextlib.suppress(InputError):  # a damaged one is reported when it is restored
                return checkpoints.metadata(step)
    return None


def _student(written: StudentConfig, program: Program, newest: dict[str, Any] | None) -> StudentConfig:
    """A student's config as this version resolves it: older versions left its shape open, or wrote a wrong one.

    Checkpoints have always had the right shape. Without one, nothing is trained yet that could have another.
    """
    models = program.step_config
    if newest is None:
        return written.resolved(models.student, models.teacher_model)
    teacher = build(ModelConfig, newest["teacher"]) if newest["teacher"] else None
    return written.resolved(build(ModelConfig, newest["student"]), teacher)


def read_config(folder: Path) -> Config | FinetuneConfig:
    """The resolved configuration of a run."""
    return config_from(read_toml(folder / RUN_CONFIG))


def config_from(values: dict[str, Any]) -> Config | FinetuneConfig:
    """A resolved configuration from its plain values."""
    return build(FinetuneConfig if "task" in values else Config, without_old_keys(values))


def prepare_folder(folder: Path, program: Program) -> None:
    """Writes the tokenizer and config.toml into the folder of a new or resumed run.

    Raises:
      InputError: it cannot be written.
    """
    try:
        # Kept with the run, so that it can be exported when the data is gone.
        (folder / "tokenizer").mkdir(exist_ok=True)
        copy_tokenizer(program.tokenizer, folder / "tokenizer")
        # Before config.toml, which makes a folder a run: it must never be taken for one of the published recipe.
        if custom := custom_parts(program.step_config):
            write_whole(folder / _CUSTOM, json.dumps(custom, indent=1) + "\n")
        write_whole(folder / RUN_CONFIG, tomli_w.dumps(to_dict(program.config)))
    except OSError as error:
        raise InputError(f"Cannot write the run folder {folder}: {error.strerror or error}.") from error


def checkpoint_metadata(program: Program, step: int, divergence: Divergence) -> dict[str, Any]:
    """The metadata of a checkpoint. `position`, the rows consumed so far, is all the state that the data has.

    Checkpoints from before 2026-11-26 lack `divergence`, the memory of the divergence watch, and those from before
    2026-11-28 `custom`.
    """
    models = program.step_config
    return {
        "version": __version__,
        "position": step * program.config.train.batch_rows,
        "divergence": divergence.memory,
        "identity": program.identity,
        "config": to_dict(program.config),
        "student": to_dict(models.student),
        "teacher": to_dict(models.teacher) if models.teacher_model else None,
        "custom": custom_parts(models),
        "head": to_dict(models.head) if models.head else None,
        "data": program.data,
    }


def state_arrays(state: TrainState) -> dict[str, Any]:
    """The arrays of a state, which a checkpoint holds; its static config is left out."""
    return {name: getattr(state, name) for name in ("step", "skipped", "params", "opt_state", "key")}


def restore(checkpoints: Checkpoints, step: int, config: StepConfig, shardings: Any) -> TrainState:
    """Restores the state of `step`; `shardings` (of a state) may belong to any mesh."""
    abstract = _laid_out(jax.eval_shape(partial(init_state, config=config), jax.random.key(0)), shardings)
    return abstract.replace(**checkpoints.restore(step, state_arrays(abstract)))


def restore_params(
    checkpoints: Checkpoints, step: int, model: ModelConfig, head: HeadConfig | None, shardings: Any = None
) -> Any:
    """Restores the parameters of `step` without the optimiser's moments, which are twice as large.

    Args:
      model, head: the architecture that was trained.
      shardings: of the parameters; None: all of them on this process's first device.
    """
    shapes = nn.unbox(abstract_model(model, head))
    if shardings is None:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: here, shapes)
    return checkpoints.restore(step, {"params": _laid_out(shapes, shardings)}, partial=True)["params"]


def _laid_out(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def choose_checkpoint(checkpoints: Checkpoints, step: int | None) -> int | None:
    """Step of the checkpoint to use: `step`, or the newest valid one; None without any. Reports damaged ones.

    Raises:
      InputError: `step` is missing or damaged, or every checkpoint is damaged.
    """
    if step is not None:
        saved = checkpoints.steps()
        known = f"only of the steps {saved}" if saved else "and none is saved yet"
        require(step in saved, f"There is no checkpoint of step {step}, {known}.")
        processes.refuse_together(lambda: checkpoints.verify(step) if processes.is_first() else None)
        return step
    return _report(*checkpoints.newest_valid())


def choose_best_checkpoint(checkpoints: Checkpoints) -> int | None:
    """Step of the valid checkpoint with the best criterion, or the newest if none has one. Reports damaged ones.

    Raises:
      InputError: every checkpoint is damaged.
    """
    best, problems = checkpoints.best_valid()
    return _report(choose_checkpoint(checkpoints, None) if best is None else best, problems)


def _report(step: int | None, problems: list[str]) -> int | None:
    for problem in problems:
        print(f"{problem} The one of step {step} is taken.", file=sys.stderr, flush=True)
    return step


def open_model(path: str | Path, step: int | None = None) -> Model:
    """The model of a run folder or of a model folder, with a task's head or without.

    Args:
      path: the folder; a run's newest checkpoint is taken, or a fine-tuning's best.
      step: take this checkpoint of a run instead.

    Raises:
      InputError: neither kind of folder, or no such checkpoint.
    """
    folder = user_path(path)
    if not is_run(folder):
        if step is not None:
            raise InputError(f"{path} is not a run, so it has no checkpoint of step {step}: leave --step out.")
        folder = local_folder(path)
        if huggingface.has_task(folder):
            config, head, params = huggingface.load_task(folder)
            return Model(config, params, tokenizer=folder, head=head)
        config, params = huggingface.load(folder)
        return Model(config, params, tokenizer=folder)
    with contextlib.closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        tuned = isinstance(read_config(folder), FinetuneConfig)
        step = choose_best_checkpoint(checkpoints) if tuned and step is None else choose_checkpoint(checkpoints, step)
        if step is None:
            raise InputError(f"{folder} has no checkpoint yet: let it train for longer.")
        metadata = checkpoints.metadata(step)
        # The attention was chosen for the machine that trained it; whoever runs it now chooses again.
        student = replace(build(ModelConfig, metadata["student"]), attention="xla")
        head = build(HeadConfig, metadata["head"]) if metadata.get("head") else None
        params = jax.device_get(restore_params(checkpoints, step, student, head))
    return Model(student, params, folder / "tokenizer", head=head, run=folder, step=step, metadata=metadata)
