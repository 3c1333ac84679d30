"""Turns metrics into plain numbers, and writes them: to JSONL always, to TensorBoard and trackers if wanted."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from distil_jax.files import write_whole
from distil_jax.io.trackers import Tracker
from distil_jax.schema import InputError, require
from distil_jax.structs import Mean, Metrics

# Kinds of lines in metrics.jsonl, of step 0, with what a run's evaluations are read against.
REFERENCES = {"teacher": "teacher", "largest_class": "largest class"}
_ROUNDING = 5e-7  # about what float32 leaves of a 0 that is a difference of numbers above 1
_BATCHES_LATE = 16  # metrics are fetched once so many later batches have been added


def to_floats(metrics: Metrics) -> dict[str, float]:
    """Fetches metrics from the device, as means; a mean over nothing is 0."""
    return {name: float(mean.total) / max(float(mean.count), 1.0) for name, mean in jax.device_get(metrics).items()}


class MetricSums:
    """Adds up the metrics of batches on the host.

    Sums are in float64, because float32 cannot count 100 million tokens one by one. Metrics are fetched some batches
    late, so that the host does not wait for the device at every batch.
    """

    def __init__(self) -> None:
        self._late: deque[Metrics] = deque()
        self._sums: dict[str, Mean] = {}

    def add(self, metrics: Metrics) -> None:
        """Adds the metrics of one batch. The device may still be computing them."""
        self._late.append(metrics)
        if len(self._late) > _BATCHES_LATE:
            self._fetch()

    def means(self) -> dict[str, float]:
        """The means over everything that was added; a mean over nothing is 0."""
        while self._late:
            self._fetch()
        return to_floats(self._sums)

    def _fetch(self) -> None:
        for name, mean in jax.device_get(self._late.popleft()).items():
            mean = Mean(float(mean.total), float(mean.count))
            self._sums[name] = self._sums[name] + mean if name in self._sums else mean


def format_number(number: float, digits: int = 4) -> str:
    """A metric with a few significant digits; from 1,000 on all digits before the point, instead of 3.6e+04.

    What rounding leaves of 0, such as a KL of -1.7e-09, is shown as 0.
    """
    if abs(number) < _ROUNDING:
        return "0"
    return f"{number:,.0f}" if 1000 <= abs(number) < 1e12 else f"{number:.{digits}g}"


def perplexity(mlm: float) -> float:
    """exp of the MLM loss, or infinity if that overflows."""
    return math.exp(mlm) if mlm < 700 else math.inf


class MetricsWriter:
    """Appends lines of JSON to `metrics.jsonl`: {"step": ..., "kind": ..., name: number, ...}.

    A full disk does not stop a run: lines that could not be written are kept and written with the next one.

    Args:
      folder: the run's folder.
      step: where the run resumes; lines of later steps, which an interrupted run wrote, are dropped.
      tensorboard: whether to write event files too, which needs the tensorboardX package.
      trackers: get every metric too.
      enabled: False writes nothing; of several processes, only one should write.

    Attributes:
      failure: why the newest lines are not on disk, or None.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        step: int = 0,
        tensorboard: bool = False,
        trackers: Sequence[Tracker] = (),
        enabled: bool = True,
    ) -> None:
        self.folder, self.failure, self._trackers = Path(folder), None, trackers
        self._lines, self._unwritten, self._events = None, b"", None
        if not enabled:
            return
        path = self.folder / "metrics.jsonl"
        kept = [line for line in read_metrics(folder) if line["step"] <= step] if step else []
        write_whole(path, "".join(map(_dumps, kept)))  # a kill here loses no line
        self._lines = path.open("ab", buffering=0)
        self._events = _event_writer(self.folder / "tensorboard", step) if tensorboard else None

    def write(self, step: int, kind: str, metrics: dict[str, Any]) -> None:
        """Writes the metrics of one step; `kind` is "train", "held_out", "skipped" or one of `REFERENCES`."""
        if self._lines is None:
            return
        self._unwritten += _dumps({"step": step, "kind": kind, **metrics}).encode()
        finite = {f"{kind}/{name}": n for name, n in metrics.items() if isinstance(n, float) and math.isfinite(n)}
        for tracker in self._trackers:
            tracker.log(finite, step)
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._lines.write(self._unwritten) :]
            if self._events is not None:
                for name, number in finite.items():
                    self._events.add(name, number, step)
                self._events.flush()
            self.failure = None
        except OSError as error:
            self.failure = f"the metrics of step {step} could not be written ({error.strerror})"

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.finish()
        if self._lines is not None:
            self._lines.close()
        if self._events is not None:
            with contextlib.suppress(OSError):  # the disk is still full, which `failure` says already
                self._events.close()


def read_metrics(folder: str | Path) -> list[dict[str, float | str]]:
    """The lines of a run's `metrics.jsonl`, without a last line that was cut off; empty if there is no such file.

    Raises:
      InputError: a line that `MetricsWriter` cannot have written.
    """
    path = Path(folder) / "metrics.jsonl"
    return list(_whole_lines(path, path.read_bytes().splitlines())) if path.exists() else []


def last_held_out(lines: list[dict[str, float | str]]) -> dict[str, float]:
    """The metrics of the newest evaluation among a run's lines; empty if there is none."""
    evaluations = [line for line in lines if line["kind"] == "held_out"] or [{}]
    return {name: number for name, number in evaluations[-1].items() if name not in ("step", "kind")}


def _dumps(line: dict[str, float | str]) -> str:
    # JSON has neither NaN nor infinity.
    plain = {name: None if isinstance(n, float) and not math.isfinite(n) else n for name, n in line.items()}
    return json.dumps(plain) + "\n"


def _whole_lines(path: Path, lines: list[bytes]) -> Iterable[dict[str, float | str]]:
    for number, line in enumerate(lines, 1):
        try:
            yield _checked(json.loads(line.decode()))
        except (ValueError, RecursionError) as error:
            if number == len(lines) and isinstance(error, json.JSONDecodeError):
                return
            raise InputError(
                f"Line {number} of {path} is damaged ({error}): remove that line, or restore the file from a copy."
            ) from error


def _checked(line: Any) -> dict[str, float | str]:
    """Checks a line, and turns None back into the NaN that it stands for."""
    require(isinstance(line, dict), "it is not a JSON object")
    step, kind = line.get("step"), line.get("kind")
    require(type(step) is int and step >= 0 and isinstance(kind, str), "it has no step and kind")
    for name, value in line.items():
        is_number = value is None or type(value) is float or (type(value) is int and abs(value) < 2**63)
        is_other = name == "kind" or (name == "rows" and kind == "skipped")
        require((is_number or is_other) and name.isidentifier(), f"{name!r} is not a metric")
    return {name: math.nan if value is None else value for name, value in line.items()}


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
        # Tells TensorBoard to drop later steps that an earlier file has.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._file.write_event(self._event(wall_time=time.time(), step=step + 1, session_log=start))

    def add(self, name: str, number: float, step: int) -> None:
        event = self._event(wall_time=time.time(), step=step, summary=self._scalar(name, number))
        self._file.write_event(event)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()
