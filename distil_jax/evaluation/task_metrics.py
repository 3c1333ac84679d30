"""How good predictions are, in the metrics that the literature reports: shares from 0 to 1, or correlations.

Taken after the whole of a split was predicted. What cannot be told (no examples, one class only, constant
predictions, which have no correlation) is 0.0.
"""

from __future__ import annotations

import itertools
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def score_predictions(metrics: Iterable[str], predictions: Any, labels: Any) -> dict[str, float]:
    """Judges predictions by each of the metrics.

    Args:
      metrics: names, see `task_config.Metric`.
      predictions, labels: [N] numbers; for tokens N lists of label names, one a word; for spans N texts, and N lists of
        texts any of which is right.

    Raises:
      ValueError: not one prediction for each label.
    """
    return {name: float(_METRICS[name](predictions, labels)) for name in metrics}


def entities(names: Sequence[str]) -> set[tuple[str, int, int]]:
    """Type, first and last word of the entities in labels such as B-PER, I-PER and O.

    As conlleval reads them, I- begins an entity where none of its type goes on; any other label is outside of all.
    """
    spans, kind, begin = set(), "", 0
    for place, name in enumerate([*names, "O"]):
        prefix, _, other = name.partition("-")
        other = other if prefix in ("B", "I") else ""
        if kind and (prefix == "B" or other != kind):
            spans.add((kind, begin, place - 1))
        if other and (prefix == "B" or other != kind):
            begin = place
        kind = other
    return spans


def normalized(answer: str) -> str:
    """An answer without case, punctuation, articles and more than single spaces (SQuAD's official evaluation)."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def _accuracy(predictions: Any, labels: Any) -> float:
    predictions, labels = (
        list(itertools.chain(*values)) if len(values) and isinstance(values[0], (list, tuple)) else values
        for values in (predictions, labels)
    )
    predictions, labels = _aligned(predictions, labels)
    return np.mean(predictions == labels) if len(labels) else 0.0


def _f1(predictions: Any, labels: Any) -> float:
    from sklearn.metrics import f1_score

    predictions, labels = _aligned(predictions, labels)
    return f1_score(labels == 1, predictions == 1, zero_division=0.0) if len(labels) else 0.0


def _macro_f1(predictions: Any, labels: Any) -> float:
    """The mean over all classes that were predicted or are true."""
    from sklearn.metrics import f1_score

    predictions, labels = _aligned(predictions, labels)
    return f1_score(labels, predictions, average="macro", zero_division=0.0) if len(labels) else 0.0


def _matthews(predictions: Any, labels: Any) -> float:
    """Gorodkin's, for any number of classes; of two it is Matthews's."""
    from sklearn.metrics import matthews_corrcoef

    predictions, labels = _aligned(predictions, labels)
    varied = len(np.unique(predictions)) > 1 and len(np.unique(labels)) > 1
    return matthews_corrcoef(labels, predictions) if varied else 0.0


def _pearson(predictions: Any, labels: Any) -> float:
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predictions, labels)


def _spearman(predictions: Any, labels: Any) -> float:
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predictions, labels)


def _correlation(of: Callable, predictions: Any, labels: Any) -> float:
    first, second = (values.astype(np.float64) for values in _aligned(predictions, labels))
    for values in (first, second):
        if len(values) < 2 or not np.isfinite(values).all() or np.ptp(values) == 0:
            return 0.0
    return of(first, second).statistic


def _entity_f1(predictions: Sequence[Sequence[str]], labels: Sequence[Sequence[str]]) -> float:
    """Over all entities of all sequences; an entity counts where type, first and last word agree."""
    right = claimed = true = 0
    for predicted, expected in zip(predictions, labels, strict=True):
        if len(predicted) != len(expected):
            raise ValueError(f"{len(predicted)} predictions are not one for each of {len(expected)} words.")
        ours, wanted = entities(predicted), entities(expected)
        right, claimed, true = right + len(ours & wanted), claimed + len(ours), true + len(wanted)
    return _share(2 * right, claimed + true)


def _exact_match(predictions: Sequence[str], labels: Sequence[Sequence[str]]) -> float:
    return _best_of(predictions, labels, lambda predicted, true: float(normalized(predicted) == normalized(true)))


def _span_f1(predictions: Sequence[str], labels: Sequence[Sequence[str]]) -> float:
    return _best_of(predictions, labels, _word_f1)


def _word_f1(predicted: str, reference: str) -> float:
    """F1 of the words, as often as each occurs.

    Where nothing is left of an answer, it is right if nothing is left of the other, as SQuAD 2.0's evaluation has it.
    1.1's gives 0, against its own exact match.
    """
    ours, true = normalized(predicted).split(), normalized(reference).split()
    if not (ours and true):
        return float(ours == true)
    return _share(2 * (Counter(ours) & Counter(true)).total(), len(ours) + len(true))


def _best_of(predictions: Sequence[str], labels: Sequence[Sequence[str]], score: Callable[[str, str], float]) -> float:
    """The mean over examples of the score against the reference that is nearest."""
    scores = [max(score(predicted, each) for each in true) for predicted, true in zip(predictions, labels, strict=True)]
    return _share(sum(scores), len(scores))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _aligned(predictions: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape or labels.ndim != 1:
        raise ValueError(f"Predictions {predictions.shape} are not one for each of the labels {labels.shape}.")
    return predictions, labels


_METRICS: dict[str, Callable[[Any, Any], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "macro_f1": _macro_f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
    "entity_f1": _entity_f1,
    "exact_match": _exact_match,
    "span_f1": _span_f1,
}
