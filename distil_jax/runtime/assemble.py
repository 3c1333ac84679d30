"""From a `Config` to everything a run starts with: rows, teacher, initial student, and one frozen `StepConfig`."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from distil_jax.config.model import HeadConfig, ModelConfig
from distil_jax.config.run import STUDENT_SHAPE, ComputeConfig, Config, StudentConfig, TeacherConfig, TrainConfig
from distil_jax.config.step import MOST_STEPS, OptimizerConfig, StepConfig
from distil_jax.data.loader import RowTable, open_rows, token_counts
from distil_jax.data.manifest import Manifest, Split, read_manifest
from distil_jax.data.tokenizer import same_tokenizer
from distil_jax.files import has_tokenizer
from distil_jax.io import huggingface
from distil_jax.io.tensors import local_folder
from distil_jax.models.encoder import init_params
from distil_jax.models.heads import abstract_model
from distil_jax.models.student import choose_layers, student_from_teacher
from distil_jax.objective.masking import masking_weights, most_targets
from distil_jax.runtime.attention import resolve_attention
from distil_jax.runtime.processes import is_first
from distil_jax.schema import InputError, require, user_path
from distil_jax.training.sharding import check_mesh, make_mesh, put_params, shard_count, shardings_of

_MOST_INTERVAL = 1000  # steps between two evaluations or checkpoints, where the config does not say


@dataclass(frozen=True, eq=False)
class Parts:
    """Everything a run needs, in the host's memory.

    Attributes:
      config: resolved: every choice that depended on the data, the teacher or the machine is written out.
      step: what the step is compiled from.
      manifest: the prepared data's.
      weights: [V] float32, the masking weight of each token in training.
      held_out_weights: the same for held-out text. All words weigh alike there, whatever the training prefers, so that
        the metrics of any two runs on the same rows compare.
      teacher_params: in the compute dtype, or None.
      student_params: initial parameters in float32, or None for a random initialisation.
      identity: hashes of the rows and the teacher, which a resumed run must find unchanged.
      attention: a sentence with the implementation and the reason.
    """

    config: Config
    step: StepConfig
    manifest: Manifest
    weights: np.ndarray
    held_out_weights: np.ndarray
    teacher_params: Any
    student_params: Any
    identity: dict[str, str]
    attention: str

    def rows(self, split: Split) -> RowTable:
        return open_rows(self.config.data.path, split)

    @property
    def tokenizer(self) -> Path:
        return Path(self.config.data.path) / "tokenizer"


def assemble(config: Config) -> Parts:
    """Reads the manifest and the models, checks that they fit each other, and resolves the config.

    Raises:
      InputError: anything that is missing, or does not fit.
    """
    manifest = _manifest(config)
    compute = resolve_compute(config.compute)
    teacher_config, teacher_params = None, None
    if config.teacher.path:
        folder = local_folder(config.teacher.path)
        teacher_config, teacher_params = huggingface.load(folder)
        check_tokenizer(folder, teacher_config, config.data.path, manifest)
        teacher_config = with_compute(teacher_config, teacher_compute(config.teacher, compute))
    elif config.teacher.dtype != "auto":
        raise InputError("teacher.dtype is a teacher's, and there is none: set teacher.path, or leave it out.")
    student, student_config, student_params = _student(
        config.student, teacher_config, teacher_params, config.data.path, manifest, config.seed
    )
    student_config = with_compute(student_config, compute)
    _check_positions(manifest, student=student_config, teacher=teacher_config)
    steps, schedule = schedule_of(config.train, config.optimizer, manifest.train.rows)
    train, tenth = config.train, min(_MOST_INTERVAL, -(-steps // 10))
    config = replace(
        config,
        compute=replace(config.compute, dtype=compute.dtype),
        teacher=replace(config.teacher, dtype=teacher_config.dtype if teacher_config else "auto"),
        student=student,
        masking=replace(config.masking, mask_token_id=manifest.mask_id),
        optimizer=schedule,
        train=replace(
            train,
            steps=steps,
            epochs=0.0,
            eval_every=tenth if train.eval_every is None else train.eval_every,
            checkpoint_every=tenth if train.checkpoint_every is None else train.checkpoint_every,
        ),
    )
    step = StepConfig(
        student=student_config,
        teacher=teacher_config,
        loss=config.loss,
        masking=config.masking,
        optimizer=config.optimizer,
        targets_per_row=most_targets(manifest.sequence_length, config.masking.rate),
    )
    mesh = make_mesh(config.mesh)
    check_batch(config.train, manifest.train.rows, mesh)
    step, attention = resolve_step(step, config, mesh, manifest.sequence_length)
    identity = {"rows": _digest(manifest)}
    if teacher_params is not None:
        identity["teacher"] = huggingface.fingerprint(teacher_params)
        teacher_params = cast_teacher(teacher_config, teacher_params)
    return Parts(
        config=config,
        step=step,
        manifest=manifest,
        weights=token_weights(config.data.path, manifest, student_config, smoothing=config.masking.smoothing),
        held_out_weights=token_weights(config.data.path, manifest, student_config, smoothing=0.0),
        teacher_params=teacher_params,
        student_params=student_params,
        identity=identity,
        attention=attention,
    )


def _manifest(config: Config) -> Manifest:
    """The manifest of the config's data, after checks that it can be trained on and judged by."""
    if not config.data.path:
        raise InputError("data.path is empty: name the folder that `distil-jax prepare` wrote.")
    manifest = read_manifest(config.data.path)
    if not manifest.held_out.rows:
        raise InputError(f"{config.data.path} has no held-out rows to judge by: prepare it with --held-out above 0.")
    if config.masking.mask_token_id not in (0, manifest.mask_id):
        raise InputError(
            f"masking.mask_token_id is {config.masking.mask_token_id}, but the [MASK] of the rows' tokenizer is "
            f"{manifest.mask_id}, by which a student is judged and used: leave it out."
        )
    return manifest


