"""How a student begins: with some of its teacher's layers (Sanh et al., 2019, section 2)."""

from __future__ import annotations

import jax
import numpy as np

from distil_jax.config.model import ModelConfig
from distil_jax.schema import InputError


def choose_layers(teacher_layers: int, student_layers: int) -> tuple[int, ...]:
    """The teacher's layers that a student copies by default, evenly spread from the first to the last.

    For 12 -> 6 these are 0, 2, 4, 7, 9, 11, the published choice.

    Raises:
      InputError: the student is deeper than the teacher.
    """
    if student_layers > teacher_layers:
        raise InputError(
            f"A student of {student_layers} layers cannot be made from a teacher of {teacher_layers}: "
            'choose fewer, or set student.init = "random".'
        )
    return tuple(int(layer) for layer in np.round(np.linspace(0, teacher_layers - 1, student_layers)))


def student_from_teacher(
    teacher_params: dict,
    teacher_config: ModelConfig,
    student_config: ModelConfig,
    *,
    layers: tuple[int, ...],
    fold_token_types: bool = True,
) -> dict:
    """The student's initial parameters: embeddings, MLM head and the chosen layers of the teacher.

    Leaves that are taken whole are the teacher's own buffers; `init_state` copies them.

    Args:
      teacher_params: the teacher's tree.
      teacher_config, student_config: of one width, head count, feed-forward width and vocabulary.
      layers: which of the teacher's layers become the student's, in this order.
      fold_token_types: for a student without token types, adds the teacher's row 0 into the position table. Row 0 is
        what every single-segment text gets, so the embeddings stay exactly the teacher's (the original drops it).
        Sinusoidal positions have no table, and the word table is the MLM head's too: there the row is dropped.

    Returns:
      A tree that fits `MaskedLm(student_config)`.

    Raises:
      InputError: the two shapes do not allow copying, or a layer does not exist.
    """
    _check_copyable(teacher_config, student_config, layers)
    teacher_embeddings = teacher_params["embeddings"]
    embeddings = {"word": teacher_embeddings["word"], "norm": teacher_embeddings["norm"]}
    if student_config.positions == "learned":
        positions = teacher_embeddings["position"][: student_config.max_positions]
        if fold_token_types and teacher_config.token_types and not student_config.token_types:
            positions = positions + teacher_embeddings["token_type"][0]
        embeddings["position"] = positions
    if student_config.token_types:
        embeddings["token_type"] = teacher_embeddings["token_type"]
    indices = np.asarray(layers)
    student = {"embeddings": embeddings, "layers": jax.tree.map(lambda leaf: leaf[indices], teacher_params["layers"])}
    if student_config.pooler:
        student["pooler"] = teacher_params["pooler"]
    if student_config.mlm_head:
        student["mlm"] = teacher_params["mlm"]
    return student


def _check_copyable(teacher: ModelConfig, student: ModelConfig, layers: tuple[int, ...]) -> None:
    for name in ("vocab_size", "hidden_size", "num_heads", "intermediate_size", "activation"):
        ours, theirs = getattr(student, name), getattr(teacher, name)
        if ours != theirs:
            also = " and loss.cosine = 0" if student.hidden_size != teacher.hidden_size else ""
            raise InputError(
                f"The student's {name} is {ours} and the teacher's {theirs}, so layers cannot be copied: make them "
                f'equal, or set student.init = "random"{also}.'
            )
    if len(layers) != student.num_layers:
        raise InputError(f"{len(layers)} layers are named for a student of {student.num_layers}.")
    absent = [layer for layer in layers if not 0 <= layer < teacher.num_layers]
    if absent:
        raise InputError(f"The teacher has layers 0 to {teacher.num_layers - 1}, but not {absent}.")
    if student.max_positions > teacher.max_positions:
        raise InputError(
            f"The student's max_positions {student.max_positions} is above the teacher's {teacher.max_positions}: "
            'lower it, or set student.init = "random".'
        )
    if student.positions == "learned" and teacher.positions != "learned":
        raise InputError("The teacher's positions are sinusoidal, so learned ones cannot be copied from it.")
    if student.token_types not in (0, teacher.token_types):
        raise InputError(f"student.token_types must be 0 or the teacher's {teacher.token_types}.")
    # A teacher without an MLM head has no soft targets either.
    for part, also in (("mlm_head", ", loss.kl = 0 and loss.mse = 0"), ("pooler", "")):
        if getattr(student, part) and not getattr(teacher, part):
            raise InputError(
                f"The student wants a part ({part}) that the teacher lacks: train it in the teacher first (`distil-jax "
                f'train` without a teacher, with student.init = its folder), or set student.init = "random"{also}.'
            )
