"""Text sources as one stream of pieces, in bounded memory.

A source is a text, JSONL or Parquet file, a folder or glob of such files, `hub:NAME[:CONFIG[:SPLIT]]` for anything
that the `datasets` library can stream, or the word `docstrings`.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from distil_jax.data import docstrings
from distil_jax.data.records import JSON_SUFFIXES, SURROGATE, json_records, open_stream, stream_records
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
    """Whether a document is held out: equal documents fall on one side, whatever they are prepared with."""
    return int.from_bytes(key) < fraction * 2**64


def expand(sources: Sequence[str]) -> list[str]:
    """The files that folders and globs stand for, in a fixed order; `docstrings` and `hub:` stay as they are.

    Raises:
      InputError: a source that does not exist, or a folder without text.
    """
    found: list[str] = []
    for source in sources:
        path = Path(source)
        if source == "docstrings" or source.startswith("hub:") or path.is_file():
            found.append(source)
        elif path.is_dir():
            files = [file for file in path.rglob("[!.]*") if file.suffix in FOLDER_SUFFIXES and file.is_file()]
            if not files:
                raise InputError(f"The folder {source} holds no {', '.join(FOLDER_SUFFIXES)}: name files or a glob.")
            found += sorted(map(str, files))
        elif files := [name for name in glob.glob(source, recursive=True) if Path(name).is_file()]:
            found += sorted(files)
        else:
            raise InputError(f"There is no file, folder or match {source!r}: check it (hub data sets are hub:NAME).")
    return list(dict.fromkeys(found))


def size_in_bytes(sources: Sequence[str]) -> int | None:
    """What `counts["bytes"]` of `read` will end at; None where nobody knows."""
    files = expand(sources)
    if all(Path(file).is_file() and not file.endswith(".parquet") for file in files):
        return sum(Path(file).stat().st_size for file in files)
    return None


def read(
    sources: Sequence[str], *, document: Document = "block", text_field: str = "text", counts: Counter[str]
) -> Iterator[Piece]:
    """Streams the pieces of all sources, one document after the other.

    Args:
      document: what one document of a text file is: a block of lines between blank lines, a file, or a line. Records
        of JSONL, Parquet and hub data sets are documents.
      text_field: the field of such records that holds the text.
      counts: `documents`, `invalid_lines` (not UTF-8, skipped) and `bytes` (of text and JSONL files) are added up here.

    Raises:
      InputError: a source that cannot be read, a broken record, or no such field in it.
    """
    for source in expand(sources):
        if source == "docstrings":
            pieces: Iterable[Piece] = _docstring_pieces()
        elif source.startswith("hub:") or source.endswith(".parquet"):
            pieces = _pieces(_record_lines(source, stream_records(source, open_stream(source)), text_field, counts))
        elif source.endswith(JSON_SUFFIXES):
            records = json_records(source, _file_lines(source, counts), counts)
            pieces = _pieces(_record_lines(source, records, text_field, counts))
        else:
            pieces = _pieces(_text_lines(source, document, counts))
        for piece in pieces:
            counts["documents"] += piece.starts_document
            yield piece


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
    """Paragraphs of docstrings; a document is what stands under one name.

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


def _file_lines(path: str, counts: Counter[str], longest: int = -1) -> Iterator[bytes]:
    """The lines of a file; one beyond `longest` bytes comes in parts, cut at a space or between characters."""
    rest = b""
    try:
        with open(path, "rb") as file:
            while line := rest + file.readline(longest - len(rest) if longest > 0 else -1):
                cut = len(line)
                if cut == longest and not line.endswith(b"\n"):
                    # Without a space, before the last byte that does not continue a UTF-8 character.
                    starts = (i for i in range(longest - 1, longest - 5, -1) if line[i] & 0xC0 != 0x80)
                    cut = line.rfind(b" ") if b" " in line[1:] else next(starts, longest)
                line, rest = line[:cut], line[cut:]
                counts["bytes"] += cut
                yield line
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from error


def _text_lines(path: str, document: Document, counts: Counter[str]) -> Iterator[str]:
    for number, raw in enumerate(_file_lines(path, counts, LONGEST_LINE)):
        if number == 0 and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise InputError(f"{path} is UTF-16: convert it to UTF-8 (iconv -f UTF-16 -t UTF-8).")
        try:
            line = raw.removeprefix(codecs.BOM_UTF8 if number == 0 else b"").decode().strip()
        except UnicodeDecodeError:
            counts["invalid_lines"] += 1
            continue
        if line or document == "block":
            yield line
        if document == "line":
            yield ""
    yield ""


def _record_lines(
    source: str, records: Iterable[tuple[int, Any]], text_field: str, counts: Counter[str]
) -> Iterator[str]:
    for number, record in records:
        where = f"{source} record {number}"
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
        for line in text.split("\n"):
            if SURROGATE.search(line):
                counts["invalid_lines"] += 1
            elif line := line.strip():
                yield line
        yield ""
