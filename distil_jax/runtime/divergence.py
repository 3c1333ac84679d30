"""Detects divergence: too many skipped steps in a row, or a loss far above its running median."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

from distil_jax.config.run import TrainConfig
from distil_jax.runtime.exit_codes import Diverged

_WINDOW = 200  # steps over which the median loss is taken
_FEWEST = 20  # steps before a loss can count as a spike


class Divergence:
    """Watches the loss of every step, in order.

    Args:
      config: its `skips_allowed`, `spike_factor` and `spike_steps`.
      memory: of the earlier steps of a resumed run; see `memory`.
    """

    def __init__(self, config: TrainConfig, memory: dict[str, Any] | None = None) -> None:
        memory = memory or {"usual": [], "skipped": 0, "high": 0}
        self._config, self._losses = config, deque(memory["usual"], maxlen=_WINDOW)
        self._skipped, self._high = memory["skipped"], memory["high"]

    @property
    def memory(self) -> dict[str, Any]:
        """The state of the watch as plain values, with which a resumed run goes on exactly."""
        return {"usual": list(self._losses), "skipped": self._skipped, "high": self._high}

    def update(self, step: int, loss: float, *, skipped: bool) -> None:
        """Records one step.

        Raises:
          Diverged: too many steps in a row were skipped, or had a loss far above the running median.
        """
        config = self._config
        self._skipped = self._skipped + 1 if skipped else 0
        if self._skipped > config.skips_allowed:
            raise Diverged(
                f"After step {step} the loss or its gradient was not finite {self._skipped} times in a row "
                f"(train.skips_allowed is {config.skips_allowed})"
            )
        if skipped:
            return
        median = statistics.median(self._losses) if len(self._losses) >= _FEWEST else math.inf
        # A loss of one's own may be negative, where a factor has no meaning.
        if not config.spike_factor or median <= 0 or loss <= config.spike_factor * median:
            self._losses.append(loss)
            self._high = 0
            return
        self._high += 1
        if self._high >= config.spike_steps:
            raise Diverged(
                f"Up to step {step} the loss was more than {config.spike_factor:g} times its median of {median:.4g} "
                f"for {self._high} steps in a row (train.spike_factor, train.spike_steps)"
            )
