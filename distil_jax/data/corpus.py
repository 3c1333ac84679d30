"""Text sources as one stream of pieces, in bounded memory.

A source is a text, JSONL, CSV or Parquet file, also compressed (gzip, bzip2, xz), a folder or glob of such files,
`hub:NAME[:CONFIG[:SPLIT]]` for anything that the `datasets` library can stream, or the word `docstrings`.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from distil_jax.data import docstrings
from distil_jax.data.records import SURROGATE, open_stream, stream_records, table_records
from distil_jax.data.sources import decoded, file_lines, json_records, kind_of, suffix_of
from distil_jax.schema import InputError

Document = Literal["block", "file", "line"]

KEY_BYTES = 1 << 16  # of a document's start; what decides its side of the held-out split
LONGEST_LINE = 1 << 20  # bytes; a text file may be one line, and must not be read whole
FOLDER_SUFFIXES = (".txt", ".text", ".jsonl", ".ndjson", ".parquet")  # what is read of a folder


class Piece(NamedTuple):
    """One line of a document."""

    key: bytes  # hash that decides the document's side of the held-out split
    text: str
    starts_document: bool


def is_held_out(key: bytes, fraction: float) -> bool:
    """Whether a document is held out: equal documents always fall on the same side."""
    return int.from_bytes(key) < fraction * 2**64


def expand(sources: Sequence[str], counts: Counter[str] | None = None) -> list[str]:
    """The files that folders and globs stand for, in a fixed order; `docstrings` and `hub:` names stay.

    Args:
      counts: `left_out_files`, those of folders that are hidden or have another suffix, and `repeated_files`, those
        that are named a second time, also through a link, are added up here.

    Raises:
      InputError: a source that does not exist, or a folder without text.
    """
    counts = Counter() if counts is None else counts
    files_named: list[str] = []
    for source in sources:
        path = Path(source)
        if _is_name(source) or path.is_file():
            files_named.append(source)
        elif path.is_dir():
            files_named += _files_of(path, counts)
        elif files := [name for name in glob.glob(source, recursive=True) if Path(name).is_file()]:
            files_named += sorted(files)
        else:
            raise InputError(f"There is no file, folder or match {source!r}: check it (hub data sets are hub:NAME).")
    once: dict[object, str] = {}
    for source in files_named:
        once.setdefault(source if _is_name(source) else Path(source).resolve(), source)
    counts["repeated_files"] += len(files_named) - len(once)
    return list(once.values())


def _is_name(source: str) -> bool:
    return source == "docstrings" or source.startswith("hub:")


def _files_of(folder: Path, counts: Counter[str]) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]  # linked folders: not read
    hidden = {path for path in files if any(part.startswith(".") for part in path.relative_to(folder).parts)}
    read = [path for path in files if path not in hidden and path.is_file() and suffix_of(path.name) in FOLDER_SUFFIXES]
    if not read:
        others = ", ".join(sorted({path.suffix or path.name for path in files})[:5])
        but = f", but {others}" if others else ""
        raise InputError(f"The folder {folder} holds no {', '.join(FOLDER_SUFFIXES)}{but}: name files or a glob.")
    counts["left_out_files"] += len(files) - len(read)
    return sorted(map(str, read))


def size_in_bytes(sources: Sequence[str]) -> int | None:
    """The final value of `counts["bytes"]` of `read`; None if it cannot be known."""
    files = expand(sources)
    if all(not _is_name(file) and kind_of(file) != "parquet" for file in files):
        return sum(Path(file).stat().st_size for file in files)
    return None


def read(
    sources: Sequence[str], *, document: Document = "block", text_field: str = "text", counts: Counter[str]
) -> Iterator[Piece]:
    """Streams the pieces of all sources, one document after the other.

    Args:
      document: what one document of a text file is: a block of lines between blank lines, a file, or a line. Records
        of JSONL, CSV, Parquet and hub data sets are documents.
      text_field: the field of such records that holds the text.
      counts: added up here are `documents`; `bytes` of all files but Parquet; `invalid_lines`, skipped because they are
        not UTF-8, or hold NUL or half a character; `empty_records`, whose text is empty; `empty_files`, which hold no
        document; and those of `expand`.

    Raises:
      InputError: a source that cannot be read, a broken record, or no such field in it.
    """
    for source in expand(sources, counts):
        before = counts["documents"]
        for piece in _pieces_of(source, document, text_field, counts):
            counts["documents"] += piece.starts_document
            yield piece
        counts["empty_files"] += counts["documents"] == before


def _pieces_of(source: str, document: Document, text_field: str, counts: Counter[str]) -> Iterable[Piece]:
    if source == "docstrings":
        return _docstring_pieces()
    kind = "hub" if source.startswith("hub:") else kind_of(source)
    if kind == "text":
        return _pieces(_text_lines(source, document, counts))
    if kind == "json":
        records: Iterable[tuple[str, Any]] = json_records(source, counts)
    elif kind in ("csv", "tsv"):
        records = table_records(source, kind, counts)
    else:
        records = ((f"record {number}", record) for number, record in stream_records(source, open_stream(source)))
    return _pieces(_record_lines(source, records, text_field, counts))


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode()[:KEY_BYTES], digest_size=8).digest()


def _pieces(lines: Iterable[str]) -> Iterator[Piece]:
    """Documents' lines, with an empty line after each document, as pieces."""
    head: list[str] = []  # lines that wait until the document's key is known
    size, key = 0, b""
    for line in itertools.chain(lines, [""]):
        if key and line:
            yield Piece(key, line, starts_document=False)
            continue
        if line:
            head.append(line)
            size += len(line)
        if head and (size >= KEY_BYTES or not line):
            key = _key("\n".join(head))
            yield from _document(key, head)
            head, size = [], 0
        if not line:
            key = b""


