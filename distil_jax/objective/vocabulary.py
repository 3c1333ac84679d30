"""The terms that need logits, from features and tied heads: the plain path, whose logits are all in memory at once.

`fused.py` computes the same without them; this is its oracle.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp

from distil_jax.objective.losses import counted, kl_loss, mlm_loss, mse_loss
from distil_jax.schema import require
from distil_jax.structs import IGNORED, PADDING_LOGIT, Array, Head


def logits(features: Array, head: Head) -> Array:
    """[..., V] float32 from features [..., D]: operands in the features' dtype, sums in float32."""
    product = jnp.einsum(
        "...D,VD->...V", features, head.kernel.astype(features.dtype), preferred_element_type=jnp.float32
    )
    return product + head.bias


def teacher_logits_of(features: Array, head: Head | None, student_head: Head | None) -> Array:
    """[..., V] float32 from a teacher's features, or from its own logits where there is no head.

    Args:
      features: [..., E], or without a head logits [..., W] with W <= V.
      head: the teacher's, or None.
      student_head: says how many ids there are, and which of them only pad the vocabulary; None: logits are not padded.

    Raises:
      InputError: more logits than the student has.
    """
    if head is not None:
        return logits(features, head)
    floored = jnp.maximum(features.astype(jnp.float32), PADDING_LOGIT)  # -inf; NaN stays, and the update is skipped
    if student_head is None:
        return floored
    width, vocab_size = features.shape[-1], student_head.bias.shape[0]
    require(
        width <= vocab_size,
        f"The teacher has logits for {width} ids and the student for {vocab_size}: both must use one tokenizer.",
    )
    ends = [(0, 0)] * (features.ndim - 1) + [(0, vocab_size - width)]
    padded = jnp.pad(floored, ends, constant_values=PADDING_LOGIT)
    return jnp.where(student_head.bias <= PADDING_LOGIT, PADDING_LOGIT, padded)  # a teacher may pad its own vocabulary


def dense_loss(
    features: Array,
    head: Head,
    teacher_features: Array | None,
    teacher_head: Head | None,
    where: Array,
    labels: Array,
    scales: Mapping[str, Array],
    *,
    temperature: float,
) -> tuple[Array, dict[str, Array]]:
    """Soft targets and masked language modelling (see `losses.py`) from features; any of them, at [B, L] positions.

    Args:
      features: [B, L, D] of the student.
      head: the student's.
      teacher_features: [B, L, E], or its logits as for `teacher_logits_of`; None where no term needs them.
      teacher_head: the teacher's; None if there is no teacher, or only its logits.
      where: [B, L] bool, the positions of "kl" and "mse".
      labels: [B, L], `IGNORED` where there is no target of "mlm".
      scales: the terms that are wanted, "kl", "mlm" and "mse", each with its share in the loss: weight / count.
      temperature: of the soft targets.

    Returns:
      The loss, which is the sum of scale x total, and each term's total. Only the loss is differentiated in earnest.
    """
    features, teacher_features = counted_features(features, teacher_features, where, labels, scales)
    student_logits = logits(features, head)
    totals = {}
    if "mlm" in scales:
        totals["mlm"] = mlm_loss(student_logits, labels).total
    if scales.keys() & {"kl", "mse"}:
        teacher_logits = teacher_logits_of(teacher_features, teacher_head, head)
        if "kl" in scales:
            totals["kl"] = kl_loss(student_logits, teacher_logits, where=where, temperature=temperature).total
        if "mse" in scales:
            totals["mse"] = mse_loss(student_logits, teacher_logits, where=where).total
    return sum(scales[name] * total for name, total in totals.items()), totals


def counted_features(
    features: Array, teacher_features: Array | None, where: Array, labels: Array, scales: Mapping[str, Array]
) -> tuple[Array, Array | None]:
    """Both models' features of `dense_loss`, and zeros at the positions that no term counts.

    Before the products, where it costs least, because a kernel's gradient has a share of every position: one that is
    NaN makes all of it NaN, and nothing times NaN is NaN too.
    """
    soft, targets = bool(scales.keys() & {"kl", "mse"}), labels != IGNORED
    student_where = (where | targets if "mlm" in scales else where) if soft else targets
    teacher_features = counted(teacher_features, where) if soft else teacher_features
    return counted(features, student_where), teacher_features
