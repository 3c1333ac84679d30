"""Checkpoints of a run: the state, and beside it a few plain facts. Orbax does the work and stays in this file."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from distil_jax.schema import InputError

# Orbax reports every directory it makes at INFO and WARNING; a run's own lines must stay readable.
logging.getLogger("absl").setLevel(logging.ERROR)


class Checkpoints:
    """The checkpoints of one run folder, by step.

    Args:
      folder: made if it is not there and `keep` is given.
      keep: how many of the newest stay; None: only to read, and nothing on disk changes.
    """

    def __init__(self, folder: str | Path, *, keep: int | None = None) -> None:
        self._folder = Path(folder).absolute()
        if keep is None:
            options = ocp.CheckpointManagerOptions(read_only=True)
        else:
            if jax.process_index() == 0:
                self._set_unfinished_aside()
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("unfinished checkpoints are set aside")
            options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def _set_unfinished_aside(self) -> None:
        """Renames what bears a step's name and was never committed: Orbax would take it for that step."""
        for path in self._folder.glob("*"):
            if path.is_dir() and path.name.isdigit() and int(path.name) not in self.steps():
                path.rename(path.with_name(f"{path.name}.unfinished-{time.time_ns()}"))

    def steps(self) -> list[int]:
        """The steps whose checkpoints were committed, in order (an interrupted save leaves no commit file)."""
        return sorted(
            int(path.parent.name) for path in self._folder.glob("*/commit_success.txt") if path.parent.name.isdigit()
        )

    def save(self, step: int, arrays: Any, facts: dict[str, Any]) -> None:
        """Starts a save and returns; it appears whole or not at all.

        Args:
          step: its name; a step that is already there is left as it is.
          arrays: a tree of arrays.
          facts: plain values.
        """
        if step not in self.steps():
            self._manager.save(
                step, args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), facts=ocp.args.JsonSave(facts))
            )

    def facts(self, step: int) -> dict[str, Any]:
        """What was saved beside the arrays of `step`.

        Raises:
          InputError: it cannot be read.
        """
        try:
            return self._manager.restore(step, args=ocp.args.Composite(facts=ocp.args.JsonRestore())).facts
        except (ValueError, KeyError, OSError) as error:
            raise self._damaged(step, error) from error

    def restore(self, step: int, abstract: Any) -> Any:
        """The arrays of `step`.

        Args:
          step: one of `steps()`.
          abstract: a tree of `jax.ShapeDtypeStruct` with shardings: of any mesh, not only the one that saved.

        Raises:
          InputError: the checkpoint does not fit `abstract`.
        """
        try:
            return self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))).state
        except (ValueError, KeyError, OSError) as error:
            raise self._damaged(step, error) from error

    def _damaged(self, step: int, error: Exception) -> InputError:
        reason = " ".join(str(error).split())[:500]
        return InputError(
            f"Checkpoint {step} in {self._folder} does not fit this run, or is damaged ({reason}): use the "
            "configuration it was written with, or move that step's folder away to go on from an older one."
        )

    def wait(self) -> None:
        """Until every save that was started is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes what was started, and lets the folder go."""
        self.wait()
        self._manager.close()
