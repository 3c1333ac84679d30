"""`distil-jax bench step`: the train step of teacher and student as `train` runs it, alone or next to PyTorch's."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from distil_jax.commands.bench import batching, peers, timing
from distil_jax.commands.bench.peers import OURS, Remote
from distil_jax.commands.bench.timing import Block, Measurement, TimedCall
from distil_jax.config.model import ModelConfig
from distil_jax.config.run import Config
from distil_jax.config.step import StepConfig
from distil_jax.data.loader import RowTable, batches, indices_at, open_rows, prefetch
from distil_jax.data.manifest import read_manifest
from distil_jax.machines.chips import CHIPS
from distil_jax.machines.flops import step_flops
from distil_jax.models.encoder import init_params
from distil_jax.objective.masking import most_targets
from distil_jax.runtime import assemble
from distil_jax.schema import build, require, set_value
from distil_jax.structs import Rows
from distil_jax.training.sharding import lower_step, make_mesh, put_rows, shard_count, shardings_of
from distil_jax.training.state import abstract_state, init_state
from distil_jax.training.step import mask_and_train_step

_SPECIAL = 5  # number of special tokens, the first ids; random rows have none of them; [MASK] is the last one
_RANDOM_BATCHES = 8  # different ones, repeated


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `distil-jax bench step`."""
    peers.add_model_flags(parser)
    parser.add_argument("--batch-rows", type=int, default=8, help="rows per step (default: %(default)s)")
    parser.add_argument("--length", type=int, help="tokens per row (default: as in --rows, or 128 at most)")
    parser.add_argument("--accumulation", type=int, default=0, help="micro-batches per step (default: as in train)")
    parser.add_argument("--dropout", default="0.1", metavar="LIST", help="rates, one after the other (default: 0.1)")
    parser.add_argument("--steps", type=int, default=10, help="per timed block (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="blocks per library, in turns (default: %(default)s)")
    parser.add_argument("--rows", metavar="FOLDER", help="prepared rows (default: full rows of random ids)")
    parser.add_argument("--peer", metavar="LIST", help="of torch:eager, torch:compile and torch:fused")
    parser.add_argument(
        "--peer-batching",
        choices=("buckets", "random"),
        default="buckets",
        help="how a peer batches the sequences of --rows: in buckets of similar length, as the original, or at random",
    )
    parser.add_argument(
        "--peer-chunk", type=int, default=0, help="positions per chunk of torch:fused (default: loss.chunk, as ours)"
    )
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override a config key")


def run(arguments: argparse.Namespace) -> Measurement:
    """Measures one line per dropout rate and library; for each rate, the libraries take turns.

    Raises:
      InputError: settings that do not fit together, or a peer that cannot run here.
    """
    timing.require_positive(batch_rows=arguments.batch_rows, rounds=arguments.rounds)
    require(arguments.steps >= 2, f"--steps must be at least 2, not {arguments.steps}.")
    variants = peers.parse_peers(arguments.peer, ("eager", "compile", "fused"))
    works = {rate: read_work(arguments, rate) for rate in timing.parse_list("--dropout", arguments.dropout, float)}
    first = next(iter(works.values()))
    makers = {OURS: timing.matmuls}
    student, micro_batches = first.step.student, first.step.accumulation * shard_count(first.mesh)
    tokens = first.batch_rows * first.length // micro_batches
    with peers.pytorch() as make:
        if variants:
            _check_comparable(first)
            makers["torch"] = partial(make, "matmuls")
        rates = timing.matmul_rates(makers, tokens, student.hidden_size, student.intermediate_size, student.dtype)
    lines = []
    for dropout, work in works.items():
        # PyTorch limits how often a process may recompile a function, so every rate gets a process of its own.
        with contextlib.closing(JaxStep(work)) as ours, peers.pytorch() as make:
            sides: dict[str, JaxStep | Remote] = {OURS: ours}
            if variants:
                loss = replace(work.step.loss, chunk=arguments.peer_chunk or work.step.loss.chunk)
                step, rounds = replace(work.step, loss=loss), _peer_rounds(work, arguments.peer_batching)
                sides |= {f"torch:{variant}": make("TorchStep", variant, step, rounds) for variant in variants}
            lines += [{"dropout": dropout} | line for line in _measure(work, sides, rates[OURS])]
    return Measurement(lines, rates)


@dataclass(frozen=True, eq=False)
class Work:
    """The work that every library does.

    Attributes:
      config: like the config of a run.
      step: what the step is compiled from.
      mesh: where our own step runs.
      table: the rows.
      weights: [V], see `masking_weights`.
      length: positions per row.
      steps, rounds: steps per block, and blocks per library.
    """

    config: Config
    step: StepConfig
    mesh: Mesh
    table: RowTable
    weights: np.ndarray
    length: int
    steps: int
    rounds: int

    @property
    def batch_rows(self) -> int:
        return self.config.train.batch_rows


def read_work(arguments: argparse.Namespace, dropout: float) -> Work:
    """Makes the work from the flags, through the config of a run, every key of which can be overridden.

    Raises:
      InputError: an unknown key, rows that do not fit the model, or settings that do not fit together.
    """
    values: dict[str, Any] = {
        "teacher": {"path": arguments.shape},  # not read; a path only means that there is a teacher
        "student": {"hidden_dropout": dropout, "attention_dropout": dropout},
        "optimizer": {"steps": 100_000},
        "train": {"batch_rows": arguments.batch_rows, "steps": 1, "accumulation": arguments.accumulation},
        "compute": {"dtype": arguments.dtype},
    }
    for override in arguments.set:
        set_value(values, override)
    config, shape = build(Config, values), peers.shape_model(arguments.shape)
    compute = assemble.resolve_compute(config.compute)
    student = assemble.with_compute(assemble.student_model(config.student, shape, shape.vocab_size), compute)
    teacher = assemble.with_compute(shape, assemble.teacher_compute(config.teacher, compute))
    table, weights, mask_id = _rows(arguments, config, student)
    length, mesh = table.input_ids.shape[1], make_mesh(config.mesh)
    longest = min(student.max_positions, teacher.max_positions)
    require(length <= longest, f"Rows of {length} are longer than the model's {longest} positions: use shorter ones.")
    step = StepConfig(
        student=student,
        teacher=teacher if config.teacher.path else None,
        loss=config.loss,
        masking=replace(config.masking, mask_token_id=mask_id),
        optimizer=config.optimizer,
        targets_per_row=most_targets(length, config.masking.rate),
    )
    step, _ = assemble.resolve_step(step, config, mesh, length)
    return Work(config, step, mesh, table, weights, length, arguments.steps, arguments.rounds)


def _rows(arguments: argparse.Namespace, config: Config, student: ModelConfig) -> tuple[RowTable, np.ndarray, int]:
    """The rows, the masking weight of every id [V], and the id of [MASK]."""
    if arguments.rows:
        manifest = read_manifest(arguments.rows)
        length, ids = manifest.sequence_length, manifest.vocab_size
        require(
            arguments.length in (None, length), f"The rows of {arguments.rows} are {length} long: leave --length out."
        )
        fits = ids <= student.vocab_size
        require(fits, f"The rows have {ids} ids, but the model has {student.vocab_size}: choose a larger --shape.")
        weights = assemble.token_weights(arguments.rows, manifest, student, smoothing=config.masking.smoothing)
        return open_rows(arguments.rows), weights, manifest.mask_id
    length = min(128, student.max_positions) if arguments.length is None else arguments.length
    timing.require_positive(length=length)
    shape = (_RANDOM_BATCHES * config.train.batch_rows, length)
    ids_NxL = np.random.default_rng(0).integers(_SPECIAL, student.vocab_size, shape, np.int32)
    ids_V = np.arange(student.padded_vocab_size)
    weights = ((ids_V >= _SPECIAL) & (ids_V < student.vocab_size)).astype(np.float32)
    return RowTable(ids_NxL, np.ones(shape, np.int32)), weights, _SPECIAL - 1


def _check_comparable(work: Work) -> None:
    """Refuses settings that the peers do not implement, so that all libraries do the same work."""
    loss = work.step.loss
    terms = min(loss.kl, loss.mlm, loss.cosine) > 0 and loss.mse == 0
    require(
        terms and loss.soft_positions == "all" and work.step.teacher is not None and work.step.student.token_types == 0,
        "Peers implement a DistilBERT student with a teacher, and the terms kl, mlm and cosine at all positions: leave "
        "out --peer or the other settings.",
    )


def _peer_rounds(work: Work, peer_batching: str) -> list[list[list[batching.Padded]]]:
    """The sequences that our own step trains on, by round, optimiser step and micro-batch."""
    accumulation, seed = work.step.accumulation, work.config.seed
    steps = work.rounds * work.steps
    rows = work.table.gather(indices_at(work.table, 0, steps * work.batch_rows, seed=seed))
    sequences = list(batching.unpack(rows))
    micro_batches = batching.masked_batches(
        sequences,
        size=max(1, round(len(sequences) / (steps * accumulation))),
        batching=peer_batching,
        weights=work.weights,
        masking=work.step.masking,
        length=work.length,
        seed=seed,
    )
    updates = [micro_batches[start : start + accumulation] for start in range(0, len(micro_batches), accumulation)]
    return [updates[index :: work.rounds] for index in range(work.rounds)]


class JaxStep:
    """Our own train step, `mask_and_train_step`, compiled and warm, with rows from the loader's thread as in `train`.

    It is compiled ahead of time with the settings of `jit_step`, so that the compiler reports how much memory it plans.
    The parameters are random: the speed does not depend on them.
    """

    def __init__(self, work: Work) -> None:
        self._work, self._peak_before = work, _device_peak()
        step, mesh, state, teacher = work.step, work.mesh, abstract_state(work.step), None
        if step.teacher is not None:
            teacher = assemble.teacher_shapes(work.config.teacher, step.teacher)
        start = time.perf_counter()
        lowered = lower_step(mask_and_train_step, mesh, state, teacher, (work.batch_rows, work.length))
        self._step = lowered.compile()
        self._compile_seconds = time.perf_counter() - start
        key, self._teacher = jax.random.key(0), None
        self._state = jax.jit(partial(init_state, config=step), out_shardings=shardings_of(state, mesh))(key)
        if teacher is not None:
            make_params = partial(random_params, step.teacher)
            self._teacher = jax.jit(make_params, out_shardings=shardings_of(teacher, mesh))(key)
        with contextlib.closing(self._stream()) as rows:
            self._run(rows, work.steps)  # warms up
        self._rows = self._stream()

    def block(self, _: int) -> Block:
        """Times the next steps of the stream, with one wait at the end; the index of the round is not needed."""
        return self._run(self._rows, self._work.steps)

    def latencies(self) -> list[float]:
        """The seconds of each step of a block, with a wait after each."""
        return TimedCall(lambda: self._run(self._rows, 1)).seconds(self._work.steps)

    def compile_seconds(self) -> float:
        """The seconds that XLA took to compile the step."""
        return self._compile_seconds

    def peak(self) -> tuple[int, str]:
        """The peak of bytes in use on a device, and the source of that number, "device" or "compiler".

        Devices count from the start of the process. If they do not count, or an earlier program had the higher peak,
        it is the memory that the compiler plans for this step.
        """
        peak = _device_peak()
        if peak > self._peak_before:
            return peak, "device"
        plan = self._step.memory_analysis()
        kept = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
        return kept + plan.temp_size_in_bytes, "compiler"

    def close(self) -> None:
        """Ends the loader's thread."""
        self._rows.close()

    def _stream(self) -> Iterator[tuple[Rows, int]]:
        """Batches on the mesh, each with its number of tokens without padding."""
        stream = batches(self._work.table, batch_rows=self._work.batch_rows, seed=self._work.config.seed)
        return prefetch((put_rows(rows, self._work.mesh), int(np.sum(rows.segment_ids > 0))) for rows in stream)

    def _run(self, rows: Iterator[tuple[Rows, int]], steps: int) -> Block:
        tokens, waited, start = 0, 0.0, time.perf_counter()
        for _ in range(steps):
            wait_start = time.perf_counter()
            batch, batch_tokens = next(rows)
            waited += time.perf_counter() - wait_start
            self._state, metrics = self._step(self._state, self._teacher, batch, (self._work.weights,), {})
            tokens += batch_tokens
        jax.block_until_ready((self._state, metrics))
        positions = steps * self._work.batch_rows * self._work.length
        return Block(time.perf_counter() - start, tokens, positions, waited)


def random_params(model: ModelConfig, key: jax.Array) -> Any:
    """Random parameters in the model's compute dtype, in which a teacher's are stored."""
    return jax.tree.map(lambda leaf: leaf.astype(model.dtype), nn.unbox(init_params(key, model)))


def _device_peak() -> int:
    """The peak of bytes in use on any device since the process started; 0 if the devices do not count."""
    return max((device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices())


def _measure(work: Work, sides: dict[str, JaxStep | Remote], matmul_rate: float) -> Iterator[dict[str, Any]]:
    """Measures all sides in alternation, and yields a line of results for each, our own first."""
    blocks = timing.alternate({name: side.block for name, side in sides.items()}, work.rounds)
    rates = {name: [block.tokens / block.seconds for block in by_round] for name, by_round in blocks.items()}
    for name, side in sides.items():
        milliseconds, (peak, source) = 1e3 * np.array(side.latencies()), side.peak()
        ratio = {} if name == OURS else timing.spread("ours_is_faster", rates[OURS], rates[name])
        yield {
            "side": name,
            **timing.spread("tokens_per_second", rates[name]),
            **ratio,
            "tokens_per_second_by_round": rates[name],
            "step_p50_ms": float(np.quantile(milliseconds, 0.5)),
            "step_p95_ms": float(np.quantile(milliseconds, 0.95)),
            "real_tokens_share": float(np.mean([block.tokens / block.positions for block in blocks[name]])),
            "peak_gib": peak and peak / 2**30,
            "peak_said_by": source,
            "compile_s": side.compile_seconds(),
            **(_efficiency(work, blocks[name], matmul_rate) if name == OURS else {}),
        }


def _efficiency(work: Work, blocks: Sequence[Block], matmul_rate: float) -> dict[str, Any]:
    """TFLOP/s per device by `step_flops`, as a share of the data sheet's (bfloat16) and of matrix products alone."""
    seconds = float(np.median([block.seconds for block in blocks])) / work.steps
    rate = step_flops(work.step, work.length) * work.batch_rows * work.length / seconds / work.mesh.size / 1e12
    device = jax.devices()[0]
    chip = CHIPS.get(device.device_kind)
    # Virtual CPU devices share the processor, while the matrix products were measured on one of them alone.
    comparable = work.mesh.size == 1 or device.platform != "cpu"
    return {
        "attention": work.step.student.attention,
        "tflops": rate,
        "mfu": 1e12 * rate / chip.flops if chip and work.step.student.dtype == "bfloat16" else None,
        "of_bare_products": rate / matmul_rate if comparable else None,
        "data_wait_share": sum(block.waited for block in blocks) / sum(block.seconds for block in blocks),
    }
