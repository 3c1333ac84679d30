"""`distil-jax train`: from a config to a trained student in a run folder; started again, it goes on."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tomli_w

from distil_jax.commands import processes, run_folder
from distil_jax.commands.assemble import assemble
from distil_jax.commands.endings import Diverged, MachineFailed, Stopped
from distil_jax.commands.guards import StopRequest, Watchdog, folder_lock
from distil_jax.commands.program import Program, compile_run, first_state
from distil_jax.commands.progress import Progress
from distil_jax.config import Config, TrainConfig, load
from distil_jax.data.loader import batches, numbers_at, prefetch
from distil_jax.io.checkpoint import Checkpoints
from distil_jax.io.metrics import MetricsWriter, last_held_out, read_metrics
from distil_jax.models.encoder import count_parameters
from distil_jax.schema import InputError, to_dict
from distil_jax.structs import Rows
from distil_jax.training.sharding import local_places, put_rows
from distil_jax.training.state import TrainState


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `distil-jax train`."""
    parser.add_argument("config", help="a TOML file; see configs/")
    parser.add_argument("--output", metavar="FOLDER", help="the run folder (default: runs/NAME_OF_CONFIG)")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="override a config key: --set train.steps=100"
    )
    parser.add_argument(
        "--resume-step",
        type=int,
        metavar="STEP",
        help="go on from this checkpoint and no other; later ones are set aside (default: the newest valid one)",
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
        train(config, output, resume_step=arguments.resume_step)
        print(f"Done. The run is in {output}. Next: distil-jax export {output} MODEL_FOLDER")


def _keep_compiled(cache: str, output: Path) -> None:
    """A run that is started again does not compile again; JAX's own setting, where there is one, goes before."""
    if cache == "auto":
        cache = "" if jax.default_backend() == "cpu" else str(output / "compiled")
    if cache and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", cache)


def train(config: Config, workdir: str | Path, *, resume_step: int | None = None) -> dict[str, float]:
    """Trains a student, or goes on with the run that `workdir` holds.

    Args:
      config: of the run; where the folder holds one already, only what changes no number may differ.
      workdir: gets config.toml, metrics.jsonl, checkpoints/ and tensorboard/.
      resume_step: the checkpoint to go on from; None: the newest valid one, or the beginning.

    Returns:
      The held-out numbers of the finished student.

    Raises:
      InputError: bad input, or no valid checkpoint among those that are there; nothing was written.
      Stopped: SIGTERM or Ctrl-C; a checkpoint was saved.
      Diverged: too many steps without a finite loss, or a loss far above what it was; checkpoints are from before.
      MachineFailed: the disk did not take the end of the run, or a device or another process is lost.
    """
    workdir = Path(workdir)
    program = processes.together(lambda: _ready(config, workdir))  # nobody writes before everybody has looked
    parts = program.parts
    processes.agree(f"{parts.step} {parts.identity}")
    with contextlib.ExitStack() as stack:
        if processes.is_first():
            processes.together(lambda: stack.enter_context(folder_lock(workdir)))
        else:
            processes.together(lambda: None)
        kept = Checkpoints(workdir / "checkpoints", keep=config.train.keep_checkpoints)
        checkpoints = stack.enter_context(contextlib.closing(kept))
        state = _begin(program, checkpoints, resume_step)
        step = int(state.step)
        processes.together(lambda: run_folder.begin(workdir, parts) if processes.is_first() else None)
        _announce(program, workdir, step)
        writer = MetricsWriter(workdir, step=step, tensorboard=config.train.tensorboard, enabled=processes.is_first())
        processes.meet("the metrics are as of this step")
        stack.enter_context(contextlib.closing(writer))
        try:
            return _loop(program, state, checkpoints, writer)
        except jax.errors.JaxRuntimeError as error:
            reason = " ".join(str(error).split())[:400]
            if "RESOURCE_EXHAUSTED" in reason:
                raise InputError(
                    f"The devices have too little memory ({reason}): lower train.tokens_per_device, which changes no "
                    "number, or spread the run over more of them with mesh.fsdp."
                ) from error
            failure = MachineFailed(f"A device or another process of this run failed ({reason}): start the run again.")
            processes.leave(failure)
            raise failure from error


def _ready(config: Config, workdir: Path) -> Program:
    """Everything that can be refused, before anything is written."""
    run_folder.check(workdir)
    parts = assemble(config)
    run_folder.check(workdir, parts)
    return compile_run(parts)


def _begin(program: Program, checkpoints: Checkpoints, resume_step: int | None) -> TrainState:
    step = run_folder.choose(checkpoints, resume_step)
    if step is None:
        return first_state(program)
    state = run_folder.restore(checkpoints, step, program.parts.step, program.state_sharding)
    for name in checkpoints.set_aside_after(step):
        print(f"Going on after step {step}; what is later is kept as {name}.")
    return state


def _loop(program: Program, state: TrainState, checkpoints: Checkpoints, writer: MetricsWriter) -> dict[str, float]:
    config, start = program.parts.config.train, int(state.step)
    if start == config.steps:
        print("This run is finished: nothing is left to train.")
        return last_held_out(read_metrics(writer.folder))
    numbers: dict[str, float] = {}
    progress = Progress(config, start, writer=writer, rows_of=lambda step: _rows_of(program, step))
    with (
        contextlib.closing(progress),
        contextlib.closing(prefetch(_device_rows(program, start))) as rows,
        Profiler(config, writer.folder) as profiler,
        StopRequest() as stop,
        Watchdog(config.hang_seconds) as watchdog,
    ):
        disk = DiskTrouble(checkpoints, writer, progress)
        if start == 0:
            _evaluate(program, state, progress, 0)
        for step in range(start + 1, config.steps + 1):
            watchdog.alive()
            profiler.before(step)
            state, metrics = program.step(state, program.teacher_params, next(rows), program.parts.weights)
            profiler.after(step)
            progress.add(step, metrics)
            last, stopping, score = step == config.steps, stop.requested(step), None
            if last or (config.eval_every and step % config.eval_every == 0):
                watchdog.alive()
                numbers = _evaluate(program, state, progress, step)
                score = numbers["mlm"]
            if last or step % config.checkpoint_every == 0 or stopping:
                watchdog.alive()
                progress.flush()  # a run that diverges stops here, before it is saved
                with progress.paused():
                    if not _finite(state.params):
                        raise Diverged(f"After step {step} the parameters are not finite")
                    facts = run_folder.facts(program.parts, step)
                    checkpoints.save(step, run_folder.arrays(state), facts, score=score)
            disk.tell()
            if stopping and not last:
                disk.settle(f"The run was asked to stop after step {step}")
                raise Stopped(f"Stopped after step {step} with a checkpoint saved: run the same command to go on.")
        disk.settle(f"The run has reached its last step, {config.steps}")
    return numbers


class DiskTrouble:
    """Tells, while the training goes on, that the disk does not take what it should, and in the end insists."""

    def __init__(self, checkpoints: Checkpoints, writer: MetricsWriter, progress: Progress) -> None:
        self._checkpoints, self._writer, self._progress = checkpoints, writer, progress
        self._told: set[str] = set()

    def tell(self) -> None:
        """Prints what is new."""
        self._checkpoints.check()
        for failure in {self._checkpoints.failure, self._writer.failure} - self._told - {None}:
            self._told.add(failure)
            saved = self._checkpoints.steps()
            newest = f"the newest checkpoint is that of step {saved[-1]}" if saved else "there is no checkpoint yet"
            self._progress.say(f"Warning: {failure}; the training goes on, and {newest}.")

    def settle(self, when: str) -> None:
        """Waits for the last save.

        Raises:
          MachineFailed: it, or the last metrics, are not on disk.
        """
        self._checkpoints.wait()
        self.tell()
        if failure := self._checkpoints.failure or self._writer.failure:
            raise MachineFailed(
                f"{when}, but {failure}: make the disk writable and run the same command to go on from the newest "
                "checkpoint."
            )


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


def _rows_of(program: Program, step: int) -> list[int]:
    """The numbers of the rows that a step trains on."""
    config = program.parts.config
    positions = np.arange((step - 1) * config.train.batch_rows, step * config.train.batch_rows)
    return numbers_at(program.parts.manifest.train.rows, positions, seed=config.seed).tolist()


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
