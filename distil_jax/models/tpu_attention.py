"""Self-attention on a TPU without scores in HBM: a Pallas kernel for rows as short as encoders read.

A program has all keys of some heads of one row, so the softmax is taken whole; the backward pass makes it again from
queries and keys, and nothing is kept in between. Heads narrower than the 128 lanes of a register share them, as they
lie in [B, L, H x K]: the others' lanes are zeroed, which costs what padding would, and nothing is transposed.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from distil_jax.models.dropout import kept
from distil_jax.models.tiles import NEVER, product
from distil_jax.structs import Array

_LANES = 128
_QUERIES = 256  # whose scores exist at a time, [256, L] float32 each
_LONGEST = 1024  # beyond, they do not fit into a chip's vector memory
# The index of an axis that is not cut. A bare 0 has 64 bits if JAX has them switched on, and Mosaic refuses it.
_FIRST = np.int32(0)


def obstacle(heads: int, head_size: int, length: int) -> str | None:
    """Why the kernel cannot compute such rows, or None where it can."""
    if length % _LANES or length > _LONGEST:
        return f"rows of {length}, and it takes multiples of {_LANES} up to {_LONGEST}"
    if head_size > _LANES or _LANES % head_size or heads * head_size % _LANES:
        return f"{heads} heads of {head_size}, which do not fill {_LANES} lanes evenly"
    return None


def forward(
    query: Array, key: Array, value: Array, segment_ids: Array, seeds: Array, heads: Array, *, rate: float
) -> tuple[Array, tuple]:
    """The output of `attend`, and the residuals for `backward` beside its arguments: none.

    Args:
      query, key, value: [B, L, H, K]; see `obstacle`.
      segment_ids: [B, L] int32.
      seeds: [B] uint32 of `row_seeds`; any, where `rate` is 0.
      heads: [H] int32, their numbers in the model.
      rate: of dropout.
    """
    return _call(_forward_kernel, (query, key, value), 1, segment_ids, seeds, heads, rate)[0], ()


def backward(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array,
    seeds: Array,
    heads: Array,
    output: Array,
    saved: tuple,
    cotangent: Array,
    *,
    rate: float,
) -> tuple[Array, ...]:
    """The gradients of `query`, `key` and `value`, where `cotangent` is that of the output."""
    del output, saved
    cotangent = cotangent.astype(value.dtype)
    return _call(_backward_kernel, (query, key, value, cotangent), 3, segment_ids, seeds, heads, rate)


def _call(
    kernel: Any, wide: tuple[Array, ...], outputs: int, segment_ids: Array, seeds: Array, heads: Array, rate: float
) -> tuple[Array, ...]:
    rows, length, _, size = wide[0].shape
    products = 2 if outputs == 1 else 5  # [L, L] from or into [L, K], in each head
    moved = (len(wide) + outputs) * wide[0].size * wide[0].dtype.itemsize
    costs = pl.CostEstimate(
        flops=2 * products * rows * len(heads) * length**2 * size,
        transcendentals=rows * len(heads) * length**2,
        bytes_accessed=moved,
    )
    block = pl.BlockSpec((1, length, _LANES), lambda row, group, *_: (row, _FIRST, group))
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(rows, len(heads) * size // _LANES),
        in_specs=[pl.BlockSpec((1, 1, length), lambda row, group, *_: (row, _FIRST, _FIRST)), *[block] * len(wide)],
        out_specs=[block] * outputs,
    )
    outputs = pl.pallas_call(
        functools.partial(kernel, size=size, rate=rate),
        grid_spec=grid,
        out_shape=[jax.ShapeDtypeStruct((rows, length, len(heads) * size), wide[0].dtype)] * outputs,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=costs,  # the compiler, and whoever reads its text, cannot see inside
    )(seeds, heads[:1], segment_ids[:, None, :], *(array.reshape(rows, length, -1) for array in wide))
    return tuple(array.reshape(wide[0].shape) for array in outputs)


def _forward_kernel(
    seeds: Any, first_head: Any, segments: Any, query: Any, key: Any, value: Any, output: Any, *, size: int, rate: float
) -> None:
    for rows, same in _query_blocks(segments):
        total = jnp.zeros((same.shape[0], _LANES), jnp.float32)
        for number, mine in enumerate(_heads(size)):
            probs = _softmax(jnp.where(mine, query[0, rows, :], 0), key[0], same, size)
            if rate > 0:
                stay = _stay(seeds, first_head, number, rows, same.shape, size, rate)
                probs = jnp.where(stay, probs / (1 - rate), 0)
            total += product(probs.astype(value.dtype), jnp.where(mine, value[0], 0), 1, 0)
        output[0, rows, :] = total.astype(output.dtype)


def _backward_kernel(
    seeds: Any,
    first_head: Any,
    segments: Any,
    query: Any,
    key: Any,
    value: Any,
    cotangent: Any,
    query_cotangent: Any,
    key_cotangent: Any,
    value_cotangent: Any,
    *,
    size: int,
    rate: float,
) -> None:
    dtype = query.dtype
    key_total = value_total = jnp.zeros(key.shape[1:], jnp.float32)
    for rows, same in _query_blocks(segments):
        query_total = jnp.zeros((same.shape[0], _LANES), jnp.float32)
        for number, mine in enumerate(_heads(size)):
            queries, cotangents = jnp.where(mine, query[0, rows, :], 0), jnp.where(mine, cotangent[0, rows, :], 0)
            probs = dropped = _softmax(queries, key[0], same, size)
            probs_cotangent = product(cotangents, value[0], 1, 1)
            if rate > 0:
                stay = _stay(seeds, first_head, number, rows, same.shape, size, rate)
                dropped, probs_cotangent = (jnp.where(stay, each / (1 - rate), 0) for each in (probs, probs_cotangent))
            mean = jnp.sum(probs * probs_cotangent, axis=1, keepdims=True)
            scores_cotangent = (probs * (probs_cotangent - mean) * size**-0.5).astype(dtype)
            query_total += product(scores_cotangent, jnp.where(mine, key[0], 0), 1, 0)
            key_total += product(scores_cotangent, queries, 0, 0)
            value_total += product(dropped.astype(dtype), cotangents, 0, 0)
        query_cotangent[0, rows, :] = query_total.astype(dtype)
    key_cotangent[0], value_cotangent[0] = key_total.astype(dtype), value_total.astype(dtype)


def _query_blocks(segments: Any) -> list[tuple[slice, Array]]:
    """The queries block by block, each with which keys it sees, [queries, L] bool."""
    length = segments.shape[-1]
    row = segments[0]
    column = jnp.broadcast_to(row, (_LANES, length)).T[:, :1]
    width = math.gcd(length, _QUERIES)
    return [(slice(at, at + width), column[at : at + width] == row) for at in range(0, length, width)]


def _heads(size: int) -> list[Array]:
    """[1, lanes] bool for each head of a block: which lanes are its own."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, _LANES), 1)
    return [(lane >= at) & (lane < at + size) for at in range(0, _LANES, size)]


def _softmax(queries: Array, keys: Array, same: Array, size: int) -> Array:
    scores = jnp.where(same, product(queries, keys, 1, 1) * size**-0.5, NEVER)
    powers = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
    return powers / jnp.sum(powers, axis=1, keepdims=True)


def _stay(seeds: Any, first_head: Any, number: int, rows: slice, shape: tuple, size: int, rate: float) -> Array:
    """The mask of dropout for these queries, as `dropout` makes it over [H, L, L]."""
    head = first_head[0] + pl.program_id(1) * (_LANES // size) + number
    query = head * shape[1] + rows.start + jax.lax.broadcasted_iota(jnp.int32, (shape[0], 1), 0)
    index = query * shape[1] + jax.lax.broadcasted_iota(jnp.int32, (1, shape[1]), 1)
    return kept(seeds[pl.program_id(0)], index.astype(jnp.uint32), rate)
