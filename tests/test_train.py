"""A run from its first step to its last: what it leaves, how it goes on, and what it refuses; all on files."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
import weakref
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import LENGTH, RUN_STEPS, XLA, file_hashes, random_params, run_numbers, same_leaves, write_sentences

from distil_jax import cli
from distil_jax.config.load import load
from distil_jax.config.run import STUDENT_SHAPE, Config
from distil_jax.data.manifest import read_manifest
from distil_jax.data.prepare import PrepareConfig, prepare
from distil_jax.evaluation.held_out import evaluate
from distil_jax.io import huggingface
from distil_jax.io.checkpoint import Checkpoints
from distil_jax.io.metrics import MetricsWriter, read_metrics
from distil_jax.runtime import loop, run_folder
from distil_jax.runtime.assemble import assemble
from distil_jax.runtime.run_folder import open_model
from distil_jax.schema import InputError, build, to_dict
from distil_jax.workflows import train as command

REPOSITORY = Path(__file__).parents[1]


def train(workshop: Path, output: Path, *overrides: str) -> int:
    """`distil-jax train run.toml --output OUTPUT --set ...`, in this process."""
    sets = [word for override in overrides for word in ("--set", override)]
    return cli.main(["train", str(workshop / "run.toml"), "--output", str(output), *sets])


def of_kind(folder: Path, kind: str) -> list[dict]:
    return [line for line in read_metrics(folder) if line["kind"] == kind]


def saved_steps(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())


def params_of(run: Path, step: int | None = None):
    return open_model(run, step).params


def all_finite(tree) -> bool:
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


@pytest.fixture
def at_step(monkeypatch):
    """Calls `action` as soon as the line of a training step is on disk."""

    def arrange(step: int, action) -> None:
        write = MetricsWriter.write

        def write_and_act(self, at, kind, numbers):
            write(self, at, kind, numbers)
            if (at, kind) == (step, "train"):
                action()

        monkeypatch.setattr(MetricsWriter, "write", write_and_act)

    return arrange


@pytest.fixture(autouse=True)
def harmless_sigterm():
    """A SIGTERM that a run fails to catch must not end the whole test session."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    yield
    signal.signal(signal.SIGTERM, before)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="session")
def stopped_run(workshop) -> Path:
    """A run that SIGTERM stopped where no save was due. Copy it."""
    run = workshop / "stopped"
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    with pytest.MonkeyPatch.context() as patch:
        write = MetricsWriter.write

        def write_and_stop(self, at, kind, numbers):
            write(self, at, kind, numbers)
            if (at, kind) == (5, "train"):
                terminate()

        patch.setattr(MetricsWriter, "write", write_and_stop)
        assert train(workshop, run) == 75
    signal.signal(signal.SIGTERM, before)
    return run


@pytest.fixture
def stopped_copy(stopped_run, tmp_path) -> Path:
    return shutil.copytree(stopped_run, tmp_path / "run")


# What a run leaves


def test_the_folder_holds_what_the_design_says(finished_run, workshop):
    assert {"config.toml", "metrics.jsonl", "checkpoints", "tokenizer"} <= {
        path.name for path in finished_run.iterdir()
    }
    assert saved_steps(finished_run) == [10, 12]  # the last one, the best before it, and keep_checkpoints = 2
    assert file_hashes(finished_run / "tokenizer") == file_hashes(workshop / "rows" / "tokenizer")
    resolved = load(finished_run / "config.toml")
    given = load(workshop / "run.toml")
    assert resolved.student.layers and resolved.student.num_layers == len(resolved.student.layers)
    assert resolved.student.resolved(open_model(finished_run).config, open_model(workshop / "teacher").config) == (
        resolved.student
    ), "nothing is left open, and what is said is what was trained"
    assert resolved.compute.dtype == resolved.teacher.dtype == "float32"
    assert resolved.masking.mask_token_id == read_manifest(workshop / "rows").mask_id
    # Nothing else was changed by resolving.
    plain = [
        replace(
            config,
            student=replace(config.student, layers=(), fold_token_types=None, **dict.fromkeys(STUDENT_SHAPE)),
            compute=given.compute,
            teacher=given.teacher,
            masking=given.masking,
        )
        for config in (resolved, given)
    ]
    assert plain[0] == plain[1]
    # config.toml is whole: what it says is what a reader without any default would get.
    assert build(Config, tomllib.loads((finished_run / "config.toml").read_text())) == resolved
    assert to_dict(resolved).keys() == tomllib.loads((finished_run / "config.toml").read_text()).keys()


