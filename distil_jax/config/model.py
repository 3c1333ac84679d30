"""The architecture of an encoder, and of the head that a task puts on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from distil_jax.schema import require, require_finite, require_share

# The implementation of attention: XLA, or a kernel for the device; see `models/attention.py`.
Attention = Literal["xla", "pallas_gpu", "pallas_tpu"]
_MOST_PARAMETERS = 10**12  # more is damage or a slip, and must not reach an allocation
_MOST_LABELS = 10_000_000  # as above


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of one encoder: BERT and DistilBERT differ in nothing else."""

    vocab_size: int  # real ids; parameters are stored padded, see `padded_vocab_size`
    num_layers: int = 12
    hidden_size: int = 768
    num_heads: int = 12
    intermediate_size: int = 3072
    max_positions: int = 512
    token_types: int = 2  # rows of the token-type table; 0: no table, as in DistilBERT
    positions: Literal["learned", "sinusoidal"] = "learned"  # sinusoidal: computed, never a parameter
    pooler: bool = False  # BERT's tanh layer on [CLS], from which fine-tuning starts
    mlm_head: bool = True
    activation: Literal["gelu", "gelu_tanh", "relu"] = "gelu"  # gelu: the exact one, with erf
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; a training state's parameters stay float32
    unroll: bool = True  # every layer compiled on its own: faster on CPUs, slower to compile
    attention: Attention = "xla"
    # What the backward pass recomputes to save memory; on a CPU with `unroll` it saves none.
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
            f"This model would have {parameters:,} parameters, which no machine holds: is one of its sizes a slip?",
        )
        require(
            self.positions == "learned" or self.hidden_size % 2 == 0, "Sinusoidal positions need an even hidden_size."
        )

    @property
    def padded_vocab_size(self) -> int:
        """The vocabulary rounded up to 128, whatever the mesh, so that every checkpoint fits every mesh."""
        return -(-self.vocab_size // 128) * 128

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class HeadConfig:
    """A task's head: it classifies sequences or tokens, or finds where a span begins and ends."""

    kind: Literal["sequence", "tokens", "spans"]
    labels: int = 2  # of a sequence: 1 is a regression; of spans: 2, start and end
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
        return self.label_names or tuple(f"LABEL_{number}" for number in range(self.labels))

    def encoder(self, config: ModelConfig) -> ModelConfig:
        """The encoder under this head: no MLM head, and a pooler only for sequences on a BERT."""
        return replace(config, mlm_head=False, pooler=self.kind == "sequence" and config.token_types > 0)
