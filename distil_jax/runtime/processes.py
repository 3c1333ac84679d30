"""The processes of one run: how they connect, what only the first one does, and where all of them wait.

Nothing happens on import: research code that calls `train_step` decides for itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from distil_jax import __version__
from distil_jax.runtime.exit_codes import BAD_INPUT, MACHINE_FAILED, Diverged, MachineFailed, Stopped, print_error
from distil_jax.schema import InputError

T = TypeVar("T")
_HEARTBEAT = 40  # seconds without a heartbeat after which JAX's service treats a process as lost
_on_abort = None
_VARIABLES = ("DISTIL_COORDINATOR", "DISTIL_NUM_PROCESSES", "DISTIL_PROCESS_ID")
# Variables that decide how a program is compiled and where it runs; no others are ever printed.
_SHOWN = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "CUDA_VISIBLE_DEVICES")
_SHOWN_PREFIXES = ("JAX_", "DISTIL_")


def connect() -> None:
    """Connects this process to the others of its run, if there are any; call it before JAX looks for devices.

    On TPU VMs, GKE, SLURM and under MPI, JAX finds them by itself. Anywhere else, set DISTIL_COORDINATOR (host:port of
    the first process), DISTIL_NUM_PROCESSES and DISTIL_PROCESS_ID (from 0).

    Raises:
      InputError: only some of the three are set, or they are no numbers.
    """
    if jax.distributed.is_initialized():
        return
    given = [os.environ.get(name) for name in _VARIABLES]
    if any(given):
        whole = all(given) and re.fullmatch(r".+:\d+ \d+ \d+", " ".join(given))
        if not whole or int(given[2]) >= int(given[1]):
            raise InputError(
                f"{', '.join(_VARIABLES)} go together, host:port, how many, and which one from 0, but they are "
                f"{', '.join(map(repr, given))}: set all three, or none."
            )
        _exit_on_abort()
        jax.distributed.initialize(given[0], int(given[1]), int(given[2]), heartbeat_timeout_seconds=_HEARTBEAT)
        return
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT)
        _exit_on_abort()
    except (ValueError, RuntimeError) as error:
        # No cluster that JAX knows, or a program that computed before it called us: a run of one process.
        if not any(known in str(error) for known in ("coordinator_address", "before any JAX")):
            raise


def _exit_on_abort() -> None:
    """From here on, SIGABRT ends this process with status 4: JAX's service aborts a process whose peer is lost.

    Python code cannot catch that. The handler runs in the aborting thread, so it may take the interpreter's lock.
    """
    global _on_abort  # noqa: PLW0603 (must live as long as the process)

    def end(_: int) -> None:
        print_error("another process of this run is lost: start all of them again.")
        os._exit(MACHINE_FAILED)

    _on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)
    ctypes.CDLL(None).signal(signal.SIGABRT, _on_abort)


def is_first() -> bool:
    """Whether this is the process that writes and prints for all of them."""
    return jax.process_index() == 0


def refuse_together(action: Callable[[], T]) -> T:
    """Runs `action` in every process; if it raises `InputError` in one of them, all of them raise.

    So no process waits for one that has gone.

    Raises:
      InputError: this process's own, or one that says that another process has refused.
    """
    result, refusal = None, None
    try:
        result = action()
    except InputError as error:
        refusal = error
    if jax.process_count() > 1 and np.any(multihost_utils.process_allgather(np.array(refusal is not None))):
        raise refusal or InputError("Another process of this run has refused it: see what it says.")
    if refusal is not None:
        raise refusal
    return result


def check_same(what: str) -> None:
    """Refuses to go on unless every process was given the same, because they would wait for each other for ever.

    Args:
      what: everything that decides which program is compiled.

    Raises:
      InputError: another process has something else.
    """
    if jax.process_count() > 1:
        digests = multihost_utils.process_allgather(np.frombuffer(hashlib.sha256(what.encode()).digest(), np.uint8))
        if np.any(digests != digests[0]):
            raise InputError(
                "The processes of this run were given different configurations, data or teachers, or chose different "
                "attention: give all of them the same files, and compute.attention by name."
            )


@contextlib.contextmanager
def first_process_prints() -> Iterator[None]:
    """Connects the processes and silences stdout in all but the first, which first prints what it runs on.

    Every process still writes errors to its stderr.
    """
    connect()
    with contextlib.ExitStack() as stack:
        if not is_first():
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        print(environment(), flush=True)
        yield


def barrier(where: str) -> None:
    """Waits until every process of the run has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


@contextlib.contextmanager
def exit_on_failure() -> Iterator[None]:
    """With several processes, ends this one at once when the block fails.

    An orderly exit would wait for the others, which wait for this one in the next collective until it is gone.
    `Diverged` and `Stopped` are exempt: every process raises them after the same step.
    """
    try:
        yield
    except (Diverged, Stopped):
        raise
    except Exception as error:
        if jax.process_count() > 1:
            _exit_now(error)
        raise


def _exit_now(error: Exception) -> NoReturn:
    """Ends this process with the exit status that the command line would give it."""
    known = isinstance(error, InputError | MachineFailed)
    if known:
        print_error(error)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    os._exit(BAD_INPUT if isinstance(error, InputError) else MACHINE_FAILED if known else 1)


def environment() -> str:
    """One line: versions, devices, processes, and the variables that decide how a program is compiled."""
    names = sorted(name for name in os.environ if name in _SHOWN or name.startswith(_SHOWN_PREFIXES))
    variables = "".join(f", {name}={os.environ[name]}" for name in names)
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return f"distil_jax {__version__}, jax {jax.__version__}, {devices}, {jax.process_count()} process(es){variables}"
