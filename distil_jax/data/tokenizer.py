"""Loads, trains and compares tokenizers, and encodes text with them."""

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
BATCH_CHARACTERS = 1 << 20  # characters of text that are tokenised at a time
_BATCH_TEXTS = 1000  # texts of a task that are tokenised at a time
# What `transformers` raises for hub ids that cannot be reached (OSError, ValueError), for tokenizers that need another
# package (ImportError), and for damaged files (the others).
_UNREADABLE = (OSError, ValueError, ImportError, TypeError, AttributeError, LookupError, RecursionError)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Loads the fast tokenizer of a folder or a hub id.

    Raises:
      InputError: there is no such folder or hub id, it has no tokenizer, or the tokenizer is damaged, has no fast
        version, or lacks a special token that masked models need.
    """
    from transformers import AutoTokenizer

    folder = Path(path)
    if (folder / "tokenizer.json").is_file():
        _check_json(folder / "tokenizer.json")
    elif folder.is_dir() and not has_tokenizer(folder):
        raise InputError(f"{path} holds no tokenizer: it needs tokenizer.json or vocab.txt.")
    try:
        # trust_remote_code=None, the default, would ask the user and wait for an answer.
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:
        # The parser of tokenizer.json, written in Rust, raises plain `Exception`.
        if type(error) is not Exception and not isinstance(error, _UNREADABLE):
            raise
        problem = "a damaged tokenizer" if folder.is_dir() else "neither a folder nor a hub id that can be reached"
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise InputError(f"{path} is {problem} ({reason}): name a folder with a tokenizer.") from error
    if not tokenizer.is_fast:
        raise InputError(f"The tokenizer {path} has no fast version: save it with a tokenizer.json first.")
    needed = ("pad", "unk", "cls", "sep", "mask")
    lacking = [name for name in needed if getattr(tokenizer, f"{name}_token_id") is None]
    require(not lacking, f"The tokenizer {path} lacks the {', '.join(lacking)} token that masked models need.")
    # If the vocabulary file is missing or has only blank lines, the tokenizer loads with special tokens alone.
    special = {*special_ids(tokenizer)}
    has_words = any(token_id not in special for token, token_id in tokenizer.get_vocab().items() if token)
    require(has_words, f"The tokenizer {path} has only special tokens: its vocabulary is missing.")
    return tokenizer


def _check_json(path: Path) -> None:
    """Raises `InputError` for a damaged tokenizer.json, with a clearer message than that of `transformers`."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values["model"]["vocab"], dict | list) or not isinstance(values["added_tokens"], list):
            raise TypeError("no list of tokens")
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is not a tokenizer file ({error!r}): copy it again.") from error


def model_positions(path: str | Path) -> int | None:
    """The most tokens that the model takes whose tokenizer this is, by the config.json in its folder or on the hub.

    Returns:
      None if there is no config.json, or it does not say so.

    Raises:
      InputError: the config.json of a folder is damaged.
    """
    from transformers import PretrainedConfig

    try:
        values, _ = PretrainedConfig.get_config_dict(str(path))
    except OSError as error:
        file = Path(path) / "config.json"
        require(not file.exists(), f"{file} cannot be read ({error}): copy it again, or remove it.")
        return None
    positions = values.get("max_position_embeddings") if isinstance(values, dict) else None
    return positions if isinstance(positions, int) and positions > 0 else None


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id that a text can be given.

    This may be more than `len(tokenizer)`: a token that is in vocab.txt twice has the later id.
    """
    # A blank line in vocab.txt is an empty token, which does not occur in text.
    return 1 + max(token_id for token, token_id in tokenizer.get_vocab().items() if token)


def check_fits(tokenizer: PreTrainedTokenizerBase, path: str | Path, vocab_size: int) -> None:
    """Checks that a model's embedding has a row for every id of its tokenizer.

    Args:
      tokenizer: the tokenizer.
      path: its folder, for the message.
      vocab_size: rows of the embedding, without padding.

    Raises:
      InputError: the tokenizer has larger ids.
    """
    size = vocabulary_size(tokenizer)
    require(
        size <= vocab_size,
        f"The tokenizer in {path} has {size:,} tokens, but the model has {vocab_size:,}: "
        "resize the model's embedding, or use the tokenizer that belongs to it.",
    )


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that are not words, sorted: [CLS] and so on, and added tokens marked as special, such as [E1]."""
    added = (token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special)
    return tuple(sorted({*tokenizer.all_special_ids, *added}))


