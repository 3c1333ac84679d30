"""One training run: its data, models, schedule, mesh and machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from distil_jax.config.model import ModelConfig
from distil_jax.config.objective import LossConfig, MaskingConfig
from distil_jax.config.step import MOST_STEPS, OptimizerConfig
from distil_jax.schema import may_change, path_field, require, require_finite, require_share

# The small BERT that comes with distil_jax: what can be tried without a model hub.
EMBEDDED_TEACHER = Path(__file__).parents[1] / "teacher"
_MOST_ROWS = 2**24  # in a batch; more is a slip, and must not reach an allocation
_MOST_DEVICES = 2**20  # along one axis of a mesh
_LAST_SEED = 2**32 - 1  # JAX reads only 32 bits of a seed
# Fields that `StudentConfig` has in common with the `ModelConfig` it becomes.
STUDENT_SHAPE = (
    "num_layers",
    "hidden_size",
    "num_heads",
    "intermediate_size",
    "max_positions",
    "token_types",
    "positions",
)


@dataclass(frozen=True)
class TeacherConfig:
    path: str = path_field("")  # a model folder or a hub id; empty: no teacher
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # for its parameters and computation; auto: compute.dtype
    sharded: bool = may_change(True)  # parameters sharded along fsdp and tensor like the student's; False: replicated


@dataclass(frozen=True)
class StudentConfig:
    """The student's shape.

    None means: as in the folder named by `init`, otherwise what the comment says. A resolved config has no None.
    """

    init: str = path_field("teacher", may_change=False)  # "teacher", "random", or the folder of an existing student
    layers: tuple[int, ...] = ()  # teacher layers to copy; empty: 0,2,4,7,9,11 for 12 -> 6, else evenly spread
    num_layers: int | None = None  # the number of `layers`, or half the teacher's; 12 without a teacher
    hidden_size: int | None = None  # this and the next three: the teacher's, or BERT-base's without a teacher
    num_heads: int | None = None
    intermediate_size: int | None = None
    max_positions: int | None = None
    token_types: int | None = None  # 0, as in DistilBERT; 2 keeps BERT's table
    # Adds the teacher's token-type row 0 to the position embeddings, so that the sum stays the teacher's. None: if
    # possible, which needs learned positions and a student without token types.
    fold_token_types: bool | None = None
    positions: Literal["learned", "sinusoidal"] | None = None  # learned
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_heads", "intermediate_size", "max_positions"):
            value = getattr(self, name)
            require_finite(f"student.{name}", 1 if value is None else value, least=1)
        require_finite("student.token_types", self.token_types or 0, least=0)
        require(min(self.layers, default=0) >= 0, f"student.layers counts from 0, but is {list(self.layers)}.")
        for name in ("hidden_dropout", "attention_dropout"):
            require_share(f"student.{name}", getattr(self, name))
        require(
            not self.layers or self.num_layers in (None, len(self.layers)),
            f"student.layers names {len(self.layers)} layers and student.num_layers says {self.num_layers}: "
            "set one of them.",
        )
        require(
            not self.layers or self.init == "teacher",
            f"student.layers names layers of the teacher to copy, and student.init = {self.init!r} copies none: leave "
            'student.layers out (student.num_layers says how many there are), or set student.init = "teacher".',
        )

    def resolved(self, model: ModelConfig, teacher: ModelConfig | None) -> StudentConfig:
        """The config with nothing left open, as the student was built.

        Args:
          model: the student's.
          teacher: the teacher's; None without a teacher.
        """
        kept = model.positions == "learned" and model.token_types == 0
        foldable = self.init == "teacher" and kept and teacher is not None and teacher.token_types > 0
        shape = {name: getattr(model, name) for name in STUDENT_SHAPE}
        return replace(self, **shape, fold_token_types=foldable and self.fold_token_types is not False)


@dataclass(frozen=True)
class DataConfig:
    path: str = path_field("")  # the folder that `distil-jax prepare` wrote


@dataclass(frozen=True)
class TrainConfig:
    batch_rows: int = 256  # rows per optimiser step, over all devices and micro-batches
    steps: int = 0  # optimiser steps; or
    epochs: float = 0.0  # passes over the training rows
    accumulation: int = may_change(0)  # micro-batches per step: less memory, same update; 0: from tokens_per_device
    tokens_per_device: int = may_change(8192)  # most tokens of a micro-batch; sets accumulation if that is 0
    log_every: int = may_change(20)  # steps
    eval_every: int = may_change(1000)  # steps; 0: only before the first and after the last; for a task: every epoch
    eval_rows: int = may_change(
        512
    )  # held-out rows per evaluation, a random choice that is the same for every run; 0: all
    checkpoint_every: int = may_change(
        1000
    )  # steps; 0: at every evaluation. The best evaluation so far is always saved
    keep_checkpoints: int = may_change(3)  # how many of the newest to keep, besides the best one
    patience: int = 0  # early stopping: evaluations in a row without a better result; 0: never
    skips_allowed: int = may_change(10)  # steps in a row without a finite loss and gradient; one more ends the run
    spike_factor: float = may_change(3.0)  # a loss above so many times its running median is a spike; 0: never
    spike_steps: int = may_change(100)  # spikes in a row that end the run
    hang_seconds: float = may_change(1800.0)  # without any progress, after which the run is ended; 0: never
    profile_at: int = may_change(0)  # first step to profile; 0: no profile
    profile_steps: int = may_change(5)
    tensorboard: bool = may_change(True)

    def __post_init__(self) -> None:
        for name in (
            "batch_rows",
            "tokens_per_device",
            "log_every",
            "keep_checkpoints",
            "profile_steps",
            "spike_steps",
        ):
            require_finite(f"train.{name}", getattr(self, name), least=1)
        for name in (
            "steps",
            "epochs",
            "accumulation",
            "eval_every",
            "checkpoint_every",
            "patience",
            "eval_rows",
            "profile_at",
            "skips_allowed",
            "spike_factor",
            "hang_seconds",
        ):
            require_finite(f"train.{name}", getattr(self, name), least=0)
        require(
            self.spike_factor == 0 or self.spike_factor >= 1,
            f"train.spike_factor must be 0 (never) or at least 1, not {self.spike_factor}.",
        )
        for name, most in (("batch_rows", _MOST_ROWS), ("steps", MOST_STEPS), ("epochs", MOST_STEPS)):
            require(getattr(self, name) <= most, f"train.{name} must be at most {most}, not {getattr(self, name)}.")
        require(
            (self.steps > 0) != (self.epochs > 0),
            f"Set either train.steps or train.epochs above 0 (steps is {self.steps}, epochs {self.epochs}).",
        )


@dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; one of them may be -1, which takes the remaining devices."""

    data: int = may_change(-1)
    fsdp: int = may_change(1)
    tensor: int = may_change(1)

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        require(
            all(0 < size <= _MOST_DEVICES or size == -1 for size in sizes) and sizes.count(-1) <= 1,
            f"mesh sizes must be from 1 to {_MOST_DEVICES:,}, and at most one of them -1, but are {sizes}.",
        )


