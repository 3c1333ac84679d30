"""What a configuration becomes on a mesh, before anything is compiled."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distil_jax.commands.assemble import micro_batches, teacher_compute, teacher_shapes
from distil_jax.config import ComputeConfig, LossConfig, MeshConfig, ModelConfig, StepConfig, TeacherConfig, TrainConfig
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
