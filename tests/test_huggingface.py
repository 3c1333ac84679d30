"""Model folders: exact round trips, PyTorch as the oracle, and a clear refusal of everything else."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from distil_jax.config.model import ModelConfig
from distil_jax.io import huggingface, tensors
from distil_jax.models.encoder import MaskedLm, abstract_params, count_parameters
from distil_jax.schema import InputError
from distil_jax.structs import IGNORED, Batch, sinusoidal_table

# Every size differs from every other, so that no axis can be taken for another.
SMALL = {
    "vocab_size": 130,
    "num_layers": 3,
    "hidden_size": 12,
    "num_heads": 3,
    "intermediate_size": 20,
    "max_positions": 17,
}
BERT = ModelConfig(**SMALL, token_types=2)
DISTILBERT = ModelConfig(**SMALL, token_types=0)
VARIANTS = {
    "bert": BERT,
    "bert body": dataclasses.replace(BERT, mlm_head=False, pooler=True),
    "bert body without pooler": dataclasses.replace(BERT, mlm_head=False),
    "bert, odd values": dataclasses.replace(
        BERT, token_types=5, activation="gelu_tanh", layer_norm_eps=1e-5, hidden_dropout=0.0, pad_token_id=7
    ),
    "distilbert": DISTILBERT,
    "distilbert body": dataclasses.replace(DISTILBERT, mlm_head=False, activation="relu"),
    "distilbert, sinusoidal": dataclasses.replace(DISTILBERT, positions="sinusoidal"),
    "one layer, vocabulary of 128": dataclasses.replace(BERT, num_layers=1, vocab_size=128),
}


def random_params(config: ModelConfig, seed: int = 0) -> dict:
    """What the model itself wants, filled with random numbers and zeros where the vocabulary is padded."""
    random = np.random.default_rng(seed)
    flat = traverse_util.flatten_dict(nn.unbox(abstract_params(config)), sep="/")
    values = {path: random.normal(size=leaf.shape).astype(np.float32) for path, leaf in flat.items()}
    for path in {"embeddings/word", "mlm/bias"} & values.keys():
        values[path][config.vocab_size :] = 0
    return traverse_util.unflatten_dict(values, sep="/")


def assert_equal_trees(result: dict, expected: dict) -> None:
    result, expected = (traverse_util.flatten_dict(tree, sep="/") for tree in (result, expected))
    assert result.keys() == expected.keys()
    for path, value in expected.items():
        assert result[path].dtype == value.dtype, path
        np.testing.assert_array_equal(result[path], value, err_msg=path)


def saved(folder: Path, config: ModelConfig = BERT, seed: int = 0) -> Path:
    huggingface.save(folder, config, random_params(config, seed))
    return folder


def edit_weights(folder: Path, change: Callable[[dict], dict | None]) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights) or weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: object) -> None:
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value != "REMOVE"}))


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        huggingface.load(folder)
    with pytest.raises(InputError) as again:
        huggingface.read_config(folder)
    assert str(again.value) == str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Round trips, without PyTorch


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_round_trip_is_exact(config: ModelConfig, tmp_path: Path) -> None:
    params = random_params(config)
    huggingface.save(tmp_path / "model", config, params)
    found_config, result = huggingface.load(tmp_path / "model")
    assert found_config == config == huggingface.read_config(tmp_path / "model")
    assert_equal_trees(result, params)
    assert huggingface.fingerprint(result) == huggingface.fingerprint(params)


def test_jax_and_numpy_arrays_are_written_alike(tmp_path: Path) -> None:
    params = random_params(BERT)
    fortran = jax.tree.map(np.asfortranarray, params)
    for name, tree in {"numpy": params, "jax": jax.tree.map(jnp.asarray, params), "fortran": fortran}.items():
        huggingface.save(tmp_path / name, BERT, tree)
    files = {path.read_bytes() for path in tmp_path.glob("*/model.safetensors")}
    assert len(files) == 1


def test_the_file_of_a_bert_is_what_pytorch_means_by_it(tmp_path: Path) -> None:
    params = random_params(BERT)
    weights = load_file(saved(tmp_path / "model") / "model.safetensors")
    assert len(weights) == 10 + 16 * BERT.num_layers
    assert weights["bert.embeddings.word_embeddings.weight"].shape == (130, 12)
    assert weights["cls.predictions.bias"].shape == (130,)
    hidden = np.random.default_rng(1).normal(size=12).astype(np.float32)
    layers = params["layers"]
    for ours, theirs in (("query", "attention.self.query"), ("value", "attention.self.value")):
        linear = weights[f"bert.encoder.layer.2.{theirs}.weight"] @ hidden
        ours_HxK = np.einsum("d,dhk->hk", hidden, layers[ours]["kernel"][2])
        np.testing.assert_allclose(linear.reshape(3, 4), ours_HxK, rtol=1e-5, atol=1e-5)
    context = np.random.default_rng(2).normal(size=(3, 4)).astype(np.float32)
    linear = weights["bert.encoder.layer.1.attention.output.dense.weight"] @ context.reshape(12)
    ours = np.einsum("hk,hkd->d", context, layers["attention_output"]["kernel"][1])
    np.testing.assert_allclose(linear, ours, rtol=1e-5, atol=1e-5)
    linear = weights["bert.encoder.layer.0.intermediate.dense.weight"] @ hidden
    np.testing.assert_allclose(linear, hidden @ layers["intermediate"]["kernel"][0], rtol=1e-5, atol=1e-5)


def test_the_files_of_a_distilbert(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", DISTILBERT)
    with safe_open(folder / "model.safetensors", "numpy") as file:
        names = set(file.keys())
        assert file.metadata() == {"format": "pt"}
    assert len(names) == 9 + 16 * DISTILBERT.num_layers
    assert {"distilbert.transformer.layer.2.ffn.lin1.weight", "vocab_projector.bias"} < names
    assert "vocab_projector.weight" not in names
    values = json.loads((folder / "config.json").read_text())
    expected = {"model_type": "distilbert", "vocab_size": 130, "dim": 12, "n_heads": 3, "hidden_dim": 20, "n_layers": 3}
    assert expected.items() <= values.items()
    assert values["architectures"] == ["DistilBertForMaskedLM"]

    body = saved(tmp_path / "body", dataclasses.replace(DISTILBERT, mlm_head=False))
    names = {name for name in names if not name.startswith("vocab_")}
    assert set(load_file(body / "model.safetensors")) == {name.removeprefix("distilbert.") for name in names}
    assert json.loads((body / "config.json").read_text())["architectures"] == ["DistilBertModel"]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_half_precision_files_are_widened(tmp_path: Path) -> None:
    params = random_params(BERT)
    huggingface.save(tmp_path / "half", BERT, params, dtype="float16")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"
    assert {str(value.dtype) for value in load_file(tmp_path / "half" / "model.safetensors").values()} == {"float16"}
    _, result = huggingface.load(tmp_path / "half")
    assert_equal_trees(result, jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), params))

    folder = saved(tmp_path / "brain")
    edit_weights(folder, lambda weights: {name: value.astype(jnp.bfloat16) for name, value in weights.items()})
    _, result = huggingface.load(folder)
    assert_equal_trees(result, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(np.float32), params))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_stored_sinusoidal_table_is_recognised_and_a_changed_one_is_kept(dtype: str, tmp_path: Path) -> None:
    config = dataclasses.replace(DISTILBERT, positions="sinusoidal")
    name = "distilbert.embeddings.position_embeddings.weight"
    folder = saved(tmp_path / "model", config)
    edit_weights(folder, lambda weights: {name: value.astype(jnp.dtype(dtype)) for name, value in weights.items()})
    found_config, result = huggingface.load(folder)
    assert found_config == config
    assert "position" not in result["embeddings"]

    edit_weights(folder, lambda weights: weights | {name: weights[name] + weights[name].dtype.type(0.05)})
    found_config, result = huggingface.load(folder)
    assert found_config == DISTILBERT
    np.testing.assert_array_equal(
        result["embeddings"]["position"], load_file(folder / "model.safetensors")[name].astype(np.float32)
    )


def test_a_bert_with_sinusoidal_positions_is_written_with_its_table(tmp_path: Path) -> None:
    config = dataclasses.replace(BERT, positions="sinusoidal")
    found_config, result = huggingface.load(saved(tmp_path / "model", config))
    assert found_config == BERT
    np.testing.assert_array_equal(result["embeddings"]["position"], sinusoidal_table(17, 12))


def test_the_pooler_gives_way_to_the_mlm_head(tmp_path: Path) -> None:
    config = dataclasses.replace(BERT, pooler=True)
    params = random_params(config)
    huggingface.save(tmp_path / "model", config, params)
    found_config, result = huggingface.load(tmp_path / "model")
    assert found_config == BERT
    assert_equal_trees(result, {name: tree for name, tree in params.items() if name != "pooler"})


def test_tokenizer_and_card_come_along(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer"
    source.mkdir()
    (source / "vocab.txt").write_text("[PAD]\n")
    (source / "tokenizer_config.json").write_text("{}")
    (source / "model.safetensors").write_text("not this one")
    huggingface.save(tmp_path / "deep" / "model", BERT, random_params(BERT), tokenizer=source, card="# Näme\n")
    folder = tmp_path / "deep" / "model"
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer_config.json",
        "vocab.txt",
    }
    assert (folder / "README.md").read_text(encoding="utf-8") == "# Näme\n"
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    huggingface.load(folder)


def test_the_fingerprint_sees_every_change_and_no_order() -> None:
    params = random_params(BERT)
    print_of = huggingface.fingerprint(params)
    assert huggingface.fingerprint(jax.tree.map(jnp.asarray, params)) == print_of
    assert huggingface.fingerprint(dict(reversed(params.items()))) == print_of

    def changed(path: str, change: Callable[[np.ndarray], np.ndarray]) -> str:
        flat = traverse_util.flatten_dict(params, sep="/")
        return huggingface.fingerprint(traverse_util.unflatten_dict(flat | {path: change(flat[path])}, sep="/"))

    others = {
        changed("mlm/bias", lambda x: np.nextafter(x, np.float32(9))),
        changed("layers/query/kernel", lambda x: x.swapaxes(1, 2)),
        changed("layers/query/kernel", lambda x: x.reshape(3, 12, 4, 3)),
        changed("embeddings/word", lambda x: x.astype(jnp.bfloat16)),
        huggingface.fingerprint({**params, "mlm": params["mlm"] | {"renamed": params["mlm"]["bias"]}}),
    }
    assert len(others | {print_of}) == 6


# What a file may look like


def test_legacy_names_prefixes_buffers_and_copies_are_understood(tmp_path: Path) -> None:
    params = random_params(BERT)

    def disguise(weights: dict) -> dict:
        old = {".LayerNorm.weight": ".LayerNorm.gamma", ".LayerNorm.bias": ".LayerNorm.beta"}
        for new, legacy in old.items():
            weights = {name.replace(new, legacy): value for name, value in weights.items()}
        return weights | {
            "bert.embeddings.position_ids": np.arange(17)[None],
            "cls.seq_relationship.weight": np.ones((2, 12), np.float32),
            "cls.seq_relationship.bias": np.ones(2, np.float32),
            "cls.predictions.decoder.weight": weights["bert.embeddings.word_embeddings.weight"],
            "cls.predictions.decoder.bias": weights["cls.predictions.bias"],
        }

    folder = saved(tmp_path / "model")
    edit_weights(folder, disguise)
    edit_config(folder, tie_word_embeddings=False)
    assert "bert.embeddings.LayerNorm.gamma" in load_file(folder / "model.safetensors")
    found_config, result = huggingface.load(folder)
    assert found_config == BERT
    assert_equal_trees(result, params)

    edit_weights(folder, lambda weights: {name.removeprefix("bert."): value for name, value in weights.items()})
    assert_equal_trees(huggingface.load(folder)[1], params)


def test_a_tied_copy_stands_in_for_an_original_that_was_not_written(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")

    def rename(weights: dict) -> None:
        weights["cls.predictions.decoder.weight"] = weights.pop("bert.embeddings.word_embeddings.weight")
        weights["cls.predictions.decoder.bias"] = weights.pop("cls.predictions.bias")

    edit_weights(folder, rename)
    assert_equal_trees(huggingface.load(folder)[1], random_params(BERT))


def shard(folder: Path) -> dict:
    """Cuts model.safetensors in two, returns the index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(weights)}
    for file in set(places.values()):
        save_file({name: weights[name] for name in weights if places[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_shards_are_read_and_may_be_links_out_of_the_folder(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    shard(folder)
    for path in list(folder.glob("*.safetensors")):  # as the hub's cache stores them
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    assert_equal_trees(huggingface.load(folder)[1], random_params(BERT))


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.safetensors", "sub/x.safetensors", "..", "", "/x.safetensors"])
def test_an_index_may_not_lead_out_of_its_folder(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    index = shard(folder)
    index["weight_map"]["cls.predictions.bias"] = name
    shutil.copyfile(next(folder.glob("*.safetensors")), tmp_path / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"names the file {name!r}" in refusal(folder)


def test_an_index_must_be_true(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    index = shard(folder)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {"extra": "model-00001-of-00002.safetensors"}}))
    assert "names extra, which its file does not hold" in refusal(folder)
    path.write_text(json.dumps({"weight_map": ["model.safetensors"]}))
    assert "no weight_map" in refusal(folder)
    path.write_text(json.dumps(index))
    first, second = sorted(folder.glob("*.safetensors"))
    shutil.copyfile(first, second)
    assert "is in several files" in refusal(folder)
    second.unlink()
    assert "model-00002-of-00002.safetensors" in refusal(folder)


# Refusals


def test_missing_unexpected_and_misshapen_tensors_are_listed_together(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")

    def spoil(weights: dict) -> None:
        weights["bert.embeddings.LayerNorm.bias"] = np.zeros(11, np.float32)
        weights["bert.encoder.layer.0.output.dense.weight"] = np.zeros((20, 12), np.float32)
        weights["classifier.weight"] = np.zeros((2, 12), np.float32)
        weights["bert.pooler.dense.bias"] = weights.pop("bert.encoder.layer.1.attention.self.key.bias")
        weights["cls.predictions.bias"] = np.zeros(130, np.int8)

    edit_weights(folder, spoil)
    message = refusal(folder)
    for problem in (
        "embeddings.LayerNorm.bias is [11] where config.json means [12]",
        "encoder.layer.0.output.dense.weight is [20, 12] where config.json means [12, 20]",
        "classifier.weight is unexpected",
        "encoder.layer.1.attention.self.key.bias is missing",
        "pooler.dense.weight is missing",
        "cls.predictions.bias is I8 where a float",
    ):
        assert problem in message
    assert "more" not in message

    edit_weights(folder, lambda weights: {"cls.predictions.bias": weights["cls.predictions.bias"]})
    assert f"; and {10 + 16 * 3 - 10} more" in refusal(folder)


@pytest.mark.parametrize("config", [BERT, DISTILBERT], ids=["bert", "distilbert"])
def test_an_mlm_head_is_whole_or_absent(config: ModelConfig, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", config)
    whole = load_file(folder / "model.safetensors")
    head = [name for name in whole if name.startswith(("cls.", "vocab_"))]
    assert len(head) == 5
    for name in head:
        save_file({key: value for key, value in whole.items() if key != name}, folder / "model.safetensors")
        assert f"({name} is missing)" in refusal(folder)
    save_file({key: value for key, value in whole.items() if key not in head}, folder / "model.safetensors")
    found_config, result = huggingface.load(folder)
    assert found_config == dataclasses.replace(config, mlm_head=False)
    assert "mlm" not in result


def test_an_untied_model_is_refused(tmp_path: Path) -> None:
    for config, copy, original in (
        (BERT, "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        (BERT, "cls.predictions.decoder.bias", "cls.predictions.bias"),
        (DISTILBERT, "vocab_projector.weight", "distilbert.embeddings.word_embeddings.weight"),
    ):
        folder = saved(tmp_path / copy, config)
        edit_weights(folder, lambda weights, copy=copy, original=original: weights | {copy: weights[original] * 1.01})
        assert f"{copy} differs from" in refusal(folder)


@pytest.mark.parametrize("spoiled", ["vocab_projector.weight", "distilbert.embeddings.word_embeddings.weight"])
@pytest.mark.parametrize(("dtype", "bits"), [("F8_E4M3", 8), ("F4", 4), ("F6_E2M3", 6), ("C64", 64), ("I32", 32)])
def test_tied_tensors_of_a_type_that_numpy_lacks_are_refused(
    dtype: str, bits: int, spoiled: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "model", DISTILBERT)
    weights = load_file(folder / "model.safetensors")
    weights["vocab_projector.weight"] = weights["distilbert.embeddings.word_embeddings.weight"]
    header, body = {}, b""
    for name, value in weights.items():
        kind, length = (dtype, value.size * bits // 8) if name == spoiled else ("F32", value.nbytes)
        header[name] = {"dtype": kind, "shape": value.shape, "data_offsets": [len(body), len(body) + length]}
        body += value.tobytes()[:length].ljust(length)
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
    message = refusal(folder)
    assert "vocab_projector.weight differs from" in message or f"word_embeddings.weight is {dtype} where" in message


def test_a_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    edit_weights(folder, lambda w: w | {"embeddings.LayerNorm.gamma": w["bert.embeddings.LayerNorm.weight"]})
    assert "embeddings.LayerNorm.weight under two names" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "roberta"}, "type 'roberta', not a BERT"),
        ({"model_type": "REMOVE"}, "says no model_type"),
        ({"model_type": ["bert"]}, "not a BERT"),
        ({"hidden_act": "silu"}, "hidden_act = 'silu'"),
        ({"hidden_act": ["gelu"]}, "hidden_act = ['gelu']"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
        ({"is_decoder": True}, "is_decoder = True"),
        ({"add_cross_attention": True}, "add_cross_attention = True"),
        ({"hidden_size": "REMOVE", "vocab_size": None}, "lacks vocab_size, hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
        ({"num_hidden_layers": 0}, "describes no model: num_layers must be at least 1"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers = 2.0"),
        ({"hidden_size": -12}, "hidden_size = -12"),
        ({"hidden_size": 10**30}, "hidden_size = 1000000"),
        ({"hidden_size": "12"}, "hidden_size = '12'"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps = nan"),
        ({"num_attention_heads": 5}, "does not divide into 5 heads"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout must be in [0, 1)"),
        ({"type_vocab_size": 0}, "type_vocab_size = 0"),
        ({"num_hidden_layers": 4}, "encoder.layer.3.attention.self.key.bias is missing"),
        ({"num_hidden_layers": 2}, "encoder.layer.2.attention.self.key.bias is unexpected"),
        ({"vocab_size": 131}, "word_embeddings.weight is [130, 12] where config.json means [131, 12]"),
        ({"hidden_size": 9_999}, "is [12] where config.json means [9999]"),
        ({"hidden_size": 9_999_999}, "which no machine holds"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes: dict, words: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    edit_config(folder, **changes)
    message = refusal(folder)
    assert words in message
    assert str(folder) in message


def test_a_config_may_leave_out_what_has_a_default(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    optional = ("hidden_act", "type_vocab_size", "hidden_dropout_prob", "attention_probs_dropout_prob")
    edit_config(
        folder, **dict.fromkeys((*optional, "layer_norm_eps", "initializer_range"), "REMOVE"), pad_token_id=None
    )
    assert huggingface.read_config(folder) == BERT


@pytest.mark.parametrize("text", ["{", "[1]", "\ud800"])
def test_a_config_that_is_no_json_object_is_refused(text: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    (folder / "config.json").write_bytes(text.encode("utf-16", "surrogatepass"))
    assert "config.json" in refusal(folder)
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert "config.json" in refusal(folder)
    (folder / "config.json").unlink()
    assert "has no config.json, so it is no model: name a folder that has" in refusal(folder)


def test_weights_that_are_cut_short_or_absent_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for length in (0, 5, 100, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert "not a whole safetensors file" in refusal(folder)
    file.unlink()
    assert "holds no weights" in refusal(folder)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json", "tokenizer.json"])
def test_a_file_that_git_has_not_fetched_is_called_that(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    folder = saved(tmp_path / "model")
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(POINTER)
    message = refusal(folder) if name != "tokenizer.json" else ""
    if not message:  # it is read by nobody on the way, and must not be handed on
        with pytest.raises(InputError) as caught:
            huggingface.save(tmp_path / "again", *huggingface.load(folder), tokenizer=folder)
        message = str(caught.value)
    assert f"{folder / name} is not the file itself" in message and "`git lfs pull`" in message
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "model.", "student.encoder."])
def test_names_from_a_wrapper_are_not_said_to_be_missing(prefix: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file({prefix + name: value for name, value in weights.items()}, folder / "model.safetensors")
    message = refusal(folder)
    assert f"have {prefix!r} in front of their names" in message and "missing" not in message
    assert "save the model inside the wrapper" in message


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "it is a PEFT adapter; merge it into its model"),
        (["manifest.json", "train/input_ids.npy"], "it holds prepared rows"),
        (["config.toml", "tokenizer/config.json"], "it is a run; write its model with `distil-jax export`"),
        (
            ["modules.json", "0_Transformer/config.json", "0_Transformer/model.safetensors"],
            "one in it, {f}/0_Transformer",
        ),
        (
            ["refs/main", "snapshots/0a/config.json", "snapshots/0a/model.safetensors"],
            "the one in it, {f}/snapshots/0a",
        ),
        (["checkpoint-5/config.json", "checkpoint-5/pytorch_model.bin"], "give the one in it, {f}/checkpoint-5"),
        (["vocab.txt", "notes/config.json"], "name a folder that has"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_folder_that_is_no_model_is_called_what_it_is(files: list[str], words: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    message = refusal(tmp_path)
    assert f"{tmp_path} has no config.json, so it is no model" in message
    assert words.format(f=tmp_path) in message


@pytest.mark.parametrize("name", ["tf_model.h5", "flax_model.msgpack", "pytorch_model-00001-of-00002.bin"])
def test_weights_that_are_not_read_are_named(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / name)
    assert f"has {name}: save it again with save_pretrained()" in refusal(folder)


def test_weights_under_the_name_of_others_are_called_what_they_are(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    folder = saved(tmp_path / "model")
    ours, theirs = folder / "model.safetensors", folder / "pytorch_model.bin"
    ours.rename(theirs)
    assert "is a safetensors file under another name: rename it to model.safetensors" in refusal(folder)
    torch.save({"weight": torch.zeros(2)}, ours)
    assert "is a PyTorch file under another name: rename it to pytorch_model.bin" in refusal(folder)
    ours.unlink()
    torch.save(torch.nn.Linear(2, 2), theirs)
    message = refusal(folder)
    assert "could run code" in message and "state_dict()" in message and "weights_only" not in message


def test_a_shard_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names two.safetensors, which is not there" in refusal(folder)


def test_a_folder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "There is no folder" in refusal(tmp_path / "nowhere")
    file = tmp_path / "file"
    file.touch()
    assert "is a file" in refusal(file)

    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(name: str, **_: object) -> str:
        raise LocalEntryNotFoundError("No route.\nMore.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    assert "There is no folder some/model, and no model of that name came from the Hugging Face hub (No route)" in (
        refusal(Path("some/model"))
    )


def test_a_hub_id_is_downloaded_without_pickles_where_safetensors_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    folder = saved(tmp_path / "model")
    asked = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, "pytorch_model.bin" in allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert huggingface.load("some/model")[0] == BERT
    assert asked == [("some/model", False)]
    (folder / "model.safetensors").unlink()
    assert "holds no weights" in refusal(Path("some/model"))
    assert asked[2] == ("some/model", True)


def test_what_is_not_lawful_is_not_saved(tmp_path: Path) -> None:
    params = random_params(BERT)
    flat = traverse_util.flatten_dict(params, sep="/")
    spoiled = {
        "mlm/bias is missing": {path: value for path, value in flat.items() if path != "mlm/bias"},
        "task/kernel is unexpected": flat | {"task/kernel": np.zeros(2)},
        "mlm/bias is [130] and should be [256]": flat | {"mlm/bias": np.zeros(130)},
        "mlm/bias holds numbers that are not finite": flat | {"mlm/bias": np.full(256, np.nan, np.float32)},
    }
    for words, tree in spoiled.items():
        with pytest.raises(InputError) as caught:
            huggingface.save(tmp_path / "model", BERT, traverse_util.unflatten_dict(tree, sep="/"))
        assert words in str(caught.value)
    with pytest.raises(InputError, match="not finite in float16"):
        huggingface.save(tmp_path / "model", BERT, jax.tree.map(lambda x: x * 1e5, params), dtype="float16")
    with pytest.raises(InputError, match="'int8'"):
        huggingface.save(tmp_path / "model", BERT, params, dtype="int8")
    with pytest.raises(InputError, match="holds no tokenizer"):
        huggingface.save(tmp_path / "model", BERT, params, tokenizer=tmp_path)
    for change in ({"layer_norm_eps": 1e-5}, {"pooler": True, "mlm_head": False}):
        config = dataclasses.replace(DISTILBERT, **change)
        with pytest.raises(InputError, match="saved as a DistilBERT"):
            huggingface.save(tmp_path / "model", config, random_params(config))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    huggingface.save(tmp_path / "model", BERT, random_params(BERT))  # empty: lawful
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with pytest.raises(InputError, match="not an empty folder"):
        huggingface.save(tmp_path / "model", BERT, random_params(BERT, seed=1))
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="not an empty folder"):
        huggingface.save(tmp_path / "file", BERT, random_params(BERT))
    assert {path.name for path in tmp_path.iterdir()} == {"model", "file"}


def test_a_save_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.numpy

    def full_disk(_: dict, path: Path, **__: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(safetensors.numpy, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        huggingface.save(tmp_path / "model", BERT, random_params(BERT))
    assert list(tmp_path.iterdir()) == []


# Against PyTorch


BERTS = [
    {"vocab_size": 130, "hidden_size": 12, "num_attention_heads": 3, "hidden_act": "gelu"},
    {"vocab_size": 37, "hidden_size": 20, "num_attention_heads": 5, "hidden_act": "gelu_new", "type_vocab_size": 3},
    {"vocab_size": 128, "hidden_size": 14, "num_attention_heads": 7, "hidden_act": "relu", "type_vocab_size": 1},
    {"vocab_size": 129, "hidden_size": 16, "num_attention_heads": 1, "hidden_act": "gelu", "layer_norm_eps": 1e-5},
    {"vocab_size": 257, "hidden_size": 9, "num_attention_heads": 9, "hidden_act": "gelu_pytorch_tanh"},
    {"vocab_size": 51, "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 4, "pad_token_id": 5},
    {"vocab_size": 300, "hidden_size": 10, "num_attention_heads": 5, "num_hidden_layers": 1, "intermediate_size": 7},
]
DISTILBERTS = [
    {"vocab_size": 130, "dim": 12, "n_heads": 3, "activation": "gelu"},
    {"vocab_size": 37, "dim": 20, "n_heads": 5, "activation": "relu"},
    {"vocab_size": 128, "dim": 14, "n_heads": 7, "activation": "gelu_new"},
    {"vocab_size": 129, "dim": 16, "n_heads": 1, "sinusoidal_pos_embds": True},
    {"vocab_size": 257, "dim": 9, "n_heads": 9, "dropout": 0.3, "attention_dropout": 0.2},
    {"vocab_size": 51, "dim": 24, "n_heads": 3, "n_layers": 4, "pad_token_id": 5},
    {"vocab_size": 300, "dim": 10, "n_heads": 5, "n_layers": 1, "hidden_dim": 7},
]


def torch_model(transformers: ModuleType, cls: str, seed: int = 0, **changes: object):
    """A small PyTorch model of which every parameter is random, LayerNorms and biases included."""
    import torch

    small = {"max_position_embeddings": 15, "attn_implementation": "eager"}
    if cls.startswith("Distil"):
        config = transformers.DistilBertConfig(
            **{"dim": 12, "n_heads": 3, "n_layers": 2, "hidden_dim": 22} | small | changes
        )
    else:
        sizes = {"hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 22}
        config = transformers.BertConfig(**sizes | small | changes)
    model = getattr(transformers, cls)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    fixed = "position_embeddings" if changes.get("sinusoidal_pos_embds") else "nothing"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if fixed not in name:
                parameter.normal_(0.0, 0.3, generator=generator)
                parameter += "LayerNorm.weight" in name or "layer_norm.weight" in name
    return model


def assert_same_numbers(model, config: ModelConfig, params: dict) -> None:
    """Hidden states and logits agree at every real position of a ragged batch."""
    import torch

    random = np.random.default_rng(0)
    lengths = np.array([13, 1, 7, 12])
    ids = random.integers(0, config.vocab_size, (4, 13))
    mask = (np.arange(13) < lengths[:, None]).astype(np.int64)
    inputs = {"input_ids": ids, "attention_mask": mask}
    types = random.integers(0, config.token_types, (4, 13)) if config.token_types else None
    if types is not None:
        inputs["token_type_ids"] = types
    with torch.no_grad():
        inputs = {name: torch.from_numpy(value) for name, value in inputs.items()}
        hidden = model.base_model(**inputs).last_hidden_state.numpy()
        output = model(**inputs)

    batch = Batch.from_padded(ids, mask, np.full((4, 13), IGNORED), types)
    config = dataclasses.replace(config, unroll=False)
    with jax.default_matmul_precision("highest"):
        encoded = jax.jit(lambda params, batch: MaskedLm(config).apply({"params": params}, batch))(params, batch)
        real = mask.astype(bool)
        np.testing.assert_allclose(np.asarray(encoded.hidden)[real], hidden[real], rtol=0, atol=1e-5)
        if config.mlm_head:
            logits = encoded.features @ encoded.head.kernel.T + encoded.head.bias
            theirs = (output.logits if "logits" in output else output.prediction_logits).numpy()
            assert theirs.shape[-1] == config.vocab_size
            ours = np.asarray(logits)[real][:, : config.vocab_size]
            np.testing.assert_allclose(ours, theirs[real], rtol=0, atol=1e-4)


def assert_opens_whole(transformers: ModuleType, cls: str, folder: Path, expected: dict, **options: object) -> None:
    """`transformers` finds all it wants and nothing else, tied, and bit for bit what it once gave us."""
    model, info = getattr(transformers, cls).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    assert model.config.architectures == [cls]
    state = model.state_dict()
    assert state.keys() <= expected.keys()
    for name, value in state.items():
        assert value.dtype == expected[name].dtype
        np.testing.assert_array_equal(value.numpy(), expected[name].numpy(), err_msg=name)
    if model.get_output_embeddings() is not None:
        embedding = model.get_input_embeddings().weight
        assert model.get_output_embeddings().weight.data_ptr() == embedding.data_ptr()


@pytest.mark.parametrize(
    ("cls", "changes"),
    [("BertForMaskedLM", changes) for changes in BERTS]
    + [("DistilBertForMaskedLM", changes) for changes in DISTILBERTS],
)
def test_we_compute_what_pytorch_computes_and_it_opens_what_we_save(
    cls: str,
    changes: dict,
    tmp_path: Path,
    transformers: ModuleType,
) -> None:
    model = torch_model(transformers, cls, **changes)
    model.save_pretrained(tmp_path / "theirs")
    config, params = huggingface.load(tmp_path / "theirs")
    assert (config.positions == "sinusoidal") == bool(changes.get("sinusoidal_pos_embds"))
    assert_same_numbers(model, config, params)
    assert count_parameters(config) == model.num_parameters()

    huggingface.save(tmp_path / "ours", config, params)
    assert_opens_whole(transformers, cls, tmp_path / "ours", model.state_dict())
    theirs, ours = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "ours"))
    activation = "activation" if "activation" in ours else "hidden_act"
    same = {"gelu_pytorch_tanh": "gelu_new"}
    theirs[activation] = same.get(theirs[activation], theirs[activation])
    assert ours.items() <= theirs.items()


@pytest.mark.parametrize("cls", ["BertModel", "DistilBertModel", "BertForPreTraining"])
def test_bodies_and_pretraining_models(cls: str, tmp_path: Path, transformers: ModuleType) -> None:
    model = torch_model(transformers, cls, vocab_size=130)
    model.save_pretrained(tmp_path / "theirs")
    config, params = huggingface.load(tmp_path / "theirs")
    assert config.mlm_head == (cls == "BertForPreTraining")
    assert config.pooler == cls.startswith("Bert")
    assert_same_numbers(model, config, params)
    huggingface.save(tmp_path / "ours", config, params)
    reopened = "BertForMaskedLM" if cls == "BertForPreTraining" else cls
    assert_opens_whole(transformers, reopened, tmp_path / "ours", model.state_dict())
    if config.pooler:
        pooled = model.base_model.pooler.dense
        np.testing.assert_array_equal(params["pooler"]["kernel"], pooled.weight.detach().numpy().T)
        np.testing.assert_array_equal(params["pooler"]["bias"], pooled.bias.detach().numpy())


def test_a_bert_body_without_pooler_opens_as_such(tmp_path: Path, transformers: ModuleType) -> None:
    model = transformers.BertModel(torch_model(transformers, "BertModel").config, add_pooling_layer=False)
    model.save_pretrained(tmp_path / "theirs")
    config, params = huggingface.load(tmp_path / "theirs")
    assert not config.pooler
    huggingface.save(tmp_path / "ours", config, params)
    expected = model.state_dict()
    assert_opens_whole(transformers, "BertModel", tmp_path / "ours", expected, add_pooling_layer=False)


def test_torch_shards_and_pickles_hold_the_same_model(tmp_path: Path, transformers: ModuleType) -> None:
    import torch

    model = torch_model(transformers, "BertForMaskedLM", vocab_size=130, hidden_size=24)
    model.save_pretrained(tmp_path / "single")
    expected = huggingface.load(tmp_path / "single")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    for dtype, folder in ((torch.float32, "pickle"), (torch.bfloat16, "brain")):
        (tmp_path / folder).mkdir()
        shutil.copyfile(tmp_path / "single" / "config.json", tmp_path / folder / "config.json")
        # A state_dict carries the tied copies, as pickled files on the hub do.
        state = {name: value.to(dtype) for name, value in model.state_dict().items()}
        torch.save(state, tmp_path / folder / "pytorch_model.bin")
    for folder in ("sharded", "pickle"):
        config, params = huggingface.load(tmp_path / folder)
        assert config == expected[0]
        assert_equal_trees(params, expected[1])
    _, params = huggingface.load(tmp_path / "brain")
    assert_equal_trees(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(np.float32), expected[1]))


def test_a_pickle_that_is_more_than_weights_is_refused(tmp_path: Path, transformers: ModuleType) -> None:
    import torch

    folder = shutil.copytree(saved(tmp_path / "whole"), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save({"run": tmp_path}, file)
    assert "could run code" in refusal(folder)
    torch.save({"state": {"a": torch.ones(2)}}, file)
    assert "one dictionary of tensors" in refusal(folder)
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    for spoil in (
        torch.Tensor.to_sparse,
        lambda value: value.to("meta"),
        lambda value: torch.ones(1).expand(value.shape),
    ):
        torch.save({name: spoil(torch.from_numpy(value)) for name, value in weights.items()}, file)
        assert "one dictionary of tensors" in refusal(folder)
    torch.save({0: torch.ones(2)}, file)
    assert "one dictionary of tensors" in refusal(folder)
    for content in (b"", b"junk", file.read_bytes()[:-50]):
        file.write_bytes(content)
        assert "damaged" in refusal(folder)


def test_a_pickle_without_torch_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    folder = saved(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / tensors.PICKLE)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pip install torch" in refusal(folder)


def test_published_parameter_counts() -> None:
    base = {"vocab_size": 30522, "hidden_size": 768, "num_heads": 12, "intermediate_size": 3072, "max_positions": 512}
    assert count_parameters(ModelConfig(**base, num_layers=6, token_types=0, mlm_head=False)) == 66_362_880
    assert count_parameters(ModelConfig(**base, num_layers=6, token_types=0)) == 66_985_530
    assert count_parameters(ModelConfig(**base, num_layers=12)) == 109_514_298
