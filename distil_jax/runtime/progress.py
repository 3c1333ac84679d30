"""Progress of a run: a bar on a terminal, plain lines elsewhere, and always the metrics on disk."""

from __future__ import annotations

import contextlib
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

from distil_jax.config.run import TrainConfig
from distil_jax.io.metrics import MetricsWriter, format_number, to_floats
from distil_jax.runtime.divergence import Divergence
from distil_jax.runtime.processes import is_first
from distil_jax.structs import Metrics

_LOSSES = ("loss", "kl", "mlm", "cosine", "mse", "task", "soft")  # in the order of a line; others come after these
_ONLY_WRITTEN = ("gradient_norm", "learning_rate", "skipped")
# Short enough for 80 columns, and without tqdm's own estimate of the time that is left, which counts compilation.
_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
_KEPT_LINES = 10  # lines of training metrics that stay above the bar in a run, besides those at evaluations


class Progress:
    """Reads each step's metrics one step late, so that the device never waits for the host.

    On a terminal, some lines stay above the bar: the first one, one in each tenth of the run, and those at evaluations.
    A file gets all of them.

    Args:
      config: its number of steps, and how many steps make a line, which holds their means.
      start: steps done before.
      compile_seconds: how long the first step took when the run was last started; None: unknown.
      writer: gets the same metrics.
      row_indices: the indices of the rows that a step trains on.
      divergence: gets every step's loss.
    """

    def __init__(
        self,
        config: TrainConfig,
        start: int,
        *,
        compile_seconds: float | None = None,
        writer: MetricsWriter,
        row_indices: Callable[[int], list[int]],
        divergence: Divergence,
    ) -> None:
        self._steps, self._every, self._writer, self._row_indices = config.steps, config.log_every, writer, row_indices
        self._divergence = divergence
        self._behind: tuple[int, Metrics] | None = None
        self._window: list[dict[str, float]] = []
        self._clock, self._idle, self._first = time.perf_counter(), 0.0, True
        self._compiled: set[tuple[str, int]] = set()  # programs and the lengths of the rows that they were compiled for
        self._compile_seconds, self._last_compilation = 0.0, compile_seconds  # of this window; of the last program
        self._unkept, self._kept_at = "", start  # the line that the bar alone shows; step of the last above it
        self._bar = tqdm(
            total=config.steps,
            initial=start,
            bar_format=_BAR,
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
          Diverged: see `Divergence.update`.
        """
        if self._behind is None:
            return
        step, metrics = self._behind
        self._behind = None
        values = to_floats(metrics)
        if skipped := bool(values.get("skipped")):
            self._skipped(step, values)
        self._window.append(values)
        self._bar.update(step - self._bar.n)
        # The first step's time is XLA's: it gets a line of its own and is in no throughput.
        if self._first or step % self._every == 0 or step == self._steps:
            self._line(step)
        if "loss" in values:
            self._divergence.update(step, values["loss"], skipped=skipped)

    def held_out(self, step: int, metrics: dict[str, float]) -> None:
        """Shows and writes an evaluation."""
        self._writer.write(step, "held_out", metrics)
        if self._unkept:
            self._keep(step, self._unkept)
        self.say(f"step {step:>6,}  held-out: {_words(metrics)}")

    def reference(self, kind: str, title: str, metrics: dict[str, float]) -> None:
        """Shows and writes what the evaluations are read against, as of step 0; see `Reference`."""
        self._writer.write(0, kind, metrics)
        self.say(f"{title} held-out: {_words(metrics)}")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time spent inside out of the throughput."""
        began = time.perf_counter()
        yield
        self._idle += time.perf_counter() - began

    def announce(self, program: str, length: int, seconds: float | None = None) -> bool:
        """Says that XLA compiles a program when it first meets rows of a length; returns whether it does so now.

        Args:
          program: its name.
          length: of the rows that it is called with next, in tokens.
          seconds: that the last compilation took; None: unknown.
        """
        if (program, length) in self._compiled:
            return False
        self._compiled.add((program, length))
        self.flush()
        last = f" (the last time took {_duration(seconds)})" if seconds and seconds >= 1 else ""
        self.say(f"Compiling {program} for rows of {length} tokens{last} ...")
        return True

    @contextlib.contextmanager
    def step(self, length: int) -> Iterator[None]:
        """Put it around a step on rows of this length. Leaves compilation out of the throughput and the time left."""
        compiles, began = self.announce("the step", length, self._last_compilation), time.perf_counter()
        yield
        if compiles:
            self._last_compilation = time.perf_counter() - began
            self._compile_seconds += self._last_compilation

    def close(self) -> None:
        self._bar.close()

    def _line(self, step: int) -> None:
        seconds = time.perf_counter() - self._clock - self._idle
        if not self._first:
            seconds -= self._compile_seconds
        # Skipped steps are left out of the means, unless all of them were skipped.
        steps = [values for values in self._window if not values.get("skipped")] or self._window
        means = {name: sum(values[name] for values in steps) / len(steps) for name in steps[-1]}
        tokens = means.pop("tokens", None)  # a step of one's own may not count them
        rate = len(self._window) / seconds
        means["skipped"] = sum(values.get("skipped", 0.0) for values in self._window)
        line = dict(means) if tokens is None else {**means, "tokens_per_step": tokens}
        if self._first:
            line["compile_seconds"] = seconds
            shown = f"first step in {seconds:.1f} s, most of it XLA's compilation"
        else:
            line |= {"seconds_per_step": 1 / rate}
            if self._compile_seconds:  # a new length of text
                line["compile_seconds"] = self._compile_seconds
            speed = f"{rate:.3g} steps/s"
            if tokens is not None:
                line["tokens_per_second"] = tokens * rate
                speed = f"{tokens * rate:,.0f} tokens/s"
            shown = f"{speed}, {_duration((self._steps - step) / rate)} left"
        self._writer.write(step, "train", line)
        others = (name for name in means if name not in (*_LOSSES, *_ONLY_WRITTEN))
        losses = {name: means[name] for name in (*_LOSSES, *others) if name in means}
        text = f"step {step:>6,}  {_words(losses)}  {shown}"
        everywhere = self._bar.disable or not sys.stdout.isatty()  # nothing else shows the line, or it goes to a file
        tenth = _KEPT_LINES * step // self._steps > _KEPT_LINES * self._kept_at // self._steps
        if everywhere or tenth or self._first:
            self._keep(step, text)
        else:
            self._unkept = text
        loss = _words(dict(list(losses.items())[:1]))
        self._bar.set_postfix_str(loss if self._first else f"{loss}, {shown}")
        self._window, self._clock, self._idle, self._first = [], time.perf_counter(), 0.0, False
        self._compile_seconds = 0.0

    def _skipped(self, step: int, values: dict[str, float]) -> None:
        rows = self._row_indices(step)
        why = {name: values[name] for name in ("loss", "gradient_norm") if name in values}
        self._writer.write(step, "skipped", {**why, "rows": rows})
        self.say(f"step {step:>6,}  no update, because a number is not finite: {_words(why)}; rows {_few(rows)}")

    def _keep(self, step: int, text: str) -> None:
        self.say(text)
        self._unkept, self._kept_at = "", step

    def say(self, line: str) -> None:
        """Prints a line, above the bar where there is one; on a terminal, it is broken between words."""
        if sys.stdout.isatty():
            line = textwrap.fill(line, shutil.get_terminal_size().columns, subsequent_indent=" " * 13)
        if self._bar.disable:
            print(line, flush=True)
        else:
            self._bar.write(line)


def _few(rows: list[int]) -> str:
    shown = ", ".join(map(str, rows[:8]))
    return shown if len(rows) <= 8 else f"{shown} and {len(rows) - 8} more, all of them in metrics.jsonl"


def _words(metrics: dict[str, float]) -> str:
    shares = ("accuracy", "agreement")
    return ", ".join(
        f"{name} {n:.1%}" if name in shares else f"{name} {format_number(n)}" for name, n in metrics.items()
    )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
