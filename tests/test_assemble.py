"""What a configuration becomes on a mesh, before anything is compiled."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from distil_jax.commands import attention
from distil_jax.commands.assemble import micro_batches, resolve_compute, teacher_compute, teacher_shapes
from distil_jax.commands.attention import settle_attention
from distil_jax.config import ComputeConfig, LossConfig, MeshConfig, ModelConfig, StepConfig, TeacherConfig, TrainConfig
from distil_jax.models import tpu_attention
from distil_jax.schema import InputError
from distil_jax.training.sharding import check_mesh, make_mesh, shardings_of


@pytest.mark.parametrize(
    ("mesh", "settings", "expected"),
    [
        ((8, 1, 1), {"batch_rows": 1024}, 8),  # 128 rows of 512 a device, 16 at a time
        ((4, 2, 1), {"batch_rows": 1024}, 8),  # fsdp cuts the batch too
        ((2, 1, 4), {"batch_rows": 1024}, 32),  # tensor does not
        ((8, 1, 1), {"batch_rows": 1024, "tokens_per_device": 100}, 128),  # never less than a row
        ((8, 1, 1), {"batch_rows": 24}, 1),
        ((8, 1, 1), {"batch_rows": 8 * 34, "tokens_per_device": 512 * 16}, 17),  # pieces are equal: 2 rows, not 16
        ((8, 1, 1), {"batch_rows": 1024, "accumulation": 2}, 2),
    ],
)
def test_micro_batches_keep_to_the_tokens_of_a_device(mesh, settings, expected):
    assert micro_batches(TrainConfig(steps=1, **settings), make_mesh(MeshConfig(*mesh)), 512) == expected


@pytest.mark.parametrize("settings", [{"batch_rows": 20}, {"batch_rows": 16, "accumulation": 3}])
def test_batches_that_do_not_divide_are_refused(settings):
    with pytest.raises(InputError, match=f"batch_rows {settings['batch_rows']} does not divide"):
        micro_batches(TrainConfig(steps=1, **settings), make_mesh(MeshConfig()), 512)


@pytest.mark.parametrize(
    ("sizes", "change", "message"),
    [
        ((1, 1, 8), {}, "num_heads 4 does not divide by mesh.tensor = 8"),
        ((1, 8, 1), {"hidden_size": 36}, "hidden_size 36 does not divide by mesh.fsdp = 8"),
        ((1, 1, 4), {"intermediate_size": 50}, "intermediate_size 50 does not divide by mesh.tensor = 4"),
        ((1, 3, 1), {"hidden_size": 36}, "128 does not divide by mesh.fsdp x mesh.tensor = 3"),
    ],
)
def test_a_mesh_that_cuts_a_model_unevenly_is_refused(sizes, change, message):
    model = replace(ModelConfig(90, hidden_size=32, num_heads=4, intermediate_size=48), **change)
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])
    with pytest.raises(InputError, match=message):
        check_mesh(mesh, StepConfig(model, loss=LossConfig(kl=0, cosine=0)))


def test_a_teacher_lies_as_the_student_does_or_whole():
    model = ModelConfig(90, hidden_size=32, num_heads=4, intermediate_size=48, dtype="bfloat16")
    mesh = make_mesh(MeshConfig(1, 4, 2))
    for sharded in (True, False):
        shapes = teacher_shapes(TeacherConfig(sharded=sharded), model)
        assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(shapes))
        shardings = jax.tree.leaves(shardings_of(shapes, mesh))
        assert all(each.is_fully_replicated for each in shardings) != sharded


def test_a_teacher_may_compute_more_finely_than_the_student():
    compute = ComputeConfig(dtype="bfloat16", unroll="no", remat="full")
    assert teacher_compute(TeacherConfig(), compute).dtype == "bfloat16"
    assert teacher_compute(TeacherConfig(dtype="float32"), compute).dtype == "float32"
    assert teacher_compute(TeacherConfig(), compute).remat == "none", "nothing is computed again without a gradient"


def test_what_auto_means_depends_on_the_machine():
    found = {name: resolve_compute(ComputeConfig(), name) for name in ("cpu", "gpu", "tpu")}
    assert [each.dtype for each in found.values()] == ["float32", "bfloat16", "bfloat16"]
    assert [each.remat for each in found.values()] == ["none", "none", "dots"]
    assert [each.unroll for each in found.values()] == ["yes", "no", "no"]
    assert resolve_compute(ComputeConfig(remat="full"), "tpu").remat == "full"


def test_what_is_computed_again_saves_memory():
    """On a CPU in a loop over the layers alone: that is what auto takes, and the other is refused."""
    found = resolve_compute(ComputeConfig(remat="full"), "cpu")
    assert (found.remat, found.unroll) == ("full", "no")
    with pytest.raises(InputError, match='"full" saves no memory on a CPU'):
        resolve_compute(ComputeConfig(remat="full", unroll="yes"), "cpu")
    assert resolve_compute(ComputeConfig(remat="full", unroll="yes"), "tpu").unroll == "yes"


BASE = ModelConfig(90, hidden_size=256, num_heads=4, intermediate_size=48)
STEP = StepConfig(replace(BASE, num_layers=1), teacher=BASE)


def mesh_of(platform, tensor=1, capability=None):
    device = SimpleNamespace(platform=platform, compute_capability=capability)
    return SimpleNamespace(devices=np.array([device]), shape={"tensor": tensor})


@pytest.mark.parametrize(
    ("wanted", "mesh", "length", "took", "said"),
    [
        ("auto", mesh_of("tpu"), 128, "pallas_tpu", "attention: pallas_tpu for the student and the teacher"),
        ("pallas", mesh_of("tpu", 2), 128, "pallas_tpu", "pallas_tpu for the student"),
        ("xla", mesh_of("tpu"), 128, "xla", "xla (as asked) for the student"),
        ("auto", mesh_of("tpu"), 100, "xla", "rows of 100, and it takes multiples of 128"),
        ("auto", mesh_of("tpu", 4), 128, "xla", "1 heads of 64, which do not fill 128 lanes"),
        ("auto", mesh_of("gpu", capability="9.0"), 64, "pallas_gpu", "pallas_gpu for the student and the teacher"),
        ("auto", mesh_of("gpu", capability="9.0"), 100, "xla", "rows of 100, and it takes multiples of 64"),
        ("auto", mesh_of("gpu", capability="7.5"), 128, "xla", "compute capability 8.0 or above"),
        ("auto", mesh_of("gpu", capability="gfx942"), 128, "xla", "compute capability 8.0 or above"),
        ("auto", mesh_of("cpu"), 128, "xla", "there is no kernel for a cpu"),
    ],
)
def test_attention_is_the_fastest_that_is_lawful_and_says_so(wanted, mesh, length, took, said):
    step, sentence = settle_attention(STEP, wanted, mesh, length)
    assert step.student.attention == step.teacher.attention == took
    assert said in sentence


def test_a_kernel_that_cannot_be_is_refused_where_it_was_asked_for():
    with pytest.raises(InputError, match="cannot be for the student: there is no kernel for a cpu"):
        settle_attention(STEP, "pallas", mesh_of("cpu"), 128)


def test_a_kernel_is_tried_before_it_is_trusted(monkeypatch):
    tried = partial(attention._tried, "pallas_tpu", BASE, 128)
    name, why = tried()
    assert name == "xla" and why.startswith("the kernel does not compile here: Only interpret mode")
    monkeypatch.setattr(pl, "pallas_call", partial(pl.pallas_call, interpret=True))
    assert tried() == ("pallas_tpu", "")
    monkeypatch.setattr(tpu_attention, "_NEVER", 0.0)  # a kernel that looks across segments
    jax.clear_caches()
    name, why = tried()
    assert name == "xla" and "off by" in why
