"""`distil-jax prepare`: text in, a folder of packed rows out."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from tqdm import tqdm

from distil_jax.data.corpus import FOLDER_SUFFIXES, size_in_bytes
from distil_jax.data.manifest import Manifest
from distil_jax.data.prepare import PrepareConfig, Progress, prepare
from distil_jax.schema import at_home, place

LOG_SECONDS = 30.0  # between progress lines where there is no terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `distil-jax prepare`: the fields of `PrepareConfig`, with its defaults, and the output."""
    parser.add_argument(
        "sources",
        nargs="+",
        help="text, JSONL, CSV or Parquet files, also compressed (.gz, .bz2, .xz), folders or globs of them, "
        "hub:NAME[:CONFIG[:SPLIT]] for a data set of the Hugging Face hub, or the word docstrings: English from the "
        "docstrings of installed packages",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="what to write; must be new or empty")
    vocabulary = parser.add_mutually_exclusive_group(required=True)
    vocabulary.add_argument("--tokenizer", default="", metavar="FOLDER", help="or hub id; the teacher's own")
    vocabulary.add_argument(
        "--train-tokenizer",
        dest="train_vocabulary",
        type=int,
        default=0,
        metavar="VOCAB",
        help="train an uncased WordPiece vocabulary of this size instead",
    )
    defaults = {field.name: field.default for field in fields(PrepareConfig)}
    for flag, choices, text in (
        ("--sequence-length", None, "tokens a row"),
        ("--held-out", None, "share of the documents that is not trained on"),
        ("--document", ("block", "file", "line"), "of a text file: lines between blank lines, a file, a line"),
        ("--sequence", ("line", "document"), "tokenise each line, or the lines of a document, as one"),
        ("--text-field", None, "the field of JSONL, CSV, Parquet and hub records that holds the text"),
        ("--min-tokens", None, "drop shorter sequences; [CLS] and [SEP] count"),
        ("--max-unknown", None, "drop sequences with this share of unknown words"),
    ):
        default = defaults[flag.removeprefix("--").replace("-", "_")]
        text += " (default: %(default)s)"
        parser.add_argument(flag, type=type(default), default=default, choices=choices, help=text)


def run(arguments: argparse.Namespace) -> None:
    """Prepares the rows and prints what became of the text."""
    values = {field.name: getattr(arguments, field.name) for field in fields(PrepareConfig)}
    values |= {"sources": tuple(map(at_home, arguments.sources)), "tokenizer": at_home(arguments.tokenizer)}
    output = place(arguments.output)
    print(prepare_rows(PrepareConfig(**values), output))
    print(f"\nWrote {output}. Next: distil-jax train CONFIG --set data.path={output}")


def prepare_rows(config: PrepareConfig, output: str | Path) -> str:
    """Prepares the rows while showing progress, and returns what became of the text."""
    start = time.monotonic()
    with _progress(config) as progress:
        manifest = prepare(config, output, progress=progress)
    return summary(manifest, time.monotonic() - start)


@contextmanager
def _progress(config: PrepareConfig) -> Iterator[Progress]:
    """A bar on a terminal, a line now and then elsewhere."""
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


def summary(manifest: Manifest, seconds: float) -> str:
    """What became of the text."""
    count = Counter(manifest.counts)
    train, held_out, length = manifest.train, manifest.held_out, manifest.sequence_length
    filled = count["tokens"] / ((train.rows + held_out.rows) * length)
    return "\n".join(
        (
            f"documents   {count['documents']:,}",
            f"sequences   {count['sequences']:,} kept; {count['cut_sequences']:,} longer than a row were cut",
            f"dropped     {count['dropped_short']:,} too short, {count['dropped_unknown']:,} mostly unknown words",
            f"skipped     {count['invalid_lines']:,} lines that are not UTF-8",
            *_passed_over(count),
            f"tokens      {count['tokens']:,}, of a vocabulary of {manifest.vocab_size:,}",
            f"rows        {train.rows:,} to train on, {held_out.rows:,} held out; {filled:.1%} of {length} tokens used",
            f"time        {seconds:.1f} s, {count['tokens'] / seconds:,.0f} tokens/s",
        )
    )


def _passed_over(count: Counter[str]) -> list[str]:
    """What is seldom there, and is said where it is."""
    others = f"other suffixes than {', '.join(FOLDER_SUFFIXES)}, or hidden"
    said = (
        ("left out", "left_out_files", f"files of the folders ({others})"),
        ("named twice", "repeated_files", "files, which are read once"),
        ("empty", "empty_files", "files without text"),
        ("empty", "empty_records", "records whose text is empty"),
        ("unnamed", "unnamed_fields", "rows with something in a field that the first line does not name"),
    )
    return [f"{word:<12}{count[name]:,} {text}" for word, name, text in said if count[name]]
