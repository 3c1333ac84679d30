"""Several real processes over loopback: one run, the same batches and losses, checkpoints that any number continues."""

import json
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from conftest import LIMIT, finish, run_numbers, start

from distil_jax import cli
from distil_jax.io import huggingface
from distil_jax.runtime import processes
from distil_jax.runtime.run_folder import open_model
from distil_jax.schema import InputError

# Prints a hash of every global batch as the devices have it, then runs the command line.
PROGRAM = """
import dataclasses, hashlib, sys
import jax, numpy as np
from jax.experimental import multihost_utils
from distil_jax import cli
from distil_jax.runtime import loop
from distil_jax.runtime.program import BatchStream
from distil_jax.workflows import train
compile_run = train.compile_run
class Shown(BatchStream):
    def batches(self, step):
        for rows in super().batches(step):
            whole = multihost_utils.process_allgather(rows, tiled=True)
            step += 1
            digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(whole))).hexdigest()
            print("batch", step, digest, file=sys.stderr, flush=True)
            yield rows
def watched(parts):
    program = compile_run(parts)
    return dataclasses.replace(program, stream=Shown(**vars(program.stream)))
train.compile_run = watched
loop.prefetch = lambda items: items  # gathering is a collective: not from another thread
sys.exit(cli.main(sys.argv[1:]))
"""
STEPS = 8
SETTINGS = (f"train.steps={STEPS}", "train.eval_rows=16", "train.tensorboard=false", "train.accumulation=1")


def train(count, workshop, output, *settings):
    overrides = [word for setting in (*SETTINGS, *settings) for word in ("--set", setting)]
    return start(count, ["train", workshop / "run.toml", "--output", output, *overrides], program=PROGRAM)


def batch_hashes(stderr):
    return dict(re.findall(r"^batch (\d+) (\w+)$", stderr, re.MULTILINE))


def losses(folder):
    return {line["step"]: line["loss"] for line in run_numbers(folder) if line["kind"] == "train"}


@pytest.fixture(scope="module")
def alone(workshop, tmp_path_factory):
    """The run by one process with eight devices, and the hashes of its batches."""
    output = tmp_path_factory.mktemp("alone") / "run"
    ((status, _, stderr),) = finish(train(1, workshop, output))
    assert status == 0, stderr
    return output, batch_hashes(stderr)


def same_run(output, alone):
    result, expected = losses(output), losses(alone)
    assert result.keys() == expected.keys()
    for step, loss in expected.items():
        np.testing.assert_allclose(result[step], loss, rtol=1e-5)
    mine, theirs = open_model(output), open_model(alone)
    assert mine.step == theirs.step
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), mine.params, theirs.params)


def test_processes_train_as_one_and_a_checkpoint_of_two_is_continued_by_one_and_by_four(workshop, tmp_path, alone):
    """Two begin; SIGTERM to one of them, and both save the same step and end with 75; others go on to the end."""
    started = train(2, workshop, tmp_path / "two")
    metrics = tmp_path / "two" / "metrics.jsonl"
    deadline = time.monotonic() + LIMIT
    while not (metrics.exists() and '"step": 2' in metrics.read_text()):
        assert time.monotonic() < deadline and started[0].poll() is None, finish(started)
        time.sleep(0.05)
    started[1].send_signal(signal.SIGTERM)
    ended = finish(started, 60)  # seconds, which is what a machine that is taken away leaves
    assert [status for status, *_ in ended] == [75, 75], ended
    steps = {re.search(r"Stopped after step (\d+)", stderr)[1] for *_, stderr in ended}
    assert len(steps) == 1, "all stop after the same step"
    (step,) = map(int, steps)
    assert open_model(tmp_path / "two").step == step < STEPS
    for _, _, stderr in ended:
        assert batch_hashes(stderr).items() <= alone[1].items(), "every process saw the same global batches"
    for number, loss in losses(tmp_path / "two").items():
        np.testing.assert_allclose(loss, losses(alone[0])[number], rtol=1e-5)
    printed = [[line for line in stdout.splitlines() if not line.startswith("[Gloo]")] for _, stdout, _ in ended]
    assert not any(printed[1:]) and sum("2 process(es)" in line for line in printed[0]) == 1, "one speaks, once"

    for count, settings in ((1, []), (4, ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"])):
        output = tmp_path / f"by-{count}"
        shutil.copytree(tmp_path / "two", output)
        ended = finish(train(count, workshop, output, *settings))
        assert all(status == 0 for status, *_ in ended), ended
        for _, _, stderr in ended:
            later = {number: digest for number, digest in alone[1].items() if int(number) > step}
            assert batch_hashes(stderr) == later, "from the same position on"
        same_run(output, alone[0])


@pytest.mark.parametrize("values", [("x:1", "", ""), ("x:1", "2", "2"), ("x:1", "two", "0"), ("x", "2", "0")])
def test_variables_that_do_not_go_together_are_refused(monkeypatch, values):
    for name, value in zip(("DISTIL_COORDINATOR", "DISTIL_NUM_PROCESSES", "DISTIL_PROCESS_ID"), values, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="set all three, or none"):
        processes.connect()


def test_the_environment_is_one_line_without_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("DISTIL_RETRIES", "5")
    line = processes.environment()
    assert "8 x cpu" in line and "DISTIL_RETRIES=5" in line and "secret" not in line and "\n" not in line


def test_two_processes_fine_tune_as_one(workshop, tmp_path):
    """Each holds half of every parameter; the last batch of the dev examples is not full; the first one writes."""
    animals = ("cat", "dog", "bird")
    pairs = [(a, b) for a in animals for b in animals if a != b]
    lines = [f"the {a} sees the {b},{'cat' if 'cat' in (a, b) else 'other'}" for a, b in pairs * 6]
    (tmp_path / "task.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    (tmp_path / "task.toml").write_text(f'[task]\ntrain = "{tmp_path}/task.csv"\ndev = "{tmp_path}/task.csv"\n')
    words = ["finetune", workshop / "teacher", "--task", tmp_path / "task.toml", "--set", "train.batch_rows=16"]
    words += ["--set", "train.steps=4", "--set", "optimizer.eps=1e-6", "--set", "train.tensorboard=false"]
    words += ["--set", "optimizer.learning_rate=1e-3"]
    for status, _, stderr in finish(start(2, [*words, "--output", tmp_path / "2", "--set", "mesh.fsdp=2"], devices=4)):
        assert status == 0, stderr
    assert cli.main([*map(str, words), "--output", str(tmp_path / "1")]) == 0
    (_, head, two), (_, _, one) = (huggingface.load_task(tmp_path / count / "model") for count in ("2", "1"))
    assert head.names == ("cat", "other")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), two, one)
    result, expected = (json.loads((tmp_path / count / "scores.json").read_text()) for count in ("2", "1"))
    assert result["step"] == expected["step"] and result["dev"] == pytest.approx(expected["dev"], abs=1e-4)
