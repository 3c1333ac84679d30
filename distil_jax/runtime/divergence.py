"""Whether a run still learns: steps that were skipped, and losses far above what they were."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

from distil_jax.config.run import TrainConfig
from distil_jax.runtime.exit_codes import Diverged

_WINDOW = 200  # steps whose median loss is the usual one
_FEWEST = 20  # of them, before anything counts as unusual


class Divergence:
    """Looks at every step's loss, in order.

    Args:
      config: its `skips_allowed`, `spike_factor` and `spike_steps`.
      memory: of the steps before, where a run goes on; see `memory`.
    """

    def __init__(self, config: TrainConfig, memory: dict[str, Any] | None = None) -> None:
        memory = memory or {"usual": [], "skipped": 0, "high": 0}
        self._config, self._usual = config, deque(memory["usual"], maxlen=_WINDOW)
        self._skipped, self._high = memory["skipped"], memory["high"]

    @property
    def memory(self) -> dict[str, Any]:
        """All that is remembered of the steps so far, as plain values: whoever goes on with it judges alike."""
        return {"usual": list(self._usual), "skipped": self._skipped, "high": self._high}

    def update(self, step: int, loss: float, *, skipped: bool) -> None:
        """Takes note of one step.

        Raises:
          Diverged: too many steps in a row were skipped, or had a loss far above the running median.
        """
        config = self._config
        self._skipped = self._skipped + 1 if skipped else 0
        if self._skipped > config.skips_allowed:
            raise Diverged(
                f"After step {step} the loss or its gradient was no finite number {self._skipped} times in a row "
                f"(train.skips_allowed is {config.skips_allowed})"
            )
        if skipped:
            return
        usual = statistics.median(self._usual) if len(self._usual) >= _FEWEST else math.inf
        if not config.spike_factor or loss <= config.spike_factor * usual:
            self._usual.append(loss)
            self._high = 0
            return
        self._high += 1
        if self._high >= config.spike_steps:
            raise Diverged(
                f"Up to step {step} the loss was more than {config.spike_factor:g} times its median of {usual:.4g} "
                f"for {self._high} steps in a row (train.spike_factor, train.spike_steps)"
            )
