"""Files and folders that appear whole or not at all, whatever ends the process; and which files are a tokenizer's."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from distil_jax.schema import InputError

_UNFINISHED = ".unfinished-"  # between the name of a folder and a random end
# What holds the words: any tokenizer's; WordPiece's; byte-level BPE's; SentencePiece's, under the names it goes by.
_VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "spiece.model",
    "spm.model",
    "tokenizer.model",
)
# Every file, as a pattern, that `transformers` reads or writes as a part of a tokenizer of any kind of encoder.
TOKENIZER_FILES = (
    *_VOCABULARIES,
    "tokenizer.*.json",  # for a version of `transformers`, which tokenizer_config.json names
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "bpe.codes",
    "dict.txt",
    "chat_template.jinja",
)


def check_free(folder: str | Path) -> None:
    """Raises `InputError` where there is something that is not an empty folder."""
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not an empty folder: choose another one, or remove it first.")


def write_whole(path: Path, text: str) -> None:
    """Writes a text file in one step: until then, what it replaces stays."""
    draft = path.with_name(f".{path.name}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a vocabulary in a folder, without which nothing of a tokenizer can be loaded."""
    return any((folder / name).is_file() for name in _VOCABULARIES)


def tokenizer_files(folder: Path) -> list[Path]:
    """Those files of a folder that are its tokenizer, in the order of their names.

    Raises:
      InputError: there are none.
    """
    if not has_tokenizer(folder):
        raise InputError(f"{folder} holds no tokenizer: give a folder with tokenizer.json or vocab.txt.")
    return sorted({path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()})


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies a tokenizer, and config.json, from which `transformers` may learn its class, into an existing folder.

    Files of another tokenizer that lay there go: some would be read together with the new ones.

    Raises:
      InputError: there is no tokenizer.
    """
    files = {file.name: file for file in (*tokenizer_files(source), source / "config.json") if file.is_file()}
    for name, file in files.items():
        shutil.copyfile(file, target / name)
    for file in tokenizer_files(target):
        if file.name not in files:
            file.unlink()


def unfinished(folder: Path) -> list[Path]:
    """The folders beside this one in which `whole_folder` is writing it, or was when its process was killed."""
    return list(folder.parent.glob(f".{glob.escape(folder.name)}{_UNFINISHED}*"))


@contextlib.contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """A folder beside this one to write into; it takes its place at the end of the block, and goes where that raises.

    What a killed process left beside it goes too: one that lives holds a lock on its own.

    Args:
      folder: must not exist, or be empty.

    Raises:
      InputError: `folder` is not free, or nothing can be written there.
    """
    folder = Path(folder).absolute()
    check_free(folder)
    for left in unfinished(folder):
        with contextlib.suppress(OSError), _locked(left):  # in use, locks are unknown there, or not ours to remove
            shutil.rmtree(left)
    draft = folder.with_name(f".{folder.name}{_UNFINISHED}{secrets.token_hex(4)}")
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"Cannot write {folder}: {error.strerror}.") from error
    try:
        with contextlib.ExitStack() as held:
            with contextlib.suppress(OSError):  # where locks are unknown, nobody removes it either
                held.enter_context(_locked(draft))
            yield draft
            draft.replace(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a lock that the system lets go when the process ends, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
