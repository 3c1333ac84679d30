"""The train step in PyTorch: as in the original (PyTorch) DistilBERT code, with `torch.compile`, and with a fused loss.

This file imports torch and transformers, so it must only be imported in the process of `peers.pytorch`. The models are
those of `transformers`, with SDPA attention and random parameters. Masking, batching and copies to the device happen
before the clock starts, and the host never reads a loss. The original does all of that inside its loop, so leaving it
out favours the peer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM

from distil_jax.commands.bench.batching import Padded
from distil_jax.commands.bench.timing import Block, TimedCall
from distil_jax.config.model import ModelConfig
from distil_jax.config.objective import LossConfig
from distil_jax.config.step import StepConfig
from distil_jax.io.config_json import to_json
from distil_jax.schema import require
from distil_jax.structs import IGNORED

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class TorchBatch(NamedTuple):
    """Masked sequences on the device, as int64 tensors [B, L]."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


Steps = Sequence[Sequence[TorchBatch]]  # optimiser steps, each a sequence of micro-batches


def device_for(platform: str) -> torch.device:
    """PyTorch's device for JAX's platform "cpu" or "gpu".

    Raises:
      InputError: JAX uses a GPU, but PyTorch has none.
    """
    if platform == "cpu":
        return torch.device("cpu")
    require(torch.cuda.is_available(), "JAX uses a GPU, but PyTorch cannot use one here: leave --peer out.")
    torch.set_float32_matmul_precision("high")  # TF32, as in JAX by default
    return torch.device("cuda")


def build_model(config: ModelConfig) -> nn.Module:
    """`BertForMaskedLM` or `DistilBertForMaskedLM` of this architecture, with random parameters."""
    torch.manual_seed(0)
    values = AutoConfig.for_model(**to_json(config, "float32"))
    return AutoModelForMaskedLM.from_config(values, attn_implementation="sdpa")


def put(batch: Padded, device: torch.device) -> TorchBatch:
    """Copies a batch to the device, as int64, which PyTorch needs for indices."""
    return TorchBatch(*(torch.from_numpy(array.astype(np.int64)).to(device) for array in batch))