def test_metrics_have_every_step_and_the_untrained_baseline(finished_run, workshop):
    trained, held_out = of_kind(finished_run, "train"), of_kind(finished_run, "held_out")
    assert [line["step"] for line in trained] == list(range(1, RUN_STEPS + 1))
    assert [line["step"] for line in held_out] == [0, 5, 10, 12]
    for line in trained:
        assert {"loss", "kl", "mlm", "cosine", "gradient_norm", "learning_rate", "tokens_per_step"} <= line.keys()
        assert line["loss"] == pytest.approx(5 * line["kl"] + 2 * line["mlm"] + line["cosine"], rel=1e-5)
    assert "compile_seconds" in trained[0] and "tokens_per_second" not in trained[0]
    assert all(line["tokens_per_second"] > 0 for line in trained[1:])
    for line in held_out:
        assert line["perplexity"] == pytest.approx(math.exp(line["mlm"]), rel=1e-4)
        assert 0 <= line["agreement"] <= 1 and 0 <= line["accuracy"] <= 1 and line["kl"] > 0
    # Training moves towards the teacher, on text that it is trained on and on text that it is not.
    assert trained[-1]["loss"] < 0.9 * trained[0]["loss"]
    assert held_out[-1]["kl"] < 0.7 * held_out[0]["kl"]
    assert held_out[-1]["agreement"] > held_out[0]["agreement"]


def test_a_run_says_once_how_good_its_teacher_is(finished_run, workshop):
    """Judged like a student, on the same rows and masks: `eval` of the teacher alone is another way to the numbers."""
    (line,) = of_kind(finished_run, "teacher")
    assert line["step"] == 0 and read_metrics(finished_run).index(line) == 1, "beside the untrained student"
    alone = evaluate(open_model(workshop / "teacher"), workshop / "rows")
    assert {name: number for name, number in line.items() if name not in ("step", "kind")} == pytest.approx(alone)


def test_the_run_saw_more_than_one_epoch_and_batches_across_their_border(workshop):
    """What is proven here about resuming is proven for data that starts again in the middle of a batch."""
    rows = read_manifest(workshop / "rows").train.rows
    assert rows < 16 * RUN_STEPS and rows % 16


def test_tensorboard_holds_the_same_numbers(finished_run):
    pytest.importorskip("tensorboardX", reason="TensorBoard files are optional")
    (events,) = (finished_run / "tensorboard").iterdir()
    written = events.read_bytes()
    for tag in (b"train/loss", b"train/kl", b"held_out/agreement"):
        assert written.count(tag) == len(of_kind(finished_run, tag.decode().split("/")[0]))


def test_tensorboard_can_be_left_out(workshop, tmp_path):
    assert train(workshop, tmp_path / "run", "train.steps=1", "train.tensorboard=false") == 0
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_the_same_run_again_gives_the_same_bits(finished_run, workshop, tmp_path, capsys):
    """And so the comparisons below mean something: nothing in a run depends on the time or the folder."""
    assert train(workshop, tmp_path / "again", "train.steps=4", "train.log_every=2") == 0
    (teacher,) = of_kind(finished_run, "teacher")
    assert capsys.readouterr().out.count(f"\nteacher held-out: mlm {teacher['mlm']:.4g}, perplexity ") == 1
    ours = [line for line in run_numbers(tmp_path / "again") if line["step"] < 4 and line["kind"] != "train"]
    assert ours == [line for line in run_numbers(finished_run) if line["step"] == 0]
    whole = [line for line in run_numbers(finished_run) if line["kind"] == "train"]
    (pair,) = [line for line in of_kind(tmp_path / "again", "train") if line["step"] == 4][-1:]
    assert pair["loss"] == pytest.approx((whole[2]["loss"] + whole[3]["loss"]) / 2, rel=1e-12)  # a line is a mean


# What is kept


class Scripted:
    """Evaluations that say these scores, by step."""

    def __init__(self, scores: dict[int, float]) -> None:
        self.scores = scores

    def evaluate(self, state, alive):
        return {"mlm": self.scores[int(state.step)]}

    def criterion(self, metrics):
        return metrics["mlm"]


@pytest.fixture
def scored(monkeypatch):
    """Makes evaluations say these scores, by step."""
    compile_run = command.compile_run

    def arrange(scores: dict[int, float]) -> None:
        def with_scores(parts):
            return replace(compile_run(parts), evaluator=Scripted(scores))

        monkeypatch.setattr(command, "compile_run", with_scores)

    return arrange


QUIET = ("train.keep_checkpoints=1", "train.tensorboard=false")


def test_the_best_evaluation_is_kept_whatever_the_cadences(workshop, tmp_path, scored):
    """An evaluation that is no number is not the best, nor is that of the untrained student, which nobody can have."""
    scored({0: 0.1, 3: math.nan, 6: 2.0, 9: 3.0, 12: 4.0})
    for every in (3, 5):
        run = tmp_path / str(every)
        assert train(workshop, run, *QUIET, "train.eval_every=3", f"train.checkpoint_every={every}") == 0
        assert saved_steps(run) == [6, 12]
        assert same_leaves(params_of(run, 6), params_of(tmp_path / "3", 6))
        with contextlib.closing(Checkpoints(run / "checkpoints")) as checkpoints:
            assert checkpoints.best() == (6, 2.0)


