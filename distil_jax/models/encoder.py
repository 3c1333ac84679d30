"""`MaskedLm`: BERT and DistilBERT as one linen module that differs only in its frozen `ModelConfig`.

Blocks are stacked: every block parameter has a leading axis of layers, so choosing a student's layers is one
indexing of a tree. Logical axis names stand beside each parameter; `training/sharding.py` gives them a mesh.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp

from distil_jax.config.model import ModelConfig
from distil_jax.models.attention import attend
from distil_jax.models.dropout import batch_seeds, dropout
from distil_jax.structs import PADDING_LOGIT, Array, Batch, Encoded, Head, sinusoidal_table

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
}

# What remat = "dots" keeps: the products with parameters, and what a kernel made of attention's.
_PRODUCTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names("attention"),
)


def _normal(config: ModelConfig, *axes: str | None) -> Callable[..., Array]:
    return nn.with_logical_partitioning(nn.initializers.normal(config.initializer_range), axes)


def _zeros(*axes: str | None) -> Callable[..., Array]:
    return nn.with_logical_partitioning(nn.initializers.zeros_init(), axes)


def _norm(config: ModelConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(
        epsilon=config.layer_norm_eps,
        dtype=config.dtype,  # of the output; linen takes the statistics in float32
        scale_init=nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",)),
        bias_init=_zeros("norm"),
        name=name,
    )


def dense(
    config: ModelConfig, features: int | tuple[int, ...], name: str, *axes: str | None, inputs: int = 1
) -> nn.Module:
    """A dense layer whose kernel has the logical `axes`; the first `inputs` of them are contracted."""
    return nn.DenseGeneral(
        features,
        axis=tuple(range(-inputs, 0)),
        dtype=config.dtype,
        kernel_init=_normal(config, *axes),
        bias_init=_zeros(*axes[inputs:]),
        name=name,
    )


class Embeddings(nn.Module):
    """Words + positions + token types, normalised (Devlin et al., 2018, figure 2)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, batch: Batch, seeds_B: Array | None) -> tuple[Array, Array]:
        """Returns hidden states [B, L, D] and the word table [V, D], to which the MLM head is tied."""
        config = self.config
        words_VxD = self.param("word", _word_init(config), (config.padded_vocab_size, config.hidden_size), jnp.float32)
        hidden_BxLxD = jnp.take(words_VxD, batch.input_ids, axis=0)
        if config.positions == "learned":
            positions_PxD = self.param(
                "position", _normal(config, None, "embed"), (config.max_positions, config.hidden_size), jnp.float32
            )
        else:
            positions_PxD = jnp.asarray(sinusoidal_table(config.max_positions, config.hidden_size))
        hidden_BxLxD += jnp.take(positions_PxD, batch.position_ids, axis=0)
        if config.token_types:
            types_TxD = self.param(
                "token_type", _normal(config, None, "embed"), (config.token_types, config.hidden_size), jnp.float32
            )
            token_types = jnp.zeros_like(batch.input_ids) if batch.token_type_ids is None else batch.token_type_ids
            hidden_BxLxD += jnp.take(types_TxD, token_types, axis=0)
        elif batch.token_type_ids is not None:
            raise ValueError("This model has no token types, but the batch carries token_type_ids.")
        hidden_BxLxD = _norm(config, "norm")(hidden_BxLxD)
        return dropout(hidden_BxLxD, seeds_B, config.hidden_dropout), words_VxD


class Block(nn.Module):
    """One Transformer layer, LayerNorm after each residual sum (Vaswani et al., 2017, section 3.1).

    Called by `nn.scan`, hence the (carry, per-layer output) pair it returns.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, hidden_BxLxD: Array, segment_ids_BxL: Array, seeds_3xB: Array | None) -> tuple[Array, None]:
        config = self.config
        attention_seeds_B, attended_seeds_B, output_seeds_B = (None,) * 3 if seeds_3xB is None else seeds_3xB
        heads = (config.num_heads, config.head_size)
        query, key, value = (
            dense(config, heads, name, "embed", "heads", "head_size")(hidden_BxLxD)
            for name in ("query", "key", "value")
        )
        context_BxLxHxK = attend(
            query,
            key,
            value,
            segment_ids_BxL,
            dropout_rate=config.attention_dropout,
            seeds=attention_seeds_B,
            implementation=config.attention,
        )
        attended_BxLxD = dense(config, config.hidden_size, "attention_output", "heads", "head_size", "embed", inputs=2)(
            context_BxLxHxK
        )
        attended_BxLxD = dropout(attended_BxLxD, attended_seeds_B, config.hidden_dropout)
        hidden_BxLxD = _norm(config, "attention_norm")(hidden_BxLxD + attended_BxLxD)

        inner_BxLxF = dense(config, config.intermediate_size, "intermediate", "embed", "mlp")(hidden_BxLxD)
        inner_BxLxF = _ACTIVATIONS[config.activation](inner_BxLxF)
        output_BxLxD = dense(config, config.hidden_size, "output", "mlp", "embed")(inner_BxLxF)
        output_BxLxD = dropout(output_BxLxD, output_seeds_B, config.hidden_dropout)
        return _norm(config, "output_norm")(hidden_BxLxD + output_BxLxD), None


class MlmHead(nn.Module):
    """The transform before the tied vocabulary projection, and that projection's bias."""

    config: ModelConfig

    @nn.compact
    def __call__(self, hidden_BxLxD: Array, words_VxD: Array) -> tuple[Array, Head]:
        config = self.config
        features_BxLxD = dense(config, config.hidden_size, "transform", "embed", "features")(hidden_BxLxD)
        features_BxLxD = _norm(config, "norm")(_ACTIVATIONS[config.activation](features_BxLxD))
        bias_V = self.param("bias", _zeros("vocab"), (config.padded_vocab_size,), jnp.float32)
        # The one place where padding ids are told from real ones: no loss has to know of them. In float32 for a teacher
        # in bfloat16 too: rounded, the two models' padding would differ by millions.
        is_word_V = jnp.arange(config.padded_vocab_size) < config.vocab_size
        bias_V = jnp.where(is_word_V, bias_V.astype(jnp.float32), PADDING_LOGIT)
        return features_BxLxD, Head(kernel=words_VxD, bias=bias_V)


