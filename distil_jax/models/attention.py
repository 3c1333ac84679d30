"""Self-attention inside segments: the implementations, and when each can be used.

XLA's can be used everywhere. It writes the scores [B, H, L, L] to memory, which costs more time than the products of
the layer at a length of 512; the kernels do not. cuDNN's is not among them: as JAX offers it, it supports neither
segments nor dropout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from distil_jax.config.model import Attention, ModelConfig
from distil_jax.models import gpu_attention, tpu_attention
from distil_jax.models.dropout import dropout
from distil_jax.models.tiles import NEVER
from distil_jax.structs import Array

HEADS_ALONG = "tensor"  # the mesh axis that cuts heads; `training/sharding.py` has it from here
_KERNELS = {"pallas_gpu": gpu_attention, "pallas_tpu": tpu_attention}
_BY_PLATFORM = {"gpu": "pallas_gpu", "tpu": "pallas_tpu"}


def attend(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array,
    *,
    dropout_rate: float = 0.0,
    seeds: Array | None = None,
    implementation: Attention = "xla",
) -> Array:
    """Scaled dot-product attention in which a position sees only its own segment (Vaswani et al., 2017, eq. 1).

    Padding is segment 0 and sees itself: its output is finite, means nothing, and reaches no other position.

    Args:
      query, key, value: [B, L, H, K].
      segment_ids: [B, L].
      dropout_rate: share of the attention probabilities set to zero.
      seeds: [B] of `row_seeds`; None: nothing is dropped. Every implementation drops the same ones.
      implementation: see `choose_attention`; XLA's is taken for rows that a kernel does not take, as the short batches
        of a task are.

    Returns:
      [B, L, H, K] in the dtype of `value`.
    """
    _, length, heads, head_size = query.shape
    if implementation != "xla" and _KERNELS[implementation].obstacle(heads, head_size, length) is None:
        if seeds is None:
            dropout_rate, seeds = 0.0, jnp.zeros(len(segment_ids), jnp.uint32)
        return _with_kernel(implementation, dropout_rate, query, key, value, segment_ids, seeds)
    scores_BxHxLxL = jnp.einsum("BLHK,BMHK->BHLM", query, key) * query.shape[-1] ** -0.5
    same_segment_Bx1xLxL = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    # The softmax is taken in float32 whatever the compute dtype.
    scores_BxHxLxL = jnp.where(same_segment_Bx1xLxL, scores_BxHxLxL.astype(jnp.float32), NEVER)
    weights_BxHxLxL = jax.nn.softmax(scores_BxHxLxL, axis=-1).astype(value.dtype)
    weights_BxHxLxL = dropout(weights_BxHxLxL, seeds, dropout_rate)
    return jnp.einsum("BHLM,BMHK->BLHK", weights_BxHxLxL, value)


def choose_attention(
    model: ModelConfig, *, length: int, platform: str, tensor_shards: int = 1
) -> tuple[Attention, str]:
    """The fastest implementation that can compute a model, and why a faster one cannot, or "".

    Args:
      model: whose heads.
      length: positions in a row.
      platform: "cpu", "gpu" or "tpu".
      tensor_shards: into how many parts the mesh cuts the heads.
    """
    name = _BY_PLATFORM.get(platform)
    if name is None:
        return "xla", f"there is no kernel for a {platform}"
    reason = _KERNELS[name].obstacle(model.num_heads // tensor_shards, model.head_size, length)
    return ("xla", f"the kernel does not take {reason}") if reason else (name, "")


_WIDE, _SAVED = P(None, None, HEADS_ALONG, None), P(None, HEADS_ALONG, None)  # of [B, L, H, K] and [B, H, L]


# A derivative rule around what is cut along the mesh, not inside: what the rule keeps then needs no place on the mesh.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_kernel(implementation: Attention, rate: float, *arrays: Array) -> Array:
    return _forward(implementation, rate, *arrays)[0]


def _forward(implementation: Attention, rate: float, *arrays: Array) -> tuple[Array, tuple]:
    kernel = functools.partial(_KERNELS[implementation].forward, rate=rate)
    outputs = _on_each_device(kernel, arrays, (), (), (_WIDE, _SAVED))
    # Named, so that a step that computes products once computes this once as well.
    output, saved = checkpoint_name(outputs, "attention")
    return output, (arrays, output, saved)


def _backward(implementation: Attention, rate: float, forward: tuple, cotangent: Array) -> tuple:
    arrays, output, saved = forward
    kernel = functools.partial(_KERNELS[implementation].backward, rate=rate)
    gradients = _on_each_device(kernel, arrays, (output, saved, cotangent), (_WIDE, _SAVED, _WIDE), (_WIDE,) * 3)
    return *gradients, None, None


_with_kernel.defvjp(_forward, _backward)


def _on_each_device(kernel: Callable, arrays: tuple, more: tuple, more_specs: tuple, outputs: Any) -> Any:
    """Calls a kernel, which the compiler cannot cut by itself, on each device's heads; it is told which these are."""
    heads = jnp.arange(arrays[0].shape[2], dtype=jnp.int32)
    if jax.sharding.get_abstract_mesh().empty:
        return kernel(*arrays, heads, *more)
    specs = (_WIDE, _WIDE, _WIDE, P(), P(), P(HEADS_ALONG), *more_specs)
    return jax.shard_map(kernel, in_specs=specs, out_specs=outputs, check_vma=False)(*arrays, heads, *more)
