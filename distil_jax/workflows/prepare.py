"""Prepares rows of tokens, shows progress meanwhile, and summarises the counts."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from distil_jax.data.corpus import FOLDER_SUFFIXES, size_in_bytes
from distil_jax.data.manifest import Manifest
from distil_jax.data.prepare import PrepareConfig, Progress, prepare
from distil_jax.data.tokenizer import model_positions

LOG_SECONDS = 30.0  # between progress lines if stderr is not a terminal


def prepare_rows(config: PrepareConfig, output: str | Path) -> str:
    """Prepares the rows, shows progress, and returns `summary` of the counts."""
    start = time.monotonic()
    if config.tokenizer and Path(config.tokenizer).is_dir():  # `prepare` is the first to look for a hub id
        _warn_of_long_rows(config)
    with _progress(config) as progress:
        manifest = prepare(config, output, progress=progress)
    return summary(manifest, time.monotonic() - start, asked=config.held_out)


def _warn_of_long_rows(config: PrepareConfig) -> None:
    """Warns of rows that are longer than the model takes whose tokenizer prepares them."""
    positions, length = model_positions(config.tokenizer), config.sequence_length
    if positions and length and length > positions:
        print(
            f"Rows of {length:,} tokens are longer than the {positions:,} positions of {config.tokenizer}, which can "
            f"therefore not be the teacher: if it is to be, stop and use --sequence-length {positions}.",
            file=sys.stderr,
        )


@contextmanager
def _progress(config: PrepareConfig) -> Iterator[Progress]:
    """Yields a function that shows the counts: in a bar on a terminal, otherwise as an occasional line on stderr."""
    if "docstrings" in config.sources:
        print("Reading the docstrings of installed packages, which takes half a minute or more ...", file=sys.stderr)
    if config.train_vocabulary:
        print("Training the vocabulary, which reads the text twice before the bar starts ...", file=sys.stderr)
    last = time.monotonic()
    total = size_in_bytes(config.sources)
    with tqdm(total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:

        def show(counts: Counter[str]) -> None:
            nonlocal last
            bar.set_postfix_str(f"{counts['tokens']:,} tokens", refresh=False)
            bar.update(counts["bytes"] - bar.n)
            if bar.disable and time.monotonic() - last > LOG_SECONDS:
                last = time.monotonic()
                print(f"{counts['documents']:,} documents, {counts['tokens']:,} tokens", file=sys.stderr, flush=True)

        yield show


def summary(manifest: Manifest, seconds: float, *, asked: float) -> str:
    """How much text was kept, cut, dropped and skipped, as one line per kind of count.

    Args:
      manifest: of the rows.
      seconds: that it took.
      asked: the share of the documents that was to be held out.
    """
    count = Counter(manifest.counts)
    train, held_out, length = manifest.train, manifest.held_out, manifest.sequence_length
    filled = count["tokens"] / ((train.rows + held_out.rows) * length)
    held_out_tokens = held_out.tokens / (train.tokens + held_out.tokens)
    used = manifest.settings["held_out"]
    instead = f"; {asked:.2%} of the documents would be {'none' if used > asked else 'all'}" if used != asked else ""
    return "\n".join(
        (
            f"documents   {count['documents']:,}",
            f"sequences   {count['sequences']:,} kept; {count['cut_sequences']:,} longer than a row were cut",
            f"dropped     {count['dropped_short']:,} too short, {count['dropped_unknown']:,} mostly unknown words",
            f"skipped     {count['invalid_lines']:,} lines that are not UTF-8",
            *_rare_counts(count),
            f"tokens      {count['tokens']:,}, of a vocabulary of {manifest.vocab_size:,}",
            f"held out    {count['held_out_documents']:,} documents, with {held_out_tokens:.2%} of the tokens{instead}",
            f"rows        {train.rows:,} to train on, {held_out.rows:,} held out; {filled:.1%} of {length} tokens used",
            f"time        {seconds:.1f} s, {count['tokens'] / seconds:,.0f} tokens/s",
        )
    )


def _rare_counts(count: Counter[str]) -> list[str]:
    """Lines for counts that are usually 0, if they are not."""
    others = f"other suffixes than {', '.join(FOLDER_SUFFIXES)}, or hidden; CSV and TSV are read where a file is named"
    rare = (
        ("left out", "left_out_files", f"files of the folders ({others})"),
        ("named twice", "repeated_files", "files, which are read once"),
        ("empty", "empty_files", "files without text"),
        ("empty", "empty_records", "records whose text is empty"),
        ("unnamed", "unnamed_fields", "rows with something in a field that the first line does not name"),
    )
    return [f"{word:<12}{count[name]:,} {text}" for word, name, text in rare if count[name]]
