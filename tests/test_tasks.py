"""Examples of a task become rows as `transformers` would cut them; the split holds; bad input is named by its line."""

from __future__ import annotations

import csv
import io
import itertools
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from distil_jax.config.load import load_task
from distil_jax.config.model import HeadConfig, ModelConfig
from distil_jax.config.run import EMBEDDED_TEACHER, MeshConfig
from distil_jax.config.step import OptimizerConfig, StepConfig
from distil_jax.config.task import TaskConfig
from distil_jax.data import loader
from distil_jax.data.examples import read_splits
from distil_jax.data.loader import RowTable
from distil_jax.data.summary import summarize
from distil_jax.data.task_table import TaskTable
from distil_jax.data.tasks import read_task
from distil_jax.data.tokenizer import load_tokenizer
from distil_jax.evaluation.tasks import TaskEvaluator
from distil_jax.schema import InputError
from distil_jax.structs import IGNORED, Mean
from distil_jax.training.sharding import make_mesh

PRESETS = sorted(path.stem for path in (Path(__file__).parents[1] / "configs" / "tasks").glob("*.toml"))
WORDS = ["the", "a", "film", "was", "unwatchably", "good,", "bad", "—", "naïve!", "1990s", "$5", "don't", "e-mail"]
WORDS += ["字漢", "Ünïcödé", "extraordinarily", "\u200b", "\u0301"]  # of the last two nothing is left
PAIR = ("premise", "hypothesis")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(EMBEDDED_TEACHER)


