"""`distil-jax prepare`: turns text into a folder of packed rows of tokens."""

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
        help="text (Markdown too), JSONL, CSV, TSV or Parquet files, also compressed (.gz, .bz2, .xz), folders or "
        "globs of them, hub:NAME[:CONFIG[:SPLIT]] for a data set of the Hugging Face hub, or the word docstrings for "
        "the English docstrings of the installed packages",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="the folder to write; must be new or empty")
    vocabulary = parser.add_mutually_exclusive_group(required=True)
    vocabulary.add_argument("--tokenizer", default="", metavar="FOLDER", help="or hub id of the teacher's tokenizer")
    vocabulary.add_argument(
        "--train-tokenizer",
        dest="train_vocabulary",
        type=int,
        default=0,
        metavar="VOCAB",
        help="train an uncased WordPiece vocabulary of this size instead",
    )
    defaults = {field.name: field.default for field in fields(PrepareConfig)}
    parser.add_argument(
        "--sequence-length",
        type=int,
        help="tokens per row (default: 512, or the positions of the tokenizer's model if it has fewer)",
    )
    for flag, choices, text in (
        ("--held-out", None, "share of the documents to hold out from training; at least one of them, unless it is 0"),
        ("--document", ("block", "file", "line"), "what to take as a document of a text file; blank lines end a block"),
        ("--sequence", ("line", "document"), "what to tokenise as one sequence: a line, or a whole document"),
        (
            "--text-field",
            None,
            "the field (of a table: the column) with the text in JSONL, CSV, TSV, Parquet and hub records",
        ),
        ("--min-tokens", None, "drop shorter sequences; [CLS] and [SEP] count"),
        ("--max-unknown", None, "drop sequences with this share of unknown words or more"),
    ):
        default = defaults[flag.removeprefix("--").replace("-", "_")]
        text += " (default: %(default)s)"
        parser.add_argument(flag, type=type(default), default=default, choices=choices, help=text)


def run(arguments: argparse.Namespace) -> None:
    """Prepares the rows and prints a summary of the counts."""
    values = {field.name: getattr(arguments, field.name) for field in fields(PrepareConfig)}
    values |= {"sources": tuple(map(expand_home, arguments.sources)), "tokenizer": expand_home(arguments.tokenizer)}
    output = user_path(arguments.output)
    print(prepare_rows(PrepareConfig(**values), output))
    print(f"\nWrote {output}. Next: distil-jax train CONFIG --set data.path={output}")
