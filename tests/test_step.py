"""The step: pure, exact under any cutting of the batch, and it never touches the teacher."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_params_close, random_params

from distil_jax.config.objective import LossConfig
from distil_jax.config.step import OptimizerConfig
from distil_jax.models.student import student_from_teacher
from distil_jax.objective.masking import mask_tokens
from distil_jax.schema import InputError
from distil_jax.structs import IGNORED, Batch
from distil_jax.training.optimizer import learning_rate, make_optimizer
from distil_jax.training.state import abstract_state, init_state
from distil_jax.training.step import apply_gradients, eval_step, mask_and_eval_step, mask_and_train_step, train_step

KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def batch(rows, weights, step_config):
    return mask_tokens(KEY, rows, weights=weights, config=step_config.masking)


def run(config, params, teacher_params, batch, steps=3):
    state, losses = init_state(KEY, config, params=params), []
    step = jax.jit(train_step)
    for _ in range(steps):
        state, metrics = step(state, teacher_params, batch)
        losses.append({name: float(mean.value()) for name, mean in metrics.items()})
    return state, losses


def close(a, b, tolerance=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


@pytest.fixture(scope="module")
def whole(step_config, student_params, teacher_params, batch):
    return run(step_config, student_params, teacher_params, batch)


@pytest.mark.parametrize("accumulation", [2, 8])
def test_accumulation_equals_the_big_batch(step_config, student_params, teacher_params, batch, whole, accumulation):
    state, losses = run(replace(step_config, accumulation=accumulation), student_params, teacher_params, batch)
    close(losses, whole[1])
    assert_params_close(state.params, whole[0].params)
    assert losses[0]["tokens"] == (batch.segment_ids > 0).sum()


def test_order_and_padding_of_rows_change_nothing(step_config, student_params, teacher_params, batch, whole):
    order = np.random.default_rng(0).permutation(16)
    shuffled = jax.tree.map(lambda leaf: leaf[order], batch)
    empty = jax.tree.map(lambda leaf: jnp.zeros_like(leaf[:4]), batch)
    empty = empty.replace(labels=jnp.full_like(empty.labels, IGNORED))
    filled = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), shuffled, empty)
    wider = jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, 0), (0, 8))), filled.replace(row_index=None))
    wider = wider.replace(labels=jnp.pad(filled.labels, ((0, 0), (0, 8)), constant_values=IGNORED))
    state, losses = run(step_config, student_params, teacher_params, wider)
    close(losses, whole[1])
    assert_params_close(state.params, whole[0].params)


def test_packed_trains_as_one_sequence_a_row(step_config, student_params, teacher_params, batch, whole):
    pieces = [
        (jax.tree.map(lambda leaf, r=r: np.asarray(leaf[r]), batch), s)
        for r in range(16)
        for s in range(1, int(batch.segment_ids[r].max()) + 1)
    ]
    shape = (len(pieces), 12)
    alone = Batch(*(np.zeros(shape, np.int32) for _ in range(3)), np.full(shape, IGNORED, np.int32))
    for n, (row, s) in enumerate(pieces):
        where = row.segment_ids == s
        alone.input_ids[n, : where.sum()], alone.labels[n, : where.sum()] = row.input_ids[where], row.labels[where]
        alone.segment_ids[n, : where.sum()], alone.position_ids[n, : where.sum()] = 1, np.arange(where.sum())
    state, losses = run(step_config, student_params, teacher_params, alone)
    close(losses, whole[1])
    assert_params_close(state.params, whole[0].params)


def test_a_pure_step_changes_no_argument(step_config, student_params, teacher_params, batch):
    state = init_state(KEY, step_config, params=student_params)
    before = jax.tree.map(np.array, (state.params, teacher_params))
    jax.jit(train_step)(state, teacher_params, batch)
    jax.tree.map(np.testing.assert_array_equal, before, (state.params, teacher_params))


def test_no_gradient_reaches_the_teacher(step_config, student_params, teacher_params, batch):
    state = init_state(KEY, step_config, params=student_params)

    def loss(teacher_params):
        return train_step(state, teacher_params, batch)[1]["loss"].value()

    assert not any(np.any(leaf) for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(teacher_params)))


def test_twins_from_one_set_of_parameters(step_config, teacher_config, teacher_params, batch):
    """Donating the first twin's state must leave the shared parameters, and the teacher's, alone."""
    teacher = jax.device_put(teacher_params)
    shared = student_from_teacher(teacher, teacher_config, step_config.student, layers=(0, 3))
    donating = jax.jit(train_step, donate_argnums=0)
    undistilled = replace(step_config, loss=LossConfig(kl=0, cosine=0, mlm=2.0))
    begins = []
    for config in (step_config, undistilled):
        state = init_state(KEY, config, params=shared)
        begins.append(jax.tree.map(np.array, state.params))
        for _ in range(2):
            state, metrics = donating(state, teacher, batch)
        assert np.isfinite(float(metrics["loss"].value()))
    jax.tree.map(np.testing.assert_array_equal, *begins)


def test_masking_in_the_step_is_masking_before_it(step_config, student_params, teacher_params, rows, weights):
    state = init_state(KEY, step_config, params=student_params)
    state, _ = jax.jit(mask_and_train_step)(state, teacher_params, rows, weights)
    again = init_state(KEY, step_config, params=student_params)
    other, _ = jax.jit(mask_and_train_step)(again, teacher_params, rows, weights)
    jax.tree.map(np.testing.assert_array_equal, state.params, other.params)
    _, first = jax.jit(mask_and_train_step)(state, teacher_params, rows, weights)
    _, other_masks = jax.jit(mask_and_train_step)(state.replace(step=state.step + 1), teacher_params, rows, weights)
    assert first["mlm"].total != other_masks["mlm"].total, "each step draws its own masks"


def test_held_out_masks_are_always_the_same(step_config, student_params, teacher_params, rows, weights):
    step = jax.jit(mask_and_eval_step)
    early = init_state(KEY, step_config, params=student_params)
    late = init_state(jax.random.key(99), step_config, params=student_params).replace(step=jnp.int32(50))
    first, later = (step(state, teacher_params, rows, weights) for state in (early, late))
    jax.tree.map(np.testing.assert_array_equal, first, later)
    assert set(first) == {"mlm", "accuracy", "kl", "agreement"}
    assert set(step(early, None, rows, weights)) == {"mlm", "accuracy"}


def test_evaluation_has_no_dropout(step_config, student_params, teacher_params, batch):
    noisy = replace(step_config, student=replace(step_config.student, hidden_dropout=0.4))
    plain, dropping = (
        eval_step(init_state(KEY, config, params=student_params), teacher_params, batch)
        for config in (step_config, noisy)
    )
    jax.tree.map(np.testing.assert_array_equal, plain, dropping)


def test_evaluation_takes_what_training_takes(step_config, student_params, teacher_params, batch):
    """Token types of a teacher, for a student that has none."""
    typed = batch.replace(token_type_ids=batch.position_ids % 2)
    state = init_state(KEY, step_config, params=student_params)
    plain, result = (eval_step(state, teacher_params, each) for each in (batch, typed))
    assert result["mlm"] == plain["mlm"] and result["kl"].total != plain["kl"].total


def test_dropout_differs_between_steps_and_rows_but_not_with_the_cut(
    step_config, student_params, teacher_params, batch
):
    config = replace(step_config, student=replace(step_config.student, hidden_dropout=0.4, attention_dropout=0.2))
    state, batch = init_state(KEY, config, params=student_params), batch.replace(row_index=None)
    step = jax.jit(train_step)
    losses = {float(step(state.replace(step=jnp.int32(n)), teacher_params, batch)[1]["loss"].value()) for n in range(3)}
    assert len(losses) == 3
    # One row in every place, and in the first place only: of one shape, so that it is one program.
    everywhere = jax.tree.map(lambda leaf: jnp.repeat(leaf[:1], len(leaf), axis=0), batch)
    once = jax.tree.map(lambda leaf: jnp.zeros_like(leaf).at[:1].set(leaf[:1]), batch)
    once = once.replace(labels=once.labels.at[1:].set(IGNORED))
    mlm = [step(state, teacher_params, rows)[1]["mlm"].value() for rows in (everywhere, once)]
    assert not np.isclose(*mlm, rtol=1e-6)
    cut = init_state(KEY, replace(config, accumulation=2), params=student_params)
    (whole, _), (pieces, _) = step(state, teacher_params, batch), step(cut, teacher_params, batch)
    assert_params_close(pieces.params, whole.params)


def test_no_teacher_is_masked_lm_training(step_config, student_params, batch):
    config = replace(step_config, teacher=None, loss=LossConfig(kl=0, cosine=0, mlm=1.0))
    _, losses = run(config, student_params, None, batch, steps=8)
    assert losses[-1]["mlm"] < losses[1]["mlm"] and "kl" not in losses[0]
    assert losses[0]["loss"] == pytest.approx(losses[0]["mlm"], rel=1e-6)


def test_the_schedule_of_the_recipe():
    rate = learning_rate(OptimizerConfig(learning_rate=1.0, steps=100, warmup=0.05))
    np.testing.assert_allclose([rate(n) for n in (0, 1, 5, 52, 100)], [0, 0.2, 1, 48 / 95, 0], atol=1e-6)
    assert float(learning_rate(OptimizerConfig(learning_rate=1.0, steps=3, warmup=0.0))(0)) == 1.0


def test_biases_and_norms_do_not_decay_and_frozen_parameters_stay(student_params):
    config = OptimizerConfig(steps=10, warmup=0.0, weight_decay=0.5, freeze=("embeddings/position",))
    optimizer = make_optimizer(config)
    nothing = jax.tree.map(jnp.zeros_like, student_params)
    updates, _ = optimizer.update(nothing, optimizer.init(student_params), student_params)
    moved = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(updates)
        if np.any(leaf)
    }
    assert "embeddings/word" in moved and "layers/query/kernel" in moved
    assert not any(name.endswith(("bias", "scale")) for name in moved) and "embeddings/position" not in moved
    ones = jax.tree.map(jnp.ones_like, student_params)
    updates, _ = optimizer.update(ones, optimizer.init(student_params), student_params)
    assert not np.any(updates["embeddings"]["position"]) and np.any(updates["embeddings"]["word"])
    with pytest.raises(InputError, match="no parameter's path starts so"):
        make_optimizer(replace(config, freeze=("embedings",))).init(student_params)


def test_what_is_frozen_counts_in_no_norm_and_stops_no_update(step_config, student_params):
    config = replace(step_config, optimizer=replace(step_config.optimizer, warmup=0.0, freeze=("embeddings",)))
    gradients = jax.tree.map(jnp.ones_like, student_params)
    gradients["embeddings"]["word"] *= jnp.nan
    before = init_state(KEY, config, params=student_params)
    after, metrics = jax.jit(apply_gradients)(before, gradients, {})
    moving = sum(
        leaf.size for name, part in student_params.items() if name != "embeddings" for leaf in jax.tree.leaves(part)
    )
    assert metrics["skipped"].value() == 0 and metrics["gradient_norm"].value() == pytest.approx(np.sqrt(moving))
    for name, part in student_params.items():
        moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), after.params[name], part)
        assert set(jax.tree.leaves(moved)) == {name != "embeddings"}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.opt_state))


def test_equal_configs_compile_once(step_config, student_params, teacher_params, batch):
    traces = []

    def counted(state, teacher_params, batch):
        traces.append(1)
        return train_step(state, teacher_params, batch)

    step = jax.jit(counted)
    for _ in range(2):
        step(init_state(KEY, replace(step_config), params=student_params), teacher_params, batch)
    assert len(traces) == 1


def test_abstract_state_is_the_state(step_config):
    import flax.linen as nn

    real = jax.eval_shape(lambda: init_state(KEY, step_config))
    assert jax.tree.structure(nn.unbox(abstract_state(step_config))) == jax.tree.structure(real)
    random = init_state(KEY, step_config)
    assert not np.any(random.params["embeddings"]["word"][step_config.student.vocab_size :])
    assert jax.tree.map(np.shape, random.params) == jax.tree.map(np.shape, random_params(step_config.student, 0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss": LossConfig(), "teacher": None}, "need a teacher"),
        ({"accumulation": 0}, "at least 1"),
        ({"targets_per_row": 0}, "targets_per_row must be at least 1, not 0"),
        ({"targets_per_row": -3}, "targets_per_row must be at least 1, not -3"),
    ],
)
def test_impossible_steps_are_refused(step_config, change, words):
    with pytest.raises(InputError, match=words):
        replace(step_config, **change)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"vocab_size": 80}, "one tokenizer"), ({"hidden_size": 16}, "one width"), ({"mlm_head": False}, "no MLM head")],
)
def test_teachers_that_do_not_fit_are_refused(step_config, change, words):
    with pytest.raises(InputError, match=words):
        replace(step_config, teacher=replace(step_config.teacher, **change))


def test_what_a_step_cannot_do_is_one_sentence(step_config, student_params, teacher_params, batch):
    for change, words in (
        ({"accumulation": 3}, "16 rows .* do not divide into 3 micro-batches"),
        ({"optimizer": OptimizerConfig()}, "optimizer.steps must be above 0"),
    ):
        state = init_state(KEY, replace(step_config, **change), params=student_params)
        with pytest.raises(InputError, match=words):
            jax.eval_shape(train_step, state, teacher_params, batch)


# 64-bit types


def test_64_bit_types_change_nothing(step_config, student_params, teacher_params, batch, rows, weights, whole):
    """Losses and updates; and nothing that is drawn or computed has 64 bits, with masks and dropout too."""
    config = replace(step_config, student=replace(step_config.student, hidden_dropout=0.1, attention_dropout=0.2))
    with jax.enable_x64(True):
        state, losses = run(step_config, student_params, teacher_params, batch)
        texts = [str(jax.make_jaxpr(init_state, 1)(KEY, config))]
        for step in (mask_and_train_step, mask_and_eval_step):
            text, shapes = jax.make_jaxpr(step, return_shape=True)(
                init_state(KEY, config, params=student_params), teacher_params, rows, weights
            )
            texts.append(str(text))
            assert {leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)} == {4}
    assert not any(re.search(r"f64\[\d", text) for text in texts)
    close(losses, whole[1])
    assert_params_close(state.params, whole[0].params)
    assert jax.tree.map(lambda leaf: leaf.dtype, state) == jax.tree.map(lambda leaf: leaf.dtype, whole[0])


# Numbers that are none


def not_a_number(tree):
    return jax.tree.map(lambda leaf: leaf * np.float32("nan"), tree)


def test_an_update_that_is_no_number_is_left_out(step_config, student_params, teacher_params, batch, whole):
    """The teacher's logits are NaN at the second of four steps: parameters, moments and schedule wait for the next."""
    state, step = init_state(KEY, step_config, params=student_params), jax.jit(train_step)
    for number, teacher in enumerate([teacher_params, not_a_number(teacher_params), teacher_params, teacher_params]):
        before = state
        state, metrics = step(state, teacher, batch)
        bad = number == 1
        assert metrics["skipped"].value() == bad and np.isfinite(metrics["loss"].value()) != bad
        assert (int(state.step), int(state.skipped)) == (number + 1, number > 0)
        same = jax.tree.map(np.array_equal, (state.params, state.opt_state), (before.params, before.opt_state))
        assert all(jax.tree.leaves(same)) == bad
    # Without dropout the step's number decides nothing but the schedule, so this is the run of three good steps.
    close(state.params, whole[0].params, tolerance=1e-6)
    assert float(metrics["learning_rate"].value()) == pytest.approx(whole[1][-1]["learning_rate"])


