"""The encoder: what may reach what, and that its settings change the cost and not the numbers."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import VOCAB, packed_rows, random_params

from distil_jax.config.model import ModelConfig
from distil_jax.models.attention import attend
from distil_jax.models.dropout import row_seeds
from distil_jax.models.encoder import MaskedLm, count_parameters, layers_apart
from distil_jax.objective.vocabulary import logits
from distil_jax.schema import InputError
from distil_jax.structs import Batch


def as_batch(rows, **changes):
    return Batch(rows.input_ids, rows.segment_ids, rows.position_ids, rows.input_ids).replace(**changes)


def apply(config, params, batch, **kwargs):
    return jax.jit(lambda p, b: MaskedLm(config).apply({"params": p}, b, **kwargs))(params, batch)


def test_parameter_counts_are_the_published_ones():
    body = ModelConfig(30_522, num_layers=6, token_types=0, mlm_head=False)
    assert count_parameters(body) == 66_362_880
    assert count_parameters(replace(body, mlm_head=True)) == 66_985_530
    assert count_parameters(ModelConfig(30_522)) == 109_514_298


def test_padding_ids_are_the_same_to_models_of_any_precision(teacher_config, teacher_params, rows):
    """A teacher in bfloat16 beside a student in float32: where their padding differed, mse would see nothing else."""
    rounded = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), teacher_params)
    biases = [
        apply(replace(teacher_config, dtype=dtype), params, as_batch(rows)).head.bias
        for dtype, params in (("float32", teacher_params), ("bfloat16", rounded))
    ]
    assert all(bias.dtype == jnp.float32 for bias in biases)
    assert np.array_equal(biases[0][VOCAB:], biases[1][VOCAB:]) and len(biases[0]) > VOCAB


def test_packed_equals_one_sequence_a_row(teacher_config, teacher_params, rows):
    packed = apply(teacher_config, teacher_params, as_batch(rows))
    segments = [(r, s) for r in range(len(rows.input_ids)) for s in range(1, rows.segment_ids[r].max() + 1)]
    ids, mask = np.zeros((len(segments), 12), np.int32), np.zeros((len(segments), 12), np.int32)
    for n, (r, s) in enumerate(segments):
        tokens = rows.input_ids[r][rows.segment_ids[r] == s]
        ids[n, : len(tokens)], mask[n, : len(tokens)] = tokens, 1
    alone = apply(teacher_config, teacher_params, Batch.from_padded(ids, mask, ids))
    for n, (r, s) in enumerate(segments):
        where = rows.segment_ids[r] == s
        np.testing.assert_allclose(packed.hidden[r][where], alone.hidden[n][: where.sum()], atol=1e-5)
        np.testing.assert_allclose(packed.features[r][where], alone.features[n][: where.sum()], atol=1e-5)


def test_no_gradient_crosses_segments(teacher_config, teacher_params, rows):
    """Which embedding positions can change the output of segment 1 of row 0?"""
    row = jax.tree.map(lambda leaf: leaf[:1], rows)
    inside = row.segment_ids[0] == 1
    probe = {
        **teacher_params,
        "embeddings": {**teacher_params["embeddings"], "word": np.tile(teacher_params["embeddings"]["word"], (1, 1))},
    }
    # One id per position, so that the gradient of the table tells positions apart.
    batch = as_batch(row, input_ids=jnp.arange(5, 5 + row.input_ids.shape[1])[None])

    def of_segment(word):
        params = {**probe, "embeddings": {**probe["embeddings"], "word": word}}
        return jnp.sum(MaskedLm(teacher_config).apply({"params": params}, batch).hidden[0] ** 3 * inside[:, None])

    touched = np.abs(jax.grad(of_segment)(probe["embeddings"]["word"])).sum(axis=1)[5 : 5 + len(inside)] > 0
    np.testing.assert_array_equal(touched, inside)


@pytest.mark.parametrize("change", [{"unroll": True}, {"remat": "full"}, {"remat": "dots"}])
def test_settings_of_the_machine_change_no_number(teacher_config, teacher_params, rows, change):
    def value_and_gradient(config):
        def loss(params):
            return jnp.mean(MaskedLm(config).apply({"params": params}, as_batch(rows)).features ** 2)

        return jax.jit(jax.value_and_grad(loss))(teacher_params)

    plain, changed = value_and_gradient(teacher_config), value_and_gradient(replace(teacher_config, **change))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), plain, changed)


@pytest.mark.parametrize("unroll", [False, True])
def test_unrolled_layers_are_kept_from_being_computed_once(teacher_config, teacher_params, rows, unroll):
    """In a loop XLA cannot merge the second computation with the first; side by side it would."""
    config = replace(teacher_config, remat="full", unroll=unroll)
    text = str(jax.make_jaxpr(lambda params: apply(config, params, as_batch(rows)).hidden)(teacher_params))
    assert f"prevent_cse={unroll}" in text and f"prevent_cse={not unroll}" not in text


IDS = np.ones((4, 8), np.int64)


def test_padded_arrays_of_any_library_become_a_batch():
    for dtype in (bool, np.int64, np.float64):
        batch = Batch.from_padded(IDS.tolist(), np.ones((4, 8), dtype), IDS)
        assert {leaf.dtype for leaf in jax.tree.leaves(batch)} == {jnp.dtype("int32")}
    regression = Batch.from_padded(IDS, IDS, np.array([0.4, 1.7, -0.5, 2.9]))
    np.testing.assert_array_equal(regression.labels, np.float32([0.4, 1.7, -0.5, 2.9]))
    traced = jax.eval_shape(Batch.from_padded, IDS, IDS, IDS[:, 0] * 0.5)
    assert traced.labels.dtype == jnp.float32 and traced.segment_ids.dtype == jnp.int32
    with jax.enable_x64(True):
        assert {leaf.dtype.itemsize for leaf in jax.tree.leaves(Batch.from_padded(IDS, IDS, IDS[:, 0] * 0.5))} == {4}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"input_ids": IDS * 1.5}, "input_ids must be whole numbers, not float32"),
        ({"input_ids": IDS[0]}, r"input_ids must be \[B, L\], one sequence per row, not \[8\]"),
        ({"attention_mask": IDS[:, :4]}, r"attention_mask must be .* \[4, 8\], not \[4, 4\]"),
        ({"attention_mask": IDS * 0.5}, r"but contains \[0.5\]"),
        ({"attention_mask": IDS * 2}, r"neither packed nor additive\), but contains \[2\]"),
        ({"attention_mask": IDS * -1e9}, "attention_mask must be 1 at tokens"),
        ({"attention_mask": IDS * np.nan}, "attention_mask must be 1 at tokens"),
        ({"labels": IDS[:3]}, r"labels must be \[B, L\], \[B\] or \[B, 2\]"),
        ({"labels": IDS[:, :1]}, r"not \[4, 1\]"),
        ({"labels": IDS * 0.5}, "labels of dtype float32 are for a regression"),
        ({"token_type_ids": IDS[:2]}, r"token_type_ids must be .* not \[2, 8\]"),
        ({"token_type_ids": IDS * 0.5}, "token_type_ids must be whole numbers"),
    ],
)
def test_arrays_that_are_no_batch_are_refused(changes, words):
    given = {"input_ids": IDS, "attention_mask": IDS, "labels": IDS} | changes
    with pytest.raises(InputError, match=words):
        Batch.from_padded(**given)


def test_padding_ids_take_no_probability(teacher_config, teacher_params, rows):
    output = apply(teacher_config, teacher_params, as_batch(rows))
    probabilities = jax.nn.softmax(logits(output.features, output.head))
    assert output.head.kernel.shape == (128, 32)
    assert float(jnp.max(probabilities[..., VOCAB:])) == 0.0
    assert bool(jnp.all(jnp.isfinite(jax.nn.log_softmax(logits(output.features, output.head)))))


def test_dropout_acts_in_training_only_and_needs_a_key(teacher_config, teacher_params, rows):
    config = replace(teacher_config, hidden_dropout=0.3, attention_dropout=0.3)
    still = apply(config, teacher_params, as_batch(rows)).hidden
    np.testing.assert_array_equal(still, apply(teacher_config, teacher_params, as_batch(rows)).hidden)
    one, same, other = (
        apply(config, teacher_params, as_batch(rows), train=True, rngs={"dropout": jax.random.key(k)}).hidden
        for k in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other) and not np.allclose(one, still)


@pytest.mark.parametrize("part", ["hidden_dropout", "attention_dropout"])
def test_each_dropout_is_wired(teacher_config, teacher_params, rows, part):
    config = replace(teacher_config, **{part: 0.5})
    dropped = apply(config, teacher_params, as_batch(rows), train=True, rngs={"dropout": jax.random.key(0)})
    assert not np.allclose(dropped.hidden, apply(config, teacher_params, as_batch(rows)).hidden)


def test_attention_dropout_keeps_the_mean():
    ones = jnp.ones((4, 64, 2, 8))
    values = jax.random.normal(jax.random.key(1), ones.shape) + 1
    segments = jnp.ones((4, 64), jnp.int32)
    seeds = row_seeds(jax.random.key(2), jnp.arange(4), 1)[:, 0]
    dropped = attend(ones, ones, values, segments, dropout_rate=0.5, seeds=seeds)
    np.testing.assert_allclose(dropped.mean(), values.mean(), rtol=0.05)


def test_a_rows_dropout_is_its_own_wherever_it_stands(teacher_config, teacher_params, rows):
    config = replace(teacher_config, hidden_dropout=0.3, attention_dropout=0.3)
    batch = as_batch(rows).replace(row_index=rows.row_index)
    key = {"dropout": jax.random.key(0)}
    whole = apply(config, teacher_params, batch, train=True, rngs=key).hidden
    turned = jax.tree.map(lambda leaf: leaf[::-1], batch)
    np.testing.assert_array_equal(apply(config, teacher_params, turned, train=True, rngs=key).hidden[::-1], whole)
    twins = jax.tree.map(lambda leaf: jnp.repeat(leaf[:1], 2, axis=0), batch).replace(row_index=jnp.arange(2))
    first, second = apply(config, teacher_params, twins, train=True, rngs=key).hidden
    assert not np.allclose(first, second)


def test_compute_in_bfloat16_keeps_float32_parameters_and_stays_close(teacher_config, teacher_params, rows):
    rounded = apply(replace(teacher_config, dtype="bfloat16"), teacher_params, as_batch(rows))
    exact = apply(teacher_config, teacher_params, as_batch(rows))
    assert rounded.hidden.dtype == jnp.bfloat16 and rounded.head.kernel.dtype == jnp.float32
    np.testing.assert_allclose(np.float32(rounded.hidden), exact.hidden, atol=0.15)


def test_sinusoidal_positions_are_no_parameter_and_tell_positions_apart(teacher_config):
    config = replace(teacher_config, positions="sinusoidal", token_types=0)
    params = random_params(config, seed=5)
    assert set(params["embeddings"]) == {"word", "norm"}
    batch = as_batch(packed_rows(2, seed=1))
    shifted = batch.replace(position_ids=batch.position_ids + 1)
    assert not np.allclose(apply(config, params, batch).hidden, apply(config, params, shifted).hidden)


def test_token_types_are_read_and_refused_where_there_are_none(teacher_config, teacher_params, step_config, rows):
    typed = as_batch(rows, token_type_ids=jnp.ones_like(rows.input_ids))
    plain = apply(teacher_config, teacher_params, as_batch(rows)).hidden
    assert not np.allclose(plain, apply(teacher_config, teacher_params, typed).hidden)
    with pytest.raises(ValueError, match="no token types"):
        MaskedLm(step_config.student).apply({"params": random_params(step_config.student, 0)}, typed)


def test_without_a_head_there_is_none(teacher_config, teacher_params, rows):
    bare = {name: tree for name, tree in teacher_params.items() if name != "mlm"}
    output = apply(replace(teacher_config, mlm_head=False), bare, as_batch(rows))
    assert output.head is None and output.features is None


def test_layers_apart_compute_the_same(teacher_config, teacher_params, rows):
    stacked = apply(teacher_config, teacher_params, as_batch(rows))
    apart = apply(teacher_config, layers_apart(teacher_params), as_batch(rows))
    np.testing.assert_allclose(apart.hidden, stacked.hidden, atol=1e-6)
    np.testing.assert_allclose(apart.features, stacked.features, atol=1e-6)
