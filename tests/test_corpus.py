"""Sources become pieces: documents, keys, invalid text, and inputs that cannot be read."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from distil_jax.data import corpus, docstrings, sources
from distil_jax.schema import InputError


def read(*sources: object, **options) -> list[corpus.Piece]:
    return list(corpus.read([str(source) for source in sources], counts=options.pop("counts", Counter()), **options))


def documents(pieces: list[corpus.Piece]) -> list[list[str]]:
    result: list[list[str]] = []
    for piece in pieces:
        if piece.starts_document:
            result.append([])
        result[-1].append(piece.text)
    return result


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


TEXT = "\n\n  first line \nsecond line\n\n\nthird\r\n\r\nfourth\nfifth"


def test_documents_of_a_text_file(tmp_path):
    file = write(tmp_path / "a.txt", TEXT)
    lines = ["first line", "second line", "third", "fourth", "fifth"]
    assert documents(read(file)) == [lines[:2], lines[2:3], lines[3:]]
    assert documents(read(file, document="file")) == [lines]
    assert documents(read(file, document="line")) == [[line] for line in lines]


def test_counts(tmp_path):
    counts: Counter[str] = Counter()
    file = write(tmp_path / "a.txt", TEXT)
    read(file, counts=counts)
    assert counts == Counter(documents=3, bytes=len(TEXT.encode()))
    assert corpus.size_in_bytes([str(file)]) == len(TEXT.encode())
    assert corpus.size_in_bytes([str(file), "docstrings"]) is None


def test_the_key_is_the_start_of_the_document_whatever_holds_it(tmp_path):
    body = [f"line {number} of the document" for number in range(8000)]  # beyond 64 KB
    start = "\n".join(body).encode()[: 1 << 16]
    expected = hashlib.blake2b(start, digest_size=8).digest()
    text = write(tmp_path / "a.txt", "\n".join(body) + "\n\nother\n")
    changed = write(tmp_path / "b.txt", "\n".join([*body[:-1], "another end"]))
    record = write(tmp_path / "c.jsonl", json.dumps({"text": "\n\n".join(body)}) + "\n")
    for file in (text, changed, record):
        pieces = read(file)[: len(body)]
        assert {piece.key for piece in pieces} == {expected}
        assert [piece.starts_document for piece in pieces] == [True] + [False] * (len(body) - 1)
    assert read(text)[-1].key == hashlib.blake2b(b"other", digest_size=8).digest()


def test_held_out_share_of_keys():
    keys = [hashlib.blake2b(str(number).encode(), digest_size=8).digest() for number in range(20_000)]
    held_out = [key for key in keys if corpus.is_held_out(key, 0.1)]
    assert 0.09 < len(held_out) / len(keys) < 0.11
    assert not any(corpus.is_held_out(key, 0.0) for key in keys)
    assert all(corpus.is_held_out(key, 0.2) for key in held_out)  # a larger share only adds documents


def test_invalid_text_is_skipped_and_counted(tmp_path):
    counts: Counter[str] = Counter()
    text = write(tmp_path / "a.txt", b"good\nbad \xff\xfe byte\nalso good\n")
    record = write(tmp_path / "b.jsonl", b'{"text": "one"}\n{"text": "\xff"}\n{"text": "half \\ud83d\\nwhole"}\n')
    assert documents(read(text, record, counts=counts)) == [["good", "also good"], ["one"], ["whole"]]
    assert counts["invalid_lines"] == 3


def test_byte_order_marks(tmp_path):
    assert read(write(tmp_path / "a.txt", b"\xef\xbb\xbfword\n"))[0].text == "word"
    assert read(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "word"}\n'))[0].text == "word"
    with pytest.raises(InputError, match="UTF-16"):
        read(write(tmp_path / "b.txt", "word\n".encode("utf-16")))


@pytest.mark.parametrize("alphabet", ["ab ", "äß", "字漢語 ", "🙂"])
def test_long_lines_come_in_parts_that_lose_nothing(tmp_path, monkeypatch, alphabet):
    monkeypatch.setattr(corpus, "LONGEST_LINE", 64)
    draw = random.Random(0)
    line = "".join(draw.choices(alphabet, k=2000)).strip()
    file = write(tmp_path / "a.txt", line + "\nend\n")
    counts: Counter[str] = Counter()
    parts = [piece.text for piece in read(file, counts=counts)]
    assert all(len(part.encode()) <= 64 for part in parts)
    assert "".join("".join(parts).split()) == "".join(line.split()) + "end"
    assert counts["invalid_lines"] == 0
    assert counts["bytes"] == file.stat().st_size
    if alphabet == "ab ":  # words of at most 64 bytes stay whole
        assert " ".join(parts).split() == [*line.split(), "end"]


def test_folders_and_globs_in_a_fixed_order_once(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt", "notes.rst", ".hidden.txt"):
        write(tmp_path / name, name)
    assert [piece.text for piece in read(tmp_path)] == ["a.txt", "b.txt", "sub/c.txt"]
    assert [piece.text for piece in read(tmp_path / "*.txt", tmp_path / "a.txt")] == ["a.txt", "b.txt"]
    assert [piece.text for piece in read(tmp_path / "**" / "c.*")] == ["sub/c.txt"]


def test_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    file = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table({"body": ["one\ntwo", "three"], "other": [1, 2]}), file)
    assert documents(read(file, text_field="body")) == [["one", "two"], ["three"]]
    with pytest.raises(InputError, match=r"no field 'text'.*body, other"):
        read(file)
    with pytest.raises(InputError, match="Cannot read"):
        read(write(tmp_path / "b.parquet", b"no parquet"))


def test_data_sets(tmp_path):
    write(tmp_path / "train.jsonl", '{"text": "one\\ntwo"}\n{"text": "three"}\n')
    assert (
        documents(read(f"hub:{tmp_path}")) == documents(read(f"hub:{tmp_path}::train")) == [["one", "two"], ["three"]]
    )
    with pytest.raises(InputError, match=r"Cannot read .*Bad split: test"):
        read(f"hub:{tmp_path}::test")
    with pytest.raises(InputError, match=r"Cannot read hub:.*nothing with the datasets library"):
        read(f"hub:{tmp_path / 'nothing'}")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n\n{"text": \n', "a.jsonl line 3 is not JSON"),
        pytest.param("a.jsonl", "[" * 100_000, "a.jsonl line 1 is not JSON", id="deeper than Python reads"),
        ("a.jsonl", '{"body": "x", "title": "y"}\n', r"line 1 has no field 'text' \(its fields: body, title\)"),
        ("a.jsonl", '{"text": null}\n', "must be text, not NoneType"),
        ("a.json", '["x"]\n', "line 1 is a list"),
    ],
)
def test_broken_records_are_named(tmp_path, name, data, message):
    with pytest.raises(InputError, match=message):
        read(write(tmp_path / name, data))


def test_sources_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"no file, folder or match .*gone\.txt"):
        read(tmp_path / "gone.txt")
    with pytest.raises(InputError, match=r"holds no \.txt"):
        read(tmp_path)
    file = write(tmp_path / "a.txt", "text")

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(sources, "open", refuse, raising=False)  # the tests may run as root, who may read anything
    with pytest.raises(InputError, match=r"Cannot read .*a\.txt: Permission denied"):
        read(file)


PROSE = "The quick brown fox jumps over the lazy dog and runs through the forest until the evening falls"


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two installed packages that repeat each other; reading them must not import them."""
    first, second = tmp_path / "first_package", tmp_path / "second_package"
    first.mkdir()
    second.mkdir()
    write(
        first / "__init__.py",
        f'"""Short.\n\n{PROSE} in the module.\n"""\nraise SystemExit("was imported")\n'
        f'def shared():\n    """{PROSE} under\n    two   names.\n\n    >>> {PROSE}\n\n    {"1234 " * 40}\n    """\n'
        f'if True:\n    class Thing:\n        async def method(self):\n            """{PROSE} in a method."""\n',
    )
    write(second / "__init__.py", f'def other():\n    """{PROSE} under two names."""\n')
    write(second / "template.py", "this is {{ no }} python")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(docstrings, "PACKAGES", ("first_package", "second_package", "not_installed_anywhere"))
    docstrings.paragraphs.cache_clear()
    yield
    docstrings.paragraphs.cache_clear()


def test_docstring_paragraphs_and_their_names(packages):
    assert docstrings.paragraphs() == {
        f"{PROSE} in the module.": {"first_package"},
        f"{PROSE} under two names.": {"shared", "other"},
        f"{PROSE} in a method.": {"method"},
    }


def test_a_paragraph_is_held_out_only_if_all_its_names_are(packages):
    def position(name: str) -> float:
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) / 2**64

    pieces = {piece.text: piece.key for piece in read("docstrings")}
    low, high = sorted((position("shared"), position("other")))
    key = pieces[f"{PROSE} under two names."]
    assert not corpus.is_held_out(key, (low + high) / 2)
    assert corpus.is_held_out(key, (high + 1) / 2)
