"""The losses against independent formulas, their limits, and what must not change them (SPEC section 1)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from distil_jax.config.objective import LossConfig
from distil_jax.objective.distillation import Distillation, at_targets, distill_loss, held_out_terms
from distil_jax.objective.losses import cosine_loss, kl_loss, mlm_loss, mse_loss
from distil_jax.structs import IGNORED, Batch, Encoded, Head, Mean

GENERATOR = np.random.default_rng(0)
STUDENT, TEACHER = (GENERATOR.normal(0, 3, (2, 5, 11)).astype(np.float32) for _ in range(2))
WHERE = np.array([[1, 1, 0, 1, 0], [1, 0, 0, 1, 1]], bool)
LABELS = np.where(WHERE, GENERATOR.integers(0, 11, WHERE.shape), IGNORED)


def softmax(x):
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 7.5])
def test_kl_is_the_formula(temperature):
    t, s = softmax(TEACHER / temperature), softmax(STUDENT / temperature)
    expected = temperature**2 * (t * np.log(t / s)).sum(-1)[WHERE]
    result = kl_loss(STUDENT, TEACHER, where=WHERE, temperature=temperature)
    np.testing.assert_allclose(result.total, expected.sum(), rtol=1e-5)
    assert result.count == WHERE.sum()


def test_the_others_are_their_formulas():
    np.testing.assert_allclose(
        mlm_loss(STUDENT, LABELS).value(), -np.log(softmax(STUDENT)[WHERE, LABELS[WHERE]]).mean(), rtol=1e-5
    )
    np.testing.assert_allclose(
        mse_loss(STUDENT, TEACHER, where=WHERE).value(), ((STUDENT - TEACHER) ** 2).sum(-1)[WHERE].mean(), rtol=1e-5
    )
    cosines = (STUDENT * TEACHER).sum(-1) / np.linalg.norm(STUDENT, axis=-1) / np.linalg.norm(TEACHER, axis=-1)
    np.testing.assert_allclose(
        cosine_loss(STUDENT, TEACHER, where=WHERE).value(), (1 - cosines[WHERE]).mean(), rtol=1e-5
    )


@pytest.mark.parametrize(
    "loss",
    [
        lambda s, t: kl_loss(s, t, where=WHERE, temperature=2.0).total,
        lambda s, t: mlm_loss(s, LABELS).total,
        lambda s, t: mse_loss(s, t, where=WHERE).total,
        lambda s, t: cosine_loss(s, t, where=WHERE).total,
    ],
    ids=["kl", "mlm", "mse", "cosine"],
)
def test_gradients_and_that_what_does_not_count_does_not_count(loss):
    check_grads(loss, (STUDENT, TEACHER), order=1, modes=["rev"], rtol=2e-2, atol=2e-2, eps=1e-2)
    both = jax.value_and_grad(loss, argnums=(0, 1))
    value, slopes = both(STUDENT, TEACHER)
    for anything in (1e4, np.nan, np.inf, -np.inf):
        elsewhere = (np.where(WHERE[..., None], logits, np.float32(anything)) for logits in (STUDENT, TEACHER))
        result, found_slopes = both(*elsewhere)
        assert result == value
        for slope, expected in zip(found_slopes, slopes, strict=True):
            np.testing.assert_array_equal(slope[~WHERE], 0)
            np.testing.assert_allclose(slope, expected, rtol=1e-6)


def test_equal_models_have_no_loss_and_opposite_ones_the_most():
    assert float(kl_loss(STUDENT, STUDENT, where=WHERE, temperature=2.0).value()) == pytest.approx(0, abs=1e-6)
    assert float(cosine_loss(STUDENT, STUDENT, where=WHERE).value()) == pytest.approx(0, abs=1e-6)
    assert float(cosine_loss(-STUDENT, STUDENT, where=WHERE).value()) == pytest.approx(2, abs=1e-6)


def test_high_temperature_is_matching_logits():
    """dL_ce / ds_i -> (s_i - t_i) / V for logits of mean zero (Hinton et al., 2015, equation 4)."""
    s, t = (x - x.mean(-1, keepdims=True) for x in (STUDENT, TEACHER))
    gradient = jax.grad(lambda s: kl_loss(s, t, where=WHERE, temperature=300.0).total)(s)
    np.testing.assert_allclose(gradient[WHERE], (s - t)[WHERE] / 11, atol=0.01)
    sizes = [
        np.abs(jax.grad(lambda s, T=T: kl_loss(s, t, where=WHERE, temperature=T).total)(s)).max()
        for T in (2.0, 20.0, 200.0)
    ]
    assert max(sizes) < 4 * min(sizes), "T^2 keeps the gradient's size"


def test_no_target_is_zero_and_not_nan():
    nowhere = np.zeros_like(WHERE)
    value, gradient = jax.value_and_grad(lambda s: mlm_loss(s, np.full_like(LABELS, IGNORED)).value())(STUDENT)
    assert value == 0 and not gradient.any()
    assert kl_loss(STUDENT, TEACHER, where=nowhere, temperature=2.0).value() == 0


def test_zero_vectors_have_finite_gradients():
    zeros = np.zeros_like(STUDENT)
    for s, t in ((zeros, TEACHER), (STUDENT, zeros), (zeros, zeros)):
        assert np.isfinite(jax.grad(lambda s, t=t: cosine_loss(s, t, where=WHERE).total)(s)).all()


def test_padded_vocabulary_leaves_no_trace():
    def pad(x):
        return np.concatenate([x, np.full((*x.shape[:-1], 5), -1e9, np.float32)], -1)

    for loss in (
        lambda s, t: kl_loss(s, t, where=WHERE, temperature=2.0),
        lambda s, t: mse_loss(s, t, where=WHERE),
        lambda s, t: mlm_loss(s, LABELS),
    ):
        np.testing.assert_allclose(loss(pad(STUDENT), pad(TEACHER)).total, loss(STUDENT, TEACHER).total, rtol=1e-6)
        gradient = jax.grad(lambda s, loss=loss: loss(s, pad(TEACHER)).total)(pad(STUDENT))
        assert np.isfinite(gradient).all() and not gradient[..., 11:].any()


def test_means_add_up():
    a, b = Mean(jnp.float32(6), jnp.float32(2)), Mean(jnp.float32(1), jnp.float32(5))
    assert float((a + b).value()) == 1.0


# The whole objective, on features and heads.

L, D, V = 12, 6, 17


def encoded(seed):
    generator = np.random.default_rng(seed)
    normal = lambda *shape: generator.normal(0, 1, shape).astype(np.float32)  # noqa: E731
    return Encoded(normal(3, L, D), normal(3, L, D), Head(normal(V, D), normal(V)))


def batch(targets_per_row=3, seed=0):
    generator = np.random.default_rng(seed)
    labels = np.full((3, L), IGNORED)
    for row, count in enumerate((targets_per_row, 1, 0)):
        labels[row, generator.permutation(L - 2)[:count]] = generator.integers(0, V, count)
    segments = np.ones((3, L), np.int32)
    segments[:, L - 2 :] = 0
    return Batch(labels, segments, labels, labels)


def test_the_sum_is_weighted_and_not_normalised():
    config = LossConfig(kl=5, mlm=2, cosine=1, mse=0.5)
    loss, terms = distill_loss(encoded(0), encoded(1), batch(), config=config)
    assert set(terms) == {"kl", "mlm", "cosine", "mse"}
    assert {name: float(term.count) for name, term in terms.items()} == {"kl": 30, "mlm": 4, "cosine": 30, "mse": 30}
    expected = sum(getattr(config, name) * term.value() for name, term in terms.items())
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


@pytest.mark.parametrize("soft_positions", ["all", "targets"])
@pytest.mark.parametrize("kl", [0.0, 5.0])
def test_computing_targets_only_changes_no_number(soft_positions, kl):
    config = LossConfig(kl=kl, cosine=0, soft_positions=soft_positions)

    def value(student, most):
        return distill_loss(student, encoded(1), batch(), config=config, targets_per_row=most)[0]

    result = [jax.value_and_grad(value)(encoded(0), most) for most in (None, 4)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *result)


def test_more_targets_than_promised_is_never_silent():
    config, many = LossConfig(kl=0, cosine=0), batch(targets_per_row=3)
    assert np.isnan(distill_loss(encoded(0), None, many, config=config, targets_per_row=2)[0])
    held_out = held_out_terms(encoded(0), encoded(1), many, config=config, targets_per_row=2)
    assert {name for name, term in held_out.items() if np.isnan(term.value())} == {"mlm", "accuracy", "kl", "agreement"}


def test_targets_are_gathered_whole():
    features, labels = at_targets(encoded(0).features, batch().labels, 5)
    assert features.shape == (3, 5, D) and labels.shape == (3, 5)
    for row in range(3):
        positions = np.flatnonzero(batch().labels[row] != IGNORED)
        assert sorted(labels[row][labels[row] != IGNORED]) == sorted(batch().labels[row, positions])


@pytest.mark.parametrize("chunk", [0, 3, 512])  # all at once, a position of each row at a time, all in one chunk
def test_held_out_numbers_against_plain_numpy(chunk):
    student, teacher, held = encoded(0), encoded(1), batch()
    result = held_out_terms(student, teacher, held, config=LossConfig(chunk=chunk), targets_per_row=5)
    where = held.labels != IGNORED
    s, t = (e.features[where] @ e.head.kernel.T + e.head.bias for e in (student, teacher))
    p, q, gold = softmax(t), softmax(s), held.labels[where]
    np.testing.assert_allclose(result["mlm"].value(), -np.log(q[np.arange(4), gold]).mean(), rtol=1e-5)
    np.testing.assert_allclose(result["accuracy"].value(), (s.argmax(-1) == gold).mean(), rtol=1e-6)
    np.testing.assert_allclose(result["kl"].value(), (p * np.log(p / q)).sum(-1).mean(), rtol=1e-5)
    np.testing.assert_allclose(result["agreement"].value(), (s.argmax(-1) == t.argmax(-1)).mean(), rtol=1e-6)


def test_a_missing_teacher_or_head_is_said():
    with pytest.raises(ValueError, match="there is none"):
        distill_loss(encoded(0), None, batch(), config=LossConfig())
    bare = encoded(1).replace(features=None, head=None)
    with pytest.raises(ValueError, match="no soft targets"):
        distill_loss(encoded(0), bare, batch(), config=LossConfig())
    with pytest.raises(ValueError, match="student has no MLM head"):
        distill_loss(bare, encoded(1), batch(), config=LossConfig())


def test_counts_are_those_of_the_terms():
    for config in (LossConfig(mse=1.0), LossConfig(soft_positions="targets", mse=1.0)):
        _, terms = distill_loss(encoded(0), encoded(1), batch(), config=config)
        counts = Distillation(config).counts(batch())
        assert {name: float(term.count) for name, term in terms.items()} == {n: float(c) for n, c in counts.items()}
