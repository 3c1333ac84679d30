"""Frozen configuration: dataclasses, read from TOML, changed by `--set a.b=c`, checked before a device is touched.

Every field says in its comment what it means; a default that looks odd says where it comes from.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from distil_jax.schema import (
    InputError,
    build,
    may_change,
    path_field,
    place,
    require,
    require_finite,
    require_share,
    set_value,
    table_of,
)

# Who computes attention: XLA, or a kernel for the device; see `models/attention.py`.
Attention = Literal["xla", "pallas_gpu", "pallas_tpu"]

# The small BERT that comes with distil_jax: what can be tried without a model hub.
EMBEDDED_TEACHER = Path(__file__).parents[1] / "teacher"
_MOST_PARAMETERS = 10**12  # larger sizes are damage or a slip, and must not reach an allocation
_MOST_LABELS = 10_000_000  # as above
_MOST_ROWS = 2**24  # of a batch, for the same reason
MOST_STEPS = 2**31 - 1  # a state counts them in 32 bits
_MOST_DEVICES = 2**20  # along one axis of a mesh
_LAST_SEED = 2**32 - 1  # JAX reads no more bits of one
# Of a `StudentConfig` and of the `ModelConfig` that it becomes.
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
class ModelConfig:
    """The architecture of one encoder: BERT and DistilBERT differ in nothing else."""

    vocab_size: int  # real ids; parameters are stored padded, see `padded_vocab_size`
    num_layers: int = 12
    hidden_size: int = 768
    num_heads: int = 12
    intermediate_size: int = 3072
    max_positions: int = 512
    token_types: int = 2  # rows of the token-type table; 0: no table, which is what makes it a DistilBERT
    positions: Literal["learned", "sinusoidal"] = "learned"  # sinusoidal: computed, never a parameter
    pooler: bool = False  # BERT's tanh layer on [CLS]; kept because fine-tuning starts from it
    mlm_head: bool = True
    activation: Literal["gelu", "gelu_tanh", "relu"] = "gelu"  # gelu: the exact one, with erf
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters of a state stay float32
    unroll: bool = True  # every layer compiled on its own: faster on CPUs, slower to compile
    attention: Attention = "xla"
    # What the backward pass computes again to save memory; on a CPU it saves none where `unroll` is true.
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
    """What a task asks of an encoder: one answer a sequence, one a token, or where a span begins and ends."""

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
        """One name a label, in the order of the logits."""
        return self.label_names or tuple(f"LABEL_{number}" for number in range(self.labels))

    def encoder(self, config: ModelConfig) -> ModelConfig:
        """The encoder under this head: no MLM head, and a pooler exactly where one is read, by BERT on sequences."""
        return replace(config, mlm_head=False, pooler=self.kind == "sequence" and config.token_types > 0)


@dataclass(frozen=True)
class TeacherConfig:
    path: str = path_field("")  # a model folder or a hub id; empty: no teacher
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of its parameters and computation; auto: compute.dtype
    sharded: bool = may_change(True)  # its parameters cut along fsdp and tensor like the student's; False: whole copies


@dataclass(frozen=True)
class StudentConfig:
    """The student's shape.

    None means: as the folder in `init` has it, or else as the comment says; a resolved config says what it was.
    """

    init: str = path_field("teacher", may_change=False)  # "teacher", "random", or the folder of an existing student
    layers: tuple[int, ...] = ()  # the teacher's layers that are copied; empty: 0,2,4,7,9,11 for 12 -> 6, else spread
    num_layers: int | None = None  # as many as `layers`, or half the teacher's; without a teacher 12
    hidden_size: int | None = None  # this and the next three: the teacher's, or BERT-base's where there is no teacher
    num_heads: int | None = None
    intermediate_size: int | None = None
    max_positions: int | None = None
    token_types: int | None = None  # 0, which is DistilBERT; 2 keeps BERT's table
    # Adds the teacher's token-type row 0 into the positions, which keeps the embeddings the teacher's. None: wherever
    # that can be, which is with learned positions, and where the student has no token types of its own.
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
        """What was left open, as it is in the student that was made.

        Args:
          model: the student's.
          teacher: the teacher's; None: there is none.
        """
        kept = model.positions == "learned" and model.token_types == 0
        foldable = self.init == "teacher" and kept and teacher is not None and teacher.token_types > 0
        shape = {name: getattr(model, name) for name in STUDENT_SHAPE}
        return replace(self, **shape, fold_token_types=foldable and self.fold_token_types is not False)


@dataclass(frozen=True)
class MaskingConfig:
    """Dynamic masking, as in the published recipe (SPEC: 15 %; 80 / 10 / 10; rare words more often)."""

    rate: float = 0.15  # of the real tokens of each row
    mask: float = 0.8  # of the targets: replaced by [MASK]
    random: float = 0.1  # of the targets: replaced by a random word; the rest are kept
    smoothing: float = 0.7  # a token is chosen in proportion to max(count, 1) ** -smoothing; 0: all alike
    mask_token_id: int = 0  # 0: taken from the tokenizer of the prepared data

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
    soft_positions: Literal["all", "targets"] = "all"  # where kl and mse are taken: every token, or MLM targets only
    chunk: int = may_change(512)  # tokens of a device whose logits exist at a time (`fused.py`); 0: all of them

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


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and linear decay to zero (the published recipe)."""

    learning_rate: float = 5e-4
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = 0.0  # never on biases and LayerNorm
    warmup: float = 0.05  # share of the steps
    clip: float = 5.0  # global norm
    steps: int = 0  # length of the schedule; 0: taken from train.steps or train.epochs (a bare `train_step` has none)
    freeze: tuple[str, ...] = ()  # parameters left as they are, by the start of their path: "embeddings/position"

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
    """All that fixes one optimiser step, and no path, cadence or host: what `init_state` and `train_step` need."""

    student: ModelConfig
    teacher: ModelConfig | None = None
    loss: LossConfig = LossConfig()
    masking: MaskingConfig = MaskingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    accumulation: int = 1  # micro-batches per update
    head: HeadConfig | None = None  # a task's, on both models; None: masked language modelling
    task: TaskLossConfig = TaskLossConfig()  # what counts where there is a head, instead of `loss` and `masking`
    targets_per_row: int | None = None  # of masking, which no row exceeds: `most_targets`; None: any number

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


