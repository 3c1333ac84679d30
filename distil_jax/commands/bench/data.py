"""`distil-jax bench data`: the speed of `prepare` next to the tokenizer alone, and of the loader."""

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
from distil_jax.commands.bench.timing import Measurement
from distil_jax.data.loader import RowTable, batches, open_rows, prefetch
from distil_jax.schema import expand_home, require

_TEXTS_PER_CALL = 4096  # when the tokenizer is measured alone
_SYNTHETIC_ROWS, _LENGTHS = 16_384, (128, 512)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `distil-jax bench data`."""
    parser.add_argument("--text", nargs="+", action="extend", metavar="FILE", help="to prepare; must fit in memory")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="or hub id; use it with --text")
    parser.add_argument("--rows", metavar="FOLDER", help="prepared rows to load (default: random ones)")
    parser.add_argument("--batch-rows", type=int, default=256, help="rows per batch (default: %(default)s)")
    parser.add_argument(
        "--positions", type=int, default=20_000_000, help="to load per round, about (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="repeats of every measurement (default: %(default)s)")


def run(arguments: argparse.Namespace) -> Measurement:
    """Measures `prepare`, if there is text, and the loader.

    Raises:
      InputError: text without a tokenizer, or input that `prepare` or the loader refuses.
    """
    timing.require_positive(batch_rows=arguments.batch_rows, positions=arguments.positions, rounds=arguments.rounds)
    require(bool(arguments.text) == bool(arguments.tokenizer), "--text and --tokenizer go together: give both or none.")
    lines = []
    if arguments.text:
        sources = [expand_home(source) for source in arguments.text]
        lines += prepare_rates(sources, expand_home(arguments.tokenizer), arguments.rounds)
    with tempfile.TemporaryDirectory() as folder:
        for table in [open_rows(arguments.rows)] if arguments.rows else _synthetic(Path(folder)):
            rates = [load_rate(table, arguments.batch_rows, arguments.positions) for _ in range(arguments.rounds)]
            length = table.input_ids.shape[1]
            lines.append({"work": "loader", "length": length, **timing.spread("positions_per_second", rates)})
    return Measurement(lines)


def prepare_rates(sources: Sequence[str], tokenizer: str, rounds: int) -> list[dict[str, Any]]:
    """Tokens per second of the tokenizer's fastest call alone, and of `prepare`, measured in alternation."""
    from distil_jax.data.corpus import read
    from distil_jax.data.prepare import PrepareConfig, prepare
    from distil_jax.data.tokenizer import load_tokenizer

    texts = [piece.text for piece in read(sources, counts=Counter())]
    calls = [texts[start : start + _TEXTS_PER_CALL] for start in range(0, len(texts), _TEXTS_PER_CALL)]
    backend = load_tokenizer(tokenizer).backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    tokens = 0
    for call in calls:
        tokens += sum(len(encoding) for encoding in backend.encode_batch_fast(call, add_special_tokens=False))

    def tokenizer_alone(_: int) -> float:
        start = time.perf_counter()
        for call in calls:
            backend.encode_batch_fast(call, add_special_tokens=False)
        return tokens / (time.perf_counter() - start)

    def whole_prepare(_: int) -> float:
        config = PrepareConfig(tuple(sources), tokenizer=tokenizer, held_out=0.0)
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            prepare(config, Path(folder) / "rows")
            return tokens / (time.perf_counter() - start)

    rates = timing.alternate({"encode_batch_fast": tokenizer_alone, "prepare": whole_prepare}, rounds)
    lines = [{"work": work, **timing.spread("tokens_per_second", by_round)} for work, by_round in rates.items()]
    lines[1] |= timing.spread("of_bare_tokenizer", rates["prepare"], rates["encode_batch_fast"])
    return lines


def load_rate(table: RowTable, batch_rows: int, positions: int) -> float:
    """Positions per second that the loader and its thread deliver, in shuffled batches that nothing uses."""
    size = batch_rows * table.input_ids.shape[1]
    count = max(2, positions // size)
    with contextlib.closing(prefetch(batches(table, batch_rows=batch_rows, seed=0))) as stream:
        next(stream)  # the first batch includes shuffling the epoch
        start = time.perf_counter()
        for _ in range(count):
            next(stream)
        return count * size / (time.perf_counter() - start)


def _synthetic(folder: Path) -> Iterator[RowTable]:
    """Yields tables of random, full rows on disk, memory-mapped like prepared ones."""
    for length in _LENGTHS:
        ids = np.random.default_rng(0).integers(5, 30_000, (_SYNTHETIC_ROWS, length), np.uint16)
        for name, array in (("input_ids", ids), ("segment_ids", np.ones_like(ids))):
            np.save(folder / f"{name}-{length}.npy", array)
        files = (folder / f"{name}-{length}.npy" for name in ("input_ids", "segment_ids"))
        yield RowTable(*(np.load(file, mmap_mode="r").view(np.ndarray) for file in files))
