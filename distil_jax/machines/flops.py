"""The FLOPs of a training step, by formula. Only matrix products count, with two FLOPs for each multiply-add."""

from __future__ import annotations

from distil_jax.config.model import ModelConfig
from distil_jax.config.step import StepConfig


def encoder_flops(model: ModelConfig, length: int) -> float:
    """Forward FLOPs per position of the encoder and, if the model has an MLM head, of the head's transform.

    Args:
      model: the architecture.
      length: positions in a row. Attention is counted over the whole row, also across segments.
    """
    width, inner = model.hidden_size, model.intermediate_size
    layer = 8 * width**2 + 4 * width * inner + 4 * length * width
    return model.num_layers * layer + (2 * width**2 if model.mlm_head else 0)


def vocabulary_flops(model: ModelConfig) -> float:
    """Forward FLOPs of the logits of one position."""
    return 2 * model.hidden_size * model.padded_vocab_size


def step_flops(config: StepConfig, length: int) -> float:
    """FLOPs per position of a training step: the teacher's forward pass, the student's forward and backward pass.

    The backward pass counts as two forward passes. What rematerialisation computes again is not counted.

    Args:
      config: of the step.
      length: positions in a row.
    """
    loss = config.loss
    soft = max(loss.kl, loss.mse) > 0  # whether the teacher's logits are needed
    target_share = (config.targets_per_row or length) / length
    logits_share = 1.0 if soft and loss.soft_positions == "all" else target_share  # of the positions
    flops = 3 * encoder_flops(config.student, length)
    if max(loss.kl, loss.mse, loss.mlm) > 0:
        flops += 3 * logits_share * vocabulary_flops(config.student)
    if config.teacher_model is not None and loss.needs_teacher:
        flops += encoder_flops(config.teacher, length)
        flops += logits_share * vocabulary_flops(config.teacher) if soft else 0
    return flops
