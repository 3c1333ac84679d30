"""A run, compiled for the machine: all that the loop needs to know of it, whatever its objective is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from distil_jax.config.run import ComputeConfig, Config, TrainConfig
from distil_jax.config.step import StepConfig
from distil_jax.config.task import FinetuneConfig
from distil_jax.data.loader import Table, batches, numbers_at
from distil_jax.models.encoder import count_parameters
from distil_jax.structs import Array
from distil_jax.training.sharding import local_places, put_rows, shard_count
from distil_jax.training.state import TrainState, init_state


@dataclass(frozen=True, eq=False)
class Program:
    """A run of any objective, compiled for the machine.

    Attributes:
      config: resolved, as it is written into the run's folder.
      step_config: what the step was compiled from.
      identity: hashes of what a resumed run must find again.
      tokenizer: the folder whose files stay with the run.
      data: what a checkpoint says of the examples.
      about: a line for people.
      mesh: of the devices.
      step: (state, teacher_params, batch, *others) -> (state, metrics).
      teacher_params: on the mesh, or None.
      others: what a step takes after the batch.
      batches: from the steps done so far, every following batch on the mesh.
      rows_of: the numbers of the rows that a step trains on.
      held_out: what the held-out examples say of a state; the function it is given is called with every batch.
      score: of these numbers; the lower the better.
      state_sharding: where a state lives.
      first_state: makes the one before the first step, there; once.
    """

    config: Config | FinetuneConfig
    step_config: StepConfig
    identity: dict[str, str]
    tokenizer: Path
    data: dict[str, Any]
    about: str
    mesh: Mesh
    step: Callable
    teacher_params: Any
    others: tuple[Any, ...]
    batches: Callable[[int], Iterator[Any]]
    rows_of: Callable[[int], list[int]]
    held_out: Callable[[TrainState, Callable[[], None]], dict[str, float]]
    score: Callable[[dict[str, Any]], float]
    state_sharding: Any
    first_state: FirstState


class FirstState:
    """Makes the state before a run's first step, where it will live, and lets the host's copy of the parameters go.

    Args:
      config: of the step.
      seed: for random parameters, and for every mask and dropout to come.
      params: the student's first parameters; None: random ones.
      sharding: of the state.
    """

    def __init__(self, config: StepConfig, seed: int, params: Any, sharding: Any) -> None:
        self._seed, self._config, self._params, self._sharding = np.uint32(seed), config, params, sharding

    def __call__(self) -> TrainState:
        params = self._params
        self.drop()
        return jax.jit(_seeded_state, static_argnums=1, out_shardings=self._sharding)(self._seed, self._config, params)

    def drop(self) -> None:
        """Lets the parameters go: nobody will ask for the state, because the run goes on from a later one."""
        del self._params


def _seeded_state(seed: Array, config: StepConfig, params: Any) -> TrainState:
    return init_state(jax.random.key(seed), config, params=params)


def keep_compiled(compute: ComputeConfig, workdir: Path) -> None:
    """A run that is started again does not compile again; JAX's own setting, where there is one, goes before."""
    cache = compute.cache
    if cache == "auto":
        cache = "" if jax.default_backend() == "cpu" else str(workdir / "compiled")
    if cache and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", cache)


def batches_on(
    mesh: Mesh, open_table: Callable[[], Table], config: Config | FinetuneConfig
) -> Callable[[int], Iterator[Any]]:
    """A program's `batches`: what this process has of them read from a table, and put on the mesh."""
    batch_rows = config.train.batch_rows

    def after(step: int) -> Iterator[Any]:
        places = local_places(mesh, batch_rows)
        cut = batches(open_table(), batch_rows=batch_rows, seed=config.seed, position=step * batch_rows, places=places)
        return (put_rows(rows, mesh, batch_rows=batch_rows) for rows in cut)

    return after


def rows_of(open_table: Callable[[], Table], batch_rows: int, seed: int, step: int) -> list[int]:
    """The numbers of the rows that a step trains on."""
    return numbers_at(open_table(), (step - 1) * batch_rows, batch_rows, seed=seed).tolist()


def about_models(step: StepConfig, attention: str) -> str:
    """The models and the machine, for people."""
    student = f"student {step.student.num_layers} x {step.student.hidden_size}"
    parameters = f"{count_parameters(step.student):,} parameters"
    teacher = f", teacher {step.teacher.num_layers} x {step.teacher.hidden_size}" if step.teacher else ""
    devices = f"{jax.device_count()} {jax.devices()[0].device_kind} device(s), {step.student.dtype}"
    return f"{student} ({parameters}){teacher}; {devices}; {attention}"


def about_pieces(train: TrainConfig, step: StepConfig, mesh: Mesh, length: int) -> str:
    """Where a device has more tokens at a time than `train.tokens_per_device` asks for, that and why; else nothing."""
    rows = train.batch_rows // shard_count(mesh) // step.accumulation
    if rows * length <= train.tokens_per_device:
        return ""
    why = f"train.accumulation is {train.accumulation}" if train.accumulation else "a row is the least"
    return f"; {rows * length:,} tokens of a device at a time, above train.tokens_per_device, because {why}"
