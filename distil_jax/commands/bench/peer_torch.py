"""The same work in PyTorch: the original's step, and what `torch.compile` and a fused loss make of it.

The one file that imports torch and transformers, and it is imported in the process of `peers.pytorch` alone. Models are
those of `transformers`, with SDPA attention and random weights. Masking, batching and copies to the device are done
before the clock starts, and no loss is read on the host: the original does all of that inside its loop, so leaving it
out speaks for the peer.
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
from distil_jax.commands.bench.timing import Block, Timed
from distil_jax.config.model import ModelConfig
from distil_jax.config.objective import LossConfig
from distil_jax.config.step import StepConfig
from distil_jax.io.config_json import to_json
from distil_jax.schema import require
from distil_jax.structs import IGNORED

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class TorchBatch(NamedTuple):
    """Masked sequences on the device; [n, l] int64."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


Steps = Sequence[Sequence[TorchBatch]]  # optimiser steps, each of micro-batches


def device_for(platform: str) -> torch.device:
    """The device that competes with JAX's "cpu" or "gpu".

    Raises:
      InputError: this PyTorch knows no GPU.
    """
    if platform == "cpu":
        return torch.device("cpu")
    require(torch.cuda.is_available(), "JAX computes on a GPU, where this PyTorch cannot: leave --peer out.")
    torch.set_float32_matmul_precision("high")  # TF32, which is JAX's default too
    return torch.device("cuda")


def build_model(config: ModelConfig) -> nn.Module:
    """`BertForMaskedLM` or `DistilBertForMaskedLM` of this shape, with random weights."""
    torch.manual_seed(0)
    values = AutoConfig.for_model(**to_json(config, "float32"))
    return AutoModelForMaskedLM.from_config(values, attn_implementation="sdpa")


def put(batch: Padded, device: torch.device) -> TorchBatch:
    """The batch on the device, with indices as int64, which PyTorch needs."""
    return TorchBatch(*(torch.from_numpy(array.astype(np.int64)).to(device) for array in batch))


