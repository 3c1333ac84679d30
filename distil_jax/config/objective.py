"""What training minimises: the masking, and the weights of the loss terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distil_jax.schema import may_change, require, require_finite


@dataclass(frozen=True)
class MaskingConfig:
    """Dynamic masking, as in the published recipe (15 %; 80 / 10 / 10; rare words more often)."""

    rate: float = 0.15  # share of each row's tokens, without padding, that become targets
    mask: float = 0.8  # share of the targets that [MASK] replaces
    random: float = 0.1  # share of the targets that a random word replaces; the remaining targets are left as they are
    # A token is chosen in proportion to max(count, 1) ** -smoothing, where count is how often it occurs in the training
    # text. 0: all tokens are equally likely.
    smoothing: float = 0.7
    mask_token_id: int = 0  # id of [MASK]; 0: the one in the tokenizer of the prepared data

    def __post_init__(self) -> None:
        require(0 < self.rate < 1, f"masking.rate must be between 0 and 1, not {self.rate}.")
        require(
            self.mask >= 0 and self.random >= 0 and self.mask + self.random <= 1,
            f"masking.mask {self.mask} and masking.random {self.random} must be shares that add up to at most 1.",
        )
        for name in ("smoothing", "mask_token_id"):
            require_finite(f"masking.{name}", getattr(self, name), least=0)


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms, which need not add up to 1; DistilBERT's authors trained theirs with 5, 2 and 1."""

    kl: float = 5.0  # soft targets: T^2 KL(teacher || student), with T the temperature
    mlm: float = 2.0  # cross entropy at the targets of masking
    cosine: float = 1.0  # cosine distance between the last hidden states of teacher and student
    mse: float = 0.0  # squared difference between the logits of teacher and student
    temperature: float = 2.0  # of the soft targets; the higher, the flatter
    soft_positions: Literal["all", "targets"] = "all"  # where kl and mse apply: at every token, or at MLM targets only
    # How many tokens have their logits in a device's memory at a time: fewer need less memory. 0: all of them.
    chunk: int = may_change(512)

    def __post_init__(self) -> None:
        for name in ("kl", "mlm", "cosine", "mse"):
            require_finite(f"loss.{name}", getattr(self, name), least=0)
        require(
            max(self.kl, self.mlm, self.cosine, self.mse) > 0,
            "Every loss weight is 0, so there is nothing to minimise: set at least one of loss.kl, loss.mlm, "
            "loss.cosine, loss.mse.",
        )
        require(self.chunk >= 0, f"loss.chunk must not be negative, but is {self.chunk}.")
        require_finite("loss.temperature", self.temperature, above=0)

    @property
    def needs_teacher(self) -> bool:
        return max(self.kl, self.cosine, self.mse) > 0


@dataclass(frozen=True)
class TaskLossConfig:
    """Weights of a task's loss terms (Sanh et al., 2019, section 4.1, for SQuAD: 0.5 and 0.5 at temperature 2)."""

    task: float = 1.0  # against the labels: cross entropy, or squared error for a regression
    soft: float = 0.0  # against a fine-tuned teacher: T^2 KL(teacher || student), or squared error for a regression
    temperature: float = 2.0  # T, of the soft targets; the higher, the flatter

    def __post_init__(self) -> None:
        for name in ("task", "soft"):
            require_finite(f"loss.{name}", getattr(self, name), least=0)
        require(max(self.task, self.soft) > 0, "loss.task and loss.soft are both 0, so there is nothing to minimise.")
        require_finite("loss.temperature", self.temperature, above=0)

    @property
    def needs_teacher(self) -> bool:
        return self.soft > 0
