"""The models that are measured, the peers they are compared with, and the process in which PyTorch runs."""

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


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for the models and their dtype."""
    parser.add_argument(
        "--shape",
        choices=("base", "demo", "tiny"),
        default="base",
        help="of the teacher, whose student has half its layers: BERT-base with 30,522 ids, the demonstration's, or a "
        "small one for tests (default: %(default)s)",
    )
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="compute dtype")


def shape_model(shape: str) -> ModelConfig:
    """The teacher's architecture for a value of --shape."""
    if shape == "base":
        return ModelConfig(vocab_size=30_522)
    if shape == "demo":
        path = EMBEDDED_TEACHER / "config.json"
        return from_json(read_json(path), path)
    return ModelConfig(vocab_size=90, num_layers=2, hidden_size=32, num_heads=4, intermediate_size=48, max_positions=64)


def parse_peers(text: str | None, known: Sequence[str]) -> list[str]:
    """The PyTorch variants in the value of --peer, without `torch:`; `torch` alone means the eager one.

    Raises:
      InputError: an unknown peer, PyTorch or `transformers` is not installed, or no device that both can use.
    """
    words = [] if text is None else ["torch:eager" if word == "torch" else word for word in text.split(",")]
    choices = [f"torch:{variant}" for variant in known]
    for word in words:
        require(word in choices, f"There is no peer {word!r} here: choose from {', '.join(choices)}.")
    if words:
        for name in ("torch", "transformers"):
            advice = f"and {name} is not installed: pip install 'distil-jax[torch]'."
            require(importlib.util.find_spec(name) is not None, f"--peer needs torch and transformers, {advice}")
        # Keeps JAX from reserving three quarters of a GPU's memory. JAX reads this when it first looks for devices.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        platform = jax.default_backend()
        require(platform in ("cpu", "gpu"), f"PyTorch cannot compute on a {platform}: leave --peer out.")
        one_device = platform == "cpu" or jax.device_count() == 1
        require(one_device, "A peer uses one GPU: let JAX see only one as well (CUDA_VISIBLE_DEVICES=0).")
    return [word.partition(":")[2] for word in words]


@contextlib.contextmanager
def pytorch() -> Iterator[Callable[..., Remote]]:
    """Starts a process for PyTorch, so that the libraries do not share threads, allocators or settings.

    Yields:
      `make(name, *arguments)`, which calls the class or function of that name in `peer_torch`, in the process, with the
        name of JAX's platform as first argument, and returns a `Remote` to the result. The process ends with the block.
    """
    with contextlib.ExitStack() as stack:
        with _quiet_semaphores():
            pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_end_with_parent)
            process = stack.enter_context(pool)
        # The process inherits the mask, so Ctrl-C does not reach it; it ends with this process.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        process.submit(int)  # the first call starts the process
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield partial(Remote, process)


@contextlib.contextmanager
def _quiet_semaphores() -> Iterator[None]:
    """Keeps Python's resource tracker, if it is started in the block, from warning if PyTorch's process is killed."""
    before = os.environ.get("PYTHONWARNINGS")
    quiet = "ignore:resource_tracker:UserWarning"
    os.environ["PYTHONWARNINGS"] = f"{before},{quiet}" if before else quiet
    try:
        yield
    finally:
        os.environ.pop("PYTHONWARNINGS")
        if before is not None:
            os.environ["PYTHONWARNINGS"] = before


class Remote:
    """A proxy for an object that `peer_torch` made in another process; a method call waits for its result.

    Args:
      process: where the object is made.
      name: of a class or function of `peer_torch`.
      arguments: for it, after the name of JAX's platform.
    """

    def __init__(self, process: Executor, name: str, *arguments: Any) -> None:
        self._process = process
        self._index = self._wait(_make, name, (jax.default_backend(), *arguments))

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return lambda *arguments: self._wait(_call, self._index, method, arguments)

    def _wait(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return self._process.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise MachineFailed("PyTorch's process was killed, perhaps because memory ran out.") from error


_objects: list[Any] = []  # the objects behind `Remote`, in PyTorch's process


def _end_with_parent() -> None:
    """Ends this process when its parent ends, even if the parent is killed."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _make(name: str, arguments: Sequence[Any]) -> int:
    from distil_jax.commands.bench import peer_torch

    _objects.append(getattr(peer_torch, name)(*arguments))
    return len(_objects) - 1


def _call(index: int, method: str, arguments: Sequence[Any]) -> Any:
    return getattr(_objects[index], method)(*arguments)
