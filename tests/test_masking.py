"""Masking: the shares of the recipe, and draws that depend on the row alone."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LENGTH, MASK, VOCAB, packed_rows

from distil_jax.config.objective import MaskingConfig
from distil_jax.objective.masking import mask_tokens, masking_weights, most_targets
from distil_jax.structs import IGNORED, Rows

CONFIG = MaskingConfig(mask_token_id=MASK)
mask = jax.jit(mask_tokens, static_argnames="config")


def long_rows(count, length=128, seed=0):
    ids = np.random.default_rng(seed).integers(5, VOCAB, (count, length)).astype(np.int32)
    ids[:, 0], ids[:, -1] = 2, 3
    return Rows(ids, np.ones_like(ids), np.tile(np.arange(length, dtype=np.int32), (count, 1)), np.arange(count))


def test_each_row_gets_its_share_and_labels_are_the_originals(rows, weights):
    batch = mask(jax.random.key(0), rows, weights=weights, config=CONFIG)
    targets = batch.labels != IGNORED
    real = (rows.segment_ids > 0).sum(axis=1)
    np.testing.assert_array_equal(targets.sum(axis=1), np.maximum(1, np.round(0.15 * real)))
    np.testing.assert_array_equal(batch.labels[targets], rows.input_ids[targets])
    np.testing.assert_array_equal(batch.input_ids[~targets], rows.input_ids[~targets])
    assert not (np.asarray(targets) & (rows.segment_ids == 0)).any()
    assert (rows.input_ids[targets] >= 5).all(), "special tokens are never targets"
    assert targets.sum(axis=1).max() <= most_targets(LENGTH, CONFIG.rate)


def test_eighty_ten_ten(weights):
    rows = long_rows(400)
    batch = mask(jax.random.key(1), rows, weights=weights, config=CONFIG)
    targets = np.asarray(batch.labels != IGNORED)
    now, before = np.asarray(batch.input_ids)[targets], rows.input_ids[targets]
    count = targets.sum()
    assert (now == MASK).mean() == pytest.approx(0.8, abs=4 * np.sqrt(0.16 / count))
    replaced = now[(now != MASK) & (now != before)]
    # A random word may be the original one by chance.
    assert len(replaced) / count == pytest.approx(0.1 * (1 - 1 / (VOCAB - 5)), abs=4 * np.sqrt(0.09 / count))
    assert replaced.min() >= 5 and replaced.max() < VOCAB, "replacements are real words"
    assert len(np.unique(replaced)) > 0.9 * (VOCAB - 5), "all of them"


def test_targets_follow_the_weights():
    """One target a row: then the chance of a token is its weight over the row's sum, exactly."""
    length, count = 8, 20_000
    ids = np.tile(np.arange(5, 5 + length, dtype=np.int32), (count, 1))
    rows = Rows(ids, np.ones_like(ids), np.zeros_like(ids), np.arange(count))
    weights_V = np.zeros(128, np.float32)
    weights_V[5 : 5 + length] = np.arange(1, length + 1)
    batch = mask(jax.random.key(2), rows, weights=weights_V, config=MaskingConfig(mask_token_id=MASK, rate=1 / length))
    chosen = np.bincount(np.asarray(batch.labels)[np.asarray(batch.labels) != IGNORED], minlength=128)[5 : 5 + length]
    expected = count * np.arange(1, length + 1) / np.arange(1, length + 1).sum()
    assert (((chosen - expected) ** 2 / expected).sum()) < 25, "chi-squared, 7 degrees of freedom, p < 0.001"


def test_a_row_is_masked_alike_wherever_it_stands(rows, weights):
    whole = mask(jax.random.key(3), rows, weights=weights, config=CONFIG)
    order = np.random.default_rng(0).permutation(16)[:5]
    part = mask(jax.random.key(3), jax.tree.map(lambda leaf: leaf[order], rows), weights=weights, config=CONFIG)
    np.testing.assert_array_equal(part.input_ids, whole.input_ids[order])
    np.testing.assert_array_equal(part.labels, whole.labels[order])
    other = mask(jax.random.key(4), rows, weights=weights, config=CONFIG)
    assert (np.asarray(other.labels) != np.asarray(whole.labels)).any()


@pytest.mark.parametrize("rate", [0.15, 0.35])
def test_64_bit_types_change_no_mask(weights, rate):
    """Rows of every length: which share of them is half a target too many depends on how it is rounded."""
    lengths = np.arange(1, 85)[:, None]
    ids = np.random.default_rng(0).integers(5, VOCAB, (84, 84), np.int32)
    segments = (np.arange(84) < lengths).astype(np.int32)
    rows, config = Rows(ids, segments, ids, np.arange(84, dtype=np.int32)), replace(CONFIG, rate=rate)
    expected = mask(jax.random.key(3), rows, weights=weights, config=config)
    with jax.enable_x64(True):
        result = mask(jax.random.key(3), rows, weights=weights.astype(np.float64), config=config)
    assert result.input_ids.dtype == result.labels.dtype == jnp.int32
    jax.tree.map(np.testing.assert_array_equal, result, expected)


def test_rows_without_words_have_no_target(weights):
    rows = jax.tree.map(np.copy, packed_rows(3, seed=0))
    rows.segment_ids[1] = 0
    rows.input_ids[2][rows.segment_ids[2] > 0] = 2
    batch = mask(jax.random.key(0), rows, weights=weights, config=CONFIG)
    np.testing.assert_array_equal((batch.labels[1:] == IGNORED), True)
    np.testing.assert_array_equal(batch.input_ids[1:], rows.input_ids[1:])


def test_weights_are_smoothed_counts():
    weights_V = masking_weights(np.array([100, 0, 1, 32]), [0], smoothing=0.7)
    np.testing.assert_allclose(weights_V, [0, 1, 1, 32**-0.7], rtol=1e-6)
    np.testing.assert_array_equal(masking_weights(np.array([9, 4, 0]), [], smoothing=0.0), 1)


def test_ids_above_16_bits_survive():
    ids = np.full((2, 16), 119_546, np.int32)
    rows = Rows(ids, np.ones_like(ids), np.zeros_like(ids), np.arange(2))
    weights_V = jnp.zeros(119_552).at[119_546].set(1.0)
    batch = mask(jax.random.key(0), rows, weights=weights_V, config=CONFIG)
    assert set(np.unique(batch.labels)) == {IGNORED, 119_546}
