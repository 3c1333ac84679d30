"""Files and folders that appear whole or not at all, whatever ends the process; and which files are a tokenizer's."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import itertools
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from distil_jax.schema import InputError, user_path

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
_passing: dict[Path, list[Path]] = {}  # what goes if the process is interrupted, and the folders made to hold it
# Held while something begins or takes its place, and for ever once the process is interrupted: what is being removed
# must not take its place.
replacing = threading.Lock()


def check_free(folder: str | Path) -> None:
    """Raises `InputError` where there is something that is not an empty folder."""
    folder = user_path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not an empty folder: choose another one, or remove it first.")


def write_whole(path: Path, text: str) -> None:
    """Writes a text file in one step: until then, what it replaces stays."""
    with whole_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file beside this one to write; it takes its place at the end of the block, and goes where that raises."""
    draft = path.with_name(f".{path.name}")
    with replacing:
        remove_on_exit([draft])
    try:
        yield draft
        with replacing:
            draft.replace(path)
    finally:
        _remove(draft)


def missing_folders(folder: Path) -> list[Path]:
    """The folder, and those above it, as far as they are not there yet."""
    return list(itertools.takewhile(lambda each: not each.exists(), (folder, *folder.parents)))


def remove_on_exit(made: list[Path]) -> None:
    """Takes note that the first of these goes if the process is interrupted before `keep`, and others where empty."""
    if made:
        _passing[made[0]] = made[1:]


def keep(path: Path) -> None:
    """Takes note that this stays, whatever happens."""
    _passing.pop(path, None)


def remove_unfinished() -> None:
    """For a process that is about to end, in a thread beside those that write: removes what is unfinished.

    Nothing takes its place any more, and nothing new is begun. Where that cannot be had, because a disk does not
    answer, everything stays: the next attempt removes it.
    """
    if replacing.acquire(timeout=5):
        for path in list(_passing):
            for _ in range(50):  # another thread may still put files into it
                shutil.rmtree(path, ignore_errors=True)
                if not path.is_dir():
                    break
                time.sleep(0.02)
            _remove(path)


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
    folder = user_path(folder).absolute()
    check_free(folder)
    for left in unfinished(folder):
        with contextlib.suppress(OSError), _locked(left):  # in use, locks are unknown there, or not ours to remove
            shutil.rmtree(left)
    draft = folder.with_name(f".{folder.name}{_UNFINISHED}{secrets.token_hex(4)}")
    try:
        with replacing:
            remove_on_exit(missing_folders(draft))
            draft.mkdir(parents=True)
    except OSError as error:
        _remove(draft)
        raise InputError(f"Cannot write {folder}: {error.strerror}.") from error
    try:
        with contextlib.ExitStack() as held:
            with contextlib.suppress(OSError):  # where locks are unknown, nobody removes it either
                held.enter_context(_locked(draft))
            yield draft
            with replacing:
                draft.replace(folder)
    finally:
        _remove(draft)


def _remove(draft: Path) -> None:
    """Removes a file or folder, if it is there, and the folders that were made to hold it, if nothing else does."""
    if draft.is_dir():
        shutil.rmtree(draft, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            draft.unlink()
    for folder in _passing.pop(draft, []):
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a lock that the system lets go when the process ends, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
