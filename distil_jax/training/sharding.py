"""The mesh, and everything that knows its axes by name: one code path from one CPU device to many hosts."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from distil_jax.config.run import MeshConfig
from distil_jax.config.step import StepConfig
from distil_jax.models.attention import HEADS_ALONG
from distil_jax.schema import InputError, require
from distil_jax.structs import Rows

_AXES = ("data", "fsdp", HEADS_ALONG)
_BATCH = ("data", "fsdp")  # the axes that cut a batch into shards

# Logical axis (as written at each parameter) -> mesh axes it is kept along. The teacher obeys the same table.
RULES = (
    ("vocab", ("fsdp", "tensor")),  # the one sharded axis of the word table: two make XLA copy it whole
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", HEADS_ALONG),
    ("features", "tensor"),
    ("head_size", None),
    ("norm", None),
    ("layers", None),
)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices (or those given) as ("data", "fsdp", "tensor"); a size of -1 takes what the others leave.

    Neighbours in the mesh are neighbours in the machine. Several slices of TPUs lie along data, which alone speaks
    over the network between them, once a step.

    Raises:
      InputError: the sizes do not multiply to the number of devices, or slices do not divide data.
    """
    devices = jax.devices() if devices is None else devices
    sizes, count = [config.data, config.fsdp, config.tensor], len(devices)
    if -1 in sizes:
        rest = int(np.prod([size for size in sizes if size > 0]))
        sizes[sizes.index(-1)] = max(1, count // rest)
    if np.prod(sizes) != count:
        raise InputError(
            f"A mesh of data x fsdp x tensor = {' x '.join(map(str, sizes))} does not fit {count} devices: "
            "change [mesh] so that the sizes multiply to that."
        )
    # TPUs alone have slices here, and a single one need not say which it is.
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}) or 1
    if sizes[0] % slices:
        raise InputError(f"mesh.data = {sizes[0]} does not divide among {slices} slices: choose a size that does.")
    inside = [sizes[0] // slices, *sizes[1:]]
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(inside, [slices, 1, 1], devices)
    else:
        grid = mesh_utils.create_device_mesh(inside, devices)
    return Mesh(grid, _AXES, axis_types=(AxisType.Auto,) * len(_AXES))


def shard_count(mesh: Mesh) -> int:
    """Into how many pieces a batch is cut."""
    return math.prod(mesh.shape[axis] for axis in _BATCH)


def check_mesh(mesh: Mesh, config: StepConfig) -> None:
    """Refuses a mesh that cuts an axis of a model into unequal pieces.

    Raises:
      InputError: it does.
    """
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    for name, model in (("student", config.student), ("teacher", config.teacher_model)):
        if model is None:
            continue
        for what, size, pieces, axes in (
            ("hidden_size", model.hidden_size, fsdp, "mesh.fsdp"),
            ("num_heads", model.num_heads, tensor, "mesh.tensor"),
            ("intermediate_size", model.intermediate_size, tensor, "mesh.tensor"),
            ("vocabulary (padded to 128)", model.padded_vocab_size, fsdp * tensor, "mesh.fsdp x mesh.tensor"),
        ):
            if size % pieces:
                raise InputError(
                    f"The {name}'s {what} {size} does not divide by {axes} = {pieces}: choose a size that divides it."
                )


def shardings_of(abstract: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of `abstract_state(...)` or `abstract_params(...)`, under `RULES`."""
    return nn.unbox(nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract), mesh, RULES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data and fsdp axes."""
    return NamedSharding(mesh, P(_BATCH))


@functools.lru_cache(maxsize=4)  # asked at every step
def local_places(mesh: Mesh, batch_rows: int) -> np.ndarray:
    """Which rows of a global batch lie on devices of this process, in order."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_rows,)).values()
    return np.unique(np.concatenate([np.arange(batch_rows)[index] for index in indices]))


def put_rows(rows: Any, mesh: Mesh, *, batch_rows: int | None = None) -> Any:
    """Rows as global arrays [B, ...] on the mesh.

    Args:
      rows: what this process has of them, `local_places(mesh, batch_rows)`; each leaf [b, ...].
      mesh: from `make_mesh`.
      batch_rows: B, where there are several processes; None: `rows` are all.
    """
    sharding = batch_sharding(mesh)
    if batch_rows is None:
        return jax.device_put(rows, sharding)
    places = local_places(mesh, batch_rows)

    def put(leaf: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            first, last, _ = index[0].indices(batch_rows)
            begin = np.searchsorted(places, first)  # a device's rows stand together in B, so here too
            return leaf[begin : begin + last - first]

        return jax.make_array_from_callback((batch_rows, *leaf.shape[1:]), sharding, part)

    return jax.tree.map(put, rows)


def put_params(params: Any, shardings: Any) -> Any:
    """Parameters that every process holds whole, on the mesh."""
    return jax.tree.map(
        lambda leaf, sharding: jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index]),
        params,
        shardings,
    )


def replicate(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """An array that every process holds whole, whole on every device of the mesh."""
    return put_params(array, NamedSharding(mesh, P()))


def jit_step(step: Callable, mesh: Mesh, abstract_state: Any, abstract_teacher: Any) -> Callable:
    """Compiles `train_step` or `mask_and_train_step` for a mesh; the state is donated.

    Args:
      step: (state, teacher_params, batch or rows, ...) -> (state, metrics); whatever follows the batch, by place or by
        name, is replicated.
      mesh: from `make_mesh`.
      abstract_state: from `abstract_state`.
      abstract_teacher: from `abstract_params`, or None without a teacher.
    """
    return _on_mesh(mesh, _jitted_step(step, mesh, abstract_state, abstract_teacher))


def jit_eval(step: Callable, mesh: Mesh, abstract_state: Any, abstract_teacher: Any) -> Callable:
    """Compiles `eval_step` or its like for a mesh: nothing is donated, what comes back is whole on every device."""
    everywhere = NamedSharding(mesh, P())
    state = shardings_of(abstract_state, mesh)
    return _on_mesh(mesh, _jitted(step, mesh, state, abstract_teacher, out_shardings=everywhere))


def lower_step(
    step: Callable, mesh: Mesh, abstract_state: Any, abstract_teacher: Any, shape: tuple[int, int]
) -> jax.stages.Lowered:
    """`mask_and_train_step` for a mesh whose devices need not be there, ready to be compiled (or read).

    What it compiles to takes (state, teacher_params, rows, (weights,), {}).

    Args:
      step, mesh, abstract_state, abstract_teacher: as for `jit_step`; the teacher's leaves in the compute dtype.
      shape: [B, L] of the rows.
    """
    compiled = _jitted_step(step, mesh, abstract_state, abstract_teacher)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32)
    rows = Rows(input_ids=ids, segment_ids=ids, position_ids=ids, row_index=jax.ShapeDtypeStruct(shape[:1], jnp.int32))
    weights = jax.ShapeDtypeStruct((abstract_state.config.student.padded_vocab_size,), jnp.float32)
    with jax.set_mesh(mesh):
        return compiled.lower(nn.unbox(abstract_state), nn.unbox(abstract_teacher), rows, (weights,), {})


def _on_mesh(mesh: Mesh, compiled: Callable) -> Callable:
    def run(state: Any, teacher_params: Any, batch: Any, *others: Any, **named: Any) -> Any:
        with jax.set_mesh(mesh):
            return compiled(state, teacher_params, batch, others, named)

    return run


def _jitted_step(step: Callable, mesh: Mesh, abstract_state: Any, abstract_teacher: Any) -> Callable:
    state = shardings_of(abstract_state, mesh)
    return _jitted(step, mesh, state, abstract_teacher, donate_argnums=0, out_shardings=(state, None))


def _jitted(step: Callable, mesh: Mesh, state_sharding: Any, abstract_teacher: Any, **options: Any) -> Callable:
    """Jits a step as (state, teacher_params, batch, others, named); the last two hold its further arguments."""
    teacher_sharding = None if abstract_teacher is None else shardings_of(abstract_teacher, mesh)
    everywhere = NamedSharding(mesh, P())
    shardings = (state_sharding, teacher_sharding, batch_sharding(mesh), everywhere, everywhere)
    return jax.jit(_with_five_arguments(step), in_shardings=shardings, **options)


@functools.lru_cache(maxsize=8)  # one and the same function: equal runs in one process are traced and compiled once
def _with_five_arguments(step: Callable) -> Callable:
    @functools.wraps(step)
    def call(state: Any, teacher_params: Any, batch: Any, others: tuple, named: dict[str, Any]) -> Any:
        return step(state, teacher_params, batch, *others, **named)

    return call


def gather_params(params: Any, abstract: Any) -> Any:
    """A model's parameters whole along fsdp, as a step computes with them; cut along tensor as ever.

    fsdp is how parameters and moments are kept. An encoder is small beside its activations, so it is gathered once a
    step, not layer by layer in every micro-batch. Without a mesh nothing happens.

    Args:
      params: the tree.
      abstract: its shapes and logical axes, from `abstract_model`.
    """
    return _laid_out(params, abstract, _without_fsdp(RULES))


def scatter_params(params: Any, abstract: Any) -> Any:
    """Gradients (or anything of the parameters' shapes) as parameters are kept: cut along fsdp and tensor."""
    return _laid_out(params, abstract, RULES)


def _laid_out(params: Any, abstract: Any, rules: Any) -> Any:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return params
    specs = nn.unbox(nn.logical_to_mesh(nn.get_partition_spec(abstract), rules))
    return jax.lax.with_sharding_constraint(params, specs)


def _without_fsdp(rules: Any) -> Any:
    def rest(axes: Any) -> Any:
        return tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes or ()) if axis != "fsdp") or None

    return tuple((name, rest(axes)) for name, axes in rules)


def map_shards(function: Callable) -> Callable:
    """Calls `function(batch, *rest)` on each shard of the batch; what comes back has a leading axis of shards.

    The tensor axis stays with the compiler. Without a mesh there is one shard.
    """

    def mapped(batch: Any, *rest: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        shards = 1 if mesh.empty else shard_count(mesh)
        if shards == 1:
            return jax.tree.map(lambda leaf: leaf[None], function(batch, *rest))

        def cut(leaf: Any) -> Any:
            rows = leaf.shape[0]
            require(rows % shards == 0, f"A batch of {rows} rows does not divide among {shards} shards of the mesh.")
            leaf = leaf.reshape(shards, leaf.shape[0] // shards, *leaf.shape[1:])
            return jax.lax.with_sharding_constraint(leaf, P(_BATCH))

        # A batched axis that lies on the mesh, not a shard_map: XLA aborts on one over data beside a tensor axis.
        each = jax.vmap(function, in_axes=(0, *(None,) * len(rest)), spmd_axis_name=_BATCH)
        return each(jax.tree.map(cut, batch), *rest)

    return mapped


def sum_over_shards(function: Callable) -> Callable:
    """`map_shards`, and what comes back is added up.

    One exchange per leaf, after everything inside is done: plain `jit` would exchange in every micro-batch, or make
    every device compute all of them.
    """

    def summed(batch: Any, *rest: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), map_shards(function)(batch, *rest))

    return summed
