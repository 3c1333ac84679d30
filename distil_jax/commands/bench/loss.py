"""`distil-jax bench loss`: time and memory of the fused and the dense vocabulary loss, with all gradients."""

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
from distil_jax.commands.bench.timing import Measurement, TimedCall
from distil_jax.config.objective import LossConfig
from distil_jax.config.run import ComputeConfig
from distil_jax.objective.fused import fused_loss
from distil_jax.objective.vocabulary import dense_loss
from distil_jax.runtime.assemble import resolve_compute
from distil_jax.schema import require
from distil_jax.structs import IGNORED, Head

KINDS = ("dense", "fused")
_TARGETS = 0.15  # share of the positions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `distil-jax bench loss`."""
    parser.add_argument("--vocabularies", default="30592,119552", metavar="LIST", help="sizes (default: %(default)s)")
    parser.add_argument("--tokens", default="2048,8192", metavar="LIST", help="per batch (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens per row (default: %(default)s)")
    parser.add_argument("--width", type=int, default=768, help="of the features (default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=LossConfig().chunk, help="see loss.chunk (default: %(default)s)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the features")
    parser.add_argument("--calls", type=int, default=5, help="of each loss per round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="in each, both losses take turns (default: %(default)s)")
    parser.add_argument(
        "--topology",
        help="only compile with libtpu, for one chip of this TPU slice, such as v5e:2x2; no TPU is needed",
    )


@dataclass(frozen=True)
class Job:
    """The sizes of one comparison, on positions [batch, length]."""

    vocabulary: int
    batch: int
    length: int
    width: int
    chunk: int
    dtype: str


def run(arguments: argparse.Namespace) -> Measurement:
    """Measures one line per vocabulary size and number of tokens.

    Raises:
      InputError: sizes that do not fit together, or a topology that libtpu does not know.
    """
    sizes = {name: getattr(arguments, name) for name in ("length", "width", "chunk", "calls", "rounds")}
    timing.require_positive(**sizes)
    platform = "tpu" if arguments.topology else None
    dtype = resolve_compute(ComputeConfig(dtype=arguments.dtype), platform).dtype
    lines = []
    for vocabulary in timing.parse_list("--vocabularies", arguments.vocabularies, int):
        for tokens in timing.parse_list("--tokens", arguments.tokens, int):
            timing.require_positive(vocabularies=vocabulary, tokens=tokens)
            length = arguments.length
            require(tokens % length == 0, f"--tokens {tokens} is not a multiple of --length {length}.")
            job = Job(vocabulary, tokens // length, length, arguments.width, arguments.chunk, dtype)
            if arguments.topology:
                results = plan_for_tpu(job, arguments.topology)
            else:
                results = measure(job, calls=arguments.calls, rounds=arguments.rounds)
            lines.append({"vocabulary": vocabulary, "tokens": tokens} | results)
    return Measurement(lines)


def gradients(job: Job, kind: str) -> Callable[..., Any]:
    """The function (features, head, *constants) -> loss and its gradients with respect to features, kernel and bias."""
    vocabulary_loss = partial(fused_loss, chunk=job.chunk) if kind == "fused" else dense_loss

    def loss(features: Any, head: Head, *constants: Any) -> Any:
        return vocabulary_loss(features, head, *constants, temperature=2.0)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)


def inputs(job: Job) -> tuple[Any, ...]:
    """Random arguments for `gradients`.

    The student's head is float32, as in a train state; everything else of a model is in the compute dtype.
    """
    rng, shape = np.random.default_rng(0), (job.batch, job.length)

    def features() -> jax.Array:
        return jnp.asarray(rng.standard_normal((*shape, job.width), np.float32), job.dtype)

    def head(dtype: str) -> Head:
        kernel = 0.02 * rng.standard_normal((job.vocabulary, job.width), np.float32)
        return Head(kernel=jnp.asarray(kernel, dtype), bias=jnp.zeros(job.vocabulary, jnp.float32))

    labels = np.where(rng.random(shape) < _TARGETS, rng.integers(0, job.vocabulary, shape), IGNORED)
    scales = {"kl": jnp.float32(5.0 / labels.size), "mlm": jnp.float32(2.0 / (_TARGETS * labels.size))}
    where = jnp.ones(shape, bool)
    return features(), head("float32"), features(), head(job.dtype), where, jnp.asarray(labels, jnp.int32), scales


def measure(job: Job, *, calls: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of each loss, unless it needs more memory than there is, and the memory that XLA plans for it."""
    arguments, memory = inputs(job), _available_memory()
    programs = {kind: jax.jit(gradients(job, kind)).lower(*arguments).compile() for kind in KINDS}
    plans = {kind: program.memory_analysis().temp_size_in_bytes for kind, program in programs.items()}
    fitting = {kind: program for kind, program in programs.items() if plans[kind] < memory}
    milliseconds = timing.medians(
        {
            kind: TimedCall(lambda program=program: jax.block_until_ready(program(*arguments)))
            for kind, program in fitting.items()
        },
        times=calls,
        rounds=rounds,
    )
    results = {f"{kind}_ms": float(np.median(by_round)) for kind, by_round in milliseconds.items()}
    if len(milliseconds) == len(KINDS):
        results |= timing.spread("fused_is_faster", milliseconds["dense"], milliseconds["fused"])
    return results | _memory(plans)


def _memory(plans: dict[str, int]) -> dict[str, float]:
    """The bytes of temporaries of each loss as table entries in GiB, with their ratio."""
    sizes = {f"{kind}_temporary_gib": plan / 2**30 for kind, plan in plans.items()}
    # The ratio is None if the fused loss needs no HBM, because a chunk's logits fit into a TPU core's own memory.
    return sizes | {"fused_is_smaller": plans["dense"] / plans["fused"] if plans["fused"] else None}


def _available_memory() -> float:
    """Bytes that temporaries may take: a share of the memory of the device or the host."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return 0.8 * (limit or record.memory())


def plan_for_tpu(job: Job, topology: str) -> dict[str, Any]:
    """The temporaries that libtpu plans for a TPU, compiled in a separate process.

    Raises:
      InputError: libtpu is not installed, does not know the topology, or fails otherwise.
    """
    from distil_jax.machines.aot import run_with_libtpu

    return _memory(run_with_libtpu("distil_jax.commands.bench.loss_aot", job, topology))
