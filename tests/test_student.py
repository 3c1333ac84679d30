"""A student's beginning: the teacher's layers, exactly, in any order."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from distil_jax.models.encoder import MaskedLm
from distil_jax.models.student import choose_layers, student_from_teacher
from distil_jax.schema import InputError
from distil_jax.structs import Batch


@pytest.fixture
def batch(rows):
    return Batch(rows.input_ids, rows.segment_ids, rows.position_ids, rows.input_ids)


def test_default_layers():
    assert choose_layers(12, 6) == (0, 2, 4, 7, 9, 11)
    assert choose_layers(4, 2) == (0, 3)
    assert choose_layers(24, 24) == tuple(range(24))
    assert choose_layers(12, 1) == (0,)
    with pytest.raises(InputError, match="7 layers cannot be made from a teacher of 6"):
        choose_layers(6, 7)


def test_all_layers_folded_is_the_teacher(teacher_config, teacher_params, batch):
    config = replace(teacher_config, token_types=0)
    params = student_from_teacher(teacher_params, teacher_config, config, layers=(0, 1, 2, 3))
    teacher = MaskedLm(teacher_config).apply({"params": teacher_params}, batch)
    student = MaskedLm(config).apply({"params": params}, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), teacher, student)


def test_unfolded_is_the_original_which_drops_the_row(teacher_config, teacher_params):
    config = replace(teacher_config, token_types=0)
    layers = (0, 1, 2, 3)
    params = student_from_teacher(teacher_params, teacher_config, config, layers=layers, fold_token_types=False)
    np.testing.assert_array_equal(params["embeddings"]["position"], teacher_params["embeddings"]["position"])


def test_sinusoidal_positions_have_no_place_for_the_row(teacher_config, teacher_params):
    config = replace(teacher_config, token_types=0, positions="sinusoidal")
    params = student_from_teacher(teacher_params, teacher_config, config, layers=(0, 1, 2, 3))
    assert params["embeddings"].keys() == {"word", "norm"}
    np.testing.assert_array_equal(params["embeddings"]["word"], teacher_params["embeddings"]["word"])


@pytest.mark.parametrize("layers", [(3,), (2, 0), (1, 1, 3)])
def test_any_ordered_choice_is_copied_exactly(teacher_config, teacher_params, layers):
    config = replace(teacher_config, num_layers=len(layers))
    params = student_from_teacher(teacher_params, teacher_config, config, layers=layers)
    jax.tree.map(
        lambda mine, its: np.testing.assert_array_equal(mine, np.stack([its[layer] for layer in layers])),
        params["layers"],
        teacher_params["layers"],
    )
    jax.tree.map(np.testing.assert_array_equal, params["mlm"], teacher_params["mlm"])
    jax.tree.map(np.testing.assert_array_equal, params["embeddings"], teacher_params["embeddings"])


@pytest.mark.parametrize(
    ("changes", "layers", "words"),
    [
        ({"hidden_size": 16}, (0, 1, 2, 3), "hidden_size is 16 and the teacher's 32"),
        ({"vocab_size": 80}, (0, 1, 2, 3), "vocab_size"),
        ({"num_layers": 2}, (0, 1, 2), "3 layers are named for a student of 2"),
        ({"num_layers": 2}, (0, 9), r"not \[9\]"),
        ({"num_layers": 2}, (-1, 0), r"not \[-1\]"),
        ({"max_positions": 64}, (0, 1, 2, 3), "max_positions 64"),
        ({"token_types": 3}, (0, 1, 2, 3), "token_types"),
        ({"pooler": True}, (0, 1, 2, 3), "pooler"),
    ],
)
def test_what_cannot_be_copied_is_refused(teacher_config, teacher_params, changes, layers, words):
    with pytest.raises(InputError, match=words):
        student_from_teacher(teacher_params, teacher_config, replace(teacher_config, **changes), layers=layers)
