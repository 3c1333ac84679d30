"""Dropout whose masks are a hash of each element's place: cheap, and the same however a batch is split.

A mask is never stored: forward and backward, and a kernel that works tile by tile, each make it anew from the row's
seed and the element's index. A seed comes from the step's key and the row's own number, so masks do not depend on
micro-batches, devices or hosts, and a resumed run draws what an unbroken one would have drawn.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from distil_jax.structs import Array, Batch

# Odd multipliers and shifts of a 32-bit mixing function with little bias (Wellons, 2018, "Prospecting for hash
# functions"), after a Weyl sequence, without which neighbours are correlated.
_WEYL, _FIRST, _SECOND = np.uint32(0x9E3779B9), np.uint32(0x21F0AAAD), np.uint32(0x735A2D97)


def row_seeds(key: Array, row_index: Array, sites: int) -> Array:
    """[B, sites] uint32: a seed for each row and each dropout site of a model.

    Args:
      key: of this step.
      row_index: [B], a number that tells each row from the others.
      sites: how many places there are.
    """
    # The type is named: where JAX has 64-bit types switched on, bits without one are other numbers.
    return jax.vmap(lambda row: jax.random.bits(jax.random.fold_in(key, row), (sites,), jnp.uint32))(row_index)


def batch_seeds(key: Array, batch: Batch, sites: int) -> Array:
    """[B, sites] uint32: `row_seeds` of a batch, by `row_index` or, without one, by position in the batch."""
    rows_B = jnp.arange(len(batch.input_ids), dtype=jnp.int32) if batch.row_index is None else batch.row_index
    return row_seeds(key, rows_B, sites)


def kept(seed: Array, index: Array, rate: float) -> Array:
    """Which elements stay: true with probability 1 - rate, in the broadcast shape of `seed` and `index`.

    Args:
      seed: uint32.
      index: uint32, the element's number in its row.
      rate: the share that is dropped, in [0, 1).
    """
    bits = (index * _WEYL) ^ seed
    bits = (bits ^ (bits >> 16)) * _FIRST
    bits = ((bits ^ (bits >> 15)) + seed) * _SECOND  # the seed again: no two rows have one sequence, merely permuted
    # Signed, because not every chip compares unsigned numbers; 31 bits are fine enough for any rate.
    return (bits >> 1).astype(jnp.int32) >= np.int32(rate * 2**31)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dropout(values: Array, seeds: Array | None, rate: float) -> Array:
    """Sets a share of `rate` to zero and scales the rest by 1 / (1 - rate) (Srivastava et al., 2014).

    Args:
      values: [B, ...], fewer than 2^32 a row.
      seeds: [B] of `row_seeds`, or None: nothing is dropped.
      rate: the share.
    """
    if seeds is None or rate == 0:
        return values
    index = jnp.zeros((1, *values.shape[1:]), jnp.uint32)
    for axis in range(1, values.ndim):
        step = np.uint32(math.prod(values.shape[axis + 1 :]))
        index += jax.lax.broadcasted_iota(jnp.uint32, index.shape, axis) * step
    seeds = seeds.reshape(-1, *(1,) * (values.ndim - 1))
    return jnp.where(kept(seeds, index, rate), values / (1 - rate), 0)


def _forward(values: Array, seeds: Array | None, rate: float) -> tuple[Array, Array | None]:
    return dropout(values, seeds, rate), seeds


def _backward(rate: float, seeds: Array | None, cotangent: Array) -> tuple[Array, None]:
    return dropout(cotangent, seeds, rate), None


dropout.defvjp(_forward, _backward)
