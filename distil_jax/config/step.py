"""What defines one optimiser step: the models, the objective and the optimiser."""

from __future__ import annotations

from dataclasses import dataclass

from distil_jax.config.model import HeadConfig, ModelConfig
from distil_jax.config.objective import LossConfig, MaskingConfig, TaskLossConfig
from distil_jax.schema import require, require_finite, require_share

MOST_STEPS = 2**31 - 1  # a training state counts steps in 32 bits


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and linear decay to zero (the published recipe)."""

    learning_rate: float = 5e-4  # the peak, reached after the warm-up
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = 0.0  # applied to all parameters but biases and LayerNorm
    warmup: float = 0.05  # share of the steps over which the learning rate rises from 0
    clip: float = 5.0  # largest global norm of the gradient; a larger one is scaled down to it
    steps: int = 0  # steps until the learning rate is 0; 0: the length of the run. `train_step` alone needs it set
    freeze: tuple[str, ...] = ()  # parameters that are not trained, by the start of their path ("embeddings/position")

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps", "clip"):
            require_finite(f"optimizer.{name}", getattr(self, name), above=0)
        for name in ("beta1", "beta2"):
            require_share(f"optimizer.{name}", getattr(self, name))
        for name in ("weight_decay", "steps"):
            require_finite(f"optimizer.{name}", getattr(self, name), least=0)
        require(0 <= self.warmup <= 1, f"optimizer.warmup is a share of the steps, 0 to 1, not {self.warmup}.")
        require(self.steps <= MOST_STEPS, f"optimizer.steps must be at most {MOST_STEPS}, not {self.steps}.")


@dataclass(frozen=True)
class StepConfig:
    """Everything that `init_state` and `train_step` need to know: the models, the objective and the optimiser."""

    student: ModelConfig
    teacher: ModelConfig | None = None
    loss: LossConfig = LossConfig()
    masking: MaskingConfig = MaskingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    accumulation: int = 1  # micro-batches per update
    head: HeadConfig | None = None  # a task's head on both models; None: masked language modelling
    task: TaskLossConfig = TaskLossConfig()  # with a head, this replaces `loss` and `masking`
    targets_per_row: int | None = None  # most MLM targets in a row, see `most_targets`; None: no limit

    @property
    def needs_teacher(self) -> bool:
        return (self.loss if self.head is None else self.task).needs_teacher

    def __post_init__(self) -> None:
        require(self.accumulation >= 1, f"accumulation must be at least 1, not {self.accumulation}.")
        require(
            self.targets_per_row is None or self.targets_per_row >= 1,
            f"targets_per_row must be at least 1, not {self.targets_per_row}: leave it out for any number.",
        )
        if self.head is not None:
            require(
                not self.needs_teacher or self.teacher is not None,
                "loss.soft compares with a teacher, and there is none: set teacher.path, or loss.soft = 0.",
            )
            return
        require(self.student.mlm_head, "The student has no MLM head, which masked-LM training needs.")
        if self.teacher is None:
            require(
                not self.loss.needs_teacher,
                "loss.kl, loss.cosine and loss.mse need a teacher: set teacher.path, or set them to 0.",
            )
            return
        require(
            self.teacher.vocab_size == self.student.vocab_size,
            f"The teacher knows {self.teacher.vocab_size} tokens and the student {self.student.vocab_size}: "
            "both must use one tokenizer.",
        )
        require(
            self.loss.cosine == 0 or self.teacher.hidden_size == self.student.hidden_size,
            f"The cosine loss compares hidden states of one width, but the teacher's is {self.teacher.hidden_size} "
            f'and the student\'s {self.student.hidden_size}: set loss.cosine = 0 (and student.init = "random"), '
            "or give both one width.",
        )
        require(
            self.teacher.mlm_head or max(self.loss.kl, self.loss.mse) == 0,
            "The teacher has no MLM head, so it has no soft targets: train its head first "
            "(`distil-jax train` without a teacher), or set loss.kl = 0 and loss.mse = 0.",
        )