class Peer:
    """One variant of the step, with models, optimiser and batches, compiled and warm.

    Args:
      platform: as JAX calls it.
      variant: "eager", the original's step; "compile", the same under `torch.compile`, without the gathers, which
        would break its graph; "fused", compiled too, with a loss that never holds all logits.
      step: of our own side, every choice of which is followed.
      rounds: the optimiser steps of every round, each of micro-batches.
    """

    def __init__(
        self, platform: str, variant: str, step: StepConfig, rounds: Sequence[Sequence[Sequence[Padded]]]
    ) -> None:
        device, config = device_for(platform), step.optimizer
        rounds = [[[put(batch, device) for batch in batches] for batches in steps] for steps in rounds]
        self._device, self._rounds = device, rounds
        self._peak, before = None, torch.cuda.memory_allocated() if device.type == "cuda" else 0
        self._mixed, self._clip = step.student.dtype == "bfloat16", config.clip
        self._teacher = build_model(step.teacher).to(device, _DTYPES[step.teacher.dtype]).eval().requires_grad_(False)
        self._student = build_model(step.student).to(device).train()
        rates = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "eps": config.eps}
        parameters = self._student.parameters()
        self._optimizer = torch.optim.AdamW(parameters, **rates, weight_decay=config.weight_decay, fused=True)
        shapes = {batch.input_ids.shape for steps in rounds for batches in steps for batch in batches}
        self._loss = partial(loss_function(variant, dynamic=len(shapes) > 1), loss=step.loss)
        self._compile_seconds = self._run(rounds[0][:1]).seconds
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._run(rounds[0])
        if device.type == "cuda":
            self._peak = torch.cuda.max_memory_allocated() - before

    def block(self, number: int) -> Block:
        """The steps of a round, with one wait at the end."""
        return self._run(self._rounds[number])

    def latencies(self) -> list[float]:
        """Seconds of each step of the first round, waiting after each."""
        return [self._run([micro_batches]).seconds for micro_batches in self._rounds[0]]

    def compile_seconds(self) -> float:
        """Seconds of the first step."""
        return self._compile_seconds

    def peak(self) -> tuple[int | None, str | None]:
        """The most bytes of the device that a round's tensors took, and who says so; nobody counts on a CPU."""
        return self._peak, "torch" if self._peak else None

    def _run(self, steps: Steps) -> Block:
        _wait(self._device)
        began = time.perf_counter()
        for micro_batches in steps:
            for batch in micro_batches:
                with torch.autocast(self._device.type, torch.bfloat16, enabled=self._mixed):
                    loss = self._loss(self._teacher, self._student, batch)
                (loss / len(micro_batches)).backward()  # the original's mean of means
            nn.utils.clip_grad_norm_(self._student.parameters(), self._clip)
            self._optimizer.step()
            self._optimizer.zero_grad()
        _wait(self._device)
        seconds, masks = time.perf_counter() - began, [batch.attention_mask for step in steps for batch in step]
        return Block(seconds, sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def loss_function(variant: str, *, dynamic: bool) -> Callable[..., Tensor]:
    """The loss of a variant, (teacher, student, batch, *, loss) -> scalar; `dynamic`: shapes differ between batches."""
    compiled = partial(torch.compile, dynamic=dynamic)
    if variant == "eager":
        return gathered_loss
    if variant == "compile":
        return compiled(masked_loss)
    return partial(chunked_loss, encode=compiled(encode), compare=compiled(compare))


class Encoded(NamedTuple):
    """Last hidden states, and what the vocabulary projections read, of student and teacher; [n, l, D]."""

    hidden: Tensor
    features: Tensor
    teacher_hidden: Tensor
    teacher_features: Tensor


def encode(teacher: nn.Module, student: nn.Module, batch: TorchBatch) -> Encoded:
    """Both models up to their vocabularies; the teacher without gradients."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        teacher_hidden = teacher.bert(**inputs)[0]
        teacher_features = teacher.cls.predictions.transform(teacher_hidden)
    hidden = student.distilbert(**inputs)[0]
    features = student.vocab_layer_norm(student.activation(student.vocab_transform(hidden)))
    return Encoded(hidden, features, teacher_hidden, teacher_features)


def gathered_loss(teacher: nn.Module, student: nn.Module, batch: TorchBatch, *, loss: LossConfig) -> Tensor:
    """The original's form: all logits, of which those at tokens are copied out (Sanh et al., 2019, section 2)."""
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
    """The same number from sums over all positions, weighted by the mask: shapes that a compiler knows."""
    encoded, temperature, real = encode(teacher, student, batch), loss.temperature, batch.attention_mask.float()
    logits, teacher_logits = _logits(teacher, student, encoded)
    log_probs = F.log_softmax(logits / temperature, dim=-1)
    divergence = F.kl_div(log_probs, F.softmax(teacher_logits / temperature, dim=-1), reduction="none").sum(-1)
    kl = (divergence * real).sum() / real.sum()
    return loss.kl * kl * temperature**2 + loss.mlm * _mlm(logits, batch) + loss.cosine * _cosine(encoded, real)


def compare(
    logits: Tensor, teacher_logits: Tensor, labels: Tensor, real: Tensor, shares: tuple, temperature: float
) -> tuple[Tensor, Tensor]:
    """The vocabulary's terms of C positions, and their gradient with respect to the student's logits [C, V]."""
    (kl_share, mlm_share), logits = shares, logits.float()
    teacher_log = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    soft_log, log = F.log_softmax(logits / temperature, dim=-1), F.log_softmax(logits, dim=-1)
    index, mlm_scale = labels.clamp(min=0)[:, None], (labels != IGNORED).float() * mlm_share
    divergence = (teacher_log.exp() * (teacher_log - soft_log)).sum(-1)
    value = kl_share * temperature**2 * (divergence * real).sum() - (log.gather(1, index)[:, 0] * mlm_scale).sum()
    gradient = (kl_share * temperature * real)[:, None] * (soft_log.exp() - teacher_log.exp())
    gradient = (gradient + mlm_scale[:, None] * log.exp()).scatter_add(1, index, -mlm_scale[:, None])
    return value, gradient


def chunked_loss(
    teacher: nn.Module,
    student: nn.Module,
    batch: TorchBatch,
    *,
    loss: LossConfig,
    encode: Callable[..., Encoded] = encode,
    compare: Callable[..., tuple[Tensor, Tensor]] = compare,
) -> Tensor:
    """The same number, with the logits of `loss.chunk` positions at a time, as our own fused loss has them."""
    encoded, real = encode(teacher, student, batch), batch.attention_mask.float()
    shares = loss.kl / real.sum(), loss.mlm / (batch.labels != IGNORED).sum()
    terms = partial(compare, shares=shares, temperature=loss.temperature)
    constants = encoded.teacher_features.flatten(0, 1), batch.labels.flatten(), real.flatten()
    chunk = loss.chunk or batch.labels.numel()
    head, teacher_head = student.vocab_projector, teacher.cls.predictions.decoder
    features = encoded.features.flatten(0, 1)
    vocabulary = _Chunked.apply(features, head.weight, head.bias, teacher_head, constants, terms, chunk)
    return vocabulary + loss.cosine * _cosine(encoded, real)


class _Chunked(torch.autograd.Function):
    """Gradients are made on the way forward, chunk by chunk, and only scaled on the way back."""

    @staticmethod
    def forward(ctx, features, weight, bias, teacher_head, constants, terms, chunk):
        teacher_features, labels, real = constants
        kernel = weight.to(teacher_head.weight.dtype)  # that of the computation; once, not in every chunk
        narrow, narrow_bias = features.to(kernel.dtype), bias.to(kernel.dtype)
        total, gradients = 0, (torch.empty_like(features), torch.zeros_like(weight), torch.zeros_like(bias))
        for start in range(0, len(features), chunk):
            part = slice(start, start + chunk)
            logits = F.linear(narrow[part], kernel, narrow_bias)
            value, gradient = terms(logits, teacher_head(teacher_features[part]), labels[part], real[part])
            total, narrow_gradient = total + value, gradient.to(kernel.dtype)
            gradients[0][part] = narrow_gradient @ kernel
            gradients[1].add_(narrow_gradient.T @ narrow[part])
            gradients[2].add_(gradient.sum(0))
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx, outer):
        return *(outer * gradient for gradient in ctx.saved_tensors), None, None, None, None


