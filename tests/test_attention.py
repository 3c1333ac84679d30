"""The kernels compute what XLA's attention does, on every mesh, and their compilers take them without the chips.

Kernels run in Pallas's interpreter here, which computes the same arrays on a CPU.
"""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_params_close
from jax.experimental import pallas as pl
from jax.sharding import AbstractDevice, AbstractMesh

from distil_jax.config.model import ModelConfig
from distil_jax.config.objective import LossConfig
from distil_jax.config.run import MeshConfig
from distil_jax.config.step import OptimizerConfig, StepConfig
from distil_jax.machines.aot import ENVIRONMENT
from distil_jax.models import gpu_attention, tpu_attention
from distil_jax.models.attention import attend
from distil_jax.models.dropout import kept
from distil_jax.models.encoder import abstract_params, init_params
from distil_jax.structs import IGNORED, Batch
from distil_jax.training.sharding import jit_step, make_mesh, put_rows, shardings_of
from distil_jax.training.state import abstract_state, init_state
from distil_jax.training.step import train_step

KERNELS = {"pallas_gpu": gpu_attention, "pallas_tpu": tpu_attention}
both = pytest.mark.parametrize("implementation", KERNELS)


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(pl, "pallas_call", partial(pl.pallas_call, interpret=True))


def segments(length):
    """[4, L]: packed with padding, one sequence that fills the row, ids in no order, and padding amid the row."""
    generator = np.random.default_rng(length)
    packed = np.sort(generator.integers(1, 6, length))
    packed[-length // 5 :] = 0
    amid = np.sort(generator.integers(1, 4, length))
    amid[length // 3 : length // 2] = 0
    return np.stack([packed, np.ones(length), generator.integers(-3, 4, length), amid]).astype(np.int32)


def inputs(length, heads, size, dtype=np.float32):
    """Query, key, value and the output's slope [4, L, H, K], segment ids, seeds."""
    generator = np.random.default_rng(size)
    wide = [generator.normal(size=(4, length, heads, size)).astype(dtype) for _ in range(4)]
    return *wide, segments(length), generator.integers(0, 2**32, 4, dtype=np.uint32)


def output_and_gradients(implementation, rate, query, key, value, slope, segment_ids, seeds):
    def compute(*wide):
        def output(*three):
            return attend(*three, segment_ids, dropout_rate=rate, seeds=seeds, implementation=implementation)

        result, pull = jax.vjp(output, *wide)
        return result, *pull(jnp.asarray(slope))

    return [np.asarray(each) for each in jax.jit(compute)(query, key, value)]


def exact(rate, query, key, value, slope, segment_ids, seeds):
    """The same in NumPy and float64."""
    query, key, value, slope = (each.astype(np.float64) for each in (query, key, value, slope))
    _, length, heads, size = query.shape
    index = jnp.arange(heads * length * length, dtype=jnp.uint32).reshape(heads, length, length)
    stay = np.asarray(kept(seeds[:, None, None, None], index, rate)) / (1 - rate)
    scores = np.einsum("BLHK,BMHK->BHLM", query, key) * size**-0.5
    scores = np.where(segment_ids[:, None, :, None] == segment_ids[:, None, None, :], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    weight_slopes = np.einsum("BLHK,BMHK->BHLM", slope, value) * stay
    score_slopes = weights * (weight_slopes - (weights * weight_slopes).sum(-1, keepdims=True)) * size**-0.5
    return (
        np.einsum("BHLM,BMHK->BLHK", weights * stay, value),
        np.einsum("BHLM,BMHK->BLHK", score_slopes, key),
        np.einsum("BHLM,BLHK->BMHK", score_slopes, query),
        np.einsum("BHLM,BLHK->BMHK", weights * stay, slope),
    )


@pytest.mark.parametrize(
    ("heads", "size", "length", "rate"), [(2, 64, 384, 0.0), (4, 32, 256, 0.1), (2, 64, 128, 0.5), (1, 128, 256, 0.1)]
)
@both
def test_value_and_gradients_are_those_of_xla(interpreted, implementation, heads, size, length, rate):
    arrays = inputs(length, heads, size)
    result, expected = (output_and_gradients(each, rate, *arrays) for each in (implementation, "xla"))
    for ours, theirs in zip(result, expected, strict=True):
        for row in range(4):
            np.testing.assert_allclose(ours[row], theirs[row], rtol=0, atol=1e-5 * np.abs(theirs[row]).max())


@both
def test_64_bit_types_change_nothing(interpreted, implementation):
    arrays = inputs(128, 2, 64)
    expected = output_and_gradients(implementation, 0.3, *arrays)
    with jax.enable_x64(True):
        result = output_and_gradients(implementation, 0.3, *arrays)
    assert [each.dtype for each in result] == [each.dtype for each in expected]
    for ours, theirs in zip(result, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())


@both
def test_bfloat16_is_nearer_to_the_truth_than_xla(interpreted, implementation):
    arrays = inputs(256, 2, 64, jnp.bfloat16)
    truth = exact(0.1, *arrays)

    def errors(name):
        result = output_and_gradients(name, 0.1, *arrays)
        assert all(each.dtype == jnp.bfloat16 for each in result)
        return np.array([np.sqrt(np.mean((ours - right) ** 2)) for ours, right in zip(result, truth, strict=True)])

    ours, theirs = errors(implementation), errors("xla")
    assert np.all(ours < 0.75 * theirs), f"{ours}, and XLA {theirs}: it rounds scores, which kernels do not"
    assert np.all(theirs < 0.01), "XLA itself is near"


@both
def test_a_device_that_has_some_heads_drops_what_one_with_all_would(interpreted, implementation):
    *wide, slope, segment_ids, seeds = inputs(128, 8, 64)

    @jax.jit
    def compute(wide, slope, heads):
        kernel = KERNELS[implementation]
        output, saved = kernel.forward(*wide, segment_ids, seeds, heads, rate=0.5)
        return output, *kernel.backward(*wide, segment_ids, seeds, heads, output, saved, slope, rate=0.5)

    whole = compute(wide, slope, jnp.arange(8))
    mine = slice(4, 8)
    part = compute([each[:, :, mine] for each in wide], slope[:, :, mine], jnp.arange(8)[mine])
    for some, every in zip(part, whole, strict=True):
        np.testing.assert_allclose(some, every[:, :, mine], atol=1e-5)


def test_blocks_of_other_segments_are_not_even_read(interpreted):
    *wide, _, _, seeds = inputs(256, 1, 64)
    segment_ids = np.repeat([[1, 1, 2, 0]], 64, axis=1).astype(np.int32)
    others = (segment_ids == 1)[:, :, None, None]
    wide = [np.where(others, np.nan, each[:1]) for each in wide]
    result = output_and_gradients("pallas_gpu", 0.1, *wide, np.ones_like(wide[0]), segment_ids, seeds[:1])
    assert all(np.isfinite(each).all(where=~others) for each in result), "0 x NaN would be NaN"


@pytest.mark.parametrize(
    ("kernel", "rows", "reason"),
    [
        (gpu_attention, (12, 64, 512), None),
        (gpu_attention, (1, 16, 2048), None),
        (gpu_attention, (12, 64, 96), "rows of 96, and it takes multiples of 64"),
        (gpu_attention, (16, 48, 512), "16 heads of 48, and it takes powers of two from 16 to 128"),
        (gpu_attention, (3, 256, 512), "3 heads of 256, and it takes powers of two from 16 to 128"),
        (tpu_attention, (12, 64, 512), None),
        (tpu_attention, (4, 32, 1024), None),
        (tpu_attention, (12, 64, 192), "rows of 192, and it takes multiples of 128 up to 1024"),
        (tpu_attention, (12, 64, 2048), "rows of 2048, and it takes multiples of 128 up to 1024"),
        (tpu_attention, (3, 64, 512), "3 heads of 64, which do not fill 128 lanes evenly"),
        (tpu_attention, (16, 48, 512), "16 heads of 48, which do not fill 128 lanes evenly"),
    ],
)
def test_what_a_kernel_cannot_compute_is_said(kernel, rows, reason):
    assert kernel.obstacle(*rows) == reason


@both
def test_rows_that_a_kernel_does_not_take_are_computed_by_xla(implementation):
    """The batches of a task are cut to their longest text; not interpreted, a kernel could not run here at all."""
    arrays = inputs(16, 2, 64)
    result, expected = (output_and_gradients(each, 0.1, *arrays) for each in (implementation, "xla"))
    for ours, theirs in zip(result, expected, strict=True):
        assert np.array_equal(ours, theirs)


MODEL = ModelConfig(
    vocab_size=90,
    num_layers=2,
    hidden_size=256,
    num_heads=4,
    intermediate_size=64,
    max_positions=128,
    initializer_range=0.1,
    unroll=False,
)
STEP = StepConfig(
    student=replace(MODEL, num_layers=1, token_types=0),
    teacher=MODEL,
    loss=LossConfig(mlm=0.0, cosine=0.0),
    optimizer=OptimizerConfig(steps=5, learning_rate=1e-3, warmup=0.0),
)


@pytest.fixture(scope="module")
def step_inputs():
    """A state before its first step, the teacher's parameters, and a batch."""
    ids, row_index = np.random.default_rng(0).integers(5, 90, (8, 128), np.int32), np.arange(8, dtype=np.int32)
    segment_ids = np.tile(segments(128)[[0, 3]], (4, 1))
    batch = Batch(ids, segment_ids, np.zeros_like(ids), np.full_like(ids, IGNORED), row_index=row_index)
    make = jax.jit(lambda key: (init_state(key, STEP), nn.unbox(init_params(key, MODEL)), batch))
    return jax.device_get(make(jax.random.key(0)))


def one_step(config, sizes, start, teacher, batch):
    """Loss and new parameters of one step on a mesh."""
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])
    shapes = abstract_state(config), abstract_params(config.teacher)
    state, teacher = jax.device_put((replace(start, config=config), teacher), shardings_of(shapes, mesh))
    state, metrics = jit_step(train_step, mesh, *shapes)(state, teacher, put_rows(batch, mesh))
    return float(metrics["loss"].value()), jax.device_get(state.params)


@pytest.fixture(scope="module")
def alone(step_inputs):
    return one_step(STEP, (1, 1, 1), *step_inputs)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (4, 2, 1), (2, 2, 2)])
