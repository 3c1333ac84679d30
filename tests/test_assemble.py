"""What a configuration becomes on a mesh, before anything is compiled."""

import pytest

from distil_jax.commands.assemble import micro_batches
from distil_jax.config import MeshConfig, TrainConfig
from distil_jax.schema import InputError
from distil_jax.training.sharding import make_mesh


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
