"""Chooses the attention that a run uses on its mesh, and says so in a sentence with the reason."""

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
    """The step with an attention implementation for each model, and a sentence with the choice and the reason.

    "auto" takes the device's kernel if the model allows it and a trial on one row is as exact as XLA's attention;
    "pallas" takes the kernel or refuses the run.

    Raises:
      InputError: "pallas" was asked for, and the kernel cannot be used or is less exact.
    """
    device = mesh.devices.flat[0]
    platform = device.platform
    chosen, names_by_choice, trials = {}, {}, {}
    for name, model in (("student", step.student), ("teacher", step.teacher_model)):
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
            if key not in trials:  # student and teacher nearly always have the same heads: one trial serves both
                trials[key] = _try_kernel(took, heads, length, model.dtype)
            took, why = trials[key]
        if wanted == "pallas" and took == "xla":
            raise InputError(f'compute.attention = "pallas" cannot be for the {name}: {why}. Leave it at "auto".')
        chosen[name] = replace(model, attention=took)
        names_by_choice.setdefault(f"{took} ({why})" if why else took, []).append(name)
    sentences = (f"{took} for the {' and the '.join(names)}" for took, names in names_by_choice.items())
    return replace(step, **chosen), f"attention: {', '.join(sentences)}"


def _is_recent(capability: str) -> bool:
    """Whether a compute capability is NVIDIA's ("9.0") and at least 8.0; AMD's GPUs have names instead."""
    return bool(re.fullmatch(r"\d+\.\d+", capability)) and float(capability) >= 8


def _try_kernel(implementation: Attention, heads: tuple[int, int], length: int, dtype: str) -> tuple[Attention, str]:
    """Tries the kernel here: returns it, or XLA and the reason if the kernel fails or is less exact than XLA.

    Args:
      implementation: the kernel.
      heads: how many a device has, and the width of one.
      length: positions in a row.
      dtype: of the computation.
    """
    try:
        exact = jax.device_get(_one_row(heads, length, "xla", "float32"))
        plain = jax.device_get(_one_row(heads, length, "xla", dtype))
        kernel = jax.device_get(_one_row(heads, length, implementation, dtype))
    # The exceptions of Mosaic, Triton and XLA have no common base class, and change with each release. Whatever is
    # raised means the same: the kernel cannot be used here, and XLA's attention can.
    except Exception as error:  # noqa: BLE001
        why = f"the kernel does not compile here: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    else:
        error = _error(kernel, exact)
        why = "" if error <= 2 * _error(plain, exact) + 1e-3 else f"the kernel is off by {error:.2g} here"
    return ("xla", why) if why else (implementation, "")


def _one_row(heads: tuple[int, int], length: int, implementation: Attention, dtype: str) -> tuple[Array, ...]:
    """Output and gradients of attention with dropout over one packed row, [1, L, H, K] each."""
    shape = (1, length, *heads)
    query, key, value, cotangent = (
        jax.random.normal(each, shape, jnp.float32).astype(dtype) for each in jax.random.split(jax.random.key(0), 4)
    )
    segment_ids = (jnp.arange(length, dtype=jnp.int32)[None] * 4 // length + 1) % 4  # three sequences, and padding
    seeds = row_seeds(jax.random.key(1), jnp.arange(1), 1)[:, 0]

    @jax.jit
    def compute(query: Array, key: Array, value: Array) -> tuple[Array, ...]:
        def output(*arrays: Array) -> Array:
            return attend(*arrays, segment_ids, dropout_rate=_RATE, seeds=seeds, implementation=implementation)

        outputs, pull = jax.vjp(output, query, key, value)
        return outputs, *pull(cotangent)

    return compute(query, key, value)


def _error(values: tuple[np.ndarray, ...], exact: tuple[np.ndarray, ...]) -> float:
    pairs = zip(values, exact, strict=True)
    return max(float(np.abs(np.float32(one) - other).max() / np.abs(other).max()) for one, other in pairs)
