"""Guards of a run: requests to stop, a lock on its folder, and a watchdog that notices a hang."""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from distil_jax.runtime.exit_codes import MACHINE_FAILED, print_error
from distil_jax.schema import InputError


class StopRequest:
    """While entered, turns the first SIGTERM or Ctrl-C into a request; the second ends the process as usual.

    Ctrl-C is taken as a request only after the first call of `requested`: before the first step there is nothing to
    save, and Ctrl-C need not wait for the compilation. With several processes, every process may be asked; JAX's
    preemption service tells all of them at the same step.
    """

    def __init__(self) -> None:
        self._requested = False
        self._previous: dict[int, Any] = {}

    def requested(self, step: int) -> bool:
        """Whether to stop after this step; the same answer in every process."""
        if jax.process_count() > 1:
            self._requested = multihost_utils.reached_preemption_sync_point(step)
            if self._requested:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
        elif not self._requested:
            self._install({signal.SIGINT: self._request_stop})
        return self._requested

    def __enter__(self) -> StopRequest:
        alone = jax.process_count() == 1  # else JAX has its own handler of SIGTERM, and Ctrl-C is passed on to it
        self._install({signal.SIGTERM: self._request_stop} if alone else {signal.SIGINT: _pass_on})
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _install(self, handlers: dict[int, Any]) -> None:
        # Python allows handlers in the main thread alone.
        if threading.current_thread() is threading.main_thread():
            for number in handlers.keys() - self._previous.keys():
                self._previous[number] = signal.signal(number, handlers[number])

    def _request_stop(self, number: int, _: object) -> None:
        if self._requested:
            self.__exit__()
            os.kill(os.getpid(), number)
        self._requested = True


def _pass_on(*_: object) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


class InUse(InputError):
    """Another process holds the folder.

    Attributes:
      by: that process, in words.
    """

    def __init__(self, folder: Path, by: str) -> None:
        super().__init__(f"Another process trains in {folder} ({by}): wait for it, stop it, or name a new folder.")
        self.by = by


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Holds the folder for this process; the system lets it go when the process ends, however it ends.

    Raises:
      InUse: another process holds it.
      InputError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise InputError(f"Cannot write the run folder {folder}: {error.strerror or error}.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise InUse(folder, file.read().strip()) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        yield


class Watchdog:
    """While entered, ends the process with status 4 when nothing is reported for too long, and says where it stood.

    A collective that waits for a lost device, or a disk that never answers, cannot be interrupted from Python.

    Args:
      seconds: without a report; 0 watches nothing.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._ended = seconds, threading.Event()
        self._alive = time.monotonic()

    def alive(self) -> None:
        """Reports that the run has come a step further."""
        self._alive = time.monotonic()

    def __enter__(self) -> Watchdog:
        self.alive()
        if self._seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._seconds / 4)):
            silent = time.monotonic() - self._alive
            if silent > self._seconds:
                faulthandler.dump_traceback(all_threads=True)
                print_error(
                    f"nothing has happened for {silent:.0f} s (train.hang_seconds is {self._seconds:g}), "
                    "and above is where every thread stands: look after the machine, and start the run again; it goes "
                    "on from its last checkpoint."
                )
                os._exit(MACHINE_FAILED)
