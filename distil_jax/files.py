"""Writes files and folders so that they appear complete or not at all, and lists the files of a tokenizer.

Everything is written under a hidden name, as a draft, and renamed when it is complete.
"""

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

_UNFINISHED = ".unfinished-"  # in a draft folder's name, between the final name and a random suffix
# Vocabulary files: any fast tokenizer's, WordPiece's, byte-level BPE's, and SentencePiece's under its many names.
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
# Patterns of every file that `transformers` reads or writes as part of an encoder's tokenizer.
TOKENIZER_FILES = (
    *_VOCABULARIES,
    "tokenizer.*.json",  # for one version of `transformers`; tokenizer_config.json names it
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "bpe.codes",
    "dict.txt",
    "chat_template.jinja",
)
# What to remove if the process is interrupted: path -> the parent folders that were made for it.
_removed_on_exit: dict[Path, list[Path]] = {}
# Held while a draft is made or renamed. An interrupted process takes it and never releases it, so that no draft is
# renamed while it is being removed.
replacing = threading.Lock()


def check_free(folder: str | Path) -> None:
    """Raises `InputError` if `folder` exists, unless it is an empty folder."""
    folder = user_path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not an empty folder: choose another one, or remove it first.")


def write_whole(path: Path, text: str) -> None:
    """Writes a text file through a draft, so that an older file of that name stays until the new one is complete."""
    with whole_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields the path of a draft, which becomes `path` after the block, or is removed if the block raises."""
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
    """The folder and those of its parents that do not exist yet, innermost first."""
    return list(itertools.takewhile(lambda parent: not parent.exists(), (folder, *folder.parents)))


def remove_on_exit(made: list[Path]) -> None:
    """Removes paths if the process is interrupted before `keep`.

    Args:
      made: a file or folder, then its parents that were made for it, which are removed only if they are empty.
    """
    if made:
        _removed_on_exit[made[0]] = made[1:]


def keep(path: Path) -> None:
    """Undoes `remove_on_exit` for a path."""
    _removed_on_exit.pop(path, None)


def remove_unfinished() -> None:
    """Removes what was registered with `remove_on_exit`; call it when the process is about to end.

    Other threads may still be writing. Afterwards no draft can be made or renamed. If another thread holds the lock for
    5 s, as when its disk does not answer, nothing is removed; the next `whole_folder` of that name removes the draft.
    """
    if replacing.acquire(timeout=5):
        for path in list(_removed_on_exit):
            for _ in range(50):  # another thread may still be adding files to it
                shutil.rmtree(path, ignore_errors=True)
                if not path.is_dir():
                    break
                time.sleep(0.02)
            _remove(path)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a vocabulary file; without one, no tokenizer can be loaded."""
    return any((folder / name).is_file() for name in _VOCABULARIES)


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer files of a folder, sorted by name.

    Raises:
      InputError: there is no tokenizer.
    """
    if not has_tokenizer(folder):
        raise InputError(f"{folder} holds no tokenizer: give a folder with tokenizer.json or vocab.txt.")
    return sorted({path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()})


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the files of a tokenizer into an existing folder, and removes those of another tokenizer there.

    Some of the old files would be read together with the new ones. config.json is copied too, because it may name the
    tokenizer's class.

    Raises:
      InputError: `source` has no tokenizer.
    """
    files = {file.name: file for file in (*tokenizer_files(source), source / "config.json") if file.is_file()}
    for name, file in files.items():
        shutil.copyfile(file, target / name)
    for file in tokenizer_files(target):
        if file.name not in files:
            file.unlink()


def unfinished(folder: Path) -> list[Path]:
    """The drafts of this folder that `whole_folder` made, in processes that are running or were killed."""
    return list(folder.parent.glob(f".{glob.escape(folder.name)}{_UNFINISHED}*"))


@contextlib.contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """Yields a draft folder, which becomes `folder` after the block, or is removed if the block raises.

    Drafts that killed processes left are removed too. A running process holds a lock on its draft, so that others leave
    it alone.

    Args:
      folder: must not exist, or be empty.

    Raises:
      InputError: `folder` exists and is not empty, or cannot be written.
    """
    folder = user_path(folder).absolute()
    check_free(folder)
    for left in unfinished(folder):
        # It may be in use, another user's, or on a file system without locks: then it stays.
        with contextlib.suppress(OSError), _locked(left):
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
            with contextlib.suppress(OSError):  # on a file system without locks, no other process removes it either
                held.enter_context(_locked(draft))
            yield draft
            with replacing:
                draft.replace(folder)
    finally:
        _remove(draft)


def _remove(draft: Path) -> None:
    """Removes a file or folder if it exists, and the parents that were made for it if they are empty."""
    if draft.is_dir():
        shutil.rmtree(draft, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            draft.unlink()
    for folder in _removed_on_exit.pop(draft, []):
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a lock on a folder; the system releases it however the process ends.

    Raises:
      OSError: another process holds it, or it cannot be taken.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
