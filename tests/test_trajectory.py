"""Thirty steps beside an independent PyTorch implementation of the recipe: every term, at every step."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import pytorch_optimizer, random_params

from distil_jax.config.model import ModelConfig
from distil_jax.config.objective import LossConfig
from distil_jax.config.step import OptimizerConfig, StepConfig
from distil_jax.io import huggingface
from distil_jax.structs import IGNORED, Batch
from distil_jax.training.state import init_state
from distil_jax.training.step import train_step

STEPS, LENGTH, VOCAB = 30, 24, 90


def padded_batches():
    """Fresh batches of one padded sequence a row, with labels, for every step."""
    generator = np.random.default_rng(11)
    for _ in range(STEPS):
        ids = generator.integers(5, VOCAB, (8, LENGTH))
        mask = np.arange(LENGTH) < generator.integers(6, LENGTH + 1, (8, 1))
        labels = np.where(mask & (generator.random((8, LENGTH)) < 0.2), ids, IGNORED)
        yield np.where(labels != IGNORED, 4, ids), mask.astype(np.int32), labels


def test_thirty_steps_as_pytorch_does_them(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    teacher = ModelConfig(
        VOCAB, 4, 32, 4, 48, 32, hidden_dropout=0.0, attention_dropout=0.0, initializer_range=0.2, unroll=False
    )
    config = StepConfig(
        student=replace(teacher, num_layers=2, token_types=0),
        teacher=teacher,
        loss=LossConfig(mse=0.01),
        # The clip is low enough to act, and the warm-up short enough to end.
        optimizer=OptimizerConfig(learning_rate=2e-3, steps=STEPS, warmup=0.2, clip=5.0, weight_decay=0.01),
    )
    params = {"teacher": random_params(teacher, 1), "student": random_params(config.student, 2)}
    for name, model in (("teacher", teacher), ("student", config.student)):
        huggingface.save(tmp_path / name, model, params[name])
    theirs = {
        "teacher": transformers.BertForMaskedLM.from_pretrained(tmp_path / "teacher"),
        "student": transformers.DistilBertForMaskedLM.from_pretrained(tmp_path / "student"),
    }
    expected = list(pytorch_steps(torch, transformers, theirs["teacher"], theirs["student"], config))
    state, step, clipped = init_state(jax.random.key(0), config, params=params["student"]), jax.jit(train_step), 0
    for number, (ids, mask, labels) in enumerate(padded_batches()):
        state, metrics = step(state, params["teacher"], Batch.from_padded(ids, mask, labels))
        result = {name: float(metrics[name].value()) for name in expected[number]}
        for name, value in expected[number].items():
            assert result[name] == pytest.approx(value, rel=1e-4), f"{name} at step {number}"
        clipped += result["gradient_norm"] > config.optimizer.clip
    assert clipped > 0, "the clip never acted, so it was not tested"
    last = theirs["student"].distilbert.transformer.layer[1].attention.q_lin.weight.detach().numpy()
    ours = np.asarray(state.params["layers"]["query"]["kernel"][1]).reshape(32, 32).T
    np.testing.assert_allclose(ours, last, atol=2e-4)


def pytorch_steps(torch, transformers, teacher, student, config):
    """The recipe as its authors wrote it, in PyTorch's own losses and optimiser."""
    from torch.nn import functional

    loss, optimizer = config.loss, config.optimizer
    adam, schedule = pytorch_optimizer(student, optimizer)
    teacher.eval()
    student.train()
    for ids, mask, labels in padded_batches():
        ids, mask, labels = torch.tensor(ids), torch.tensor(mask), torch.tensor(labels)
        with torch.no_grad():
            their = teacher(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        mine = student(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        real = mask.bool()
        s, t = mine.logits[real], their.logits[real]
        hidden_s, hidden_t = mine.hidden_states[-1][real], their.hidden_states[-1][real]
        kl = torch.nn.KLDivLoss(reduction="batchmean")(
            functional.log_softmax(s / loss.temperature, dim=-1), functional.softmax(t / loss.temperature, dim=-1)
        )
        terms = {
            "kl": kl * loss.temperature**2,
            "mlm": torch.nn.CrossEntropyLoss(ignore_index=-100)(mine.logits.view(-1, VOCAB), labels.view(-1)),
            "cosine": torch.nn.CosineEmbeddingLoss()(hidden_s, hidden_t, torch.ones(len(hidden_s))),
            "mse": torch.nn.MSELoss(reduction="sum")(s, t) / len(s),
        }
        total = sum(getattr(loss, name) * term for name, term in terms.items())
        adam.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), optimizer.clip)
        yield {name: float(term.detach()) for name, term in (terms | {"loss": total, "gradient_norm": norm}).items()}
        adam.step()
        schedule.step()
