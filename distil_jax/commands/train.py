"""`distil-jax train`: from a config to a trained student in a run folder; started again, it goes on."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tomli_w
from jax.experimental import multihost_utils

from distil_jax.commands import processes, run_folder
from distil_jax.commands.assemble import Parts, assemble, teacher_shapes
from distil_jax.commands.evaluate import held_out_numbers
from distil_jax.commands.progress import Diverged, Progress, Stopped
from distil_jax.config import Config, TrainConfig, load
from distil_jax.data.loader import batches, prefetch
from distil_jax.io.checkpoint import Checkpoints
from distil_jax.io.metrics import MetricsWriter, last_held_out, read_metrics
from distil_jax.models.encoder import count_parameters
from distil_jax.schema import to_dict
from distil_jax.structs import Rows
from distil_jax.training.sharding import (
    jit_eval,
    jit_step,
    local_places,
    make_mesh,
    put_params,
    put_rows,
    shardings_of,
)
from distil_jax.training.state import TrainState, abstract_state, init_state
from distil_jax.training.step import mask_and_eval_step, mask_and_train_step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `distil-jax train`."""
    parser.add_argument("config", help="a TOML file; see configs/")
    parser.add_argument("--output", metavar="FOLDER", help="the run folder (default: runs/NAME_OF_CONFIG)")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="override a config key: --set train.steps=100"
    )
    parser.add_argument("--print-config", action="store_true", help="print the whole configuration and stop")


def run(arguments: argparse.Namespace) -> None:
    """Trains, or prints the configuration that would be used."""
    config = load(arguments.config, arguments.set)
    if arguments.print_config:
        print(tomli_w.dumps(to_dict(config)), end="")
        return
    processes.connect()
    output = Path(arguments.output or Path("runs") / Path(arguments.config).stem)
    with contextlib.ExitStack() as stack:
        if not processes.is_first():  # one process speaks for all; errors still go to everybody's stderr
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        print(processes.environment(), flush=True)
        _keep_compiled(config.compute.cache, output)
        train(config, output)
        print(f"Done. The run is in {output}. Next: distil-jax export {output} MODEL_FOLDER")


def _keep_compiled(cache: str, output: Path) -> None:
    """A run that is started again does not compile again; JAX's own setting, where there is one, goes before."""
    if cache == "auto":
        cache = "" if jax.default_backend() == "cpu" else str(output / "compiled")
    if cache and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", cache)


@dataclass(frozen=True, eq=False)
class Program:
    """A run, compiled for the machine: the mesh, the step, the evaluation, and where its state lives."""

    parts: Parts
    mesh: jax.sharding.Mesh
    step: Callable
    eval_step: Callable
    state_sharding: Any
    teacher_params: Any

    def held_out(self, state: TrainState) -> dict[str, float]:
        config = self.parts.config.train
        return held_out_numbers(
            self.eval_step,
            state,
            self.teacher_params,
            self.parts.rows("held_out"),
            self.parts.held_out_weights,
            mesh=self.mesh,
            batch_rows=config.batch_rows // self.parts.step.accumulation,
            limit=config.eval_rows,
        )


def train(config: Config, workdir: str | Path) -> dict[str, float]:
    """Trains a student, or goes on with the run that `workdir` holds.

    Args:
      config: of the run; where the folder holds one already, only what changes no number may differ.
      workdir: gets config.toml, metrics.jsonl, checkpoints/ and tensorboard/.

    Returns:
      The held-out numbers of the finished student.

    Raises:
      InputError: bad input; nothing was written.
      Stopped: SIGTERM or Ctrl-C; a checkpoint was saved.
      Diverged: the loss is not finite; the last checkpoint is from before.
    """
    workdir = Path(workdir)
    program = processes.together(lambda: _ready(config, workdir))  # nobody writes before everybody has looked
    parts = program.parts
    processes.agree(f"{parts.step} {parts.identity}")
    processes.together(lambda: run_folder.begin(workdir, parts) if processes.is_first() else None)
    with contextlib.closing(Checkpoints(workdir / "checkpoints", keep=config.train.keep_checkpoints)) as checkpoints:
        state = _begin(program, checkpoints)
        step = int(state.step)
        _announce(program, workdir, step)
        writer = MetricsWriter(workdir, step=step, tensorboard=config.train.tensorboard, enabled=processes.is_first())
        processes.meet("the metrics are as of this step")
        with contextlib.closing(writer):
            return _loop(program, state, checkpoints, writer)


def _ready(config: Config, workdir: Path) -> Program:
    """Everything that can be refused, before anything is written."""
    run_folder.check(workdir)
    parts = assemble(config)
    run_folder.check(workdir, parts)
    return compile_run(parts)


def compile_run(parts: Parts) -> Program:
    """Mesh, shardings and jitted steps; nothing is computed yet (XLA compiles at the first call)."""
    mesh = make_mesh(parts.config.mesh)
    state_shapes = abstract_state(parts.step)
    shapes, teacher_params = None, None
    if parts.teacher_params is not None:
        shapes = teacher_shapes(parts.config.teacher, parts.step.teacher)
        teacher_params = put_params(parts.teacher_params, shardings_of(shapes, mesh))
    return Program(
        parts=parts,
        mesh=mesh,
        step=jit_step(mask_and_train_step, mesh, state_shapes, shapes),
        eval_step=jit_eval(mask_and_eval_step, mesh, state_shapes, shapes),
        state_sharding=shardings_of(state_shapes, mesh),
        teacher_params=teacher_params,
    )


