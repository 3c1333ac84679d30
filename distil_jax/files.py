"""Files and folders that appear whole or not at all, however the process ends; and which files make a tokenizer."""

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

_UNFINISHED = ".unfinished-"  # between a folder's name and a random suffix
# The vocabulary files: of any fast tokenizer; of WordPiece; of byte-level BPE; of SentencePiece, under its many names.
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
    "tokenizer.*.json",  # for a certain version of `transformers`, named in tokenizer_config.json
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "bpe.codes",
    "dict.txt",
    "chat_template.jinja",
)
_unkept: dict[Path, list[Path]] = {}  # path to remove if the process is interrupted -> folders made to hold it
# Held while a draft is begun or renamed into place, and for ever once the process is being interrupted, so that nothing
# is renamed while it is being removed.
replacing = threading.Lock()


def check_free(folder: str | Path) -> None:
    """Raises `InputError` unless `folder` is missing or an empty folder."""
    folder = user_path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not an empty folder: choose another one, or remove it first.")


def write_whole(path: Path, text: str) -> None:
    """Writes a text file and renames it into place, so that an older one stays until then."""
    with whole_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a draft beside `path`, which is renamed into place after the block, or removed if the block raises."""
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
    """The folder and its parents, as far as they do not exist yet."""
    return list(itertools.takewhile(lambda each: not each.exists(), (folder, *folder.parents)))


def remove_on_exit(made: list[Path]) -> None:
    """If the process is interrupted before `keep`, the first of these is removed, and the others if they are empty."""
    if made:
        _unkept[made[0]] = made[1:]


def keep(path: Path) -> None:
    """Undoes `remove_on_exit`: the path stays, whatever happens."""
    _unkept.pop(path, None)


def remove_unfinished() -> None:
    """Removes unfinished files when the process is about to end, while other threads may still write them.

    From here on nothing is begun or renamed into place. If a disk does not answer, everything stays, and the next
    attempt removes it.
    """
    if replacing.acquire(timeout=5):
        for path in list(_unkept):
            for _ in range(50):  # another thread may still put files into it
                shutil.rmtree(path, ignore_errors=True)
                if not path.is_dir():
                    break
                time.sleep(0.02)
            _remove(path)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a vocabulary file, without which no tokenizer can be loaded."""
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
    """Copies a tokenizer and config.json, which may name its class, into an existing folder.

    Files of another tokenizer in the target are removed: some would be read together with the new ones.

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
    """Drafts of this folder by `whole_folder`, of processes that are running or were killed."""
    return list(folder.parent.glob(f".{glob.escape(folder.name)}{_UNFINISHED}*"))


@contextlib.contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """Yields a draft folder, which is renamed into place after the block, or removed if the block raises.

    Drafts of killed processes are removed too; a running process holds a lock on its own.

    Args:
      folder: must not exist, or be empty.

    Raises:
      InputError: `folder` is not free, or nothing can be written there.
    """
    folder = user_path(folder).absolute()
    check_free(folder)
    for left in unfinished(folder):
        with (
            contextlib.suppress(OSError),
            _locked(left),
        ):  # in use, on a file system without locks, or not ours to remove
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
            with contextlib.suppress(OSError):  # without locks, no other process removes it either
                held.enter_context(_locked(draft))
            yield draft
            with replacing:
                draft.replace(folder)
    finally:
        _remove(draft)


def _remove(draft: Path) -> None:
    """Removes a file or folder, if it exists, and the folders made to hold it, if they are empty."""
    if draft.is_dir():
        shutil.rmtree(draft, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            draft.unlink()
    for folder in _unkept.pop(draft, []):
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a lock, which the system releases when the process ends, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
