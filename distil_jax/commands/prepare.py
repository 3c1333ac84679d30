"""`distil-jax prepare`: text in, a folder of packed rows out."""

from __future__ import annotations

import argparse
from dataclasses import fields

from distil_jax.data.prepare import PrepareConfig
from distil_jax.schema import expand_home, user_path
from distil_jax.workflows.prepare import prepare_rows


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
    values |= {"sources": tuple(map(expand_home, arguments.sources)), "tokenizer": expand_home(arguments.tokenizer)}
    output = user_path(arguments.output)
    print(prepare_rows(PrepareConfig(**values), output))
    print(f"\nWrote {output}. Next: distil-jax train CONFIG --set data.path={output}")
