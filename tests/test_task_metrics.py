"""Metrics agree with scikit-learn, SciPy and slow counting, and say 0 where nothing can be told."""

from __future__ import annotations

import itertools
import random
import re
import string

import numpy as np
import pytest

from distil_jax.config.task import TaskConfig
from distil_jax.evaluation.baseline import best_constant, constant_scores
from distil_jax.evaluation.task_metrics import entities, normalized, score_predictions


def only(metric, predictions, labels) -> float:
    result = score_predictions([metric], predictions, labels)
    assert list(result) == [metric] and type(result[metric]) is float
    return result[metric]


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_classification_as_scikit_learn_counts(classes):
    from sklearn import metrics

    draw = np.random.default_rng(classes)
    for rows in (2, 5, 200):
        for _ in range(10):
            true = draw.integers(classes, size=rows)
            predicted = np.where(draw.random(rows) < 0.5, true, draw.integers(classes, size=rows))
            if len({*true}) < 2 or len({*predicted}) < 2:
                continue
            expected = {
                "accuracy": metrics.accuracy_score(true, predicted),
                "macro_f1": metrics.f1_score(true, predicted, average="macro", zero_division=0),
                "matthews": metrics.matthews_corrcoef(true, predicted),
                "f1": metrics.f1_score(true == 1, predicted == 1, zero_division=0),
            }
            assert score_predictions(expected, predicted, true) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_correlations_as_scipy_computes_them(ties):
    from scipy import stats

    draw = np.random.default_rng(5)
    for rows in (3, 10, 500):
        true = draw.integers(4, size=rows) if ties else draw.normal(size=rows)
        true[:2] = 0, 1
        predicted = (np.round(true + draw.normal(size=rows)) if ties else true + draw.normal(size=rows)) * 1e-3 + 7
        predicted[:2] = 7.5, 7.25
        expected = {"pearson": stats.pearsonr(predicted, true)[0], "spearman": stats.spearmanr(predicted, true)[0]}
        assert score_predictions(expected, predicted, true) == pytest.approx(expected, abs=1e-9)
        assert score_predictions(expected, -predicted, true) == pytest.approx(
            {name: -r for name, r in expected.items()}, abs=1e-9
        )


def test_perfect_and_inverted_predictions():
    true = np.array([0, 1, 1, 0, 1])
    every = ["accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman"]
    assert score_predictions(every, true, true) == pytest.approx(dict.fromkeys(every, 1.0))
    assert score_predictions(every, 1 - true, true) == pytest.approx(
        dict.fromkeys(every[:3], 0.0) | dict.fromkeys(every[3:], -1.0)
    )


@pytest.mark.parametrize("metric", ["matthews", "pearson", "spearman"])
def test_what_cannot_be_told_is_zero(metric):
    varied, constant = np.array([0, 1, 2, 1]), np.full(4, 0.1, np.float32)  # 0.1: whose mean is rounded
    assert only(metric, constant, varied) == only(metric, varied, constant) == only(metric, constant, constant) == 0.0
    assert only(metric, np.array([]), np.array([])) == 0.0
    if metric != "matthews":
        assert only(metric, np.array([0.0, np.nan, 1.0, 2.0]), varied) == 0.0
        assert only(metric, np.array([0.0, np.inf, 1.0, 2.0]), varied) == 0.0
        assert only(metric, varied * 1e-250, varied) == pytest.approx(1.0)


def test_f1_without_its_class_is_zero():
    assert only("f1", np.zeros(3, int), np.zeros(3, int)) == 0.0
    assert only("f1", np.ones(3, int), np.zeros(3, int)) == 0.0
    assert score_predictions(["accuracy", "macro_f1"], np.array([], int), np.array([], int)) == {
        "accuracy": 0,
        "macro_f1": 0,
    }


def test_one_prediction_a_label():
    with pytest.raises(ValueError, match=r"\(2,\) are not one for each of the labels \(3,\)"):
        score_predictions(["accuracy"], np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="2 predictions are not one for each of 1 words"):
        score_predictions(["entity_f1"], [["O", "O"]], [["O"]])
    with pytest.raises(ValueError, match="longer"):
        score_predictions(["exact_match"], ["a"], [["a"], ["b"]])


# Entities


def slow_entities(names):
    """Every span (kind, first, last) that begins, goes on and ends as conlleval's startOfChunk and endOfChunk say."""

    def parts(place):
        prefix, _, kind = names[place].partition("-") if 0 <= place < len(names) else ("O", "", "")
        return (prefix, kind) if prefix in "BI" and kind else ("O", "")

    def starts(place):
        (before, kind_before), (prefix, kind) = parts(place - 1), parts(place)
        return prefix == "B" or (prefix == "I" and (before == "O" or kind_before != kind))

    def ends(place):
        (prefix, kind), (after, kind_after) = parts(place), parts(place + 1)
        return prefix != "O" and (after in ("B", "O") or kind_after != kind)

    return {
        (parts(first)[1], first, last)
        for first, last in itertools.combinations_with_replacement(range(len(names)), 2)
        if starts(first)
        and ends(last)
        and not any(starts(place) for place in range(first + 1, last + 1))
        and not any(ends(place) for place in range(first, last))
    }