@dataclass(frozen=True)
class DataConfig:
    path: str = path_field("")  # the folder that `distil-jax prepare` wrote


@dataclass(frozen=True)
class TrainConfig:
    batch_rows: int = 256  # rows per optimiser step, over all devices and micro-batches
    steps: int = 0  # optimiser steps; or
    epochs: float = 0.0  # passes over the training rows
    accumulation: int = may_change(0)  # micro-batches per step: less memory, same update; 0: what the next line asks
    tokens_per_device: int = may_change(8192)  # of a micro-batch, at most; sets accumulation where that is 0
    log_every: int = may_change(20)  # steps
    eval_every: int = may_change(1000)  # steps; 0: only before the first and after the last; of a task: every epoch
    eval_rows: int = may_change(512)  # held-out rows per evaluation, chosen at random but the same of every run; 0: all
    checkpoint_every: int = may_change(1000)  # steps; 0: at every evaluation; besides, whenever one is the best so far
    keep_checkpoints: int = may_change(3)  # the newest, and besides them the one with the best held-out score
    patience: int = 0  # evaluations without a better score that end the run; 0: any number
    skips_allowed: int = may_change(10)  # in a row, of steps without a finite loss and gradient; one more is the end
    spike_factor: float = may_change(3.0)  # a loss so many times its running median is unusual; 0: never
    spike_steps: int = may_change(100)  # unusual losses in a row that end the run
    hang_seconds: float = may_change(1800.0)  # without a step, a save or an evaluation until the run is ended; 0: never
    profile_at: int = may_change(0)  # first step of the profiler's window; 0: no profile
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
    """Devices per mesh axis; one of them may be -1, which takes what is left."""

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
    attention: Literal["auto", "xla", "pallas"] = may_change("auto")  # auto: a Pallas kernel wherever it is lawful
    remat: Literal["auto", "none", "dots", "full"] = may_change("auto")  # auto: dots on TPUs, whose memory is slow
    cache: str = path_field("auto")  # folder of compiled programs; auto: in the run's, but "" (none) on CPUs


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
    """Refuses seeds that JAX would read as others."""
    for seed in seeds:
        require(0 <= seed <= _LAST_SEED, f"A seed must be from 0 to {_LAST_SEED:,}, not {seed}.")


def preset(path: str | Path, kind: str = "") -> Path:
    """The file itself, or the one of that name among the project's own configs (`distilbert_base_uncased`).

    Args:
      path: a file or a name.
      kind: a folder below `configs/`.
    """
    file = place(path)
    if file.exists() and not file.is_dir():  # folders may be named as a preset is
        return file
    here = Path(__file__).parents[1]
    folder = next(each for each in (here / "configs", here.parent / "configs") if each.is_dir()) / kind
    named = folder / f"{file}.toml"
    known = sorted(file.stem for file in folder.glob("*.toml"))
    require(named.exists(), f"There is no config {file}: name a TOML file, or one of {', '.join(known)}.")
    return named


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
      InputError: it cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Cannot read the config {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, or numbers and brackets beyond Python's limits
        raise InputError(f"{path} is not valid TOML: {error}.") from error


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a run's configuration from a TOML file.

    Args:
      path: a file, or the name of one of the project's configs; it names only what differs from the defaults.
      overrides: `section.key=value`, applied after the file; the value is read as TOML, or else as a string.

    Raises:
      InputError: no such file, not TOML, an unknown key (the nearest is named), a wrong type, values that exclude
        each other.
    """
    values = read_toml(preset(path))
    for override in overrides:
        set_value(values, override)
    # Without a teacher the terms that need one are off unless asked for, and then refused: the same file
    # with `teacher.path` removed is plain masked-LM training.
    if not table_of(values, "teacher").get("path"):
        values["loss"] = {"kl": 0.0, "cosine": 0.0} | table_of(values, "loss")
        values["student"] = {"init": "random"} | table_of(values, "student")
    settle_schedule(values, overrides)
    if not {"steps", "epochs"} & table_of(values, "train").keys():
        values["train"] = {"epochs": 3.0} | table_of(values, "train")
    return build(Config, values)


def settle_schedule(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Where an override says how long a run is, in steps or in epochs, it replaces what the file says in the other."""
    named, train = {override.partition("=")[0].strip() for override in overrides}, dict(table_of(values, "train"))
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if f"train.{one}" in named and f"train.{other}" not in named and train.get(one):
            train.pop(other, None)
    values["train"] = train
