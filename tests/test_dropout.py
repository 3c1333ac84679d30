"""Masks that a hash makes are as good as drawn ones, and nothing but their seed decides them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distil_jax.models.dropout import dropout, kept, row_seeds

ROWS, SIZE = 32, 1 << 16
SEEDS = row_seeds(jax.random.key(3), jnp.arange(ROWS), 2)


def normed(mask, rate):
    """Zero mean and unit variance, if the mask is what it should be."""
    return (np.asarray(mask, np.float32) - (1 - rate)) / np.sqrt(rate * (1 - rate))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_share_is_right_in_all_and_in_every_row(rate):
    values = normed(dropout(jnp.ones((ROWS, SIZE)), SEEDS[:, 0], rate) > 0, rate)
    assert abs(values.mean()) * np.sqrt(values.size) < 4
    assert 0.6 < values.mean(axis=1).std() * np.sqrt(SIZE) < 1.5, "rows vary as much as draws would, no less"
    assert 0.95 < values.reshape(ROWS, -1, 256).mean(axis=-1).std() * 16 < 1.05, "and so do their parts"


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("distance", [1, 2, 3, 4, 8, 16, 64, 128, 512, 768, 4096])
def test_neighbours_are_independent(rate, distance):
    values = normed(dropout(jnp.ones((ROWS, SIZE)), SEEDS[:, 0], rate) > 0, rate)
    products = values[:, distance:] * values[:, :-distance]
    assert abs(products.mean()) * np.sqrt(products.size) < 4.5


def test_rows_and_places_are_independent():
    first, second = (normed(dropout(jnp.ones((ROWS, SIZE)), SEEDS[:, site], 0.1) > 0, 0.1) for site in (0, 1))
    assert abs((first * second).mean()) * np.sqrt(first.size) < 4
    between = first @ first.T / SIZE - np.eye(ROWS)
    assert np.abs(between - np.diag(np.diag(between))).max() * np.sqrt(SIZE) < 4.5


def test_what_stays_is_scaled_and_the_gradient_has_the_same_mask():
    values = jax.random.normal(jax.random.key(1), (ROWS, 8, 16))
    dropped, pull = jax.vjp(lambda v: dropout(v, SEEDS[:, 0], 0.25), values)
    mask = np.asarray(dropped) != 0
    np.testing.assert_allclose(dropped, np.where(mask, values / 0.75, 0), rtol=1e-6)
    np.testing.assert_allclose(pull(jnp.ones_like(values))[0], np.where(mask, 1 / 0.75, 0), rtol=1e-6)


def test_no_mask_is_kept_between_forward_and_backward():
    _, pull = jax.vjp(lambda v: dropout(v, SEEDS[:, 0], 0.25), jnp.ones((ROWS, SIZE)))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(pull)) == SEEDS[:, 0].nbytes


def test_without_seeds_or_with_rate_zero_nothing_happens():
    values = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(dropout(values, None, 0.5), values)
    np.testing.assert_array_equal(dropout(values, SEEDS[:2, 0], 0.0), values)


def test_64_bit_types_change_no_mask():
    seeds = row_seeds(jax.random.key(3), np.arange(ROWS), 2)
    with jax.enable_x64(True):
        result = row_seeds(jax.random.key(3), jnp.arange(ROWS), 2)
        dropped = dropout(jnp.ones((ROWS, 64), jnp.float32), result[:, 0], 0.1)
    assert result.dtype == jnp.uint32 and dropped.dtype == jnp.float32
    np.testing.assert_array_equal(result, seeds)
    np.testing.assert_array_equal(dropped, dropout(jnp.ones((ROWS, 64)), seeds[:, 0], 0.1))


def test_an_elements_fate_depends_on_its_index_alone():
    whole = kept(SEEDS[0, 0], jnp.arange(64, dtype=jnp.uint32), 0.3)
    np.testing.assert_array_equal(kept(SEEDS[0, 0], jnp.arange(32, 64, dtype=jnp.uint32), 0.3), whole[32:])
