"""`distil-jax bench data`: text to rows beside the bare tokenizer, and rows on disk to batches."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distil_jax.commands.bench import timing
from distil_jax.commands.bench.timing import Measured
from distil_jax.data.loader import RowTable, batches, open_rows, prefetch
from distil_jax.schema import expand_home, require

_LINES_AT_ONCE = 4096  # for the bare tokenizer
_SYNTHETIC_ROWS, _LENGTHS = 16_384, (128, 512)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `distil-jax bench data`."""
    parser.add_argument("--text", nargs="+", action="extend", metavar="FILE", help="to prepare; fits in memory")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="or hub id; goes with --text")
    parser.add_argument("--rows", metavar="FOLDER", help="prepared rows to load (default: synthetic ones)")
    parser.add_argument("--batch-rows", type=int, default=256, help="rows loaded at a time (default: %(default)s)")
    parser.add_argument(
        "--positions", type=int, default=20_000_000, help="loaded in a round, about (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of every kind of work (default: %(default)s)")


def run(arguments: argparse.Namespace) -> Measured:
    """A line for each kind of work.

    Raises:
      InputError: text without a tokenizer, or what `prepare` and the loader refuse.
    """
    timing.positive(batch_rows=arguments.batch_rows, positions=arguments.positions, rounds=arguments.rounds)
    require(bool(arguments.text) == bool(arguments.tokenizer), "--text and --tokenizer go together: give both or none.")
    lines = []
    if arguments.text:
        lines += prepare_rates(
            list(map(expand_home, arguments.text)), expand_home(arguments.tokenizer), arguments.rounds
        )
    with tempfile.TemporaryDirectory() as folder:
        for table in [open_rows(arguments.rows)] if arguments.rows else _synthetic(Path(folder)):
            rates = [load_rate(table, arguments.batch_rows, arguments.positions) for _ in range(arguments.rounds)]
            length = table.input_ids.shape[1]
            lines.append({"work": "loader", "length": length, **timing.spread("positions_per_second", rates)})
    return Measured(lines)


def prepare_rates(sources: Sequence[str], path: str, rounds: int) -> list[dict[str, Any]]:
    """Tokens of the text a second, by `prepare`, and by nothing but the tokenizer's fastest call, in alternation."""
    from distil_jax.data.corpus import read
    from distil_jax.data.prepare import PrepareConfig, prepare
    from distil_jax.data.tokenizer import load_tokenizer

    texts = [piece.text for piece in read(sources, counts=Counter())]
    pieces = [texts[start : start + _LINES_AT_ONCE] for start in range(0, len(texts), _LINES_AT_ONCE)]
    backend = load_tokenizer(path).backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    tokens = sum(len(each) for piece in pieces for each in backend.encode_batch_fast(piece, add_special_tokens=False))

    def bare(_: int) -> float:
        began = time.perf_counter()
        for piece in pieces:
            backend.encode_batch_fast(piece, add_special_tokens=False)
        return tokens / (time.perf_counter() - began)

    def whole(_: int) -> float:
        config = PrepareConfig(tuple(sources), tokenizer=path, held_out=0.0)
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            prepare(config, Path(folder) / "rows")
            return tokens / (time.perf_counter() - began)

    rates = timing.alternate({"encode_batch_fast": bare, "prepare": whole}, rounds)
    lines = [{"work": work, **timing.spread("tokens_per_second", rates_of)} for work, rates_of in rates.items()]
    lines[1] |= timing.spread("of_bare_tokenizer", rates["prepare"], rates["encode_batch_fast"])
    return lines


def load_rate(table: RowTable, batch_rows: int, positions: int) -> float:
    """Positions a second that the loader and its thread hand over, [B, L] a batch, shuffled; nothing uses them."""
    size = batch_rows * table.input_ids.shape[1]
    count = max(2, positions // size)
    with contextlib.closing(prefetch(batches(table, batch_rows=batch_rows, seed=0))) as stream:
        next(stream)  # draws the order of the epoch
        began = time.perf_counter()
        for _ in range(count):
            next(stream)
        return count * size / (time.perf_counter() - began)


def _synthetic(folder: Path) -> Iterator[RowTable]:
    """Full rows on disk, memory-mapped as prepared ones are."""
    for length in _LENGTHS:
        ids = np.random.default_rng(0).integers(5, 30_000, (_SYNTHETIC_ROWS, length), np.uint16)
        for name, array in (("input_ids", ids), ("segment_ids", np.ones_like(ids))):
            np.save(folder / f"{name}-{length}.npy", array)
        files = (folder / f"{name}-{length}.npy" for name in ("input_ids", "segment_ids"))
        yield RowTable(*(np.load(file, mmap_mode="r").view(np.ndarray) for file in files))
