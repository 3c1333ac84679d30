"""The loss terms over the vocabulary without [B, L, V] in memory: in chunks, with gradients made on the way forward.

A chunk's logits are computed, compared, turned into the loss's gradient, multiplied into the gradients of features,
kernel and bias, and dropped. Nothing is computed twice: the backward pass only scales these gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from distil_jax.objective.vocabulary import counted_features, dense_loss, logits, teacher_logits_of
from distil_jax.structs import IGNORED, Array, Head


def fused_loss(
    features: Array,
    head: Head,
    teacher_features: Array | None,
    teacher_head: Head | None,
    where: Array,
    labels: Array,
    scales: Mapping[str, Array],
    *,
    temperature: float,
    chunk: int,
) -> tuple[Array, dict[str, Array]]:
    """`dense_loss`, in value and gradient, with the logits of about `chunk` tokens at a time.

    Chunks run along L and keep the batch axis whole, so a batch that is sharded over devices stays where it is, and
    none is smaller than a token of each row. Sums are float32. Only the student's features and head get a gradient:
    the teacher and the scales are constants.
    """
    features, teacher_features = counted_features(features, teacher_features, where, labels, scales)
    cut = functools.partial(in_chunks, chunk=chunk)
    chunks = (None if teacher_features is None else cut(teacher_features), cut(where), cut(labels, fill=IGNORED))
    return _fused(temperature, cut(features), head, teacher_head, chunks, dict(scales))


def in_chunks(array_BxL: Array, *, chunk: int, fill: int = 0) -> Array:
    """[B, L, ...] -> [N, B, C, ...]: N even chunks of C positions, B x C of them about `chunk`, the last filled up."""
    rows, length, *rest = array_BxL.shape
    pieces = -(-length // max(1, chunk // rows))
    width = -(-length // pieces)
    ends = [(0, 0), (0, pieces * width - length)] + [(0, 0)] * len(rest)
    padded = jnp.pad(array_BxL, ends, constant_values=fill)
    return jnp.moveaxis(padded.reshape(rows, pieces, width, *rest), 1, 0)


# features_NxBxCxD: N chunks of C positions; `chunks` holds the teacher's features, `where` and `labels` alike.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(
    temperature: float, features_NxBxCxD: Array, head: Head, teacher_head: Head | None, chunks: tuple, scales: dict
) -> tuple[Array, dict[str, Array]]:
    def add(sums: tuple, piece: tuple) -> tuple[tuple, None]:
        features, (teacher_features, where, labels) = piece
        terms = dense_loss(
            features, head, teacher_features, teacher_head, where, labels, scales, temperature=temperature
        )
        return jax.tree.map(jnp.add, sums, terms), None

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(add, (zero, dict.fromkeys(scales, zero)), (features_NxBxCxD, chunks))[0]


def _forward(
    temperature: float, features_NxBxCxD: Array, head: Head, teacher_head: Head | None, chunks: tuple, scales: dict
) -> tuple[tuple[Array, dict[str, Array]], tuple[Array, Head]]:
    dtype = features_NxBxCxD.dtype
    kernel_VxD = head.kernel.astype(dtype)

    def add(sums: tuple, piece: tuple) -> tuple[tuple, Array]:
        totals, kernel_sum_VxD, bias_sum_V = sums
        features_BxCxD, (teacher_features, where, labels) = piece
        student_logits = logits(features_BxCxD, head)
        teacher_logits = None
        if teacher_features is not None:
            teacher_logits = teacher_logits_of(teacher_features, teacher_head, head)
        terms, gradient_BxCxV = _compare(student_logits, teacher_logits, where, labels, scales, temperature)
        totals = jax.tree.map(jnp.add, totals, terms)
        bias_sum_V += jnp.sum(gradient_BxCxV, axis=(0, 1))
        gradient_BxCxV = gradient_BxCxV.astype(dtype)
        kernel_sum_VxD += jnp.einsum("BCV,BCD->VD", gradient_BxCxV, features_BxCxD, preferred_element_type=jnp.float32)
        gradient_BxCxD = jnp.einsum("BCV,VD->BCD", gradient_BxCxV, kernel_VxD, preferred_element_type=jnp.float32)
        return (totals, kernel_sum_VxD, bias_sum_V), gradient_BxCxD.astype(dtype)

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), head)
    begin = (dict.fromkeys(scales, jnp.zeros((), jnp.float32)), zeros.kernel, zeros.bias)
    (totals, kernel_VxD, bias_V), gradient_NxBxCxD = jax.lax.scan(add, begin, (features_NxBxCxD, chunks))
    gradient = Head(kernel=kernel_VxD.astype(head.kernel.dtype), bias=bias_V.astype(head.bias.dtype))
    return (sum(scales[name] * total for name, total in totals.items()), totals), (gradient_NxBxCxD, gradient)


def _backward(_: float, gradients: tuple[Array, Head], cotangents: tuple[Array, dict[str, Array]]) -> tuple:
    outer = cotangents[0]
    return *jax.tree.map(lambda gradient: (outer * gradient).astype(gradient.dtype), gradients), None, None, None


_fused.defvjp(_forward, _backward)


def _compare(
    student_logits: Array,
    teacher_logits: Array | None,
    where: Array,
    labels: Array,
    scales: Mapping[str, Array],
    temperature: float,
) -> tuple[dict[str, Array], Array]:
    """Each term's total over a chunk, and the gradient of the loss with respect to the student's logits [B, C, V]."""
    totals, gradient = {}, jnp.zeros((), jnp.float32)
    if "kl" in scales:
        student, teacher = student_logits / temperature, teacher_logits / temperature
        student_sum, teacher_sum = (jax.nn.logsumexp(each, axis=-1, keepdims=True) for each in (student, teacher))
        teacher_probs = jnp.exp(teacher - teacher_sum)
        divergence = jnp.sum(teacher_probs * (teacher - student), -1, keepdims=True) - teacher_sum + student_sum
        totals["kl"] = temperature**2 * jnp.sum(jnp.where(where, divergence[..., 0], 0))
        scale = jnp.where(where, scales["kl"] * temperature, 0)[..., None]
        gradient += scale * (jnp.exp(student - student_sum) - teacher_probs)
    if "mse" in scales:
        difference = jnp.where(where[..., None], student_logits - teacher_logits, 0)
        totals["mse"] = jnp.sum(jnp.square(difference))
        gradient += 2 * scales["mse"] * difference
    if "mlm" in scales:
        # A comparison, not a gather: it fuses with what is around it, and a sharded vocabulary stays where it is.
        label = jax.lax.broadcasted_iota(labels.dtype, student_logits.shape, student_logits.ndim - 1)
        label = label == labels[..., None]
        log_sum, target = jax.nn.logsumexp(student_logits, axis=-1, keepdims=True), labels != IGNORED
        chosen = jnp.sum(jnp.where(label, student_logits, 0), -1)
        totals["mlm"] = jnp.sum(jnp.where(target, log_sum[..., 0] - chosen, 0))
        scale = jnp.where(target, scales["mlm"], 0)[..., None]
        gradient += scale * (jnp.exp(student_logits - log_sum) - label)
    return totals, gradient
