"""The kind of a file, by its first bytes and then by its suffix; and its lines, unpacked, as text.

Every reader of text and of records gets its lines here, so that all of them refuse, read and count alike.
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
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".lzma")

_HEAD = 1 << 16  # bytes that are looked at
_STEP = 1 << 13  # packed bytes that are unpacked at a time: bzip2 can make a thousand times as many of them
_LZMA_MEMORY = 1 << 29  # bytes; xz -9 asks for an eighth of it
_LONGEST_JSON = 1 << 24  # bytes of a first line that is tried as JSON where the suffix does not say so
_LARGEST_DOCUMENT = 1 << 29  # bytes of a file that is one JSON list, which must be in memory as a whole
_SAMPLE = 20  # lines that must be JSON objects where the suffix does not say so
_FEW = 10  # lines that may be no text whatever their share is
_LARGEST_SHARE = 0.1  # of lines that are no text: beyond it the file is in another encoding, or no text at all
_MANY_NULS = 0.5  # of every other byte
_MANY_CONTROLS = 0.01  # of all bytes, where they are not UTF-8 either
_EARLY = 1000  # lines after which that is looked at for the first time

_UNPACKERS: dict[re.Pattern[bytes], Callable[[], Any]] = {
    re.compile(rb"\x1f\x8b"): partial(zlib.decompressobj, wbits=31),
    re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P)"): bz2.BZ2Decompressor,
    re.compile(rb"\xfd7zXZ\0|\]\0\0"): partial(lzma.LZMADecompressor, memlimit=_LZMA_MEMORY),
}
_REFUSED: dict[bytes, str] = {
    b"\x28\xb5\x2f\xfd": "is compressed with zstd, which is not read here: unpack it first (zstd -d)",
    b"\x04\x22\x4d\x18": "is compressed with lz4, which is not read here: unpack it first (lz4 -d)",
    b"\x1f\x9d": "is compressed with compress, which is not read here: unpack it first (uncompress)",
    b"PK\x03\x04": "is a ZIP archive, or a document that is one inside (docx, xlsx): unpack it, or save it as text",
    b"PK\x05\x06": "is an empty ZIP archive: name the files that were meant to be in it",
    b"7z\xbc\xaf\x27\x1c": "is a 7z archive: unpack it first",
    b"Rar!\x1a\x07": "is a RAR archive: unpack it first",
    b"%PDF-": "is a PDF: extract its text first (pdftotext)",
    b"\xd0\xcf\x11\xe0": "is an old Office document: save it as text, or as CSV in UTF-8",
    b"{\\rtf": "is an RTF document: save it as text",
    b"\x7fELF": "is a program (ELF), and no text: name another file",
    b"ARROW1": "is an Arrow file: save it as Parquet or JSON lines",
    b"Obj\x01": "is an Avro file: save it as Parquet or JSON lines",
    b"SQLite format 3\0": "is an SQLite database: save its table as CSV or JSON lines",
    b"\x89HDF": "is an HDF5 file: save it as Parquet or JSON lines",
    b"\x93NUMPY": "is a NumPy array: save its texts as lines, or as Parquet",
}
# Those of UTF-32 first: the mark of UTF-16 is the beginning of one of them.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_PARQUET = b"PAR1"
_TAR = slice(257, 262)  # where `ustar` stands
_BEGINS_JSON = re.compile(rb'(\xef\xbb\xbf)?\s*(\[\s*)?\{\s*["}]')
_BEGINS_LIST = re.compile(r"\s*[\[{]")
_CONTROLS = re.compile(rb"[\0-\x08\x0e-\x1a\x1c-\x1f]")  # no tab, no end of a line or page, and no escape
_ENDS_IN_CR = re.compile(rb"\r[^\r]")


def suffix_of(path: str) -> str:
    """The suffix in lower case, without that of a compression: `.jsonl` of `a.JSONL.gz`."""
    name = PurePath(path.lower())
    return PurePath(name.stem).suffix if name.suffix in PACKED_SUFFIXES else name.suffix


def kind_of(path: str) -> Kind:
    """The kind of a file: by its first bytes, and for text by its suffix.

    Text whose first lines are all JSON objects is JSON lines under any suffix.

    Raises:
      InputError: it cannot be read, or is an archive, a document, binary or in another encoding.
    """
    with _opened(path) as (file, raw):
        head = file.read(_HEAD)
        packed = file is not raw
    _check(path, head, packed)
    if head.startswith(_PARQUET) or suffix_of(path) == ".parquet":
        require(not packed, f"{path} is a compressed Parquet file: unpack it first, Parquet compresses inside.")
        return "parquet"
    if suffix_of(path) in JSON_SUFFIXES or (_BEGINS_JSON.match(head) and _is_json(path)):
        return "json"
    return {".csv": "csv", ".tsv": "tsv"}.get(suffix_of(path), "text")


def file_lines(path: str, counts: Counter[str] | None = None, longest: int = -1) -> Iterator[bytes]:
    """The lines of a file, unpacked; one beyond `longest` bytes comes in parts, cut at a space or between characters.

    Args:
      counts: `bytes` of the file, as it lies on the disk, are added up here as they are read.

    Raises:
      InputError: it cannot be read or unpacked.
    """
    rest, position = b"", 0
    with _opened(path) as (file, raw):
        while line := rest + file.readline(longest - len(rest) if longest > 0 else -1):
            cut = len(line)
            if cut == longest and not line.endswith(b"\n"):
                # Without a space, before the last byte that does not continue a UTF-8 character.
                starts = (i for i in range(longest - 1, longest - 5, -1) if line[i] & 0xC0 != 0x80)
                cut = line.rfind(b" ") if b" " in line[1:] else next(starts, longest)
            line, rest = line[:cut], line[cut:]
            before, position = position, position + cut if file is raw else raw.tell()
            if counts is not None:
                counts["bytes"] += position - before
            yield line
        if counts is not None:
            counts["bytes"] += raw.tell() - position  # what was packed may hold nothing


def decoded(path: str, lines: Iterable[bytes], counts: Counter[str] | None) -> Iterator[tuple[int, str]]:
    """Numbered lines as text.

    Args:
      counts: `invalid_lines`, those that are not UTF-8 or hold a NUL character, are counted here and left out; None:
        they are refused.

    Raises:
      InputError: such a line, or more than a tenth of them.
    """
    number = invalid = 0
    for number, raw in enumerate(lines, start=1):
        if number == _EARLY:
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
            require(counts is not None, f"{path} line {number} holds a NUL character: it is damaged, or no text.")
        invalid += 1
        counts["invalid_lines"] += 1
    _check_share(path, invalid, number)


def json_records(path: str, counts: Counter[str] | None = None) -> Iterator[tuple[str, Any]]:
    """The records of JSON lines, or of one list of objects, each with its place (`line 3`); JSON may hold anything.

    Args:
      counts: as for `file_lines` and `decoded`; None: lines that are no text are refused.

    Raises:
      InputError: a line that is not JSON, or a file that is one object over several lines.
    """
    lines, first = file_lines(path, counts), True
    for number, line in decoded(path, lines, counts):
        if not line.strip():
            continue
        try:
            record = _parsed(line)
        except (ValueError, RecursionError) as error:
            whole = _whole(path) if first and _BEGINS_LIST.match(line) else None
            if whole is None:
                raise InputError(
                    f"{path} line {number} is not JSON ({error}): each line must be one object."
                ) from error
            collections.deque(lines, maxlen=0)  # they are read, and their bytes counted
            yield from _listed(path, whole)
            return
        if first and isinstance(record, list) and record and isinstance(record[0], dict):
            yield from _listed(path, record)
        else:
            yield f"line {number}", record
        first = False


def _listed(path: str, whole: Any) -> Iterator[tuple[str, Any]]:
    """The records of a list; any other JSON value is refused."""
    if isinstance(whole, dict):
        fields = ", ".join(whole) or "none"
        raise InputError(
            f"{path} is one JSON object over several lines, with the fields {fields}: write one object a record, each "
            "on a line of its own, or a list of them."
        )
    yield from ((f"record {number}", record) for number, record in enumerate(whole, start=1))


def _parsed(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):  # the last one would win in silence
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        raise ValueError(f"an object names {', '.join(map(repr, twice))} twice")
    return record


def _whole(path: str) -> dict | list | None:
    """All of a file as one JSON object or list; None where it is neither, or too large to hold in memory."""
    with _opened(path) as (file, _):
        data = file.read(_LARGEST_DOCUMENT + 1)
    if len(data) > _LARGEST_DOCUMENT:
        return None
    try:
        whole = _parsed(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return whole if isinstance(whole, (dict, list)) else None


def _is_json(path: str) -> bool:
    """Whether the first lines of a text are all JSON objects, or all of it is one list of objects, or one object."""
    lines = (line for line in file_lines(path, longest=_LONGEST_JSON) if line.strip())
    for number, line in enumerate(itertools.islice(lines, _SAMPLE)):
        try:
            record = _parsed(line.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            return number == 0 and _whole(path) is not None
        if not isinstance(record, dict):
            return number == 0 and isinstance(record, list)
    return True


def _check(path: str, head: bytes, packed: bool) -> None:
    """Refuses a file whose first bytes show that it is not text."""
    inside = f"{path}, unpacked," if packed else path
    for magic, what in _REFUSED.items():
        require(not head.startswith(magic), f"{inside} {what}.")
    require(_unpacker(head) is None, f"{path} is compressed twice: unpack it first.")
    require(head[_TAR] != b"ustar", f"{inside} is a tar archive: unpack it, and name the folder (tar -xf).")
    for mark, name in _MARKS.items():
        require(not head.startswith(mark), f"{inside} is {name}: convert it to UTF-8 (iconv -f {name} -t UTF-8).")
    if head.startswith(_PARQUET):
        return
    # Of UTF-16 without a mark, every other byte of European text is NUL.
    for first, name in ((1, "UTF-16LE"), (0, "UTF-16BE")):
        wide = head[first::2].count(0) > _MANY_NULS * len(head) / 2 and not head[1 - first :: 2].count(0)
        require(not wide, f"{inside} is UTF-16 without a mark: convert it to UTF-8 (iconv -f {name} -t UTF-8).")
    controls = len(_CONTROLS.findall(head)) > _MANY_CONTROLS * len(head) and not _is_utf8(head)
    binary = controls or head.count(0) > _LARGEST_SHARE * len(head)
    require(not binary, f"{inside} is binary, and no text: name another file.")
    require(
        b"\n" in head or not _ENDS_IN_CR.search(head),
        f"{inside} ends its lines with CR alone, as old Macintosh files do: convert it (tr '\\r' '\\n').",
    )


def _is_utf8(head: bytes) -> bool:
    """Whether this may begin a text; its last character may be cut."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def _check_share(path: str, invalid: int, lines: int) -> None:
    require(
        invalid <= max(_FEW, _LARGEST_SHARE * lines),
        f"{path} is no UTF-8 text: {invalid:,} of its first {lines:,} lines are not UTF-8, or hold NUL: convert it "
        "(iconv -f LATIN1 -t UTF-8, or whatever it is in), or leave it out.",
    )


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """A file to read unpacked bytes from, and the one on the disk, which is the same where nothing is packed."""
    try:
        with open(path, "rb") as raw:
            new = _unpacker(raw.peek(len(b"BZh91AY&SY")))
            yield (raw if new is None else io.BufferedReader(_Blocks(_unpacked(path, raw, new)))), raw
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from error


def _unpacker(head: bytes) -> Callable[[], Any] | None:
    return next((new for pattern, new in _UNPACKERS.items() if pattern.match(head)), None)


def _unpacked(path: str, file: BinaryIO, new: Callable[[], Any]) -> Iterator[bytes]:
    """The unpacked bytes of all members of the file, one after the other.

    Python's own readers of bzip2 and xz stop without a word at a member whose first bytes are damaged.
    """
    data = file.read(_STEP)
    while data:
        unpacker = new()
        while data and not unpacker.eof:
            try:
                block = unpacker.decompress(data)
            except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                raise InputError(f"{path} is damaged, and cannot be unpacked ({error}): copy it again.") from error
            yield block
            data = unpacker.unused_data or file.read(_STEP)
        require(unpacker.eof, f"{path} is cut off before its compressed text ends: copy it again.")
        while data and not (data := data.lstrip(b"\0")):  # tapes and xz pad with zeros
            data = file.read(_STEP)


class _Blocks(io.RawIOBase):
    """Blocks of bytes as a file."""

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
