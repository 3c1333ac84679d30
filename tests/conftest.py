"""Eight virtual devices, no network, small models: what every test shares."""

import atexit
import gc
import hashlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from distil_jax.config.model import ModelConfig
from distil_jax.config.objective import LossConfig, MaskingConfig
from distil_jax.config.step import OptimizerConfig, StepConfig

# Before the first import of JAX.
# Eight devices share two cores here. XLA for CPUs may begin independent collectives in another order on each device,
# and then they wait for each other for ever (seen with data, fsdp and tensor at once); in one order they do not.
IN_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
# A program is compiled in one piece: cutting it into 32 for as many threads costs a quarter more.
XLA = f"{IN_ORDER} --xla_cpu_parallel_codegen_split_count=1"
# The older code generator for CPUs takes a third of the time: 4.6 s of processor time, not 12.2, for one sharded step
# (a shared AMD EPYC, 2026-11-27, jaxlib 0.10.2). Later versions of jaxlib do not have it.
if version("jaxlib").startswith("0.10."):
    XLA += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {XLA}"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
# Every program is compiled once in a session, also where a test starts another process; gone at the end.
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share the folder of the process that started them
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="distil-jax-compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import flax.linen as nn
import jax
import numpy as np
import pytest

from distil_jax.models.encoder import init_params
from distil_jax.structs import Rows

# A shell lets what it starts in the background ignore Ctrl-C, and so would all that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The models here are tiny and compiled often: XLA's optimisations cost more time than they save.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module", autouse=True)
def programs_of_a_file_go_with_it():
    """Each compiled program keeps pieces of memory mapped, and a process may have 65,530 of them."""
    yield
    jax.clear_caches()
    gc.collect()


VOCAB, LENGTH, MASK = 90, 24, 4  # 90 is no multiple of 128: the vocabulary is padded in every test


@pytest.fixture(scope="session")
def teacher_config() -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCAB,
        num_layers=4,
        hidden_size=32,
        num_heads=4,
        intermediate_size=48,
        max_positions=32,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        initializer_range=0.2,  # far from linear, so that a wrong sign or a lost term shows
        unroll=False,
    )


@pytest.fixture(scope="session")
def step_config(teacher_config) -> StepConfig:
    """A recipe with every term switched on and no dropout."""
    from dataclasses import replace

    return StepConfig(
        student=replace(teacher_config, num_layers=2, token_types=0),
        teacher=teacher_config,
        loss=LossConfig(mse=0.01),
        masking=MaskingConfig(mask_token_id=MASK),
        optimizer=OptimizerConfig(learning_rate=1e-3, steps=10, warmup=0.2),
    )


@pytest.fixture(scope="session")
def teacher_params(teacher_config):
    return random_params(teacher_config, seed=1)


@pytest.fixture(scope="session")
def student_params(step_config):
    return random_params(step_config.student, seed=2)


@pytest.fixture(scope="session")
def rows() -> Rows:
    return packed_rows(16, seed=3)


@pytest.fixture(scope="session")
def weights() -> np.ndarray:
    weights_V = np.zeros(128, np.float32)
    weights_V[5:VOCAB] = np.random.default_rng(4).uniform(0.1, 1.0, VOCAB - 5)
    return weights_V


def random_params(config: ModelConfig, seed: int):
    """Random everywhere: biases and LayerNorms too, which an initialisation leaves at 0 and 1."""
    params = nn.unbox(init_params(jax.random.key(seed), config))
    leaves, treedef = jax.tree.flatten(params)
    generator = np.random.default_rng(seed)
    noisy = [np.asarray(leaf) + generator.normal(0, 0.05, leaf.shape).astype(np.float32) for leaf in leaves]
    params = jax.tree.unflatten(treedef, noisy)
    params["embeddings"]["word"][config.vocab_size :] = 0
    params["mlm"]["bias"][config.vocab_size :] = 0
    return params


def packed_rows(count: int, seed: int) -> Rows:
    """Rows of one to four sequences of random lengths, some with padding at the end."""
    generator = np.random.default_rng(seed)
    ids, segments, positions = (np.zeros((count, LENGTH), np.int32) for _ in range(3))
    for row in range(count):
        place = 0
        for segment in range(1, 5):
            length = int(generator.integers(4, 12))
            if place + length > LENGTH:
                break
            span = slice(place, place + length)
            ids[row, span] = [2, *generator.integers(5, VOCAB, length - 2), 3]
            segments[row, span], positions[row, span] = segment, np.arange(length)
            place += length
    return Rows(ids, segments, positions, np.arange(count, dtype=np.int32))


# What the tests of the commands share: a small corpus, a random teacher with its tokenizer, and one finished run.

