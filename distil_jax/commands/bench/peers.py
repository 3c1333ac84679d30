"""Who is compared with whom: the shapes of models, and the process in which the PyTorch peers compute."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from typing import Any

import jax

from distil_jax.config.model import ModelConfig
from distil_jax.config.run import EMBEDDED_TEACHER
from distil_jax.io.config_json import from_json
from distil_jax.io.tensors import read_json
from distil_jax.runtime.exit_codes import MachineFailed
from distil_jax.schema import require

OURS = "distil_jax"


def add_shape(parser: argparse.ArgumentParser) -> None:
    """The flags that say which models compute, and how."""
    parser.add_argument(
        "--shape",
        choices=("base", "demo", "tiny"),
        default="base",
        help="a teacher, and a student of half its layers: BERT-base with 30,522 ids, the demonstration's, or one for "
        "tests (default: %(default)s)",
    )
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the computation")


def shape_model(shape: str) -> ModelConfig:
    """The teacher of a shape."""
    if shape == "base":
        return ModelConfig(vocab_size=30_522)
    if shape == "demo":
        path = EMBEDDED_TEACHER / "config.json"
        return from_json(read_json(path), path)
    return ModelConfig(vocab_size=90, num_layers=2, hidden_size=32, num_heads=4, intermediate_size=48, max_positions=64)


def read(text: str | None, known: Sequence[str]) -> list[str]:
    """The variants that --peer names; `torch` alone is the eager one.

    Raises:
      InputError: an unknown peer, PyTorch or `transformers` not installed, or no device on which both can compute.
    """
    words = [] if text is None else ["torch:eager" if word == "torch" else word for word in text.split(",")]
    choices = [f"torch:{variant}" for variant in known]
    for word in words:
        require(word in choices, f"There is no peer {word!r} here: choose of {', '.join(choices)}.")
    if words:
        for name in ("torch", "transformers"):
            missing = f"and {name} is not installed: pip install 'distil-jax[torch]'."
            require(importlib.util.find_spec(name) is not None, f"--peer needs torch and transformers, {missing}")
        # JAX must not take three quarters of a GPU for itself; read when it first looks for devices.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        platform = jax.default_backend()
        require(platform in ("cpu", "gpu"), f"PyTorch cannot compute on a {platform}: leave --peer out.")
        one = platform == "cpu" or jax.device_count() == 1
        require(one, "A peer computes on one GPU: show JAX no more than one (CUDA_VISIBLE_DEVICES=0).")
    return [word.partition(":")[2] for word in words]


@contextlib.contextmanager
def pytorch() -> Iterator[Callable[..., Elsewhere]]:
    """Starts a separate process for PyTorch, so that threads, allocator and settings of the libraries do not mix.

    Yields:
      `make(name, *arguments)`: what a class or function of `peer_torch` gives there for the platform on which JAX
        computes. The first one starts the process, with which all of them end.
    """
    with contextlib.ExitStack() as stack:
        with _quiet_semaphores():
            pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_end_with_parent)
            process = stack.enter_context(pool)
        # It never hears Ctrl-C, and ends with this process.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        process.submit(int)  # starts it
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield partial(Elsewhere, process)


@contextlib.contextmanager
def _quiet_semaphores() -> Iterator[None]:
    """Python's process that unlinks semaphores, if it is started meanwhile, does not warn of those of a killed one."""
    before = os.environ.get("PYTHONWARNINGS")
    quiet = "ignore:resource_tracker:UserWarning"
    os.environ["PYTHONWARNINGS"] = f"{before},{quiet}" if before else quiet
    try:
        yield
    finally:
        os.environ.pop("PYTHONWARNINGS")
        if before is not None:
            os.environ["PYTHONWARNINGS"] = before


class Elsewhere:
    """Something that `peer_torch` made in another process; its methods are called from here, one at a time."""

    def __init__(self, process: Executor, name: str, *arguments: Any) -> None:
        self._process = process
        self._number = self._wait(_make, name, (jax.default_backend(), *arguments))

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return lambda *arguments: self._wait(_call, self._number, method, arguments)

    def _wait(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return self._process.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise MachineFailed("PyTorch's process was ended from outside, as for want of memory.") from error


_made: list[Any] = []  # in PyTorch's process


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _make(name: str, arguments: Sequence[Any]) -> int:
    from distil_jax.commands.bench import peer_torch

    _made.append(getattr(peer_torch, name)(*arguments))
    return len(_made) - 1


def _call(number: int, method: str, arguments: Sequence[Any]) -> Any:
    return getattr(_made[number], method)(*arguments)
