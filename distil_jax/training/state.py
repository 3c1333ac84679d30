"""The training state, which an optimiser step reads and writes; the teacher is an argument of the step instead."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.core import meta

from distil_jax.config.step import StepConfig
from distil_jax.models.heads import init_model
from distil_jax.structs import Array
from distil_jax.training.optimizer import make_optimizer


@struct.dataclass
class TrainState:
    """One student in training.

    Attributes:
      step: int32 scalar, the batches seen.
      skipped: int32 scalar, how many of them left the parameters as they were, see `train_step`.
      params: the student's tree, float32.
      opt_state: of `make_optimizer(config.optimizer)`.
      key: raw data of the key from which every step's masks and dropout are folded, so resuming needs no more.
      config: static; equal configs compile once.
    """

    step: Array
    skipped: Array
    params: Any
    opt_state: Any
    key: Array
    config: StepConfig = struct.field(pytree_node=False)


def init_state(key: Array, config: StepConfig, *, params: Any = None) -> TrainState:
    """A state before its first step.

    Args:
      key: for random parameters, and for every mask and dropout to come.
      config: models, objective and optimiser.
      params: the student's first parameters; always copied, because they may be the teacher's buffers and the step
        donates its own. None: random.
    """
    init_key, run_key = jax.random.split(key)
    if params is None:
        params = nn.unbox(init_model(init_key, config.student, config.head))
    params = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), params)
    return _state(run_key, config, params)


def eval_state(config: StepConfig, params: Any) -> TrainState:
    """A state of parameters that are only evaluated: without an optimiser's moments."""
    zero, key = jnp.zeros((), jnp.int32), jax.random.key_data(jax.random.key(0))
    return TrainState(step=zero, skipped=zero, params=params, opt_state=None, key=key, config=config)


def abstract_state(config: StepConfig) -> TrainState:
    """Shapes and logical axes of a state, no values: what shardings are made from.

    An array of the optimiser has the axes of the parameter at whose path it ends and whose shape it has, as moments do.
    Any other array has none, so that every device gets a copy.
    """
    state = _traced.eval_shape(jax.random.key(0), config)
    boxes = jax.tree_util.tree_leaves_with_path(state.params, is_leaf=_is_box)
    axes = {path: box for path, box in boxes if _is_box(box)}

    def boxed(path: tuple, leaf: jax.ShapeDtypeStruct) -> Any:
        for begin in range(len(path)):
            box = axes.get(path[begin:])
            if box is not None and box.value.shape == leaf.shape:
                return box.replace_boxed(leaf)
        return leaf

    return state.replace(opt_state=jax.tree_util.tree_map_with_path(boxed, state.opt_state))


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, meta.AxisMetadata)


@partial(jax.jit, static_argnums=1)  # never run: it remembers what it traced
def _traced(key: Array, config: StepConfig) -> TrainState:
    params = init_model(key, config.student, config.head)
    return _state(key, config, nn.unbox(params)).replace(params=params)


def _state(run_key: Array, config: StepConfig, params: Any) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=make_optimizer(config.optimizer).init(params),
        key=jax.random.key_data(run_key),
        config=config,
    )
