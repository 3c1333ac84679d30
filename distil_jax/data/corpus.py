"""Streams the text of all sources, document by document, in bounded memory.

A source is one of:
- a text (also Markdown), JSONL, CSV, TSV or Parquet file; all but Parquet may be compressed with gzip, bzip2 or xz;
- a folder or a glob of such files;
- `hub:NAME[:CONFIG[:SPLIT]]`, for any data set that the `datasets` library can stream;
- the word `docstrings`.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from distil_jax.data import docstrings
from distil_jax.data.records import SURROGATE, open_stream, stream_records, table_records
from distil_jax.data.sources import decode_lines, file_lines, json_records, kind_of, suffix_of
from distil_jax.schema import InputError

Document = Literal["block", "file", "line"]

KEY_BYTES = 1 << 16  # how much of a document's start decides whether it is held out
LONGEST_LINE = 1 << 20  # bytes; longer lines are split, because a whole text file may be one line
FOLDER_SUFFIXES = (".txt", ".text", ".md", ".jsonl", ".ndjson", ".parquet")  # the files of a folder that are read


class Piece(NamedTuple):
    """One line of a document."""

    key: bytes  # 8-byte hash that decides whether the document is held out
    text: str
    starts_document: bool


def is_held_out(key: bytes, fraction: float) -> bool:
    """Whether the document with this key is held out. Equal documents have equal keys and so are never separated."""
    return int.from_bytes(key) < fraction * 2**64


def held_out_share(pieces: Iterable[Piece], share: float, *, length: int, join: bool) -> float | None:
    """The share nearest to `share` with which `is_held_out` holds out some document, but not every one.

    It reads on only until it has seen a document of both kinds. If there are two documents that are long enough, one of
    them is held out and another one is not.

    Args:
      pieces: of the documents.
      share: of the documents, above 0.
      length: characters that give a sequence which is long enough to be kept.
      join: whether the lines of a document are joined to sequences; otherwise every line is one.

    Returns:
      The share, or None without two different documents.
    """
    # Of the documents that are long enough (True) and of the others: the smallest and the largest key.
    ends: dict[bool, tuple[bytes, bytes]] = {}
    characters = 0
    for key, text, starts_document in pieces:
        characters = len(text) + (characters if join and not starts_document else 0)
        is_long = characters >= length
        low, high = ends.get(is_long, (key, key))
        low, high = ends[is_long] = min(low, key), max(high, key)
        if is_long and is_held_out(low, share) and not is_held_out(high, share):
            return share
    low, high = ends.get(True, (b"", b""))
    if low == high:
        low = min((low for low, _ in ends.values()), default=b"")
        high = max((high for _, high in ends.values()), default=b"")
    if low == high:
        return None
    # The quotients are rounded, so the numbers next to them are those that are surely on the other side of the keys.
    least, most = (int.from_bytes(key) / 2**64 for key in (low, high))
    return min(max(share, math.nextafter(least, 1)), math.nextafter(most, 0))


def expand(sources: Sequence[str], counts: Counter[str] | None = None) -> list[str]:
    """Replaces folders and globs by their files, in a fixed order, and drops duplicates.

    Args:
      sources: paths, globs, `docstrings` or `hub:` names; the last two are returned as they are.
      counts: incremented here are `left_out_files`, files of folders that are hidden or have another suffix, and
        `repeated_files`, files that are given more than once, possibly through a link.

    Raises:
      InputError: a source that does not exist, or a folder without text.
    """
    counts = Counter() if counts is None else counts
    expanded: list[str] = []
    for source in sources:
        path = Path(source)
        if not _is_path(source) or path.is_file():
            expanded.append(source)
        elif path.is_dir():
            expanded += _files_of(path, counts)
        elif files := [name for name in glob.glob(source, recursive=True) if Path(name).is_file()]:
            expanded += sorted(files)
        else:
            raise InputError(f"There is no file, folder or match {source!r}: check it (hub data sets are hub:NAME).")
    unique: dict[object, str] = {}
    for source in expanded:
        unique.setdefault(Path(source).resolve() if _is_path(source) else source, source)
    counts["repeated_files"] += len(expanded) - len(unique)
    return list(unique.values())


def _is_path(source: str) -> bool:
    return source != "docstrings" and not source.startswith("hub:")


def _files_of(folder: Path, counts: Counter[str]) -> list[str]:
    # Links to folders are not followed; they count as files that are left out.
    files = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    hidden = {path for path in files if any(part.startswith(".") for part in path.relative_to(folder).parts)}
    text = [path for path in files if path not in hidden and path.is_file() and suffix_of(path.name) in FOLDER_SUFFIXES]
    if not text:
        others = ", ".join(sorted({path.suffix or path.name for path in files})[:5])
        but = f", but {others}" if others else ""
        raise InputError(f"The folder {folder} holds no {', '.join(FOLDER_SUFFIXES)}{but}: name files or a glob.")
    counts["left_out_files"] += len(files) - len(text)
    return sorted(map(str, text))


def size_in_bytes(sources: Sequence[str]) -> int | None:
    """The value that `counts["bytes"]` has after `read`, or None if it is not known before."""
    files = expand(sources)
    if all(_is_path(file) and kind_of(file) != "parquet" for file in files):
        return sum(Path(file).stat().st_size for file in files)
    return None


def read(
    sources: Sequence[str], *, document: Document = "block", text_field: str = "text", counts: Counter[str]
) -> Iterator[Piece]:
    """Streams the pieces of all sources, one document after the other.

    Args:
      sources: see the module's docstring.
      document: the unit of a text file that is one document: a block of lines between blank lines, the file, or a line.
        In JSONL, CSV, Parquet and hub data sets, every record is a document.
      text_field: the field of such records that holds the text.
      counts: incremented here are `documents`; `bytes`, of all files but Parquet; `invalid_lines`, skipped because they
        are not UTF-8 or contain NUL or an unpaired surrogate; `empty_records`, whose text is empty; `empty_files`,
        which contain no document; and the counts of `expand`.

    Raises:
      InputError: a source that cannot be read, or a record that is malformed or lacks the field.
    """
    for source in expand(sources, counts):
        before = counts["documents"]
        for piece in _read_source(source, document, text_field, counts):
            counts["documents"] += piece.starts_document
            yield piece
        counts["empty_files"] += counts["documents"] == before


def _read_source(source: str, document: Document, text_field: str, counts: Counter[str]) -> Iterable[Piece]:
    if source == "docstrings":
        return _docstring_pieces()
    kind = "hub" if source.startswith("hub:") else kind_of(source)
    if kind == "text":
        return _pieces_from_lines(_text_lines(source, document, counts))
    if kind == "json":
        records: Iterable[tuple[str, Any]] = json_records(source, counts)
    elif kind in ("csv", "tsv"):
        records = table_records(source, kind, counts)
    else:
        records = ((f"record {number}", record) for number, record in stream_records(source, open_stream(source)))
    return _pieces_from_lines(_record_lines(source, records, text_field, counts))


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode()[:KEY_BYTES], digest_size=8).digest()


def _pieces_from_lines(lines: Iterable[str]) -> Iterator[Piece]:
    """Turns the lines of documents into pieces. An empty line ends a document."""
    head: list[str] = []  # the document's first lines, kept until there are enough of them for its key
    size, key = 0, b""  # an empty key: not known yet
    for line in itertools.chain(lines, [""]):
        if key and line:
            yield Piece(key, line, starts_document=False)
            continue
        if line:
            head.append(line)
            size += len(line)
        if head and (size >= KEY_BYTES or not line):
            key = _key("\n".join(head))
            yield from _first_pieces(key, head)
            head, size = [], 0
        if not line:
            key = b""


def _first_pieces(key: bytes, texts: list[str]) -> Iterator[Piece]:
    """The pieces with which a document starts."""
    return (Piece(key, text, starts_document=index == 0) for index, text in enumerate(texts))


def _docstring_pieces() -> Iterator[Piece]:
    """The paragraphs of docstrings. All paragraphs of objects with one name form one document.

    A paragraph that occurs under several names goes to the name with the largest key, so it is held out only if all of
    these names are. Long paragraphs are never held out, because they are cut later, and their inner parts often repeat
    those of others.
    """
    documents: dict[bytes, list[str]] = {}
    for paragraph, names in docstrings.paragraphs().items():
        key = max(map(_key, names))
        if len(docstrings.words(paragraph)) > docstrings.FIRST_WORDS:
            key = b"\xff" + key[1:]
        documents.setdefault(key, []).append(paragraph)
    for key, texts in documents.items():
        yield from _first_pieces(key, texts)


def _text_lines(path: str, document: Document, counts: Counter[str]) -> Iterator[str]:
    """The lines of a text file, with an empty line after each document."""
    for _, text in decode_lines(path, file_lines(path, counts, LONGEST_LINE), counts):
        line = text.strip()
        if line or document == "block":
            yield line
        if document == "line":
            yield ""
    yield ""


def _record_lines(
    source: str, records: Iterable[tuple[str, Any]], text_field: str, counts: Counter[str]
) -> Iterator[str]:
    """The lines of the records' text, with an empty line after each record."""
    for place, record in records:
        where = f"{source} {place}"
        if not isinstance(record, dict):
            raise InputError(f"{where} is a {type(record).__name__}: each must be an object with named fields.")
        if text_field not in record:
            fields = ", ".join(record) or "none"
            raise InputError(f"{where} has no field {text_field!r} (its fields: {fields}): name one with --text-field.")
        text = record[text_field]
        if not isinstance(text, str):
            raise InputError(f"{where}: the field {text_field!r} must be text, not {type(text).__name__}.")
        counts["empty_records"] += not text.strip()
        for line in text.split("\n"):
            if SURROGATE.search(line):
                counts["invalid_lines"] += 1
            elif line := line.strip():
                yield line
        yield ""
