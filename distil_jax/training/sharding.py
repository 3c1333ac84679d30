"""The mesh, and everything that knows its axes by name: one code path from one CPU device to many hosts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from distil_jax.config import MeshConfig
from distil_jax.schema import InputError

_AXES = ("data", "fsdp", "tensor")

# Logical axis (as written at each parameter) -> mesh axes. The teacher obeys the same table.
RULES = (
    ("batch", ("data", "fsdp")),
    ("vocab", ("fsdp", "tensor")),  # the one sharded axis of the word table: two make XLA copy it whole
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("features", "tensor"),
    ("head_size", None),
    ("norm", None),
    ("layers", None),
)


def make_mesh(config: MeshConfig) -> Mesh:
    """All devices as ("data", "fsdp", "tensor"); a size of -1 takes what the others leave.

    Raises:
      InputError: the sizes do not multiply to the number of devices.
    """
    sizes, count = [config.data, config.fsdp, config.tensor], jax.device_count()
    if -1 in sizes:
        rest = int(np.prod([size for size in sizes if size > 0]))
        sizes[sizes.index(-1)] = max(1, count // rest)
    if np.prod(sizes) != count:
        raise InputError(
            f"A mesh of data x fsdp x tensor = {' x '.join(map(str, sizes))} does not fit {count} devices: "
            "change [mesh] so that the sizes multiply to that."
        )
    if sizes[0] > 1 and sizes[2] > 1:
        # XLA's partitioner (jax 0.10) aborts the process on a shard_map over data beside a tensor axis.
        raise InputError(
            f"A mesh that uses data and tensor at once ({' x '.join(map(str, sizes))}) cannot be compiled yet: set one "
            "of them to 1."
        )
    return jax.make_mesh(tuple(sizes), _AXES, axis_types=(AxisType.Auto,) * len(_AXES))


def shardings_of(abstract: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of `abstract_state(...)` or `abstract_params(...)`, under `RULES`."""
    return nn.unbox(nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract), mesh, RULES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data and fsdp axes."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def put_rows(rows: Any, mesh: Mesh) -> Any:
    """This process's rows [B / processes, ...] as one global array [B, ...] on the mesh."""
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(batch_sharding(mesh), leaf), rows)


def jit_step(step: Callable, mesh: Mesh, abstract_state: Any, abstract_teacher: Any) -> Callable:
    """Compiles `train_step` or `mask_and_train_step` for a mesh; the state is donated.

    Args:
      step: (state, teacher_params, batch or rows, ...) -> (state, metrics); what follows the batch is replicated.
      mesh: from `make_mesh`.
      abstract_state: from `abstract_state`.
      abstract_teacher: from `abstract_params`, or None without a teacher.
    """
    state_sharding = shardings_of(abstract_state, mesh)
    return _jit(step, mesh, state_sharding, abstract_teacher, donate_argnums=0, out_shardings=(state_sharding, None))


def jit_eval(step: Callable, mesh: Mesh, abstract_state: Any, abstract_teacher: Any) -> Callable:
    """Compiles `eval_step` or its like for a mesh: nothing is donated, the metrics are replicated."""
    return _jit(step, mesh, shardings_of(abstract_state, mesh), abstract_teacher)


def _jit(step: Callable, mesh: Mesh, state_sharding: Any, abstract_teacher: Any, **options: Any) -> Callable:
    teacher_sharding = None if abstract_teacher is None else shardings_of(abstract_teacher, mesh)
    replicated = NamedSharding(mesh, P())
    others = (replicated,) * (len(inspect.signature(step).parameters) - 3)
    compiled = jax.jit(step, in_shardings=(state_sharding, teacher_sharding, batch_sharding(mesh), *others), **options)

    def run(*arguments: Any) -> Any:
        with jax.set_mesh(mesh):
            return compiled(*arguments)

    return run


def sum_over_data_shards(function: Callable) -> Callable:
    """Calls `function(shard, batch, *rest)` on each data shard's part of the batch and adds up what comes back.

    One exchange per leaf, after everything inside is done: plain `jit` would exchange in every micro-batch, or make
    every device compute all of them. The other axes stay with the compiler. Without a mesh there is one shard.
    """

    def summed(batch: Any, *rest: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.shape["data"] == 1:
            return function(np.int32(0), batch, *rest)

        def on_shard(batch: Any, *rest: Any) -> Any:
            return jax.lax.psum(function(jax.lax.axis_index("data"), batch, *rest), "data")

        return jax.shard_map(
            on_shard,
            in_specs=(P("data"), *(P() for _ in rest)),
            out_specs=P(),
            axis_names={"data"},
            check_vma=False,
        )(batch, *rest)

    return summed
