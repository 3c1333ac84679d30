"""The manifest of a folder of prepared rows: describes its contents, and lets a reader check them."""

from __future__ import annotations

import hashlib
import json
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

from distil_jax.schema import InputError, build, require, short_repr, user_path

FORMAT = 1  # version of the folder's layout; folders of other versions cannot be read
Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class SplitCounts:
    """The size of a split."""

    rows: int
    sequences: int
    tokens: int  # without padding, but with [CLS] and [SEP]

    def __post_init__(self) -> None:
        for name, count in vars(self).items():
            require(count >= 0, f"{name} must not be negative, but is {count}.")


@dataclass(frozen=True)
class StoredFile:
    """A file of the folder, with its size and hash."""

    path: str  # relative to the folder, with forward slashes
    bytes: int
    header: int  # bytes at the start that are not hashed: the header of a .npy file is written last
    sha256: str  # of the remaining bytes

    def __post_init__(self) -> None:
        require(
            0 <= self.header <= self.bytes,
            f"A header of {self.header} bytes is impossible in a file of {self.bytes} bytes.",
        )


@dataclass(frozen=True)
class Manifest:
    """The contents of a folder of rows (`manifest.json`)."""

    format: int
    sequence_length: int
    vocab_size: int  # one more than the largest id of the tokenizer
    pad_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    unk_id: int
    special_ids: tuple[int, ...]  # of all special tokens: those five, and markers such as [E1]
    unused_ids: tuple[int, ...]  # of [unused0] and so on, which do not occur in text
    tokenizer_fingerprint: str  # see `tokenizer.identity`
    train: SplitCounts
    held_out: SplitCounts
    files: tuple[StoredFile, ...]
    counts: dict  # of documents, sequences, tokens, and what was dropped for which reason
    settings: dict  # the PrepareConfig

    def __post_init__(self) -> None:
        require(self.sequence_length > 0, f"sequence_length must be at least 1, not {self.sequence_length}.")
        require(0 < self.vocab_size < 2**31, f"vocab_size must be from 1 to 2**31 - 1, not {self.vocab_size}.")
        ids = (self.pad_id, self.cls_id, self.sep_id, self.mask_id, self.unk_id, *self.special_ids, *self.unused_ids)
        for token_id in ids:
            require(0 <= token_id < self.vocab_size, f"The vocabulary of {self.vocab_size} has no id {token_id}.")
        sources = self.settings.get("sources")
        are_strings = isinstance(sources, list) and all(isinstance(source, str) for source in sources)
        require(are_strings, "settings.sources must be a list of strings.")


def read_manifest(folder: str | Path) -> Manifest:
    """Reads a folder's manifest, and checks that the files are there in the right size. `verify` checks their contents.

    Raises:
      InputError: there is no such folder, the manifest is missing, damaged or of another version, or a file is missing,
        of another size or outside the folder.
    """
    folder = user_path(folder)
    path = folder / "manifest.json"
    again = "copy the folder again, or prepare the rows again"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Cannot read {path} ({error.strerror}): write rows with `distil-jax prepare`.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}): {again}.") from error
    version = values.get("format") if isinstance(values, dict) else None
    if version != FORMAT:
        raise InputError(
            f"{path} has format {short_repr(version)}, but this version of distil-jax reads {FORMAT}: prepare the rows "
            "again."
        )
    try:
        manifest = build(Manifest, values)
    except InputError as error:
        raise InputError(f"{path} is damaged ({error}): {again}.") from error
    _check_files(folder, manifest)
    return manifest


def _check_files(folder: Path, manifest: Manifest) -> None:
    needed = {f"{split}/{name}.npy" for split in SPLITS for name in ("input_ids", "segment_ids")} | {"token_counts.npy"}
    missing = sorted(needed - {file.path for file in manifest.files})
    require(not missing, f"{folder}/manifest.json does not list {', '.join(missing)}: prepare the rows again.")
    for file in manifest.files:
        name = PurePosixPath(file.path)
        if name.is_absolute() or ".." in name.parts or "\\" in file.path or "\0" in file.path:
            raise InputError(f"{folder}/manifest.json lists {file.path!r}, outside the folder: do not use this data.")
        try:
            status = (folder / name).stat()
        except OSError as error:
            raise InputError(f"{folder / name} cannot be read ({error.strerror}): copy the folder again.") from error
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe would block
            raise InputError(f"{folder / name} is not a file: copy the folder again.")
        if status.st_size != file.bytes:
            raise InputError(
                f"{folder / name} has {status.st_size:,} bytes where the manifest says {file.bytes:,}: "
                "copy the folder again."
            )


def verify(folder: str | Path) -> Manifest:
    """Reads every file and compares its sha256 with the manifest's.

    Returns:
      The manifest.

    Raises:
      InputError: as `read_manifest`, or the contents of a file have changed.
    """
    manifest = read_manifest(folder)
    for file in manifest.files:
        path = user_path(folder) / file.path
        try:
            with path.open("rb") as stream:
                stream.seek(file.header)
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}): copy the folder again.") from error
        if digest != file.sha256:
            raise InputError(f"{path} has changed since it was written (its sha256 differs): copy the folder again.")
    return manifest
