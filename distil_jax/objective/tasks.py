"""The objective of fine-tuning: a task's own loss, and soft targets of a teacher fine-tuned on the task."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from distil_jax.config.model import HeadConfig
from distil_jax.config.objective import TaskLossConfig
from distil_jax.objective.losses import kl_loss, mlm_loss, mse_loss, weighted_sum
from distil_jax.structs import IGNORED, PADDING_LOGIT, Array, Batch, Metrics


@dataclass(frozen=True)
class TaskObjective:
    """The objective of a task, with the methods of `Distillation`.

    A row that is only padding counts nowhere. Where a span begins and ends are two answers of a row, and their mean
    counts, as in the SQuAD runs of BERT; padding can be neither.
    """

    head: HeadConfig
    config: TaskLossConfig

    @property
    def weights(self) -> dict[str, float]:
        weights = {"task": self.config.task, "soft": self.config.soft}
        return {name: weight for name, weight in weights.items() if weight > 0}

    def counts(self, batch: Batch) -> dict[str, Array]:
        """How many answers each term averages over."""
        count = jnp.sum(self._where(batch), dtype=jnp.float32)
        return {name: count for name in self.weights}

    def combine(self, terms: Metrics, counts: dict[str, Array]) -> Array:
        """The loss; `terms` may be of a part of the batch that `counts` are of."""
        return weighted_sum(self.weights, terms, counts)

    def loss(
        self, student: Array, teacher: Array | None, batch: Batch, counts: dict[str, Array]
    ) -> tuple[Array, Metrics]:
        """The weighted sum, and its terms "task" and "soft", of a batch or of a part of the batch.

        Args:
          student, teacher: logits of their `TaskModel`; the teacher's may be None where `soft` has no weight.
          batch: its labels are [B] for sequences (floats for a regression), [B, L] for tokens, and [B, 2], first and
            last place, for spans.
          counts: of the whole batch.
        """
        terms, regression = {}, self._is_regression
        student, where = self._answers(student, batch), self._where(batch)
        if self.config.task > 0 and regression:
            terms["task"] = mse_loss(student, batch.labels[:, None], where=where)
        elif self.config.task > 0:
            terms["task"] = mlm_loss(student, jnp.where(where, batch.labels, IGNORED))
        if self.config.soft > 0:
            if teacher is None:
                raise ValueError("Soft targets are a teacher's, and there is none.")
            teacher = self._answers(jax.lax.stop_gradient(teacher), batch)
            if regression:
                terms["soft"] = mse_loss(student, teacher, where=where)
            else:
                terms["soft"] = kl_loss(student, teacher, where=where, temperature=self.config.temperature)
        return self.combine(terms, counts), terms

    @property
    def _is_regression(self) -> bool:
        return self.head.kind == "sequence" and self.head.labels == 1

    def _answers(self, logits: Array, batch: Batch) -> Array:
        """One distribution an answer: [B, C], [B, L, C] or, first and last place of a span, [B, 2, L]."""
        if self.head.kind == "spans":
            return jnp.where(batch.segment_ids[:, None] > 0, jnp.swapaxes(logits, 1, 2), PADDING_LOGIT)
        return logits

    def _where(self, batch: Batch) -> Array:
        """Which answers count, [B], [B, L] or [B, 2]: of rows that are not padding, and of tokens that have a label."""
        attended_BxL = batch.segment_ids > 0
        if self.head.kind == "tokens":
            return attended_BxL & (batch.labels != IGNORED)
        if self.head.kind == "spans":
            return jnp.broadcast_to(attended_BxL[:, :1], batch.labels.shape)
        return attended_BxL[:, 0]