class TorchStep:
    """One variant of the train step, with its models, optimiser and batches, compiled and warm.

    Args:
      platform: JAX's name of it.
      variant: "eager", the original's step; "compile", the same loss under `torch.compile`, without the gathers, which
        would break the graph; "fused", also compiled, with a loss that never holds all logits.
      step: the config of our own step, which this one follows.
      rounds: by round, the optimiser steps as sequences of micro-batches.
    """

    def __init__(
        self, platform: str, variant: str, step: StepConfig, rounds: Sequence[Sequence[Sequence[Padded]]]
    ) -> None:
        device, config = device_for(platform), step.optimizer
        self._device = device
        self._rounds = [[[put(batch, device) for batch in batches] for batches in steps] for steps in rounds]
        memory_before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        self._peak = None
        self._mixed, self._clip = step.student.dtype == "bfloat16", config.clip
        self._teacher = build_model(step.teacher).to(device, _DTYPES[step.teacher.dtype]).eval().requires_grad_(False)
        self._student = build_model(step.student).to(device).train()
        settings = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "eps": config.eps}
        parameters = self._student.parameters()
        self._optimizer = torch.optim.AdamW(parameters, **settings, weight_decay=config.weight_decay, fused=True)
        shapes = {batch.input_ids.shape for steps in self._rounds for batches in steps for batch in batches}
        self._loss = partial(loss_function(variant, dynamic=len(shapes) > 1), loss=step.loss)
        self._compile_seconds = self._run(self._rounds[0][:1]).seconds
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._run(self._rounds[0])
        if device.type == "cuda":
            self._peak = torch.cuda.max_memory_allocated() - memory_before

    def block(self, index: int) -> Block:
        """Times the steps of a round, with one wait at the end."""
        return self._run(self._rounds[index])

    def latencies(self) -> list[float]:
        """The seconds of each step of the first round, with a wait after each."""
        return [self._run([micro_batches]).seconds for micro_batches in self._rounds[0]]

    def compile_seconds(self) -> float:
        """The seconds of the first step, in which PyTorch compiles."""
        return self._compile_seconds

    def peak(self) -> tuple[int | None, str | None]:
        """The peak of bytes that a round's tensors took on a GPU, and the source "torch"; on a CPU, None and None."""
        return self._peak, "torch" if self._peak else None

    def _run(self, steps: Steps) -> Block:
        _wait(self._device)
        start = time.perf_counter()
        for micro_batches in steps:
            for batch in micro_batches:
                with torch.autocast(self._device.type, torch.bfloat16, enabled=self._mixed):
                    loss = self._loss(self._teacher, self._student, batch)
                (loss / len(micro_batches)).backward()  # a mean of means, as in the original
            nn.utils.clip_grad_norm_(self._student.parameters(), self._clip)
            self._optimizer.step()
            self._optimizer.zero_grad()
        _wait(self._device)
        seconds, masks = time.perf_counter() - start, [batch.attention_mask for step in steps for batch in step]
        return Block(seconds, sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def loss_function(variant: str, *, dynamic: bool) -> Callable[..., Tensor]:
    """The loss of a variant, (teacher, student, batch, *, loss) -> scalar; `dynamic` says that batch shapes differ."""
    compiled = partial(torch.compile, dynamic=dynamic)
    if variant == "eager":
        return gathered_loss
    if variant == "compile":
        return compiled(masked_loss)
    return partial(chunked_loss, encode=compiled(encode), chunk_loss=compiled(chunk_loss))


class Encoded(NamedTuple):
    """Last hidden states, and the inputs of the vocabulary projections, of student and teacher; all [B, L, D]."""

    hidden: Tensor
    features: Tensor
    teacher_hidden: Tensor
    teacher_features: Tensor


def encode(teacher: nn.Module, student: nn.Module, batch: TorchBatch) -> Encoded:
    """Runs both models up to their vocabulary projections, the teacher without gradients."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        teacher_hidden = teacher.bert(**inputs)[0]
        teacher_features = teacher.cls.predictions.transform(teacher_hidden)
    hidden = student.distilbert(**inputs)[0]
    features = student.vocab_layer_norm(student.activation(student.vocab_transform(hidden)))
    return Encoded(hidden, features, teacher_hidden, teacher_features)


def gathered_loss(teacher: nn.Module, student: nn.Module, batch: TorchBatch, *, loss: LossConfig) -> Tensor:
    """The original's loss: it computes all logits and gathers those at tokens (Sanh et al., 2019, section 2)."""
    encoded, temperature, real = encode(teacher, student, batch), loss.temperature, batch.attention_mask.bool()
    logits, teacher_logits = _logits(teacher, student, encoded)

    def at_tokens(values: Tensor) -> Tensor:
        return torch.masked_select(values, real[..., None].expand_as(values)).view(-1, values.shape[-1])

    log_probs = F.log_softmax(at_tokens(logits) / temperature, dim=-1)
    kl = F.kl_div(log_probs, F.softmax(at_tokens(teacher_logits) / temperature, dim=-1), reduction="batchmean")
    hidden, teacher_hidden = at_tokens(encoded.hidden), at_tokens(encoded.teacher_hidden)
    cosine = F.cosine_embedding_loss(hidden, teacher_hidden, hidden.new_ones(len(hidden)))
    return loss.kl * kl * temperature**2 + loss.mlm * _mlm(logits, batch) + loss.cosine * cosine


def masked_loss(teacher: nn.Module, student: nn.Module, batch: TorchBatch, *, loss: LossConfig) -> Tensor:
    """The same loss by masked sums over all positions, whose shapes the compiler knows."""
    encoded, temperature, real = encode(teacher, student, batch), loss.temperature, batch.attention_mask.float()
    logits, teacher_logits = _logits(teacher, student, encoded)
    log_probs = F.log_softmax(logits / temperature, dim=-1)
    divergence = F.kl_div(log_probs, F.softmax(teacher_logits / temperature, dim=-1), reduction="none").sum(-1)
    kl = (divergence * real).sum() / real.sum()
    return loss.kl * kl * temperature**2 + loss.mlm * _mlm(logits, batch) + loss.cosine * _cosine(encoded, real)


def chunk_loss(
    logits: Tensor, teacher_logits: Tensor, labels: Tensor, real: Tensor, scales: tuple, temperature: float
) -> tuple[Tensor, Tensor]:
    """The KL and MLM terms of a chunk of C positions, and their gradient with respect to the student's logits [C, V].

    Args:
      logits, teacher_logits: [C, V].
      labels: [C].
      real: [C], 1 at tokens and 0 at padding.
      scales: the loss weights of KL and MLM, each divided by the number of positions in the batch that it averages.
      temperature: of the KL term.
    """
    (kl_scale, mlm_scale), logits = scales, logits.float()
    teacher_log_probs = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    soft_log_probs, log_probs = F.log_softmax(logits / temperature, dim=-1), F.log_softmax(logits, dim=-1)
    index, mlm_scales = labels.clamp(min=0)[:, None], (labels != IGNORED).float() * mlm_scale
    divergence = (teacher_log_probs.exp() * (teacher_log_probs - soft_log_probs)).sum(-1)
    value = kl_scale * temperature**2 * (divergence * real).sum()
    value = value - (log_probs.gather(1, index)[:, 0] * mlm_scales).sum()
    gradient = (kl_scale * temperature * real)[:, None] * (soft_log_probs.exp() - teacher_log_probs.exp())
    gradient = (gradient + mlm_scales[:, None] * log_probs.exp()).scatter_add(1, index, -mlm_scales[:, None])
    return value, gradient


def chunked_loss(
    teacher: nn.Module,
    student: nn.Module,
    batch: TorchBatch,
    *,
    loss: LossConfig,
    encode: Callable[..., Encoded] = encode,
    chunk_loss: Callable[..., tuple[Tensor, Tensor]] = chunk_loss,
) -> Tensor:
    """The same loss, with the logits of only `loss.chunk` positions in memory at a time, like our own fused loss."""
    encoded, real = encode(teacher, student, batch), batch.attention_mask.float()
    scales = loss.kl / real.sum(), loss.mlm / (batch.labels != IGNORED).sum()
    terms = partial(chunk_loss, scales=scales, temperature=loss.temperature)
    constants = encoded.teacher_features.flatten(0, 1), batch.labels.flatten(), real.flatten()
    chunk = loss.chunk or batch.labels.numel()
    head, teacher_head = student.vocab_projector, teacher.cls.predictions.decoder
    features = encoded.features.flatten(0, 1)
    vocabulary_loss = _Chunked.apply(features, head.weight, head.bias, teacher_head, constants, terms, chunk)
    return vocabulary_loss + loss.cosine * _cosine(encoded, real)


class _Chunked(torch.autograd.Function):
    """Sums `terms` over chunks. The forward pass also computes the gradients, which the backward pass only scales."""

    @staticmethod
    def forward(ctx, features, weight, bias, teacher_head, constants, terms, chunk):
        teacher_features, labels, real = constants
        kernel = weight.to(teacher_head.weight.dtype)  # to the compute dtype, once instead of in every chunk
        features_cast, bias_cast = features.to(kernel.dtype), bias.to(kernel.dtype)
        total, gradients = 0, (torch.empty_like(features), torch.zeros_like(weight), torch.zeros_like(bias))
        for start in range(0, len(features), chunk):
            part = slice(start, start + chunk)
            logits = F.linear(features_cast[part], kernel, bias_cast)
            value, gradient = terms(logits, teacher_head(teacher_features[part]), labels[part], real[part])
            total, gradient_cast = total + value, gradient.to(kernel.dtype)
            gradients[0][part] = gradient_cast @ kernel
            gradients[1].add_(gradient_cast.T @ features_cast[part])
            gradients[2].add_(gradient.sum(0))
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx, upstream):
        return *(upstream * gradient for gradient in ctx.saved_tensors), None, None, None, None