def _logits(teacher: nn.Module, student: nn.Module, encoded: Encoded) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        teacher_logits = teacher.cls.predictions.decoder(encoded.teacher_features)
    return student.vocab_projector(encoded.features), teacher_logits


def _mlm(logits: Tensor, batch: TorchBatch) -> Tensor:
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), batch.labels.view(-1), ignore_index=IGNORED)


def _cosine(encoded: Encoded, real: Tensor) -> Tensor:
    apart = 1 - F.cosine_similarity(encoded.hidden.float(), encoded.teacher_hidden.float(), dim=-1)
    return (apart * real).sum() / real.sum()


def encoder(platform: str, config: ModelConfig, batch: int, length: int) -> Timed:
    """A call that sends full rows through `BertModel` or `DistilBertModel`."""
    device = device_for(platform)
    model = build_model(config).base_model.to(device, _DTYPES[config.dtype]).eval()
    ids = torch.randint(5, config.vocab_size, (batch, length), device=device)
    mask = torch.ones_like(ids)

    def call() -> None:
        with torch.inference_mode():
            model(input_ids=ids, attention_mask=mask)
        _wait(device)

    return Timed(call)


def products(platform: str, rows: int, width: int, inner: int, dtype: str, pairs: int) -> Timed:
    """A call that computes what `timing.products` does."""
    device, shapes = device_for(platform), ((rows, width), (width, inner), (inner, width))
    x, up, down = (torch.randn(shape, device=device).to(_DTYPES[dtype]) for shape in shapes)
    up, down = up * width**-0.5, down * inner**-0.5

    def call() -> None:
        y = x
        for _ in range(pairs):
            y = (y @ up) @ down
        _wait(device)

    return Timed(call)