@both
def test_a_step_on_any_mesh_is_that_of_xla(interpreted, implementation, sizes, step_inputs, alone):
    models = {name: replace(getattr(STEP, name), attention=implementation) for name in ("student", "teacher")}
    loss, params = one_step(replace(STEP, **models), sizes, *step_inputs)
    np.testing.assert_allclose(loss, alone[0], rtol=1e-5)
    assert_params_close(params, alone[1])


def abstract_inputs(length, heads, size, dtype):
    shape = jax.ShapeDtypeStruct
    wide = shape((2, length, heads, size), dtype)
    return wide, wide, wide, wide, shape((2, length), jnp.int32), shape((2,), jnp.uint32)


@pytest.mark.parametrize(
    ("size", "length", "rate", "dtype", "x64"),
    [
        (64, 512, 0.1, "bfloat16", False),
        (32, 192, 0.0, "bfloat16", False),
        (128, 384, 0.1, "bfloat16", True),
        (64, 128, 0.1, "float32", False),
    ],
)
def test_triton_takes_the_gpu_kernels_without_a_gpu(size, length, rate, dtype, x64):
    """As far as a machine without CUDA goes: the kernels are lowered to Triton's language, which is verified."""
    from jaxlib.mlir import ir
    from jaxlib.triton import dialect

    def compute(query, key, value, slope, segment_ids, seeds):
        given = (query, key, value, segment_ids, seeds, jnp.arange(12, dtype=jnp.int32))
        output, saved = gpu_attention.forward(*given, rate=rate)
        return output, gpu_attention.backward(*given, output, saved, slope, rate=rate)

    with (
        warnings.catch_warnings(),
        jax.enable_x64(x64),
        jax.sharding.use_abstract_mesh(
            AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100", None, "gpu"))
        ),
    ):
        warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)  # of JAX 0.12
        traced = jax.jit(compute).trace(*abstract_inputs(length, 12, size, dtype))
        lowered = traced.lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
    kernels = {}

    def note(operation):
        if operation.name == "stablehlo.custom_call":
            config = ir.DictAttr(operation.attributes["mhlo.backend_config"])
            kernels[ir.StringAttr(config["name"]).value] = ir.StringAttr(config["ir"]).value_bytes
        return ir.WalkResult.ADVANCE

    lowered.operation.walk(note)
    assert kernels.keys() == {"_forward_kernel", "_query_kernel", "_key_kernel"}
    dialect.register_dialect(lowered.context)
    with lowered.context:
        for name, code in kernels.items():
            module = ir.Module.parse(code)
            assert module.operation.verify()
            products = {"_forward_kernel": 2, "_query_kernel": 3, "_key_kernel": 4}[name]
            assert str(module).count("tt.dot ") == products and str(module).count("scf.for ") == 1