def train_tokenizer(lines: Iterable[str], vocab_size: int, folder: str | Path, *, max_length: int = 512) -> None:
    """Trains an uncased WordPiece vocabulary, and writes a folder that `AutoTokenizer` loads as a `BertTokenizer`.

    Args:
      lines: the text. It is iterated twice, so it cannot be an iterator.
      vocab_size: the most tokens; a small text gives fewer.
      folder: the folder to write.
      max_length: tokens to which the tokenizer truncates a text, if it is asked to truncate.

    Raises:
      InputError: there is no text, or the vocabulary is too small for its characters.
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

    # The trainer gives ids to the characters inside words (##a) in the order of a randomly seeded hash map, and breaks
    # ties by id, so the same text would give another vocabulary each time. Therefore a first pass, without merges,
    # collects the characters, and the second pass is given them in a fixed order.
    alphabet = sorted(train(0, []), key=lambda token: (token.startswith("##"), token))
    if not alphabet:
        raise InputError("There is no text to train a vocabulary on, apart from what is held out: add more text.")
    if len(SPECIAL_TOKENS) + len(alphabet) >= vocab_size:
        raise InputError(
            f"A vocabulary of {vocab_size} is too small for this text: its characters alone take {len(alphabet)}."
        )
    vocabulary = train(vocab_size, [*SPECIAL_TOKENS, *alphabet])
    BertTokenizer(vocab=vocabulary, do_lower_case=True, model_max_length=max_length).save_pretrained(folder)


def fingerprint(folder: str | Path) -> str:
    """The `identity` of the tokenizer in a folder. It depends on how `transformers` loads it, not on its files.

    Raises:
      InputError: see `load_tokenizer`.
    """
    return identity(load_tokenizer(folder))


def identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of everything that determines which ids a text is given.

    Truncation and padding do not count. Settings that are as in a plain BERT tokenizer are left out, so that the
    fingerprints of rows that earlier versions prepared stay valid.
    """
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    hashed = {name: values[name] for name in ("normalizer", "pre_tokenizer")}
    hashed["model"] = {key: value for key, value in values["model"].items() if key != "type"}
    hashed["added_tokens"] = sorted((token["id"], token["content"]) for token in values["added_tokens"])
    match_flags = {token["content"]: _match_flags(token) for token in values["added_tokens"]}
    backend = _backend(tokenizer)
    empty_encodings = (backend.encode(""), backend.encode("", ""))
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    # The keys are part of what is hashed.
    settings = {
        "matched": {token: flags for token, flags in match_flags.items() if flags},
        "around": [(encoding.ids, encoding.type_ids) for encoding in empty_encodings],
        "built_with": _template_tokens(tokenizer),
        "split_special_tokens": tokenizer.split_special_tokens,
    }
    plain_bert = {
        "matched": {},
        "around": [([cls, sep], [0, 0]), ([cls, sep, sep], [0, 0, 1])],
        "built_with": (*SPECIAL_TOKENS, None, None),
        "split_special_tokens": False,
    }
    hashed |= {name: value for name, value in settings.items() if value != plain_bert[name]}
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()


def _match_flags(token: dict[str, Any]) -> list[str]:
    """The flags by which an added token is matched in text, without those that have their default."""
    flags = [name for name in ("single_word", "lstrip", "rstrip") if token[name]]
    return flags if token["normalized"] != token["special"] else [*flags, f"normalized {token['normalized']}"]


def _template_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str | None, ...]:
    """The tokens that rows are built with, in the order of `SPECIAL_TOKENS`, and then the two of RoBERTa."""
    bert = (tokenizer.pad_token, tokenizer.unk_token, tokenizer.cls_token, tokenizer.sep_token, tokenizer.mask_token)
    return (*bert, tokenizer.bos_token, tokenizer.eos_token)


