"""From `Mean` to numbers, and to the files that keep them: JSONL always, TensorBoard where it is wanted and there."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

import jax

from distil_jax.structs import Metrics


def to_numbers(metrics: Metrics) -> dict[str, float]:
    """Fetches metrics from the device and divides; a mean over nothing is 0."""
    return {name: float(mean.total) / max(float(mean.count), 1.0) for name, mean in jax.device_get(metrics).items()}


def perplexity(mlm: float) -> float:
    """exp of the MLM loss, infinite where that overflows."""
    return math.exp(mlm) if mlm < 700 else math.inf


class MetricsWriter:
    """Appends one JSON object a line to `metrics.jsonl`: {"step": ..., "kind": ..., name: number, ...}.

    Args:
      folder: the run's.
      step: where the run goes on from; lines of later steps, written by a run that was then cut off, are dropped.
      tensorboard: whether to write event files too, which needs the tensorboardX package.
      enabled: False writes nothing: of several processes, one writes.
    """

    def __init__(self, folder: str | Path, *, step: int = 0, tensorboard: bool = False, enabled: bool = True) -> None:
        self.folder, self._lines, self._events = Path(folder), None, None
        if not enabled:
            return
        path = self.folder / "metrics.jsonl"
        kept = [line for line in read_metrics(folder) if line["step"] <= step] if step else []
        draft = path.with_name(".metrics.jsonl")  # a kill here loses no line
        draft.write_text("".join(map(_dumps, kept)), encoding="utf-8")
        os.replace(draft, path)
        self._lines = path.open("a", encoding="utf-8")
        self._events = _event_writer(self.folder / "tensorboard", step) if tensorboard else None

    def write(self, step: int, kind: str, numbers: dict[str, float]) -> None:
        """Writes the numbers of one step; `kind` is "train" or "held_out"."""
        if self._lines is None:
            return
        self._lines.write(_dumps({"step": step, "kind": kind, **numbers}))
        self._lines.flush()
        if self._events is not None:
            for name, number in numbers.items():
                self._events.add_scalar(f"{kind}/{name}", number, step)

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()
        if self._events is not None:
            self._events.close()


def read_metrics(folder: str | Path) -> list[dict[str, float | str]]:
    """The lines of a run's `metrics.jsonl`; a last line that was cut off is left out."""
    path = Path(folder) / "metrics.jsonl"
    return list(_whole_lines(path.read_text(encoding="utf-8").splitlines())) if path.exists() else []


def last_held_out(lines: list[dict[str, float | str]]) -> dict[str, float]:
    """The numbers of the newest evaluation among the lines of a run; none where there was none."""
    found = [line for line in lines if line["kind"] == "held_out"] or [{}]
    return {name: number for name, number in found[-1].items() if name not in ("step", "kind")}


def _dumps(line: dict[str, float | str]) -> str:
    # JSON has no word for what is not a number.
    plain = {name: None if isinstance(n, float) and not math.isfinite(n) else n for name, n in line.items()}
    return json.dumps(plain) + "\n"


def _whole_lines(lines: list[str]) -> Iterable[dict[str, float | str]]:
    for place, line in enumerate(lines, 1):
        try:
            yield {name: math.nan if number is None else number for name, number in json.loads(line).items()}
        except json.JSONDecodeError:
            if place < len(lines):
                raise


def _event_writer(folder: Path, step: int):
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        print("No TensorBoard files: the package tensorboardX is not installed. metrics.jsonl has every number.")
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
