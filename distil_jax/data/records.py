"""Records of a source, as dicts: CSV, TSV, JSON lines, Parquet, or anything that the `datasets` library can stream."""

from __future__ import annotations

import contextlib
import csv
import difflib
import glob
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from distil_jax.data.sources import JSON_SUFFIXES, decoded, file_lines, json_records, kind_of
from distil_jax.schema import InputError, require

if TYPE_CHECKING:
    from datasets import IterableDataset

SUFFIXES = (".csv", ".tsv", *JSON_SUFFIXES, ".parquet")
_LARGEST_FIELD = 1 << 24  # characters
_MARK = "\ufeff"  # how a file of UTF-8 may begin, also one that was put under another
_TAB = "\t"
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which JSON can escape and UTF-8 cannot hold


class Records(NamedTuple):
    """The records of a source.

    Attributes:
      rows: where each record stands (`reviews.csv line 3`), for messages, and the record; JSON may hold anything.
      class_names: of the fields whose numbers the source itself names, those names in their order.
      counts: what was passed over so far; see `table_records`.
    """

    rows: Iterator[tuple[str, Any]]
    class_names: dict[str, tuple[str, ...]]
    counts: Counter[str]


def read_records(source: str) -> Records:
    """Opens a source; its records are read lazily.

    Args:
      source: a file, also compressed, known by its first bytes and its suffix, or `hub:NAME[:CONFIG[:SPLIT]]`. CSV is
        quoted in the standard way and TSV not at all, as GLUE's files are, whose texts hold single quotes; the first
        line of both names the fields.

    Raises:
      InputError: a source that cannot be read; also while it is read, with the line that is wrong.
    """
    counts: Counter[str] = Counter()
    if not source.startswith("hub:"):
        require(Path(source).is_file(), f"There is no file {source!r}: check it (hub data sets are hub:NAME).")
    kind = "hub" if source.startswith("hub:") else kind_of(source)
    require(kind != "text", f"{source} is no source of examples: name a {', '.join(SUFFIXES)} or hub:NAME.")
    if kind in ("hub", "parquet"):
        stream = open_stream(source)
        records = ((f"{source} record {number}", record) for number, record in stream_records(source, stream))
        return Records(records, _class_names(stream), counts)
    records = json_records(source) if kind == "json" else table_records(source, kind, counts)
    return Records(((f"{source} {place}", record) for place, record in records), {}, counts)


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
        # It takes a name for a pattern, as a shell does.
        return datasets.load_dataset("parquet", data_files=glob.escape(source), split="train", streaming=True)


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

    names_of = {}
    for name, feature in (stream.features or {}).items():  # None: the source says nothing about its fields
        inner = feature.feature if isinstance(feature, (datasets.List, datasets.LargeList)) else feature
        if isinstance(inner, datasets.ClassLabel):
            names_of[name] = tuple(inner.names)
    return names_of


def table_records(path: str, kind: str, counts: Counter[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a CSV or TSV file, each with its place (`line 3`); empty lines are left out.

    Args:
      kind: "csv" or "tsv".
      counts: `bytes`, as for `file_lines`, and `unnamed_fields`, the rows with something in a field that the first line
        does not name, which is left out, are added up here.

    Raises:
      InputError: a line that is no text, has another number of fields than the first one, or repeats it.
    """
    rows = _table_rows(path, kind, counts)
    _, header = next(rows, (0, []))
    require(bool(header), f"{path} is empty: its first line must name the fields.")
    _check_header(path, kind, header)
    for line, row in rows:
        require(
            len(row) == len(header),
            f"{path} line {line} has {len(row)} fields, but the first line names {len(header)} ({', '.join(header)}).",
        )
        require(
            [row[0].removeprefix(_MARK), *row[1:]] != header,
            f"{path} line {line} repeats the first line, which names the fields: it looks like two files under one "
            "another, so remove that line.",
        )
        counts["unnamed_fields"] += any(value for name, value in zip(header, row, strict=True) if not name)
        yield f"line {line}", {name: value for name, value in zip(header, row, strict=True) if name}


def _check_header(path: str, kind: str, header: list[str]) -> None:
    twice = [name for name, count in Counter(header).items() if name and count > 1]
    require(not twice, f"The first line of {path} names the field {', '.join(map(repr, twice))} twice.")
    others = [mark for mark in ("\t", ";", "|", ",") if mark in header[0]]
    names = {"\t": "a tab", ";": "a semicolon", "|": "a bar", ",": "a comma"}
    require(
        len(header) > 1 or not others,
        f"The first line of {path} names one field, {header[0]!r}: it seems to be separated by "
        f"{' and '.join(names[mark] for mark in others)}, and a .{kind} file is by "
        f"{names[',' if kind == 'csv' else _TAB]}: save it anew, or give it the suffix of what it is.",
    )


def _table_rows(path: str, kind: str, counts: Counter[str]) -> Iterator[tuple[int, list[str]]]:
    """The fields of each row with the number of its first line, where an unclosed quote began."""
    texts = (text for _, text in decoded(path, file_lines(path, counts), None))
    csv.field_size_limit(_LARGEST_FIELD)  # of the module: Python's own, 128 KiB, is less than many a document
    if kind == "tsv":
        reader = csv.reader(texts, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(texts, strict=True)  # text after a closing quote is an error, and not guessed at
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            sentence = f"{path} line {line} is not {kind.upper()} ({error}): quote its texts, or use JSONL."
            raise InputError(sentence) from error
        if row is None:
            return
        if row:
            yield line, row
