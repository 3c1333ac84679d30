"""Exit codes of the command line, and the exceptions that lead to them."""

from __future__ import annotations

import sys

BAD_INPUT, DIVERGED, MACHINE_FAILED, STOPPED = 2, 3, 4, 75
INTERRUPTED, TERMINATED = 130, 143  # by Ctrl-C or SIGTERM with nothing to resume; the codes that shells use
UNREAD = 141  # the reader of its output has gone; what shells report for SIGPIPE


class Diverged(Exception):
    """The training has diverged; the last checkpoint is from before that."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}: go on from an earlier checkpoint with a lower optimizer.learning_rate, or a longer "
            "optimizer.warmup, in a new run folder."
        )


class MachineFailed(Exception):
    """The disk, a device or another process failed, not the run: mend that, or start the run again."""


class Stopped(Exception):
    """The run was asked to stop, and saved a checkpoint first: start it again."""


def print_error(sentence: object) -> None:
    """Writes the last line of a command that failed to stderr.

    In one write, unlike `print`, so that no other thread's output lands inside the line.
    """
    sys.stderr.write(f"distil-jax: {sentence}\n")
    sys.stderr.flush()