def test_one_device_whose_gradient_is_no_number_stops_no_other(
    step_config, student_params, teacher_params, batch, monkeypatch
):
    """Of eight devices, the one that has row 5: every device leaves the update out."""
    from distil_jax.config.run import MeshConfig
    from distil_jax.objective.distillation import Distillation
    from distil_jax.training.sharding import jit_step, make_mesh

    loss = Distillation.loss

    def broken(self, student, teacher, batch, counts):
        value, terms = loss(self, student, teacher, batch, counts)
        return value * jnp.where(jnp.any(batch.row_index == 5), jnp.nan, 1), terms

    monkeypatch.setattr(Distillation, "loss", broken)
    step = jit_step(train_step, make_mesh(MeshConfig()), abstract_state(step_config), teacher_params)
    state = init_state(KEY, step_config, params=student_params)
    state, metrics = step(state, teacher_params, batch.replace(row_index=jnp.arange(16)))
    assert metrics["skipped"].value() == 1 and np.isnan(metrics["gradient_norm"].value())
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, state.params, student_params)))


def test_parameters_that_are_no_numbers_are_seen_at_once(step_config, student_params, teacher_params, batch):
    state = init_state(KEY, step_config, params=not_a_number(student_params))
    _, metrics = jax.jit(train_step)(state, teacher_params, batch)
    assert metrics["skipped"].value() == 1


def test_a_batch_without_any_target_moves_nothing_but_the_decay(step_config, student_params, teacher_params, batch):
    """All rows empty, and all rows full but none of their tokens a target: every term is 0, and no number is lost."""
    nothing = batch.replace(labels=jnp.full_like(batch.labels, IGNORED))
    empty = nothing.replace(segment_ids=jnp.zeros_like(batch.segment_ids))
    step = jax.jit(train_step)
    for each, terms in ((empty, ("loss", "kl", "mlm", "cosine")), (nothing, ("mlm",))):
        state, metrics = step(init_state(KEY, step_config, params=student_params), teacher_params, each)
        assert metrics["skipped"].value() == 0 and all(metrics[name].value() == 0 for name in terms)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
