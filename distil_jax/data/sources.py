"""Detects the kind of a file, by its first bytes and its suffix, and reads its lines, decompressed, as text.

All readers of text and of records use these functions, so they accept, reject and count the same lines.
"""

from __future__ import annotations

import bz2
import codecs
import collections
import contextlib
import io
import itertools
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import PurePath
from typing import Any, BinaryIO, Literal

from distil_jax.schema import InputError, require

Kind = Literal["parquet", "json", "csv", "tsv", "text"]

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".lzma")

_HEAD = 1 << 16  # bytes from which the kind of a file is detected
_STEP = 1 << 13  # compressed bytes that are decompressed at a time: bzip2 may expand them a thousandfold
_LZMA_MEMORY = 1 << 29  # most bytes of memory for decompression; xz -9 needs an eighth of it
_LONGEST_JSON = 1 << 24  # bytes; the longest line that is parsed to detect JSON under another suffix
_LARGEST_DOCUMENT = 1 << 29  # bytes; the largest file that may be one JSON list, which has to fit in memory
_SAMPLE = 20  # the number of lines that are parsed to detect JSON under another suffix
# At most this many lines, or this share of the lines if that is more, may be invalid. Beyond it the file is not UTF-8.
_FEW_INVALID = 10
_LARGEST_INVALID_SHARE = 0.1
_EARLY_CHECK = 1000  # the lines after which the number of invalid ones is checked for the first time
_MANY_NULS = 0.5  # a larger share of NULs among every other byte means UTF-16
_LARGEST_NUL_SHARE = 0.1  # a larger share of NULs among all bytes means a binary file
_MANY_CONTROLS = 0.01  # a larger share of control characters means a binary file, unless it is valid UTF-8

_DECOMPRESSORS: dict[re.Pattern[bytes], Callable[[], Any]] = {
    re.compile(rb"\x1f\x8b"): partial(zlib.decompressobj, wbits=31),
    re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P)"): bz2.BZ2Decompressor,
    re.compile(rb"\xfd7zXZ\0|\]\0\0"): partial(lzma.LZMADecompressor, memlimit=_LZMA_MEMORY),
}
# The first bytes of files that are not read, and the end of the error message.
_UNSUPPORTED: dict[bytes, str] = {
    b"\x28\xb5\x2f\xfd": "is compressed with zstd, which is not supported: decompress it first (zstd -d)",
    b"\x04\x22\x4d\x18": "is compressed with lz4, which is not supported: decompress it first (lz4 -d)",
    b"\x1f\x9d": "is compressed with compress, which is not supported: decompress it first (uncompress)",
    b"PK\x03\x04": "is a ZIP archive, or a document in that format (docx, xlsx): unpack it, or save it as text",
    b"PK\x05\x06": "is an empty ZIP archive: name the files that were meant to be in it",
    b"7z\xbc\xaf\x27\x1c": "is a 7z archive: unpack it first",
    b"Rar!\x1a\x07": "is a RAR archive: unpack it first",
    b"%PDF-": "is a PDF: extract its text first (pdftotext)",
    b"\xd0\xcf\x11\xe0": "is an old Office document: save it as text, or as CSV in UTF-8",
    b"{\\rtf": "is an RTF document: save it as text",
    b"\x7fELF": "is a program (ELF), not text: name another file",
    b"ARROW1": "is an Arrow file: save it as Parquet or JSON lines",
    b"Obj\x01": "is an Avro file: save it as Parquet or JSON lines",
    b"SQLite format 3\0": "is an SQLite database: save its table as CSV or JSON lines",
    b"\x89HDF": "is an HDF5 file: save it as Parquet or JSON lines",
    b"\x93NUMPY": "is a NumPy array: save its texts as lines, or as Parquet",
}
# Byte order marks. UTF-32 goes first, because one of its marks starts with that of UTF-16.
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_PARQUET = b"PAR1"
_TAR_MAGIC = slice(257, 262)  # the bytes of a tar archive that are `ustar`
_BEGINS_JSON = re.compile(rb'(\xef\xbb\xbf)?\s*(\[\s*)?\{\s*["}]')
_BEGINS_LIST_OR_OBJECT = re.compile(r"\s*[\[{]")
_CONTROLS = re.compile(rb"[\0-\x08\x0e-\x1a\x1c-\x1f]")  # without tab, line feed, form feed, CR and escape
_ENDS_LINES_IN_CR = re.compile(rb"\r[^\r]")


def suffix_of(path: str) -> str:
    """The suffix in lower case, without the suffix of a compression: `.jsonl` for `a.JSONL.gz`."""
    name = PurePath(path.lower())
    return PurePath(name.stem).suffix if name.suffix in COMPRESSED_SUFFIXES else name.suffix