RUN_STEPS = 12
RUN = """
seed = 3
[data]
path = "{rows}"
[teacher]
path = "{teacher}"
[student]
num_layers = 2
[optimizer]
learning_rate = 3e-3
steps = 20  # fixed, so that shorter runs are the same program
[train]
batch_rows = 16
accumulation = 2
steps = {steps}
log_every = 1
eval_every = 5
eval_rows = 0
checkpoint_every = 4
keep_checkpoints = 2
[compute]
unroll = "no"
"""
TIMINGS = ("compile_seconds", "tokens_per_second", "seconds_per_step")


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Path:
    """A folder with text.txt, rows/, teacher/ and run.toml, the configuration of most runs here."""
    from distil_jax.data.prepare import PrepareConfig, prepare
    from distil_jax.io import huggingface

    folder = tmp_path_factory.mktemp("workshop")
    write_sentences(folder / "text.txt", documents=90, seed=0)
    settings = PrepareConfig(
        sources=(str(folder / "text.txt"),),
        train_vocabulary=VOCAB,
        sequence_length=LENGTH,
        held_out=0.2,
        document="line",
        min_tokens=5,
    )
    manifest = prepare(settings, folder / "rows")
    config = ModelConfig(
        vocab_size=manifest.vocab_size,
        num_layers=4,
        hidden_size=32,
        num_heads=4,
        intermediate_size=48,
        max_positions=32,
        initializer_range=0.2,
    )
    params = random_params(config, seed=1)
    huggingface.save(folder / "teacher", config, params, tokenizer=folder / "rows" / "tokenizer")
    text = RUN.format(rows=folder / "rows", teacher=folder / "teacher", steps=RUN_STEPS)
    (folder / "run.toml").write_text(text)
    return folder


@pytest.fixture(scope="session")
def finished_run(workshop) -> Path:
    """One run from its first step to its last, without interruption. Read it, copy it, never write into it."""
    from distil_jax import cli

    assert cli.main(["train", str(workshop / "run.toml"), "--output", str(workshop / "finished")]) == 0
    return workshop / "finished"


def write_sentences(path: Path, *, documents: int, seed: int) -> None:
    """Lines of a few short sentences that can be predicted a little better than by chance."""
    draw = random.Random(seed)
    animals = ("cat", "dog", "bird", "fish", "horse", "mouse", "wolf", "bear")
    places = ("garden", "forest", "river", "meadow", "house")
    doings = {"cat": "hunts", "dog": "follows", "bird": "hears", "fish": "flees"}
    lines = []
    for _ in range(documents):
        who = draw.choices(animals, k=draw.randint(1, 4))
        what = (
            f"the {a} {doings.get(a, 'sees')} the {draw.choice(animals)} in the {draw.choice(places)}." for a in who
        )
        lines.append(" ".join(what))
    path.write_text("\n".join(lines) + "\n")


# What must not be in anything that is shared: a path of this machine.
_FOLDERS = (tempfile.gettempdir(), Path.home(), Path(__file__).parents[1])
PLACES = "|".join([*(re.escape(f"{folder}/") for folder in _FOLDERS), "site-packages"])


def run_numbers(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without what the clock says."""
    from distil_jax.io.metrics import read_metrics

    return [{name: n for name, n in line.items() if name not in TIMINGS} for line in read_metrics(folder)]


def file_hashes(folder: Path) -> dict[str, str]:
    """Every file and folder below, with its contents: equal before and after where nothing was touched."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def same_leaves(first, second) -> bool:
    """Whether two trees are the same in structure and in every bit."""
    leaves, others = jax.tree.leaves(first), jax.tree.leaves(second)
    return jax.tree.structure(first) == jax.tree.structure(second) and all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(leaves, others, strict=True)
    )


def assert_params_close(result, expected, *, without_gradient=()):
    """Equal parameters after a few optimiser steps, up to rounding, which Adam scales up where a true gradient is 0."""
    # A bias on the keys shifts every score of a query alike.
    without_gradient = ("layers/key/bias", *without_gradient)
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(jax.device_get(result)), jax.tree.leaves(expected), strict=True
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        np.testing.assert_allclose(ours, theirs, atol=1e-4 if name in without_gradient else 1e-5, err_msg=name)


# PyTorch beside us.


@pytest.fixture
def transformers():
    """The library, where PyTorch is there too; silent."""
    pytest.importorskip("torch")
    module = pytest.importorskip("transformers")
    module.logging.set_verbosity_error()
    module.logging.disable_progress_bar()
    return module


def pytorch_optimizer(model, config):
    """AdamW without decay on biases and LayerNorm, and its linear schedule, as the authors' scripts make them."""
    import torch
    import transformers

    decayed = [p for n, p in model.named_parameters() if not n.endswith("bias") and "norm" not in n.lower()]
    kept = [p for n, p in model.named_parameters() if n.endswith("bias") or "norm" in n.lower()]
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
    )
    warmup = round(config.warmup * config.steps)
    return adam, transformers.get_linear_schedule_with_warmup(adam, warmup, config.steps)


# Commands in processes of their own.

LIMIT = 240  # seconds
COMMAND = "from distil_jax import cli; cli.program()"


def start(count, arguments, program=COMMAND, devices=8, before=()):
    """`distil-jax ARGUMENTS` in so many processes, which share the devices; `before`: words before the command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for index in range(count):
        environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // count} {XLA}"}
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
        if count > 1:
            environment |= {
                "DISTIL_COORDINATOR": f"127.0.0.1:{port}",
                "DISTIL_NUM_PROCESSES": str(count),
                "DISTIL_PROCESS_ID": str(index),
            }
        started.append(
            subprocess.Popen(
                [*before, sys.executable, "-c", program, *map(str, arguments)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def finish(started, limit=LIMIT):
    """(status, stdout, stderr) of each, which must have ended after so many seconds."""
    try:
        message = [process.communicate(timeout=limit) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(started, message, strict=True)]