class MaskedLm(nn.Module):
    """An encoder with its MLM head. `apply({"params": p}, batch, train=..., rngs=...)` returns `Encoded`.

    It stops before the vocabulary: the loss owns the [D, V] product, so logits [B, L, V] need never exist.
    Dropout acts when `train` is true and then needs `rngs={"dropout": key}`; a row's masks are drawn from the key and
    `batch.row_index`, or its place in the batch.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> Encoded:
        config = self.config
        first_seeds_B, seeds_Nx3xB = None, None
        if train and max(config.hidden_dropout, config.attention_dropout) > 0:
            first_seeds_B, *rest = batch_seeds(self.make_rng("dropout"), batch, 1 + 3 * config.num_layers).T
            seeds_Nx3xB = jnp.stack(rest).reshape(config.num_layers, 3, -1)
        hidden_BxLxD, words_VxD = Embeddings(config, name="embeddings")(batch, first_seeds_B)
        block = Block
        apart = self.has_variable("params", _layer_name(0))
        if config.remat != "none":
            policy = _PRODUCTS if config.remat == "dots" else None
            # In a loop nothing else could be taken for the second computation; unrolled, XLA would make them one.
            block = nn.remat(Block, policy=policy, prevent_cse=apart or config.unroll)
        if apart:
            for number in range(config.num_layers):
                seeds_3xB = None if seeds_Nx3xB is None else seeds_Nx3xB[number]
                hidden_BxLxD, _ = block(config, name=_layer_name(number))(hidden_BxLxD, batch.segment_ids, seeds_3xB)
        else:
            blocks = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 0),
                length=config.num_layers,
                unroll=config.num_layers if config.unroll else 1,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            hidden_BxLxD, _ = blocks(config, name="layers")(hidden_BxLxD, batch.segment_ids, seeds_Nx3xB)
        features_BxLxD, head, pooled_BxD = None, None, None
        if config.pooler:
            # No masked-LM loss reads it, and XLA leaves out what nobody reads; fine-tuning starts from it.
            pooled_BxD = jnp.tanh(dense(config, config.hidden_size, "pooler", "embed", "features")(hidden_BxLxD[:, 0]))
        if config.mlm_head:
            features_BxLxD, head = MlmHead(config, name="mlm")(hidden_BxLxD, words_VxD)
        return Encoded(hidden=hidden_BxLxD, features=features_BxLxD, head=head, pooled=pooled_BxD)


def _word_init(config: ModelConfig) -> Callable[..., Array]:
    """Normal, with zeros at the ids that only pad the vocabulary."""

    def init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        table_VxD = nn.initializers.normal(config.initializer_range)(key, shape, dtype)
        return jnp.where(jnp.arange(shape[0])[:, None] < config.vocab_size, table_VxD, 0)

    return nn.with_logical_partitioning(init, ("vocab", None))


def init_params(key: Array, config: ModelConfig) -> dict:
    """Random parameters, each still boxed with its logical axes (`nn.unbox` takes them off)."""
    # Not by a kernel: none takes one position, and parameters know nothing of it.
    return MaskedLm(replace(config, attention="xla")).init(key, one_position())["params"]


def one_position() -> Batch:
    """The smallest batch, to make parameters with."""
    ids = jnp.zeros((1, 1), jnp.int32)
    return Batch(input_ids=ids, segment_ids=ids, position_ids=ids, labels=ids)


def layers_apart(params: dict) -> dict:
    """The same parameters, for `MaskedLm.apply`, with arrays of each layer's own instead of stacked ones.

    For inference on CPUs: there XLA copies every layer out of a stack at every call, which at batch 1 is most of the
    time (`commands/bench/README.md`).
    """
    *_, one_of_them = jax.tree.leaves(params["layers"])
    layers = {
        _layer_name(number): jax.tree.map(lambda stacked, number=number: stacked[number], params["layers"])
        for number in range(len(one_of_them))
    }
    return {name: part for name, part in params.items() if name != "layers"} | layers


def _layer_name(number: int) -> str:
    return f"layers_{number}"


def abstract_params(config: ModelConfig) -> dict:
    """Shapes and logical axes of the parameters, no values: what shardings are made from."""
    return _traced.eval_shape(jax.random.key(0), config)


_traced = jax.jit(init_params, static_argnums=1)  # never run: it remembers what it traced


def count_parameters(config: ModelConfig) -> int:
    """Parameters with the vocabulary at its real size, the tied kernel counted once."""
    stored = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nn.unbox(abstract_params(config))))
    per_id = config.hidden_size + int(config.mlm_head)
    computed = config.max_positions * config.hidden_size if config.positions == "sinusoidal" else 0
    return stored + computed - (config.padded_vocab_size - config.vocab_size) * per_id