def kind_of(path: str) -> Kind:
    """The kind of a file, by its first bytes and, if it is text, by its suffix.

    Text whose first lines are all JSON objects is JSON lines under any suffix.

    Raises:
      InputError: the file cannot be read, is not text or Parquet, or is text in another encoding than UTF-8.
    """
    with _open(path) as (file, raw):
        head = file.read(_HEAD)
        compressed = file is not raw
    _check_head(path, head, compressed)
    if head.startswith(_PARQUET) or suffix_of(path) == ".parquet":
        require(not compressed, f"{path} is a compressed Parquet file: decompress it, Parquet is compressed by itself.")
        return "parquet"
    if suffix_of(path) in JSON_SUFFIXES or (_BEGINS_JSON.match(head) and _is_json(path)):
        return "json"
    return {".csv": "csv", ".tsv": "tsv"}.get(suffix_of(path), "text")


def file_lines(path: str, counts: Counter[str] | None = None, longest: int = -1) -> Iterator[bytes]:
    """The lines of a file, decompressed.

    Args:
      path: the file.
      counts: `bytes`, the bytes read from the disk so far, are added up here.
      longest: longer lines, in bytes, are split at a space or, if they have none, between two characters. -1: no limit.

    Raises:
      InputError: the file cannot be read or decompressed.
    """
    rest, position = b"", 0
    with _open(path) as (file, raw):
        while line := rest + file.readline(longest - len(rest) if longest > 0 else -1):
            cut = len(line)
            if cut == longest and not line.endswith(b"\n"):
                # Without a space, cut before the last byte that starts a UTF-8 character.
                starts = (i for i in range(longest - 1, longest - 5, -1) if line[i] & 0xC0 != 0x80)
                cut = line.rfind(b" ") if b" " in line[1:] else next(starts, longest)
            line, rest = line[:cut], line[cut:]
            new_position = position + cut if file is raw else raw.tell()
            if counts is not None:
                counts["bytes"] += new_position - position
            position = new_position
            yield line
        if counts is not None:
            counts["bytes"] += raw.tell() - position  # a compressed file may decompress to nothing


def decode_lines(path: str, lines: Iterable[bytes], counts: Counter[str] | None) -> Iterator[tuple[int, str]]:
    """Decodes lines as UTF-8, and numbers them from 1.

    Args:
      path: the file that they are from, for messages.
      lines: see `file_lines`.
      counts: `invalid_lines`, which are not UTF-8 or contain a NUL character, are counted here and skipped. None: the
        first one is an error.

    Raises:
      InputError: an invalid line, if `counts` is None; otherwise more than ten of them and more than a tenth.
    """
    number = invalid = 0
    for number, raw in enumerate(lines, start=1):
        if number == _EARLY_CHECK:
            _check_share(path, invalid, number)
        try:
            line = raw.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode()
        except UnicodeDecodeError as error:
            if counts is None:
                raise InputError(f"{path} line {number} is not UTF-8: convert the file to UTF-8.") from error
        else:
            if "\0" not in line:
                yield number, line
                continue
            require(counts is not None, f"{path} line {number} contains a NUL character: it is damaged or not text.")
        invalid += 1
        counts["invalid_lines"] += 1
    _check_share(path, invalid, number)


def json_records(path: str, counts: Counter[str] | None = None) -> Iterator[tuple[str, Any]]:
    """The records of a file of JSON lines, or of one list of objects, each with its place (`line 3`).

    Args:
      path: the file, possibly compressed.
      counts: as in `file_lines` and `decode_lines`.

    Raises:
      InputError: an invalid line, a line that is not JSON, or a file that is one object over several lines.
    """
    lines, first = file_lines(path, counts), True
    for number, line in decode_lines(path, lines, counts):
        if not line.strip():
            continue
        try:
            record = _parse(line)
        except (ValueError, RecursionError) as error:
            whole = _parse_file(path) if first and _BEGINS_LIST_OR_OBJECT.match(line) else None
            if whole is None:
                raise InputError(
                    f"{path} line {number} is not JSON ({error}): each line must be one object."
                ) from error
            collections.deque(lines, maxlen=0)  # reads the remaining lines, so that their bytes are counted
            yield from _list_records(path, whole)
            return
        if first and isinstance(record, list) and record and isinstance(record[0], dict):
            yield from _list_records(path, record)
        else:
            yield f"line {number}", record
        first = False


def _list_records(path: str, whole: dict | list) -> Iterator[tuple[str, Any]]:
    """The records of a file that is one list. Raises `InputError` if it is one object."""
    if isinstance(whole, dict):
        fields = ", ".join(whole) or "none"
        raise InputError(
            f"{path} is one JSON object over several lines, with the fields {fields}: write each record as an object "
            "on its own line, or as an element of one list."
        )
    yield from ((f"record {number}", record) for number, record in enumerate(whole, start=1))


def _parse(text: str) -> Any:
    """Parses JSON. An object with a repeated key is a `ValueError`; `json` would silently take the last value."""
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise ValueError(f"an object has the key {', '.join(map(repr, repeated))} twice")
    return record


