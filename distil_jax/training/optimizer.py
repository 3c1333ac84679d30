"""Optimisers from frozen configs: AdamW with its schedule and masks, or a user's own."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from optax.contrib import MuonDimensionNumbers

from distil_jax.config.step import Optimizer, OptimizerConfig
from distil_jax.schema import InputError, require
from distil_jax.structs import Array


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Linear from 0 to the peak over the warm-up, then linear to 0 at `config.steps`.

    Raises:
      InputError: when called with `config.steps` 0, which a state that is only evaluated may have.
    """
    warmup = round(config.warmup * config.steps)

    def rate(step: Array) -> Array:
        require(config.steps > 0, "optimizer.steps must be above 0: the learning rate decays to 0 over so many steps.")
        schedule = optax.join_schedules(
            [
                optax.linear_schedule(0.0, config.learning_rate, warmup),
                optax.linear_schedule(config.learning_rate, 0.0, config.steps - warmup),
            ],
            [warmup],
        )
        # A whole number divided would be float64 where JAX has 64-bit types switched on.
        return schedule(jnp.asarray(step, jnp.float32))

    return rate


# Cached, because two chains never compare equal: equal configs get the same chain.
@functools.cache
def make_optimizer(config: OptimizerConfig | Optimizer | optax.GradientTransformation) -> optax.GradientTransformation:
    """The optax transformation of a step's optimiser.

    For an `OptimizerConfig`: frozen parameters, clip by global norm, AdamW without decay on biases and LayerNorm, in
    that order.

    Raises:
      InputError: it is none of these.
    """
    if isinstance(config, optax.GradientTransformation):
        return config
    if type(config) is not OptimizerConfig:
        require(
            isinstance(config, Optimizer),
            f"{config!r} is no optimiser: give an OptimizerConfig, an optax transformation, or a frozen dataclass with "
            "a method make() that returns one.",
        )
        with jax.ensure_compile_time_eval():  # its arrays are kept, so they must not belong to what is being traced
            return config.make()
    return optax.chain(
        # First, so that what is frozen neither moves nor counts in the norm.
        optax.masked(optax.set_to_zero(), functools.partial(_frozen, prefixes=config.freeze)),
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            learning_rate(config),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=functools.partial(_decays, prefixes=config.freeze),
        ),
    )


def without_frozen(gradients: Any, config: OptimizerConfig) -> Any:
    """The gradients, with zeros for frozen parameters."""
    return jax.tree.map(
        lambda frozen, leaf: jnp.zeros_like(leaf) if frozen else leaf, _frozen(gradients, config.freeze), gradients
    )


def muon_dimension_numbers(params: Any) -> Any:
    """Which axes of each matrix `optax.contrib.muon` orthogonalises, for `muon_weight_dimension_numbers`.

    Layers are stacked and heads have an axis of their own, so no kernel of a block has two axes. By optax's default,
    all of them would be trained by Adam.

    Args:
      params: a model's tree.

    Returns:
      Numbers for the six kernels of every block, and None for all other parameters, which Adam trains.
    """

    def numbers(path: tuple[str, ...], leaf: Array) -> MuonDimensionNumbers | None:
        if not path[0].startswith("layers") or path[-1] != "kernel":
            return None
        reduced = 2 if path[-2] == "attention_output" else 1  # heads and their width are contracted together
        stacked = 1 if path[0] == "layers" else 0  # not where `layers_apart` has cut the stack
        axes = tuple(range(stacked, leaf.ndim))
        return MuonDimensionNumbers(reduction_axis=axes[:reduced], output_axis=axes[reduced:])

    return traverse_util.path_aware_map(numbers, params)


def _frozen(params: Any, prefixes: tuple[str, ...]) -> Any:
    paths = ["/".join(path) for path in traverse_util.flatten_dict(params)]
    for prefix in prefixes:
        if not any(_starts(path, prefix) for path in paths):
            raise InputError(f"optimizer.freeze names {prefix!r}, but no parameter's path starts so: {paths}.")
    return traverse_util.path_aware_map(lambda path, _: _is_frozen(path, prefixes), params)


def _decays(params: Any, prefixes: tuple[str, ...]) -> Any:
    return traverse_util.path_aware_map(
        lambda path, _: path[-1] not in ("bias", "scale") and not _is_frozen(path, prefixes), params
    )


def _is_frozen(path: tuple[str, ...], prefixes: tuple[str, ...]) -> bool:
    return any(_starts("/".join(path), prefix) for prefix in prefixes)


def _starts(path: str, prefix: str) -> bool:
    return (path + "/").startswith(prefix.rstrip("/") + "/")
