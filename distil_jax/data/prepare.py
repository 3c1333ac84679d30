"""Prepares training data: tokenises text and writes packed rows to disk. Training reads the rows without a tokenizer.

Each sequence becomes `[CLS] ... [SEP]`. Several whole sequences are packed into a row of `sequence_length` tokens, with
the segment ids 1, 2, 3, ... Tokens attend only within their segment, so packing changes the speed but not the results.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from distil_jax.data import corpus
from distil_jax.data.manifest import FORMAT, SPLITS, Manifest, Split, StoredFile
from distil_jax.data.packing import Ids, Packer, RowWriter
from distil_jax.data.tokenizer import (
    encode_pieces,
    identity,
    load_tokenizer,
    model_positions,
    special_ids,
    train_tokenizer,
    vocabulary_size,
)
from distil_jax.files import check_free, copy_tokenizer, whole_folder
from distil_jax.schema import InputError, require, to_dict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LONGEST_ROW = 512  # tokens, unless the config says otherwise; most models have so many positions
_CHARACTERS = 8  # per token: more than words have on average, so a text of so many has at least so many tokens
_LARGEST_VOCABULARY = 10_000_000  # more is a typing error

Progress = Callable[[Counter[str]], None]


@dataclass(frozen=True)
class PrepareConfig:
    """What to read, and how to turn it into rows."""

    sources: tuple[str, ...]  # see corpus.py
    tokenizer: str = ""  # folder or hub id; set either this or `train_vocabulary`
    train_vocabulary: int = 0  # size of a WordPiece vocabulary to train on the text that is not held out
    # Tokens of a row; default: 512, or the positions of the tokenizer's model if it has fewer.
    sequence_length: int | None = None
    # Share of the documents that are held out for evaluation, chosen by a hash; at least one is, of two or more.
    held_out: float = 0.01
    document: corpus.Document = "block"  # the unit of a text file that is one document; see `corpus.read`
    sequence: Literal["line", "document"] = "line"  # the unit that becomes one sequence; it is split if too long
    text_field: str = "text"  # the field that holds the text, in JSONL, CSV, Parquet and hub data sets
    min_tokens: int = 12  # sequences with fewer tokens are dropped; [CLS] and [SEP] count
    max_unknown: float = 0.5  # sequences whose share of [UNK] is this or more are dropped; [CLS] and [SEP] count

    def __post_init__(self) -> None:
        if not self.sources:
            raise InputError("There is nothing to prepare: name text files, folders or data sets.")
        if bool(self.tokenizer) == (self.train_vocabulary > 0):
            raise InputError("Name either a tokenizer, or the size of a vocabulary to train.")
        if not 0 <= self.train_vocabulary <= _LARGEST_VOCABULARY:
            raise InputError(
                f"train_vocabulary must be from 0 to {_LARGEST_VOCABULARY:,} tokens, not {self.train_vocabulary}."
            )
        length = _LONGEST_ROW if self.sequence_length is None else self.sequence_length
        if not 3 <= self.min_tokens <= length <= 65_535:  # segment ids have 16 bits
            raise InputError(
                "min_tokens must be at least 3, and sequence_length from min_tokens to 65,535, but they are "
                f"{self.min_tokens} and {length}."
            )
        if not 0 <= self.held_out < 1:
            raise InputError(f"held_out is a share of the documents, at least 0 and below 1, not {self.held_out}.")
        if not 0 < self.max_unknown <= 1:
            raise InputError(f"max_unknown is a share of a sequence, above 0 and at most 1, not {self.max_unknown}.")


def prepare(config: PrepareConfig, output: str | Path, *, progress: Progress = lambda counts: None) -> Manifest:
    """Reads the sources and writes a folder of rows. If it fails, it leaves no folder behind.

    Args:
      config: what to read, and how to turn it into rows.
      output: the folder to write, which must be empty or not exist.
      progress: called with the counts so far, about once per megabyte of text.

    Returns:
      The manifest of the folder.

    Raises:
      InputError: a source, tokenizer or output folder that cannot be used, or no rows to train on or to hold out.
    """
    check_free(output)
    corpus.expand(config.sources)  # reports a mistyped path before anything is loaded
    named = load_tokenizer(config.tokenizer) if config.tokenizer else None
    config = _resolved(config)
    with whole_folder(output) as folder:
        return _write_folder(config, named, folder, progress)


def _resolved(config: PrepareConfig) -> PrepareConfig:
    """The config with the length of the rows and the share that is held out, known before anything is written."""
    if config.sequence_length is None:
        positions = model_positions(config.tokenizer) if config.tokenizer else None
        config = replace(config, sequence_length=min(_LONGEST_ROW, positions or _LONGEST_ROW))
    if not config.held_out:
        return config
    counts: Counter[str] = Counter()
    share = corpus.held_out_share(
        _read(config, counts),
        config.held_out,
        length=_CHARACTERS * config.min_tokens,
        join=config.sequence == "document",
    )
    _check_text(counts)
    if share is None:
        raise InputError(
            "The text is only one document, which cannot be both trained on and held out: choose smaller documents "
            "(--document line), add other text, or hold out none (--held-out 0)."
        )
    return replace(config, held_out=share)


def _write_folder(
    config: PrepareConfig, named: PreTrainedTokenizerBase | None, folder: Path, progress: Progress
) -> Manifest:
    tokenizer = _tokenizer(config, named, folder / "tokenizer")
    vocab_size = vocabulary_size(tokenizer)
    counts: Counter[str] = Counter()
    writers, packers = {}, {}
    for split in SPLITS:
        writers[split] = RowWriter(folder / split, config.sequence_length, vocab_size, tokenizer.pad_token_id)
        packers[split] = Packer(config.sequence_length, config.min_tokens)
    for split, sequence in _sequences(config, tokenizer, counts, progress):
        for row in packers[split].add(sequence):
            writers[split].write(row)
    for split in SPLITS:
        for row in packers[split].close():
            writers[split].write(row)
    _check_rows(config, writers["train"].rows, writers["held_out"].rows, counts)
    files = [file for split in SPLITS for file in writers[split].close()]
    np.save(folder / "token_counts.npy", writers["train"].token_counts)
    other_paths = (folder / "token_counts.npy", *sorted((folder / "tokenizer").iterdir()))
    files += [_stored_file(folder, path) for path in other_paths]
    unused = [token_id for token, token_id in tokenizer.get_vocab().items() if re.fullmatch(r"\[unused\d+\]", token)]
    manifest = Manifest(
        format=FORMAT,
        sequence_length=config.sequence_length,
        vocab_size=vocab_size,
        pad_id=tokenizer.pad_token_id,
        cls_id=tokenizer.cls_token_id,
        sep_id=tokenizer.sep_token_id,
        mask_id=tokenizer.mask_token_id,
        unk_id=tokenizer.unk_token_id,
        special_ids=special_ids(tokenizer),
        unused_ids=tuple(sorted(unused)),
        tokenizer_fingerprint=identity(tokenizer),
        train=writers["train"].counts(),
        held_out=writers["held_out"].counts(),
        files=tuple(files),
        counts=dict(counts),
        settings=to_dict(config),
    )
    (folder / "manifest.json").write_text(json.dumps(dataclasses.asdict(manifest), indent=1) + "\n", encoding="utf-8")
    return manifest


def _tokenizer(config: PrepareConfig, named: PreTrainedTokenizerBase | None, folder: Path) -> PreTrainedTokenizerBase:
    """Saves the tokenizer that the config names in `folder`; None: trains one there."""
    if named is None:
        train_tokenizer(_TrainingText(config), config.train_vocabulary, folder, max_length=config.sequence_length)
        return load_tokenizer(folder)
    source = Path(config.tokenizer)
    if source.is_dir():
        folder.mkdir()
        copy_tokenizer(source, folder)
    else:  # a hub id
        named.save_pretrained(folder)
    saved = load_tokenizer(folder)
    require(
        identity(saved) == identity(named),
        f"A copy of the tokenizer {source} gives other ids than the original, which seems to depend on other files: "
        "save it with its `save_pretrained` first.",
    )
    return saved


@dataclass(frozen=True)
class _TrainingText:
    """The lines of the documents that are not held out. It can be iterated several times."""

    config: PrepareConfig

    def __iter__(self) -> Iterator[str]:
        pieces = _read(self.config, Counter())
        return (piece.text for piece in pieces if not corpus.is_held_out(piece.key, self.config.held_out))


def _read(config: PrepareConfig, counts: Counter[str]) -> Iterator[corpus.Piece]:
    return corpus.read(config.sources, document=config.document, text_field=config.text_field, counts=counts)


def _sequences(
    config: PrepareConfig, tokenizer: PreTrainedTokenizerBase, counts: Counter[str], progress: Progress
) -> Iterator[tuple[Split, Ids]]:
    """The sequences that are not dropped, as ids of `[CLS] ... [SEP]`, each with its split."""

    def encoded() -> Iterator[tuple[corpus.Piece, Ids]]:
        for batch in encode_pieces(tokenizer, _read(config, counts)):
            for piece, _ in batch:
                counts["held_out_documents"] += piece.starts_document and corpus.is_held_out(piece.key, config.held_out)
            yield from batch
            progress(counts)

    unknown = tokenizer.unk_token_id
    for key, ids in chunks(encoded(), config.sequence_length - 2, join=config.sequence == "document", counts=counts):
        sequence = [tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]
        if len(sequence) < config.min_tokens:
            counts["dropped_short"] += 1
        elif sequence.count(unknown) >= config.max_unknown * len(sequence):
            counts["dropped_unknown"] += 1
        else:
            counts["sequences"] += 1
            counts["tokens"] += len(sequence)
            yield "held_out" if corpus.is_held_out(key, config.held_out) else "train", sequence


def chunks(
    encoded: Iterable[tuple[corpus.Piece, Ids]], room: int, *, join: bool, counts: Counter[str]
) -> Iterator[tuple[bytes, Ids]]:
    """Splits tokenised text into sequences of at most `room` tokens.

    Args:
      encoded: lines with their ids, without [CLS] and [SEP].
      room: tokens of a row, without [CLS] and [SEP].
      join: whether the lines of a document are joined; otherwise every line starts a new sequence.
      counts: `cut_sequences`, those that are too long and are split, is incremented here.

    Yields:
      The key of the document, and the ids of a sequence.
    """
    key, pending, is_cut = b"", [], False
    for piece, ids in encoded:
        if piece.starts_document or not join:
            if pending:
                yield key, pending
            key, pending, is_cut = piece.key, [], False
        pending += ids
        if len(pending) > room:
            counts["cut_sequences"] += not is_cut
            is_cut = True
            end = len(pending) // room * room
            for start in range(0, end, room):
                yield key, pending[start : start + room]
            pending = pending[end:]
    if pending:
        yield key, pending


def _check_text(counts: Counter[str]) -> None:
    """Raises `InputError` if no document was read."""
    if not counts["documents"]:
        raise InputError(f"The sources contain no text ({counts['invalid_lines']} lines are not UTF-8): name others.")


def _check_rows(config: PrepareConfig, train_rows: int, held_out_rows: int, counts: Counter[str]) -> None:
    """Raises `InputError` if a split that should have rows has none."""
    _check_text(counts)
    if not train_rows:
        raise InputError(
            f"No sequence is left to train on: of {counts['documents']} documents, {counts['dropped_short']} sequences "
            f"are shorter than {config.min_tokens} tokens, {counts['dropped_unknown']} have {config.max_unknown:.0%} "
            f"unknown words or more, {counts['sequences']} are held out, and {counts['invalid_lines']} lines are not "
            f"UTF-8: {_advice(config, counts)}."
        )
    if config.held_out and not held_out_rows:
        raise InputError(
            f"No sequence is held out: {counts['held_out_documents']} of {counts['documents']} documents were to "
            "be, but all of their sequences were dropped, so raise --held-out, lower --min-tokens, or hold out none "
            "(--held-out 0)."
        )


def _advice(config: PrepareConfig, counts: Counter[str]) -> str:
    """What to do if no sequence is left to train on, depending on the most frequent cause."""
    causes = ("dropped_short", "dropped_unknown", "sequences", "invalid_lines")
    main_cause = max(causes, key=counts.__getitem__)
    join = "join the lines of a document (--sequence document), or " if config.sequence == "line" else ""
    return {
        "dropped_short": f"{join}lower --min-tokens",
        "dropped_unknown": "use a tokenizer for the language of the text, or check that it is text",
        "sequences": "add more text, lower --held-out, or choose smaller documents (--document line)",
        "invalid_lines": "convert the text to UTF-8",
    }[main_cause]


def _stored_file(folder: Path, path: Path) -> StoredFile:
    data = path.read_bytes()
    return StoredFile(path.relative_to(folder).as_posix(), len(data), 0, hashlib.sha256(data).hexdigest())