def _document(key: bytes, texts: list[str]) -> Iterator[Piece]:
    return (Piece(key, text, starts_document=number == 0) for number, text in enumerate(texts))


def _docstring_pieces() -> Iterator[Piece]:
    """Paragraphs of docstrings; a document is everything under one name.

    Of all the names that a paragraph occurs under, it goes to the one with the largest key: so it is held out only if
    all of them are. Long ones never are: they will be cut, and inner parts of long paragraphs repeat each other.
    """
    documents: dict[bytes, list[str]] = {}
    for paragraph, names in docstrings.paragraphs().items():
        key = max(map(_key, names))
        if len(docstrings.words(paragraph)) > docstrings.FIRST_WORDS:
            key = b"\xff" + key[1:]
        documents.setdefault(key, []).append(paragraph)
    for key, texts in documents.items():
        yield from _document(key, texts)


def _text_lines(path: str, document: Document, counts: Counter[str]) -> Iterator[str]:
    for _, text in decoded(path, file_lines(path, counts, LONGEST_LINE), counts):
        line = text.strip()
        if line or document == "block":
            yield line
        if document == "line":
            yield ""
    yield ""


def _record_lines(
    source: str, records: Iterable[tuple[str, Any]], text_field: str, counts: Counter[str]
) -> Iterator[str]:
    for place, record in records:
        where = f"{source} {place}"
        if not isinstance(record, dict):
            raise InputError(f"{where} is a {type(record).__name__}: each must be an object with named fields.")
        if text_field not in record:
            fields = ", ".join(record) or "none"
            raise InputError(
                f"{where} has no field {text_field!r}: choose one of its own ({fields}) with --text-field."
            )
        text = record[text_field]
        if not isinstance(text, str):
            raise InputError(f"{where}: the field {text_field!r} must be text, and is {type(text).__name__}.")
        counts["empty_records"] += not text.strip()
        for line in text.split("\n"):
            if SURROGATE.search(line):
                counts["invalid_lines"] += 1
            elif line := line.strip():
                yield line
        yield ""
