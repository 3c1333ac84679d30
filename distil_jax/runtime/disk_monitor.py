"""Watches whether checkpoints and metrics reach the disk while a run trains."""

from __future__ import annotations

from distil_jax.io.checkpoint import Checkpoints
from distil_jax.io.metrics import MetricsWriter
from distil_jax.runtime.exit_codes import MachineFailed
from distil_jax.runtime.progress import Progress


class DiskMonitor:
    """Warns when a save or the metrics fail and lets the run train on; at its end, raises what is still not saved."""

    def __init__(self, checkpoints: Checkpoints, writer: MetricsWriter, progress: Progress) -> None:
        self._checkpoints, self._writer, self._progress = checkpoints, writer, progress
        self._told: set[str] = set()

    def warn(self) -> None:
        """Prints what is new."""
        self._checkpoints.check()
        for failure in {self._checkpoints.failure, self._writer.failure} - self._told - {None}:
            self._told.add(failure)
            saved = self._checkpoints.steps()
            newest = f"the newest checkpoint is that of step {saved[-1]}" if saved else "there is no checkpoint yet"
            self._progress.say(f"Warning: {failure}; the training goes on, and {newest}.")

    def require_saved(self, when: str) -> None:
        """Waits for the last save.

        Raises:
          MachineFailed: it, or the last metrics, are not on disk.
        """
        self._checkpoints.wait()
        self.warn()
        if failure := self._checkpoints.failure or self._writer.failure:
            raise MachineFailed(
                f"{when}, but {failure}: make the disk writable and run the same command to go on from the newest "
                "checkpoint."
            )
