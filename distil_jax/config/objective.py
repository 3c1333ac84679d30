"""What is minimised: masking, and the weights of the loss terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distil_jax.schema import may_change, require, require_finite


@dataclass(frozen=True)
class MaskingConfig:
    """Dynamic masking, as in the published recipe (15 %; 80 / 10 / 10; rare words more often)."""

    rate: float = 0.15  # share of the real tokens of each row that become targets
    mask: float = 0.8  # share of the targets replaced by [MASK]
    random: float = 0.1  # share of the targets replaced by a random word; the rest are kept
    smoothing: float = 0.7  # tokens are chosen in proportion to max(count, 1) ** -smoothing; 0: all alike
    mask_token_id: int = 0  # 0: from the tokenizer of the prepared data

    def __post_init__(self) -> None:
        require(0 < self.rate < 1, f"masking.rate must be between 0 and 1, not {self.rate}.")
        require(
            self.mask >= 0 and self.random >= 0 and self.mask + self.random <= 1,
            f"masking.mask {self.mask} and masking.random {self.random} must be shares of one whole.",
        )
        for name in ("smoothing", "mask_token_id"):
            require_finite(f"masking.{name}", getattr(self, name), least=0)


@dataclass(frozen=True)
class LossConfig:
    """Weights of the terms (the authors' released run: 5, 2, 1); they are not normalised."""

    kl: float = 5.0  # soft targets: T^2 KL(teacher || student)
    mlm: float = 2.0
    cosine: float = 1.0  # between last hidden states
    mse: float = 0.0  # between raw logits: matching logits
    temperature: float = 2.0
    soft_positions: Literal["all", "targets"] = "all"  # where kl and mse apply: every token, or MLM targets only
    chunk: int = may_change(512)  # tokens per device whose logits exist at a time (`fused.py`); 0: all

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
    """Weights of a task's terms (Sanh et al., 2019, section 4.1, for SQuAD: 0.5 and 0.5 at temperature 2)."""

    task: float = 1.0  # against the labels: cross entropy, or squared error for a regression
    soft: float = 0.0  # against a fine-tuned teacher: T^2 KL(teacher || student), or squared error for a regression
    temperature: float = 2.0

    def __post_init__(self) -> None:
        for name in ("task", "soft"):
            require_finite(f"loss.{name}", getattr(self, name), least=0)
        require(max(self.task, self.soft) > 0, "loss.task and loss.soft are both 0, so there is nothing to minimise.")
        require_finite("loss.temperature", self.temperature, above=0)

    @property
    def needs_teacher(self) -> bool:
        return self.soft > 0
