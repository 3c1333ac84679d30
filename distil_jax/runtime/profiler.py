"""Traces some steps of a run with JAX's profiler."""

from __future__ import annotations

from pathlib import Path

import jax

from distil_jax.config.run import TrainConfig


class Profiler:
    """While entered, traces the steps of the configured window into the run folder; XProf and TensorBoard show them."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        self._first, self._last = config.profile_at, config.profile_at + config.profile_steps - 1
        self._folder, self._tracing = folder / "profile", False

    def before(self, step: int) -> None:
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True

    def after(self, step: int) -> None:
        if self._tracing and step == self._last:
            self.__exit__()

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