def _check_positions(manifest: Manifest, **models: ModelConfig | None) -> None:
    for name, model in models.items():
        if model is not None and manifest.sequence_length > model.max_positions:
            raise InputError(
                f"The rows are {manifest.sequence_length} long and the {name} has {model.max_positions} positions "
                f"({name}.max_positions): prepare shorter rows."
            )


def total_steps(train: TrainConfig, rows: float) -> int:
    """Optimiser steps of a run over a training side of so many rows.

    Raises:
      InputError: more than can be counted.
    """
    steps = train.steps or max(1, int(train.epochs * rows / train.batch_rows))
    require(
        steps <= MOST_STEPS,
        f"train.epochs = {train.epochs:g} is {steps:,} steps, and a run has at most {MOST_STEPS:,}.",
    )
    return steps


def schedule_of(train: TrainConfig, optimizer: OptimizerConfig, rows: int) -> tuple[int, OptimizerConfig]:
    """The steps of a run, and its optimiser with the length of the schedule written out.

    Raises:
      InputError: the schedule ends before the run.
    """
    steps = total_steps(train, rows)
    if 0 < optimizer.steps < steps:
        raise InputError(
            f"The learning rate reaches 0 after optimizer.steps = {optimizer.steps}, and the run has {steps} steps, so "
            f"the last of them would train nothing: leave optimizer.steps out, or set it to {steps} or more."
        )
    return steps, replace(optimizer, steps=optimizer.steps or steps)


def check_batch(train: TrainConfig, rows: int, mesh: Mesh) -> None:
    """Refuses a batch larger than the training rows: repeated rows would have equal masks and dropout.

    Raises:
      InputError: it is; the sentence names the largest possible batch.
    """
    if train.batch_rows <= rows:
        return
    pieces = shard_count(mesh) * max(1, train.accumulation)
    largest = rows // pieces * pieces
    advice = f"set train.batch_rows = {largest} or less" if largest else f"train on {pieces} rows or more"
    raise InputError(
        f"train.batch_rows is {train.batch_rows}, but there are only {rows} rows to train on, and a batch would repeat "
        f"them: {advice}."
    )


def resolve_step(step: StepConfig, config: Config, mesh: Mesh, length: int) -> tuple[StepConfig, str]:
    """The step as it is compiled for a mesh, and a sentence about its attention.

    Raises:
      InputError: the mesh does not fit the models or the batch, or the attention asked for cannot be used.
    """
    check_mesh(mesh, step)
    step = replace(step, accumulation=micro_batches(config.train, mesh, length))
    return resolve_attention(step, config.compute.attention, mesh, length)


