"""What a run shows while it works: a bar that fits a narrow terminal, plain lines elsewhere, and nothing in silence."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import sys
import termios
from types import SimpleNamespace

import pytest

from distil_jax.config.run import TrainConfig
from distil_jax.io.metrics import MetricsWriter, read_metrics
from distil_jax.runtime import progress as module
from distil_jax.runtime.divergence import Divergence
from distil_jax.runtime.progress import Progress
from distil_jax.structs import Mean


class Run:
    """A run on a clock of its own: what a step and a compilation take is what the test says."""

    def __init__(self, folder, monkeypatch, *, steps, **more):
        self.now = 1000.0
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self.now))
        config = TrainConfig(steps=steps, log_every=10)
        self.writer = MetricsWriter(folder)
        self.progress = Progress(
            config, 0, writer=self.writer, row_indices=lambda step: [], divergence=Divergence(config), **more
        )
        self.lengths = set()

    def step(self, step, *, length=128, seconds=2.0, compiling=0.0):
        """A step that the device begins to work on once it is compiled, and has ended when its metrics are read."""
        with self.progress.step(length):
            if length not in self.lengths:
                self.lengths.add(length)
                self.now += compiling
        names = {"loss": 23.62, "kl": 1.524, "mlm": 7.848, "cosine": 0.3081, "tokens": 131_072.0}
        self.progress.add(step, {name: Mean(value, 1.0) for name, value in names.items()})
        self.now += seconds

    def end(self):
        self.progress.flush()
        self.progress.close()
        self.writer.close()


@contextlib.contextmanager
def terminal(monkeypatch, columns, streams=("stdout", "stderr")):
    """Puts the streams on a terminal of so many columns; yields a function that returns what it got so far."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    os.set_blocking(ours, False)
    got = []
    with os.fdopen(ours, "rb", buffering=0) as screen, os.fdopen(theirs, "w") as stream, monkeypatch.context() as patch:

        def read():
            stream.flush()
            while piece := screen.read(65536):
                got.append(piece)
            return b"".join(got).decode()

        patch.setenv("COLUMNS", str(columns))  # the stdout that Python began with is no terminal
        for name in streams:
            patch.setattr(sys, name, stream)
        yield read


def test_the_bar_of_a_long_run_fits_80_columns(tmp_path, monkeypatch):
    with terminal(monkeypatch, 80) as read:
        run = Run(tmp_path, monkeypatch, steps=100_000)
        for step in range(1, 401):
            run.step(step, compiling=30.0)
            read()
        run.progress.flush()
        held_out = {"mlm": 6.851, "perplexity": 945.3, "accuracy": 0.123, "kl": 1.234, "agreement": 0.99}
        run.progress.held_out(400, held_out)
        run.end()
        lines = re.split(r"\r\n|\r|\n", read())
    assert max(map(len, lines)) <= 80
    bars = [line for line in lines if re.search(r"\d/100000", line)]
    assert bars and bars[-1].strip() and all(bar.index("|") < 6 and "/100000" in bar for bar in bars)
    # 2 s a step: the compilation is in neither number.
    late = [bar for bar in bars if "tokens/s" in bar]
    assert late and all(", loss 23.62, 65,536 tokens/s, " in bar and bar.endswith(" left") for bar in late)
    assert "55 h 2" in late[-1] and "?" not in "".join(bars)
    above = " ".join(" ".join(lines).split())
    assert above.count("step 1 loss") == 1 and above.count("step 400 loss") == 1, "the first, and at an evaluation"
    assert len(re.findall(r"step \d+ loss", above)) == 2, "and no others yet"
    assert "kl 1.524, mlm 7.848, cosine 0.3081 65,536 tokens/s" in above
    assert "step 400 held-out: mlm 6.851, perplexity 945.3, accuracy 12.3%, kl 1.234, agreement 99.0%" in above


def test_every_tenth_of_a_run_leaves_a_line_above_the_bar(tmp_path, monkeypatch):
    with terminal(monkeypatch, 100) as read:
        run = Run(tmp_path, monkeypatch, steps=1000)
        for step in range(1, 1001):
            run.step(step)
            read()
        run.end()
        shown = [int(step) for step in re.findall(r"step +(\d+)  loss", read().replace(",", ""))]
    assert shown == [1, *range(100, 1001, 100)]


def test_a_file_gets_every_line_also_where_a_terminal_shows_the_bar(tmp_path, monkeypatch, capsys):
    with terminal(monkeypatch, 80, streams=("stderr",)) as read:
        run = Run(tmp_path, monkeypatch, steps=1000)
        for step in range(1, 101):
            run.step(step)
        run.end()
        assert "100/1000" in read() and "Compiling" not in read()
    lines = capsys.readouterr().out.splitlines()
    assert [line[:11] for line in lines[1:]] == [f"step {step:>6}" for step in (1, *range(10, 101, 10))]
    assert max(map(len, lines)) > 80, "and no line is broken"


@pytest.mark.parametrize("known", [None, 26.7])
def test_compilation_is_announced_and_left_out_of_what_is_told_of_time(tmp_path, monkeypatch, capsys, known):
    run = Run(tmp_path, monkeypatch, steps=100, compile_seconds=known)
    run.progress.announce("the evaluation", 64)
    run.progress.announce("the evaluation", 64)
    for step in range(1, 101):
        before = capsys.readouterr().out if step == 1 else ""
        run.step(step, length=64 if step % 7 else 128, compiling=30.0)
        if step == 1:
            last = " (the last time took 27 s)" if known else ""
            assert before == "Compiling the evaluation for rows of 64 tokens ...\n"
            assert capsys.readouterr().out == f"Compiling the step for rows of 64 tokens{last} ...\n"
    run.end()
    shown = capsys.readouterr().out.splitlines()
    announced = [line for line in shown if line.startswith("Compiling")]
    assert announced == ["Compiling the step for rows of 128 tokens (the last time took 30 s) ..."]
    told = [line.rpartition("  ")[2] for line in shown if "tokens/s" in line]
    times = ["3 min 00 s", "2 min 40 s", "2 min 20 s", "2 min 00 s", "1 min 40 s", "1 min 20 s", "1 min 00 s"]
    assert told == [f"65,536 tokens/s, {left} left" for left in [*times, "40 s", "20 s", "0 s"]]
    first, *lines = read_metrics(tmp_path)
    assert first["compile_seconds"] == 32.0 and "seconds_per_step" not in first
    assert [line["seconds_per_step"] for line in lines] == pytest.approx([2.0] * 10)
    assert [line.get("compile_seconds") for line in lines] == [30.0] + [None] * 9