def test_entities_as_conlleval_reads_them():
    assert entities(["B-PER", "I-PER", "O", "I-LOC", "I-PER", "B-PER"]) == {
        ("PER", 0, 1),
        ("LOC", 3, 3),
        ("PER", 4, 4),
        ("PER", 5, 5),
    }
    assert entities([]) == entities(["O", "X", "LABEL_0", "B-"]) == set()
    assert entities(["B-A-B", "I-A-B", "I-A"]) == {("A-B", 0, 1), ("A", 2, 2)}
    draw = random.Random(0)
    for _ in range(500):
        names = draw.choices(["O", "B-X", "I-X", "B-Y", "I-Y"], k=draw.randint(0, 9))
        assert entities(names) == slow_entities(names)


def test_entity_f1_counts_whole_entities():
    true = [["B-X", "I-X", "O"], ["B-Y", "O"], []]
    predicted = [["B-X", "O", "O"], ["B-Y", "B-X"], []]  # one of three is right, one of two is found
    assert only("entity_f1", predicted, true) == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))
    assert only("accuracy", predicted, true) == pytest.approx(3 / 5)
    assert only("entity_f1", true, true) == 1.0
    assert only("entity_f1", [["O"]], [["O"]]) == 0.0
    # The same entity in another sequence is another one.
    assert only("entity_f1", [["B-X"], ["O"]], [["O"], ["B-X"]]) == 0.0


# One answer for every example


@pytest.mark.parametrize(
    ("kind", "metric", "labels", "choices"),
    [
        ("sequence", "accuracy", np.array([0, 2, 2, 1, 2, 0]), range(3)),
        ("tokens", "accuracy", [["O", "B-X"], ["B-X", "B-X", "I-X"], []], ("O", "B-X", "I-X")),
        ("spans", "exact_match", [("cat",), ("The dog.", "dog"), ("a dog", "cats"), ("",)], ("cat", "dog", "cats", "")),
        ("spans", "exact_match", [("",), ("cat",), ("the",)], ("cat", "")),
    ],
)
def test_no_other_constant_does_better_on_the_training_examples(kind, metric, labels, choices):
    fields = ("question", "context") if kind == "spans" else ("text",)
    task = TaskConfig(kind, text=fields, metrics=(metric,))
    score = constant_scores(task, best_constant(task, labels), labels)[metric]
    assert 0 < score == max(constant_scores(task, other, labels)[metric] for other in choices) < 1


def test_the_constant_of_a_regression_is_the_mean_and_tells_nothing_apart():
    task, labels = TaskConfig("regression"), np.array([1.0, 2.0, 6.0], np.float32)
    assert best_constant(task, labels) == 3.0 and constant_scores(task, 3.0, labels) == {"pearson": 0.0}


# Answers


def official(text):
    """As the published evaluation of SQuAD writes it."""

    def remove_articles(text):
        return re.sub(r"\b(a|an|the)\b", " ", text)

    def remove_punctuation(text):
        return "".join(character for character in text if character not in set(string.punctuation))

    return " ".join(remove_articles(remove_punctuation(text.lower())).split())


def slow_f1(predicted, true):
    predicted, true = official(predicted).split(), official(true).split()
    if not predicted or not true:
        return float(predicted == true)
    common = sum(min(predicted.count(word), true.count(word)) for word in {*predicted, *true})
    if not common:
        return 0.0
    precision, recall = common / len(predicted), common / len(true)
    return 2 * precision * recall / (precision + recall)


def test_answers_as_squad_judges_them():
    words = ["the", "The", "a", "an", "cat", "Cat,", "dog", "theme", "3.5", "--", "", "\u00a0", "U.S.", "don't", "é"]
    draw = random.Random(1)
    texts = [" ".join(draw.choices(words, k=draw.randint(0, 5))) for _ in range(600)]
    for text in texts:
        assert normalized(text) == official(text)
    for size in (1, 2, 3):
        predicted = draw.sample(texts, 100)
        true = [draw.sample(texts, size) for _ in predicted]
        exact = [
            any(official(each) == official(other) for other in others)
            for each, others in zip(predicted, true, strict=True)
        ]
        f1 = [max(slow_f1(each, other) for other in others) for each, others in zip(predicted, true, strict=True)]
        expected = {"exact_match": sum(exact) / 100, "span_f1": sum(f1) / 100}
        assert score_predictions(expected, predicted, true) == pytest.approx(expected, abs=1e-12)
        assert 0 < expected["span_f1"] < 1


def test_answers_by_hand():
    assert score_predictions(["exact_match", "span_f1"], ["The U.S."], [["us", "America"]]) == {
        "exact_match": 1.0,
        "span_f1": 1.0,
    }
    assert only("span_f1", ["black cat cat"], [["a cat", "nothing"]]) == pytest.approx(2 * 1 / 4)
    assert only("span_f1", ["cat cat"], [["cat cat cat"]]) == pytest.approx(2 * 2 / 5)
    assert only("span_f1", [""], [["cat"]]) == only("exact_match", [""], [["cat"]]) == 0.0
    assert only("span_f1", ["the"], [["A."]]) == only("exact_match", ["the"], [["A."]]) == 1.0
    assert only("span_f1", [], []) == 0.0
