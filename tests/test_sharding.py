"""Eight virtual devices compute what one does, and say so in what they exchange."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_params_close

from distil_jax.config.run import MeshConfig
from distil_jax.machines.flops import step_flops
from distil_jax.machines.hlo import Program
from distil_jax.models.encoder import abstract_params
from distil_jax.schema import InputError
from distil_jax.training.sharding import jit_eval, jit_step, lower_step, make_mesh, put_rows, shardings_of
from distil_jax.training.state import abstract_state, init_state
from distil_jax.training.step import mask_and_eval_step, mask_and_train_step

KEY = jax.random.key(7)


def on_mesh(sizes, config, student_params, teacher_params):
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])
    state_shapes, teacher_shapes = abstract_state(config), abstract_params(config.teacher)
    make = jax.jit(lambda p: init_state(KEY, config, params=p), out_shardings=shardings_of(state_shapes, mesh))
    teacher = jax.device_put(teacher_params, shardings_of(teacher_shapes, mesh))
    return mesh, make(student_params), teacher, partial(_compiled, mesh, state_shapes, teacher_shapes)


def _compiled(mesh, state_shapes, teacher_shapes, wrap, step):
    return wrap(step, mesh, state_shapes, teacher_shapes)


@pytest.fixture(scope="session")
def step_config(step_config):
    """With dropout: its masks, too, are the same on every mesh."""
    return replace(step_config, student=replace(step_config.student, hidden_dropout=0.1, attention_dropout=0.1))


@pytest.fixture(scope="module")
def alone(step_config, student_params, teacher_params, rows, weights):
    state, losses = init_state(KEY, step_config, params=student_params), []
    step = jax.jit(mask_and_train_step)
    for _ in range(5):
        state, metrics = step(state, teacher_params, rows, weights)
        losses.append(float(metrics["loss"].value()))
    return losses, jax.device_get(state.params)


@pytest.mark.parametrize(
    ("sizes", "accumulation"),
    [((8, 1, 1), 1), ((8, 1, 1), 2), ((4, 2, 1), 2), ((2, 2, 2), 2), ((1, 8, 1), 1), ((1, 1, 4), 1)],
)
def test_sharded_equals_one_device(
    step_config, student_params, teacher_params, rows, weights, alone, sizes, accumulation
):
    config = replace(step_config, accumulation=accumulation)
    mesh, state, teacher, compiled = on_mesh(sizes, config, student_params, teacher_params)
    step, losses = compiled(jit_step, mask_and_train_step), []
    for _ in range(5):
        state, metrics = step(state, teacher, put_rows(rows, mesh), weights)
        losses.append(float(metrics["loss"].value()))
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    assert_params_close(state.params, alone[1])
    assert state.params["layers"]["query"]["kernel"].sharding.is_equivalent_to(
        state.opt_state[2][0].mu["layers"]["query"]["kernel"].sharding, 4
    ), "the optimiser's moments lie where their parameters lie"


def test_sharded_evaluation_equals_one_device(step_config, student_params, teacher_params, rows, weights):
    mesh, state, teacher, compiled = on_mesh((4, 2, 1), step_config, student_params, teacher_params)
    result = compiled(jit_eval, mask_and_eval_step)(state, teacher, put_rows(rows, mesh), weights)
    here = init_state(KEY, step_config, params=student_params)
    expected = jax.jit(mask_and_eval_step)(here, teacher_params, rows, weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), result, expected)


def test_the_work_is_shared_and_gradients_are_exchanged_once(step_config, student_params, teacher_params):
    """Of eight micro-batches on eight devices: an eighth of the products each, and one exchange, of the gradients.

    What is kept in pieces, along fsdp, is gathered once besides: both models, however many micro-batches there are.
    """
    config = replace(step_config, accumulation=8)
    costs = []
    for sizes in ((1, 1, 1), (8, 1, 1), (1, 8, 1)):
        mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])
        shapes = abstract_state(config), abstract_params(config.teacher)
        text = lower_step(mask_and_train_step, mesh, *shapes, (64, 24)).compile().as_text()
        costs.append(Program(text).costs)
    alone, shared, pieces = costs
    assert alone.flops == step_flops(config, 24) * 64 * 24
    assert shared.flops == alone.flops / 8
    parameters, taught = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (student_params, teacher_params))
    assert not alone.collective_counts
    assert set(shared.collective_bytes) == {"all-reduce"}, "no ids, logits or activations"
    assert 4 * parameters <= shared.collective_bytes["all-reduce"] <= 1.05 * 4 * parameters
    assert pieces.flops == alone.flops / 8
    assert set(pieces.collective_bytes) <= {"all-reduce", "reduce-scatter", "all-gather"}
    assert pieces.collective_bytes["all-gather"] <= 1.05 * 4 * (parameters + taught)
    assert sum(pieces.collective_bytes.values()) <= 1.05 * 4 * (2 * parameters + taught)


def test_a_step_may_have_any_further_arguments():
    """By place, by name, with defaults or without: on every device they are whole."""

    def step(state, teacher_params, batch, *others, scale=1, bias):
        return {"sum": state["sum"] + scale * jnp.sum(batch) * sum(map(jnp.sum, others)) + bias}, {}

    mesh, state = make_mesh(MeshConfig()), {"sum": jnp.zeros((), jnp.float32)}
    compiled = jit_step(step, mesh, state, None)
    batch, other = jnp.ones((8, 2)), jnp.ones(3)
    state, _ = compiled(state, None, batch, other, other, bias=jnp.float32(1))
    assert state["sum"] == 16 * 6 + 1
    state, _ = compiled(state, None, batch, other, scale=2, bias=jnp.zeros(()))
    assert state["sum"] == 97 + 2 * 16 * 3
    judged = jit_eval(lambda state, teacher_params, batch, *, by: batch * by, mesh, state, None)
    np.testing.assert_array_equal(judged(state, None, batch, by=jnp.float32(3)), 3 * batch)


def test_equal_runs_in_one_process_are_traced_once():
    """As the seeds of `compare` are."""
    traced = []

    def step(state, teacher_params, batch):
        traced.append(batch.shape)
        return state + jnp.sum(batch), {}

    for sizes in ((-1, 1, 1), (-1, 1, 1), (1, -1, 1)):
        mesh, state = make_mesh(MeshConfig(*sizes)), jnp.zeros(())
        assert jit_step(step, mesh, state, None)(state, None, jnp.ones((8, 2)))[0] == 16
    assert traced == [(8, 2)] * 2, "once more for another mesh"


def test_rows_that_do_not_divide_among_the_devices_are_one_sentence(
    step_config, student_params, teacher_params, rows, weights
):
    state = init_state(KEY, step_config, params=student_params)
    with jax.set_mesh(make_mesh(MeshConfig())), pytest.raises(InputError, match="12 rows does not divide among 8"):
        jax.eval_shape(mask_and_train_step, state, teacher_params, jax.tree.map(lambda leaf: leaf[:12], rows), weights)


@pytest.mark.parametrize(
    ("sizes", "result"),
    [((-1, 1, 1), (8, 1, 1)), ((-1, 2, 2), (2, 2, 2)), ((1, 2, -1), (1, 2, 4)), ((8, -1, 1), (8, 1, 1))],
)
def test_one_axis_takes_the_devices_that_are_left(sizes, result):
    assert make_mesh(MeshConfig(*sizes)).devices.shape == result


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (16, 1, 1)])
def test_a_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(InputError, match="does not fit 8 devices"):
        make_mesh(MeshConfig(*sizes))
