"""Thirty steps of fine-tuning beside PyTorch's models, losses and optimiser: every term, at every step."""

from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import numpy as np
import pytest
from conftest import assert_params_close, pytorch_optimizer

from distil_jax.config.model import HeadConfig, ModelConfig
from distil_jax.config.objective import TaskLossConfig
from distil_jax.config.run import MeshConfig
from distil_jax.config.step import OptimizerConfig, StepConfig
from distil_jax.io import huggingface
from distil_jax.models.encoder import init_params
from distil_jax.models.heads import with_fresh_head
from distil_jax.structs import IGNORED, Batch
from distil_jax.training.sharding import jit_step, make_mesh, put_rows
from distil_jax.training.state import abstract_state, init_state
from distil_jax.training.step import train_step

STEPS, ROWS, LENGTH, VOCAB = 30, 8, 24, 90
SEQUENCE, REGRESSION = HeadConfig("sequence", 3, 0.0), HeadConfig("sequence", 1, 0.0)
TOKENS, SPANS = HeadConfig("tokens", 5, 0.0), HeadConfig("spans", 2, 0.0)
SUFFIXES = {
    "sequence": "ForSequenceClassification",
    "tokens": "ForTokenClassification",
    "spans": "ForQuestionAnswering",
}


def encoder(token_types: int, layers: int = 2) -> ModelConfig:
    return ModelConfig(
        VOCAB, layers, 32, 4, 48, 32, token_types, hidden_dropout=0.0, attention_dropout=0.0, initializer_range=0.2,
        unroll=False, mlm_head=False,
    )  # fmt: skip


def start(config: ModelConfig, head: HeadConfig, seed: int) -> dict:
    first, second = jax.random.split(jax.random.key(seed))
    return with_fresh_head(second, config, head, nn.unbox(init_params(first, config)))


def padded_batches(head: HeadConfig, steps: int = STEPS):
    """Fresh padded pairs with labels for every step: (ids, mask, token types, labels)."""
    generator = np.random.default_rng(11)
    for _ in range(steps):
        ids = generator.integers(5, VOCAB, (ROWS, LENGTH))
        lengths = generator.integers(6, LENGTH + 1, (ROWS, 1))
        mask = np.arange(LENGTH) < lengths
        types = mask & (np.arange(LENGTH) >= lengths // 2)
        if head == REGRESSION:
            labels = generator.normal(2, 1, ROWS).astype(np.float32)
        elif head.kind == "sequence":
            labels = generator.integers(0, head.labels, ROWS)
        elif head.kind == "tokens":
            asked = mask & (generator.random((ROWS, LENGTH)) < 0.5)
            labels = np.where(asked, generator.integers(0, head.labels, (ROWS, LENGTH)), IGNORED)
        else:
            labels = np.sort(generator.integers(0, lengths, (ROWS, 2)), axis=1)
        yield ids * mask, mask.astype(np.int32), types.astype(np.int32), labels


def as_batch(ids, mask, types, labels) -> Batch:
    batch = Batch.from_padded(ids, mask, np.zeros_like(ids), types)
    return batch.replace(labels=np.asarray(labels, labels.dtype if labels.dtype == np.float32 else np.int32))


def step_config(head: HeadConfig, token_types: int, loss: TaskLossConfig) -> StepConfig:
    # The clip is low enough to act, and the warm-up short enough to end.
    optimizer = OptimizerConfig(2e-3, beta2=0.999, steps=STEPS, warmup=0.2, clip=1.0, weight_decay=0.01)
    teacher = encoder(2, layers=4) if loss.soft else None
    return StepConfig(encoder(token_types), teacher, optimizer=optimizer, head=head, task=loss)


@pytest.mark.parametrize(
    ("head", "token_types", "soft"),
    [(SEQUENCE, 0, 0.0), (SEQUENCE, 2, 0.5), (REGRESSION, 0, 0.5), (TOKENS, 2, 0.0), (SPANS, 2, 0.0), (SPANS, 0, 0.5)],
)  # fmt: skip
def test_thirty_steps_as_pytorch_does_them(tmp_path, head, token_types, soft):
    """With `soft`, the teacher has token types; a student without must never see them."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = step_config(head, token_types, TaskLossConfig(1.0 - soft, soft, 2.0))
    params = start(config.student, head, 1)
    teacher_params = start(config.teacher, head, 2) if soft else None
    theirs = []
    for name, model, tree in (("student", config.student, params), ("teacher", config.teacher, teacher_params)):
        if model is not None:
            huggingface.save_task(tmp_path / name, model, head, tree)
            prefix = "Bert" if model.token_types else "DistilBert"
            theirs.append(getattr(transformers, prefix + SUFFIXES[head.kind]).from_pretrained(tmp_path / name))
    expected = list(pytorch_steps(torch, transformers, config, *theirs))
    state, step, clipped = init_state(jax.random.key(0), config, params=params), jax.jit(train_step), 0
    for number, batch in enumerate(padded_batches(head)):
        state, metrics = step(state, teacher_params, as_batch(*batch))
        result = {name: float(metrics[name].value()) for name in expected[number]}
        for name, value in expected[number].items():
            assert result[name] == pytest.approx(value, rel=1e-4, abs=1e-6), f"{name} at step {number}"
        clipped += result["gradient_norm"] > config.optimizer.clip
    assert clipped > 0, "the clip never acted, so it was not tested"
    assert expected[-1]["loss"] != pytest.approx(expected[0]["loss"], rel=1e-2), "nothing was learnt"


def pytorch_steps(torch, transformers, config, student, teacher=None):
    """The losses as the models of `transformers` and the authors' script of SQuAD distillation have them."""
    from torch.nn import functional

    optimizer = config.optimizer
    adam, schedule = pytorch_optimizer(student, optimizer)
    student.train()
    for batch in padded_batches(config.head):
        ids, mask, types, labels = map(torch.tensor, batch)

        def outputs(model):
            read = {"input_ids": ids, "attention_mask": mask}  # noqa: B023 - called before the next batch
            if model.config.model_type == "bert":
                read["token_type_ids"] = types  # noqa: B023
            given = {} if config.head.kind == "spans" else {"labels": labels}  # noqa: B023
            return model(**read, **given)

        mine = outputs(student)
        spans = config.head.kind == "spans"
        if spans:  # `transformers` lets padding be an answer; here it never is
            ends = (mine.start_logits, mine.end_logits)
            never = (1 - mask) * -1e9
            task = sum(functional.cross_entropy(x + never, labels[:, i]) for i, x in enumerate(ends)) / 2
        else:
            task = mine.loss
        terms = {"task": task} if config.task.task else {}
        if teacher is not None:
            with torch.no_grad():
                their = outputs(teacher)
            heat = config.task.temperature

            def soft(s, t):
                return heat**2 * functional.kl_div(  # noqa: B023
                    functional.log_softmax(s / heat, dim=-1),  # noqa: B023
                    functional.softmax(t / heat, dim=-1),  # noqa: B023
                    reduction="batchmean",
                )

            if spans:
                their_ends = (their.start_logits, their.end_logits)
                terms["soft"] = sum(soft(s + never, t + never) for s, t in zip(ends, their_ends, strict=True)) / 2
            elif config.head.labels == 1:
                terms["soft"] = functional.mse_loss(mine.logits, their.logits)
            else:
                terms["soft"] = soft(mine.logits, their.logits)
        total = sum(getattr(config.task, name) * term for name, term in terms.items())
        adam.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), optimizer.clip)
        yield {name: float(term.detach()) for name, term in (terms | {"loss": total, "gradient_norm": norm}).items()}
        adam.step()
        schedule.step()


