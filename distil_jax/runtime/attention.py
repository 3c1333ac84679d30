"""Which attention a run takes on its mesh, and the sentence that says so and why."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from distil_jax.config.model import Attention
from distil_jax.config.step import StepConfig
from distil_jax.models.attention import attend, choose_attention
from distil_jax.models.dropout import row_seeds
from distil_jax.schema import InputError
from distil_jax.structs import Array

_RATE = 0.1


def resolve_attention(
    step: StepConfig, wanted: Literal["auto", "xla", "pallas"], mesh: Mesh, length: int
) -> tuple[StepConfig, str]:
    """The step with the implementation for each of its models, and what was taken and why, in words.

    "auto" takes the device's kernel where it is lawful and, on one row tried here, as exact as XLA's; "pallas" takes
    it or ends the run.

    Raises:
      InputError: "pallas" was asked for and cannot be, or is not as exact.
    """
    device = mesh.devices.flat[0]
    platform = device.platform
    chosen, said, tried = {}, {}, {}
    for name, model in (("student", step.student), ("teacher", step.teacher)):
        if model is None:
            continue
        took, why = "xla", "as asked"
        if wanted != "xla" and platform == "gpu" and not _is_recent(device.compute_capability):
            why = "the kernel wants an NVIDIA GPU of compute capability 8.0 or above"
        elif wanted != "xla":
            took, why = choose_attention(model, length=length, platform=platform, tensor_shards=mesh.shape["tensor"])
        if took != "xla" and platform == jax.default_backend():
            heads = (model.num_heads // mesh.shape["tensor"], model.head_size)  # of one device
            key = (took, *heads, model.dtype)
            if key not in tried:  # a student has its teacher's heads, nearly always: one trial serves both
                tried[key] = _try_kernel(took, heads, length, model.dtype)
            took, why = tried[key]
        if wanted == "pallas" and took == "xla":
            raise InputError(f'compute.attention = "pallas" cannot be for the {name}: {why}. Leave it at "auto".')
        chosen[name] = replace(model, attention=took)
        said.setdefault(f"{took} ({why})" if why else took, []).append(name)
    sentences = (f"{took} for the {' and the '.join(names)}" for took, names in said.items())
    return replace(step, **chosen), f"attention: {', '.join(sentences)}"


def _is_recent(capability: str) -> bool:
    """Of an NVIDIA GPU, as "9.0"; AMD's have names instead."""
    return bool(re.fullmatch(r"\d+\.\d+", capability)) and float(capability) >= 8


def _try_kernel(implementation: Attention, heads: tuple[int, int], length: int, dtype: str) -> tuple[Attention, str]:
    """The kernel, unless it fails on this machine, in whatever way, or is less exact here than XLA.

    Args:
      implementation: the kernel.
      heads: how many a device has, and the width of one.
      length: positions in a row.
      dtype: of the computation.
    """
    try:
        exact, plain, kernel = (
            jax.device_get(_one_row(heads, length, *how))
            for how in (("xla", "float32"), ("xla", dtype), (implementation, dtype))
        )
    # What Mosaic, Triton and XLA raise has no base class of its own, and changes with each release. Whatever it is, it
    # only says that the kernel is not to be had here; XLA's attention is there for that.
    except Exception as error:  # noqa: BLE001
        why = f"the kernel does not compile here: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    else:
        errors = [_error(each, exact) for each in (plain, kernel)]
        why = "" if errors[1] <= 2 * errors[0] + 1e-3 else f"the kernel is off by {errors[1]:.2g} here"
    return ("xla", why) if why else (implementation, "")


def _one_row(heads: tuple[int, int], length: int, implementation: Attention, dtype: str) -> tuple[Array, ...]:
    """Output and gradients of attention with dropout over one packed row, [1, L, H, K] each."""
    shape = (1, length, *heads)
    query, key, value, slope = (
        jax.random.normal(each, shape, jnp.float32).astype(dtype) for each in jax.random.split(jax.random.key(0), 4)
    )
    segment_ids = (jnp.arange(length, dtype=jnp.int32)[None] * 4 // length + 1) % 4  # three sequences, and padding
    seeds = row_seeds(jax.random.key(1), jnp.arange(1), 1)[:, 0]

    @jax.jit
    def compute(query: Array, key: Array, value: Array) -> tuple[Array, ...]:
        def output(*arrays: Array) -> Array:
            return attend(*arrays, segment_ids, dropout_rate=_RATE, seeds=seeds, implementation=implementation)

        found, pull = jax.vjp(output, query, key, value)
        return found, *pull(slope)

    return compute(query, key, value)


def _error(found: tuple[np.ndarray, ...], exact: tuple[np.ndarray, ...]) -> float:
    pairs = zip(found, exact, strict=True)
    return max(float(np.abs(np.float32(one) - other).max() / np.abs(other).max()) for one, other in pairs)
