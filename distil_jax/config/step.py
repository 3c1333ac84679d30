"""What defines one optimiser step: the models, the objective and the optimiser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from distil_jax.config.model import HeadConfig, ModelConfig
from distil_jax.config.objective import LossConfig, MaskingConfig, TaskLossConfig
from distil_jax.schema import require, require_finite, require_share

if TYPE_CHECKING:  # configurations are read before JAX is imported
    import optax

    from distil_jax.structs import Array, Batch, Encoded, Metrics

MOST_STEPS = 2**31 - 1  # a training state counts steps in 32 bits


@runtime_checkable
class Objective(Protocol):
    """What a step minimises: terms, each with a count that depends on the whole batch alone.

    A step computes `loss` of parts of the batch, one for each device and micro-batch, and adds up losses and terms. So
    a loss is a sum over the part's positions, divided by the count of the whole batch. Any frozen dataclass with these
    methods is an objective, such as `Distillation` and `TaskObjective`.
    """

    def counts(self, batch: Batch) -> dict[str, Array]:
        """How many positions (or answers) of the whole batch each term averages over, float32 scalars."""

    def loss(
        self, student: Encoded, teacher: Encoded | None, batch: Batch, counts: dict[str, Array]
    ) -> tuple[Array, Metrics]:
        """The loss of a part of the batch, a scalar, and its terms, a `Mean` by name; `counts` are of all of it.

        With a task's head, `student` and `teacher` are logits.
        """

    def combine(self, terms: Metrics, counts: dict[str, Array]) -> Array:
        """The loss of the whole batch, from its terms."""


@runtime_checkable
class Optimizer(Protocol):
    """An optimiser of one's own: a frozen dataclass that makes an optax transformation from its fields."""

    def make(self) -> optax.GradientTransformation:
        """The transformation. It is made once for equal dataclasses."""


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
    # Or a function (teacher_params, batch) -> `Encoded` (with a task's head: its logits), such as `LogitsFromBatch()`.
    teacher: ModelConfig | Callable | None = None
    loss: LossConfig = LossConfig()
    masking: MaskingConfig = MaskingConfig()
    optimizer: OptimizerConfig | Optimizer | Any = OptimizerConfig()  # Any: an optax transformation
    accumulation: int = 1  # micro-batches per update
    head: HeadConfig | None = None  # a task's head on both models; None: masked language modelling
    task: TaskLossConfig = TaskLossConfig()  # with a head, this replaces `loss` and `masking`
    targets_per_row: int | None = None  # most MLM targets in a row, see `most_targets`; None: no limit
    objective: Objective | None = None  # None: `Distillation` of `loss`, or with a head `TaskObjective` of `task`

    @property
    def teacher_model(self) -> ModelConfig | None:
        """The teacher's architecture, if it is a model of this library."""
        return self.teacher if isinstance(self.teacher, ModelConfig) else None

    @property
    def has_own_optimizer(self) -> bool:
        """Whether the optimiser is the user's, and not the published one."""
        return type(self.optimizer) is not OptimizerConfig

    @property
    def needs_teacher(self) -> bool:
        if self.objective is not None:
            return self.teacher is not None
        return (self.loss if self.head is None else self.task).needs_teacher

    def __post_init__(self) -> None:
        require(self.accumulation >= 1, f"accumulation must be at least 1, not {self.accumulation}.")
        require(
            self.targets_per_row is None or self.targets_per_row >= 1,
            f"targets_per_row must be at least 1, not {self.targets_per_row}: leave it out for any number.",
        )
        for name in ("teacher", "optimizer", "objective"):
            require(
                _is_hashable(getattr(self, name)),
                f"StepConfig.{name} must be hashable, because a step is compiled for it: make its class a dataclass "
                "with frozen=True, and its fields numbers, strings, tuples or such dataclasses.",
            )
        if self.objective is not None:
            return
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
        if self.teacher_model is None:
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
            "(`distil-jax train` without a teacher, with student.init = its folder), or set loss.kl = 0, loss.mse = 0 "
            'and student.init = "random".',
        )


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
