"""What a person sees of a run: a bar on a terminal, plain lines elsewhere, and always the numbers on disk."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator

from tqdm import tqdm

from distil_jax.commands.processes import is_first
from distil_jax.io.metrics import MetricsWriter, to_numbers
from distil_jax.structs import Metrics


class Diverged(Exception):
    """The loss or the parameters are no numbers any more; the last checkpoint is from before that."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}: go on from the last checkpoint with a lower optimizer.learning_rate, or a longer "
            "optimizer.warmup, in a new run folder."
        )


class Stopped(Exception):
    """The run was asked to stop, and saved a checkpoint first: start it again."""


class Progress:
    """Reads each step's metrics one step late, so that the device never waits for the host.

    Args:
      steps: of the whole run.
      start: steps done before.
      every: steps per line; a line holds their means.
      writer: gets the same numbers.
    """

    def __init__(self, steps: int, start: int, *, every: int, writer: MetricsWriter) -> None:
        self._steps, self._every, self._writer = steps, every, writer
        self._behind: tuple[int, Metrics] | None = None
        self._window: list[dict[str, float]] = []
        self._clock, self._idle, self._first = time.perf_counter(), 0.0, True
        self._bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            disable=not (sys.stderr.isatty() and is_first()),
            dynamic_ncols=True,
        )

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a step that was just dispatched, and reads those of the one before."""
        self.flush()
        self._behind = (step, metrics)

    def flush(self) -> None:
        """Reads what is still unread.

        Raises:
          Diverged: its loss is not finite.
        """
        if self._behind is None:
            return
        step, metrics = self._behind
        self._behind = None
        numbers = to_numbers(metrics)
        # The gradients too: from them on, the parameters are no numbers either, though the loss still is one.
        if not (math.isfinite(numbers["loss"]) and math.isfinite(numbers["gradient_norm"])):
            raise Diverged(
                f"At step {step} the loss is {numbers['loss']:.4g} and the norm of its gradient "
                f"{numbers['gradient_norm']:.4g}"
            )
        self._window.append(numbers)
        self._bar.update(step - self._bar.n)
        # The first step's time is XLA's: it gets a line of its own and is in no throughput.
        if self._first or step % self._every == 0 or step == self._steps:
            self._line(step)

    def held_out(self, step: int, numbers: dict[str, float]) -> None:
        """Shows and writes an evaluation."""
        self._writer.write(step, "held_out", numbers)
        self._say(f"step {step:>6,}  held-out: {_words(numbers)}")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps what happens inside out of the throughput."""
        began = time.perf_counter()
        yield
        self._idle += time.perf_counter() - began

    def close(self) -> None:
        self._bar.close()

    def _line(self, step: int) -> None:
        seconds = time.perf_counter() - self._clock - self._idle
        means = {name: sum(n[name] for n in self._window) / len(self._window) for name in self._window[-1]}
        tokens = means.pop("tokens")
        rate = len(self._window) / seconds
        numbers = {**means, "tokens_per_step": tokens}
        if self._first:
            numbers["compile_seconds"] = seconds
            shown = f"first step in {seconds:.1f} s, most of it XLA's compilation"
        else:
            numbers |= {"tokens_per_second": tokens * rate, "seconds_per_step": 1 / rate}
            shown = f"{tokens * rate:,.0f} tokens/s, {_duration((self._steps - step) / rate)} left"
        self._writer.write(step, "train", numbers)
        losses = {name: means[name] for name in ("loss", "kl", "mlm", "cosine", "mse") if name in means}
        if self._bar.disable:
            self._say(f"step {step:>6,}  {_words(losses)}  {shown}")
        else:
            self._bar.set_postfix_str(f"{_words(losses)}, {shown}")
        self._window, self._clock, self._idle, self._first = [], time.perf_counter(), 0.0, False

    def _say(self, line: str) -> None:
        if self._bar.disable:
            print(line, flush=True)
        else:
            self._bar.write(line)


def _words(numbers: dict[str, float]) -> str:
    shares = ("accuracy", "agreement")
    return ", ".join(f"{name} {n:.1%}" if name in shares else f"{name} {n:.4g}" for name, n in numbers.items())


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