def same_tokenizer(first: Path, second: Path) -> bool:
    """Whether two folders give every text the same ids, as `transformers` loads their tokenizers.

    Raises:
      InputError: see `load_tokenizer`.
    """
    return _same_files(first, second) or fingerprint(first) == fingerprint(second)


def _same_files(first: Path, second: Path) -> bool:
    """Whether two folders have the same files, which name the tokenizer's class.

    If they do not name it, the class depends on other files. This check is quick, while loading takes seconds.
    """
    files, others = ({file.name: file.read_bytes() for file in tokenizer_files(folder)} for folder in (first, second))
    names_class = re.search(rb'"tokenizer_class"\s*:\s*"', files.get("tokenizer_config.json", b"")) is not None
    return names_class and files == others


def encode_pieces(
    tokenizer: PreTrainedTokenizerBase, pieces: Iterable[Piece]
) -> Iterator[list[tuple[Piece, list[int]]]]:
    """Yields batches of pieces with their ids, without [CLS] and [SEP], in bounded memory."""
    # The Rust tokenizer uses all cores for a batch. `datasets.map` would add processes, copies and a cache, and be only
    # a tenth faster. `encode_batch_fast` does not compute offsets, which are not needed here.
    backend = _backend(tokenizer)
    for batch in _batched(pieces):
        encodings = backend.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
        yield [(piece, encoding.ids) for piece, encoding in zip(batch, encodings, strict=True)]


def encode_texts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str | tuple[str, ...]],
    *,
    max_length: int | None = None,
    words: bool = False,
) -> Iterator[Encoding]:
    """Encodes texts, pairs of texts, or lists of words. "[SEP]" in a text is encoded as ordinary characters.

    Args:
      tokenizer: a fast one.
      texts: all of them, in memory.
      max_length: truncate to this many tokens, the longer one of two texts first, and add the special tokens. None:
        neither truncate nor add special tokens.
      words: whether each text is a list of words.

    Yields:
      An encoding per text. It has offsets only for words and with `max_length=None`.
    """
    backend = _backend(tokenizer)
    truncate = max_length is not None
    if truncate:
        backend.enable_truncation(max_length, strategy="longest_first", direction=tokenizer.truncation_side)
    # `encode_batch_fast` does not compute offsets.
    encode = backend.encode_batch_fast if truncate and not words else backend.encode_batch
    for start in range(0, len(texts), _BATCH_TEXTS):
        batch = texts[start : start + _BATCH_TEXTS]
        yield from encode(batch, is_pretokenized=words, add_special_tokens=truncate)


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The Rust tokenizer, without truncation and padding, which never finds [CLS], [SEP] and so on in text.

    "[SEP]" in a text is encoded as ordinary characters; otherwise a text could contain a forged end of text. Any other
    added token is one token in text, whether it is marked special ([E1]) or not.
    """
    from tokenizers import Tokenizer

    backend, as_characters = tokenizer.backend_tokenizer, {*_template_tokens(tokenizer)}
    added = tokenizer.added_tokens_decoder.values()
    if tokenizer.split_special_tokens:
        as_characters |= {token.content for token in added if token.special}
    if any(token.special != (token.content in as_characters) for token in added):
        # `encode_special_tokens` applies to all tokens that are marked special, so mark these and no others.
        values = json.loads(backend.to_str())
        for token in values["added_tokens"]:
            token["special"] = token["content"] in as_characters
        backend = Tokenizer.from_str(json.dumps(values))
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def id_type(tokenizer: PreTrainedTokenizerBase) -> type[np.unsignedinteger]:
    """The smallest NumPy type that holds every id of the vocabulary."""
    return np.uint16 if vocabulary_size(tokenizer) <= 1 << 16 else np.uint32


def _batched(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Batches of about `BATCH_CHARACTERS` characters."""
    batch, characters = [], 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text) + 64  # each piece needs some memory even if its text is short
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
