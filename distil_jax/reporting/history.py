"""A run's history from its metrics.jsonl: how far it came, how fast, and how long it took."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, get_args

from distil_jax.config.task import Metric

JUDGES: tuple[str, ...] = get_args(Metric)  # what the models of tasks are judged by
SHARES = ("agreement", *JUDGES)  # shown in percent


@dataclass(frozen=True)
class History:
    """A run so far.

    Attributes:
      done: steps.
      evaluations: its held-out lines, in order.
      skipped: the steps whose update was left out.
      rates: the readings of tokens per second, sorted.
      seconds_per_step: the median reading, or NaN.
      tokens_per_step: the mean, or NaN.
      step_seconds: what all steps took, without the first after each start.
      compile_seconds: what these first steps took, most of it XLA's compilation.
    """

    done: int
    evaluations: list[dict[str, Any]]
    skipped: list[int]
    rates: list[float]
    seconds_per_step: float
    tokens_per_step: float
    step_seconds: float
    compile_seconds: float

    @property
    def rate(self) -> float:
        return median(self.rates)

    @property
    def seconds(self) -> float:
        return self.step_seconds + self.compile_seconds


def history(lines: list[dict[str, Any]]) -> History:
    """Reads the lines as `read_metrics` returns them, the last of them maybe of a run that is still going."""
    trained = [line for line in lines if line["kind"] == "train"]
    before = [0, *(line["step"] for line in trained)]
    steps = [line["step"] - last for line, last in zip(trained, before, strict=False)]
    took = [n * line["seconds_per_step"] for n, line in zip(steps, trained, strict=True) if "seconds_per_step" in line]
    tokens = _finite(trained, "tokens_per_step")
    return History(
        done=max((line["step"] for line in lines), default=0),
        evaluations=[line for line in lines if line["kind"] == "held_out"],
        skipped=[line["step"] for line in lines if line["kind"] == "skipped"],
        rates=sorted(_finite(trained, "tokens_per_second")),
        seconds_per_step=median(sorted(_finite(trained, "seconds_per_step"))),
        tokens_per_step=sum(tokens) / len(tokens) if tokens else math.nan,
        step_seconds=sum(took),
        compile_seconds=sum(_finite(trained, "compile_seconds")),
    )


def median(values: list[float]) -> float:
    """The upper median of sorted values; NaN without any."""
    return values[len(values) // 2] if values else math.nan


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if not 0 <= seconds < 1e10:
        return "an unknown time"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def count(number: float) -> str:
    """A large number in three digits."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if size <= number < math.inf:
            return f"{number / size:.3g} {word}"
    return f"{float(f'{number:.3g}'):,.0f}"


def short(number: float, digits: int = 4) -> str:
    """A number in a few digits, and a large one without its fraction, but never as 3.6e+04."""
    return f"{number:,.0f}" if 1000 <= abs(number) < 1e12 else f"{number:.{digits}g}"


def _finite(lines: list[dict[str, Any]], name: str) -> list[float]:
    return [line[name] for line in lines if name in line and math.isfinite(line[name])]
