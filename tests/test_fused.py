"""The fused path against the plain one and a float64 oracle: value, every gradient, any chunk, and no whole logits."""

import os
import re
import subprocess
import sys
from functools import partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distil_jax.machines.aot import ENVIRONMENT
from distil_jax.objective.fused import fused_loss
from distil_jax.objective.vocabulary import dense_loss
from distil_jax.structs import IGNORED, Head

B, L, D, E, V = 3, 13, 8, 6, 40
TERMS = {"kl": 5.0, "mlm": 2.0, "mse": 0.5}
CHOICES = [("kl", "mlm"), ("kl",), ("mlm",), ("mse",), ("kl", "mlm", "mse")]


def problem(dtype=np.float32, seed=0):
    random = np.random.default_rng(seed)

    def head(width):
        bias = random.normal(0, 1, V)
        bias[-3:] = -1e9  # ids that pad the vocabulary
        return Head(kernel=random.normal(0, 1, (V, width)).astype(np.float32), bias=bias.astype(np.float32))

    where = random.random((B, L)) < 0.7
    where[1] = False  # a row of padding
    labels = np.where(where & (random.random((B, L)) < 0.3), random.integers(0, V - 3, (B, L)), IGNORED)
    features, teacher_features = (jnp.asarray(random.normal(0, 1, (B, L, n)), dtype) for n in (D, E))
    return features, head(D), teacher_features, head(E), where, labels


def compare(loss, names, arguments, outer=1.0):
    scales = {name: jnp.float32(TERMS[name] / 7) for name in names}
    features, head, *others = arguments

    def value(features, head):
        total, terms = loss(features, head, *others, scales)
        return outer * total, terms

    return jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))(features, head)


def same(result, expected, rtol=1e-5, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), result, expected)


@pytest.mark.parametrize("names", CHOICES, ids="+".join)
@pytest.mark.parametrize("chunk", [1, 12, 15, 39, 192])
def test_fused_equals_dense_in_value_and_every_gradient(names, chunk):
    dense = compare(partial(dense_loss, temperature=2.0), names, problem())
    same(compare(partial(fused_loss, temperature=2.0, chunk=chunk), names, problem()), dense)


@pytest.mark.parametrize("temperature", [1.0, 3.7, 20.0])
def test_at_any_temperature(temperature):
    dense = compare(partial(dense_loss, temperature=temperature), ("kl", "mlm"), problem())
    same(compare(partial(fused_loss, temperature=temperature, chunk=5 * B), ("kl", "mlm"), problem()), dense)


def test_gradients_scale_with_the_outer_cotangent():
    loss = partial(fused_loss, temperature=2.0, chunk=4 * B)
    _, once = compare(loss, ("kl", "mlm"), problem())
    _, thrice = compare(loss, ("kl", "mlm"), problem(), outer=-3.0)
    same(thrice, jax.tree.map(lambda leaf: -3 * leaf, once))