def test_patience_counts_from_the_best_that_can_be_had(workshop, tmp_path, scored, at_step, capsys):
    """Also where the run was stopped in between, and the lines of its metrics are counted again."""
    scored({0: 0.1, 2: 3.0, 4: 2.0, 6: 2.5, 8: math.nan, 10: 1.0, 12: 1.0})
    settings = (*QUIET, "train.eval_every=2", "train.checkpoint_every=100", "train.patience=2")
    assert train(workshop, tmp_path / "unbroken", *settings) == 0
    shown = capsys.readouterr().out
    assert "the run ends after step 8" in shown
    why = "higher than on held-out text: in training, rarer words are masked more often and dropout is on."
    assert shown.count(why) == 1
    at_step(6, terminate)
    assert train(workshop, tmp_path / "run", *settings) == 75
    for printed in ("the run ends after step 8", "nothing is left to train"):
        assert train(workshop, tmp_path / "run", *settings) == 0
        assert printed in capsys.readouterr().out
    assert saved_steps(tmp_path / "run") == saved_steps(tmp_path / "unbroken") == [4, 8]


def test_where_the_best_is_damaged_the_next_best_is_kept(workshop, tmp_path, scored, at_step, capsys):
    scored({0: 0.1, 3: 1.0, 6: 2.0, 9: 1.5, 12: 1.8})
    run, settings = tmp_path / "run", (*QUIET, "train.eval_every=3", "train.checkpoint_every=100")
    at_step(6, terminate)
    assert train(workshop, run, *settings) == 75
    assert saved_steps(run) == [3, 7]
    files = (path for path in (run / "checkpoints" / "3").rglob("*") if path.is_file())
    damaged = max(files, key=lambda path: path.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert train(workshop, run, *settings) == 0
    assert "Checkpoint 3 in" in capsys.readouterr().err
    assert saved_steps(run) == [3, 9, 12]
    with contextlib.closing(Checkpoints(run / "checkpoints")) as checkpoints:
        result, problems = checkpoints.best_valid()
        assert result == 9 and len(problems) == 1


# What it holds


@pytest.mark.parametrize("resumed", [False, True])
def test_no_copy_of_a_model_stays_on_the_host(workshop, resumed):
    """Except the memory that a device of the CPU has in common with the host."""
    parts = assemble(load(workshop / "run.toml"))
    trees = (parts.teacher_params, parts.student_params)
    leaves = [weakref.ref(leaf) for tree in trees for leaf in jax.tree.leaves(tree)]
    program = command.compile_run(parts)
    del parts, trees
    state = program.first_state.drop() if resumed else jax.block_until_ready(program.first_state())
    gc.collect()
    placed = [shard.data for leaf in jax.tree.leaves(program.teacher_params) for shard in leaf.addressable_shards]
    kept = [leaf() for leaf in leaves if leaf() is not None]
    assert all(any(np.shares_memory(leaf, np.asarray(device)) for device in placed) for leaf in kept)
    assert len(kept) < len(leaves) and (state is None) == resumed


def test_nothing_but_rows_goes_to_the_devices_once_a_run_has_begun(workshop, monkeypatch):
    """Neither the models nor the masking weights are copied at every step, or with every batch that is judged."""

    def guarded(compile_for, *given):
        compiled = compile_for(*given)

        def run(*arguments):
            with jax.transfer_guard("disallow"):
                return compiled(*arguments)

        return run

    monkeypatch.setattr(command, "jit_step", partial(guarded, command.jit_step))
    monkeypatch.setattr(command, "jit_eval", partial(guarded, command.jit_eval))
    program = command.compile_run(assemble(load(workshop / "run.toml")))
    rows = next(program.stream.batches(0))
    state, _ = program.step(program.first_state(), program.teacher_params, rows, *program.step_arguments)
    assert program.evaluator.evaluate(state)["mlm"] > 0


# Whom it trains


def test_every_kind_of_first_student(finished_run, workshop, tmp_path):
    """Random, from a folder, from one without an MLM head, and from a run, beside the default from the teacher."""
    student = open_model(finished_run)
    huggingface.save(tmp_path / "whole", student.config, student.params, tokenizer=student.tokenizer)
    body = {name: tree for name, tree in student.params.items() if name != "mlm"}
    huggingface.save(tmp_path / "bare", replace(student.config, mlm_head=False), body, tokenizer=student.tokenizer)
    first = {}
    for init in ("random", str(tmp_path / "whole"), str(tmp_path / "bare"), str(finished_run)):
        name = Path(init).name
        run = tmp_path / f"run {name}"
        assert train(workshop, run, f"student.init={init}", "train.steps=3", "train.eval_every=0") == 0
        held_out = of_kind(run, "held_out")
        assert [line["step"] for line in held_out] == [0, 3]
        assert name in ("whole", "finished") or held_out[1]["kl"] < held_out[0]["kl"]
        assert load(run / "config.toml").student.layers == ()
        first[name] = held_out[0]
    # A student that goes on begins where the other ended, on the same held-out words.
    last = of_kind(finished_run, "held_out")[-1]
    compared = [name for name in last if name not in ("step", "kind")]
    for init in ("whole", "finished"):
        assert [first[init][name] for name in compared] == pytest.approx([last[name] for name in compared], rel=1e-5)
    assert first.pop("finished") == first["whole"]
    untrained = of_kind(finished_run, "held_out")[0]
    assert len({untrained["kl"], *(line["kl"] for line in first.values())}) == 4


def test_a_bare_encoder_keeps_everything_and_gets_a_head(finished_run, workshop, tmp_path):
    student = open_model(finished_run)
    body = {name: tree for name, tree in student.params.items() if name != "mlm"}
    huggingface.save(tmp_path / "bare", replace(student.config, mlm_head=False), body, tokenizer=student.tokenizer)
    parts = assemble(load(workshop / "run.toml", [f"student.init={tmp_path / 'bare'}"]))
    head = parts.student_params["mlm"]
    assert same_leaves({name: tree for name, tree in parts.student_params.items() if name != "mlm"}, body)
    assert jax.tree.map(np.shape, head) == jax.tree.map(np.shape, student.params["mlm"])
    assert all_finite(head) and np.std(head["transform"]["kernel"]) > 0


def test_without_its_losses_a_teacher_only_judges_and_token_types_stay(workshop, tmp_path):
    """The undistilled twin: it begins as the distilled one and is trained on the text alone. A BERT, by the way."""
    settings = ("student.token_types=2", "loss.kl=0", "loss.cosine=0", "train.steps=4", "train.eval_every=0")
    assert train(workshop, tmp_path / "run", *settings) == 0
    lines = read_metrics(tmp_path / "run")
    assert all("agreement" in line and "kl" in line for line in lines if line["kind"] == "held_out")
    assert not any("kl" in line or "cosine" in line for line in lines if line["kind"] == "train")
    parts = assemble(load(workshop / "run.toml", settings))
    teacher = parts.teacher_params
    for table in ("token_type", "position", "word"):
        assert same_leaves(parts.student_params["embeddings"][table], teacher["embeddings"][table])
    trained = open_model(tmp_path / "run")
    assert trained.config.token_types == 2
    assert trained.params["embeddings"]["token_type"].shape == (2, 32)
    # Texts of one kind train row 0 and leave row 1 as it was.
    moved = trained.params["embeddings"]["token_type"] != teacher["embeddings"]["token_type"]
    assert moved.any(axis=1).tolist() == [True, False]


def test_a_run_says_when_it_evaluates_and_what_is_wrong_with_it(workshop, tmp_path):
    """Where the config does not say, it evaluates and saves ten times, but at least every 1,000 steps."""
    text = (workshop / "run.toml").read_text()
    path = tmp_path / "run.toml"
    path.write_text(re.sub("(eval|checkpoint)_every.*|steps = 20.*", "", text))

    def about(*settings):
        program = command.compile_run(assemble(load(path, settings)))
        return program.config.train, program.description, " ".join(program.warnings)

    for steps, every in ((9, 1), (790, 79), (1_046, 105), (25_000, 1_000)):
        config, said, warned = about(f"train.steps={steps}")
        assert (config.eval_every, config.checkpoint_every) == (every, every)
        assert f"evaluated and saved every {every:,} steps" in said
        assert ("little is learned" in warned) == (steps < 100) and "no smaller" not in warned
    config, said, _ = about("train.eval_every=0", "train.steps=790")
    assert (config.eval_every, config.checkpoint_every) == (0, 79)
    assert "evaluated at the start and at the end, saved every 79" in said
    _, _, warned = about("train.steps=790", "student.num_layers=4")
    assert "the student (4 x 32) is no smaller than its teacher (4 x 32)" in warned and "little" not in warned


def test_a_token_type_row_that_the_student_begins_without_is_said(workshop):
    def about(*settings):
        return command.compile_run(assemble(load(workshop / "run.toml", settings))).description

    assert "token-type row" not in about()
    assert "token-type row, because sinusoidal positions cannot absorb it" in about("student.positions=sinusoidal")
    assert "token-type row, because fold_token_types is false" in about("student.fold_token_types=false")
    assert "token-type row" not in about("student.positions=sinusoidal", "student.token_types=2")


ALONE = (
    "teacher.path=",
    "student.hidden_size=32",
    "student.num_heads=4",
    "student.intermediate_size=48",
    "student.max_positions=32",
)


def test_no_teacher_at_all_is_plain_pretraining(workshop, tmp_path):
    run = tmp_path / "run"
    assert train(workshop, run, *ALONE, "train.eval_every=0", "train.checkpoint_every=100") == 0
    held_out, trained = of_kind(run, "held_out"), of_kind(run, "train")
    assert not of_kind(run, "teacher")
    assert not {"kl", "agreement"} & {name for line in (*held_out, *trained) for name in line}
    assert held_out[1]["mlm"] < 0.9 * held_out[0]["mlm"] and trained[-1]["loss"] < 0.9 * trained[0]["loss"]
    assert cli.main(["export", str(run), str(tmp_path / "model")]) == 0
    config, params = huggingface.load(tmp_path / "model")
    assert config.num_layers == 2 and same_leaves(params, params_of(run))
    assert "without a teacher" in (tmp_path / "model" / "README.md").read_text()


# Not a number


def test_a_run_that_diverges_ends_with_status_3_and_finite_checkpoints(workshop, tmp_path, monkeypatch, capsys):
    """Step 3 has a finite loss, taken before its update, and that update gives an infinity: it must not be saved."""
    compile_run = command.compile_run

    def with_a_bad_step(parts):
        program = compile_run(parts)

        def step(state, *rest):
            state, metrics = program.step(state, *rest)
            if int(state.step) == 3:
                state.params["embeddings"]["norm"]["scale"] *= np.inf
            return state, metrics

        return replace(program, step=step)

    monkeypatch.setattr(command, "compile_run", with_a_bad_step)
    run = tmp_path / "run"
    assert train(workshop, run, "train.checkpoint_every=1", "train.keep_checkpoints=9") == 3
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "learning_rate" in message
    assert saved_steps(run) == [1, 2]
    assert all_finite(params_of(run))


def test_a_teacher_that_computes_no_numbers_ends_the_run_too(workshop, tmp_path, capsys):
    config, params = huggingface.load(workshop / "teacher")
    huge = jax.tree.map(lambda leaf: leaf * np.float32(1e30), params)
    huggingface.save(tmp_path / "teacher", config, huge, tokenizer=workshop / "teacher")
    # The student begins sane, from the teacher as it was.
    first = assemble(load(workshop / "run.toml"))
    huggingface.save(tmp_path / "student", first.step.student, first.student_params, tokenizer=workshop / "teacher")
    changes = (f"teacher.path={tmp_path / 'teacher'}", f"student.init={tmp_path / 'student'}")
    assert train(workshop, tmp_path / "run", *changes, "train.skips_allowed=2") == 3
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "step" in message
    assert not (tmp_path / "run" / "checkpoints").exists()
    # Other programs read these lines: JSON has no word for what is not a number.
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


# Not its fault, or its own


@pytest.fixture
def failing(monkeypatch):
    """Makes the first step raise what is given."""
    compile_run = command.compile_run

    def arrange(error: Exception) -> None:
        def step(*_):
            raise error

        def with_failing_step(parts):
            return replace(compile_run(parts), step=step, evaluator=Scripted({0: 1.0}))

        monkeypatch.setattr(command, "compile_run", with_failing_step)

    return arrange


def test_a_machine_that_fails_is_told_from_a_mistake(workshop, tmp_path, failing, capsys):
    """Status 4 is answered with another start: of a mistake the traceback is shown instead."""
    for kind in (jax.errors.JaxRuntimeError, ValueError):  # the latter where it meets JAX before the program runs
        failing(kind("UNAVAILABLE: a peer\nhas gone"))
        assert train(workshop, tmp_path / f"machine-{kind.__name__}", "train.tensorboard=false") == 4
        assert "UNAVAILABLE: a peer has gone" in capsys.readouterr().err
        failing(kind("INVALID_ARGUMENT: expected f32[2]"))
        with pytest.raises(kind, match="expected f32"):
            train(workshop, tmp_path / f"mistake-{kind.__name__}", "train.tensorboard=false")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.accumulation=1"], "set train.accumulation=2 (it is 1)"),
        (["train.accumulation=2"], "already takes one row after the other; spread"),
        (["train.accumulation=2", "mesh.tensor=2"], "set train.accumulation=4 (it is 2)"),
    ],
)
def test_too_little_memory_is_said_with_what_helps(workshop, tmp_path, failing, capsys, settings, message):
    failing(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"))
    assert train(workshop, tmp_path / "run", "train.tensorboard=false", *settings) == 2
    assert message in capsys.readouterr().err


# Started again


def test_a_stopped_run_says_so_and_saves_between_two_intervals(stopped_run, finished_run):
    steps = saved_steps(stopped_run)
    assert steps and steps[-1] % 4 and 5 <= steps[-1] < RUN_STEPS
    done = [line for line in run_numbers(stopped_run) if line["step"] <= steps[-1]]
    assert done == run_numbers(stopped_run)  # no number of a step that is not saved
    assert done == run_numbers(finished_run)[: len(done)]


def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(stopped_copy, finished_run, workshop, capsys):
    step = saved_steps(stopped_copy)[-1]
    (seconds,) = [line["compile_seconds"] for line in of_kind(stopped_copy, "train") if "compile_seconds" in line]
    assert train(workshop, stopped_copy) == 0
    shown = capsys.readouterr().out
    assert f"going on after step {step}" in shown
    known = f" (the last time took {seconds:.0f} s)" if seconds >= 1 else ""
    assert f"Compiling the step for rows of {LENGTH} tokens{known} ...\nstep {step + 1:>6}  " in shown
    assert same_leaves(params_of(stopped_copy), params_of(finished_run))
    assert run_numbers(stopped_copy) == run_numbers(finished_run)


def test_a_run_goes_on_by_its_folder_alone(stopped_copy, finished_run):
    assert cli.main(["train", str(stopped_copy)]) == 0
    assert run_numbers(stopped_copy) == run_numbers(finished_run)
    assert (stopped_copy / "config.toml").read_bytes() == (finished_run / "config.toml").read_bytes()


def test_a_run_and_another_folder_are_a_new_run(finished_run, tmp_path):
    """It has the run's configuration, and begins as the run did; nothing is written into the run."""
    before, new = file_hashes(finished_run), tmp_path / "new"
    assert cli.main(["train", str(finished_run), "--output", str(new), "--set", "train.steps=1"]) == 0
    assert run_numbers(new)[:2] == run_numbers(finished_run)[:2] and file_hashes(finished_run) == before


def test_a_finished_run_can_become_longer(finished_run, tmp_path, at_step, capsys):
    """Its learning rate is that of the new length from there on, also where it is stopped in between."""

    def go_on(run: Path, *overrides: str) -> int:
        return cli.main(["train", str(run), *(word for override in overrides for word in ("--set", override))])

    unbroken, broken = (shutil.copytree(finished_run, tmp_path / name) for name in ("unbroken", "broken"))
    longer = ("train.steps=18", "optimizer.steps=24")
    assert go_on(unbroken, *longer) == 0
    peak, warmup = 3e-3, 1
    expected = [peak * (24 - step) / (24 - warmup) for step in range(RUN_STEPS, 18)]
    trained = [line for line in of_kind(unbroken, "train") if line["step"] > RUN_STEPS]
    assert [line["learning_rate"] for line in trained] == pytest.approx(expected, rel=1e-5)
    said = (
        f"had 12 steps and has 18 now.* 24 steps, {expected[0]:.3g} for .* instead of {peak * 8 / 19:.3g}.* not exactly"
    )
    assert re.search(said, capsys.readouterr().out)
    at_step(14, terminate)
    assert go_on(broken, *longer) == 75
    assert go_on(broken) == 0
    assert same_leaves(params_of(broken), params_of(unbroken)) and run_numbers(broken) == run_numbers(unbroken)
    # Once more, within the same schedule; and what is done cannot be undone.
    capsys.readouterr()
    assert go_on(unbroken, "train.steps=20") == 0
    assert "has 20 now; its learning rate goes to 0 at step 24, as before" in capsys.readouterr().out
    before = file_hashes(unbroken)
    assert go_on(unbroken, "train.steps=19") == 2
    assert "train.steps is 19, but 20 steps of this run are done" in capsys.readouterr().err
    assert file_hashes(unbroken) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_tells_the_status_and_what_to_do(workshop, tmp_path, at_step, capsys, number):
    at_step(2, lambda: os.kill(os.getpid(), number))
    assert train(workshop, tmp_path / "run", "train.checkpoint_every=1000") == 75
    step = saved_steps(tmp_path / "run")[-1]
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and f"step {step}" in message and "checkpoint saved" in message


def test_a_stop_is_never_without_its_checkpoint(workshop, tmp_path, monkeypatch, capsys):
    """Whenever the signal arrives: here right after the loop has looked once."""

    class Late(loop.StopRequest):
        looks = 0

        def requested(self, step: int) -> bool:
            self.looks += 1
            return self.looks > 1

    monkeypatch.setattr(loop, "StopRequest", Late)
    assert train(workshop, tmp_path / "run", "train.checkpoint_every=1000") == 75
    assert saved_steps(tmp_path / "run"), capsys.readouterr().err


def test_a_stop_in_the_last_step_is_no_stop(workshop, tmp_path, at_step):
    at_step(1, terminate)
    assert train(workshop, tmp_path / "run", "train.steps=2") == 0
    assert saved_steps(tmp_path / "run") == [2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_mean_what_they_meant_before_once_a_run_is_over(workshop, tmp_path, number):
    before = signal.getsignal(number)
    try:
        assert train(workshop, tmp_path / "run", "train.steps=1") == 0
        assert signal.getsignal(number) == before
    finally:
        signal.signal(number, before)


def test_a_finished_run_keeps_what_it_has(finished_run, workshop, tmp_path, capsys):
    run = shutil.copytree(finished_run, tmp_path / "run")

    def kept() -> dict[str, str]:
        return {name: digest for name, digest in file_hashes(run).items() if not name.startswith("tensorboard")}

    before, numbers = kept(), run_numbers(run)
    result = command.train(load(workshop / "run.toml"), run)
    assert kept() == before
    # Who calls it gets the numbers all the same, and who reads along is told.
    assert {name: result[name] for name in ("mlm", "kl", "agreement")} == pytest.approx(
        {name: numbers[-1][name] for name in ("mlm", "kl", "agreement")}, rel=1e-6
    )
    shown = capsys.readouterr().out
    assert "finished" in shown and "tokens/s" not in shown


def test_what_changes_no_number_may_change(stopped_copy, workshop, finished_run):
    """Another mesh, accumulation, logging and saving: even the masks of dropout are the same."""
    step = saved_steps(stopped_copy)[-1]
    changes = ("mesh.fsdp=2", "train.accumulation=1", "train.log_every=3", "train.eval_rows=8")
    assert train(workshop, stopped_copy, *changes, "train.checkpoint_every=2") == 0
    assert saved_steps(stopped_copy)[-1] == RUN_STEPS
    numbers, whole = run_numbers(stopped_copy), run_numbers(finished_run)
    assert [line for line in numbers if line["step"] <= step] == [line for line in whole if line["step"] <= step]
    assert all(one["step"] <= other["step"] for one, other in pairwise(numbers))
    last = {line["kind"]: line for line in numbers}["train"]
    mean = np.mean([line["loss"] for line in whole if line["kind"] == "train"][-3:])  # of the steps since the last line
    assert last["step"] == RUN_STEPS and last["loss"] == pytest.approx(mean, rel=1e-4)
    assert load(stopped_copy / "config.toml").mesh.fsdp == 2


@pytest.mark.parametrize(
    "change",
    [
        ("seed", "3", "4"),
        ("train.batch_rows", "16", "32"),
        ("student.hidden_dropout", "0.1", "0.2"),
        ("student.init", "teacher", "random"),
        ("masking.rate", "0.15", "0.2"),
        ("loss.temperature", "2.0", "4.0"),
        ("optimizer.learning_rate", "0.003", "0.001"),
        ("compute.dtype", "float32", "bfloat16"),
    ],
    ids=lambda change: change[0],
)
def test_other_mathematics_is_refused(stopped_copy, workshop, change, capsys):
    key, old, new = change
    before = file_hashes(stopped_copy)
    assert train(workshop, stopped_copy, f"{key}={new}") == 2
    message = capsys.readouterr().err
    assert f"{key}: {old} -> {new}" in message and f"`distil-jax train {stopped_copy}`" in message
    assert "--output" in message and f"--set student.init={stopped_copy}" in message
    assert file_hashes(stopped_copy) == before


def test_other_rows_are_refused(stopped_copy, workshop, tmp_path, capsys):
    write_sentences(tmp_path / "other.txt", documents=90, seed=5)
    settings = PrepareConfig(
        sources=(str(tmp_path / "other.txt"),),
        tokenizer=str(workshop / "rows" / "tokenizer"),
        sequence_length=LENGTH,
        held_out=0.2,
        document="line",
        min_tokens=5,
    )
    prepare(settings, tmp_path / "rows")
    before = file_hashes(stopped_copy)
    assert train(workshop, stopped_copy, f"data.path={tmp_path / 'rows'}") == 2
    assert "rows" in capsys.readouterr().err
    assert file_hashes(stopped_copy) == before


def test_the_same_rows_elsewhere_are_not(stopped_copy, workshop, tmp_path):
    shutil.copytree(workshop / "rows", tmp_path / "moved")
    assert train(workshop, stopped_copy, f"data.path={tmp_path / 'moved'}") == 0


def test_other_teacher_weights_are_refused(stopped_copy, workshop, tmp_path, capsys):
    config, _ = huggingface.load(workshop / "teacher")
    other = random_params(config, seed=2)
    huggingface.save(tmp_path / "teacher", config, other, tokenizer=workshop / "rows" / "tokenizer")
    before = file_hashes(stopped_copy)
    assert train(workshop, stopped_copy, f"teacher.path={tmp_path / 'teacher'}") == 2
    assert "teacher" in capsys.readouterr().err
    assert file_hashes(stopped_copy) == before


def test_what_an_interrupted_save_leaves_does_no_harm(stopped_copy, workshop, finished_run):
    checkpoints = stopped_copy / "checkpoints"
    whole = checkpoints / str(saved_steps(stopped_copy)[-1])
    # A save that was cut off, one that was being removed, and a file that somebody left.
    shutil.copytree(whole, checkpoints / ".saving-9")
    (checkpoints / ".saving-9" / "manifest.json").unlink()
    shutil.copytree(whole, checkpoints / ".retired-3")
    (checkpoints / "notes").write_text("mine")
    assert train(workshop, stopped_copy) == 0
    assert same_leaves(params_of(stopped_copy), params_of(finished_run))
    assert same_leaves(params_of(stopped_copy, RUN_STEPS), params_of(finished_run))
    assert run_numbers(stopped_copy) == run_numbers(finished_run)


def test_a_run_killed_before_its_first_checkpoint_begins_anew(stopped_copy, workshop, finished_run, tmp_path):
    shutil.rmtree(stopped_copy / "checkpoints")
    with (stopped_copy / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 6, "kind": "tr')  # what a kill leaves of a line
    assert train(workshop, stopped_copy, "train.tensorboard=false") == 0
    assert run_numbers(stopped_copy) == run_numbers(finished_run)
    assert same_leaves(params_of(stopped_copy), params_of(finished_run))


def test_where_nothing_is_saved_no_step_can_be_asked_for(stopped_copy, capsys):
    shutil.rmtree(stopped_copy / "checkpoints")
    assert cli.main(["train", str(stopped_copy), "--resume-step", "3"]) == 2
    assert "There is no checkpoint of step 3, and none is saved yet." in capsys.readouterr().err


def test_a_profile_window_that_the_run_stopped_in_does_no_harm(stopped_copy, workshop, tmp_path):
    step = saved_steps(stopped_copy)[-1]
    assert train(workshop, stopped_copy, f"train.profile_at={step - 1}", "train.profile_steps=4") == 0
    assert saved_steps(stopped_copy)[-1] == RUN_STEPS


def test_a_profile_is_written(workshop, tmp_path):
    assert train(workshop, tmp_path / "run", "train.steps=3", "train.profile_at=2", "train.profile_steps=1") == 0
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


# What is on disk is what was trained


def test_every_checkpoint_holds_the_parameters_of_its_own_step(workshop, tmp_path):
    """The step donates its state while an earlier one is still being written: none may leak into the other."""
    saves = ("train.checkpoint_every=1", "train.keep_checkpoints=100", "train.eval_every=0", "train.tensorboard=false")
    assert train(workshop, tmp_path / "run", *saves) == 0
    program = command.compile_run(assemble(load(workshop / "run.toml")))
    state = program.first_state()
    batches = program.stream.batches(0)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    shapes = {name: getattr(shapes, name) for name in ("step", "skipped", "params", "opt_state", "key")}
    assert checkpoints.steps() == list(range(1, RUN_STEPS + 1))
    for step in checkpoints.steps():
        state, _ = program.step(state, program.teacher_params, next(batches), *program.step_arguments)
        expected = {name: getattr(state, name) for name in shapes}
        assert same_leaves(checkpoints.restore(step, shapes), expected), step
        assert checkpoints.metadata(step)["position"] == 16 * step
    checkpoints.close()


def test_a_run_killed_while_it_began_is_no_foreign_folder(tmp_path):
    (tmp_path / "run" / "tokenizer").mkdir(parents=True)
    (tmp_path / "run" / ".config.toml").touch()
    run_folder.check_folder(tmp_path / "run")
    (tmp_path / "run" / "thesis.tex").touch()
    with pytest.raises(InputError, match="something other than a run"):
        run_folder.check_folder(tmp_path / "run")


def test_compiled_programs_are_kept_where_it_is_asked(workshop, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    command_line = [sys.executable, "-m", "distil_jax", "train", str(workshop / "run.toml")]
    settings = ("train.steps=1", f"compute.cache={tmp_path / 'kept'}", "train.tensorboard=false", "mesh.data=1")
    flags = [flag for setting in settings for flag in ("--set", setting)]
    environment |= {"XLA_FLAGS": XLA, "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
    done = subprocess.run(
        [*command_line, "--output", str(tmp_path / "run"), *flags],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert any("mask_and_train_step" in path.name for path in (tmp_path / "kept").iterdir())
    assert not (tmp_path / "run" / "compiled").exists()
