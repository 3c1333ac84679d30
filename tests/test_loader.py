"""Rows from disk: the stream is a pure function of one integer, and damage is named."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
import pytest

from distil_jax.data import loader
from distil_jax.data.loader import RowTable
from distil_jax.data.manifest import FORMAT, Manifest, StoredFile, read_manifest, verify
from distil_jax.data.packing import RowWriter
from distil_jax.schema import InputError

LENGTH, ROWS, HELD_OUT, PAD = 16, 23, 5, 9


def write_folder(folder: Path, vocab_size: int = 100) -> dict[str, list[list[list[int]]]]:
    """A folder of random rows as `prepare` would leave it, and the rows themselves."""
    draw = np.random.default_rng(0)
    splits, files, counts = {}, [], {}
    folder.mkdir()
    for split, rows in (("train", ROWS), ("held_out", HELD_OUT)):
        splits[split] = []
        writer = RowWriter(folder / split, LENGTH, vocab_size, PAD)
        for _ in range(rows):
            lengths = draw.integers(1, 6, size=draw.integers(1, 4))
            row = [draw.integers(vocab_size - 90, vocab_size, size=length).tolist() for length in lengths]
            splits[split].append(row)
            writer.write(row)
        files += writer.close()
        counts[split] = writer.counts()
        if split == "train":
            np.save(folder / "token_counts.npy", writer.token_counts)
    files.append(StoredFile("token_counts.npy", (folder / "token_counts.npy").stat().st_size, 0, "0" * 64))
    manifest = Manifest(
        format=FORMAT,
        sequence_length=LENGTH,
        vocab_size=vocab_size,
        pad_id=PAD,
        cls_id=1,
        sep_id=2,
        mask_id=3,
        unk_id=4,
        special_ids=(1, 2, 3, 4, PAD),
        unused_ids=(),
        tokenizer_fingerprint="f",
        files=tuple(files),
        counts={"documents": 3},
        settings={"sources": ["x"]},
        **counts,
    )
    (folder / "manifest.json").write_text(json.dumps(asdict(manifest)))
    return splits


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path / "rows")
    return tmp_path / "rows"


@pytest.fixture
def table(folder):
    return loader.open_rows(folder, "train")


def same(first, second) -> bool:
    return all(itertools.starmap(np.array_equal, zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)))


def concatenate(parts):
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


@pytest.mark.parametrize("vocab_size", [100, 1 << 16, (1 << 16) + 50])
def test_gather_gives_back_what_was_written(tmp_path, vocab_size):
    splits = write_folder(tmp_path / "rows", vocab_size)
    for split, expected in splits.items():
        table = loader.open_rows(tmp_path / "rows", split)
        assert len(table) == len(expected)
        numbers = np.random.default_rng(1).permutation(len(table))
        rows = table.gather(numbers)
        assert {leaf.dtype for leaf in jax.tree.leaves(rows)} == {np.dtype(np.int32)}
        assert rows.row_index.tolist() == numbers.tolist()
        for place, number in enumerate(numbers):
            sequences = expected[number]
            padding = LENGTH - sum(map(len, sequences))
            assert rows.input_ids[place].tolist() == [*itertools.chain(*sequences), *[PAD] * padding]
            segments = [[index] * len(sequence) for index, sequence in enumerate(sequences, start=1)]
            assert rows.segment_ids[place].tolist() == [*itertools.chain(*segments), *[0] * padding]
            positions = [range(len(sequence)) for sequence in sequences]
            assert rows.position_ids[place].tolist() == [*itertools.chain(*positions), *[0] * padding]
    counted = np.bincount(list(itertools.chain(*itertools.chain(*splits["train"]))), minlength=vocab_size)
    assert np.array_equal(np.load(tmp_path / "rows" / "token_counts.npy"), counted)


def test_each_epoch_is_another_permutation(table):
    stream = loader.batches(table, batch_rows=ROWS, seed=5)
    epochs = [tuple(next(stream).row_index) for _ in range(3)]
    assert all(sorted(epoch) == list(range(ROWS)) for epoch in epochs)
    assert len({*epochs, tuple(range(ROWS))}) == 4
    assert tuple(next(loader.batches(table, batch_rows=ROWS, seed=6)).row_index) != epochs[0]


def test_the_order_is_the_same_for_ever():
    """Resuming under another NumPy must meet the same rows: these numbers may never change."""
    assert loader.order(8, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert loader.order(8, 0, 1).tolist() == [5, 3, 7, 2, 4, 1, 0, 6]


def test_resume_and_batch_size_do_not_change_the_stream(table):
    unbroken = concatenate(list(itertools.islice(loader.batches(table, batch_rows=6, seed=1), 12)))  # three epochs
    for position, batch_rows in ((0, 8), (6, 6), (17, 5), (ROWS, 1), (ROWS + 1, 40)):
        resumed = next(loader.batches(table, batch_rows=batch_rows, seed=1, position=position))
        assert same(resumed, jax.tree.map(lambda leaf: leaf[position : position + batch_rows], unbroken))  # noqa: B023


def test_a_batch_may_hold_several_epochs(table):
    rows = table.gather(loader.indices_at(table, 3, 3 * ROWS, seed=2))
    assert np.bincount(rows.row_index).min() >= 2
    assert sorted(rows.row_index[ROWS - 3 : 2 * ROWS - 3]) == list(range(ROWS))


@pytest.mark.parametrize("process_count", [1, 2, 3, 6])
def test_processes_share_the_batch(table, process_count):
    whole = loader.batches(table, batch_rows=6, seed=3, position=12)
    shares = [
        loader.batches(table, batch_rows=6, seed=3, position=12, places=places)
        for places in np.split(np.arange(6), process_count)
    ]
    for _ in range(5):
        assert same(next(whole), concatenate([next(share) for share in shares]))


@pytest.mark.parametrize(("batch_rows", "limit"), [(2, 0), (4, 0), (4, 3), (8, 0), (6, 0), (2, 100)])
@pytest.mark.parametrize("process_count", [1, 2])
def test_held_out_rows_come_once_and_are_filled_up(folder, batch_rows, limit, process_count):
    table = loader.open_rows(folder, "held_out")
    shares = [
        list(loader.held_out_batches(table, batch_rows=batch_rows, limit=limit, places=places))
        for places in np.split(np.arange(batch_rows), process_count)
    ]
    rows = concatenate([concatenate(parts) for parts in zip(*shares, strict=True)])
    judged = loader.evaluation_rows(HELD_OUT, limit)
    real = len(judged)
    total = -(-real // batch_rows) * batch_rows
    assert rows.row_index.tolist() == [*judged, *range(HELD_OUT, HELD_OUT + total - real)]
    assert same(jax.tree.map(lambda leaf: leaf[:real], rows), table.gather(judged))
    assert not rows.segment_ids[real:].any()
    assert not rows.position_ids[real:].any()
    assert (rows.input_ids[real:] == PAD).all()


def test_some_held_out_rows_are_a_random_choice_that_is_always_the_same():
    for limit in (0, 1000, 2000):
        assert loader.evaluation_rows(1000, limit).tolist() == list(range(1000))
    result = {limit: loader.evaluation_rows(1000, limit) for limit in (1, 100, 500)}
    assert result[100][:4].tolist() == [7, 11, 15, 18], "a newer NumPy would judge other rows"
    assert {*result[1]} < {*result[100]} < {*result[500]}
    for limit, rows in result.items():
        assert len(rows) == limit and (np.diff(rows) > 0).all()
    # From everywhere: each tenth of the rows gives about a tenth of the choice.
    assert np.histogram(result[500], 10, (0, 1000))[0].min() > 30


def test_no_rows_are_refused():
    empty = RowTable(np.zeros((0, LENGTH), np.uint16), np.zeros((0, LENGTH), np.uint16))
    with pytest.raises(InputError, match="no rows to train on"):
        loader.batches(empty, batch_rows=6, seed=0)
    assert list(loader.held_out_batches(empty, batch_rows=4)) == []


def edit(folder: Path, **changes) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_sound_folder_reads(folder):
    manifest = read_manifest(folder)
    assert (manifest.train.rows, manifest.held_out.rows) == (ROWS, HELD_OUT)
    assert manifest.files[0].path == "train/input_ids.npy"
    assert json.loads((folder / "manifest.json").read_text()) == json.loads(json.dumps(asdict(manifest)))


def test_a_damaged_manifest_is_named(folder, tmp_path):
    with pytest.raises(InputError, match=r"Cannot read .*nowhere.manifest\.json .*distil-jax prepare"):
        read_manifest(tmp_path / "nowhere")
    text = (folder / "manifest.json").read_text()
    for damaged, message in (
        (text[:-30], "is damaged"),
        ("[1]", "has format None"),
        (text.replace('"format": 1', '"format": 2'), "has format 2, but this version of distil-jax reads 1"),
        (text.replace('"pad_id": 9', '"pad_id": "9"'), "is damaged .*pad_id"),
        (text.replace('"pad_id": 9, ', ""), "is damaged .*pad_id"),
        (text.replace("train/segment_ids.npy", "train/other.npy"), r"does not list train/segment_ids\.npy"),
    ):
        (folder / "manifest.json").write_text(damaged)
        with pytest.raises(InputError, match=message):
            read_manifest(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "train/../../secret", "..\\secret"])
def test_no_path_leaves_the_folder(folder, name):
    (folder.parent / "secret").write_text("x")
    files = json.loads((folder / "manifest.json").read_text())["files"]
    edit(folder, files=[*files, {"path": name, "bytes": 1, "header": 0, "sha256": ""}])
    with pytest.raises(InputError, match="outside the folder"):
        verify(folder)


def test_damaged_files_are_named(folder):
    path = folder / "train" / "segment_ids.npy"
    sound = path.read_bytes()
    path.write_bytes(sound[:-7])
    with pytest.raises(InputError, match=r"train.segment_ids\.npy has [\d,]+ bytes where the manifest says"):
        loader.open_rows(folder)
    path.unlink()
    with pytest.raises(InputError, match=r"train.segment_ids\.npy cannot be read"):
        loader.open_rows(folder)
    path.write_bytes(b"X" + sound[1:])
    with pytest.raises(InputError, match=r"train.segment_ids\.npy is damaged"):
        loader.open_rows(folder)
    path.write_bytes(sound)
    counts = json.loads((folder / "manifest.json").read_text())["train"]
    edit(folder, train=counts | {"rows": ROWS + 1})
    with pytest.raises(InputError, match="where the manifest says"):
        loader.open_rows(folder)


def test_no_header_is_run_as_python(folder):
    """NumPy's own reader raises whatever Python's parser does: MemoryError, SyntaxError, tokenize.TokenError."""
    path = folder / "train" / "segment_ids.npy"
    sound = path.read_bytes()
    for text in (b"(" * 5_000, b"{'descr': '<u2', 'fortran_order': False, 'shape': (23L, 16L), }", b"'", b""):
        header = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
        path.write_bytes(header + sound[len(header) :])
        file = {"path": "train/segment_ids.npy", "bytes": path.stat().st_size, "header": 128, "sha256": ""}
        others = json.loads((folder / "manifest.json").read_text())["files"]
        edit(folder, files=[file, *(other for other in others if other["path"] != file["path"])])
        with pytest.raises(InputError, match=r"segment_ids\.npy is damaged"):
            loader.open_rows(folder)


def test_a_manifest_that_cannot_be_is_refused(folder):
    values = json.loads((folder / "manifest.json").read_text())
    file = values["files"][0]
    for changes, message in (
        ({"vocab_size": 0}, "vocab_size must be from 1"),
        ({"vocab_size": 2**40}, "vocab_size must be from 1"),
        ({"sequence_length": 0}, "sequence_length must be at least 1"),
        ({"unused_ids": [100]}, "has no id 100"),
        ({"mask_id": -1}, "has no id -1"),
        ({"train": values["train"] | {"rows": -1}}, "rows must not be negative"),
        ({"settings": {}}, "settings.sources"),
        ({"tokenizer_fingerprint": "\ud800"}, "text that UTF-8 can hold"),
        ({"files": [*values["files"], file | {"header": -1}]}, "A header of -1"),
        ({"files": [*values["files"], file | {"path": "a\0b"}]}, "outside the folder"),
        ({"files": [*values["files"], file | {"path": "train"}]}, "is not a file"),
    ):
        (folder / "manifest.json").write_text(json.dumps(values | changes))
        with pytest.raises(InputError, match=message):
            read_manifest(folder)


def test_token_counts_are_those_of_the_vocabulary(folder):
    manifest = read_manifest(folder)
    counts = loader.token_counts(folder, manifest)
    assert np.array_equal(counts, np.load(folder / "token_counts.npy"))
    np.save(folder / "token_counts.npy", counts[:-1])
    with pytest.raises(InputError, match=r"holds <i8 \[99\] where the manifest says <i8 \[100\]"):
        loader.token_counts(folder, manifest)


def test_verify_reads_every_byte(folder):
    with pytest.raises(InputError, match=r"token_counts\.npy has changed"):  # the fixture's hash is not real
        verify(folder)
    path = folder / "held_out" / "input_ids.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"held_out.input_ids\.npy has changed"):
        verify(folder)


def test_prefetch_gives_the_same_items():
    assert list(loader.prefetch(range(10))) == list(range(10))
    assert list(loader.prefetch(iter([]))) == []
    assert list(loader.prefetch(iter([None, 1]), depth=1)) == [None, 1]


def test_prefetch_raises_in_turn_and_stops_its_thread():
    def broken():
        yield 1
        yield 2
        raise OSError("the disk is gone")

    items = loader.prefetch(broken(), depth=3)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(items)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_closing_prefetch_stops_its_thread():
    taken = []
    items = loader.prefetch((taken.append(number) or number for number in itertools.count()), depth=2)
    assert next(items) == 0
    items.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
    assert len(taken) <= 4


def test_closing_prefetch_does_not_wait_for_a_source_that_hangs(monkeypatch):
    """A disk that is gone must not keep a run that has ended from ending; Python waits for threads but for daemons."""
    monkeypatch.setattr(loader, "_JOIN_SECONDS", 0.05)
    never = threading.Event()

    def stuck():
        yield 1
        never.wait(60)

    items = loader.prefetch(stuck())
    assert next(items) == 1
    began = time.monotonic()
    items.close()
    assert time.monotonic() - began < 10
    (thread,) = [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
    assert thread.daemon
    never.set()
    thread.join(10)


def test_the_loader_needs_no_heavy_library():
    code = (
        "import sys, distil_jax.data.loader; print({'datasets', 'transformers', 'tokenizers', 'grain', 'pyarrow', "
        "'torch', 'tqdm', 'pandas', 'orbax'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_an_id_that_the_vocabulary_lacks_is_named(folder):
    values = json.loads((folder / "manifest.json").read_text())
    values["vocab_size"] = 50
    (folder / "manifest.json").write_text(json.dumps(values))
    table = loader.open_rows(folder, "train")
    first = np.flatnonzero((np.load(folder / "train" / "input_ids.npy") >= 50).any(axis=1))[0]
    with pytest.raises(InputError, match=rf"Row {first} .* but the vocabulary has 50"):
        table.gather(np.arange(ROWS))