def _parse_file(path: str) -> dict | list | None:
    """A file's contents as one JSON object or list; None if it is neither, or too large to parse in memory."""
    with _open(path) as (file, _):
        data = file.read(_LARGEST_DOCUMENT + 1)
    if len(data) > _LARGEST_DOCUMENT:
        return None
    try:
        whole = _parse(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return whole if isinstance(whole, (dict, list)) else None


def _is_json(path: str) -> bool:
    """Whether the first lines are all JSON objects, or the first line or the whole file is a JSON list or object."""
    lines = (line for line in file_lines(path, longest=_LONGEST_JSON) if line.strip())
    for index, line in enumerate(itertools.islice(lines, _SAMPLE)):
        try:
            record = _parse(line.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            return index == 0 and _parse_file(path) is not None
        if not isinstance(record, dict):
            return index == 0 and isinstance(record, list)
    return True


def _check_head(path: str, head: bytes, compressed: bool) -> None:
    """Raises `InputError` if a file's first bytes, decompressed, show that it is neither UTF-8 text nor Parquet."""
    subject = f"{path}, decompressed," if compressed else path
    for magic, problem in _UNSUPPORTED.items():
        require(not head.startswith(magic), f"{subject} {problem}.")
    require(_decompressor(head) is None, f"{path} is compressed twice: decompress it first.")
    require(head[_TAR_MAGIC] != b"ustar", f"{subject} is a tar archive: unpack it, and name the folder (tar -xf).")
    for mark, name in _BYTE_ORDER_MARKS.items():
        require(not head.startswith(mark), f"{subject} is {name}: convert it to UTF-8 (iconv -f {name} -t UTF-8).")
    if head.startswith(_PARQUET):
        return
    # In UTF-16, every other byte of European text is NUL.
    for first, name in ((1, "UTF-16LE"), (0, "UTF-16BE")):
        is_utf16 = head[first::2].count(0) > _MANY_NULS * len(head) / 2 and not head[1 - first :: 2].count(0)
        require(
            not is_utf16,
            f"{subject} is UTF-16 without a byte order mark: convert it to UTF-8 (iconv -f {name} -t UTF-8).",
        )
    many_controls = len(_CONTROLS.findall(head)) > _MANY_CONTROLS * len(head) and not _is_utf8(head)
    is_binary = many_controls or head.count(0) > _LARGEST_NUL_SHARE * len(head)
    require(not is_binary, f"{subject} is binary, not text: name another file.")
    require(
        b"\n" in head or not _ENDS_LINES_IN_CR.search(head),
        f"{subject} ends its lines with CR alone, as old Macintosh files do: convert it (tr '\\r' '\\n').",
    )


def _is_utf8(head: bytes) -> bool:
    """Whether these bytes are UTF-8; the last character may be incomplete."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def _check_share(path: str, invalid: int, lines: int) -> None:
    require(
        invalid <= max(_FEW_INVALID, _LARGEST_INVALID_SHARE * lines),
        f"{path} is not UTF-8 text: {invalid:,} of its first {lines:,} lines are not UTF-8 or contain NUL: convert it "
        "(for example by iconv -f LATIN1 -t UTF-8), or leave it out.",
    )


@contextlib.contextmanager
def _open(path: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Opens a file. Yields a stream of its decompressed bytes, and the file itself; without compression, both are it.

    Raises:
      InputError: it cannot be opened or read, in the body of the `with` statement too.
    """
    try:
        with open(path, "rb") as raw:
            new_decompressor = _decompressor(raw.peek(len(b"BZh91AY&SY")))
            if new_decompressor is None:
                yield raw, raw
            else:
                yield io.BufferedReader(_BlockReader(_decompress(path, raw, new_decompressor))), raw
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from error


def _decompressor(head: bytes) -> Callable[[], Any] | None:
    """A function that makes a decompressor for a file with these first bytes; None if it is not compressed."""
    return next((new for pattern, new in _DECOMPRESSORS.items() if pattern.match(head)), None)


def _decompress(path: str, file: BinaryIO, new_decompressor: Callable[[], Any]) -> Iterator[bytes]:
    """The decompressed bytes of a file, which may be several compressed files concatenated.

    Python's own readers of bzip2 and xz are not used, because they silently stop where the second or a later one is
    damaged in its first bytes.
    """
    data = file.read(_STEP)
    while data:
        decompressor = new_decompressor()
        while data and not decompressor.eof:
            try:
                block = decompressor.decompress(data)
            except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                raise InputError(f"{path} is damaged, and cannot be decompressed ({error}): copy it again.") from error
            yield block
            data = decompressor.unused_data or file.read(_STEP)
        require(decompressor.eof, f"{path} is cut off before its compressed data ends: copy it again.")
        while data and not data.strip(b"\0"):  # tapes and xz pad with zeros
            data = file.read(_STEP)
        data = data.lstrip(b"\0")


class _BlockReader(io.RawIOBase):
    """A file whose contents are given as an iterator of blocks."""

    def __init__(self, blocks: Iterator[bytes]):
        self._blocks = blocks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = memoryview(block)
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size
