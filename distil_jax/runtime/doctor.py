"""Checks of the machine, and of everything that a run needs."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from distil_jax.config.model import ModelConfig
from distil_jax.config.objective import MaskingConfig
from distil_jax.config.run import Config
from distil_jax.config.step import OptimizerConfig, StepConfig
from distil_jax.config.task import FinetuneConfig
from distil_jax.data.manifest import verify as verify_rows
from distil_jax.io.checkpoint import Checkpoints
from distil_jax.runtime import processes, run_folder
from distil_jax.runtime.guards import InUse, folder_lock
from distil_jax.schema import InputError
from distil_jax.structs import Rows
from distil_jax.training.state import init_state
from distil_jax.training.step import mask_and_train_step

_GIB = 2**30
_LONG = 2**28  # bytes of files: reading more is announced


def examine(folder: Path | None) -> None:
    """Checks the machine, and a run where one is named; prints a line for each check.

    Raises:
      InputError: something is wrong; its line says what to do.
    """
    checks: list[tuple[str, Callable[[], str]]] = [
        ("versions and devices", processes.environment),
        ("memory", _memory),
        ("a step on every device", _devices),
    ]
    if folder is not None:
        checks += _run_checks(folder)
    wrong = 0
    for name, check in checks:
        try:
            verdict, finding = "ok   ", check()
        except (InputError, OSError, jax.errors.JaxRuntimeError) as error:
            verdict, finding = "WRONG", " ".join(str(error).split())
            wrong += 1
        print(f"{verdict} {name}: {finding}", flush=True)
    if wrong:
        raise InputError(f"{wrong} of {len(checks)} checks found something wrong: see the lines that begin with WRONG.")
    print("Nothing is wrong." + ("" if folder else " To check a run too: distil-jax doctor RUN"))


def _memory() -> str:
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / _GIB
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices()]
    device = f", {min(limits) / _GIB:.1f} GiB on each device" if any(limits) else ""
    return f"{host:.1f} GiB free on the host{device}"


def _devices() -> str:
    """The same tiny training step on each device alone: all must find the same finite loss."""
    _announce("Compiling a small training step for each device")
    model = ModelConfig(vocab_size=128, num_layers=2, hidden_size=32, num_heads=2, intermediate_size=64)
    step = StepConfig(
        student=replace(model, num_layers=1, token_types=0),
        teacher=model,
        masking=MaskingConfig(mask_token_id=4),
        optimizer=OptimizerConfig(steps=10),
        targets_per_row=4,
    )
    ids_BxL = np.random.default_rng(0).integers(5, 128, (4, 16), np.int32)
    places_BxL = np.broadcast_to(np.arange(16, dtype=np.int32), ids_BxL.shape)
    rows = Rows(ids_BxL, np.ones_like(ids_BxL), places_BxL, np.arange(4, dtype=np.int32))
    weights = (np.arange(128) >= 5).astype(np.float32)
    key, initial, train = jax.random.key(0), jax.jit(init_state, static_argnums=1), jax.jit(mask_and_train_step)
    teacher = initial(key, replace(step, student=model)).params
    arguments = jax.device_get((initial(key, step), teacher, rows, weights))
    losses = []
    for device in jax.local_devices():
        _, metrics = train(*jax.device_put(arguments, device))
        losses.append(float(metrics["loss"].value()))
    if not np.all(np.isfinite(losses)) or max(losses) - min(losses) > 1e-2 * abs(losses[0]):
        raise InputError(f"the devices found the losses {losses}: take the odd one out of service.")
    return f"loss {losses[0]:.4f} on all {len(losses)}"


def _run_checks(folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    if not run_folder.is_run(folder):
        raise InputError(f"{folder} is no run folder: name one that `distil-jax train` made.")
    config = run_folder.read_config(folder)
    yield "configuration", lambda: f"{folder / 'config.toml'} is whole"
    yield "folder", lambda: _folder(folder)
    with contextlib.closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        steps = checkpoints.steps()
    if not steps:
        yield "checkpoints", lambda: "none yet: the run would begin at its first step"
    for step in steps:
        yield f"checkpoint {step}", lambda step=step: _checkpoint(folder, step)
    if isinstance(config, FinetuneConfig):
        yield "model", lambda: _model(config.model.path)
    else:
        yield "rows", lambda: _rows(config)
    if config.teacher.path:
        yield "teacher", lambda: _model(config.teacher.path)


def _folder(folder: Path) -> str:
    """Whether it can be written and renamed in, and has room; a run that is under way is left alone."""
    try:
        with folder_lock(folder):
            _try_to_write(folder)
        finding = f"written and renamed in {folder}"
    except InUse as running:
        finding = f"{folder} is in use: {running.by} trains in it now, so nothing was written"
    free = shutil.disk_usage(folder).free
    sizes = [_size(saved) for saved in (folder / "checkpoints").glob("[0-9]*")]
    if sizes and free < 2 * max(sizes):
        raise InputError(
            f"{free / _GIB:.2f} GiB are free and a checkpoint takes {max(sizes) / _GIB:.2f}: free some space."
        )
    return f"{finding}; {free / _GIB:.1f} GiB free"


def _size(folder: Path) -> int:
    """In bytes; 0 where the run that is under way has just removed it."""
    try:
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    except FileNotFoundError:
        return 0


def _announce(what: str) -> None:
    print(f"{what} ...", flush=True)


def _announce_reading(what: str, folder: Path) -> None:
    if (size := _size(folder)) > _LONG:
        _announce(f"Reading {what} ({size / _GIB:.1f} GiB)")


def _try_to_write(folder: Path) -> None:
    draft, final = folder / ".doctor-draft", folder / ".doctor"
    try:
        draft.write_bytes(b"x" * 2**20)
        draft.replace(final)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}): mend its disk or its rights.") from error
    finally:
        draft.unlink(missing_ok=True)
        final.unlink(missing_ok=True)


def _checkpoint(folder: Path, step: int) -> str:
    _announce_reading(f"checkpoint {step}", folder / "checkpoints" / str(step))
    with contextlib.closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        try:
            checkpoints.verify(step)
        except InputError as error:
            if step not in checkpoints.steps():
                return "gone since it was listed: the run that is under way keeps newer ones"
            raise InputError(f"{error} `distil-jax train` goes on from the newest valid one and keeps this.") from error
    return "every file as it was written"


def _rows(config: Config) -> str:
    _announce_reading(config.data.path, Path(config.data.path))
    manifest = verify_rows(config.data.path)
    return f"{manifest.train.rows:,} + {manifest.held_out.rows:,} rows in {config.data.path}, every file as written"


def _model(path: str) -> str:
    model = run_folder.open_model(path).config
    return f"{model.num_layers} x {model.hidden_size} in {path}"
