"""Records of a source, as dicts: CSV, TSV, JSON lines, Parquet, or anything that the `datasets` library can stream."""

from __future__ import annotations

import codecs
import contextlib
import csv
import difflib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from distil_jax.schema import InputError, require

if TYPE_CHECKING:
    from datasets import IterableDataset

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
SUFFIXES = (".csv", ".tsv", *JSON_SUFFIXES, ".parquet")
_LARGEST_FIELD = 1 << 24  # characters
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which JSON can escape and UTF-8 cannot hold


class Records(NamedTuple):
    """What a source holds.

    Attributes:
      rows: where each record stands (`reviews.csv line 3`), for messages, and the record; JSON may hold anything.
      class_names: of the fields whose numbers the source itself names, those names in their order.
    """

    rows: Iterator[tuple[str, Any]]
    class_names: dict[str, tuple[str, ...]]


def read_records(source: str) -> Records:
    """Opens a source; its records are read as they are asked for.

    Args:
      source: a file, known by its suffix, or `hub:NAME[:CONFIG[:SPLIT]]`. CSV is quoted in the standard way and TSV not
        at all, as GLUE's files are, whose texts hold single quotes; the first line of both names the fields.

    Raises:
      InputError: a source that cannot be read; also while it is read, with the line that is wrong.
    """
    if source.startswith("hub:") or source.endswith(".parquet"):
        if not source.startswith("hub:"):
            _check_file(source)
        stream = open_stream(source)
        records = ((f"{source} record {number}", record) for number, record in stream_records(source, stream))
        return Records(records, _class_names(stream))
    require(source.endswith(SUFFIXES), f"{source} is no source of examples: name a {', '.join(SUFFIXES)} or hub:NAME.")
    _check_file(source)
    if source.endswith(JSON_SUFFIXES):
        lines = json_records(source, _lines(source))
        return Records(((f"{source} line {number}", record) for number, record in lines), {})
    return Records(_table_records(source), {})


def field_of(record: Any, field: str, where: str) -> Any:
    """The value of a field.

    Raises:
      InputError: the record is no object, or has no such field; its own are named.
    """
    require(
        isinstance(record, dict), f"{where} is a {type(record).__name__}: each must be an object with named fields."
    )
    if field not in record:
        near = difflib.get_close_matches(field, record, n=1)
        hint = f"did you mean {near[0]!r} of" if near else "choose one of"
        raise InputError(f"{where} has no field {field!r}: {hint} its own ({', '.join(record) or 'none'}).")
    return record[field]


def json_records(path: str, lines: Iterable[bytes], counts: Counter[str] | None = None) -> Iterator[tuple[int, Any]]:
    """Numbered lines of JSON, empty ones left out.

    Args:
      counts: `invalid_lines`, those that are not UTF-8, are counted here and skipped; None: they are refused.

    Raises:
      InputError: a line that is not JSON.
    """
    for number, raw in enumerate(lines, start=1):
        try:
            if line := raw.decode("utf-8-sig").strip():
                yield number, json.loads(line)
        except UnicodeDecodeError as error:
            if counts is None:
                raise InputError(f"{path} line {number} is not UTF-8: convert the file to UTF-8.") from error
            counts["invalid_lines"] += 1
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} line {number} is not JSON ({error}): each line must be one object.") from error


def open_stream(source: str) -> IterableDataset:
    """A Parquet file or `hub:NAME[:CONFIG[:SPLIT]]` as `datasets` streams it; the split is `train` unless given.

    Raises:
      InputError: there is no such data set, or it cannot be reached or read.
    """
    import datasets

    name, config, split = (*source.removeprefix("hub:").split(":"), "", "")[:3]
    with _refusals(source):
        if source.startswith("hub:"):
            return datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        return datasets.load_dataset("parquet", data_files=source, split="train", streaming=True)


def stream_records(source: str, stream: IterableDataset) -> Iterator[tuple[int, Any]]:
    """The numbered records of what `open_stream` opened.

    Raises:
      InputError: they cannot be read.
    """
    with _refusals(source):
        yield from enumerate(stream, start=1)


@contextlib.contextmanager
def _refusals(source: str) -> Iterator[None]:
    try:
        yield
    # What `datasets` and pyarrow raise for names, configs, splits, connections and damaged files.
    except (OSError, ValueError, TypeError, LookupError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise InputError(f"Cannot read {source} with the datasets library: {reason}.") from error


def _class_names(stream: IterableDataset) -> dict[str, tuple[str, ...]]:
    import datasets

    found = {}
    for name, feature in (stream.features or {}).items():  # None: the source says nothing about its fields
        inner = feature.feature if isinstance(feature, (datasets.List, datasets.LargeList)) else feature
        if isinstance(inner, datasets.ClassLabel):
            found[name] = tuple(inner.names)
    return found


def _check_file(path: str) -> None:
    require(Path(path).is_file(), f"There is no file {path!r}: check it (hub data sets are hub:NAME).")


def _lines(path: str) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            yield from file
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from error


def _table_records(path: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a CSV or TSV file; empty lines are left out."""
    rows = _table_rows(path)
    _, header = next(rows, (0, []))
    require(bool(header), f"{path} is empty: its first line must name the fields.")
    twice = [name for name, count in Counter(header).items() if count > 1]
    require(not twice, f"The first line of {path} names the field {', '.join(map(repr, twice))} twice.")
    for line, row in rows:
        require(
            len(row) == len(header),
            f"{path} line {line} has {len(row)} fields, but the first line names {len(header)} ({', '.join(header)}).",
        )
        yield f"{path} line {line}", dict(zip(header, row, strict=True))


def _table_rows(path: str) -> Iterator[tuple[int, list[str]]]:
    """The fields of each row, with the number of its first line: where a quote was opened that nothing closes."""
    texts = _text_lines(path)
    csv.field_size_limit(_LARGEST_FIELD)  # of the module: Python's own, 128 KiB, is less than many a document
    if path.endswith(".tsv"):
        reader = csv.reader(texts, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(texts, strict=True)  # text after a closing quote is an error, and not guessed at
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            kind = path[-3:].upper()
            raise InputError(f"{path} line {line} is not {kind} ({error}): quote its texts, or use JSONL.") from error
        if row is None:
            return
        if row:
            yield line, row


def _text_lines(path: str) -> Iterator[str]:
    for number, raw in enumerate(_lines(path), start=1):
        utf16 = number == 1 and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        require(not utf16, f"{path} is UTF-16: convert it to UTF-8 (iconv -f UTF-16 -t UTF-8).")
        require(b"\0" not in raw, f"{path} line {number} holds a NUL character: it is damaged, or no text.")
        try:
            yield raw.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{path} line {number} is not UTF-8: convert the file to UTF-8.") from error
