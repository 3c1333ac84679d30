"""Tokenizers: load one, train one, tell whether two are the same, and encode."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distil_jax.data.corpus import Piece
from distil_jax.files import has_tokenizer, tokenizer_files
from distil_jax.schema import InputError, require

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
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
        _check_json(folder / "tokenizer.json")
    elif folder.is_dir() and not has_tokenizer(folder):
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
    # A vocabulary that was not found, or is empty lines, loads as special tokens alone, and every word is unknown.
    special = {*special_ids(tokenizer)}
    if all(number in special for token, number in tokenizer.get_vocab().items() if token):
        raise InputError(f"The tokenizer {path} knows special tokens only: its vocabulary is missing.")
    return tokenizer


def _check_json(path: Path) -> None:
    """Says clearly what is wrong with a damaged tokenizer.json."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values["model"]["vocab"], dict | list) or not isinstance(values["added_tokens"], list):
            raise TypeError("no list of tokens")
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is not a tokenizer file ({error!r}): copy it again.") from error


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id that a text can get.

    A token that stands twice in vocab.txt has the later id, and then `len(tokenizer)` is less.
    """
    # A blank line in vocab.txt is a token that no text holds.
    return 1 + max(number for token, number in tokenizer.get_vocab().items() if token)


def check_fits(tokenizer: PreTrainedTokenizerBase, path: str | Path, vocab_size: int) -> None:
    """Refuses the tokenizer of `path` where it has ids for which a model of `vocab_size` tokens has no row."""
    size = vocabulary_size(tokenizer)
    require(
        size <= vocab_size,
        f"The tokenizer in {path} has {size:,} tokens, but the model knows {vocab_size:,}: "
        "resize the model's embedding, or take the tokenizer that belongs to it.",
    )


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that are not words: [CLS] and the like, and added tokens marked as special, such as [E1]."""
    added = (number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
    return tuple(sorted({*tokenizer.all_special_ids, *added}))


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
    """The `identity` of the tokenizer in a folder, as `transformers` loads it from whatever files there are.

    Raises:
      InputError: see `load_tokenizer`.
    """
    return identity(load_tokenizer(folder))


def identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of what decides which ids a text gets.

    Truncation and padding are left out. What a plain BERT tokenizer does alike everywhere is left out too, so that
    the fingerprints of rows prepared by earlier versions stay what they were.
    """
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    deciding = {name: values[name] for name in ("normalizer", "pre_tokenizer")}
    deciding["model"] = {key: value for key, value in values["model"].items() if key != "type"}
    deciding["added_tokens"] = sorted((token["id"], token["content"]) for token in values["added_tokens"])
    matched = {token["content"]: _matched(token) for token in values["added_tokens"]}
    backend = _backend(tokenizer)
    around = (backend.encode(""), backend.encode("", ""))
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    behaviour = {
        "matched": {token: how for token, how in matched.items() if how},
        "around": [(encoding.ids, encoding.type_ids) for encoding in around],
        "built_with": _built_with(tokenizer),
        "split_special_tokens": tokenizer.split_special_tokens,
    }
    plain = {
        "matched": {},
        "around": [([cls, sep], [0, 0]), ([cls, sep, sep], [0, 0, 1])],
        "built_with": (*SPECIAL_TOKENS, None, None),
        "split_special_tokens": False,
    }
    deciding |= {name: value for name, value in behaviour.items() if value != plain[name]}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def _matched(token: dict[str, Any]) -> list[str]:
    """How an added token is matched in a text, if not in the usual way."""
    flags = [name for name in ("single_word", "lstrip", "rstrip") if token[name]]
    return flags if token["normalized"] != token["special"] else [*flags, f"normalized {token['normalized']}"]


def _built_with(tokenizer: PreTrainedTokenizerBase) -> tuple[str | None, ...]:
    """The tokens that rows are built with, in the order of `SPECIAL_TOKENS`; the last two are those of RoBERTa."""
    bert = (tokenizer.pad_token, tokenizer.unk_token, tokenizer.cls_token, tokenizer.sep_token, tokenizer.mask_token)
    return (*bert, tokenizer.bos_token, tokenizer.eos_token)


def same_tokenizer(first: Path, second: Path) -> bool:
    """Whether two folders give every text the same ids, as `transformers` loads their tokenizers.

    Raises:
      InputError: see `load_tokenizer`.
    """
    return _same_files(first, second) or fingerprint(first) == fingerprint(second)


def _same_files(first: Path, second: Path) -> bool:
    """A quick check without loading, which takes seconds: equal files that name the tokenizer's class."""
    files, others = ({file.name: file.read_bytes() for file in tokenizer_files(folder)} for folder in (first, second))
    named = re.search(rb'"tokenizer_class"\s*:\s*"', files.get("tokenizer_config.json", b""))
    return named is not None and files == others


def encode(tokenizer: PreTrainedTokenizerBase, pieces: Iterable[Piece]) -> Iterator[list[tuple[Piece, list[int]]]]:
    """Batches of pieces with their ids, without [CLS] and [SEP]; in bounded memory."""
    # The Rust tokenizer spreads a batch over all cores by itself; `datasets.map` would add processes, copies and a
    # cache for a tenth more speed. `encode_batch_fast` leaves out offsets, which nobody needs here.
    backend = _backend(tokenizer)
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
    """Encodes texts, pairs of texts, or lists of words; "[SEP]" in a text is plain characters.

    Args:
      texts: in memory.
      max_length: with special tokens, the longer one of two texts cut first; None: uncut, and without special tokens.
      words: each text is a list of words.
    """
    backend = _backend(tokenizer)
    if max_length is not None:
        backend.enable_truncation(max_length, strategy="longest_first", direction=tokenizer.truncation_side)
    whole = max_length is not None
    # The fast one leaves out offsets, which words and uncut texts are asked for.
    encode = backend.encode_batch_fast if whole and not words else backend.encode_batch
    for start in range(0, len(texts), _TOGETHER):
        some = texts[start : start + _TOGETHER]
        yield from encode(some, is_pretokenized=words, add_special_tokens=whole)


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Reads texts as `tokenizer` does, uncut and unpadded, but no text can name a token that rows are built with.

    Text that says "[SEP]" means those characters, or anyone could forge the end of a text. Every other added token is
    one token wherever it stands, whether it is marked special ([E1]) or not.
    """
    from tokenizers import Tokenizer

    backend, spelt = tokenizer.backend_tokenizer, {*_built_with(tokenizer)}
    added = tokenizer.added_tokens_decoder.values()
    if tokenizer.split_special_tokens:
        spelt |= {token.content for token in added if token.special}
    if any(token.special != (token.content in spelt) for token in added):
        # The library has one switch for all tokens that are marked special, so no others may be.
        values = json.loads(backend.to_str())
        for token in values["added_tokens"]:
            token["special"] = token["content"] in spelt
        backend = Tokenizer.from_str(json.dumps(values))
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def id_type(tokenizer: PreTrainedTokenizerBase) -> type[np.unsignedinteger]:
    """The smallest type that holds the vocabulary."""
    return np.uint16 if vocabulary_size(tokenizer) <= 1 << 16 else np.uint32


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