def write(path: Path, records: list[dict]) -> str:
    """The records in the format of the suffix."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif path.suffix == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, records[0])
        writer.writeheader()
        writer.writerows(records)
        path.write_text(text.getvalue(), newline="")
    elif path.suffix == ".tsv":
        lines = ["\t".join(map(str, record.values())) for record in records]
        path.write_text("\n".join(["\t".join(records[0]), *lines]) + "\n")
    else:
        import pyarrow as pa
        import pyarrow.parquet

        pa.parquet.write_table(pa.Table.from_pylist(records), path)
    return str(path)


def sentences(count: int, seed: int, longest: int = 30) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(0, longest))) for _ in range(count)]


def text_task(tmp_path, records, **settings) -> TaskConfig:
    return TaskConfig(train=write(tmp_path / "train.jsonl", records), **{"dev_share": 0.3} | settings)


def tables(task, length=24):
    data = read_task(task, EMBEDDED_TEACHER, vocab_size=6144, max_length=length)
    return data.train, data.dev


def same(first, second) -> bool:
    return all(itertools.starmap(np.array_equal, zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)))


# Rows


@pytest.mark.parametrize("length", [8, 24, 64])
@pytest.mark.parametrize("fields", [("premise",), PAIR])
def test_rows_are_those_of_transformers(tmp_path, tokenizer, fields, length):
    first, second = sentences(80, seed=1), sentences(80, seed=2)
    records = [
        {"premise": a, "hypothesis": b, "label": n % 2} for n, (a, b) in enumerate(zip(first, second, strict=True))
    ]
    path = write(tmp_path / "dev.jsonl", records)
    data = read_task(
        TaskConfig(train=path, dev=path, text=fields), EMBEDDED_TEACHER, vocab_size=6144, max_length=length
    )
    batch = data.train.gather(np.arange(80))
    expected = load_tokenizer(EMBEDDED_TEACHER)(
        first, *([second] if len(fields) == 2 else []), truncation=True, max_length=length, padding="max_length"
    )
    assert batch.input_ids.tolist() == expected["input_ids"]
    assert batch.segment_ids.tolist() == expected["attention_mask"]
    assert batch.token_type_ids.tolist() == expected["token_type_ids"]
    assert batch.position_ids.tolist() == [list(range(length))] * 80
    assert batch.labels.tolist() == [n % 2 for n in range(80)]
    assert {leaf.dtype for leaf in jax.tree.leaves(batch)} == {np.dtype(np.int32)}
    assert data.train.input_ids.dtype == np.uint16


def test_text_that_names_a_special_token_means_characters(tmp_path, tokenizer):
    records = [{"text": f"a [SEP] b [MASK] {n}", "label": n % 2} for n in range(20)]
    train, dev = tables(text_task(tmp_path, records))
    ids = np.concatenate([train.input_ids, dev.input_ids])
    assert (ids == tokenizer.sep_token_id).sum() == 20
    assert not (ids == tokenizer.mask_token_id).any()


@pytest.mark.parametrize("length", [8, 40])
def test_the_first_token_of_a_word_has_its_label(tmp_path, tokenizer, length):
    draw = random.Random(3)
    words = [draw.choices(WORDS, k=draw.randint(0, 12)) for _ in range(50)]
    names = ["O", "B-X", "I-X"]
    labels = [[draw.choice(names) for _ in each] for each in words]
    records = [{"words": each, "tags": tags} for each, tags in zip(words, labels, strict=True)]
    path = write(tmp_path / "a.jsonl", records)
    task = TaskConfig("tokens", train=path, dev=path, text=("words",), label="tags", label_names=tuple(names))
    table = read_task(task, EMBEDDED_TEACHER, vocab_size=6144, max_length=length).train
    expected = load_tokenizer(EMBEDDED_TEACHER)(
        words, is_split_into_words=True, truncation=True, max_length=length, padding="max_length"
    )
    assert table.gather(np.arange(50)).input_ids.tolist() == expected["input_ids"]
    for row, (each, tags) in enumerate(zip(words, labels, strict=True)):
        wanted = [IGNORED]
        for word, tag in zip(each, tags, strict=True):
            parts = len(tokenizer.tokenize(word))
            wanted += ([names.index(tag)] + [IGNORED] * (parts - 1)) if parts else []
        wanted = (wanted[: length - 1] + [IGNORED] * length)[:length]
        assert table.labels[row].tolist() == wanted
    assert table.gather(np.arange(50), 16).labels.shape == (50, min(16, length))


# Batches


@pytest.fixture
def table() -> TaskTable:
    """Rows of all lengths from 3 to 70, shuffled; their ids tell row and place."""
    lengths = np.random.default_rng(0).permutation(np.arange(3, 71))
    ids = np.where(np.arange(70) < lengths[:, None], np.arange(68 * 70).reshape(68, 70) % 60_000 + 5, 0)
    labels = np.arange(68, dtype=np.int32)
    return TaskTable(ids.astype(np.uint16), lengths.astype(np.int32), (lengths // 2).astype(np.int32), labels, 0)


def test_a_bucket_is_the_smallest_that_loses_nothing(table):
    draw = np.random.default_rng(1)
    for _ in range(200):
        numbers = draw.integers(len(table), size=draw.integers(1, 5))
        length, longest = table.bucket(numbers), table.lengths[numbers].max()
        assert longest <= length
        assert length in (16, 32, 64, 70)
        assert length == 16 or longest > (64 if length == 70 else length // 2)
        short, whole = table.gather(numbers, length), table.gather(numbers)
        assert not whole.input_ids[:, length:].any() and not whole.segment_ids[:, length:].any()
        assert np.array_equal(short.input_ids, whole.input_ids[:, :length])
        assert np.array_equal(short.segment_ids.sum(axis=1), table.lengths[numbers])
        assert np.array_equal(short.token_type_ids.sum(axis=1), (table.lengths - table.second_start)[numbers])
        assert np.array_equal(short.row_index, numbers)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_batches_come_in_the_order_of_the_loader(table, processes):
    plain = RowTable(table.input_ids, (table.input_ids > 0).astype(np.uint16))
    expected = loader.batches(plain, batch_rows=4, seed=3, position=8)
    shares = [
        loader.batches(table, batch_rows=4, seed=3, position=8, places=places)
        for places in np.split(np.arange(4), processes)
    ]
    for _ in range(40):  # beyond one epoch
        parts, rows = [next(share) for share in shares], next(expected)
        assert len({part.input_ids.shape[1] for part in parts}) == 1  # one program on every process
        joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
        assert np.array_equal(joined.row_index, rows.row_index)
        assert np.array_equal(joined.labels, rows.row_index)
        length = joined.input_ids.shape[1]
        assert np.array_equal(joined.input_ids, rows.input_ids[:, :length])
        assert length == table.bucket(rows.row_index)


@pytest.mark.parametrize(("batch_rows", "start"), [(4, 0), (5, 0), (8, 3), (68, 0), (100, 7)])
def test_batches_of_similar_length_hold_every_row_once_an_epoch(table, batch_rows, start):
    grouped = replace(table, by_length=True)
    stream = loader.batches(grouped, batch_rows=batch_rows, seed=3, position=start * batch_rows)
    rows = np.concatenate([next(stream).row_index for _ in range(-(-300 // batch_rows))])
    position = start * batch_rows
    for epoch in range(-(-position // 68), (position + 300) // 68):
        assert sorted(rows[epoch * 68 - position : (epoch + 1) * 68 - position]) == list(range(68))


def test_batches_of_similar_length_have_little_padding(table):
    """After the first epoch too: 68 rows in batches of 5, one of which straddles two epochs."""

    def spread(by_length: bool) -> float:
        stream = loader.batches(replace(table, by_length=by_length), batch_rows=5, seed=0)
        return np.median([np.ptp(table.lengths[next(stream).row_index]) for _ in range(68)])

    assert 5 * spread(True) < spread(False)
    stream = loader.batches(replace(table, by_length=True), batch_rows=5, seed=0)
    widths = [next(stream).input_ids.shape[1] for _ in range(13)]
    assert widths not in (sorted(widths), sorted(widths, reverse=True))


@pytest.mark.parametrize("processes", [1, 5])
def test_batches_of_similar_length_go_on_anywhere(table, processes):
    grouped = replace(table, by_length=True)
    unbroken = loader.batches(grouped, batch_rows=5, seed=1)
    for _ in range(20):
        next(unbroken)
    shares = [
        loader.batches(grouped, batch_rows=5, seed=1, position=100, places=places)
        for places in np.split(np.arange(5), processes)
    ]
    for _ in range(20):
        joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *[next(share) for share in shares])
        assert same(joined, next(unbroken))


@pytest.mark.parametrize(("batch_rows", "limit"), [(4, 0), (8, 0), (8, 5), (100, 0), (8, 1000)])
@pytest.mark.parametrize("processes", [1, 2])
def test_judged_rows_come_once_and_are_filled_up(table, batch_rows, limit, processes):
    shares = [
        list(loader.held_out_batches(table, batch_rows=batch_rows, limit=limit, places=places))
        for places in np.split(np.arange(batch_rows), processes)
    ]
    judged = loader.evaluation_rows(68, limit)
    rows, seen = len(judged), 0
    for parts in zip(*shares, strict=True):
        batch = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
        real = min(batch_rows, rows - seen)
        numbers = judged[seen : seen + real]
        assert batch.row_index.tolist() == [*numbers, *range(68, 68 + batch_rows - real)]
        whole = table.gather(numbers, batch.input_ids.shape[1])
        assert same(jax.tree.map(lambda leaf: leaf[:real], batch), whole)  # noqa: B023
        assert not batch.segment_ids[real:].any() and not batch.token_type_ids[real:].any()
        assert (batch.labels[real:] == IGNORED).all()
        assert (batch.segment_ids[:real].sum(axis=1) == table.lengths[numbers]).all()
        seen += real
    assert seen == rows


def test_an_empty_row_of_a_regression_has_no_number(table):
    numbers = replace(table, labels=table.labels.astype(np.float32), pad_id=9)
    (*_, last) = loader.held_out_batches(numbers, batch_rows=64)
    assert last.labels.tolist() == [64.0, 65.0, 66.0, 67.0] + [0.0] * 60
    assert (last.input_ids[4:] == 9).all()


def test_no_examples_are_refused(table):
    empty = jax.tree.map(lambda leaf: leaf[:0], (table.input_ids, table.lengths, table.second_start, table.labels))
    with pytest.raises(InputError, match="no examples to train on"):
        loader.batches(TaskTable(*empty, pad_id=0), batch_rows=2, seed=0)


@pytest.mark.parametrize("kind", ["sequence", "tokens", "regression"])
def test_some_of_the_examples_are_judged_by_their_own_labels(kind):
    """Sorted by label, as files often are: the first of them would be of one class. The model here is always right."""
    labels = np.repeat(np.arange(2, dtype=np.int32), 50)
    if kind == "tokens":
        labels = np.stack([np.full(100, IGNORED, np.int32), labels], axis=1).repeat([1, 15], axis=1)
    if kind == "regression":
        labels = np.linspace(0, 1, 100, dtype=np.float32)
    ids = np.ones((100, 16), np.uint16)
    examples = TaskTable(ids, np.full(100, 16, np.int32), np.full(100, 16, np.int32), labels, pad_id=0)
    head = HeadConfig("sequence" if kind == "regression" else kind, labels=1 if kind == "regression" else 2)
    model = head.encoder(ModelConfig(90, 1, 8, 2, 8, 16))
    step = StepConfig(model, optimizer=OptimizerConfig(steps=1), head=head)
    judge = TaskEvaluator(TaskConfig(kind=kind), step, make_mesh(MeshConfig()), ("O", "B-X"), 8)
    seen = []

    def always_right(state, teacher_params, batch):
        seen.extend(int(row) for row in batch.row_index if row < 100)
        right = batch.labels[..., None] if kind == "regression" else jax.nn.one_hot(batch.labels, 2)
        return {"loss": Mean(batch.labels.sum(), np.float32(len(batch.labels)))}, right

    judge._eval = always_right
    for limit in (0, 30):
        seen.clear()
        result = judge.evaluate(None, examples, limit=limit)
        assert result[judge._task.metric_names[0]] == pytest.approx(1.0)
        assert seen == loader.evaluation_rows(100, limit).tolist()
    assert 5 < sum(row < 50 for row in seen) < 25, "of both classes"


# What trains and what judges


def texts_of(examples) -> list[tuple[str, ...]]:
    return [example.texts for example in examples]


def test_equal_texts_fall_on_one_side_whatever_else_there_is(tmp_path):
    texts = [f"text {n}" for n in range(400)]
    records = [{"text": text, "label": n % 2} for n, text in enumerate(texts * 2)]
    task = text_task(tmp_path, records)
    splits = read_splits(task)
    train, dev = texts_of(splits.train), texts_of(splits.dev)
    assert not {*train} & {*dev} and len(train) + len(dev) == 800
    assert 0.2 < len(dev) / 800 < 0.4
    assert texts_of(read_splits(task).dev) == dev  # and always
    half = read_splits(text_task(tmp_path, records[:200]))
    assert {*texts_of(half.dev)} == {*dev} & {(text,) for text in texts[:200]}
    more = read_splits(
        text_task(tmp_path, [{"text": text, "label": n % 2} for n, text in enumerate(texts)], dev_share=0.5)
    )
    assert {*dev} < {*texts_of(more.dev)}


def test_fewer_training_examples_are_some_of_the_more(tmp_path):
    records = [{"text": f"text {n}", "label": n % 2} for n in range(200)]
    task = text_task(tmp_path, records)
    whole = read_splits(task)
    before: set = set()
    for rows in (1, 10, 50):
        splits = read_splits(replace(task, train_rows=rows))
        kept = texts_of(splits.train)
        assert len(kept) == rows and before < {*kept} and splits.dev == whole.dev
        assert kept == [text for text in texts_of(whole.train) if text in kept]  # in the order of the source
        before = {*kept}
    assert read_splits(replace(task, train_rows=10**6)).train == whole.train
    reverse = read_splits(replace(text_task(tmp_path, records[::-1]), train_rows=50))
    assert {*texts_of(reverse.train)} == before  # by their texts, wherever they stand


def test_a_split_that_leaves_nothing_is_refused(tmp_path):
    records = [{"text": "same", "label": n} for n in range(2)]
    for share, lacking in ((0.001, "evaluate on"), (0.999, "train on")):
        with pytest.raises(InputError, match=rf"leaves none to {lacking}: change task\.dev_share"):
            read_splits(text_task(tmp_path, records, dev_share=share))


def test_the_digest_is_that_of_what_trains_and_judges(tmp_path):
    records = [{"text": f"text {n}", "label": n % 2} for n in range(50)]

    def digest(records, **settings):
        return read_task(
            text_task(tmp_path, records, **settings), EMBEDDED_TEACHER, vocab_size=6144, max_length=24
        ).digest

    first = digest(records)
    assert digest(records) == first and len(first) == 64
    test = write(tmp_path / "test.jsonl", records[:3])
    assert digest(records, test=test) == first
    others = [
        digest([*records[:-1], records[-1] | {"label": 0}]),
        digest([*records[:-1], records[-1] | {"text": "other"}]),
        digest(records, dev_share=0.5),
        digest(records, train_rows=3),
    ]
    assert len({first, *others}) == 5


# What is told of them


def summary_of(tmp_path, kind, train, dev, length=16, **settings):
    paths = {name: write(tmp_path / f"{name}.jsonl", part) for name, part in (("train", train), ("dev", dev))}
    task = TaskConfig(kind, **paths, **{"max_length": length} | settings)
    return summarize(read_task(task, EMBEDDED_TEACHER, vocab_size=6144, max_length=length)).split("\n")


def test_classes_are_told_with_their_counts_and_what_is_doubtful(tmp_path):
    texts = ["a", "b", "a", "a", " ", "the " * 15, "the " * 14]
    train = [{"text": text, "label": label} for text, label in zip(texts, [0, 1, 0, 1, 2, 0, 0], strict=True)]
    dev = [{"text": text, "label": 1} for text in ("b", "c", "c")]
    assert summary_of(tmp_path, "sequence", train, dev, label_names=("no", "yes", "so so")) == [
        "train: no 4, yes 2, so so 1; 1 truncated to the longest row (task.max_length); 1 with an empty text; "
        "2 with the same text as an earlier one; 1 with the same text as an earlier one, but another label",
        "dev: no 0, yes 3, so so 0; 1 with the same text as an earlier one; 1 with the same text as a training example",
    ]
    train = [{"text": f"{n}", "label": n % 25} for n in range(60)]
    assert summary_of(tmp_path, "sequence", train, dev)[0].endswith("19 2, 5 other classes with 2 to 2 each")
    train = [{"text": "a", "label": label} for label in (0.5, 2, 5)]
    assert summary_of(tmp_path, "regression", train, dev)[0].startswith(
        "train: 3 numbers from 0.5 to 5, 2.5 on average; "
    )


def test_of_a_pair_either_text_may_be_empty_or_cut(tmp_path):
    pairs = [("a", ""), ("a", "b"), ("the " * 20, "b"), ("a", "the " * 20)]
    train = [{"premise": a, "hypothesis": b, "label": n % 2} for n, (a, b) in enumerate(pairs)]
    (printed, _) = summary_of(tmp_path, "sequence", train, train[:2], text=PAIR)
    assert printed == "train: 0 2, 1 2; 2 truncated to the longest row (task.max_length); 1 with an empty text"


@pytest.mark.parametrize("length", [8, 16])
def test_words_that_nobody_judges_are_counted(tmp_path, length):
    draw = random.Random(5)
    examples = [draw.choices(WORDS, k=draw.randint(0, 20)) for _ in range(60)]
    records = [{"text": words, "label": [draw.choice("OX") for _ in words]} for words in examples]
    (printed, _) = summary_of(tmp_path, "tokens", records, records, length)
    judged = sum(map(int, re.findall(r" (\d+)", printed.split("; ")[0])))
    cut = int(re.search(r"(\d+) words cut off with their labels", printed)[1])
    empty = int(re.search(r"(\d+) words that the tokenizer gives no token", printed)[1])
    assert judged + cut + empty == sum(map(len, examples)) and cut and empty


def test_answers_that_no_row_holds_are_counted(tmp_path):
    context = "film " * 30 + "good"
    answers = [{"text": ["good"], "answer_start": [150]}, {"text": [context], "answer_start": [0]}]
    questions = ["who?", "what " * 9]
    records = [
        {"question": question, "context": context, "label": answer}
        for question, answer in zip(questions, answers, strict=True)
    ]
    (printed, _) = summary_of(tmp_path, "spans", records, records, text=("question", "context"), stride=2)
    assert re.fullmatch(
        r"train: 2 questions in \d+ rows; 1 questions truncated to half of a row; "
        r"1 answers that no row contains as a whole",
        printed,
    )


# Sources and labels


def test_every_format_gives_the_same_rows(tmp_path):
    draw = random.Random(4)
    texts = [f'{n} a "quote and, a comma ' + " ".join(draw.choices(WORDS, k=5)) for n in range(40)]
    records = [{"id": n, "text": text, "label": n % 3} for n, text in enumerate(texts)]
    result = {}
    for suffix in ("csv", "tsv", "jsonl", "parquet"):
        path = write(tmp_path / f"{suffix}.{suffix}", records)
        result[suffix] = read_splits(TaskConfig(train=path, dev_share=0.3))
    (tmp_path / "hub").mkdir()
    write(tmp_path / "hub" / "train.jsonl", records)
    result["hub"] = read_splits(TaskConfig(train=f"hub:{tmp_path / 'hub'}", dev_share=0.3))
    first, *others = [
        [[(example.texts, example.label) for example in side] for side in (splits.train, splits.dev)]
        for splits in result.values()
    ]
    assert all(other == first for other in others) and len(first[0]) + len(first[1]) == 40
    assert {splits.label_names for splits in result.values()} == {("0", "1", "2")}


def test_tsv_knows_no_quotes(tmp_path):
    (tmp_path / "a.tsv").write_text('text\tlabel\n"an open quote\t0\nand "" two\t1\n"all"\t1\n')
    splits = read_splits(TaskConfig(train=str(tmp_path / "a.tsv"), dev=str(tmp_path / "a.tsv")))
    assert texts_of(splits.dev) == [('"an open quote',), ('and "" two',), ('"all"',)]


def test_csv_may_hold_new_lines_and_counts_its_lines(tmp_path):
    text = '\ufefftext,label\r\n"one\ntwo, ""three""",0\n\nfour,1\n"five\n\n",\n'
    (tmp_path / "a.csv").write_text(text, newline="")
    with pytest.raises(InputError, match=r"a\.csv line 6 has no label \(''\)"):
        read_splits(TaskConfig(train=str(tmp_path / "a.csv")))
    (tmp_path / "a.csv").write_text(text.replace('",\n', '",1\n'), newline="")
    splits = read_splits(TaskConfig(train=str(tmp_path / "a.csv"), dev=str(tmp_path / "a.csv")))
    assert texts_of(splits.dev) == [('one\ntwo, "three"',), ("four",), ("five\n\n",)]


