"""Question answering: splits contexts into rows that overlap, and finds answers from the start and end logits.

Devlin et al., 2019, section 4.2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from distil_jax.data.examples import Answer, Example
from distil_jax.data.task_table import TaskTable, pad_rows
from distil_jax.data.tokenizer import encode_texts, id_type

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class SpanTable(TaskTable):
    """Rows `[CLS] question [SEP] part of the context [SEP]`, one or more per example.

    Attributes:
      example_index: [N] int32, the example of each row.
      context_start: [N] int32, the index, in the tokens of the whole context, of the first one that is in the row.
      offsets: for each example, [T, 2] int32, the characters at which each token of the context begins and ends.
      contexts: the context of each example.
      references: all answers of each example.
    """

    example_index: np.ndarray
    context_start: np.ndarray
    offsets: tuple[np.ndarray, ...]
    contexts: tuple[str, ...]
    references: tuple[tuple[str, ...], ...]


def span_table(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_length: int,
    stride: int,
    counts: Counter[str] | None = None,
) -> SpanTable:
    """Tokenises questions and contexts.

    A context that is too long continues in another row, which repeats `stride` tokens. The label of a row is the span
    of the example's first answer, or (0, 0), the position of [CLS], if the row does not contain all of that answer. A
    question that would take more than half of a row is truncated.

    Args:
      tokenizer: a fast one; "[SEP]" in a text is encoded as ordinary characters.
      examples: with question and context as texts, and `Answer`s as labels.
      max_length: tokens of a row.
      stride: tokens of the context that successive rows share; never more than half of those in a row.
      counts: incremented here are `questions_cut`, the questions that are truncated, and `answers_lost`, the first
        answers that no row contains as a whole.
    """
    counts = Counter() if counts is None else counts
    room = max_length - 3  # without [CLS] and two [SEP]
    questions = [ids for ids, _ in _encode(tokenizer, [example.texts[0] for example in examples])]
    counts["questions_cut"] += sum(len(ids) > room // 2 for ids in questions)
    questions = [ids[: room // 2] for ids in questions]
    unique_contexts = list(dict.fromkeys(example.texts[1] for example in examples))  # SQuAD has five questions for each
    contexts = dict(zip(unique_contexts, _encode(tokenizer, unique_contexts), strict=True))
    dtype = id_type(tokenizer)
    cls, sep = np.array([tokenizer.cls_token_id], dtype), np.array([tokenizer.sep_token_id], dtype)
    rows, fields = [], []  # fields: example index, context start, second start, label start and label end of each row
    for index, (example, question) in enumerate(zip(examples, questions, strict=True)):
        ids, offsets = contexts[example.texts[1]]
        begin, end = _tokens_of(example.label[0], offsets)
        second_start, width = len(question) + 2, room - len(question)
        step = width - min(stride, width // 2)
        # The last row is the first one that reaches the end of the context.
        for start in range(0, max(len(ids) - width, 0) + step, step):
            rows.append(np.concatenate([cls, question, sep, ids[start : start + width], sep]))
            has_answer = start <= begin <= end < start + width
            shift = second_start - start
            label = (begin + shift, end + shift) if has_answer else (0, 0)
            fields.append((index, start, second_start, *label))
    example_index, context_start, second_start, *label = np.array(fields, np.int32).T
    counts["answers_lost"] += len(examples) - len(np.unique(example_index[label[1] > 0]))
    return SpanTable(
        input_ids=pad_rows(rows, max_length, tokenizer.pad_token_id),
        lengths=np.array([len(row) for row in rows], np.int32),
        second_start=second_start,
        labels=np.stack(label, axis=1),
        pad_id=tokenizer.pad_token_id,
        example_index=example_index,
        context_start=context_start,
        offsets=tuple(contexts[example.texts[1]][1] for example in examples),
        contexts=tuple(example.texts[1] for example in examples),
        references=tuple(tuple(answer.text for answer in example.label) for example in examples),
    )


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids [T] and offsets [T, 2] of each text, not truncated and without special tokens."""
    dtype = id_type(tokenizer)
    return [
        (np.array(encoding.ids, dtype), np.array(encoding.offsets, np.int32).reshape(-1, 2))
        for encoding in encode_texts(tokenizer, texts)
    ]


def _tokens_of(answer: Answer, offsets: np.ndarray) -> tuple[int, int]:
    """The first and the last token with a character of the answer, or (0, -1) if there are none.

    An answer may begin or end inside a token (`1990` in `1990s`), which is then included.
    """
    begin = np.searchsorted(offsets[:, 1], answer.start, side="right")
    end = np.searchsorted(offsets[:, 0], answer.start + len(answer.text)) - 1
    return (int(begin), int(end)) if begin <= end else (0, -1)


def answers(
    table: SpanTable,
    start_logits: Sequence[np.ndarray],
    end_logits: Sequence[np.ndarray],
    max_answer: int,
    best: int = 20,
) -> list[str]:
    """The predicted answer of each example, as a part of its context.

    It is the span with the largest sum of start and end logit in all rows of the example; of equal sums, the first.
    Only the `best` starts and ends of each row are combined. The answer is empty if no span is valid.

    Args:
      table: the questions and contexts.
      start_logits, end_logits: for each of the N rows, [L], or at least the logits of its tokens.
      max_answer: the most tokens of an answer.
      best: how many starts, and how many ends, of a row to consider.
    """
    texts = [""] * len(table.contexts)
    best_sums = np.full(len(texts), -np.inf)
    for row, example in enumerate(table.example_index):
        context = slice(table.second_start[row], table.lengths[row] - 1)
        logit_sum, begin, end = _best_span(start_logits[row][context], end_logits[row][context], max_answer, best)
        if logit_sum > best_sums[example]:
            offsets = table.offsets[example][table.context_start[row] :]
            best_sums[example] = logit_sum
            texts[example] = table.contexts[example][offsets[begin, 0] : offsets[end, 1]]
    return texts


def _best_span(start_logits: np.ndarray, end_logits: np.ndarray, max_answer: int, best: int) -> tuple[float, int, int]:
    """The sum of logits, the first and the last position of the best valid span. The sum is -inf if there is none."""
    if not len(start_logits):
        return -np.inf, 0, 0
    starts = np.argsort(-start_logits, kind="stable")[:best]
    ends = np.argsort(-end_logits, kind="stable")[:best]
    lengths = ends - starts[:, None] + 1
    sums = start_logits[starts].astype(np.float32)[:, None] + end_logits[ends].astype(np.float32)
    sums = np.where((lengths >= 1) & (lengths <= max_answer), sums, -np.inf)
    row, column = np.unravel_index(np.argmax(sums), sums.shape)
    return float(sums[row, column]), int(starts[row]), int(ends[column])
