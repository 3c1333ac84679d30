"""Sends metrics to Weights & Biases and to trackio. One that fails is reported once and then left alone."""

from __future__ import annotations

import importlib
import importlib.util
import os
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distil_jax.files import write_whole
from distil_jax.io.names import without_places
from distil_jax.schema import require

# What `init` takes beyond project, name and config, which both have: how it finds a run that goes on.
_RESUME: dict[str, Callable[[Path, str], dict[str, Any]]] = {
    "wandb": lambda folder, identity: {"id": identity, "resume": "allow", "dir": str(folder)},
    "trackio": lambda folder, identity: {"resume": "allow"},  # by its name
}


def check_installed(names: Sequence[str]) -> None:
    """Refuses trackers whose packages are missing.

    Raises:
      InputError: one is.
    """
    for name in names:
        require(
            importlib.util.find_spec(name) is not None,
            f"train.trackers names {name}, which is not installed: pip install 'distil-jax[track]', or leave it out.",
        )


def start_trackers(names: Sequence[str], folder: Path, step: int, config: dict[str, Any]) -> list[Tracker]:
    """Starts the run in each tracker, or goes on with it.

    Args:
      names: packages, "wandb" or "trackio".
      folder: of the run. Its name and an identity, which the file `tracker` keeps there, name the run.
      step: where the run resumes; 0 starts a new one.
      config: is shown beside the metrics, with names in place of absolute paths, since others may read it.
    """
    if not names:
        return []
    kept = folder / "tracker"
    if step == 0 or not kept.exists():
        write_whole(kept, secrets.token_hex(4))
    return [Tracker(name, folder, kept.read_text(), without_places(config)) for name in names]


class Tracker:
    """A run in a tracker. Whatever goes wrong there is printed once, and then the tracker gets nothing more.

    Args:
      name: of the package; the environment variable NAME_PROJECT names the project (default: distil-jax).
      folder: of the run.
      identity: of the run.
      config: as plain values.
    """

    def __init__(self, name: str, folder: Path, identity: str, config: dict[str, Any]) -> None:
        self._name, self._run = name, None
        print(f"Starting {name} ...", flush=True)

        def init() -> Any:
            return importlib.import_module(name).init(
                project=os.environ.get(f"{name.upper()}_PROJECT") or "distil-jax",
                name=f"{folder.name}-{identity}",
                config=config,
                **_RESUME[name](folder, identity),
            )

        self._run = self._try(init)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Sends the metrics of a step."""
        if self._run is not None:
            self._try(lambda: self._run.log(metrics, step=step))

    def finish(self) -> None:
        """Ends the run, which may send what is left."""
        if self._run is not None:
            self._try(self._run.finish)

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # noqa: BLE001 (another library's, and no reason to stop a run)
            self._run = None
            reason = " ".join(str(error).split()) or type(error).__name__
            print(
                f"{self._name} failed ({reason[:300]}) and gets no more metrics. The training goes on, and all numbers "
                "are in metrics.jsonl.",
                file=sys.stderr,
                flush=True,
            )
            return None
