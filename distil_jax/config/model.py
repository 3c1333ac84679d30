"""The architecture of an encoder, and of a task's head on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from distil_jax.schema import require, require_finite, require_share

# Who computes attention: XLA, or a kernel for the device; see `models/attention.py`.
Attention = Literal["xla", "pallas_gpu", "pallas_tpu"]
# More than this is a damaged file or a typing error, and is refused before anything of that size is allocated.
_MOST_PARAMETERS = 10**12
_MOST_LABELS = 10_000_000


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of one encoder, and how it is computed. These fields cover both BERT and DistilBERT."""

    vocab_size: int  # ids in the tokenizer's vocabulary; the tables are stored longer, see `padded_vocab_size`
    num_layers: int = 12
    hidden_size: int = 768
    num_heads: int = 12
    intermediate_size: int = 3072  # width of the feed-forward layers
    max_positions: int = 512  # longest row in tokens
    token_types: int = 2  # rows of the token-type table; 0: no table, as in DistilBERT
    positions: Literal["learned", "sinusoidal"] = "learned"  # sinusoidal ones are computed and have no parameters
    pooler: bool = False  # BERT's tanh layer on [CLS], from which fine-tuning starts
    mlm_head: bool = True
    activation: Literal["gelu", "gelu_tanh", "relu"] = "gelu"  # gelu: the exact one, with erf
    hidden_dropout: float = 0.1  # on the embeddings and on the output of every sublayer
    attention_dropout: float = 0.1  # on the attention probabilities
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02  # standard deviation of the initial weights
    pad_token_id: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters in training are always float32
    unroll: bool = True  # compile every layer on its own: faster steps on CPUs, but slower to compile
    attention: Attention = "xla"
    # What the backward pass computes again to save memory: nothing, all but matrix products and attention, or all of
    # it. On a CPU with `unroll` this saves no memory.
    remat: Literal["none", "dots", "full"] = "none"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_layers", "hidden_size", "num_heads", "intermediate_size", "max_positions"):
            require(getattr(self, name) > 0, f"{name} must be at least 1, not {getattr(self, name)}.")
        require(
            self.hidden_size % self.num_heads == 0,
            f"hidden_size {self.hidden_size} does not divide into {self.num_heads} heads: "
            "choose num_heads so that it does.",
        )
        require(self.token_types >= 0, f"token_types must be 0 or more, not {self.token_types}.")
        for name in ("hidden_dropout", "attention_dropout"):
            require_share(name, getattr(self, name))
        require_finite("initializer_range", self.initializer_range, least=0)
        require_finite("layer_norm_eps", self.layer_norm_eps, above=0)
        rows = self.vocab_size + self.max_positions + self.token_types
        layer = 4 * self.hidden_size + 2 * self.intermediate_size
        parameters = self.hidden_size * (rows + self.num_layers * layer)
        require(
            parameters <= _MOST_PARAMETERS,
            f"This model would have {parameters:,} parameters, which no machine holds: is one of its sizes mistyped?",
        )
        require(
            self.positions == "learned" or self.hidden_size % 2 == 0, "Sinusoidal positions need an even hidden_size."
        )

    @property
    def padded_vocab_size(self) -> int:
        """`vocab_size` rounded up to a multiple of 128: the same on every mesh, so that a checkpoint fits any mesh."""
        return -(-self.vocab_size // 128) * 128

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class HeadConfig:
    """A task's head: it classifies sequences or tokens, or predicts where a span begins and ends."""

    kind: Literal["sequence", "tokens", "spans"]
    labels: int = 2  # number of logits; for sequences, 1 means regression; for spans always 2, start and end
    dropout: float = 0.1  # before the last layer; published: 0.2 for sequences on DistilBERT, 0 for spans on BERT
    label_names: tuple[str, ...] = ()  # in the order of the logits; empty: LABEL_0, LABEL_1, ...

    def __post_init__(self) -> None:
        require(1 <= self.labels <= _MOST_LABELS, f"labels must be from 1 to {_MOST_LABELS}, not {self.labels}.")
        require(self.kind != "tokens" or self.labels > 1, "Classifying tokens needs at least 2 labels, not 1.")
        require(
            self.kind != "spans" or self.labels == 2, f"Spans have 2 labels, their start and end, not {self.labels}."
        )
        require_share("dropout", self.dropout)
        require(
            not self.label_names or len(set(self.label_names)) == len(self.label_names) == self.labels,
            f"{self.labels} labels need as many different names, not {list(self.label_names)}.",
        )

    @property
    def names(self) -> tuple[str, ...]:
        """A name for each label, in the order of the logits."""
        return self.label_names or tuple(f"LABEL_{index}" for index in range(self.labels))

    def encoder(self, config: ModelConfig) -> ModelConfig:
        """The architecture of the encoder under this head: no MLM head, and a pooler only for sequences on a BERT."""
        return replace(config, mlm_head=False, pooler=self.kind == "sequence" and config.token_types > 0)
