"""`distil-jax bench inference`: latency of the encoders without MLM head, teacher and student, JAX and PyTorch."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from distil_jax.commands.bench import peers, timing
from distil_jax.commands.bench.peers import OURS
from distil_jax.commands.bench.step import random_params
from distil_jax.commands.bench.timing import Measurement, TimedCall
from distil_jax.config.model import ModelConfig
from distil_jax.config.run import ComputeConfig, MeshConfig, StudentConfig
from distil_jax.config.step import StepConfig
from distil_jax.models.encoder import MaskedLm, layers_apart
from distil_jax.runtime.assemble import resolve_compute, student_model, with_compute
from distil_jax.runtime.attention import resolve_attention
from distil_jax.schema import require
from distil_jax.structs import Batch
from distil_jax.training.sharding import make_mesh


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `distil-jax bench inference`."""
    peers.add_model_flags(parser)
    parser.add_argument("--batches", default="1,32", metavar="LIST", help="rows per call (default: %(default)s)")
    parser.add_argument("--lengths", metavar="LIST", help="tokens per row (default: 32,128 at most)")
    parser.add_argument("--calls", type=int, default=20, help="of each encoder per round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="in each, all encoders take turns (default: %(default)s)")
    parser.add_argument("--peer", metavar="LIST", help="torch, to measure the same encoders in PyTorch")


def run(arguments: argparse.Namespace) -> Measurement:
    """Measures one line per batch size, length and library, on one device.

    Raises:
      InputError: a flag that is not a number, rows longer than the model's positions, or a peer that cannot run here.
    """
    timing.require_positive(calls=arguments.calls, rounds=arguments.rounds)
    with_torch = peers.parse_peers(arguments.peer, ("eager",))
    shape, compute = peers.shape_model(arguments.shape), resolve_compute(ComputeConfig(dtype=arguments.dtype))
    student = with_compute(student_model(StudentConfig(), shape, shape.vocab_size), compute)
    both, mesh = StepConfig(student, with_compute(shape, compute)), make_mesh(MeshConfig(), jax.devices()[:1])
    lines = []
    for batch in timing.parse_list("--batches", arguments.batches, int):
        for length in row_lengths(arguments.lengths, shape.max_positions):
            timing.require_positive(batches=batch, lengths=length)
            step, _ = resolve_attention(both, "auto", mesh, length)
            models = {"teacher": step.teacher, "student": step.student}
            calls = {(OURS, name): encoder(model, batch, length) for name, model in models.items()}
            with peers.pytorch() as make:
                if with_torch:
                    calls |= {("torch", name): make("encoder", model, batch, length) for name, model in models.items()}
                milliseconds = timing.medians(calls, times=arguments.calls, rounds=arguments.rounds)
            lines += [{"batch": batch, "length": length} | line for line in _lines(milliseconds)]
    return Measurement(lines)


def row_lengths(text: str | None, positions: int) -> list[int]:
    """The lengths in the value of --lengths; without one, 32 and 128, or as many as the model has positions.

    Raises:
      InputError: something else than numbers, or more than the model's positions.
    """
    if text is None:
        return sorted({min(length, positions) for length in (32, 128)})
    lengths = timing.parse_list("--lengths", text, int)
    longest = max(lengths)
    require(longest <= positions, f"--lengths {longest} is too long: the model has {positions} positions.")
    return lengths


def encoder(model: ModelConfig, batch: int, length: int) -> TimedCall:
    """A call that runs the encoder on full rows [batch, length], with random parameters in the compute dtype.

    If the layers are unrolled, as on CPUs, each layer has its own arrays.
    """
    model = replace(model, mlm_head=False)
    params = jax.jit(partial(random_params, model))(jax.random.key(0))
    if model.unroll:
        params = layers_apart(params)
    ids = np.random.default_rng(0).integers(5, model.vocab_size, (batch, length))
    rows = jax.device_put(Batch.from_padded(ids, np.ones_like(ids), ids))
    encode = jax.jit(lambda params, rows: MaskedLm(model).apply({"params": params}, rows).hidden)
    return TimedCall(lambda: jax.block_until_ready(encode(params, rows)))


def _lines(milliseconds: Mapping[tuple[str, str], list[float]]) -> list[dict[str, Any]]:
    lines = []
    for side in dict.fromkeys(side for side, _ in milliseconds):
        teacher, student = milliseconds[side, "teacher"], milliseconds[side, "student"]
        line = {"side": side, "teacher_p50_ms": float(np.median(teacher)), "student_p50_ms": float(np.median(student))}
        line |= timing.spread("student_is_faster", teacher, student)
        if side != OURS:
            line |= timing.spread("our_teacher_is_faster", teacher, milliseconds[OURS, "teacher"])
            line |= timing.spread("our_student_is_faster", student, milliseconds[OURS, "student"])
        lines.append(line)
    return lines
