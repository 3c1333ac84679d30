"""How many FLOPs a step has, from its shapes: matrix products alone, two for each multiply-add."""

from __future__ import annotations

from distil_jax.config.model import ModelConfig
from distil_jax.config.step import StepConfig


def encoder_flops(model: ModelConfig, length: int) -> float:
    """FLOPs of one position in the encoder and, if there is one, in the transform of the MLM head.

    Args:
      model: the architecture.
      length: of a row: every position meets so many others, whatever segment they are of.
    """
    width, inner = model.hidden_size, model.intermediate_size
    layer = 8 * width**2 + 4 * width * inner + 4 * length * width
    return model.num_layers * layer + (2 * width**2 if model.mlm_head else 0)


def vocabulary_flops(model: ModelConfig) -> float:
    """FLOPs of one position's logits."""
    return 2 * model.hidden_size * model.padded_vocab_size


def step_flops(config: StepConfig, length: int) -> float:
    """FLOPs per position of a training step: the teacher forward, the student forward and twice that backward.

    What a rematerialising step computes again is not counted: it is the work that is asked for, not the work that is
    done.

    Args:
      config: of the step.
      length: positions in a row.
    """
    loss, targets = config.loss, (config.targets_per_row or length) / length
    soft = max(loss.kl, loss.mse) > 0
    with_logits = 1.0 if soft and loss.soft_positions == "all" else targets
    flops = 3 * encoder_flops(config.student, length)
    if max(loss.kl, loss.mse, loss.mlm) > 0:
        flops += 3 * with_logits * vocabulary_flops(config.student)
    if config.teacher is not None and loss.needs_teacher:
        flops += encoder_flops(config.teacher, length)
        flops += with_logits * vocabulary_flops(config.teacher) if soft else 0
    return flops
