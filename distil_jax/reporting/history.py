"""A run's history from its metrics.jsonl: its steps, evaluations, throughput and times. Also formats such numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, get_args

from distil_jax.config.task import Metric
from distil_jax.io.metrics import REFERENCES

TASK_METRICS: tuple[str, ...] = get_args(Metric)
PERCENT_METRICS = ("agreement", *TASK_METRICS)  # shown in percent


@dataclass(frozen=True)
class History:
    """What a run has done so far.

    Attributes:
      steps: optimiser steps done.
      evaluations: the held-out lines of metrics.jsonl, in order.
      references: by name, such as "teacher", the lines with what evaluations are read against; older runs have none.
      skipped: the steps whose update was skipped because of a loss or gradient that was not finite.
      throughputs: all measurements of tokens per second, sorted.
      seconds_per_step: the median measurement, or NaN.
      tokens_per_step: the mean, or NaN.
      step_seconds: total time of the steps, except for the first step after each start.
      compile_seconds: total time of these first steps, which is mostly XLA's compilation.
    """

    steps: int
    evaluations: list[dict[str, Any]]
    references: dict[str, dict[str, Any]]
    skipped: list[int]
    throughputs: list[float]
    seconds_per_step: float
    tokens_per_step: float
    step_seconds: float
    compile_seconds: float

    @property
    def throughput(self) -> float:
        """The median of tokens per second, or NaN."""
        return median(self.throughputs)

    @property
    def seconds(self) -> float:
        """Total time of all steps."""
        return self.step_seconds + self.compile_seconds


def history(lines: list[dict[str, Any]]) -> History:
    """Summarises the lines of metrics.jsonl, as `read_metrics` returns them. The run may still be going."""
    train_lines = [line for line in lines if line["kind"] == "train"]
    step_seconds, last = [], 0
    for line in train_lines:
        if "seconds_per_step" in line:
            step_seconds.append((line["step"] - last) * line["seconds_per_step"])
        last = line["step"]
    tokens = _finite(train_lines, "tokens_per_step")
    return History(
        steps=max((line["step"] for line in lines), default=0),
        evaluations=[line for line in lines if line["kind"] == "held_out"],
        references={REFERENCES[line["kind"]]: line for line in lines if line["kind"] in REFERENCES},
        skipped=[line["step"] for line in lines if line["kind"] == "skipped"],
        throughputs=sorted(_finite(train_lines, "tokens_per_second")),
        seconds_per_step=median(sorted(_finite(train_lines, "seconds_per_step"))),
        tokens_per_step=sum(tokens) / len(tokens) if tokens else math.nan,
        step_seconds=sum(step_seconds),
        compile_seconds=sum(_finite(train_lines, "compile_seconds")),
    )


def median(values: list[float]) -> float:
    """The upper median of sorted values, or NaN if there are none."""
    return values[len(values) // 2] if values else math.nan


def format_duration(seconds: float) -> str:
    """A duration in its two largest units, such as "2 h 01 min"."""
    if not 0 <= seconds < 1e10:
        return "an unknown time"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def format_count(number: float) -> str:
    """A large number with three significant digits, such as "1.62 million"."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if size <= number < math.inf:
            return f"{number / size:.3g} {word}"
    return f"{float(f'{number:.3g}'):,.0f}"


def _finite(lines: list[dict[str, Any]], name: str) -> list[float]:
    """The finite values of a metric, in order."""
    return [line[name] for line in lines if name in line and math.isfinite(line[name])]
