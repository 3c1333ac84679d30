"""Ctrl-C and SIGTERM, wherever a command stands: it ends within a second, with one line and nothing half-written.

Python tells its main thread of a signal, between two of its instructions: while XLA compiles there are none for
minutes, and a KeyboardInterrupt that is raised in a callback of the garbage collector is dropped with a warning. So the
system's notice of a signal goes to a thread that does nothing else.
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

_LONGEST_SAVE = 5.0  # seconds that an end waits for a checkpoint that is being written
_ALONE = {signal.SIGINT: exit_codes.INTERRUPTED, signal.SIGTERM: exit_codes.TERMINATED}  # and nothing was saved
_saved = threading.Event()
_saving: list[Callable[[], bool]] = []


def install() -> None:
    """From here on Ctrl-C and SIGTERM end this process, a program of its own; call it first, in the main thread.

    Who sets a handler of Python's own, as the training loop does, gets one signal of that kind; the next ends the
    process all the same. A command in the background, where Ctrl-C is ignored, goes on ignoring it.
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
    """While entered, the process is not ended while this holds, or a few seconds later: a checkpoint is being saved."""
    _saving.append(saving)
    try:
        yield
    finally:
        _saving.remove(saving)


def mark_resumable() -> None:
    """Takes note that a run of this process is saved to its last step: from here on the same command would go on."""
    _saved.set()


def wait_while_exiting() -> None:
    """Before a last word: waits for ever where the process is being ended, which has a last word of its own."""
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
    """Ends the process without asking the main thread, which may be held up for minutes."""
    latest = time.monotonic() + _LONGEST_SAVE
    while any(saving() for saving in list(_saving)) and time.monotonic() < latest:
        time.sleep(0.05)
    remove_unfinished()
    if _saved.is_set():
        status, sentence = exit_codes.STOPPED, "Stopped; what was finished is saved: run the same command to go on."
    else:
        status, sentence = _ALONE[number], "Interrupted; nothing unfinished is left behind."
    # In a thread, because a full pipe, or a lock that the main thread holds, may never let it through.
    last = threading.Thread(target=_say, args=(sentence,), daemon=True)
    last.start()
    last.join(timeout=1)
    os._exit(status)


def _say(sentence: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\n")  # after ^C, or half a progress bar
    exit_codes.print_error(sentence)
    sys.stdout.flush()
