"""The name table of BERT and DistilBERT files: for each of our parameters, its tensor's name and layout in a file.

It also lists the tensors that a file may lack or have in addition.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from distil_jax.config.model import HeadConfig, ModelConfig
from distil_jax.io.config_json import BERT, DISTILBERT, model_type
from distil_jax.io.tensors import Tensor

# THE NAME TABLE: our module, its kind and axes, BERT's name, DistilBERT's name. The axes are those in structs.py, and
# P positions and T token types; letters without a space are one axis in the file. `{}` is the layer; ours are stacked.
_MODULES = (
    ("embeddings/word", "table V D", "embeddings.word_embeddings", "embeddings.word_embeddings"),
    ("embeddings/position", "table P D", "embeddings.position_embeddings", "embeddings.position_embeddings"),
    ("embeddings/token_type", "table T D", "embeddings.token_type_embeddings", None),
    ("embeddings/norm", "norm D", "embeddings.LayerNorm", "embeddings.LayerNorm"),
    ("layers/query", "linear D HK", "encoder.layer.{}.attention.self.query", "transformer.layer.{}.attention.q_lin"),
    ("layers/key", "linear D HK", "encoder.layer.{}.attention.self.key", "transformer.layer.{}.attention.k_lin"),
    ("layers/value", "linear D HK", "encoder.layer.{}.attention.self.value", "transformer.layer.{}.attention.v_lin"),
    (
        "layers/attention_output",
        "linear HK D",
        "encoder.layer.{}.attention.output.dense",
        "transformer.layer.{}.attention.out_lin",
    ),
    (
        "layers/attention_norm",
        "norm D",
        "encoder.layer.{}.attention.output.LayerNorm",
        "transformer.layer.{}.sa_layer_norm",
    ),
    ("layers/intermediate", "linear D F", "encoder.layer.{}.intermediate.dense", "transformer.layer.{}.ffn.lin1"),
    ("layers/output", "linear F D", "encoder.layer.{}.output.dense", "transformer.layer.{}.ffn.lin2"),
    ("layers/output_norm", "norm D", "encoder.layer.{}.output.LayerNorm", "transformer.layer.{}.output_layer_norm"),
    ("pooler", "linear D D", "pooler.dense", None),
    ("mlm/transform", "linear D D", "cls.predictions.transform.dense", "vocab_transform"),
    ("mlm/norm", "norm D", "cls.predictions.transform.LayerNorm", "vocab_layer_norm"),
    ("mlm", "bias V", "cls.predictions", "vocab_projector"),
)
_HEADS = {  # the same for a task's head, by the kind of task
    "sequence": (
        ("head/transform", "linear D D", None, "pre_classifier"),
        ("head/classifier", "linear D C", "classifier", "classifier"),
    ),
    "tokens": (("head/classifier", "linear D C", "classifier", "classifier"),),
    "spans": (("head/classifier", "linear D C", "qa_outputs", "qa_outputs"),),
}
# For each kind of module, our leaves and the file's. A linear kernel is [in, out] here and [out, in] in the file.
_LEAVES = {
    "table": {"": ".weight"},
    "norm": {"/scale": ".weight", "/bias": ".bias"},
    "linear": {"/kernel": ".weight", "/bias": ".bias"},
    "bias": {"/bias": ".bias"},
}
# How the names in heads begin. All other names begin with "bert." or "distilbert." if the model has a head.
HEAD = ("cls.predictions.", "vocab_")  # MLM heads
TASK_HEAD = ("pre_classifier.", "classifier.", "qa_outputs.")

# What a file may have beyond the table: a buffer, BERT's second pre-training task, and copies of tied tensors.
IGNORED = ("embeddings.position_ids", "cls.seq_relationship.weight", "cls.seq_relationship.bias")
TIED = {
    "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
    "vocab_projector.weight": "embeddings.word_embeddings.weight",
}
# Older versions of `transformers` wrote BERT's pooler even with heads for tokens and spans, which do not use it.
IGNORED_UNDER_HEAD = ("pooler.dense.weight", "pooler.dense.bias")
LEGACY = {".gamma": ".weight", ".beta": ".bias"}  # LayerNorm in the first published files


@dataclass(frozen=True)
class Leaf:
    """One of our parameters, and its tensors in the file: one tensor, or one per layer.

    Attributes:
      path: of the parameter, such as "layers/query/kernel".
      names: of the tensors, without the "bert." or "distilbert." in front.
      shape: of one layer of the parameter.
      rows: length of the parameter's first axis in the file, where the vocabulary is not padded.
      file_shape: of one tensor.
    """

    path: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    rows: int
    file_shape: tuple[int, ...]

    @property
    def transposed(self) -> bool:
        """Whether the file has the axes the other way round."""
        return self.path.endswith("/kernel")

    @property
    def full_shape(self) -> tuple[int, ...]:
        """The shape of the whole parameter, with its layers stacked."""
        return (len(self.names), *self.shape) if self.path.startswith("layers/") else self.shape

    def read(self, tensors: Mapping[str, Tensor]) -> np.ndarray:
        """The parameter, float32, from the tensors of a file."""
        value = np.zeros((len(self.names), *self.shape), np.float32)
        for name, part in zip(self.names, value, strict=True):
            array = tensors[name].read()
            array = array.T if self.transposed else array
            part[: self.rows] = array.reshape(self.rows, *self.shape[1:])
        return value.reshape(self.full_shape)

    def write(self, value: Any) -> Iterator[tuple[str, np.ndarray]]:
        """The names and values of the tensors for a parameter; the arrays may be views."""
        for name, part in zip(self.names, np.asarray(value).reshape(len(self.names), *self.shape), strict=True):
            part = part[: self.rows]
            yield name, part.reshape(self.file_shape[::-1]).T if self.transposed else part.reshape(self.file_shape)


def leaves(config: ModelConfig, head: HeadConfig | None = None) -> list[Leaf]:
    """The name table filled in for one architecture, and its task's head if there is one."""
    real = {
        "V": config.vocab_size,
        "P": config.max_positions,
        "T": config.token_types,
        "D": config.hidden_size,
        "H": config.num_heads,
        "K": config.head_size,
        "F": config.intermediate_size,
        "C": head.labels if head else 0,
    }
    padded = real | {"V": config.padded_vocab_size}
    absent = {
        "embeddings/position": config.positions == "sinusoidal",
        "embeddings/token_type": config.token_types == 0,
        "pooler": not config.pooler,
        "mlm/transform": not config.mlm_head,
        "mlm/norm": not config.mlm_head,
        "mlm": not config.mlm_head,
    }
    leaves = []
    for module, what, bert_name, distilbert_name in (*_MODULES, *(_HEADS[head.kind] if head else ())):
        name = {BERT: bert_name, DISTILBERT: distilbert_name}[model_type(config)]
        if absent.get(module) or name is None:
            continue
        kind, *module_axes = what.split()
        layers = range(config.num_layers) if "{}" in name else range(1)
        for our_leaf, their_leaf in _LEAVES[kind].items():
            axes = module_axes[-1:] if our_leaf == "/bias" else module_axes
            file_shape = tuple(math.prod(real[letter] for letter in axis) for axis in axes)
            leaves.append(
                Leaf(
                    path=module + our_leaf,
                    names=tuple(name.format(layer) + their_leaf for layer in layers),
                    shape=tuple(padded[letter] for letter in "".join(axes)),
                    rows=real[axes[0][0]],
                    file_shape=file_shape[::-1] if our_leaf == "/kernel" else file_shape,
                )
            )
    return leaves
