"""Self-attention on an NVIDIA GPU without scores in memory: FlashAttention-2 (Dao, 2023) as Pallas kernels for Triton.

A program has a block of queries of one head of one row and goes over the keys block by block, with the running maximum
and sum of the softmax. It keeps the logarithm of each query's sum, from which two kernels recompute the probabilities
in the backward pass: one has queries and goes over keys, one has keys and goes over queries. Blocks are read from
[B, L, H, K] as they lie; blocks that share no segment with the program's own are skipped, so packed rows cost what
their sequences cost. Scores are in base 2, which is what the chip computes.

Checked by Pallas's interpreter, compiled for sm_90, and run on an H200 (2026-11-26).
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
from distil_jax.models.tiles import NEVER, product
from distil_jax.structs import Array

_BLOCK = 64  # queries or keys that are read at a time; rows consist of whole blocks
_QUERIES = 128  # of a program of the forward pass, where rows divide into so many
_SUMS = 64 * 64  # what 4 warps add up in registers; more needs 8, or the compiler spills
_STAGES = 2  # how many blocks are on their way from memory or being computed
_NARROWEST, _WIDEST = 16, 128  # heads: tensor cores want 16 numbers, and beyond 128 the blocks grow too large


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
    """The output of `attend`, and the residuals for `backward`: [B, H, L] logarithms of the softmax's sums.

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
    cotangent: Array,
    *,
    rate: float,
) -> tuple[Array, ...]:
    """The gradients of `query`, `key` and `value`, where `cotangent` is that of the output."""
    # The mean of the cotangents of a query's probabilities, weighted by them: from its output, also with dropout.
    means = jnp.sum(output.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    of_queries, of_keys = (query, cotangent.astype(value.dtype), *saved, means), (key, value)
    call = functools.partial(_call, _BLOCK, segment_ids, seeds, heads, rate)
    return *call(_query_kernel, of_queries, of_keys, (query,)), *call(_key_kernel, of_keys, of_queries, (key, value))


def _call(
    width: int,
    segment_ids: Array,
    seeds: Array,
    heads: Array,
    rate: float,
    kernel: Any,
    own: tuple[Array, ...],
    other: tuple[Array, ...],
    outputs: tuple[Any, ...],
) -> tuple[Array, ...]:
    """Runs programs that have `width` positions of `own` and of the outputs, and go over a row of `other`."""
    rows, length, count, size = own[0].shape

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
            *map(part, own),
            *map(whole, other),
        ],
        out_specs=[*map(part, outputs)],
        out_shape=[jax.ShapeDtypeStruct(each.shape, each.dtype) for each in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=4 if width * size <= _SUMS else 8, num_stages=_STAGES),
    )(seeds, heads, _ranges(segment_ids, width), segment_ids, *own, *other)


def _ranges(segment_ids: Array, width: int) -> Array:
    """[B, L / width, 2] int32: the first block that may share a segment with so many positions, and after the last.

    Right for any ids, and exact where they rise along a row; padding, at its end, counts as the highest.
    """
    ids = jnp.where(segment_ids == 0, jnp.iinfo(jnp.int32).max, segment_ids)
    own, other = ids.reshape(len(ids), -1, 1, width), ids.reshape(len(ids), 1, -1, _BLOCK)
    meet = (own.min(-1) <= other.max(-1)) & (own.max(-1) >= other.min(-1))
    first, behind = jnp.argmax(meet, axis=-1), jnp.argmax(meet[..., ::-1], axis=-1)
    return jnp.stack([first, meet.shape[-1] - behind], axis=-1).astype(jnp.int32)


def _forward_kernel(*refs: Any, rate: float) -> None:
    seed, head, ends, segments, query, key, value, output, sums = refs
    own = _own_positions(query)
    queries, ids = query[...], segments[own]

    def visit(number: Array, so_far: tuple[Array, ...]) -> tuple[Array, ...]:
        total, weight, top = so_far
        other = pl.ds(number * _BLOCK, _BLOCK)
        scores = _scores(queries, key[other, :], ids, segments[other])
        higher = jnp.maximum(top, jnp.max(scores, axis=1))
        probs, shrink = jnp.exp2(scores - higher[:, None]), jnp.exp2(top - higher)
        weight = weight * shrink + jnp.sum(probs, axis=1)
        if rate > 0:
            probs = jnp.where(_stay(seed, head, own, other, segments, rate), probs, 0)
        added = product(probs.astype(value.dtype), value[other, :], 1, 0)
        return total * shrink[:, None] + added, weight, higher

    nothing = jnp.zeros(query.shape[:1], jnp.float32)
    start = (jnp.zeros(query.shape, jnp.float32), nothing, nothing + NEVER)
    total, weight, top = jax.lax.fori_loop(ends[0], ends[1], visit, start)
    output[...] = (total / (weight * (1 - rate))[:, None]).astype(output.dtype)
    sums[...] = top + jnp.log2(weight)


