"""Who is compared with whom: the shapes of models, and the PyTorch peers, imported only where they are asked for."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from types import ModuleType

import jax

from distil_jax.config import EMBEDDED_TEACHER, ModelConfig
from distil_jax.io.config_json import from_json
from distil_jax.io.tensors import read_json
from distil_jax.schema import InputError, require

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


def load(text: str | None, known: Sequence[str]) -> tuple[ModuleType | None, list[str]]:
    """What --peer names: the module `peer_torch`, if it is needed, and the variants; `torch` alone is the eager one.

    Raises:
      InputError: an unknown peer, PyTorch or `transformers` not installed, or several GPUs.
    """
    words = [] if text is None else ["torch:eager" if word == "torch" else word for word in text.split(",")]
    choices = [f"torch:{variant}" for variant in known]
    for word in words:
        require(word in choices, f"There is no peer {word!r} here: choose of {', '.join(choices)}.")
    if not words:
        return None, []
    # JAX must not take three quarters of a GPU for itself; read when it first looks for devices.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    one = jax.default_backend() == "cpu" or jax.device_count() == 1
    require(one, "A peer computes on one GPU: show JAX no more than one (CUDA_VISIBLE_DEVICES=0).")
    try:
        from distil_jax.commands.bench import peer_torch
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers"):
            raise
        raise InputError(
            f"--peer needs torch and transformers, and {error.name} is not installed: pip install 'distil-jax[torch]'."
        ) from error
    return peer_torch, [word.partition(":")[2] for word in words]