def first_state(program: Program) -> TrainState:
    """The student before its first step, made where it will live."""
    make = partial(init_state, jax.random.key(program.parts.config.seed), program.parts.step)
    return jax.jit(lambda params: make(params=params), out_shardings=program.state_sharding)(
        program.parts.student_params
    )


def _begin(program: Program, checkpoints: Checkpoints) -> TrainState:
    steps = checkpoints.steps()
    if not steps:
        return first_state(program)
    return run_folder.restore(checkpoints, steps[-1], program.parts.step, program.state_sharding)


def _loop(program: Program, state: TrainState, checkpoints: Checkpoints, writer: MetricsWriter) -> dict[str, float]:
    config, start = program.parts.config.train, int(state.step)
    if start == config.steps:
        print("This run is finished: nothing is left to train.")
        return last_held_out(read_metrics(writer.folder))
    numbers: dict[str, float] = {}
    with (
        contextlib.closing(Progress(config.steps, start, every=config.log_every, writer=writer)) as progress,
        contextlib.closing(prefetch(_device_rows(program, start))) as rows,
        Profiler(config, writer.folder) as profiler,
        StopRequest() as stop,
    ):
        if start == 0:
            _evaluate(program, state, progress, 0)
        for step in range(start + 1, config.steps + 1):
            profiler.before(step)
            state, metrics = program.step(state, program.teacher_params, next(rows), program.parts.weights)
            profiler.after(step)
            progress.add(step, metrics)
            last, stopping = step == config.steps, stop.requested(step)
            if last or (config.eval_every and step % config.eval_every == 0):
                numbers = _evaluate(program, state, progress, step)
            if last or step % config.checkpoint_every == 0 or stopping:
                progress.flush()  # a loss that is not finite stops the run here, before it is saved
                with progress.paused():
                    if not _finite(state.params):
                        raise Diverged(f"After step {step} the parameters are not finite")
                    checkpoints.save(step, run_folder.arrays(state), run_folder.facts(program.parts, step))
            if stopping and not last:
                checkpoints.wait()
                raise Stopped(f"Stopped after step {step} with a checkpoint saved: run the same command to go on.")
    return numbers


@jax.jit
def _finite(params: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]))


def _evaluate(program: Program, state: TrainState, progress: Progress, step: int) -> dict[str, float]:
    progress.flush()
    with progress.paused():
        numbers = program.held_out(state)
    progress.held_out(step, numbers)
    return numbers


def _device_rows(program: Program, step: int) -> Iterator[Rows]:
    config = program.parts.config
    batch_rows = config.train.batch_rows
    for rows in batches(
        program.parts.rows("train"),
        batch_rows=batch_rows,
        seed=config.seed,
        position=step * batch_rows,
        places=local_places(program.mesh, batch_rows),
    ):
        yield put_rows(rows, program.mesh, batch_rows=batch_rows)


class Profiler:
    """While entered, traces the steps of the configured window into the run folder; XProf and TensorBoard show them."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        self._first, self._last = config.profile_at, config.profile_at + config.profile_steps - 1
        self._folder, self._tracing = folder / "profile", False

    def before(self, step: int) -> None:
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True

    def after(self, step: int) -> None:
        if self._tracing and step == self._last:
            self.__exit__()

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False


def _announce(program: Program, workdir: Path, step: int) -> None:
    config, models, manifest = program.parts.config, program.parts.step, program.parts.manifest
    student = f"student {models.student.num_layers} x {models.student.hidden_size}"
    parameters = f"{count_parameters(models.student):,} parameters"
    teacher = f", teacher {models.teacher.num_layers} x {models.teacher.hidden_size}" if models.teacher else ""
    devices = f"{jax.device_count()} {jax.devices()[0].device_kind} device(s), {config.compute.dtype}"
    print(f"{student} ({parameters}){teacher}; {devices}; {program.parts.attention}")
    row_tokens = manifest.train.tokens / manifest.train.rows
    row_sequences = manifest.train.sequences / manifest.train.rows
    print(
        f"{config.train.steps:,} steps of {config.train.batch_rows:,} rows (about "
        f"{config.train.batch_rows * row_sequences:,.0f} sequences, {config.train.batch_rows * row_tokens:,.0f} tokens)"
        f" in {workdir}" + (f", going on after step {step:,}" if step else ""),
        flush=True,
    )


class StopRequest:
    """While entered, turns the first SIGTERM or Ctrl-C into a request; the second ends the process as usual.

    Of several processes each may be asked, by SIGTERM, and all of them learn of it at the same step, from JAX's own
    service; Ctrl-C is not for them.
    """

    def __init__(self) -> None:
        self._noted = False
        self._before: dict[int, Any] = {}

    def requested(self, step: int) -> bool:
        """Whether to stop after this step; the same answer in every process."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._noted

    def __enter__(self) -> StopRequest:
        # Python allows handlers in the main thread alone, and JAX has its own where there are several processes.
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, *_: object) -> None:
        self._noted = True
        self.__exit__()
