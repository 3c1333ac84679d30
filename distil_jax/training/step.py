"""The step as pure functions: gradients, update, metrics. `sharding.py` compiles them for a mesh."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from distil_jax.config.model import ModelConfig
from distil_jax.config.objective import MaskingConfig, TaskLossConfig
from distil_jax.config.step import Objective, StepConfig
from distil_jax.models.heads import abstract_model, model_of
from distil_jax.objective.distillation import Distillation, has_logits, held_out_terms
from distil_jax.objective.masking import mask_tokens, most_targets
from distil_jax.objective.tasks import TaskObjective
from distil_jax.schema import require
from distil_jax.structs import Array, Batch, Encoded, Mean, Metrics, Rows
from distil_jax.training.optimizer import learning_rate, make_optimizer, without_frozen
from distil_jax.training.sharding import gather_params, map_shards, scatter_params, sum_over_shards
from distil_jax.training.state import TrainState

_MASKS, _DROPOUT = 0, 1  # what the keys of one step are for
# Names that a term of an objective cannot have: the other metrics of a step, and what lines of metrics.jsonl have.
_METRICS = ("loss", "tokens", "gradient_norm", "skipped", "learning_rate", "step", "kind", "rows", "perplexity")
_HELD_OUT_SEED = 15  # of the held-out masks; any number will do, but always the same


def mask_and_train_step(
    state: TrainState, teacher_params: Any, rows: Rows, weights: Array
) -> tuple[TrainState, Metrics]:
    """`train_step` on rows that this step masks itself: one dispatch per update, nothing drawn on the host.

    Args:
      state: donated when compiled with `jit_step`.
      teacher_params: as in `train_step`.
      rows: [B, L].
      weights: [V], see `masking_weights`.
    """
    batch = mask_tokens(_key(state, _MASKS), rows, weights=weights, config=state.config.masking)
    return train_step(state, teacher_params, batch)


def train_step(state: TrainState, teacher_params: Any, batch: Batch) -> tuple[TrainState, Metrics]:
    """One optimiser step: of distillation on a masked batch (Sanh et al., 2019, section 2), or of a task.

    Pure. The teacher's parameters are an argument: never donated, saved, averaged or differentiated.
    Where the loss or the norm of its gradient is not finite, the update is left out: parameters, moments and the
    schedule stay, and step, data and masks go on.

    Args:
      state: the student.
      teacher_params: the teacher's tree in any float dtype, on the device, or None when no term needs it.
      batch: [B, L]; B divides into `state.config.accumulation` micro-batches on every shard.

    Returns:
      The next state, and the metrics of this step: the terms of the objective, "loss", "gradient_norm" (of what is
      not frozen, before it is clipped), "learning_rate", "tokens" (the attended ones) and "skipped" (1 where the
      update was left out).

    Raises:
      InputError: B does not divide so, or `state.config.optimizer` has no steps.
    """
    grads, metrics = gradients(state, teacher_params, batch)
    return apply_gradients(state, grads, metrics)


def apply_gradients(state: TrainState, grads: Any, metrics: Metrics) -> tuple[TrainState, Metrics]:
    """The second half of `train_step`: one update, or none if the loss or the norm of the gradient is not finite.

    Args:
      state: the student.
      grads: a gradient for each parameter.
      metrics: of `gradients`; of these, "loss" is read. Where it is missing, only the norm decides.

    Returns:
      The next state, and the metrics with "gradient_norm", "skipped" and, for an `OptimizerConfig`, "learning_rate".
    """
    config = state.config
    if not config.has_own_optimizer:
        # What is frozen counts neither in the norm nor in whether it is finite, and XLA leaves out what made it.
        grads = without_frozen(grads, config.optimizer)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm)
    if "loss" in metrics:
        finite &= jnp.isfinite(metrics["loss"].total)

    def updated() -> tuple[Any, Any]:
        updates, opt_state = make_optimizer(config.optimizer).update(grads, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates), opt_state

    before = state.params, state.opt_state
    params, opt_state = jax.lax.platform_dependent(
        # A branch writes over the donated state. XLA for CPUs does not without one: that took BERT-base's step of
        # 8 x 128 on two cores 7 % more time, and 0.17 GiB. libtpu does, and plans more traffic for a branch.
        cpu=lambda: jax.lax.cond(finite, updated, lambda: before),
        default=lambda: jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated(), before),
    )
    more = {"gradient_norm": norm, "skipped": ~finite}
    if not config.has_own_optimizer:
        more["learning_rate"] = learning_rate(config.optimizer)(state.step - state.skipped)
    metrics = metrics | {name: _once(number) for name, number in more.items()}
    skipped = state.skipped + jnp.asarray(~finite, jnp.int32)
    return state.replace(step=state.step + 1, skipped=skipped, params=params, opt_state=opt_state), metrics


def eval_step(state: TrainState, teacher_params: Any, batch: Batch) -> Metrics:
    """Metrics of the student on a masked held-out batch; see `held_out_terms`.

    Args:
      state: the student.
      teacher_params: the teacher's tree, or None to leave out the comparison with it.
      batch: [B, L], any that `train_step` takes.

    Returns:
      The metrics of `held_out_terms`, and with `config.objective` the terms of that, where they have other names.
    """
    config = state.config

    def shard_terms(batch: Batch, params: Any, teacher_params: Any) -> Metrics:
        student, teacher = _outputs(config, config.student, params, batch), None
        if with_teacher:
            teacher = _teacher_outputs(config, teacher_params, batch)
        terms = held_out_terms(student, teacher, batch, config=config.loss, targets_per_row=config.targets_per_row)
        if config.objective is not None:
            terms = config.objective.loss(student, teacher, batch, counts)[1] | terms
        return terms

    # A function may be a teacher without parameters.
    with_teacher = teacher_params is not None or (config.teacher is not None and config.teacher_model is None)
    counts = {} if config.objective is None else config.objective.counts(batch)
    params = gather_params(state.params, abstract_model(config.student, None))
    if with_teacher:
        teacher_params = _gather_teacher(config, teacher_params)
    return sum_over_shards(shard_terms)(batch, params, teacher_params)


def task_eval_step(state: TrainState, teacher_params: Any, batch: Batch) -> tuple[Metrics, Array]:
    """The loss of a task's model against a batch's labels, and its logits.

    Args:
      state: its config has a head.
      teacher_params: not read; it stands where every step has it.
      batch: [B, L].

    Returns:
      "loss", and the logits, [B, C] or [B, L, C] float32.
    """
    del teacher_params
    config = state.config
    objective = TaskObjective(config.head, TaskLossConfig())

    def shard(batch: Batch, params: Any) -> tuple[Metrics, Array]:
        logits = _outputs(config, config.student, params, batch)
        return objective.loss(logits, None, batch, objective.counts(batch))[1], logits

    params = gather_params(state.params, abstract_model(config.student, config.head))
    terms, logits = map_shards(shard)(batch, params)
    loss = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), terms["task"])
    return {"loss": loss}, logits.reshape(-1, *logits.shape[2:])


def mask_and_eval_step(state: TrainState, teacher_params: Any, rows: Rows, weights: Array) -> Metrics:
    """`eval_step` on rows whose masks come from a fixed seed and the row's number: always the same ones.

    How much is masked, and how, is the published recipe's too, whatever the student is trained with: the numbers of
    any two students on the same rows compare.

    Args:
      state, teacher_params: as in `eval_step`; of its masking, the id of [MASK] is read.
      rows: [B, L].
      weights: [V], see `masking_weights`.
    """
    config, batch = _masked_held_out(state.config, rows, weights)
    return eval_step(state.replace(config=config), teacher_params, batch)


def mask_and_eval_teacher_step(state: TrainState, teacher_params: Any, rows: Rows, weights: Array) -> Metrics:
    """The teacher's own "mlm" and "accuracy" on the rows and masks of `mask_and_eval_step`; {} if it has no logits.

    Args:
      state, teacher_params, rows, weights: as in `mask_and_eval_step`; of the state, only the config is read.
    """
    config, batch = _masked_held_out(state.config, rows, weights)

    def shard_terms(batch: Batch, teacher_params: Any) -> Metrics:
        teacher = _teacher_outputs(config, teacher_params, batch)
        if not has_logits(teacher):
            return {}
        return held_out_terms(teacher, None, batch, config=config.loss, targets_per_row=config.targets_per_row)

    return sum_over_shards(shard_terms)(batch, _gather_teacher(config, teacher_params))


def _masked_held_out(config: StepConfig, rows: Rows, weights: Array) -> tuple[StepConfig, Batch]:
    """The masked batch of `mask_and_eval_step`, and the config with the most targets that its rows have."""
    masking = MaskingConfig(mask_token_id=config.masking.mask_token_id)
    batch = mask_tokens(jax.random.key(_HELD_OUT_SEED), rows, weights=weights, config=masking)
    return replace(config, targets_per_row=most_targets(rows.input_ids.shape[1], masking.rate)), batch


def _key(state: TrainState, purpose: int) -> Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step), purpose)


def gradients(state: TrainState, teacher_params: Any, batch: Batch) -> tuple[Any, Metrics]:
    """The first half of `train_step`: the gradients of the loss over the whole batch.

    Each shard of the batch adds up its micro-batches, and the shards exchange their sums once.

    Args:
      state, teacher_params, batch: as in `train_step`.

    Returns:
      A gradient for each parameter, and the metrics: the terms of the objective, "loss" and "tokens".

    Raises:
      InputError: B does not divide into the micro-batches, or a term has a name that is no identifier or is taken.
    """
    config, objective = state.config, _objective(state.config)
    counts = objective.counts(batch)

    def loss_of(params: Any, teacher_params: Any, batch: Batch, counts: dict, key: Array) -> tuple[Array, Metrics]:
        student = _outputs(config, config.student, params, batch, train=True, rngs={"dropout": key})
        teacher = _teacher_outputs(config, teacher_params, batch) if config.needs_teacher else None
        return objective.loss(student, teacher, batch, counts)

    def shard_sums(batch: Batch, params: Any, teacher_params: Any, counts: dict, key: Array) -> Any:
        gradient_of = jax.grad(loss_of, has_aux=True)
        if config.accumulation == 1:
            return gradient_of(params, teacher_params, batch, counts, key)

        def add(sums: Any, micro_batch: Batch) -> tuple[Any, None]:
            of_piece = gradient_of(params, teacher_params, micro_batch, counts, key)
            return jax.tree.map(jnp.add, sums, of_piece), None

        micro_batches = jax.tree.map(lambda leaf: _cut(leaf, config.accumulation), batch)
        first = jax.tree.map(lambda leaf: leaf[0], micro_batches)
        shapes = jax.eval_shape(gradient_of, params, teacher_params, first, counts, key)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.scan(add, zeros, micro_batches)[0]

    if batch.row_index is None:  # its rows are numbered before it is cut, so that no two draw the same dropout
        batch = batch.replace(row_index=jnp.arange(len(batch.input_ids), dtype=jnp.int32))
    student = abstract_model(config.student, config.head)
    params = gather_params(state.params, student)
    if config.needs_teacher:
        teacher_params = _gather_teacher(config, teacher_params)
    grads, terms = sum_over_shards(shard_sums)(batch, params, teacher_params, counts, _key(state, _DROPOUT))
    for name in terms:
        free = name.isidentifier() and name not in _METRICS
        require(free, f"A term of the loss cannot be called {name!r}: choose an identifier other than {_METRICS}.")
    loss, tokens = objective.combine(terms, counts), jnp.sum(batch.segment_ids > 0)
    return scatter_params(grads, student), terms | {"loss": _once(loss), "tokens": _once(tokens)}


def _objective(config: StepConfig) -> Objective:
    if config.objective is not None:
        complete = isinstance(config.objective, Objective)
        require(complete, f"{config.objective!r} is no objective: it needs the methods counts, loss and combine.")
        return config.objective
    if config.head is None:
        return Distillation(config.loss, config.targets_per_row)
    return TaskObjective(config.head, config.task)


def _once(value: Array) -> Mean:
    return Mean(jnp.asarray(value, jnp.float32), jnp.ones((), jnp.float32))


def _teacher_outputs(config: StepConfig, teacher_params: Any, batch: Batch) -> Encoded | Array:
    """The teacher's output for a batch: its encoding, or a task's logits."""
    if config.teacher_model is not None:
        return _outputs(config, config.teacher, teacher_params, batch)
    outputs = config.teacher(teacher_params, batch)
    if config.head is not None:
        return outputs.logits if isinstance(outputs, Encoded) else outputs
    require(
        isinstance(outputs, Encoded),
        f"A teacher must return Encoded, such as Encoded(logits=...), and not {type(outputs).__name__}.",
    )
    return outputs


def _gather_teacher(config: StepConfig, teacher_params: Any) -> Any:
    """The parameters of a teacher that is a model of ours, see `gather_params`; any other's as they are."""
    if config.teacher_model is None:
        return teacher_params
    return gather_params(teacher_params, abstract_model(config.teacher, config.head))


def _outputs(config: StepConfig, model: ModelConfig, params: Any, batch: Batch, **options: Any) -> Encoded | Array:
    """The output of one of a step's models for a batch: its encoding, or a task's logits."""
    if model.token_types == 0:  # a student without token types may learn from a teacher that has them
        batch = batch.replace(token_type_ids=None)
    return model_of(model, config.head).apply({"params": params}, batch, **options)


def _cut(leaf: Array, pieces: int) -> Array:
    """[B, ...] -> [pieces, B / pieces, ...]."""
    require(
        leaf.shape[0] % pieces == 0,
        f"{leaf.shape[0]} rows (of one shard of the batch) do not divide into {pieces} micro-batches: give more or "
        "fewer rows, or change StepConfig.accumulation.",
    )
    return leaf.reshape(pieces, leaf.shape[0] // pieces, *leaf.shape[1:])