@dataclass(frozen=True)
class ComputeConfig:
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on accelerators, float32 on CPUs
    unroll: Literal["auto", "yes", "no"] = may_change("auto")  # auto: on CPUs without remat, where it is faster
    attention: Literal["auto", "xla", "pallas"] = may_change("auto")  # auto: a Pallas kernel wherever it can be used
    remat: Literal["auto", "none", "dots", "full"] = may_change("auto")  # auto: dots on TPUs, whose memory is slow
    cache: str = path_field("auto")  # folder for compiled programs; auto: in the run folder, on CPUs "" (none)


@dataclass(frozen=True)
class Config:
    """One training run."""

    seed: int = 0
    data: DataConfig = DataConfig()
    teacher: TeacherConfig = TeacherConfig()
    student: StudentConfig = StudentConfig()
    masking: MaskingConfig = MaskingConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig(epochs=3.0)
    mesh: MeshConfig = MeshConfig()
    compute: ComputeConfig = ComputeConfig()

    def __post_init__(self) -> None:
        check_seeds(self.seed)
        if not self.teacher.path:
            require(
                not self.loss.needs_teacher,
                "loss.kl, loss.cosine and loss.mse need a teacher: set teacher.path, or set them to 0.",
            )
            require(
                self.student.init != "teacher",
                'student.init = "teacher" needs a teacher: set teacher.path, or student.init = "random".',
            )


def check_seeds(*seeds: int) -> None:
    """Refuses seeds that JAX would cut to other seeds."""
    for seed in seeds:
        require(0 <= seed <= _LAST_SEED, f"A seed must be from 0 to {_LAST_SEED:,}, not {seed}.")
