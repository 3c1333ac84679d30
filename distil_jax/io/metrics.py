"""From `Mean` to plain numbers, and to files: JSONL always, TensorBoard if it is wanted and installed."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from distil_jax.files import write_whole
from distil_jax.schema import InputError, require
from distil_jax.structs import Mean, Metrics

_BATCHES_LATE = 16  # so many may be under way before their metrics are fetched


def to_floats(metrics: Metrics) -> dict[str, float]:
    """Fetches metrics from the device and divides; a mean over nothing is 0."""
    return {name: float(mean.total) / max(float(mean.count), 1.0) for name, mean in jax.device_get(metrics).items()}


class MetricSums:
    """Adds up the metrics of batches on the host in float64: float32 sums would lose counts of 100 million tokens.

    Metrics are fetched some batches late, so that the host does not wait for the device at every batch.
    """

    def __init__(self) -> None:
        self._late: deque[Metrics] = deque()
        self._sums: dict[str, Mean] = {}

    def add(self, metrics: Metrics) -> None:
        """Adds the metrics of one batch, whose arrays need not be computed yet."""
        self._late.append(metrics)
        if len(self._late) > _BATCHES_LATE:
            self._fetch()

    def means(self) -> dict[str, float]:
        """The means over everything that was added, as `to_floats` computes them."""
        while self._late:
            self._fetch()
        return to_floats(self._sums)

    def _fetch(self) -> None:
        for name, mean in jax.device_get(self._late.popleft()).items():
            mean = Mean(float(mean.total), float(mean.count))
            self._sums[name] = self._sums[name] + mean if name in self._sums else mean


def perplexity(mlm: float) -> float:
    """exp of the MLM loss, infinite where that overflows."""
    return math.exp(mlm) if mlm < 700 else math.inf


class MetricsWriter:
    """Appends one JSON object a line to `metrics.jsonl`: {"step": ..., "kind": ..., name: number, ...}.

    A full disk stops no run: lines that could not be written are kept and tried again with the next one.

    Args:
      folder: the run's.
      step: where the run resumes; lines of later steps, which an interrupted run wrote, are dropped.
      tensorboard: whether to write event files too, which needs the tensorboardX package.
      enabled: False writes nothing; with several processes, one writes.

    Attributes:
      failure: why the newest lines are not on disk, or None.
    """

    def __init__(self, folder: str | Path, *, step: int = 0, tensorboard: bool = False, enabled: bool = True) -> None:
        self.folder, self.failure = Path(folder), None
        self._lines, self._unwritten, self._events = None, b"", None
        if not enabled:
            return
        path = self.folder / "metrics.jsonl"
        kept = [line for line in read_metrics(folder) if line["step"] <= step] if step else []
        write_whole(path, "".join(map(_dumps, kept)))  # a kill here loses no line
        self._lines = path.open("ab", buffering=0)
        self._events = _event_writer(self.folder / "tensorboard", step) if tensorboard else None

    def write(self, step: int, kind: str, metrics: dict[str, Any]) -> None:
        """Writes the metrics of one step; `kind` is "train", "held_out" or "skipped"."""
        if self._lines is None:
            return
        self._unwritten += _dumps({"step": step, "kind": kind, **metrics}).encode()
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._lines.write(self._unwritten) :]
            if self._events is not None:
                for name, number in metrics.items():
                    if isinstance(number, float) and math.isfinite(number):
                        self._events.add(f"{kind}/{name}", number, step)
                self._events.flush()
            self.failure = None
        except OSError as error:
            self.failure = f"the metrics of step {step} could not be written ({error.strerror})"

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()
        if self._events is not None:
            with contextlib.suppress(OSError):  # the disk is still full, and `failure` has said so
                self._events.close()


def read_metrics(folder: str | Path) -> list[dict[str, float | str]]:
    """The lines of a run's `metrics.jsonl`; a last line that was cut off is left out.

    Raises:
      InputError: a line that `MetricsWriter` cannot have written.
    """
    path = Path(folder) / "metrics.jsonl"
    return list(_whole_lines(path, path.read_bytes().splitlines())) if path.exists() else []


def last_held_out(lines: list[dict[str, float | str]]) -> dict[str, float]:
    """The metrics of the newest evaluation among a run's lines; empty without one."""
    evaluations = [line for line in lines if line["kind"] == "held_out"] or [{}]
    return {name: number for name, number in evaluations[-1].items() if name not in ("step", "kind")}


def _dumps(line: dict[str, float | str]) -> str:
    # JSON has neither NaN nor infinity.
    plain = {name: None if isinstance(n, float) and not math.isfinite(n) else n for name, n in line.items()}
    return json.dumps(plain) + "\n"


def _whole_lines(path: Path, lines: list[bytes]) -> Iterable[dict[str, float | str]]:
    for place, line in enumerate(lines, 1):
        try:
            yield _checked(json.loads(line.decode()))
        except (ValueError, RecursionError) as error:
            if place == len(lines) and isinstance(error, json.JSONDecodeError):
                return
            raise InputError(
                f"Line {place} of {path} is damaged ({error}): remove that line, or put a copy of the file back."
            ) from error


def _checked(line: Any) -> dict[str, float | str]:
    """A checked line, with None turned back into the NaN that it stands for."""
    require(isinstance(line, dict), "it is no object")
    step, kind = line.get("step"), line.get("kind")
    require(type(step) is int and step >= 0 and isinstance(kind, str), "it has no step and kind")
    for name, number in line.items():
        whole = type(number) is int and abs(number) < 2**63
        other = name == "kind" or (name == "rows" and kind == "skipped")
        known = whole or number is None or type(number) is float or other
        require(known and name.isidentifier(), f"{name!r} is no number of a run")
    return {name: math.nan if number is None else number for name, number in line.items()}


def _event_writer(folder: Path, step: int) -> _Events | None:
    try:
        return _Events(folder, step)
    except ImportError:
        print("No TensorBoard files: the package tensorboardX is not installed. metrics.jsonl has every number.")
        return None


class _Events:
    """An event file, written by this thread: tensorboardX's own SummaryWriter hangs after a full disk."""

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2

        folder.mkdir(exist_ok=True)
        self._event, self._scalar = event_pb2.Event, summary.scalar
        self._file = event_file_writer.EventsWriter(str(folder / "events"))
        # Makes TensorBoard drop the later steps of an earlier file.
        began = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._file.write_event(self._event(wall_time=time.time(), step=step + 1, session_log=began))

    def add(self, name: str, number: float, step: int) -> None:
        event = self._event(wall_time=time.time(), step=step, summary=self._scalar(name, number))
        self._file.write_event(event)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()
