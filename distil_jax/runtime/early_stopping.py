"""Early stopping: whether a run has stopped getting better."""

from __future__ import annotations

from typing import Any

from distil_jax.io.checkpoint import Checkpoints
from distil_jax.runtime.program import Program


class EarlyStopping:
    """Counts the evaluations since the best checkpoint.

    An evaluation is compared with checkpoints alone: a state that is not on disk cannot be delivered.

    Args:
      patience: evaluations without a better criterion after which a run stops; 0: any number.
      program: its evaluator says what evaluations are compared by.
      checkpoints: know the best so far.
      lines: the run's metrics so far, so that a resumed run stops where it would have stopped.
    """

    def __init__(self, patience: int, program: Program, checkpoints: Checkpoints, lines: list[dict[str, Any]]) -> None:
        self._patience, self._checkpoints = patience, checkpoints
        step, best = checkpoints.best()
        later = [line for line in lines if line["kind"] == "held_out" and line["step"] > (step or 0)]
        self._since = sum(not program.evaluator.criterion(line) < best for line in later)

    @property
    def should_stop(self) -> bool:
        """Whether the patience is used up."""
        return 0 < self._patience <= self._since

    def update(self, criterion: float) -> bool:
        """Counts an evaluation, and returns whether it is the best so far."""
        improved = criterion < self._checkpoints.best()[1]
        self._since = 0 if improved else self._since + 1
        return improved
