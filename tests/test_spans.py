"""Question answering: rows as `transformers` would cut them, and answers that come back from their own labels."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace

import numpy as np
import pytest

from distil_jax.config.run import EMBEDDED_TEACHER
from distil_jax.config.task import TaskConfig
from distil_jax.data.examples import Answer, Example, read_splits
from distil_jax.data.spans import SpanTable, answers, span_table
from distil_jax.data.tasks import read_task
from distil_jax.data.tokenizer import load_tokenizer
from distil_jax.schema import InputError

WORDS = [
    "the",
    "film",
    "naïve",
    "unwatchably",
    "1990s",
    "$5million",
    "字漢語",
    "Ünïcödé",
    "e-mail",
    "(AC/DC)",
    "“quoted”",
]
WORDS += ["cats'", "3.5", "of", "a", "\u200b", "x" * 12]
TASK = TaskConfig("spans", text=("question", "context"), label="answers", stride=8)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(EMBEDDED_TEACHER)


def examples(count: int, seed: int, words: tuple[int, int] = (1, 60), question: int = 9) -> list[Example]:
    """Random contexts, some asked about twice, with answers of whole words."""
    draw = random.Random(seed)
    result, context = [], ""
    for number in range(count):
        if number % 3 or not context:
            context = draw.choice(["", "  "]) + draw.choice([" ", "  ", "\n"]).join(
                draw.choices(WORDS, k=draw.randint(*words))
            )
        places = [n for n, word in enumerate(context.split()) if word != "\u200b"]
        if not places:
            context = "a " + context
            places = [0]
        references = []
        for _ in range(draw.randint(1, 3)):
            starts = word_starts(context)
            first = draw.choice(places)
            last = draw.choice([n for n in places if first <= n < first + 5])
            end = starts[last] + len(context.split()[last])
            references.append(Answer(starts[first], context[starts[first] : end]))
        ask = " ".join(draw.choices(WORDS, k=draw.randint(0, question)))
        result.append(Example(f"line {number}", (ask, context), tuple(references)))
    return result


def word_starts(context: str) -> list[int]:
    starts, place = [], 0
    for word in context.split():
        place = context.index(word, place)
        starts.append(place)
        place += len(word)
    return starts


def one_hot(table: SpanTable) -> tuple[np.ndarray, np.ndarray]:
    """The logits of a model that knows the labels."""
    return tuple(np.eye(table.input_ids.shape[1], dtype=np.float32)[table.labels[:, side]] for side in (0, 1))


@pytest.mark.parametrize(("length", "stride"), [(32, 6), (40, 0), (64, 9), (384, 128)])
def test_rows_are_those_of_transformers(tokenizer, length, stride):
    asked = examples(60, seed=length, question=2)
    table = span_table(tokenizer, asked, max_length=length, stride=stride)
    expected = load_tokenizer(EMBEDDED_TEACHER)(
        *([example.texts[side] for example in asked] for side in (0, 1)),
        truncation="only_second",
        max_length=length,
        stride=stride,
        padding="max_length",
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    batch = table.gather(np.arange(len(table)))
    assert batch.input_ids.tolist() == expected["input_ids"]
    assert batch.segment_ids.tolist() == expected["attention_mask"]
    assert batch.token_type_ids.tolist() == expected["token_type_ids"]
    assert table.example_index.tolist() == expected["overflow_to_sample_mapping"]
    assert (len(table) > 60) == (length < 384)
    for row, number in enumerate(table.example_index):
        second, end = table.second_start[row], table.lengths[row] - 1
        ours = table.offsets[number][table.context_start[row] : table.context_start[row] + end - second]
        assert ours.tolist() == [list(each) for each in expected["offset_mapping"][row][second:end]]


def test_text_that_names_a_special_token_means_characters(tokenizer):
    asked = [Example("line 1", ("[MASK]?", "a [SEP] b"), (Answer(2, "[SEP]"),))]
    table = span_table(tokenizer, asked, max_length=64, stride=10)
    assert (table.input_ids == tokenizer.sep_token_id).sum() == 2
    assert not (table.input_ids == tokenizer.mask_token_id).any()
    assert answers(table, *one_hot(table), max_answer=30) == ["[SEP]"]


@pytest.mark.parametrize("length", [8, 12, 31])
@pytest.mark.parametrize("stride", [0, 5, 100])
def test_every_token_of_a_context_is_asked_however_long_the_question(tokenizer, length, stride):
    asked = examples(30, seed=2, question=60)
    table = span_table(tokenizer, asked, max_length=length, stride=stride)
    assert table.lengths.max() <= length
    covered = [set() for _ in asked]
    for row, number in enumerate(table.example_index):
        first, tokens = table.context_start[row], table.lengths[row] - 1 - table.second_start[row]
        covered[number] |= set(range(first, first + tokens))
        assert table.second_start[row] - 2 <= (length - 3) // 2
    assert covered == [set(range(len(offsets))) for offsets in table.offsets]


@pytest.mark.parametrize(("length", "stride"), [(384, 128), (48, 20)])
def test_the_labels_give_the_answers_back(tokenizer, length, stride):
    asked = examples(200, seed=3)
    table = span_table(tokenizer, asked, max_length=length, stride=stride)
    result = answers(table, *one_hot(table), max_answer=length)
    whole = {number for row, number in enumerate(table.example_index) if table.labels[row].any()}
    assert len(whole) == 200 if length == 384 else len(whole) > 100
    for number, example in enumerate(asked):
        if number in whole:
            assert result[number] == example.label[0].text == table.references[number][0]
    assert table.references == tuple(tuple(each.text for each in example.label) for example in asked)


def test_a_piece_without_the_whole_answer_points_at_cls(tokenizer):
    asked = examples(100, seed=4)
    table = span_table(tokenizer, asked, max_length=24, stride=4)
    partly = 0
    for row, number in enumerate(table.example_index):
        answer = asked[number].label[0]
        first, second = table.context_start[row], table.second_start[row]
        offsets = table.offsets[number][first : first + table.lengths[row] - 1 - second]
        holding = [
            place
            for place, (begin, end) in enumerate(offsets)
            if begin < answer.start + len(answer.text) and end > answer.start
        ]
        everywhere = sum(
            begin < answer.start + len(answer.text) and end > answer.start for begin, end in table.offsets[number]
        )
        if len(holding) == everywhere:
            assert table.labels[row].tolist() == [second + holding[0], second + holding[-1]]
        else:
            partly += bool(holding)
            assert table.labels[row].tolist() == [0, 0]
    assert partly > 10


def test_an_answer_inside_a_word_takes_the_token_whole(tokenizer):
    context = "It cost $5million in the 1990s."
    begin = context.index("990")
    (token,) = [
        each for each in tokenizer(context, return_offsets_mapping=True)["offset_mapping"] if each[0] <= begin < each[1]
    ]
    asked = [Example("line 1", ("when?", context), (Answer(begin, "99"),))]
    table = span_table(tokenizer, asked, max_length=64, stride=10)
    (result,) = answers(table, *one_hot(table), max_answer=30)
    assert "99" in result and context.index(result) == token[0]
    # One that begins where a token ends does not take that too.
    asked = [Example("line 1", ("what?", "AC/DC"), (Answer(3, "DC"),))]
    table = span_table(tokenizer, asked, max_length=64, stride=10)
    assert answers(table, *one_hot(table), max_answer=30) == ["DC"]
    # Nothing is left of a lone zero-width space: no token holds it.
    asked = [Example("line 1", ("when?", "a \u200b b"), (Answer(2, "\u200b"),))]
    assert span_table(tokenizer, asked, max_length=64, stride=10).labels.tolist() == [[0, 0]]


def slow_answer(table: SpanTable, number: int, start, end, most: int) -> tuple[float, str]:
    """Every lawful pair of positions of every row."""
    best, text = -np.inf, ""
    for row in np.flatnonzero(table.example_index == number):
        context = range(table.second_start[row], table.lengths[row] - 1)
        for first, last in itertools.combinations_with_replacement(context, 2):
            score = start[row, first] + end[row, last]
            if last - first < most and score > best:
                offsets = table.offsets[number][table.context_start[row] :]
                best = score
                text = table.contexts[number][
                    offsets[first - table.second_start[row], 0] : offsets[last - table.second_start[row], 1]
                ]
    return best, text


@pytest.mark.parametrize("most", [1, 4, 100])
def test_the_best_answer_of_all_rows_is_found(tokenizer, most):
    table = span_table(tokenizer, examples(25, seed=5), max_length=32, stride=5)
    assert len(table) > 40
    draw = np.random.default_rng(6)
    start, end = draw.normal(size=(2, *table.input_ids.shape)).astype(np.float32)
    result = answers(table, start, end, most, best=32)
    assert result == [slow_answer(table, number, start, end, most)[1] for number in range(25)]
    # Fewer candidates only ever lose; what stands outside the contexts is never read.
    outside = np.arange(32) - table.second_start[:, None]
    outside = (outside < 0) | (np.arange(32) >= table.lengths[:, None] - 1)
    assert answers(table, np.where(outside, 1e9, start), np.where(outside, np.nan, end), most, best=32) == result
    longest = table.lengths.max()
    assert answers(table, start[:, :longest], end[:, :longest], most, best=32) == result
    few = answers(table, start, end, most, best=2)
    assert set(few) - {""} and few != result


def test_where_nothing_is_lawful_the_answer_is_empty(tokenizer):
    asked = [
        Example("line 1", ("who?", "one two three"), (Answer(0, "one"),)),
        Example("line 2", ("who?", ""), (Answer(0, ""),)),
    ]
    table = span_table(tokenizer, asked, max_length=32, stride=5)
    assert len(table) == 2
    start, end = np.zeros((2, 2, 32), np.float32)
    start[0, table.lengths[0] - 2] = end[0, table.second_start[0]] = 9.0  # the end before the start
    assert answers(table, start, end, 30, best=1) == ["", ""]
    assert answers(table, start, end, 30)[0] != ""
    assert answers(table, start * np.nan, end, 30) == ["", ""]


# From a source


def write(path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def record(question, context, text, start):
    return {"question": question, "context": context, "answers": {"text": [text], "answer_start": [start]}}


def test_a_source_of_spans(tmp_path):
    records = [
        record(f"question {n}", f"context {n // 4} says yes", "yes", len(f"context {n // 4} says ")) for n in range(200)
    ]
    task = replace(TASK, train=write(tmp_path / "a.jsonl", records), dev_share=0.3)
    data = read_task(task, EMBEDDED_TEACHER, vocab_size=6144, max_length=32)
    assert isinstance(data.train, SpanTable) and data.label_names == ()
    assert not {*data.train.contexts} & {*data.dev.contexts}  # a context falls on one side with all its questions
    assert len(data.train) + len(data.dev) == 200
    assert set(answers(data.dev, *one_hot(data.dev), max_answer=30)) == {"yes"}
    batch = data.train.gather(np.arange(3), data.train.bucket(np.arange(3)))
    assert batch.labels.shape == (3, 2) and batch.input_ids.shape == (
        3,
        32 if data.train.lengths[:3].max() > 16 else 16,
    )
    few = read_splits(replace(task, train_rows=10))
    assert len(few.train) == 10 and len({example.texts[1] for example in few.train}) > 5


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"text": ["b"], "answer_start": [1]}, "line 2: the answer 'b' is not at character 1 of its context"),
        ({"text": ["b"], "answer_start": [-1]}, "the answer 'b' is not at character -1"),
        ({"text": ["b", "x"], "answer_start": [2, 0]}, "the answer 'x' is not at character 0"),
        ({"text": [""], "answer_start": [0]}, "the answer '' is not at character 0"),
        ({"text": [], "answer_start": []}, "line 2 has no answer: leave questions without one out"),
        ({"text": ["b"], "answer_start": []}, "lists of the same length"),
        ({"text": "b", "answer_start": 2}, "lists of the same length"),
        ({"text": ["b"], "answer_start": ["2"]}, "an answer must be"),
        ({"text": ["b"]}, "an answer must be"),
        (None, "an answer must be"),
    ],
)
def test_answers_that_are_none_are_refused(tmp_path, answer, message):
    records = [record("q", "a b", "b", 2), {"question": "q", "context": "a b", "answers": answer}]
    path = write(tmp_path / "a.jsonl", records)
    with pytest.raises(InputError, match=message):
        read_splits(replace(TASK, train=path, dev=path))