def _query_kernel(*refs: Any, rate: float) -> None:
    seed, head, ends, segments, query, cotangent, sums, means, key, value, query_cotangent = refs
    own = _own_positions(query)
    queries, cotangents, ids, own_sums, own_means = query[...], cotangent[...], segments[own], sums[...], means[...]

    def visit(number: Array, total: Array) -> Array:
        other = pl.ds(number * _BLOCK, _BLOCK)
        keys = key[other, :]
        probs = jnp.exp2(_scores(queries, keys, ids, segments[other]) - own_sums[:, None])
        probs_cotangent = product(cotangents, value[other, :], 1, 1)
        if rate > 0:
            stay = _stay(seed, head, own, other, segments, rate)
            probs_cotangent = jnp.where(stay, probs_cotangent * (1 / (1 - rate)), 0)
        scores_cotangent = probs * (probs_cotangent - own_means[:, None])
        return total + product(scores_cotangent.astype(keys.dtype), keys, 1, 0)

    total = jax.lax.fori_loop(ends[0], ends[1], visit, jnp.zeros(query.shape, jnp.float32))
    query_cotangent[...] = (total * query.shape[1] ** -0.5).astype(query_cotangent.dtype)


def _key_kernel(*refs: Any, rate: float) -> None:
    """As `_query_kernel`, but scores and probabilities are [keys, queries]."""
    seed, head, ends, segments, key, value, query, cotangent, sums, means, key_cotangent, value_cotangent = refs
    own = _own_positions(key)
    keys, values, ids = key[...], value[...], segments[own]

    def visit(number: Array, totals: tuple[Array, Array]) -> tuple[Array, Array]:
        other = pl.ds(number * _BLOCK, _BLOCK)
        queries, cotangents = query[other, :], cotangent[other, :]
        probs = dropped = jnp.exp2(_scores(keys, queries, ids, segments[other]) - sums[other][None, :])
        probs_cotangent = product(values, cotangents, 1, 1)
        if rate > 0:
            stay = _stay(seed, head, other, own, segments, rate, transposed=True)
            dropped = jnp.where(stay, probs, 0)
            probs_cotangent = jnp.where(stay, probs_cotangent * (1 / (1 - rate)), 0)
        scores_cotangent = probs * (probs_cotangent - means[other][None, :])
        key_total = totals[0] + product(scores_cotangent.astype(queries.dtype), queries, 1, 0)
        return key_total, totals[1] + product(dropped.astype(cotangents.dtype), cotangents, 1, 0)

    nothing = jnp.zeros(key.shape, jnp.float32)
    key_total, value_total = jax.lax.fori_loop(ends[0], ends[1], visit, (nothing, nothing))
    key_cotangent[...] = (key_total * key.shape[1] ** -0.5).astype(key_cotangent.dtype)
    value_cotangent[...] = (value_total / (1 - rate)).astype(value_cotangent.dtype)


def _own_positions(block: Any) -> Any:
    """The positions of the row that belong to this program."""
    return pl.ds(pl.program_id(0) * block.shape[0], block.shape[0])


def _scores(left: Array, right: Array, left_ids: Array, right_ids: Array) -> Array:
    scores = product(left, right, 1, 1) * (left.shape[1] ** -0.5 * math.log2(math.e))
    return jnp.where(left_ids[:, None] == right_ids[None, :], scores, NEVER)


def _stay(seed: Any, head: Any, queries: Any, keys: Any, segments: Any, rate: float, transposed: bool = False) -> Array:
    """The dropout mask, [queries, keys] or transposed, equal to that of `dropout` over [H, L, L]."""
    (length,) = segments.shape
    query, key = ((each.start + jnp.arange(each.size, dtype=jnp.int32)).astype(jnp.uint32) for each in (queries, keys))
    query = (head[0].astype(jnp.uint32) * length + query) * length
    return kept(seed[0], query[None, :] + key[:, None] if transposed else query[:, None] + key[None, :], rate)
