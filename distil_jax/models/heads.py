"""Task heads: an encoder that classifies sequences or tokens, or finds spans, as `transformers` builds them.

The parameters are the encoder's own tree without its MLM head, and beside it `head`: what distillation trained goes in
as it is, and comes out under the same names.
"""

from __future__ import annotations

from dataclasses import replace

import flax.linen as nn
import jax

from distil_jax.config.model import HeadConfig, ModelConfig
from distil_jax.models.dropout import batch_seeds, dropout
from distil_jax.models.encoder import MaskedLm, abstract_params, dense, init_params, one_position
from distil_jax.schema import require
from distil_jax.structs import Array, Batch, Encoded


class TaskHead(nn.Module):
    """From hidden states to the logits of a task.

    A sequence's come from its first position: through the pooler of a BERT (Devlin et al., 2018, section 4.1), or
    through a ReLU layer of the head's own, which is DistilBERT's. Those of tokens and spans come from each position.
    """

    config: ModelConfig
    task: HeadConfig

    @nn.compact
    def __call__(self, encoded: Encoded, batch: Batch, *, train: bool) -> Array:
        """Returns logits [B, C] or [B, L, C], float32."""
        config, task = self.config, self.task
        if task.kind != "sequence":
            features = encoded.hidden
        elif encoded.pooled is not None:
            features = encoded.pooled
        else:
            transform = dense(config, config.hidden_size, "transform", "embed", "features")
            features = nn.relu(transform(encoded.hidden[:, 0]))
        if train and task.dropout > 0:
            features = dropout(features, batch_seeds(self.make_rng("dropout"), batch, 1)[:, 0], task.dropout)
        # A few columns cost nothing, and logits rounded to bfloat16 would tie.
        exact = replace(config, dtype="float32")
        return dense(exact, task.labels, "classifier", "embed", None)(features)


class TaskModel(nn.Module):
    """An encoder under a task's head. `apply({"params": p}, batch, train=..., rngs=...)` returns logits.

    Logits are float32: [B, C] for a sequence (one a row: packed rows have no answer), [B, L, C] for tokens and spans.
    Dropout acts as in `MaskedLm`. `config` may be any that the encoder was trained with: its MLM head is left out,
    and its pooler too where the task does not read it.
    """

    config: ModelConfig
    task: HeadConfig

    def setup(self) -> None:
        encoder = self.task.encoder(self.config)
        self.encoder = MaskedLm(encoder)
        nn.share_scope(self, self.encoder)  # its parameters stand beside the head's, not a level below
        self.head = TaskHead(encoder, self.task)

    def __call__(self, batch: Batch, *, train: bool = False) -> Array:
        return self.head(self.encoder(batch, train=train), batch, train=train)


def init_task_params(key: Array, config: ModelConfig, task: HeadConfig) -> dict:
    """Random parameters of a `TaskModel`, each still boxed with its logical axes (`nn.unbox` takes them off)."""
    return TaskModel(replace(config, attention="xla"), task).init(key, one_position())["params"]


def abstract_task_params(config: ModelConfig, task: HeadConfig) -> dict:
    """Shapes and logical axes of a `TaskModel`'s parameters, no values: what shardings are made from."""
    return _traced.eval_shape(jax.random.key(0), config, task)


_traced = jax.jit(init_task_params, static_argnums=(1, 2))  # never run: it remembers what it traced


def model_of(config: ModelConfig, task: HeadConfig | None) -> MaskedLm | TaskModel:
    """The module: an encoder for language modelling where there is no task."""
    return MaskedLm(config) if task is None else TaskModel(config, task)


def init_model(key: Array, config: ModelConfig, task: HeadConfig | None) -> dict:
    """Random parameters of `model_of`, boxed."""
    return init_params(key, config) if task is None else init_task_params(key, config, task)


def abstract_model(config: ModelConfig, task: HeadConfig | None) -> dict:
    """Shapes and logical axes of the parameters of `model_of`."""
    return abstract_params(config) if task is None else abstract_task_params(config, task)


def with_fresh_head(key: Array, config: ModelConfig, task: HeadConfig, params: dict) -> dict:
    """The parameters of a `TaskModel` before its first step: a trained encoder under a random head.

    Kernels are normal with `initializer_range`, biases 0. A BERT that has no pooler gets a fresh one too.

    Args:
      key: for the head.
      config: of `params`.
      task: what the head is for.
      params: the encoder's; its leaves are taken as they are, without an MLM head, a pooler that the task does not
        read, or another task's head.

    Raises:
      InputError: `params` holds no encoder.
    """
    absent = [name for name in ("embeddings", "layers") if name not in params]
    require(not absent, f"An encoder is needed under the head, but these parameters have no {' and no '.join(absent)}.")
    parts = abstract_task_params(config, task).keys()
    kept = {name: params[name] for name in parts if name in params and name != "head"}

    @jax.jit  # makes nothing of the encoder that is thrown away
    def fresh(key: Array) -> dict:
        made = nn.unbox(init_task_params(key, config, task))
        return {name: made[name] for name in parts if name not in kept}

    return kept | fresh(key)
