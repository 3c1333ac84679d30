"""Tokenizers: load one, train one, tell whether two are the same, and encode."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distil_jax.data.corpus import Piece
from distil_jax.schema import InputError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BATCH_CHARACTERS = 1 << 20  # tokenised at a time
_TOGETHER = 1000  # texts of a task tokenised at a time
# What `transformers` raises for hub ids that cannot be reached (OSError, ValueError), for tokenizers that want another
# package, and for damaged files (the rest).
_UNREADABLE = (OSError, ValueError, ImportError, TypeError, AttributeError, LookupError, RecursionError)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The fast tokenizer in a folder, or of a hub id.

    Raises:
      InputError: no such folder or hub id, no tokenizer there, or one that lacks a token that masking needs.
    """
    from transformers import AutoTokenizer

    folder = Path(path)
    if (folder / "tokenizer.json").is_file():
        fingerprint(folder)  # says clearly what is wrong with a damaged file
    elif folder.is_dir() and not (folder / "vocab.txt").is_file():
        raise InputError(f"{path} holds no tokenizer: it needs tokenizer.json or vocab.txt.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)  # None would ask, and wait
    except Exception as error:
        # The parser in Rust raises an Exception of no class of its own.
        if type(error) is not Exception and not isinstance(error, _UNREADABLE):
            raise
        problem = "a damaged tokenizer" if folder.is_dir() else "neither a folder nor a hub id that can be reached"
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise InputError(f"{path} is {problem} ({reason}): name a folder with a tokenizer.") from error
    if not tokenizer.is_fast:
        raise InputError(f"The tokenizer {path} has no fast version: save it with a tokenizer.json first.")
    needed = ("pad", "unk", "cls", "sep", "mask")
    if lacking := [name for name in needed if getattr(tokenizer, f"{name}_token_id") is None]:
        raise InputError(f"The tokenizer {path} lacks the {', '.join(lacking)} token that masked models need.")
    # A vocabulary that was not found loads as special tokens alone, and every word is unknown.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise InputError(f"The tokenizer {path} knows special tokens only: its vocabulary is missing.")
    return tokenizer


def train_tokenizer(lines: Iterable[str], vocab_size: int, folder: str | Path) -> None:
    """Trains an uncased WordPiece vocabulary and writes a folder that `AutoTokenizer` opens as a `BertTokenizer`.

    Args:
      lines: the text; read twice, so no iterator.
      vocab_size: at most this many tokens; little text gives fewer.

    Raises:
      InputError: no text, or a vocabulary too small for its characters.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizer

    def train(size: int, first: list[str]) -> dict[str, int]:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=first, show_progress=False)
        tokenizer.train_from_iterator(lines, trainer)
        return tokenizer.get_vocab()

    # The trainer numbers word-inner characters (##a) in the order of a randomly seeded hash map, and breaks ties by
    # number, so the same text gives another vocabulary each time. A first pass finds the characters (no merges), the
    # second gets them numbered.
    alphabet = sorted(train(0, []), key=lambda token: (token.startswith("##"), token))
    if not alphabet:
        raise InputError("There is no text on the training side to train a vocabulary on: give more text.")
    if len(SPECIAL_TOKENS) + len(alphabet) >= vocab_size:
        raise InputError(
            f"A vocabulary of {vocab_size} is too small for this text: its characters alone take {len(alphabet)}."
        )
    vocabulary = train(vocab_size, [*SPECIAL_TOKENS, *alphabet])
    BertTokenizer(vocab=vocabulary, do_lower_case=True, model_max_length=512).save_pretrained(folder)


def fingerprint(folder: str | Path) -> str:
    """sha256 of what decides which ids a text gets; truncation, padding and templates are left out.

    Raises:
      InputError: no readable tokenizer.json in the folder.
    """
    path = Path(folder) / "tokenizer.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        deciding = {name: values[name] for name in ("normalizer", "pre_tokenizer")}
        deciding["model"] = {key: value for key, value in values["model"].items() if key != "type"}  # old files lack it
        deciding["added_tokens"] = sorted((token["id"], token["content"]) for token in values["added_tokens"])
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is not a tokenizer file ({error!r}): copy it again.") from error
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def encode(tokenizer: PreTrainedTokenizerBase, pieces: Iterable[Piece]) -> Iterator[list[tuple[Piece, list[int]]]]:
    """Batches of pieces with their ids, without [CLS] and [SEP]; in bounded memory."""
    # The Rust tokenizer spreads a batch over all cores by itself; `datasets.map` would add processes, copies and a
    # cache for a tenth more speed. `encode_batch_fast` leaves out offsets, which nobody needs here.
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # text that says "[SEP]" means those characters
    for batch in _batched(pieces):
        encodings = backend.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
        yield [(piece, encoding.ids) for piece, encoding in zip(batch, encodings, strict=True)]


def encodings(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str | tuple[str, ...]],
    *,
    max_length: int | None = None,
    words: bool = False,
) -> Iterator[Encoding]:
    """Encodes texts, pairs of texts, or lists of words; text that says "[SEP]" means those characters.

    Args:
      texts: in memory.
      max_length: with special tokens, the longer one of two texts cut first; None: uncut, and without special tokens.
      words: each text is a list of words.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    if max_length is not None:
        backend.enable_truncation(max_length, strategy="longest_first", direction=tokenizer.truncation_side)
    backend.no_padding()
    backend.encode_special_tokens = True
    whole = max_length is not None
    # The fast one leaves out offsets, which words and uncut texts are asked for.
    encode = backend.encode_batch_fast if whole and not words else backend.encode_batch
    for start in range(0, len(texts), _TOGETHER):
        some = texts[start : start + _TOGETHER]
        yield from encode(some, is_pretokenized=words, add_special_tokens=whole)


def id_array(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> np.ndarray:
    """[T] token ids in the smallest type that holds the vocabulary."""
    return np.array(ids, np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)


def _batched(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch, characters = [], 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text) + 64  # a short line costs memory too
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
