"""Reads records, as dicts, from CSV, TSV, JSON lines, Parquet, or any data set that `datasets` can stream."""

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

from distil_jax.data.sources import JSON_SUFFIXES, decode_lines, file_lines, json_records, kind_of
from distil_jax.schema import InputError, require

if TYPE_CHECKING:
    from datasets import IterableDataset

SUFFIXES = (".csv", ".tsv", *JSON_SUFFIXES, ".parquet")
_LARGEST_FIELD = 1 << 24  # characters
_BYTE_ORDER_MARK = "\ufeff"  # may start a UTF-8 file, and so be inside one that was concatenated from several
_SEPARATORS = {"\t": "a tab", ";": "a semicolon", "|": "a bar", ",": "a comma"}
SURROGATE = re.compile("[\ud800-\udfff]")  # an unpaired surrogate: JSON can escape it, but UTF-8 cannot encode it


class Records(NamedTuple):
    """The records of a source.

    Attributes:
      rows: the place of each record (`reviews.csv line 3`), for messages, and the record. A record from JSON may be any
        JSON value.
      class_names: field -> names of its classes, in the order of their indices, where the source declares them.
      counts: of the rows read so far; see `table_records`.
    """

    rows: Iterator[tuple[str, Any]]
    class_names: dict[str, tuple[str, ...]]
    counts: Counter[str]


def read_records(source: str) -> Records:
    """Opens a source. Its records are read lazily.

    Args:
      source: a file, possibly compressed, or `hub:NAME[:CONFIG[:SPLIT]]`. The kind of a file follows from its first
        bytes and its suffix. The first line of CSV and TSV names the fields. CSV has standard quoting. TSV has none, as
        in GLUE's files, whose texts contain unpaired quotes.

    Raises:
      InputError: the source cannot be read. Iterating over the rows raises it too, with the place of a bad record.
    """
    counts: Counter[str] = Counter()
    if not source.startswith("hub:"):
        require(Path(source).is_file(), f"There is no file {source!r}: check it (hub data sets are hub:NAME).")
    kind = "hub" if source.startswith("hub:") else kind_of(source)
    require(kind != "text", f"{source} is plain text, not records: name a {', '.join(SUFFIXES)} file or hub:NAME.")
    if kind in ("hub", "parquet"):
        stream = open_stream(source)
        records = ((f"{source} record {number}", record) for number, record in stream_records(source, stream))
        return Records(records, _class_names(stream), counts)
    records = json_records(source) if kind == "json" else table_records(source, kind, counts)
    return Records(((f"{source} {place}", record) for place, record in records), {}, counts)


def field_of(record: Any, field: str, where: str) -> Any:
    """The value of a record's field.

    Args:
      record: any JSON value.
      field: its name.
      where: the place of the record, for messages.

    Raises:
      InputError: the record is not an object, or has no such field.
    """
    require(
        isinstance(record, dict), f"{where} is a {type(record).__name__}: each must be an object with named fields."
    )
    if field not in record:
        near = difflib.get_close_matches(field, record, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "name one of these."
        raise InputError(f"{where} has no field {field!r} (its fields: {', '.join(record) or 'none'}): {hint}")
    return record[field]


def open_stream(source: str) -> IterableDataset:
    """Opens a Parquet file or `hub:NAME[:CONFIG[:SPLIT]]` with `datasets`, as a stream. The default split is `train`.

    Raises:
      InputError: there is no such data set, or it cannot be reached or read.
    """
    import datasets

    name, config, split = (*source.removeprefix("hub:").split(":"), "", "")[:3]
    with _datasets_errors(source):
        if source.startswith("hub:"):
            return datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        # `load_dataset` expands patterns in file names.
        return datasets.load_dataset("parquet", data_files=glob.escape(source), split="train", streaming=True)


def stream_records(source: str, stream: IterableDataset) -> Iterator[tuple[int, Any]]:
    """The records of a stream from `open_stream`, numbered from 1.

    Raises:
      InputError: a record cannot be read.
    """
    with _datasets_errors(source):
        yield from enumerate(stream, start=1)


@contextlib.contextmanager
def _datasets_errors(source: str) -> Iterator[None]:
    """Turns the errors of the `datasets` library into `InputError`."""
    try:
        yield
    # What `datasets` and pyarrow raise for a wrong name, config or split, a lost connection or a damaged file.
    except (OSError, ValueError, TypeError, LookupError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise InputError(f"Cannot read {source} with the datasets library: {reason}.") from error


def _class_names(stream: IterableDataset) -> dict[str, tuple[str, ...]]:
    import datasets

    class_names = {}
    for field, feature in (stream.features or {}).items():  # None: the source does not declare its fields
        inner = feature.feature if isinstance(feature, (datasets.List, datasets.LargeList)) else feature
        if isinstance(inner, datasets.ClassLabel):
            class_names[field] = tuple(inner.names)
    return class_names


def table_records(path: str, kind: str, counts: Counter[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a CSV or TSV file, each with its place (`line 3`). Empty lines are skipped.

    Args:
      path: the file, possibly compressed.
      kind: "csv" or "tsv".
      counts: incremented here are `bytes`, as in `file_lines`, and `unnamed_fields`, the rows with a value in a column
        that has no name. Such values are left out.

    Raises:
      InputError: a line that is not text, has another number of fields than the first line, or repeats it.
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
            [row[0].removeprefix(_BYTE_ORDER_MARK), *row[1:]] != header,
            f"{path} line {line} repeats the first line, which names the fields: two files seem to be concatenated, so "
            "remove that line.",
        )
        counts["unnamed_fields"] += any(value for name, value in zip(header, row, strict=True) if not name)
        yield f"line {line}", {name: value for name, value in zip(header, row, strict=True) if name}


def _check_header(path: str, kind: str, header: list[str]) -> None:
    """Raises `InputError` for repeated names, or for a single name that looks like several with another separator."""
    repeated = [name for name, count in Counter(header).items() if name and count > 1]
    require(not repeated, f"The first line of {path} names the field {', '.join(map(repr, repeated))} twice.")
    present = [name for separator, name in _SEPARATORS.items() if separator in header[0]]
    expected = _SEPARATORS["," if kind == "csv" else "\t"]
    require(
        len(header) > 1 or not present,
        f"The first line of {path} names one field, {header[0]!r}: its fields seem to be separated by "
        f"{' and '.join(present)}, but those of a .{kind} file are separated by {expected}: save it again with that "
        "separator, or rename it.",
    )


def _table_rows(path: str, kind: str, counts: Counter[str]) -> Iterator[tuple[int, list[str]]]:
    """The fields of each row, with the number of the row's first line. A quoted field may span several lines."""
    lines = (line for _, line in decode_lines(path, file_lines(path, counts), None))
    csv.field_size_limit(_LARGEST_FIELD)  # for the whole process; the default of 128 KiB is less than many documents
    if kind == "tsv":
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(lines, strict=True)  # text after a closing quote is an error
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise InputError(
                f"{path} line {line} is not {kind.upper()} ({error}): quote its texts, or use JSONL."
            ) from error
        if row is None:
            return
        if row:
            yield line, row
