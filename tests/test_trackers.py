"""Experiment trackers beside metrics.jsonl: they get the same numbers, and whatever they do, a run goes on."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import pytest

from distil_jax import cli
from distil_jax.io.metrics import MetricsWriter, read_metrics
from distil_jax.io.trackers import start_trackers
from distil_jax.runtime import processes


class Fake(types.ModuleType):
    """A tracker's package that remembers its calls, and raises at one of them."""

    def __init__(self, name, *, fails_at=""):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.calls, self.fails_at = [], fails_at

    def _called(self, call, *given, **named):
        self.calls.append((call, given, named))
        if call == self.fails_at:
            raise ConnectionError("the server\nis gone")

    def init(self, **named):
        self._called("init", **named)
        return types.SimpleNamespace(
            log=lambda metrics, step: self._called("log", metrics, step=step), finish=lambda: self._called("finish")
        )

    def made(self, call):
        return [(given, named) for name, given, named in self.calls if name == call]


@pytest.fixture
def fakes(monkeypatch):
    def install(**fails_at):
        made = {name: Fake(name, fails_at=call) for name, call in fails_at.items()}
        for name, module in made.items():
            monkeypatch.setitem(sys.modules, name, module)
        return made

    return install


def test_a_run_goes_on_whatever_a_tracker_does_and_both_have_the_numbers(workshop, tmp_path, fakes, capsys):
    made, run = fakes(wandb="finish", trackio="log"), tmp_path / "run"
    settings = ("train.steps=2", "train.tensorboard=false", "train.eval_every=0", 'train.trackers=["wandb","trackio"]')
    words = [word for setting in settings for word in ("--set", setting)]
    assert cli.main(["train", str(workshop / "run.toml"), "--output", str(run), *words]) == 0
    stderr = capsys.readouterr().err
    for name in made:
        assert stderr.count(f"{name} failed (the server is gone) and gets no more metrics. The training goes on") == 1
    ((_, start),) = made["wandb"].made("init")
    assert start["project"] == "distil-jax" and start["name"] == f"run-{start['id']}" and start["resume"] == "allow"
    assert start["config"]["train"]["steps"] == 2 and start["config"]["teacher"]["path"] == "teacher"
    assert str(workshop) not in repr(start["config"])
    logged = {
        (named["step"], name): number
        for (metrics,), named in made["wandb"].made("log")
        for name, number in metrics.items()
    }
    written = {
        (line["step"], f"{line['kind']}/{name}"): number
        for line in read_metrics(run)
        for name, number in line.items()
        if isinstance(number, float)
    }
    assert logged == written and (2, "held_out/mlm") in logged and (1, "train/loss") in logged
    assert len(made["wandb"].made("finish")) == len(made["trackio"].made("log")) == 1, "and nothing after a failure"
    assert not made["trackio"].made("finish")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_is_the_same_one_there_and_a_new_one_is_not(tmp_path, fakes, name, monkeypatch):
    monkeypatch.setenv(f"{name.upper()}_PROJECT", "mine")
    module = fakes(**{name: ""})[name]
    for step in (0, 5, 0):
        start_trackers([name], tmp_path, step, {})
    first, resumed, new = [named for _, named in module.made("init")]
    assert first == resumed and first["name"] != new["name"] and first["project"] == "mine"


@pytest.mark.parametrize("reason", ["init", "import"])
def test_a_tracker_that_does_not_start_gets_nothing(tmp_path, fakes, monkeypatch, capsys, reason):
    if reason == "init":
        fakes(wandb="init")
    else:
        monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises
    with_failure = MetricsWriter(tmp_path, trackers=start_trackers(["wandb"], tmp_path, 0, {}))
    with_failure.write(1, "train", {"loss": 2.0})
    with_failure.close()
    assert read_metrics(tmp_path) == [{"step": 1, "kind": "train", "loss": 2.0}]
    assert capsys.readouterr().err.count("wandb failed (") == 1


def test_a_tracker_that_is_not_installed_is_refused_before_the_run_begins(workshop, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = ["--output", str(tmp_path / "run"), "--set", 'train.trackers=["trackio"]']
    assert cli.main(["train", str(workshop / "run.toml"), *words]) == 2
    sentence = "train.trackers names trackio, which is not installed: pip install 'distil-jax[track]', or leave it out."
    assert capsys.readouterr().err == f"distil-jax: {sentence}\n" and not (tmp_path / "run").exists()


def test_only_the_first_process_starts_trackers(workshop, tmp_path, fakes, monkeypatch):
    module = fakes(wandb="")["wandb"]
    monkeypatch.setattr(processes, "is_first", lambda: False)
    settings = ["train.steps=1", "train.tensorboard=false", "train.eval_every=0", 'train.trackers=["wandb"]']
    words = [word for setting in settings for word in ("--set", setting)]
    (tmp_path / "run").mkdir()
    assert cli.main(["train", str(workshop / "run.toml"), "--output", str(tmp_path / "run"), *words]) == 0
    assert module.calls == []
