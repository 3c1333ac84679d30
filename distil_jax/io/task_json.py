"""A task's head in `config.json` and our `HeadConfig`, converted in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distil_jax.config.model import HeadConfig, ModelConfig
from distil_jax.io.config_json import BERT, DISTILBERT, model_type
from distil_jax.schema import InputError, require

_PREFIXES = {BERT: "Bert", DISTILBERT: "DistilBert"}
_KINDS = {"ForSequenceClassification": "sequence", "ForTokenClassification": "tokens", "ForQuestionAnswering": "spans"}
_SUFFIXES = {kind: suffix for suffix, kind in _KINDS.items()}

# The key of the dropout before the last layer, and its value if a file lacks the key; None: the encoder's hidden
# dropout. For tokens on a DistilBERT there is no such key, and for spans on a BERT no such dropout.
_DROPOUT = {
    ("sequence", BERT): ("classifier_dropout", None),
    ("sequence", DISTILBERT): ("seq_classif_dropout", 0.2),
    ("tokens", BERT): ("classifier_dropout", None),
    ("tokens", DISTILBERT): (None, None),
    ("spans", BERT): (None, 0.0),
    ("spans", DISTILBERT): ("qa_dropout", 0.1),
}


def architecture(config: ModelConfig, head: HeadConfig | None) -> str:
    """The name of the model's class in `transformers`; without a task's head, of the class with an MLM head."""
    return _PREFIXES[model_type(config)] + ("ForMaskedLM" if head is None else _SUFFIXES[head.kind])


def has_task_head(values: Mapping[str, Any]) -> bool:
    """Whether the architecture that a config.json names has a task's head."""
    names = values.get("architectures")
    return isinstance(names, list) and any(isinstance(name, str) and name.endswith(tuple(_KINDS)) for name in names)


def head_from_json(values: Mapping[str, Any], path: Path, config: ModelConfig) -> HeadConfig:
    """The head that a config.json describes. Labels that have only the default names of `transformers` get no names.

    Args:
      values: the contents of `path`.
      path: for messages.
      config: the encoder's architecture in the same file.

    Raises:
      InputError: the model has no task's head, or one that is not supported, or the file contradicts itself.
    """
    kind = _kind(values.get("architectures"), path, _PREFIXES[model_type(config)])
    names = _names(values, path)
    labels = values.get("num_labels")
    labels = (len(names) or 2) if labels is None else labels  # as `transformers` counts them
    default_names = names == tuple(f"LABEL_{index}" for index in range(len(names)))
    require(
        default_names or labels == len(names),
        f"{path} says num_labels = {labels!r}, but its id2label names {len(names)} labels: correct one of them.",
    )
    key, default = _DROPOUT[kind, model_type(config)]
    dropout = values.get(key) if key else None
    if dropout is None:
        dropout = config.hidden_dropout if default is None else default
    for name, value, types in (("num_labels", labels, (int,)), (key, dropout, (int, float))):
        require(type(value) in types, f"{path} says {name} = {value!r}, where a number belongs: correct that file.")
    try:
        dropout = float(dropout) if abs(dropout) < 2 else dropout  # a huge int fits no float; HeadConfig refuses it
        head = HeadConfig(kind, labels, dropout, () if default_names else names)
    except InputError as error:
        raise InputError(f"{path} describes no head: {error}") from error
    problem = values.get("problem_type")
    require(
        kind != "sequence" or problem in (None, _problem_type(head)),
        f"{path} says problem_type = {problem!r} with {labels} labels, but only regression with 1 label and "
        "single_label_classification with more are supported: use such a model.",
    )
    return head


def head_to_json(config: ModelConfig, head: HeadConfig) -> dict[str, Any]:
    """The fields of config.json for a head; they override or extend those that `to_json` gives for its encoder."""
    values = {
        "architectures": [architecture(config, head)],
        "id2label": {str(index): name for index, name in enumerate(head.names)},
        "label2id": {name: index for index, name in enumerate(head.names)},
    }
    if head.kind == "sequence":
        values["problem_type"] = _problem_type(head)
    key, _ = _DROPOUT[head.kind, model_type(config)]
    return values | ({key: head.dropout} if key else {})


def _problem_type(head: HeadConfig) -> str:
    return "regression" if head.labels == 1 else "single_label_classification"


def _kind(architectures: Any, path: Path, prefix: str) -> str:
    known = [prefix + suffix for suffix in _KINDS]
    if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in known:
        raise InputError(
            f"{path} says architectures = {architectures!r}, which is no task's model: "
            f"give a folder of a {', '.join(known[:-1])} or {known[-1]}."
        )
    return _KINDS[architectures[0].removeprefix(prefix)]


def _names(values: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """The names of the labels, in the order of their indices; empty if the file has none.

    As in `transformers`, `id2label` decides and `label2id` is ignored: it keeps its default names if a user sets only
    `id2label`.
    """
    id2label = values.get("id2label")
    if id2label is None:
        back = values.get("label2id")
        plain = back is None or (isinstance(back, dict) and back == {f"LABEL_{n}": n for n in range(len(back))})
        require(plain, f"{path} names labels only in label2id, where `transformers` does not look: add id2label.")
        return ()
    pairs = list(id2label.items()) if isinstance(id2label, dict) else []
    try:
        by_index = {int(index): name for index, name in pairs}
    except ValueError:  # an index that is not a number
        by_index = {}
    valid = by_index.keys() == set(range(len(pairs))) and all(type(name) in (str, int) for name in by_index.values())
    require(
        valid and len(pairs) > 0, f"{path} has an id2label that does not name the labels 0, 1 and so on: correct it."
    )
    return tuple(str(by_index[index]) for index in range(len(pairs)))