def test_in_bfloat16_within_its_rounding_of_a_float64_oracle():
    features, head, teacher_features, teacher_head, where, labels = problem(jnp.bfloat16)
    (value, totals), (slope, head_slope) = compare(
        partial(fused_loss, temperature=2.0, chunk=4 * B), ("kl", "mlm"), problem(jnp.bfloat16)
    )
    assert slope.dtype == jnp.bfloat16 and head_slope.kernel.dtype == jnp.float32
    x, y = (np.asarray(each, np.float64) for each in (features, teacher_features))
    s, t = (
        f @ np.asarray(jnp.asarray(h.kernel, jnp.bfloat16), np.float64).T + h.bias
        for f, h in ((x, head), (y, teacher_head))
    )

    def softmax(logits):
        e = np.exp(logits - logits.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    p, q, r, target = softmax(t / 2), softmax(s / 2), softmax(s), labels != IGNORED
    with np.errstate(divide="ignore", invalid="ignore"):
        kl = 4 * np.nansum(np.where(p > 0, p * np.log(p / q), 0), -1)[where].sum()
    mlm = -np.log(r[target, labels[target]]).sum()
    hot = np.eye(V)[np.where(target, labels, 0)]
    slope_V = (5 * 2 * where[..., None] * (q - p) + 2 * target[..., None] * (r - hot)) / 7
    kernel = np.asarray(jnp.asarray(head.kernel, jnp.bfloat16), np.float64)
    same((totals["kl"], totals["mlm"], value), (kl, mlm, (5 * kl + 2 * mlm) / 7), rtol=2e-5)
    half = 2.0**-8  # of bfloat16: slopes and features are rounded once each, sums are float32
    same(head_slope.bias, slope_V.sum((0, 1)), atol=1e-5)
    same(head_slope.kernel, np.einsum("blv,bld->vd", slope_V, x), rtol=2 * half, atol=4 * half)
    same(np.asarray(slope, np.float64), slope_V @ kernel, rtol=2 * half, atol=4 * half)


@pytest.mark.parametrize("names", [("kl", "mlm"), ("mlm",), ("mse", "mlm")], ids="+".join)
def test_what_no_term_counts_may_be_anything(names):
    """NaN and infinities in the features of both models: every gradient is that of the same batch without them."""
    features, head, teacher_features, teacher_head, where, labels = problem()
    soft = where if set(names) & {"kl", "mse"} else np.zeros_like(where)
    counted = (soft | (labels != IGNORED))[..., None]
    hostile = np.where(np.arange(L)[:, None] % 2, np.nan, np.inf)
    changed = (jnp.where(counted, features, hostile), head, jnp.where(soft[..., None], teacher_features, hostile))
    for loss in (dense_loss, partial(fused_loss, chunk=4 * B)):
        loss = partial(loss, temperature=2.0)
        same(compare(loss, names, (*changed, teacher_head, where, labels)), compare(loss, names, problem()))


def test_logits_are_never_whole_and_nothing_is_computed_again():
    """No array of the lowered text has [B, L, V] elements, and a chunk has four vocabulary products, none twice."""
    loss = partial(fused_loss, temperature=2.0, chunk=4 * B)
    features, head, *others = problem()
    scales = {name: jnp.float32(1) for name in ("kl", "mlm")}
    text = (
        jax.jit(jax.grad(lambda f, h: loss(f, h, *others, scales)[0], argnums=(0, 1)))
        .lower(features, head)
        .as_text(debug_info=False)
    )
    sizes = [np.prod([int(n) for n in shape.split("x")]) for shape in re.findall(r"tensor<((?:\d+x)*\d+)x[a-z]", text)]
    assert B * 4 * V in sizes and max(sizes) < B * L * V
    assert text.count("stablehlo.dot_general") == 4


def test_no_target_gives_zero():
    features, head, teacher_features, teacher_head, where, labels = problem()
    nothing = (features, head, teacher_features, teacher_head, where, np.full_like(labels, IGNORED))
    (value, totals), slopes = compare(partial(fused_loss, temperature=2.0, chunk=4 * B), ("mlm",), nothing)
    assert value == 0 and totals["mlm"] == 0 and all(not leaf.any() for leaf in jax.tree.leaves(slopes))


COMPILE = """
import json, sys
import jax
from functools import partial
from jax.experimental import topologies
from distil_jax.commands.bench.loss import Job, gradients, inputs

device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
place = jax.sharding.SingleDeviceSharding(device)
vocabulary, chunk = map(int, sys.argv[1:])
job = Job(vocabulary, 16, 512, 768, chunk, "bfloat16")
given = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), jax.eval_shape(partial(inputs, job))
)
print(jax.jit(gradients(job, "fused")).lower(*given).compile().memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu, which compiles for TPUs, is not installed")
@pytest.mark.parametrize(("vocabulary", "chunk", "mebibytes"), [(30_592, 512, 150), (119_552, 256, 600)])
def test_what_a_tpu_needs_for_8192_tokens(vocabulary, chunk, mebibytes):
    """Loss and gradients at the width of BERT-base; dense logits take 3,347 and 13,077 MiB (measured 2026-11-23)."""
    command = [sys.executable, "-c", COMPILE, str(vocabulary), str(chunk)]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.splitlines()[-1]) <= mebibytes * 2**20
