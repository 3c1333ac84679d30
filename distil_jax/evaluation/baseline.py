"""A linear model of TF-IDF: the score that a task gives without any encoder."""

from __future__ import annotations

import numpy as np

from distil_jax.config.task import TaskConfig
from distil_jax.data.examples import Example, read_splits
from distil_jax.evaluation.task_metrics import score_predictions
from distil_jax.schema import InputError, require

_STRENGTHS = (0.1, 1.0, 10.0, 100.0)  # of the fit against the regularisation, chosen on the dev examples


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
