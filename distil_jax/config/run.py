"""One training run: its data, models, schedule, mesh and machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from distil_jax.config.model import ModelConfig
from distil_jax.config.objective import LossConfig, MaskingConfig
from distil_jax.config.step import MOST_STEPS, OptimizerConfig
from distil_jax.schema import may_change, path_field, require, require_finite, require_share

# The small BERT that comes with distil_jax, for trying things without a model hub.
EMBEDDED_TEACHER = Path(__file__).parents[1] / "teacher"
_MOST_ROWS = 2**24  # in a batch; more is a typing error, and is refused before anything of that size is allocated
_MOST_DEVICES = 2**20  # along one axis of a mesh
_LAST_SEED = 2**32 - 1  # JAX reads only 32 bits of a seed
# The fields that `StudentConfig` and `ModelConfig` have in common.
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
    """The model that the student learns from."""

    path: str = path_field("")  # a model folder or a hub id; empty: no teacher
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of its parameters and computation; auto: compute.dtype
    sharded: bool = may_change(True)  # split its parameters over fsdp and tensor; False: a full copy on every device


@dataclass(frozen=True)
class StudentConfig:
    """The student's architecture, and what its parameters start from.

    A field left at None is taken from the folder that `init` names. If `init` names no folder, it has the default in
    the field's comment.
    """

    # "teacher", "random", or an existing student: a model folder, or a run, whose newest checkpoint is taken.
    init: str = path_field("teacher", may_change=False)
    layers: tuple[int, ...] = ()  # teacher layers to copy, from 0; empty: evenly spread (0,2,4,7,9,11 for 12 -> 6)
    num_layers: int | None = None  # default: as many as `layers` lists, or half the teacher's; 12 without a teacher
    hidden_size: int | None = None  # default: the teacher's, or 768 without a teacher
    num_heads: int | None = None  # default: the teacher's, or 12 without a teacher
    intermediate_size: int | None = None  # width of the feed-forward layers; default: the teacher's, or 3072 without
    max_positions: int | None = None  # longest row in tokens; default: the teacher's, or 512 without a teacher
    token_types: int | None = None  # rows of the token-type table; default: 0, no table, as in DistilBERT; BERT has 2
    # Add the teacher's token-type row 0 to the student's position embeddings, so that their sum is the teacher's.
    # Default: true where possible, which needs init = "teacher", learned positions and token_types = 0.
    fold_token_types: bool | None = None
    positions: Literal["learned", "sinusoidal"] | None = None  # position embeddings; default: learned
    hidden_dropout: float = 0.1  # on the embeddings and on the output of every sublayer
    attention_dropout: float = 0.1  # on the attention probabilities

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
            f"student.layers names {len(self.layers)} layers and student.num_layers says {self.num_layers}: set "
            f"student.num_layers = {len(self.layers)} too, or student.layers = [] for {self.num_layers} of them.",
        )
        require(
            not self.layers or self.init == "teacher",
            f"student.layers names layers of the teacher to copy, and student.init = {self.init!r} copies none: leave "
            'student.layers out (student.num_layers says how many there are), or set student.init = "teacher".',
        )

    def resolved(self, model: ModelConfig, teacher: ModelConfig | None) -> StudentConfig:
        """The config with the values that the student was built with in place of None.

        Args:
          model: the student's architecture.
          teacher: the teacher's architecture; None without a teacher.
        """
        kept = model.positions == "learned" and model.token_types == 0
        foldable = self.init == "teacher" and kept and teacher is not None and teacher.token_types > 0
        shape = {name: getattr(model, name) for name in STUDENT_SHAPE}
        return replace(self, **shape, fold_token_types=foldable and self.fold_token_types is not False)


@dataclass(frozen=True)
class DataConfig:
    """The rows to train on."""

    path: str = path_field("")  # the folder that `distil-jax prepare` wrote


@dataclass(frozen=True)
class TrainConfig:
    """The length of a run, its batches, and when it evaluates, saves and stops."""

    batch_rows: int = 256  # rows per optimiser step, over all devices and micro-batches
    steps: int = 0  # length of the run in optimiser steps; set either this or `epochs`
    epochs: float = 0.0  # length of the run in passes over the training rows
    # Micro-batches per step: more of them need less memory, and the update is the same. 0: as few as keep to
    # `tokens_per_device`.
    accumulation: int = may_change(0)
    tokens_per_device: int = may_change(8192)  # most tokens of a micro-batch on one device, if `accumulation` is 0
    log_every: int = may_change(20)  # steps between two lines of training metrics
    # Steps between two evaluations. 0: only before the first step and after the last; in fine-tuning, every epoch.
    # Default: a tenth of the run, but at most 1,000.
    eval_every: int | None = may_change(None)
    # Held-out rows (or dev examples) per evaluation; 0: all. They are drawn at random, and every run draws the same.
    eval_rows: int = may_change(512)
    # Steps between two checkpoints; 0: one at every evaluation. A new best evaluation is always saved. Default: as for
    # `eval_every`.
    checkpoint_every: int | None = may_change(None)
    keep_checkpoints: int = may_change(3)  # how many of the newest checkpoints stay on disk, besides the best one
    patience: int = 0  # stop early after so many evaluations in a row that are not a new best; 0: never
    # Steps with an infinite or NaN loss or gradient change nothing. The run ends after more than so many in a row.
    skips_allowed: int = may_change(10)
    spike_factor: float = may_change(3.0)  # a loss above so many times its running median is a spike; 0: none is
    spike_steps: int = may_change(100)  # end the run after so many spikes in a row
    hang_seconds: float = may_change(1800.0)  # end the run after so many seconds without progress; 0: never
    profile_at: int = may_change(0)  # first step to record with JAX's profiler; 0: no profile
    profile_steps: int = may_change(5)  # number of steps to record
    tensorboard: bool = may_change(True)  # write TensorBoard files too, which needs the tensorboardX package
    # Send the metrics to these trackers too, which need pip install 'distil-jax[track]'. The environment variables
    # WANDB_PROJECT and TRACKIO_PROJECT name the project.
    trackers: tuple[Literal["wandb", "trackio"], ...] = may_change(())

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
            "patience",
            "eval_rows",
            "profile_at",
            "skips_allowed",
            "spike_factor",
            "hang_seconds",
        ):
            require_finite(f"train.{name}", getattr(self, name), least=0)
        for name in ("eval_every", "checkpoint_every"):
            require_finite(f"train.{name}", getattr(self, name) or 0, least=0)
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
    """How the devices are arranged: their number along each axis. One axis may be -1 and takes the remaining ones."""

    data: int = may_change(-1)  # splits the batch; every device along it has a copy of the parameters
    fsdp: int = may_change(1)  # splits the batch and the parameters
    tensor: int = may_change(1)  # splits the parameters, and each layer's work by heads and feed-forward width

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        require(
            all(0 < size <= _MOST_DEVICES or size == -1 for size in sizes) and sizes.count(-1) <= 1,
            f"mesh sizes must be from 1 to {_MOST_DEVICES:,}, and at most one of them -1, but are {sizes}.",
        )


@dataclass(frozen=True)
class ComputeConfig:
    """How a step is computed: its speed and memory depend on it, its results only by rounding."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the computation; auto: bfloat16, but float32 on CPUs
    # Compile every layer on its own: faster steps on a CPU, but slower to compile. auto: yes on CPUs without remat.
    unroll: Literal["auto", "yes", "no"] = may_change("auto")
    # auto: a Pallas kernel if the device and the model allow it and a trial shows it to be as exact; otherwise xla.
    attention: Literal["auto", "xla", "pallas"] = may_change("auto")
    # What the backward pass computes again to save memory. none: nothing; dots: all but matrix products and attention;
    # full: everything. auto: dots on TPUs, none elsewhere.
    remat: Literal["auto", "none", "dots", "full"] = may_change("auto")
    # The folder that keeps compiled programs for a resumed run; "": none. auto: in the run folder, but none on CPUs.
    cache: str = path_field("auto")


@dataclass(frozen=True)
class Config:
    """One training run."""

    seed: int = 0  # of random parameters, the order of the rows, masking and dropout
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
    """Raises `InputError` for a seed that needs more than JAX's 32 bits, which JAX would cut off silently."""
    for seed in seeds:
        require(0 <= seed <= _LAST_SEED, f"A seed must be from 0 to {_LAST_SEED:,}, not {seed}.")
