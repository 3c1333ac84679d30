"""The ways in which a command ends before its time, each with the exit status that scripts go by."""

from __future__ import annotations

import sys

BAD_INPUT, DIVERGED, MACHINE_FAILED, STOPPED = 2, 3, 4, 75
INTERRUPTED, TERMINATED = 130, 143  # by Ctrl-C or SIGTERM, with nothing to go on from; a shell's own numbers
UNREAD = 141  # as of a program that SIGPIPE ends: who read its output has closed it


class Diverged(Exception):
    """The training leads nowhere any more; the last checkpoint is from before that."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}: go on from an earlier checkpoint with a lower optimizer.learning_rate, or a longer "
            "optimizer.warmup, in a new run folder."
        )


class MachineFailed(Exception):
    """The disk, another process or the device failed, not the run: mend that, or start it again."""


class Stopped(Exception):
    """The run was asked to stop, and saved a checkpoint first: start it again."""


def print_error(sentence: object) -> None:
    """The last line of a command that did not succeed.

    In one piece, which `print` is not: what a thread of some library writes meanwhile must not get between the sentence
    and its end.
    """
    sys.stderr.write(f"distil-jax: {sentence}\n")
    sys.stderr.flush()
