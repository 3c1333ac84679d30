"""The training loop: trains a compiled run, whatever its objective, from where its folder stands to its end."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from distil_jax.config.run import Config
from distil_jax.config.task import FinetuneConfig
from distil_jax.data.loader import prefetch
from distil_jax.files import keep, missing_folders, remove_on_exit
from distil_jax.io.checkpoint import Checkpoints
from distil_jax.io.metrics import MetricsWriter, last_held_out, read_metrics
from distil_jax.io.trackers import check_installed, start_trackers
from distil_jax.runtime import processes, run_folder, signals
from distil_jax.runtime.disk_monitor import DiskMonitor
from distil_jax.runtime.divergence import Divergence
from distil_jax.runtime.early_stopping import EarlyStopping
from distil_jax.runtime.exit_codes import Diverged, MachineFailed, Stopped
from distil_jax.runtime.guards import StopRequest, Watchdog, folder_lock
from distil_jax.runtime.profiler import Profiler
from distil_jax.runtime.program import Program
from distil_jax.runtime.progress import Progress
from distil_jax.schema import InputError, require, to_dict, user_path
from distil_jax.training.optimizer import learning_rate
from distil_jax.training.sharding import shard_count
from distil_jax.training.state import TrainState

# Status codes of JAX's errors after which a restart may help: a device, a network, a process or its data was lost.
# TPUs report a halted program as FAILED_PRECONDITION. After others, such as INVALID_ARGUMENT, it would fail again.
_MACHINE_CODES = (
    "ABORTED",
    "CANCELLED",
    "DATA_LOSS",
    "DEADLINE_EXCEEDED",
    "FAILED_PRECONDITION",
    "INTERNAL",
    "UNAVAILABLE",
    "UNKNOWN",
)
_MORE_DEVICES = "spread the run over more devices with mesh.fsdp, or look for what else is on them."


@contextlib.contextmanager
def _failures_named(less_memory: str) -> Iterator[None]:
    """Turns what JAX raises when a device or another process fails, or runs out of memory, into one clear sentence.

    Args:
      less_memory: what to do about the latter.

    Raises:
      InputError: a device has too little memory.
      MachineFailed: whatever else a new start may cure. A mistake in the program stays what it is.
    """
    try:
        yield
    except InputError:
        raise
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        # JAX raises a ValueError when the failure happens while it dispatches a program.
        message = " ".join(str(error).split())
        if "RESOURCE_EXHAUSTED" in message:
            raise InputError(f"The devices have too little memory ({message[:400]}): {less_memory}") from error
        if message.partition(":")[0] in _MACHINE_CODES:
            sentence = f"A device or another process of this run failed ({message[:400]}): start the run again."
            raise MachineFailed(sentence) from error
        raise


@_failures_named(_MORE_DEVICES)
def run_program(
    make: Callable[[], Program], workdir: str | Path, *, resume_step: int | None = None
) -> dict[str, float]:
    """Trains a new run, or resumes the one in `workdir`.

    Args:
      make: refuses whatever input can be refused, and compiles the run; writes nothing.
      workdir: gets config.toml, metrics.jsonl, checkpoints/ and tensorboard/.
      resume_step: the checkpoint to go on from; None: the newest valid one, or the beginning.

    Returns:
      The held-out numbers of the last evaluation.

    Raises:
      InputError: bad input, or no valid checkpoint among those that are there; nothing was written.
      Stopped: SIGTERM or Ctrl-C; a checkpoint was saved.
      Diverged: too many steps without a finite loss, or a loss far above what it was; checkpoints are from before.
      MachineFailed: the disk did not take the end of the run, or a device or another process is lost.
    """
    workdir = user_path(workdir)
    program = processes.refuse_together(lambda: _ready(make, workdir))  # no process writes before all have checked
    run, config = program.config, program.config.train
    processes.check_same(f"{program.step_config} {program.identity} {run.seed} {config} {run.mesh} {resume_step}")
    made = missing_folders(workdir)
    with contextlib.ExitStack() as stack:
        if processes.is_first():
            processes.refuse_together(lambda: stack.enter_context(folder_lock(workdir)))
            remove_on_exit(made)  # if the process ends before its first step
            stack.callback(keep, workdir)
        else:
            processes.refuse_together(lambda: None)
        kept = Checkpoints(workdir / "checkpoints", keep=config.keep_checkpoints)
        checkpoints = stack.enter_context(contextlib.closing(kept))
        stack.enter_context(signals.delay_exit_while(checkpoints.saving))
        state, divergence, new_length = _begin(program, checkpoints, resume_step)
        step = int(state.step)
        processes.refuse_together(lambda: run_folder.prepare_folder(workdir, program) if processes.is_first() else None)
        going_on = f", going on after step {step:,}" if step else ""
        warnings = "".join(f"\nWarning: {warning}" for warning in program.warnings)
        print(f"{program.description} in {workdir}{going_on}{new_length}{warnings}", flush=True)
        trackers = []
        if processes.is_first():
            trackers = start_trackers(config.trackers, workdir, step, to_dict(program.config))
        writer = MetricsWriter(
            workdir, step=step, tensorboard=config.tensorboard, trackers=trackers, enabled=processes.is_first()
        )
        processes.barrier("the metrics are as of this step")
        stack.enter_context(contextlib.closing(writer))
        with processes.exit_on_failure(), _failures_named(_smaller_steps(program)):
            numbers = _loop(program, state, checkpoints, writer, divergence)
            signals.mark_resumable()
            return numbers


def _smaller_steps(program: Program) -> str:
    """Advice for a step or an evaluation that does not fit: settings that save memory and change no number."""
    pieces = program.step_config.accumulation
    rows = program.config.train.batch_rows // shard_count(program.mesh)  # of a device, in all its micro-batches
    more = next((count for count in range(pieces + 1, rows + 1) if rows % count == 0), None)
    if more is None:
        return f"each step already takes one row after the other; {_MORE_DEVICES}"
    return f"set train.accumulation={more} (it is {pieces}), which changes no number, or {_MORE_DEVICES}"


@_failures_named(_MORE_DEVICES)
def _ready(make: Callable[[], Program], workdir: Path) -> Program:
    """Compiles the run, and refuses whatever can be refused before anything is written."""
    run_folder.check_folder(workdir)
    program = make()
    if processes.is_first():
        check_installed(program.config.train.trackers)
    run_folder.check_folder(workdir, program)
    return program


def _begin(program: Program, checkpoints: Checkpoints, resume_step: int | None) -> tuple[TrainState, Divergence, str]:
    """The state to go on from, the memory of the divergence watch, and a line if the run has another length now."""
    step, config = run_folder.choose_checkpoint(checkpoints, resume_step), program.config.train
    if step is None:
        return program.first_state(), Divergence(config), ""
    metadata = checkpoints.metadata(step)
    require(
        config.steps >= step,
        f"train.steps is {config.steps}, but {step} steps of this run are done: set it to {step} or more, or leave it "
        "out to go on as before.",
    )
    program.first_state.drop()
    state = run_folder.restore(checkpoints, step, program.step_config, program.first_state.sharding)
    for name in checkpoints.set_aside_after(step):
        print(f"Going on after step {step}; what is later is kept as {name}.")
    for problem in checkpoints.best_valid()[1]:
        print(f"{problem} It is not the best one any more.", file=sys.stderr, flush=True)
    new_length = _describe_new_length(run_folder.config_from(metadata["config"]), program, state)
    return state, Divergence(config, metadata.get("divergence")), new_length


def _describe_new_length(before: Config | FinetuneConfig, program: Program, state: TrainState) -> str:
    """A line about a run that was of another length when the state was saved: what becomes of its learning rate."""
    config, updates = program.config, int(state.step) - int(state.skipped)
    if before.train.steps == config.train.steps:
        return ""
    line = f"\nThis run had {before.train.steps:,} steps and has {config.train.steps:,} now"
    if program.step_config.has_own_optimizer:
        return f"{line}; its optimiser is your own and goes on as it is."
    if before.optimizer.steps == config.optimizer.steps:
        return f"{line}; its learning rate goes to 0 at step {config.optimizer.steps:,}, as before."
    old, new = (float(learning_rate(each.optimizer)(updates)) for each in (before, config))
    return (
        f"{line}: from here on its learning rate is that of a run of {config.optimizer.steps:,} steps, {new:.3g} for "
        f"the next step instead of {old:.3g}. The steps before had the old schedule, so the result is not exactly that "
        "of a run which had the new one from the start."
    )


def _loop(
    program: Program, state: TrainState, checkpoints: Checkpoints, writer: MetricsWriter, divergence: Divergence
) -> dict[str, float]:
    config, start = program.config.train, int(state.step)
    history = read_metrics(writer.folder)
    early_stopping = EarlyStopping(config.patience, program, checkpoints, history)
    if start == config.steps or early_stopping.should_stop:
        why = "" if start == config.steps else f"No better score in {config.patience} evaluations (train.patience). "
        print(f"{why}This run is finished: nothing is left to train.")
        return last_held_out(history)
    numbers: dict[str, float] = {}
    compiled = [line["compile_seconds"] for line in history if "compile_seconds" in line]
    progress = Progress(
        config,
        start,
        compile_seconds=compiled[-1] if compiled else None,
        writer=writer,
        row_indices=program.stream.row_indices,
        divergence=divergence,
    )
    with (
        contextlib.closing(progress),
        contextlib.closing(prefetch(program.stream.batches(start))) as batches,
        Profiler(config, writer.folder) as profiler,
        StopRequest() as stop,
        Watchdog(config.hang_seconds) as watchdog,
    ):
        disk = DiskMonitor(checkpoints, writer, progress)
        if start == 0:
            # Printed for comparison only: the state before the first step is never delivered.
            _evaluate(program, state, progress, watchdog, 0)
            if program.held_out_note:
                progress.say(program.held_out_note)
            _evaluate_reference(program, state, progress, watchdog)
        for step in range(start + 1, config.steps + 1):
            watchdog.alive()
            profiler.before(step)
            batch = next(batches)
            with progress.step(batch.input_ids.shape[1]):
                state, metrics = program.step(state, program.teacher_params, batch, *program.step_arguments)
            profiler.after(step)
            progress.add(step, metrics)
            keep(writer.folder)
            last, stopping, criterion = step == config.steps, stop.requested(step), None
            evaluated = last or (config.eval_every > 0 and step % config.eval_every == 0)
            due = step % config.checkpoint_every == 0 if config.checkpoint_every else evaluated
            if evaluated:
                numbers = _evaluate(program, state, progress, watchdog, step)
                criterion = program.evaluator.criterion(numbers)
                due = early_stopping.update(criterion) or due  # the best is saved whether or not a checkpoint is due
                last = last or early_stopping.should_stop
            if last or due or stopping:
                watchdog.alive()
                progress.flush()  # a run that diverges stops here, before it is saved
                with progress.paused():
                    if not _finite(state.params):
                        raise Diverged(f"After step {step} the parameters are not finite")
                    metadata = run_folder.checkpoint_metadata(program, step, divergence)
                    checkpoints.save(step, run_folder.state_arrays(state), metadata, criterion=criterion)
            disk.warn()
            if stopping and not last:
                disk.require_saved(f"The run was asked to stop after step {step}")
                raise Stopped(f"Stopped after step {step} with a checkpoint saved: run the same command to go on.")
            if last:
                break
        if step < config.steps:
            progress.say(f"No better score in {config.patience} evaluations: the run ends after step {step}.")
        disk.require_saved(f"The run has reached its last step, {step}")
    return numbers


@jax.jit
def _finite(params: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]))


def _evaluate(
    program: Program, state: TrainState, progress: Progress, watchdog: Watchdog, step: int
) -> dict[str, float]:
    progress.flush()
    with progress.paused():
        numbers = program.evaluator.evaluate(state, _before_batch("the evaluation", progress, watchdog))
    progress.held_out(step, numbers)
    return numbers


def _before_batch(name: str, progress: Progress, watchdog: Watchdog) -> Callable[[int], None]:
    """What an evaluation calls with the length of the rows of every batch: it is alive, and may begin to compile."""

    def call(length: int) -> None:
        watchdog.alive()
        progress.announce(name, length)

    return call


def _evaluate_reference(program: Program, state: TrainState, progress: Progress, watchdog: Watchdog) -> None:
    reference = program.reference
    if reference is None:
        return
    with progress.paused():
        numbers = reference.evaluate(
            state, _before_batch(f"the evaluation of the {reference.title}", progress, watchdog)
        )
    if numbers:
        progress.reference(reference.kind, reference.title, numbers)
