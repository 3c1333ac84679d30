"""The distillation objective: which terms, at which positions, with which weights (Sanh et al., 2019, section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from distil_jax.config.objective import LossConfig
from distil_jax.objective.fused import fused_loss, in_chunks
from distil_jax.objective.losses import cosine_loss, kl_loss, mlm_loss, weighted_sum
from distil_jax.objective.vocabulary import dense_loss, teacher_logits_of
from distil_jax.schema import require
from distil_jax.structs import IGNORED, Array, Batch, Encoded, Head, Mean, Metrics


def distill_loss(
    student: Encoded, teacher: Encoded | None, batch: Batch, *, config: LossConfig, targets_per_row: int | None = None
) -> tuple[Array, Metrics]:
    """kl L_ce + mlm L_mlm + cosine L_cos + mse L_mse, each a mean over its positions in the whole batch.

    Args:
      student: of the masked batch, with dropout if wanted.
      teacher: of the same masked batch, without dropout; None when no term needs it.
      batch: [B, L].
      config: weights, temperature, positions. A weight of 0 leaves the term out.
      targets_per_row: as in `StepConfig`.

    Returns:
      The scalar loss and the terms by name ("kl", "mlm", "cosine", "mse").

    Raises:
      ValueError: a term needs logits or a teacher that is not there.
    """
    objective = Distillation(config, targets_per_row)
    return objective.loss(student, teacher, batch, objective.counts(batch))


@dataclass(frozen=True)
class LogitsFromBatch:
    """A teacher that was run before: its logits come with the batch, as `Batch.teacher_logits`."""

    def __call__(self, teacher_params: None, batch: Batch) -> Encoded:
        del teacher_params
        require(batch.teacher_logits is not None, "The teacher's logits come with the batch: set Batch.teacher_logits.")
        return Encoded(logits=batch.teacher_logits)


@dataclass(frozen=True)
class Distillation:
    """The published objective, as an `Objective` (see `config/step.py`)."""

    config: LossConfig = LossConfig()
    targets_per_row: int | None = None  # as in `StepConfig`

    @property
    def weights(self) -> dict[str, float]:
        weights = {name: getattr(self.config, name) for name in ("kl", "mlm", "cosine", "mse")}
        return {name: weight for name, weight in weights.items() if weight > 0}

    def counts(self, batch: Batch) -> dict[str, Array]:
        """How many positions each term averages over."""
        attended, targets = batch.segment_ids > 0, batch.labels != IGNORED
        soft = attended if self.config.soft_positions == "all" else targets
        positions = {"kl": soft, "mlm": targets, "cosine": attended, "mse": soft}
        return {name: jnp.sum(positions[name], dtype=jnp.float32) for name in self.weights}

    def combine(self, terms: Metrics, counts: dict[str, Array]) -> Array:
        """The loss; `terms` may be of a part of the batch that `counts` are of."""
        return weighted_sum(self.weights, terms, counts)

    def loss(
        self, student: Encoded, teacher: Encoded | None, batch: Batch, counts: dict[str, Array]
    ) -> tuple[Array, Metrics]:
        """The weighted sum, and its terms, of a batch or of a part of the batch that `counts` are of."""
        config = self.config
        if config.needs_teacher and teacher is None:
            raise ValueError("kl, cosine and mse compare with a teacher, and there is none.")
        teacher = jax.lax.stop_gradient(teacher)
        scales = {name: weight / jnp.maximum(counts[name], 1) for name, weight in self.weights.items()}
        loss, terms = jnp.zeros((), jnp.float32), {}
        if (scale := scales.pop("cosine", None)) is not None:
            require(teacher.hidden is not None, "cosine compares hidden states, and the teacher has none: set it to 0.")
            terms["cosine"] = cosine_loss(student.hidden, teacher.hidden, where=batch.segment_ids > 0)
            loss += scale * terms["cosine"].total
        if scales:
            vocabulary_loss, vocabulary_terms = _vocabulary_loss(
                student, teacher, batch, scales, config, self.targets_per_row
            )
            loss, terms = loss + vocabulary_loss, terms | vocabulary_terms
        return loss, terms


def at_targets(features_BxLxD: Array, labels_BxL: Array, most: int) -> tuple[Array, Array]:
    """The features and labels of each row's targets, [B, M, D] and [B, M]; `IGNORED` fills up short rows.

    Whoever promises so few targets looks at `overfull`: of a row that has more, the others are lost.
    """
    positions_BxM = jnp.argsort(labels_BxL == IGNORED, axis=1)[:, :most]  # targets first, in order
    features_BxMxD = jnp.take_along_axis(features_BxLxD, positions_BxM[..., None], axis=1)
    return features_BxMxD, jnp.take_along_axis(labels_BxL, positions_BxM, axis=1)


def overfull(labels_BxL: Array, most: int) -> Array:
    """Whether a row has more targets than that, which stops a run by a NaN: in silence some would be lost."""
    return jnp.any(jnp.sum(labels_BxL != IGNORED, axis=1) > most)


def _vocabulary_loss(
    student: Encoded,
    teacher: Encoded | None,
    batch: Batch,
    scales: dict[str, Array],
    config: LossConfig,
    most: int | None,
) -> tuple[Array, Metrics]:
    """The part of the loss that needs logits, at the targets alone where no term asks for more."""
    if student.head is None:
        raise ValueError("The student has no MLM head, so there are no logits to compare.")
    soft = bool(scales.keys() & {"kl", "mse"})
    if soft and not has_logits(teacher):
        raise ValueError("The teacher has neither an MLM head nor logits, so there are no soft targets.")
    features, labels, lost = student.features, batch.labels, jnp.zeros((), bool)
    teacher_features, teacher_head = _features_and_head(teacher) if soft else (None, None)
    if soft and config.soft_positions == "all":
        where = batch.segment_ids > 0
    else:
        if most is not None:
            lost = overfull(labels, most)
            teacher_features = at_targets(teacher_features, labels, most)[0] if soft else None
            features, labels = at_targets(features, labels, most)
        where = labels != IGNORED
    compare = partial(fused_loss, chunk=config.chunk) if config.chunk else dense_loss
    loss, totals = compare(
        features, student.head, teacher_features, teacher_head, where, labels, scales, temperature=config.temperature
    )
    loss, totals = jax.tree.map(lambda number: jnp.where(lost, jnp.nan, number), (loss, totals))
    counts = {"mlm": jnp.sum(labels != IGNORED, dtype=jnp.float32)}
    everywhere = jnp.sum(where, dtype=jnp.float32)
    return loss, {name: Mean(total, counts.get(name, everywhere)) for name, total in totals.items()}


def has_logits(encoded: Encoded) -> bool:
    """Whether a model predicts words: it has an MLM head, or logits of its own."""
    return encoded.head is not None or encoded.logits is not None


def _features_and_head(teacher: Encoded) -> tuple[Array, Head | None]:
    """As `teacher_logits_of` takes them: features and their head, or logits and None."""
    return (teacher.features, teacher.head) if teacher.logits is None else (teacher.logits, None)


def held_out_terms(
    student: Encoded, teacher: Encoded | None, batch: Batch, *, config: LossConfig, targets_per_row: int | None = None
) -> Metrics:
    """Metrics of a student on a held-out batch, all of them at the MLM targets.

    There a model has to predict; elsewhere it need only copy its input, and any two models agree.

    Args:
      student, teacher: of the same masked batch, without dropout; the teacher may be None. A student without an MLM
        head has its logits (padded to the vocabulary as it is stored).
      batch: [B, L].
      config: its `chunk` says how many positions' logits exist at a time; nothing else is read.
      targets_per_row: as in `StepConfig`; a row with more makes every number NaN.

    Returns:
      "mlm" and "accuracy" against the text, and with a teacher that has logits "kl" (temperature 1) and "agreement"
      (share of targets where both put the same id first).
    """
    most = batch.labels.shape[1] if targets_per_row is None else targets_per_row
    features, head = _features_and_head(student)
    features, labels = at_targets(features, batch.labels, most)
    teacher_features, teacher_head = None, None
    if teacher is not None and has_logits(teacher):
        teacher_features, teacher_head = _features_and_head(teacher)
        teacher_features = at_targets(teacher_features, batch.labels, most)[0]
    cut = partial(in_chunks, chunk=config.chunk or labels.size)
    chunks = (cut(features), cut(labels, fill=IGNORED), None if teacher_features is None else cut(teacher_features))

    def add(sums: Metrics, chunk: tuple) -> tuple[Metrics, None]:
        return jax.tree.map(jnp.add, sums, _terms_at_targets(head, teacher_head, *chunk)), None

    zero = jnp.zeros((), jnp.float32)
    names = ("mlm", "accuracy") if teacher_features is None else ("mlm", "accuracy", "kl", "agreement")
    terms, _ = jax.lax.scan(add, dict.fromkeys(names, Mean(zero, zero)), chunks)
    lost = overfull(batch.labels, most)
    return {name: term.replace(total=jnp.where(lost, jnp.nan, term.total)) for name, term in terms.items()}


def _terms_at_targets(
    head: Head | None, teacher_head: Head | None, features: Array, labels: Array, teacher_features: Array | None
) -> Metrics:
    student_logits, where = teacher_logits_of(features, head, None), labels != IGNORED
    best = jnp.argmax(student_logits, axis=-1)
    terms = {"mlm": mlm_loss(student_logits, labels), "accuracy": Mean.of(best == labels, where)}
    if teacher_features is not None:
        teacher_logits = teacher_logits_of(teacher_features, teacher_head, head)
        terms["kl"] = kl_loss(student_logits, teacher_logits, where=where, temperature=1.0)
        terms["agreement"] = Mean.of(best == jnp.argmax(teacher_logits, axis=-1), where)
    return terms