def longer(leaf):
    """8 more columns and 8 more rows, all padding."""
    leaf = np.asarray(leaf)
    fill = IGNORED if leaf.dtype == np.int32 and leaf.min() < 0 else 0
    columns = (0, 8) if leaf.shape[1:] == (LENGTH,) else (0, 0)
    return np.pad(leaf, ((0, ROWS), columns)[: leaf.ndim], constant_values=fill)


@pytest.mark.parametrize(
    ("head", "change"),
    [(SEQUENCE, "devices"), (SEQUENCE, "padding"), (TOKENS, "micro-batches"), (TOKENS, "padding"), (SPANS, "padding")],
    ids=lambda value: value if isinstance(value, str) else value.kind,
)
def test_devices_micro_batches_and_padding_change_no_number(head, change):
    """Eight devices, two micro-batches, or wider rows and rows of padding alone: the same losses and parameters."""
    config = step_config(head, 0, TaskLossConfig(0.5, 0.5, 2.0))
    params, teacher_params = start(config.student, head, 1), start(config.teacher, head, 2)

    def train(change):
        used, place, step = config, lambda batch: batch, jax.jit(train_step)
        if change == "micro-batches":
            used = replace(config, accumulation=2)
        if change == "devices":
            mesh = make_mesh(MeshConfig())
            step = jit_step(train_step, mesh, abstract_state(config), jax.eval_shape(lambda: teacher_params))
            place = partial(put_rows, mesh=mesh)
        if change == "padding":
            place = partial(jax.tree.map, longer)
        state, losses = init_state(jax.random.key(0), used, params=params), []
        for batch in padded_batches(head, steps=3):
            state, metrics = step(state, teacher_params, place(as_batch(*batch)))
            losses.append(float(metrics["loss"].value()))
        return losses, jax.device_get(state.params)

    (losses, expected), (result, trained) = train("nothing"), train(change)
    np.testing.assert_allclose(result, losses, rtol=1e-5)
    # So does one on all starts, and one on all ends, of spans.
    assert_params_close(trained, expected, without_gradient=["head/classifier/bias"] if head is SPANS else ())