def labels_of(tmp_path, labels, **settings):
    path = write(tmp_path / "labels.jsonl", [{"text": "x", "label": label} for label in labels])
    splits = read_splits(TaskConfig(train=path, dev=path, **settings))
    return splits.label_names, [example.label for example in splits.train]


def test_labels_are_numbers_digits_or_names(tmp_path):
    names = ("bad", "fair", "good")
    assert labels_of(tmp_path, [0, "2", "fair", 1.0, True], label_names=names) == (names, [0, 2, 1, 1, 1])
    assert labels_of(tmp_path, ["good", "bad", "good"]) == (("bad", "good"), [1, 0, 1])
    assert labels_of(tmp_path, [10, "9", 100.0, 9]) == (("9", "10", "100"), [1, 0, 2, 0])  # by number, not by letter
    assert labels_of(tmp_path, ["10", "9", "x"]) == (("10", "9", "x"), [0, 1, 2])
    assert labels_of(tmp_path, [False, True]) == (("0", "1"), [0, 1])
    assert labels_of(tmp_path, ["-1", "1"], label_names=("-1", "1")) == (("-1", "1"), [0, 1])
    assert labels_of(tmp_path, [1, "2.5", -3e3], kind="regression") == ((), [1.0, 2.5, -3000.0])


# Kinds of labels that a table of any format can hold; `None` where names of the classes are not given.
KINDS = {
    "small": ([0, 1, 2, 10], None),
    "floats": ([0.0, 1.0, 10.0], None),
    "below zero": ([-1, 0, 1], ("-1", "0", "1")),
    "renamed": ([0, 1, 2], ("bad", "fair", "good")),
    "numbers as names": ([1, 2, 3], ("3", "2", "1")),
    "halves": ([0.5, 1.0, 1.5], ("0.5", "1.0", "1.5")),
    "truth": ([False, True], None),
    "named truth": ([False, True], ("true", "false")),
    "words": (["no", " no", "yes ", "true"], None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_labels_mean_the_same_in_every_format(tmp_path, kind):
    values, names = KINDS[kind]
    draw = random.Random(kind)
    labels = [*values, *draw.choices(values, k=20)]
    records = [{"text": f"text {n}", "label": label} for n, label in enumerate(labels)]
    result = []
    for suffix in ("csv", "tsv", "jsonl", "parquet"):
        path = write(tmp_path / f"a.{suffix}", records)
        splits = read_splits(TaskConfig(train=path, dev=path, label_names=names or ()))
        result.append((splits.label_names, [example.label for example in splits.dev]))
    assert all(other == result[0] for other in result) and set(result[0][1]) == set(range(len(result[0][0])))
    # What judges may come in another format than what trains, and write its numbers in another way.
    ways = (
        [[], [float], [int]] if all(type(label) in (int, float) and label == int(label) for label in values) else [[]]
    )
    for way in ways:
        others = [{**record, "label": way[0](record["label"]) if way else record["label"]} for record in records]
        for train, dev in itertools.permutations(("csv", "jsonl", "parquet"), 2):
            train, dev = write(tmp_path / f"a.{train}", records), write(tmp_path / f"dev.{dev}", others)
            splits = read_splits(TaskConfig(train=train, dev=dev, label_names=names or ()))
            assert (splits.label_names, [example.label for example in splits.dev]) == result[0]


def test_a_number_is_one_number_in_every_format(tmp_path):
    for text, number in (
        ("1_5", None),
        ("\u0661", None),
        ("1,5", None),
        (" 2.50 ", 2.5),
        ("-.5e1", -5.0),
        ("+3.", 3.0),
    ):
        path = tmp_path / "a.csv"
        path.write_text(f'text,label\na,1\nb,"{text}"\n')
        task = TaskConfig("regression", train=str(path), dev=str(path))
        if number is None:
            with pytest.raises(InputError, match=r"line 3 has the label .*: a regression needs a finite number"):
                read_splits(task)
        else:
            assert [example.label for example in read_splits(task).dev] == [1.0, number]
    with pytest.raises(InputError, match="a regression needs a finite number"):
        labels_of(tmp_path, [1.5, True], kind="regression")


def test_labels_that_were_kept_back_are_told_from_classes(tmp_path):
    import datasets

    names = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    for part, labels in (("train", [0, 1]), ("test", [-1, -1])):
        table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": labels}, features=names)
        table.to_parquet(str(tmp_path / f"{part}.parquet"))
    train, test = str(tmp_path / "train.parquet"), str(tmp_path / "test.parquet")
    with pytest.raises(InputError, match=r"record 1 has no label \(-1\), as in the test examples .*: use a source"):
        read_splits(TaskConfig(train=train, dev=train, test=test))
    train = write(tmp_path / "train.jsonl", [{"text": "a", "label": 1.5}, {"text": "b", "label": -1.0}])
    test = write(tmp_path / "test.jsonl", [{"text": "a", "label": -1.0}, {"text": "b", "label": -1.0}])
    with pytest.raises(InputError, match=r"Every label of .*test\.jsonl is -1, as in the test examples"):
        read_splits(TaskConfig("regression", train=train, dev=train, test=test))
    words = [{"text": ["a", "b"], "label": labels} for labels in ([0, 1], [1, -100])]
    words = write(tmp_path / "words.jsonl", words)
    with pytest.raises(InputError, match=r"line 2 has the label -100: .*if it means that there is no label"):
        read_splits(TaskConfig("tokens", train=words))


@pytest.mark.parametrize("many", [False, True])
def test_the_names_of_a_source_are_taken(tmp_path, many):
    import datasets

    def save(name: str, names: list[str]) -> str:
        kinds = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
        features = datasets.Features({key: datasets.List(kind) for key, kind in kinds.items()} if many else kinds)
        datasets.Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / name))
        return str(tmp_path / name)

    columns = {"text": ["a", "b", "c"], "label": [1, 0, 1]}
    columns = {key: [[value] for value in values] for key, values in columns.items()} if many else columns
    path = save("a.parquet", ["O", "B-X"])
    task = TaskConfig("tokens" if many else "sequence", train=path, dev=path)
    splits = read_splits(task)
    assert splits.label_names == ("O", "B-X")
    assert [example.label for example in splits.train] == columns["label"]
    assert read_splits(replace(task, label_names=("no", "yes"))).label_names == ("no", "yes")
    with pytest.raises(InputError, match=r"other\.parquet names the labels B-X, O, but .*a\.parquet names O, B-X"):
        read_splits(replace(task, dev=save("other.parquet", ["B-X", "O"])))
    with pytest.raises(InputError, match=r"a\.parquet names the labels O, B-X, but the task names B-X, O: its indices"):
        read_splits(replace(task, label_names=("B-X", "O")))
    with pytest.raises(InputError, match=r"label 1: it may be the name or the index of a label"):
        read_splits(replace(task, label_names=("1", "0")))
    if not many:  # numbers of a source without names do not count those of another one
        words = write(tmp_path / "words.csv", [{"text": "a", "label": "B-X"}, {"text": "b", "label": "O"}])
        with pytest.raises(InputError, match=r"a\.parquet names the labels O, B-X, but the task names B-X, O"):
            read_splits(TaskConfig(train=words, dev=path))


