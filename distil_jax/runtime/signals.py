"""Ends a command within a second of Ctrl-C or SIGTERM, with one line and nothing half-written.

Python runs signal handlers in the main thread, between two bytecodes: while XLA compiles there are none for minutes,
and a KeyboardInterrupt raised in a callback of the garbage collector is dropped with a warning. So signals are also
written to a pipe, which a thread reads that does nothing else.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from distil_jax.files import remove_unfinished, replacing
from distil_jax.runtime import exit_codes

_LONGEST_SAVE = 5.0  # seconds that an exit waits for a checkpoint being written
_ALONE = {signal.SIGINT: exit_codes.INTERRUPTED, signal.SIGTERM: exit_codes.TERMINATED}  # where nothing was saved
_saved = threading.Event()
_saving: list[Callable[[], bool]] = []


def install() -> None:
    """Makes Ctrl-C and SIGTERM end this process; call it first, in the main thread.

    Code that sets its own handler, as the training loop does, gets the first signal of that kind; the next one ends the
    process. A background job, where the shell ignores Ctrl-C, goes on ignoring it.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in _ALONE:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _left_to_the_thread)
    threading.Thread(target=_listen, args=(reading,), name="interrupt", daemon=True).start()


@contextlib.contextmanager
def delay_exit_while(saving: Callable[[], bool]) -> Iterator[None]:
    """Inside, an exit waits a few seconds for `saving()` to become false: a checkpoint is being written."""
    _saving.append(saving)
    try:
        yield
    finally:
        _saving.remove(saving)


def mark_resumable() -> None:
    """Notes that this process has saved a run to its last step, so that the same command would go on from there."""
    _saved.set()


def wait_while_exiting() -> None:
    """Waits for ever if the process is already exiting, so that only one last line is printed."""
    with replacing:
        pass


def _left_to_the_thread(*_: object) -> None:
    pass


def _listen(pipe: int) -> None:
    passed = set()
    while True:
        for number in os.read(pipe, 64):
            if number in _ALONE:
                if signal.getsignal(number) is _left_to_the_thread or number in passed:
                    _end(number)
                passed.add(number)


def _end(number: int) -> None:
    """Ends the process without waiting for the main thread, which may be busy for minutes."""
    latest = time.monotonic() + _LONGEST_SAVE
    while any(saving() for saving in list(_saving)) and time.monotonic() < latest:
        time.sleep(0.05)
    remove_unfinished()
    if _saved.is_set():
        status, sentence = exit_codes.STOPPED, "Stopped; what was finished is saved: run the same command to go on."
    else:
        status, sentence = _ALONE[number], "Interrupted; nothing unfinished is left behind."
    # In a thread, because a full pipe or a lock held by the main thread may block it for ever.
    last = threading.Thread(target=_say, args=(sentence,), daemon=True)
    last.start()
    last.join(timeout=1)
    os._exit(status)


def _say(sentence: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\n")  # after ^C, or half a progress bar
    exit_codes.print_error(sentence)
    sys.stdout.flush()