def micro_batches(train: TrainConfig, mesh: Mesh, sequence_length: int) -> int:
    """Micro-batches per step on this mesh: as configured, or as few as keep to `train.tokens_per_device`.

    Raises:
      InputError: they, or the devices, do not divide a batch.
    """
    shards = shard_count(mesh)
    rows, rest = divmod(train.batch_rows, shards)
    if rest or (train.accumulation and rows % train.accumulation):
        raise InputError(
            f"train.batch_rows {train.batch_rows} does not divide into {shards * max(1, train.accumulation)} equal "
            "pieces (devices along data and fsdp, times train.accumulation): change one of them."
        )
    if train.accumulation:
        return train.accumulation
    pieces = (number for number in range(1, rows + 1) if rows % number == 0)
    return next((n for n in pieces if rows // n * sequence_length <= train.tokens_per_device), rows)


def check_tokenizer(folder: Path, model: ModelConfig, data: str | Path, manifest: Manifest) -> None:
    """Refuses rows whose ids mean something else to the model; warns where that cannot be checked.

    Args:
      folder: of the model.
      model: its architecture.
      data: the folder of the rows.
      manifest: the rows'.
    """
    if manifest.vocab_size > model.vocab_size:
        raise InputError(
            f"The rows were prepared with a tokenizer of {manifest.vocab_size} tokens, but the model {folder} knows "
            f"{model.vocab_size}: prepare them with the model's own tokenizer, or, if they were, resize its embedding."
        )
    # Not the manifest's fingerprint: earlier versions took it from a file that `transformers` may read differently.
    if not tokenizers_agree(folder, Path(data) / "tokenizer"):
        raise InputError(
            f"The rows were prepared with another tokenizer than that of the model {folder}: prepare them with "
            f"`--tokenizer {folder}`."
        )


def tokenizers_agree(folder: Path, other: Path) -> bool:
    """Whether two folders' tokenizers, as loaded, give the same ids; without one in `folder`, warns and returns True.

    Raises:
      InputError: a tokenizer that cannot be loaded.
    """
    if has_tokenizer(folder):
        return same_tokenizer(folder, other)
    if is_first():
        print(
            f"Not checked: {folder} holds no tokenizer, so nothing tells whether its ids are those of {other}.",
            file=sys.stderr,
            flush=True,
        )
    return True


def teacher_compute(teacher: TeacherConfig, compute: ComputeConfig) -> ComputeConfig:
    """The teacher's compute settings, from those of the student, which must be resolved."""
    return replace(compute, dtype=compute.dtype if teacher.dtype == "auto" else teacher.dtype, remat="none")


def teacher_shapes(teacher: TeacherConfig, model: ModelConfig, head: HeadConfig | None = None) -> Any:
    """The teacher's parameters as shapes, with logical axes unless every device is to have them whole."""
    dtype = jnp.dtype(model.dtype)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), abstract_model(model, head))
    return shapes if teacher.sharded else nn.unbox(shapes)


def cast_teacher(model: ModelConfig, params: Any) -> Any:
    """A teacher's parameters in its compute dtype: they are never updated, and bfloat16 takes half the memory."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, jnp.dtype(model.dtype)), params)


def put_teacher(params: Any, teacher: TeacherConfig, step: StepConfig, mesh: Mesh) -> tuple[Any, Any]:
    """The `teacher_shapes`, and the teacher's parameters on the mesh; both None without parameters.

    Those of a teacher that is a function have no logical axes, so every device gets a copy.
    """
    if params is None:
        return None, None
    if step.teacher_model is None:
        shapes = jax.eval_shape(lambda: params)
    else:
        shapes = teacher_shapes(teacher, step.teacher, step.head)
    return shapes, put_params(params, shardings_of(shapes, mesh))


def with_compute(model: ModelConfig, compute: ComputeConfig) -> ModelConfig:
    """The architecture with the machine's dtype, unrolling and rematerialisation; `compute` must be resolved."""
    return replace(model, dtype=compute.dtype, unroll=compute.unroll == "yes", remat=compute.remat)


def token_weights(folder: str | Path, manifest: Manifest, model: ModelConfig, *, smoothing: float) -> np.ndarray:
    """[V] masking weights; 0 for special, unused and padding ids."""
    counts_V = np.zeros(model.padded_vocab_size, np.int64)
    counts_V[: manifest.vocab_size] = token_counts(folder, manifest)
    never = [*manifest.special_ids, *manifest.unused_ids, *range(manifest.vocab_size, model.padded_vocab_size)]
    return masking_weights(counts_V, never, smoothing=smoothing)


def _digest(manifest: Manifest) -> str:
    # Not the tokenizer's files: `transformers` writes into them where they were loaded from.
    arrays = [file.sha256 for file in manifest.files if file.path.endswith(".npy")]
    return hashlib.sha256("".join([manifest.tokenizer_fingerprint, *arrays]).encode()).hexdigest()


