"""A compiled run: everything the training loop needs to know of it, whatever its objective."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from distil_jax.config.run import ComputeConfig, Config, TrainConfig
from distil_jax.config.step import StepConfig
from distil_jax.config.task import FinetuneConfig
from distil_jax.data.loader import Table, batches, indices_at
from distil_jax.models.encoder import count_parameters
from distil_jax.structs import Array
from distil_jax.training.sharding import local_places, put_rows, shard_count
from distil_jax.training.state import TrainState, init_state

_FEW_STEPS = 100


class Evaluator(Protocol):
    """Judges a state on held-out examples."""

    def evaluate(self, state: TrainState, before_batch: Callable[[int], None]) -> dict[str, float]:
        """The metrics of a state; calls `before_batch` with the length of the rows of every batch."""

    def criterion(self, metrics: Mapping[str, Any]) -> float:
        """What evaluations are compared by, from their metrics: the lower the better."""


@dataclass(frozen=True, eq=False)
class Reference:
    """What the evaluations of a run are read against; it is judged once, beside the state before the first step.

    Attributes:
      kind: of its line in metrics.jsonl, "teacher" or "largest_class".
      title: what it is called on the screen.
      evaluate: (state, before_batch) -> its metrics, as an `Evaluator` gives them; empty if it has none.
    """

    kind: str
    title: str
    evaluate: Callable[[TrainState, Callable[[int], None]], dict[str, float]]


@dataclass(frozen=True, eq=False)
class Program:
    """A run of any objective, compiled for this machine.

    Attributes:
      config: resolved, as it is written into the run's folder.
      step_config: what the step was compiled from.
      identity: hashes of what a resumed run must find again.
      tokenizer: the folder whose files stay with the run.
      data: what a checkpoint's metadata says of the examples.
      description: printed when the run starts.
      warnings: printed after it, each on a line that begins with "Warning:".
      mesh: of the devices.
      step: (state, teacher_params, batch, *step_arguments) -> (state, metrics).
      teacher_params: on the mesh, or None.
      step_arguments: what a step takes after the batch.
      stream: the batches.
      evaluator: judges a state.
      first_state: makes the state before the first step, once.
      reference: what its evaluations are read against, or None.
      held_out_note: printed after the first evaluation, if there is something to say.
    """

    config: Config | FinetuneConfig
    step_config: StepConfig
    identity: dict[str, str]
    tokenizer: Path
    data: dict[str, Any]
    description: str
    warnings: tuple[str, ...]
    mesh: Mesh
    step: Callable
    teacher_params: Any
    step_arguments: tuple[Any, ...]
    stream: BatchStream
    evaluator: Evaluator
    first_state: FirstState
    reference: Reference | None = None
    held_out_note: str = ""


@dataclass(frozen=True)
class BatchStream:
    """The batches of a run, without end.

    Attributes:
      open_table: opens the examples to train on.
      mesh: where the batches go.
      batch_rows: rows of a global batch.
      seed: of their order.
    """

    open_table: Callable[[], Table]
    mesh: Mesh
    batch_rows: int
    seed: int

    def batches(self, step: int) -> Iterator[Any]:
        """What this process holds of every batch after so many steps, on the mesh."""
        places, position = local_places(self.mesh, self.batch_rows), step * self.batch_rows
        rows = batches(self.open_table(), batch_rows=self.batch_rows, seed=self.seed, position=position, places=places)
        return (put_rows(batch, self.mesh, batch_rows=self.batch_rows) for batch in rows)

    def row_indices(self, step: int) -> list[int]:
        """The indices of the rows that a step trains on."""
        start = (step - 1) * self.batch_rows
        return indices_at(self.open_table(), start, self.batch_rows, seed=self.seed).tolist()


class FirstState:
    """Makes the state before the first step on its devices, and frees the host's copy of the parameters.

    Args:
      config: of the step.
      seed: for random parameters, and for every mask and dropout to come.
      params: the student's initial parameters; None: random ones.
      sharding: of the state.
    """

    def __init__(self, config: StepConfig, seed: int, params: Any, sharding: Any) -> None:
        self._seed, self._config, self._params, self.sharding = np.uint32(seed), config, params, sharding

    def __call__(self) -> TrainState:
        params = self._params
        self.drop()
        return jax.jit(_seeded_state, static_argnums=1, out_shardings=self.sharding)(self._seed, self._config, params)

    def drop(self) -> None:
        """Frees the parameters without making the state: the run resumes from a later one."""
        del self._params


def _seeded_state(seed: Array, config: StepConfig, params: Any) -> TrainState:
    return init_state(jax.random.key(seed), config, params=params)


def keep_compiled(compute: ComputeConfig, workdir: Path) -> None:
    """Sets JAX's compilation cache, so that a resumed run does not compile again; JAX's own setting wins."""
    cache = compute.cache
    if cache == "auto":
        cache = "" if jax.default_backend() == "cpu" else str(workdir / "compiled")
    if cache and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", cache)


def describe_models(step: StepConfig, attention: str) -> str:
    """A line about the models and the machine."""
    student = f"student {step.student.num_layers} x {step.student.hidden_size}"
    parameters = f"{count_parameters(step.student):,} parameters"
    teacher = f", teacher {_describe_teacher(step)}" if step.teacher else ""
    devices = f"{jax.device_count()} {jax.devices()[0].device_kind} device(s), {step.student.dtype}"
    own = {"objective": step.objective, "optimizer": step.optimizer if step.has_own_optimizer else None}
    named = "".join(f", {name} {type(part).__name__}" for name, part in own.items() if part is not None)
    return f"{student} ({parameters}){teacher}{named}; {devices}; {attention}"


def _describe_teacher(step: StepConfig) -> str:
    if step.teacher_model is None:
        return getattr(step.teacher, "__name__", type(step.teacher).__name__)
    return f"{step.teacher.num_layers} x {step.teacher.hidden_size}"


def warn_of_few_steps(train: TrainConfig) -> tuple[str, ...]:
    """A warning if the run is too short to learn much; otherwise nothing."""
    if train.steps >= _FEW_STEPS:
        return ()
    return (
        f"in {train.steps:,} steps little is learned: for more of them set train.batch_rows lower (it is "
        f"{train.batch_rows:,}), or train.epochs or train.steps higher.",
    )


def describe_micro_batches(train: TrainConfig, step: StepConfig, mesh: Mesh, length: int) -> str:
    """A warning with its reason if micro-batches exceed `train.tokens_per_device`; otherwise nothing."""
    rows = train.batch_rows // shard_count(mesh) // step.accumulation
    if rows * length <= train.tokens_per_device:
        return ""
    why = f"train.accumulation is {train.accumulation}" if train.accumulation else "a row is the least"
    return f"; {rows * length:,} tokens of a device at a time, above train.tokens_per_device, because {why}"
