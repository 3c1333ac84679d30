"""`distil-jax bench loss`: the fused vocabulary loss beside the dense one, in time and memory, with all gradients."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distil_jax.commands.bench import record, timing
from distil_jax.commands.bench.timing import Measured, Timed
from distil_jax.config.objective import LossConfig
from distil_jax.config.run import ComputeConfig
from distil_jax.objective.fused import fused_loss
from distil_jax.objective.vocabulary import dense_loss
from distil_jax.runtime.assemble import resolve_compute
from distil_jax.schema import require
from distil_jax.structs import IGNORED, Head

KINDS = ("dense", "fused")
_TARGETS = 0.15  # of the positions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `distil-jax bench loss`."""
    parser.add_argument("--vocabularies", default="30592,119552", metavar="LIST", help="(default: %(default)s)")
    parser.add_argument("--tokens", default="2048,8192", metavar="LIST", help="of a batch (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="of a row (default: %(default)s)")
    parser.add_argument("--width", type=int, default=768, help="of the features (default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=LossConfig().chunk, help="see loss.chunk (default: %(default)s)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the features")
    parser.add_argument("--calls", type=int, default=5, help="of each loss in a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of both, alternating (default: %(default)s)")
    parser.add_argument(
        "--topology",
        help="do not run: say what libtpu plans for one chip of a slice that need not be there, as v5e:2x2",
    )


@dataclass(frozen=True)
class Job:
    """One comparison, of [B, L] positions."""

    vocabulary: int
    batch: int
    length: int
    width: int
    chunk: int
    dtype: str


def run(arguments: argparse.Namespace) -> Measured:
    """A line for each vocabulary and number of tokens.

    Raises:
      InputError: sizes that do not go together, or a topology that libtpu does not know.
    """
    sizes = {name: getattr(arguments, name) for name in ("length", "width", "chunk", "calls", "rounds")}
    timing.positive(**sizes)
    platform = "tpu" if arguments.topology else None
    dtype = resolve_compute(ComputeConfig(dtype=arguments.dtype), platform).dtype
    lines = []
    for vocabulary in timing.numbers("--vocabularies", arguments.vocabularies, int):
        for tokens in timing.numbers("--tokens", arguments.tokens, int):
            timing.positive(vocabularies=vocabulary, tokens=tokens)
            length = arguments.length
            require(tokens % length == 0, f"--tokens {tokens} is no whole number of rows of {length} (--length).")
            job = Job(vocabulary, tokens // length, length, arguments.width, arguments.chunk, dtype)
            if arguments.topology:
                results = plan_elsewhere(job, arguments.topology)
            else:
                results = measure(job, calls=arguments.calls, rounds=arguments.rounds)
            lines.append({"vocabulary": vocabulary, "tokens": tokens} | results)
    return Measured(lines)


def gradients(job: Job, kind: str) -> Callable[..., Any]:
    """The loss and its gradients by features, kernel and bias, (features, head, *constants) -> values."""
    compare = partial(fused_loss, chunk=job.chunk) if kind == "fused" else dense_loss

    def loss(features: Any, head: Head, *constants: Any) -> Any:
        return compare(features, head, *constants, temperature=2.0)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)


def inputs(job: Job) -> tuple[Any, ...]:
    """Random features, heads and labels; the student's head in float32 as in a state, the teacher's as it computes."""
    draw, shape = np.random.default_rng(0), (job.batch, job.length)

    def features() -> jax.Array:
        return jnp.asarray(draw.standard_normal((*shape, job.width), np.float32), job.dtype)

    def head(dtype: str) -> Head:
        kernel = 0.02 * draw.standard_normal((job.vocabulary, job.width), np.float32)
        return Head(kernel=jnp.asarray(kernel, dtype), bias=jnp.zeros(job.vocabulary, jnp.float32))

    labels = np.where(draw.random(shape) < _TARGETS, draw.integers(0, job.vocabulary, shape), IGNORED)
    scales = {"kl": jnp.float32(5.0 / labels.size), "mlm": jnp.float32(2.0 / (_TARGETS * labels.size))}
    where = jnp.ones(shape, bool)
    return features(), head("float32"), features(), head(job.dtype), where, jnp.asarray(labels, jnp.int32), scales


def measure(job: Job, *, calls: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of both in alternation, where the machine has the memory, and the temporaries that XLA plans."""
    arguments, room = inputs(job), _room()
    programs = {kind: jax.jit(gradients(job, kind)).lower(*arguments).compile() for kind in KINDS}
    plans = {kind: program.memory_analysis().temp_size_in_bytes for kind, program in programs.items()}
    fitting = {kind: program for kind, program in programs.items() if plans[kind] < room}
    milliseconds = timing.medians(
        {kind: Timed(lambda each=each: jax.block_until_ready(each(*arguments))) for kind, each in fitting.items()},
        times=calls,
        rounds=rounds,
    )
    ratio = (
        timing.spread("fused_is_faster", milliseconds["dense"], milliseconds["fused"])
        if len(milliseconds) == len(KINDS)
        else {}
    )
    return {f"{kind}_ms": float(np.median(each)) for kind, each in milliseconds.items()} | ratio | _memory(plans)


def _memory(plans: dict[str, int]) -> dict[str, float]:
    sizes = {f"{kind}_temporary_gib": plan / 2**30 for kind, plan in plans.items()}
    # None where a TPU holds a chunk's logits in memory of its core, and so needs no other.
    return sizes | {"fused_is_smaller": plans["dense"] / plans["fused"] if plans["fused"] else None}


def _room() -> float:
    """Bytes that temporaries may take."""
    limits = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return 0.8 * (limits or record.memory())


def plan_elsewhere(job: Job, topology: str) -> dict[str, Any]:
    """The temporaries that libtpu plans, found in a separate process.

    Raises:
      InputError: libtpu is not installed, knows no such topology, or fails otherwise.
    """
    from distil_jax.machines.aot import elsewhere

    return _memory(elsewhere("distil_jax.commands.bench.loss_aot", job, topology))