def resolve_compute(compute: ComputeConfig, platform: str | None = None) -> ComputeConfig:
    """The settings with every `auto` replaced by what suits the machine, or `platform` ("cpu", "gpu" or "tpu").

    Raises:
      InputError: unrolled layers with rematerialisation on a CPU, which saves no memory.
    """
    platform = platform or jax.default_backend()
    on_cpu = platform == "cpu"
    dtype = ("float32" if on_cpu else "bfloat16") if compute.dtype == "auto" else compute.dtype
    remat = ("dots" if platform == "tpu" else "none") if compute.remat == "auto" else compute.remat
    unroll = ("yes" if on_cpu and remat == "none" else "no") if compute.unroll == "auto" else compute.unroll
    require(
        not (on_cpu and unroll == "yes" and remat != "none"),
        f'compute.remat = "{remat}" saves no memory on a CPU where layers are unrolled, and costs time: leave '
        "compute.unroll out, or compute.remat.",
    )
    return replace(compute, dtype=dtype, unroll=unroll, remat=remat)


def _student(
    student: StudentConfig, teacher: ModelConfig | None, teacher_params: Any, data: str, manifest: Manifest, seed: int
) -> tuple[StudentConfig, ModelConfig, Any]:
    """The student's resolved config, its architecture, and its initial parameters (None: random)."""
    if student.init not in ("teacher", "random"):
        # Not above: it needs orbax and tomli_w, and `bench` works without them.
        from distil_jax.runtime.run_folder import is_run, open_model

        folder = user_path(student.init)
        if is_run(folder):
            run = open_model(folder)
            require(
                run.head is None,
                f"{folder} (student.init) is a fine-tuning, whose model has no MLM head: name the run or the model "
                "folder that it began with.",
            )
            model, params, tokenizer = run.config, run.params, run.tokenizer
        else:
            tokenizer = folder = local_folder(student.init)
            model, params = huggingface.load(folder)
        check_tokenizer(tokenizer, model, data, manifest)
        model = student_from_folder(folder, model, student)
        if "mlm" not in params:
            # A bare encoder gets a new head; everything else is kept.
            fresh = nn.unbox(init_params(jax.random.key(seed), model))
            params = params | {"mlm": jax.device_get(fresh["mlm"])}
        return student.resolved(model, teacher), model, params
    model = student_model(student, teacher, manifest.vocab_size)
    resolved = student.resolved(model, teacher)
    if student.init == "random":
        return resolved, model, None
    layers = student.layers or choose_layers(teacher.num_layers, model.num_layers)
    params = student_from_teacher(
        teacher_params, teacher, model, layers=layers, fold_token_types=resolved.fold_token_types
    )
    return replace(resolved, layers=layers), model, params


def student_from_folder(folder: Path, model: ModelConfig, student: StudentConfig) -> ModelConfig:
    """The architecture of a student that starts from a folder: the folder's, with an MLM head and the run's dropout.

    Raises:
      InputError: the config asks for another shape than the folder's.
    """
    both = [(name, getattr(student, name), getattr(model, name)) for name in STUDENT_SHAPE]
    if wrong := [
        f"student.{name} = {ours!r} ({theirs!r})" for name, ours, theirs in both if ours not in (None, theirs)
    ]:
        raise InputError(
            f"The config asks for another student than that of {folder} (student.init), whose numbers stand in "
            f"brackets: {', '.join(wrong)}. Set them so, leave them out, or name another folder."
        )
    _check_fold(student, model)
    dropouts = {"hidden_dropout": student.hidden_dropout, "attention_dropout": student.attention_dropout}
    return replace(model, mlm_head=True, **dropouts)


def _check_fold(student: StudentConfig, model: ModelConfig) -> None:
    possible = student.init == "teacher" and model.positions == "learned" and model.token_types == 0
    if student.fold_token_types and not possible:
        raise InputError(
            "student.fold_token_types = true adds the teacher's token-type row to the learned positions of a student "
            'that begins with the teacher\'s (student.init = "teacher") and has no token types: leave it out.'
        )


def student_model(student: StudentConfig, teacher: ModelConfig | None, vocab_size: int) -> ModelConfig:
    """The student's architecture: as configured, otherwise the teacher's, or BERT-base's with `vocab_size` ids.

    Raises:
      InputError: impossible sizes, or a token-type row that cannot be folded.
    """
    base = teacher or ModelConfig(vocab_size=vocab_size)
    layers = student.num_layers or len(student.layers) or (max(1, teacher.num_layers // 2) if teacher else 12)
    named = ("hidden_size", "num_heads", "intermediate_size", "max_positions")
    given = {name: getattr(student, name) for name in named if getattr(student, name) is not None}
    model = replace(
        base,
        **given,
        num_layers=layers,
        token_types=student.token_types or 0,
        positions=student.positions or "learned",
        pooler=False,
        mlm_head=True,
        hidden_dropout=student.hidden_dropout,
        attention_dropout=student.attention_dropout,
        # DistilBERT has no such setting: `transformers` computes it with 1e-12.
        layer_norm_eps=base.layer_norm_eps if student.token_types else 1e-12,
    )
    _check_fold(student, model)
    return model
