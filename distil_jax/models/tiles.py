"""What the two attention kernels compute alike on a tile."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from distil_jax.structs import Array

NEVER = -1e9  # the score of a pair that may not attend: it gets no probability, and unlike -inf it makes no NaN


def product(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    """The matrix product over one axis of each, [..., ...] float32."""
    return jax.lax.dot_general(
        left, right, (((left_axis,), (right_axis,)), ((), ())), preferred_element_type=jnp.float32
    )
