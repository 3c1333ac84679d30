"""The elementary losses, as plain functions of arrays (SPEC section 1).

Each takes the positions that count and returns a `Mean` that is not divided yet, so that micro-batches and devices
add up to the mean over the global batch. All of them compute in float32. What stands at other positions may be
anything, NaN too: it is set to 0 before it is computed with, so its gradient is 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from distil_jax.structs import IGNORED, Array, Mean, Metrics

# As in PyTorch's CosineEmbeddingLoss: inside the root, so that the gradient at a zero vector is finite.
_COSINE_EPSILON = 1e-12


def kl_loss(student_logits: Array, teacher_logits: Array, *, where: Array, temperature: float) -> Mean:
    """Soft targets: T^2 KL(softmax(teacher / T) || softmax(student / T)) (Hinton et al., 2015, section 2).

    T^2 keeps the gradient's size as T grows.

    Args:
      student_logits, teacher_logits: [..., V], finite: an id without probability has `PADDING_LOGIT`, not -inf.
      where: [...] bool, the positions that count.
      temperature: T.
    """
    student_logits, teacher_logits = student_logits.astype(jnp.float32), teacher_logits.astype(jnp.float32)
    student_logits, teacher_logits = counted(student_logits, where), counted(teacher_logits, where)
    student_log_probs = jax.nn.log_softmax(student_logits / temperature)
    teacher_log_probs = jax.nn.log_softmax(teacher_logits / temperature)
    divergence = jnp.sum(jnp.exp(teacher_log_probs) * (teacher_log_probs - student_log_probs), axis=-1)
    return Mean.of(temperature**2 * divergence, where)


def mlm_loss(logits: Array, labels: Array) -> Mean:
    """Cross entropy at the positions whose label is not `IGNORED`; with no such position it is 0.

    Args:
      logits: [..., V].
      labels: [...] int.
    """
    where = labels != IGNORED
    log_probs = jax.nn.log_softmax(counted(logits.astype(jnp.float32), where))
    chosen = jnp.take_along_axis(log_probs, jnp.where(where, labels, 0)[..., None], axis=-1)[..., 0]
    return Mean.of(-chosen, where)


def weighted_sum(weights: dict[str, float], terms: Metrics, counts: dict[str, Array]) -> Array:
    """The loss that terms add up to, each a mean over its count; the terms may be of a part of what was counted."""
    return sum(weight * terms[name].total / jnp.maximum(counts[name], 1) for name, weight in weights.items())


def mse_loss(student_logits: Array, teacher_logits: Array, *, where: Array) -> Mean:
    """Matching logits: the squared difference summed over the vocabulary (Hinton et al., 2015, section 2.1).

    Args:
      student_logits, teacher_logits: [..., V].
      where: [...] bool, the positions that count.
    """
    difference = counted(student_logits.astype(jnp.float32) - teacher_logits.astype(jnp.float32), where)
    return Mean.of(jnp.sum(jnp.square(difference), axis=-1), where)


def cosine_loss(student_hidden: Array, teacher_hidden: Array, *, where: Array) -> Mean:
    """1 - cos(student, teacher) between hidden states (Sanh et al., 2019, section 2).

    Args:
      student_hidden, teacher_hidden: [..., D].
      where: [...] bool, the positions that count.
    """
    student_hidden, teacher_hidden = student_hidden.astype(jnp.float32), teacher_hidden.astype(jnp.float32)
    student_hidden, teacher_hidden = counted(student_hidden, where), counted(teacher_hidden, where)
    dot = jnp.sum(student_hidden * teacher_hidden, axis=-1)
    student_square = jnp.sum(jnp.square(student_hidden), axis=-1) + _COSINE_EPSILON
    teacher_square = jnp.sum(jnp.square(teacher_hidden), axis=-1) + _COSINE_EPSILON
    return Mean.of(1 - dot * jax.lax.rsqrt(student_square) * jax.lax.rsqrt(teacher_square), where)


def counted(values: Array, where: Array) -> Array:
    """Values [..., N], and zeros at the positions [...] that do not count."""
    return jnp.where(where[..., None], values, 0)