# Presets


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_loads(name):
    config = load_task(name, ["model.path=x"])
    assert config.task.train.startswith("hub:")
    assert config.task.metric_names
    header = (Path(__file__).parents[1] / "configs" / "tasks" / f"{name}.toml").read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    (command,) = re.findall("distil-jax finetune .*", header)
    assert name in command.split() and "MODEL" in command


# Bad input


SOUND = '{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n'


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"", r"a\.csv is empty: its first line must name the fields"),
        ("a.csv", b"\n\n", r"a\.csv is empty"),
        ("a.csv", b"text,label\n", r"a\.csv has no examples"),
        ("a.csv", b"text,label\na,0\nb\n", r"a\.csv line 3 has 1 fields, but the first line names 2 \(text, label\)"),
        ("a.tsv", b"text\tlabel\na\t0\n\nb\t1\t2\n", r"a\.tsv line 4 has 3 fields"),
        ("a.csv", b"text,label,text\na,0,b\n", r"first line of .*a\.csv names the field 'text' twice"),
        ("a.csv", b"text,label\na,0\n\xff,1\n", r"a\.csv line 3 is not UTF-8"),
        ("a.jsonl", SOUND.encode() + b'{"text": "\xff"}\n', r"a\.jsonl line 3 is not UTF-8"),
        ("a.tsv", "text\tlabel\n".encode("utf-16"), r"a\.tsv is UTF-16: convert"),
        ("a.csv", b"text,label\na\0b,0\n", r"a\.csv line 2 contains a NUL"),
        ("a.csv", b"text,label\na,0\n" + b"x" * 17_000_000 + b",1\n", r"a\.csv line 3 is not CSV \(field larger than"),
        ("a.tsv", b"text\tlabel\n" + b"x" * 17_000_000 + b"\t1\n", r"a\.tsv line 2 is not TSV \(field larger than"),
        ("a.csv", b'text,label\n"a,0\nb,1\n', r"a\.csv line 2 is not CSV \(unexpected end of data\)"),
        ("a.csv", b'text,label\n"a"b,0\n', r"a\.csv line 2 is not CSV"),
        ("a.csv", b"a\rtext,label\n", r"a\.csv line 1 is not CSV \(new-line character"),
        (
            "a.csv",
            b"texts,label\na,0\n",
            r"line 2 has no field 'text' \(its fields: texts, .*\): did you mean 'texts'\?",
        ),
        ("a.csv", b"body,label\na,0\n", r"line 2 has no field 'text' \(its fields: body, label\): name one of these"),
        ("a.jsonl", SOUND + '{"text": "a"}\n', r"a\.jsonl line 3 has no field 'label'"),
        ("a.jsonl", SOUND + "\n{", r"a\.jsonl line 4 is not JSON"),
        ("a.jsonl", SOUND + "[1]\n", r"a\.jsonl line 3 is a list"),
        ("a.jsonl", SOUND + '{"text": 1, "label": 0}\n', r"line 3: the field 'text' must be text, not int"),
        ("a.jsonl", SOUND + '{"text": "\\ud800", "label": 0}\n', r"line 3 has an unpaired surrogate"),
        ("a.jsonl", SOUND + '{"text": "a", "label": null}\n', r"line 3 has no label \(None\): leave such"),
        (
            "a.jsonl",
            SOUND + '{"text": "a", "label": -1}\n',
            r'line 3 has the label -1: if .* a class, .*\["-1", "0", "1"\]',
        ),
        ("a.jsonl", SOUND + '{"text": "a", "label": "-1"}\n', r"line 3 has the label -1: .*; if it means .* no label"),
        ("a.jsonl", SOUND + '{"text": "a", "label": 0.5}\n', r"line 3 has the label 0\.5: it must be a whole number"),
        ("a.jsonl", SOUND + '{"text": "a", "label": [0]}\n', r"line 3 has the label \[0\]"),
        ("a.jsonl", '{"text": "a", "label": 1}\n', r"labels of .* are 1: a task needs at least two"),
        ("a.parquet", b"no parquet", r"Cannot read .*a\.parquet with the datasets library"),
        ("a.txt", b"a", r"a\.txt is plain text, not records: name a \.csv"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(InputError, match=message):
        read_splits(TaskConfig(train=str(path), dev=str(path)))


def test_sources_that_are_not_there(tmp_path):
    for name in ("gone.csv", "gone.jsonl", "gone.parquet"):
        with pytest.raises(InputError, match=rf"There is no file '.*{name}'"):
            read_splits(TaskConfig(train=str(tmp_path / name)))
    with pytest.raises(InputError, match=r"Cannot read hub:.*nothing with the datasets library"):
        read_splits(TaskConfig(train=f"hub:{tmp_path / 'nothing'}"))


def test_labels_that_training_lacks_are_named(tmp_path):
    train = write(tmp_path / "a.jsonl", [{"text": "x", "label": label} for label in ("no", "yes")])
    for label, shown in (("maybe", "'maybe'"), (1, "1"), ("0", "'0'")):
        dev = write(tmp_path / "b.jsonl", [{"text": "x", "label": "no"}, {"text": "x", "label": label}])
        with pytest.raises(InputError, match=rf"b\.jsonl line 2 has the label {shown}, but the labels are no, yes"):
            read_splits(TaskConfig(train=train, dev=dev))
    for label in (2, "2", 1e300):
        dev = write(tmp_path / "b.jsonl", [{"text": "x", "label": label}])
        with pytest.raises(InputError, match=r"b\.jsonl line 1 has the label .*, but the labels are no, yes"):
            read_splits(TaskConfig(train=train, dev=dev, label_names=("no", "yes")))
    with pytest.raises(InputError, match=r"line 1 has the label 0, but the labels are 1, 2"):
        labels_of(tmp_path, [0, 1], label_names=("1", "2"))  # a name is a number: numbers are names
    with pytest.raises(InputError, match=r"are a, a: a task needs at least two, all different"):
        labels_of(tmp_path, [0, 1], label_names=("a", "a"))


@pytest.mark.parametrize("label", ["x", "nan", "inf", 1e39, 10**400, [1]])
def test_a_regression_needs_finite_numbers(tmp_path, label):
    with pytest.raises(InputError, match=r"line 2 has the label .*: a regression needs a finite number"):
        labels_of(tmp_path, [1.5, label], kind="regression")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a b", "label": [0]}, "line 2: the field 'text' must be a list of words"),
        ({"text": ["a", 1], "label": [0, 0]}, "must be text, not int"),
        ({"text": ["a"], "label": 0}, "line 2 must have a list of labels"),
        ({"text": ["a"], "label": [0, 1]}, "line 2 has 2 labels for 1 words"),
        ({"text": ["a"], "label": [None]}, r"line 2 has no label \(None\)"),
    ],
)
def test_words_need_one_label_each(tmp_path, record, message):
    path = write(tmp_path / "a.jsonl", [{"text": ["a", "b"], "label": [0, 1]}, record])
    with pytest.raises(InputError, match=message):
        read_splits(TaskConfig("tokens", train=path, dev=path))


def test_rows_too_short_for_a_task_are_refused():
    with pytest.raises(InputError, match="A row of 7 tokens is too short"):
        read_task(TaskConfig(train="x.csv"), EMBEDDED_TEACHER, vocab_size=6144, max_length=7)
