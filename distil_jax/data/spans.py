"""Question answering: contexts as rows of overlapping pieces, and answers from the logits of where they begin and end.

Devlin et al., 2019, section 4.2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from distil_jax.data.examples import Answer, Example
from distil_jax.data.task_table import TaskTable, padded
from distil_jax.data.tokenizer import encodings, id_type

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class SpanTable(TaskTable):
    """Rows `[CLS] question [SEP] piece of the context [SEP]`, one or more an example.

    Attributes:
      example: [N] int32, the example of each row.
      first: [N] int32, the number in its context of the token at `second`.
      offsets: of each example [T, 2] int32, the characters where each token of its context begins and ends.
      contexts: of each example.
      references: of each example, all its answers.
    """

    example: np.ndarray
    first: np.ndarray
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

    A context that is too long goes on in another row, which repeats `stride` tokens. The label of a row is its first
    answer, or (0, 0), which is [CLS], where the piece does not hold all of it. A question that would take more than
    half of a row is cut.

    Args:
      tokenizer: a fast one; text that says "[SEP]" means those characters.
      examples: with the texts question and context, and `Answer`s.
      max_length: tokens of a row.
      stride: at most half of what a row has for the context.
      counts: `questions_cut`, and `answers_lost`, those that no row holds whole, are added up here.
    """
    counts = Counter() if counts is None else counts
    room = max_length - 3  # [CLS], [SEP] and [SEP]
    questions = [ids for ids, _ in _encode(tokenizer, [example.texts[0] for example in examples])]
    counts["questions_cut"] += sum(len(ids) > room // 2 for ids in questions)
    questions = [ids[: room // 2] for ids in questions]
    distinct = list(dict.fromkeys(example.texts[1] for example in examples))  # SQuAD asks five questions of each
    contexts = dict(zip(distinct, _encode(tokenizer, distinct), strict=True))
    cls, sep = (np.array([number], id_type(tokenizer)) for number in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    rows, facts = [], []  # facts of a row: example, first, second, start, end
    for number, (example, question) in enumerate(zip(examples, questions, strict=True)):
        ids, offsets = contexts[example.texts[1]]
        begin, end = _tokens_of(example.label[0], offsets)
        second, width = len(question) + 2, room - len(question)
        step = width - min(stride, width // 2)
        # The last piece is the first that reaches the end.
        for first in range(0, max(len(ids) - width, 0) + step, step):
            rows.append(np.concatenate([cls, question, sep, ids[first : first + width], sep]))
            whole = first <= begin <= end < first + width
            label = (begin - first + second, end - first + second) if whole else (0, 0)
            facts.append((number, first, second, *label))
    example, first, second, *label = np.array(facts, np.int32).T
    counts["answers_lost"] += len(examples) - len(np.unique(example[label[1] > 0]))
    return SpanTable(
        input_ids=padded(rows, max_length, tokenizer.pad_token_id),
        lengths=np.array([len(row) for row in rows], np.int32),
        second=second,
        labels=np.stack(label, axis=1),
        pad_id=tokenizer.pad_token_id,
        example=example,
        first=first,
        offsets=tuple(contexts[example.texts[1]][1] for example in examples),
        contexts=tuple(example.texts[1] for example in examples),
        references=tuple(tuple(answer.text for answer in example.label) for example in examples),
    )


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """[T] ids and [T, 2] offsets of each text, uncut and without special tokens."""
    dtype = id_type(tokenizer)
    return [
        (np.array(encoding.ids, dtype), np.array(encoding.offsets, np.int32).reshape(-1, 2))
        for encoding in encodings(tokenizer, texts)
    ]


def _tokens_of(answer: Answer, offsets: np.ndarray) -> tuple[int, int]:
    """The first and the last token that hold a character of the answer; (0, -1) where none does.

    An answer may begin or end inside a token (`1990` in `1990s`); the token then counts as a whole.
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
    """The best answer to each example, copied from its context.

    Of each row the `best` starts and the `best` ends are combined, and over all rows of an example the largest sum of
    two logits wins; the first of equal ones. Where no pair is allowed the answer is empty.

    Args:
      table: what was asked.
      start_logits, end_logits: of each of the N rows [L], or at least as many as it has tokens.
      max_answer: tokens of an answer, at most.
      best: starts, and ends, that are looked at.
    """
    texts = [""] * len(table.contexts)
    scores = np.full(len(texts), -np.inf)
    for row, number in enumerate(table.example):
        piece = slice(table.second[row], table.lengths[row] - 1)
        score, begin, end = _best_span(start_logits[row][piece], end_logits[row][piece], max_answer, best)
        if score > scores[number]:
            offsets = table.offsets[number][table.first[row] :]
            scores[number] = score
            texts[number] = table.contexts[number][offsets[begin, 0] : offsets[end, 1]]
    return texts


def _best_span(start: np.ndarray, end: np.ndarray, max_answer: int, best: int) -> tuple[float, int, int]:
    """Score, first and last position of the best span; a score of -inf where there is none."""
    if not len(start):
        return -np.inf, 0, 0
    starts, ends = (np.argsort(-logits, kind="stable")[:best] for logits in (start, end))
    tokens = ends - starts[:, None] + 1
    sums = start[starts].astype(np.float32)[:, None] + end[ends].astype(np.float32)
    sums = np.where((tokens >= 1) & (tokens <= max_answer), sums, -np.inf)
    place, other = np.unravel_index(np.argmax(sums), sums.shape)
    return float(sums[place, other]), int(starts[place]), int(ends[other])