COMPILE = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from distil_jax.models import tpu_attention

device = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices[0]
sharding = jax.sharding.SingleDeviceSharding(device)

def compute(query, key, value, slope, segment_ids, seeds):
    given = (query, key, value, segment_ids, seeds, jnp.arange(12, dtype=jnp.int32))
    output, saved = tpu_attention.forward(*given, rate=0.1)
    return output, tpu_attention.backward(*given, output, saved, slope, rate=0.1)

for length in (128, 512):
    shapes = [((2, length, 12, 64), "bfloat16")] * 4 + [((2, length), "int32"), ((2,), "uint32")]
    given = [jax.ShapeDtypeStruct(*each, sharding=sharding) for each in shapes]
    compiled = jax.jit(compute).lower(*given).compile()
    scores = 2 * 12 * length**2 * 2
    kernels = compiled.as_text().count('custom_call_target="tpu_custom_call"')
    print(json.dumps([length, kernels, compiled.memory_analysis().temp_size_in_bytes, scores]))
"""


@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu, which compiles for TPUs, is not installed")
@pytest.mark.parametrize(("topology", "x64"), [("v5e:2x2", "0"), ("v6e:2x2", "1")])
def test_libtpu_compiles_the_tpu_kernels_without_a_tpu(topology, x64):
    environment = os.environ | ENVIRONMENT | {"JAX_ENABLE_X64": x64}
    command = [sys.executable, "-c", COMPILE, topology]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for length, kernels, temporaries, scores in map(json.loads, done.stdout.splitlines()):
        assert kernels == 2, f"one forward and one backward at a length of {length}"
        assert length < 512 or temporaries < scores / 2, "no scores in the chip's memory"
