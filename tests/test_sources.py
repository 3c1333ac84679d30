"""What a file is shows in its first bytes: it is read as that, under any name, or refused in a sentence."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from distil_jax.config.task import TaskConfig
from distil_jax.data import corpus, sources
from distil_jax.data.examples import read_splits
from distil_jax.data.records import read_records
from distil_jax.schema import InputError

TEXTS = [f"line {number} of some text, é" for number in range(300)]
PLAIN = "\n".join(TEXTS).encode()
RECORDS = [{"text": text, "label": number % 2} for number, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
LIST = json.dumps(RECORDS, indent=1).encode()
PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
PACKERS |= {".lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE)}


def table(separator: str = ",") -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator)
    writer.writerows([["text", "label"], *(record.values() for record in RECORDS)])
    return text.getvalue().encode()


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def texts_of(*paths: str, counts: Counter[str] | None = None) -> list[str]:
    counts = Counter() if counts is None else counts
    return [piece.text for piece in corpus.read(paths, document="line", counts=counts)]


def refused(path: str, message: str) -> None:
    """By both readers, text's and examples'."""
    with pytest.raises(InputError, match=message):
        texts_of(path)
    with pytest.raises(InputError, match=message):
        list(read_records(path).rows)


@pytest.mark.parametrize("name", ["a.txt", "a", "a.TXT", "a.log"])
@pytest.mark.parametrize("packing", ["", *PACKERS])
def test_compressed_text_is_read_whatever_it_is_called(tmp_path, name, packing):
    data = PACKERS[packing](PLAIN) if packing else PLAIN
    for path in (write(tmp_path / f"{name}{packing}", data), write(tmp_path / name, data)):
        counts: Counter[str] = Counter()
        assert texts_of(path, counts=counts) == TEXTS
        assert counts["bytes"] == len(data) == corpus.size_in_bytes([path])


@pytest.mark.parametrize("packing", PACKERS)
def test_all_members_of_a_compressed_file_are_read_or_it_is_refused(tmp_path, packing):
    first, second = PACKERS[packing](PLAIN + b"\n"), PACKERS[packing](b"the end")
    assert texts_of(write(tmp_path / "a", first + second)) == [*TEXTS, "the end"]
    assert texts_of(write(tmp_path / "b", first + second + b"\0" * 512)) == [*TEXTS, "the end"]
    assert texts_of(write(tmp_path / "empty", PACKERS[packing](b""))) == []
    for broken in (first[:-9], first + b"XX" + second[2:], first[:90] + b"\0" * 20 + first[110:]):
        refused(write(tmp_path / "c.jsonl", broken), "c.jsonl is (damaged, and cannot|cut off)")
    refused(write(tmp_path / "d", PACKERS[packing](gzip.compress(PLAIN))), "d is compressed twice")


@pytest.mark.parametrize("data", [LINES, LIST, json.dumps(RECORDS).encode(), b"\xef\xbb\xbf" + LINES], ids=len)
@pytest.mark.parametrize("name", ["a.JSONL", "wiki_00", "a.txt", "a.json", "a.csv", "a.jsonl.gz", "wiki.bz2"])
def test_json_is_records_under_any_name(tmp_path, name, data):
    path = write(tmp_path / name, PACKERS.get(Path(name).suffix, bytes)(data))
    counts: Counter[str] = Counter()
    assert texts_of(path, counts=counts) == TEXTS
    assert counts["documents"] == 300 and counts["bytes"] == corpus.size_in_bytes([path])
    splits = read_splits(TaskConfig(train=path, dev=path))
    assert [(example.texts[0], example.label) for example in splits.train] == [(r["text"], r["label"]) for r in RECORDS]


@pytest.mark.parametrize(
    "text", ["{braces} are\nno JSON", '{"text": "x"}\nand prose', "[1]\n[2]", '{ "a', "[ {", "{}x"]
)
def test_prose_that_looks_like_json_stays_prose(tmp_path, text):
    assert texts_of(write(tmp_path / "a.txt", text.encode())) == text.split("\n")


def test_tables_are_records_for_text_too(tmp_path):
    for name, data in (("a.csv", table()), ("a.CSV.gz", gzip.compress(table())), ("a.Tsv", table("\t"))):
        path = write(tmp_path / name, data)
        counts: Counter[str] = Counter()
        assert texts_of(path, counts=counts) == TEXTS and counts["bytes"] == len(data)
        assert len(read_splits(TaskConfig(train=path, dev=path)).train) == 300
        with pytest.raises(
            InputError, match=r"line 2 has no field 'body' \(its fields: text, label\): name one with --text-field"
        ):
            list(corpus.read([path], text_field="body", counts=Counter()))


def test_parquet_under_any_name(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    for name in ("a.Parquet", "b.txt", "c[1]", "d*.parquet"):
        pa.parquet.write_table(pa.Table.from_pylist(RECORDS[:3]), tmp_path / name)
        assert texts_of(str(tmp_path / name)) == TEXTS[:3]
        assert corpus.size_in_bytes([str(tmp_path / name)]) is None
        assert [record for _, record in read_records(str(tmp_path / name)).rows] == RECORDS[:3]
    refused(write(tmp_path / "e.gz", gzip.compress((tmp_path / "b.txt").read_bytes())), "is a compressed Parquet file")


def archive(kind: str) -> bytes:
    data = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(data, "w") as file:
            file.writestr("a.txt", PLAIN)
    else:
        with tarfile.open(fileobj=data, mode=kind) as file:
            info = tarfile.TarInfo("a.txt")
            info.size = len(PLAIN)
            file.addfile(info, io.BytesIO(PLAIN))
    return data.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x28\xb5\x2f\xfd\x24\x09", r"is compressed with zstd, .*: decompress it first"),
        (archive("zip"), "is a ZIP archive"),
        (archive("w"), "is a tar archive"),
        (archive("w:gz"), "decompressed, is a tar archive"),
        (b"%PDF-1.7\n", "is a PDF: extract its text"),
        (b"\x7fELF\x02", "is a program"),
        (bytes(range(9)) * 9 + b"\0" * 90, "is binary, not text"),
        (b"\x89PNG\r\n\x1a\n" + random.Random(0).randbytes(90), "is binary, not text"),
        (PLAIN.decode().encode("utf-16"), "is UTF-16: convert it"),
        (PLAIN.decode().encode("utf-32"), "is UTF-32: convert it"),
        (PLAIN.decode().encode("utf-16-le"), "is UTF-16 without a byte order mark: .* -f UTF-16LE"),
        (PLAIN.decode().encode("utf-16-be"), "is UTF-16 without a byte order mark: .* -f UTF-16BE"),
        (PLAIN.replace(b"\n", b"\r"), "ends its lines with CR alone"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_what_is_no_text_is_refused_by_what_it_is(tmp_path, name, data, message):
    refused(write(tmp_path / name, data), rf"{name},? {message}")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_few_lines_that_are_no_text_are_counted_and_many_refused(tmp_path, name):
    good = LINES if name == "a.jsonl" else PLAIN + b"\n"
    for bad in (b'{"text": "\xe9"}\n', b'{"text": "nul \0"}\n'):
        counts: Counter[str] = Counter()
        assert texts_of(write(tmp_path / name, good + bad * 20), counts=counts) == TEXTS
        assert counts["invalid_lines"] == 20
        with pytest.raises(InputError, match="is not UTF-8 text: 40 of its first 340 lines"):
            texts_of(write(tmp_path / name, good + bad * 40))
    # Of a long file that shows early.
    path = write(tmp_path / name, b"\xe9\n" * 5_000_000)
    lines = sources.decode_lines(path, sources.file_lines(path), Counter())
    with pytest.raises(InputError, match="999 of its first 1,000 lines"):
        next(lines)


def test_a_json_object_over_several_lines_and_a_field_twice_are_refused(tmp_path):
    refused(
        write(tmp_path / "a.json", b'{\n "version": 1,\n "data": []\n}\n'), r"one JSON object .* version, data: write"
    )
    refused(
        write(tmp_path / "a.txt", b'{\n "version": 1,\n "data": []\n}\n'), r"one JSON object .* version, data: write"
    )
    refused(
        write(tmp_path / "b.jsonl", b'{"text": "a", "text": "b"}\n'), "line 1 is not JSON .*has the key 'text' twice"
    )
    refused(write(tmp_path / "c.jsonl", LIST[:-1]), "line 1 is not JSON")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (table() + table(), r"a\.csv line 302 repeats the first line.*: two files seem to be concatenated"),
        (table() + b"\xef\xbb\xbf" + table(), r"a\.csv line 302 repeats the first line"),
        (
            table(";"),
            r"names one field, 'text;label': its fields seem to be separated by a semicolon, but .* by a comma",
        ),
        (table("\t"), r"its fields seem to be separated by a tab"),
        (b"sep=;\r\n" + table(";"), r"names one field, 'sep=;'"),
    ],
)
def test_a_table_that_is_another_one_says_so(tmp_path, data, message):
    refused(write(tmp_path / "a.csv", data), message)


def test_fields_without_a_name_are_nobodys_and_what_they_hold_is_counted(tmp_path):
    data = b"text,,label,,\n" + b"".join(b"text %d,,%d,,\n" % (n, n % 2) for n in range(9)) + b"text,more,1,,\n"
    records = read_records(write(tmp_path / "a.csv", data))
    assert [list(record) for _, record in records.rows] == [["text", "label"]] * 10
    assert records.counts["unnamed_fields"] == 1


def test_what_a_folder_holds_beside_its_text_is_counted(tmp_path):
    for folder in ("a", ".git", "a/.checkpoints"):
        (tmp_path / folder).mkdir()
    for name in (
        "a/1.txt",
        "a/2.TXT",
        "a/3.txt.gz",
        "a/4.md",
        "a/notes.rst",
        "a/.4.txt",
        ".git/5.txt",
        "a/.checkpoints/1.txt",
    ):
        write(tmp_path / name, gzip.compress(name.encode()) if name.endswith("gz") else name.encode())
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "same.txt").symlink_to(tmp_path / "a" / "1.txt")
    (tmp_path / "a" / "gone.txt").symlink_to(tmp_path / "gone")
    counts: Counter[str] = Counter()
    assert texts_of(str(tmp_path), str(tmp_path / "a" / ".." / "a" / "1.txt"), counts=counts) == [
        "a/1.txt",
        "a/2.TXT",
        "a/3.txt.gz",
        "a/4.md",
    ]
    assert counts["left_out_files"] == 6 and counts["repeated_files"] == 2


def test_what_holds_no_text_is_counted(tmp_path):
    files = [write(tmp_path / "a.txt", b""), write(tmp_path / "b.txt", b"\n \n"), write(tmp_path / "d.txt", b"text")]
    files.append(write(tmp_path / "c.jsonl", b'{"text": ""}\n{"text": "x"}\n{"text": " \\n "}\n'))
    counts: Counter[str] = Counter()
    assert texts_of(*files, counts=counts) == ["text", "x"]
    assert counts["empty_files"] == 2 and counts["empty_records"] == 2
