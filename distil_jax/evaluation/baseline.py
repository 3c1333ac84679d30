"""The scores that a task gives without an encoder: of one answer for every example, and of a linear model of TF-IDF."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np

from distil_jax.config.task import TaskConfig
from distil_jax.data.examples import Example, read_splits
from distil_jax.evaluation.task_metrics import normalized, score_predictions
from distil_jax.schema import InputError, require

_STRENGTHS = (0.1, 1.0, 10.0, 100.0)  # of the fit against the regularisation, chosen on the dev examples


def best_constant(task: TaskConfig, labels: Any) -> Any:
    """The one answer for every example that suits the training labels best: what a model knows that learned nothing.

    Args:
      task: its kind decides.
      labels: of the training examples, as `score_predictions` takes them.

    Returns:
      The most frequent class index; for a regression the mean; for tokens the most frequent label name; for spans the
      most frequent answer, `normalized`. Of equally frequent ones the first.
    """
    if task.kind == "regression":
        return float(np.mean(labels))
    if task.kind == "sequence":
        return int(np.bincount(labels).argmax())
    if task.kind == "spans":  # each answer of an example once, however many people gave it
        labels = [dict.fromkeys(map(normalized, answers)) for answers in labels]
    counts = Counter(itertools.chain.from_iterable(labels))
    return max(counts, key=counts.__getitem__, default="")


def constant_scores(task: TaskConfig, constant: Any, labels: Any) -> dict[str, float]:
    """The task's metrics if every prediction is `constant`, on examples with these labels."""
    if task.kind == "tokens":
        predictions = [[constant] * len(of_words) for of_words in labels]
    else:
        predictions = [constant] * len(labels)
    return score_predictions(task.metric_names, predictions, labels)


def baseline_scores(task: TaskConfig) -> dict[str, float]:
    """The task's metrics of a linear model of words and pairs of words, on test examples where there are such.

    Raises:
      InputError: as `read_splits`, a task that does not give a text one label, or texts or labels that are all alike.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge

    require(task.kind in ("sequence", "regression"), "TF-IDF knows texts with one label each: leave --baseline out.")
    splits = read_splits(task)
    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2 if len(splits.train) > 1000 else 1)
    labels = [example.label for example in splits.train]
    require(
        len(set(labels)) > 1, f"The training examples of {task.train} all have one label: a linear model needs two."
    )
    try:
        fitted = vectors.fit_transform(_texts(splits.train))
    except ValueError as error:  # no words, or none that two texts share
        raise InputError(
            f"TF-IDF cannot tell the texts of {task.train} apart ({error}): leave --baseline out."
        ) from error
    dev, judged = vectors.transform(_texts(splits.dev)), splits.dev if splits.test is None else splits.test
    best, chosen = -np.inf, None
    for strength in _STRENGTHS:
        linear = LogisticRegression(C=strength, max_iter=2000) if task.kind == "sequence" else Ridge(alpha=1 / strength)
        linear.fit(fitted, labels)
        score = score_predictions(task.metric_names, linear.predict(dev), _labels(splits.dev))[task.metric_names[0]]
        if score > best:
            best, chosen = score, linear
    return score_predictions(task.metric_names, chosen.predict(vectors.transform(_texts(judged))), _labels(judged))


def _texts(examples: list[Example]) -> list[str]:
    return [" ".join(example.texts) for example in examples]


def _labels(examples: list[Example]) -> np.ndarray:
    return np.array([example.label for example in examples])
