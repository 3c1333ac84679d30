"""The manifest of a folder of prepared rows: what it holds, with checks that it is still there."""

from __future__ import annotations

import hashlib
import json
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

from distil_jax.schema import InputError, build, require, short_repr, user_path

FORMAT = 1  # of the folder; a reader refuses any other
Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class SplitCounts:
    rows: int
    sequences: int
    tokens: int  # real ones, [CLS] and [SEP] among them

    def __post_init__(self) -> None:
        for name, count in vars(self).items():
            require(count >= 0, f"{name} must not be negative, but is {count}.")


@dataclass(frozen=True)
class StoredFile:
    path: str  # inside the folder, with forward slashes
    bytes: int
    header: int  # bytes at the start that the hash leaves out: a .npy header is written last
    sha256: str  # of the rest

    def __post_init__(self) -> None:
        require(0 <= self.header <= self.bytes, f"A header of {self.header} in {self.bytes} bytes cannot be.")


@dataclass(frozen=True)
class Manifest:
    """The contents of a folder of rows (`manifest.json`)."""

    format: int
    sequence_length: int
    vocab_size: int  # one more than the largest id
    pad_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    unk_id: int
    special_ids: tuple[int, ...]  # all special tokens, those five and markers such as [E1] among them
    unused_ids: tuple[int, ...]  # [unused0] and its like, which no text holds
    tokenizer_fingerprint: str
    train: SplitCounts
    held_out: SplitCounts
    files: tuple[StoredFile, ...]
    counts: dict  # documents, sequences, tokens, what was dropped and why
    settings: dict  # the PrepareConfig that made it

    def __post_init__(self) -> None:
        require(self.sequence_length > 0, f"sequence_length must be at least 1, not {self.sequence_length}.")
        require(0 < self.vocab_size < 2**31, f"vocab_size must be from 1 to 2**31 - 1, not {self.vocab_size}.")
        ids = (self.pad_id, self.cls_id, self.sep_id, self.mask_id, self.unk_id, *self.special_ids, *self.unused_ids)
        for number in ids:
            require(0 <= number < self.vocab_size, f"The vocabulary of {self.vocab_size} has no id {number}.")
        sources = self.settings.get("sources")
        texts = isinstance(sources, list) and all(isinstance(source, str) for source in sources)
        require(texts, "settings.sources must be a list of texts.")


def read_manifest(folder: str | Path) -> Manifest:
    """The folder's manifest, checked against the names and sizes of the files (`verify` checks their contents).

    Raises:
      InputError: no such folder, a manifest that is missing, damaged or of another format, a file that is missing,
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
        written = short_repr(version)
        raise InputError(f"{path} has format {written}, and this version reads {FORMAT}: prepare the rows again.")
    try:
        manifest = build(Manifest, values)
    except InputError as error:
        raise InputError(f"{path} is damaged ({error}): {again}.") from error
    _check_files(folder, manifest)
    return manifest


def _check_files(folder: Path, manifest: Manifest) -> None:
    needed = {f"{split}/{name}.npy" for split in SPLITS for name in ("input_ids", "segment_ids")} | {"token_counts.npy"}
    if lacking := sorted(needed - {file.path for file in manifest.files}):
        raise InputError(f"{folder}/manifest.json does not list {', '.join(lacking)}: prepare the rows again.")
    for file in manifest.files:
        name = PurePosixPath(file.path)
        if name.is_absolute() or ".." in name.parts or "\\" in file.path or "\0" in file.path:
            raise InputError(f"{folder}/manifest.json names {file.path!r}, outside the folder: do not use this data.")
        try:
            status = (folder / name).stat()
        except OSError as error:
            raise InputError(f"{folder / name} cannot be read ({error.strerror}): copy the folder again.") from error
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise InputError(f"{folder / name} is no file: copy the folder again.")
        if status.st_size != file.bytes:
            raise InputError(
                f"{folder / name} has {status.st_size:,} bytes where the manifest says {file.bytes:,}: "
                "copy the folder again."
            )


def verify(folder: str | Path) -> Manifest:
    """Reads every file and compares its sha256 with the manifest's; returns the manifest.

    Raises:
      InputError: as `read_manifest`, or a file whose contents have changed.
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
