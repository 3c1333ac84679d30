"""The name table of BERT and DistilBERT files: tensor names, layouts, and the parameter each one belongs to.

Hugging Face names stand here and nowhere else; so does what a file may lack or have in addition.
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

# THE NAME TABLE: our module, its kind and axes, BERT's name, DistilBERT's name. The axes are those of structs.py, and
# P positions, T token types; letters that stand together are one axis in the file. `{}` is the layer: ours are stacked.
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
_HEADS = {  # beside the encoder, by the kind of task
    "sequence": (
        ("head/transform", "linear D D", None, "pre_classifier"),
        ("head/classifier", "linear D C", "classifier", "classifier"),
    ),
    "tokens": (("head/classifier", "linear D C", "classifier", "classifier"),),
    "spans": (("head/classifier", "linear D C", "qa_outputs", "qa_outputs"),),
}
# Our leaves of each kind, and theirs. A linear kernel is [in, out] here and [out, in] there.
_LEAVES = {
    "table": {"": ".weight"},
    "norm": {"/scale": ".weight", "/bias": ".bias"},
    "linear": {"/kernel": ".weight", "/bias": ".bias"},
    "bias": {"/bias": ".bias"},
}
HEAD = ("cls.predictions.", "vocab_")  # how the names of MLM heads begin, and those of tasks' heads;
TASK_HEAD = ("pre_classifier.", "classifier.", "qa_outputs.")  # all others have the body's prefix

# What a file may carry beyond the table: a buffer, BERT's second pre-training task, and copies of what is tied.
IGNORED = ("embeddings.position_ids", "cls.seq_relationship.weight", "cls.seq_relationship.bias")
TIED = {
    "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
    "vocab_projector.weight": "embeddings.word_embeddings.weight",
}
# Older versions of `transformers` wrote BERT's pooler also under heads on tokens and spans, which do not read it.
IGNORED_UNDER_HEAD = ("pooler.dense.weight", "pooler.dense.bias")
LEGACY = {".gamma": ".weight", ".beta": ".bias"}  # LayerNorm in the first published files


@dataclass(frozen=True)
class Leaf:
    """One array of ours, and its tensors in the file: one, or one per layer.

    Attributes:
      path: ours, "layers/query/kernel".
      names: theirs, without the "bert." or "distilbert." in front.
      shape: ours, of one layer.
      rows: how much of our first axis is in the file: the vocabulary is padded here and not there.
      file_shape: theirs.
    """

    path: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    rows: int
    file_shape: tuple[int, ...]

    @property
    def transposed(self) -> bool:
        return self.path.endswith("/kernel")

    @property
    def full_shape(self) -> tuple[int, ...]:
        return (len(self.names), *self.shape) if self.path.startswith("layers/") else self.shape

    def read(self, tensors: Mapping[str, Tensor]) -> np.ndarray:
        value = np.zeros((len(self.names), *self.shape), np.float32)
        for name, part in zip(self.names, value, strict=True):
            array = tensors[name].read()
            array = array.T if self.transposed else array
            part[: self.rows] = array.reshape(self.rows, *self.shape[1:])
        return value.reshape(self.full_shape)

    def write(self, value: Any) -> Iterator[tuple[str, np.ndarray]]:
        for name, part in zip(self.names, np.asarray(value).reshape(len(self.names), *self.shape), strict=True):
            part = part[: self.rows]
            yield name, part.reshape(self.file_shape[::-1]).T if self.transposed else part.reshape(self.file_shape)


def leaves(config: ModelConfig, head: HeadConfig | None = None) -> list[Leaf]:
    """The name table for one architecture, with a task's head or without."""
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
