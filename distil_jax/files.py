"""Files and folders that appear whole or not at all, whatever ends the process that writes them."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from distil_jax.schema import InputError, place

_UNFINISHED = ".unfinished-"  # between the name of a folder and a random end


def check_free(folder: str | Path) -> None:
    """Raises `InputError` where there is something that is not an empty folder."""
    folder = place(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not an empty folder: choose another one, or remove it first.")


def write_whole(path: Path, text: str) -> None:
    """Writes a text file in one step: until then, what it replaces stays."""
    draft = path.with_name(f".{path.name}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


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
    folder = place(folder).absolute()
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
