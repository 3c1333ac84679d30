"""How fast encoders are, compared with each other."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from statistics import median

import jax
import numpy as np

from distil_jax.config.model import ModelConfig
from distil_jax.config.run import ComputeConfig
from distil_jax.models.encoder import MaskedLm
from distil_jax.runtime.assemble import resolve_compute, with_compute
from distil_jax.runtime.run_folder import Model
from distil_jax.structs import Batch


def encoder_seconds(models: Mapping[str, Model], *, rows: int, length: int, repeats: int = 15) -> dict[str, float]:
    """The median seconds of a call of each encoder, without vocabulary or head, on full rows.

    Models take turns, so that other load on the machine meets all of them alike. Each uses this machine's compute
    settings, not those it was trained with.

    Args:
      models: by name; all with at least `length` positions.
      rows, length: of the batch.
      repeats: calls of each that are timed, after one that is not.
    """
    calls, compute = {}, resolve_compute(ComputeConfig())
    for name, model in models.items():
        ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, length))
        body = {part: tree for part, tree in model.params.items() if part in ("embeddings", "layers")}
        encode = jax.jit(_hidden, static_argnums=0)
        config = with_compute(replace(model.config, mlm_head=False, pooler=False), compute)
        batch, params = Batch.from_padded(ids, np.ones_like(ids), ids), jax.device_put(body)
        calls[name] = lambda encode=encode, config=config, params=params, batch=batch: encode(config, params, batch)
    for call in calls.values():
        call().block_until_ready()
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats):
        for name, call in calls.items():
            began = time.perf_counter()
            call().block_until_ready()
            seconds[name].append(time.perf_counter() - began)
    return {name: median(times) for name, times in seconds.items()}


def _hidden(config: ModelConfig, params: dict, batch: Batch) -> jax.Array:
    return MaskedLm(config).apply({"params": params}, batch).hidden