def _logits(teacher: nn.Module, student: nn.Module, encoded: Encoded) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        teacher_logits = teacher.cls.predictions.decoder(encoded.teacher_features)
    return student.vocab_projector(encoded.features), teacher_logits


def _mlm(logits: Tensor, batch: TorchBatch) -> Tensor:
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), batch.labels.view(-1), ignore_index=IGNORED)


def _cosine(encoded: Encoded, real: Tensor) -> Tensor:
    distances = 1 - F.cosine_similarity(encoded.hidden.float(), encoded.teacher_hidden.float(), dim=-1)
    return (distances * real).sum() / real.sum()


def encoder(platform: str, config: ModelConfig, batch: int, length: int) -> TimedCall:
    """A call that runs `BertModel` or `DistilBertModel` on full rows [batch, length]."""
    device = device_for(platform)
    model = build_model(config).base_model.to(device, _DTYPES[config.dtype]).eval()
    ids = torch.randint(5, config.vocab_size, (batch, length), device=device)
    mask = torch.ones_like(ids)

    def call() -> None:
        with torch.inference_mode():
            model(input_ids=ids, attention_mask=mask)
        _wait(device)

    return TimedCall(call)


def matmuls(platform: str, rows: int, width: int, inner: int, dtype: str, pairs: int) -> TimedCall:
    """A call that computes the same matrix products as `timing.matmuls`."""
    device, shapes = device_for(platform), ((rows, width), (width, inner), (inner, width))
    x, up, down = (torch.randn(shape, device=device).to(_DTYPES[dtype]) for shape in shapes)
    up, down = up * width**-0.5, down * inner**-0.5

    def call() -> None:
        y = x
        for _ in range(pairs):
            y = (y @ up) @ down
        _wait(device)

    return TimedCall(call)
