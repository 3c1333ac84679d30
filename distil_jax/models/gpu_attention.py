"""Self-attention on an NVIDIA GPU without scores in memory: FlashAttention-2 (Dao, 2023) as Pallas kernels for Triton.

A program has a block of queries of one head of one row and goes over the keys block by block, with the running maximum
and sum of the softmax. It keeps the logarithm of each query's sum, from which two kernels make the weights again in the
backward pass: one has queries and goes over keys, one has keys and goes over queries. Blocks are read out of
[B, L, H, K] as they lie; those that can share no segment with a program's own are passed over, so packed rows cost what
their sequences cost. Scores are in base 2, which is what the chip computes.

Checked by Pallas's interpreter and compiled for sm_90 without one at hand: it has not run on a GPU yet.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from distil_jax.models.dropout import kept
from distil_jax.structs import Array

_BLOCK = 64  # queries or keys that are read at a time; rows consist of whole blocks
_QUERIES = 128  # of a program of the forward pass, where rows divide into so many
_SUMS = 64 * 64  # what 4 warps add up in registers; more needs 8, or the compiler spills
_STAGES = 2  # how many blocks are on their way from memory or being computed
_NARROWEST, _WIDEST = 16, 128  # heads: tensor cores want 16 numbers, and beyond 128 the blocks grow too large
_NEVER = -1e9  # a score that leaves no weight, and stays finite where nothing else has been seen yet


def obstacle(heads: int, head_size: int, length: int) -> str | None:
    """Why the kernel cannot compute such rows, or None where it can."""
    if length % _BLOCK:
        return f"rows of {length}, and it takes multiples of {_BLOCK}"
    if not _NARROWEST <= head_size <= _WIDEST or head_size & (head_size - 1):
        return f"{heads} heads of {head_size}, and it takes powers of two from {_NARROWEST} to {_WIDEST}"
    return None


def forward(
    query: Array, key: Array, value: Array, segment_ids: Array, seeds: Array, heads: Array, *, rate: float
) -> tuple[Array, tuple]:
    """What `attend` returns, and what `backward` needs of it beside its arguments: [B, H, L] logarithms of sums.

    Args:
      query, key, value: [B, L, H, K]; see `obstacle`.
      segment_ids: [B, L] int32.
      seeds: [B] uint32 of `row_seeds`; any, where `rate` is 0.
      heads: [H] int32, their numbers in the model.
      rate: of dropout.
    """
    rows, length, count, _ = query.shape
    sums = jax.ShapeDtypeStruct((rows, count, length), jnp.float32)
    call = functools.partial(_call, math.gcd(length, _QUERIES), segment_ids, seeds, heads, rate)
    output, sums = call(_forward_kernel, (query,), (key, value), (value, sums))
    return output, (sums,)


def backward(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array,
    seeds: Array,
    heads: Array,
    output: Array,
    saved: tuple,
    slope: Array,
    *,
    rate: float,
) -> tuple[Array, ...]:
    """The gradients of `query`, `key` and `value`, where `slope` is that of the output."""
    # The mean of the slopes of a query's weights, weighted by these: its output says it, with dropout too.
    means = jnp.sum(output.astype(jnp.float32) * slope.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    of_queries, of_keys = (query, slope.astype(value.dtype), *saved, means), (key, value)
    call = functools.partial(_call, _BLOCK, segment_ids, seeds, heads, rate)
    return *call(_query_kernel, of_queries, of_keys, (query,)), *call(_key_kernel, of_keys, of_queries, (key, value))


def _call(
    width: int,
    segment_ids: Array,
    seeds: Array,
    heads: Array,
    rate: float,
    kernel: Any,
    ours: tuple[Array, ...],
    theirs: tuple[Array, ...],
    outputs: tuple[Any, ...],
) -> tuple[Array, ...]:
    """Runs programs that have `width` positions of `ours` and of the outputs, and go over a row of `theirs`."""
    rows, length, count, size = ours[0].shape

    def part(array: Any) -> pl.BlockSpec:
        if len(array.shape) == 3:
            return pl.BlockSpec((None, None, width), lambda block, head, row: (row, head, block))
        return pl.BlockSpec((None, width, None, size), lambda block, head, row: (row, block, head, 0))

    def whole(array: Array) -> pl.BlockSpec:
        if len(array.shape) == 3:
            return pl.BlockSpec((None, None, length), lambda block, head, row: (row, head, 0))
        return pl.BlockSpec((None, length, None, size), lambda block, head, row: (row, 0, head, 0))

    return pl.pallas_call(
        functools.partial(kernel, rate=rate),
        grid=(length // width, count, rows),  # the first runs fastest: neighbours read the same
        in_specs=[
            pl.BlockSpec((1,), lambda block, head, row: (row,)),
            pl.BlockSpec((1,), lambda block, head, row: (head,)),
            pl.BlockSpec((None, None, 2), lambda block, head, row: (row, block, 0)),
            pl.BlockSpec((None, length), lambda block, head, row: (row, 0)),
            *map(part, ours),
            *map(whole, theirs),
        ],
        out_specs=[*map(part, outputs)],
        out_shape=[jax.ShapeDtypeStruct(each.shape, each.dtype) for each in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=4 if width * size <= _SUMS else 8, num_stages=_STAGES),
    )(seeds, heads, _ranges(segment_ids, width), segment_ids, *ours, *theirs)


def _ranges(segment_ids: Array, width: int) -> Array:
    """[B, L / width, 2] int32: the first block that may share a segment with so many positions, and after the last.

    Right for any ids, and exact where they rise along a row; padding, at its end, counts as the highest.
    """
    ids = jnp.where(segment_ids == 0, jnp.iinfo(jnp.int32).max, segment_ids)
    ours, theirs = ids.reshape(len(ids), -1, 1, width), ids.reshape(len(ids), 1, -1, _BLOCK)
    meet = (ours.min(-1) <= theirs.max(-1)) & (ours.max(-1) >= theirs.min(-1))
    first, behind = jnp.argmax(meet, axis=-1), jnp.argmax(meet[..., ::-1], axis=-1)
    return jnp.stack([first, meet.shape[-1] - behind], axis=-1).astype(jnp.int32)


def _forward_kernel(*refs: Any, rate: float) -> None:
    seed, head, ends, segments, query, key, value, output, sums = refs
    ours = _ours(query)
    queries, ids = query[...], segments[ours]

    def visit(number: Array, so_far: tuple[Array, ...]) -> tuple[Array, ...]:
        total, weight, top = so_far
        theirs = pl.ds(number * _BLOCK, _BLOCK)
        scores = _scores(queries, key[theirs, :], ids, segments[theirs])
        higher = jnp.maximum(top, jnp.max(scores, axis=1))
        weights, shrink = jnp.exp2(scores - higher[:, None]), jnp.exp2(top - higher)
        weight = weight * shrink + jnp.sum(weights, axis=1)
        if rate > 0:
            weights = jnp.where(_stay(seed, head, ours, theirs, segments, rate), weights, 0)
        added = _product(weights.astype(value.dtype), value[theirs, :], 1, 0)
        return total * shrink[:, None] + added, weight, higher

    nothing = jnp.zeros(query.shape[:1], jnp.float32)
    start = (jnp.zeros(query.shape, jnp.float32), nothing, nothing + _NEVER)
    total, weight, top = jax.lax.fori_loop(ends[0], ends[1], visit, start)
    output[...] = (total / (weight * (1 - rate))[:, None]).astype(output.dtype)
    sums[...] = top + jnp.log2(weight)


def _query_kernel(*refs: Any, rate: float) -> None:
    seed, head, ends, segments, query, slope, sums, means, key, value, query_slope = refs
    ours = _ours(query)
    queries, slopes, ids, our_sums, our_means = query[...], slope[...], segments[ours], sums[...], means[...]

    def visit(number: Array, total: Array) -> Array:
        theirs = pl.ds(number * _BLOCK, _BLOCK)
        keys = key[theirs, :]
        weights = jnp.exp2(_scores(queries, keys, ids, segments[theirs]) - our_sums[:, None])
        weight_slopes = _product(slopes, value[theirs, :], 1, 1)
        if rate > 0:
            stay = _stay(seed, head, ours, theirs, segments, rate)
            weight_slopes = jnp.where(stay, weight_slopes * (1 / (1 - rate)), 0)
        score_slopes = weights * (weight_slopes - our_means[:, None])
        return total + _product(score_slopes.astype(keys.dtype), keys, 1, 0)

    total = jax.lax.fori_loop(ends[0], ends[1], visit, jnp.zeros(query.shape, jnp.float32))
    query_slope[...] = (total * query.shape[1] ** -0.5).astype(query_slope.dtype)


def _key_kernel(*refs: Any, rate: float) -> None:
    """As `_query_kernel`, but what lies between keys and queries is [keys, queries]."""
    seed, head, ends, segments, key, value, query, slope, sums, means, key_slope, value_slope = refs
    ours = _ours(key)
    keys, values, ids = key[...], value[...], segments[ours]

    def visit(number: Array, totals: tuple[Array, Array]) -> tuple[Array, Array]:
        theirs = pl.ds(number * _BLOCK, _BLOCK)
        queries, slopes = query[theirs, :], slope[theirs, :]
        weights = dropped = jnp.exp2(_scores(keys, queries, ids, segments[theirs]) - sums[theirs][None, :])
        weight_slopes = _product(values, slopes, 1, 1)
        if rate > 0:
            stay = _stay(seed, head, theirs, ours, segments, rate, transposed=True)
            dropped = jnp.where(stay, weights, 0)
            weight_slopes = jnp.where(stay, weight_slopes * (1 / (1 - rate)), 0)
        score_slopes = weights * (weight_slopes - means[theirs][None, :])
        key_total = totals[0] + _product(score_slopes.astype(queries.dtype), queries, 1, 0)
        return key_total, totals[1] + _product(dropped.astype(slopes.dtype), slopes, 1, 0)

    nothing = jnp.zeros(key.shape, jnp.float32)
    key_total, value_total = jax.lax.fori_loop(ends[0], ends[1], visit, (nothing, nothing))
    key_slope[...] = (key_total * key.shape[1] ** -0.5).astype(key_slope.dtype)
    value_slope[...] = (value_total / (1 - rate)).astype(value_slope.dtype)


def _ours(block: Any) -> Any:
    """Which positions of the row a program has."""
    return pl.ds(pl.program_id(0) * block.shape[0], block.shape[0])


def _scores(left: Array, right: Array, left_ids: Array, right_ids: Array) -> Array:
    scores = _product(left, right, 1, 1) * (left.shape[1] ** -0.5 * math.log2(math.e))
    return jnp.where(left_ids[:, None] == right_ids[None, :], scores, _NEVER)


def _stay(seed: Any, head: Any, queries: Any, keys: Any, segments: Any, rate: float, transposed: bool = False) -> Array:
    """The mask of dropout, [queries, keys] or transposed, as `dropout` makes it over [H, L, L]."""
    (length,) = segments.shape
    query, key = ((each.start + jnp.arange(each.size, dtype=jnp.int32)).astype(jnp.uint32) for each in (queries, keys))
    query = (head[0].astype(jnp.uint32) * length + query) * length
    return kept(seed[0], query[None, :] + key[:, None] if transposed else query[:, None] + key[None, :], rate)


def _product(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    return jax.lax.dot_general(
        left, right, (((left_axis,), (right_axis,)), ((), ())), preferred_element_type=jnp.float32
    )
