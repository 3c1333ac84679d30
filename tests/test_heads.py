"""Task heads: PyTorch's numbers, folders that `transformers` opens whole, gradients and dropout that reach them."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import VOCAB, packed_rows, same_leaves
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file, save_file

from distil_jax.config.model import HeadConfig, ModelConfig
from distil_jax.config.run import MeshConfig
from distil_jax.io import huggingface
from distil_jax.io.config_json import from_json, to_json
from distil_jax.io.task_json import head_from_json, head_to_json
from distil_jax.models.encoder import MaskedLm, abstract_params, layers_apart
from distil_jax.models.heads import TaskModel, abstract_task_params, with_fresh_head
from distil_jax.runtime.run_folder import Model
from distil_jax.schema import InputError, build, to_dict
from distil_jax.structs import IGNORED, Batch
from distil_jax.training.sharding import make_mesh, shardings_of
from distil_jax.workflows.export import export

TOKENIZER = Path(__file__).parents[1] / "distil_jax" / "teacher"
HEADS = {"sequence": HeadConfig("sequence", 3), "tokens": HeadConfig("tokens", 5), "spans": HeadConfig("spans")}
SUFFIXES = {"sequence": "SequenceClassification", "tokens": "TokenClassification", "spans": "QuestionAnswering"}
ALL = [(kind, token_types) for kind in HEADS for token_types in (2, 0)]  # 0 token types: a DistilBERT
DIFFERENT = [("sequence", 2), ("sequence", 0), ("tokens", 2)]  # spans are computed as two labels of tokens
SMALL = {"num_layers": 2, "hidden_size": 12, "num_heads": 3, "intermediate_size": 20, "max_positions": 24}


def encoder(token_types: int, **changes: object) -> ModelConfig:
    plain = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "initializer_range": 0.2, "unroll": False}
    return ModelConfig(**{"vocab_size": VOCAB} | SMALL | plain | {"token_types": token_types} | changes)


@functools.cache
def trained(config: ModelConfig) -> dict:
    """What the encoder wants, filled with random numbers."""
    return random_leaves(nn.unbox(abstract_params(config)))


@functools.cache
def random_task_params(config: ModelConfig, head: HeadConfig) -> dict:
    return random_leaves(nn.unbox(abstract_task_params(config, head)))


def random_leaves(shapes: dict) -> dict:
    generator = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: generator.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    params["embeddings"]["word"][VOCAB:128] = 0  # the padding of the smaller vocabulary
    return params


def some_batch(**changes: object) -> Batch:
    rows = packed_rows(4, seed=1)
    return Batch(rows.input_ids, rows.segment_ids, rows.position_ids, rows.input_ids).replace(**changes)


@functools.cache
def compiled(config: ModelConfig, head: HeadConfig, *, train: bool) -> Callable:
    model = TaskModel(config, head)
    return jax.jit(lambda p, b, rngs: model.apply({"params": p}, b, train=train, rngs=rngs))


def apply(config: ModelConfig, head: HeadConfig, params: dict, batch: Batch, key: int | None = None) -> np.ndarray:
    """The logits, in training where there is a key."""
    rngs = None if key is None else {"dropout": jax.random.key(key)}
    with jax.default_matmul_precision("highest"):
        return np.asarray(compiled(replace(config, unroll=False), head, train=key is not None)(params, batch, rngs))


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        huggingface.load_task(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_config(folder: Path, **changes: object) -> None:
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value != "REMOVE"}))


def edit_weights(folder: Path, change: Callable[[dict], dict]) -> None:
    weights = {name: value.copy() for name, value in load_file(folder / "model.safetensors").items()}
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


# Against PyTorch


def torch_model(transformers: ModuleType, token_types: int, kind: str, **changes: object):
    """A small PyTorch model of which every parameter is random, LayerNorms and biases included."""
    import torch

    same = {"vocab_size": 130, "max_position_embeddings": 15, "attn_implementation": "eager"}
    if token_types:
        sizes = {"hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 22}
        config = transformers.BertConfig(**same | sizes | {"type_vocab_size": token_types} | changes)
    else:
        sizes = {"dim": 12, "n_heads": 3, "n_layers": 2, "hidden_dim": 22}
        config = transformers.DistilBertConfig(**same | sizes | changes)
    cls = ("Bert" if token_types else "DistilBert") + "For" + SUFFIXES[kind]
    model = getattr(transformers, cls)(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
            parameter += "LayerNorm.weight" in name or "layer_norm.weight" in name
    return model


def ragged(token_types: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    mask = (np.arange(13) < np.array([13, 1, 7, 12])[:, None]).astype(np.int64)
    inputs = {"input_ids": random.integers(0, 130, (4, 13)), "attention_mask": mask}
    return inputs | ({"token_type_ids": random.integers(0, token_types, (4, 13))} if token_types else {})


def torch_logits(model, inputs: dict[str, np.ndarray]) -> np.ndarray:
    import torch

    with torch.no_grad():
        output = model(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    return (output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits], -1)).numpy()


@pytest.mark.parametrize(("kind", "token_types"), ALL)
def test_we_compute_what_pytorch_computes_and_it_opens_what_we_save(
    kind: str, token_types: int, tmp_path: Path, transformers: ModuleType
) -> None:
    labels = HEADS[kind].labels
    names = tuple(f"name {number}" for number in range(labels)) if kind == "sequence" else ()
    named = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    theirs = torch_model(transformers, token_types, kind, **named if names else {"num_labels": labels})
    theirs.save_pretrained(tmp_path / "theirs")
    config, head, params = huggingface.load_task(tmp_path / "theirs")
    assert (head.kind, head.labels, head.label_names) == (kind, labels, names)
    assert not config.mlm_head and config.pooler == (kind == "sequence" and token_types > 0)

    inputs = ragged(token_types)
    ids, mask, *types = inputs.values()
    expected = torch_logits(theirs, inputs)
    result = apply(config, head, params, Batch.from_padded(ids, mask, np.full(ids.shape, IGNORED), *types))
    assert result.dtype == np.float32 and result.shape == expected.shape
    where = slice(None) if kind == "sequence" else mask.astype(bool)
    np.testing.assert_allclose(result[where], expected[where], rtol=0, atol=1e-5)

    huggingface.save_task(tmp_path / "ours", config, head, params)
    auto = getattr(transformers, f"AutoModelFor{SUFFIXES[kind]}")
    opened, info = auto.from_pretrained(tmp_path / "ours", output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), info
    assert type(opened) is type(theirs) and opened.config.architectures == [type(theirs).__name__]
    assert opened.config.id2label == theirs.config.id2label and opened.config.label2id == theirs.config.label2id
    np.testing.assert_array_equal(torch_logits(opened.eval(), inputs), expected)

    again = huggingface.load_task(tmp_path / "ours")
    assert again[:2] == (config, head) and same_leaves(again[2], params)
    ours, before = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == before.keys() and all(np.array_equal(ours[name], before[name]) for name in ours)


@pytest.mark.parametrize(
    ("kind", "token_types", "changes", "dropout"),
    [
        ("sequence", 2, {"hidden_dropout_prob": 0.3}, 0.3),
        ("sequence", 2, {"classifier_dropout": 0.0}, 0.0),
        ("tokens", 2, {"classifier_dropout": 0.4}, 0.4),
        ("spans", 2, {}, 0.0),
        ("sequence", 0, {}, 0.2),
        ("sequence", 0, {"seq_classif_dropout": 0.4}, 0.4),
        ("tokens", 0, {"dropout": 0.3}, 0.3),
        ("spans", 0, {"qa_dropout": 0.3}, 0.3),
    ],
)
def test_the_heads_dropout_is_that_of_the_file(
    kind: str, token_types: int, changes: dict, dropout: float, transformers: ModuleType
) -> None:
    values = (transformers.BertConfig if token_types else transformers.DistilBertConfig)(**changes).to_dict()
    values["id2label"] = {str(number): name for number, name in values["id2label"].items()}  # as JSON has them
    values["architectures"] = [("Bert" if token_types else "DistilBert") + "For" + SUFFIXES[kind]]
    config = from_json(values, Path("config.json"))
    head = head_from_json(values, Path("config.json"), config)
    assert head == HeadConfig(kind, 2, dropout)
    written = to_json(config, "float32") | head_to_json(config, head)
    assert head_from_json(written, Path("config.json"), config) == head


@pytest.mark.parametrize(
    "named",
    [
        {"id2label": {"0": "neg", "1": "pos"}},
        {"id2label": {"0": "neg", "1": "pos"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}},  # named in one place alone
        {"id2label": {"0": "neg", "1": "pos"}, "label2id": {"neg": 1, "pos": 0}},
        {"id2label": {"0": "neg", "1": "pos"}, "label2id": {"neg": "0", "pos": "1"}},
        {"id2label": {"0": "neg", "1": "pos"}, "label2id": None, "num_labels": 2},
        {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"neg": 0, "pos": 1}},
        {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "num_labels": 3},
        {"id2label": {"10": "k", **{str(n): "abcdefghij"[n] for n in range(10)}}},  # by number, not as they stand
        {"id2label": {"1": "pos", "00": "neg"}},
        {"id2label": {"0": 1, "1": 0}},
        {"label2id": {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}, "num_labels": 3},
        {"id2label": None, "label2id": None, "num_labels": 4},
        {},
    ],
    ids=str,
)
def test_labels_are_called_as_transformers_calls_them(named: dict, tmp_path: Path, transformers: ModuleType) -> None:
    values = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]} | named
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    head = head_from_json(json.loads(path.read_text()), path, encoder(2))
    assert head.labels == theirs.num_labels
    assert dict(enumerate(head.names)) == {number: str(name) for number, name in theirs.id2label.items()}
    written = head_to_json(encoder(2), head)
    assert head_from_json(written, path, encoder(2)) == head


@pytest.mark.parametrize("kind", ["sequence", "regression", "tokens", "spans", "words", "no head"])
def test_the_program_of_a_card_runs(tmp_path: Path, transformers: ModuleType, monkeypatch, capsys, kind: str) -> None:
    config = encoder(0 if kind in ("sequence", "spans") else 2, vocab_size=6144, mlm_head=kind == "words")
    head = {
        "sequence": HeadConfig("sequence", 3),
        "regression": HeadConfig("sequence", 1),
        "tokens": HeadConfig("tokens", 3),
        "spans": HeadConfig("spans", 2),
    }.get(kind)
    params = random_task_params(config, head) if head else trained(config)
    export(Model(config, params, TOKENIZER, head=head), tmp_path / "model")
    (program,) = re.findall(r"```python\n(.*?)```", (tmp_path / "model" / "README.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path / "model")
    exec(compile(program, "README.md", "exec"), {})
    printed = {"sequence": "'score'", "regression": "'score'", "words": "'token_str'", "no head": "torch.Size"}
    assert printed.get(kind, "") in capsys.readouterr().out


def test_pipelines_open_what_we_save(tmp_path: Path, transformers: ModuleType) -> None:
    names = {"sequence": ("good", "bad"), "tokens": ("O", "B-PER", "I-PER")}
    for kind, token_types, task in (("sequence", 0, "text-classification"), ("tokens", 2, "token-classification")):
        config = encoder(token_types, vocab_size=6144)
        head, folder = HeadConfig(kind, len(names[kind]), label_names=names[kind]), tmp_path / kind
        params = random_task_params(config, head)
        huggingface.save_task(folder, config, head, params, tokenizer=TOKENIZER, card="# One")
        assert (folder / "README.md").read_text() == "# One"
        options = {"ignore_labels": []} if kind == "tokens" else {}
        answers = transformers.pipeline(task, str(folder), device="cpu", **options)("the list is empty")
        assert answers and {answer.get("label", answer.get("entity")) for answer in answers} <= set(names[kind])

    # `transformers` 5 has no pipeline for questions, only the model and the tokenizer, which belong together.
    config, head = encoder(0, vocab_size=6144), HEADS["spans"]
    params = random_task_params(config, head)
    huggingface.save_task(tmp_path / "spans", config, head, params, tokenizer=TOKENIZER)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "spans")
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "spans").eval()
    inputs = tokenizer("what is empty", "the list", padding="max_length", max_length=13, return_tensors="np")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    theirs = torch_logits(model, {"input_ids": ids, "attention_mask": mask})
    ours = apply(config, head, params, Batch.from_padded(ids, mask, ids))
    np.testing.assert_allclose(ours[mask > 0], theirs[mask > 0], atol=1e-5)


def test_one_label_is_a_regression(tmp_path: Path, transformers: ModuleType) -> None:
    config, head = encoder(0, vocab_size=6144), HeadConfig("sequence", 1)
    params = random_task_params(config, head)
    huggingface.save_task(tmp_path / "model", config, head, params, tokenizer=TOKENIZER)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["problem_type"] == "regression"
    assert huggingface.load_task(tmp_path / "model")[1] == head
    pipeline = transformers.pipeline("text-classification", str(tmp_path / "model"), device="cpu")
    ids = np.asarray(pipeline.tokenizer("an answer")["input_ids"])[None]
    ours = apply(config, head, params, Batch.from_padded(ids, np.ones_like(ids), ids))
    assert ours.shape == (1, 1)
    np.testing.assert_allclose(pipeline("an answer")[0]["score"], ours[0, 0], atol=1e-5)  # no sigmoid on it


# Parameters


@pytest.mark.parametrize(("kind", "token_types"), DIFFERENT)
def test_a_fresh_head_stands_on_the_encoder_as_it_is(kind: str, token_types: int) -> None:
    config, head = encoder(token_types, hidden_size=48), HEADS[kind]
    student = trained(config)
    params = with_fresh_head(jax.random.key(0), config, head, student)
    assert all(params[name] is student[name] for name in ("embeddings", "layers"))
    fresh = {"head"} | ({"pooler"} if kind == "sequence" and token_types else set())
    assert params.keys() == {"embeddings", "layers"} | fresh
    shapes = nn.unbox(abstract_task_params(config, head))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    for path, leaf in jax.tree_util.tree_leaves_with_path({name: params[name] for name in fresh}):
        if "bias" in jax.tree_util.keystr(path):
            assert not leaf.any()
        else:
            np.testing.assert_allclose(leaf.std(), config.initializer_range, rtol=0.3)


def test_a_trained_pooler_is_kept_where_it_is_read_and_an_old_head_never() -> None:
    config = encoder(2, pooler=True)
    teacher = trained(config)
    params = with_fresh_head(jax.random.key(0), config, HEADS["sequence"], teacher)
    assert params["pooler"] is teacher["pooler"] and params.keys() == {"embeddings", "layers", "pooler", "head"}
    params = with_fresh_head(jax.random.key(1), config, HEADS["tokens"], params)
    assert params.keys() == {"embeddings", "layers", "head"}
    assert params["head"]["classifier"]["bias"].shape == (5,)
    with pytest.raises(InputError, match="no embeddings and no layers"):
        with_fresh_head(jax.random.key(0), config, HEADS["tokens"], {"head": params["head"]})


@pytest.mark.parametrize(("kind", "token_types"), ALL)
def test_a_mesh_lays_out_every_parameter_of_a_task(kind: str, token_types: int) -> None:
    config, head = encoder(token_types), HEADS[kind]
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    whole = shardings_of(abstract_task_params(config, head), mesh)
    alone = shardings_of(abstract_params(head.encoder(config)), mesh)
    assert {name: tree for name, tree in whole.items() if name != "head"} == alone
    assert whole["head"]["classifier"]["kernel"].spec == PartitionSpec("fsdp", None)
    placed = jax.device_put(random_task_params(config, head), whole)
    assert placed["head"]["classifier"]["kernel"].addressable_shards[0].data.shape == (3, head.labels)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": 0}, "labels must be from 1"),
        ({"kind": "tokens", "labels": 1}, "at least 2 labels"),
        ({"kind": "spans", "labels": 3}, "Spans have 2 labels"),
        ({"dropout": 1.0}, r"in \[0, 1\)"),
        ({"label_names": ("a", "a", "b")}, "different names"),
        ({"label_names": ("a",)}, "3 labels need"),
        ({"kind": "pairs"}, "'sequence' or 'tokens' or 'spans'"),
    ],
)
def test_a_head_that_cannot_be_is_refused(changes: dict, words: str) -> None:
    values = to_dict(HeadConfig("sequence", 3, label_names=("a", "b", "c")))
    assert to_dict(build(HeadConfig, values)) == values
    with pytest.raises(InputError, match=words):
        build(HeadConfig, {"kind": "sequence", "labels": 3} | changes)


# What the numbers depend on


@pytest.mark.parametrize(("kind", "token_types"), DIFFERENT)
def test_gradients_reach_the_head_and_the_whole_encoder(kind: str, token_types: int) -> None:
    config, head = encoder(token_types), replace(HEADS[kind], dropout=0.0)
    params, batch = random_task_params(config, head), some_batch()
    if token_types:
        batch = batch.replace(token_type_ids=jnp.arange(batch.input_ids.size).reshape(batch.input_ids.shape) % 2)

    def loss(params: dict) -> jax.Array:
        return jnp.sum(TaskModel(config, head).apply({"params": params}, batch) ** 3)

    for path, gradient in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        stacked = gradient if name.startswith("layers/") else gradient[None]
        if name != "layers/key/bias":  # it shifts every score of a query alike: its true gradient is 0
            assert all(np.abs(part).max() > 1e-6 for part in stacked), name


@pytest.mark.parametrize(("kind", "token_types"), DIFFERENT)
def test_dropout_acts_in_training_only_and_a_rows_own_wherever_it_stands(kind: str, token_types: int) -> None:
    config, still = encoder(token_types), replace(HEADS[kind], dropout=0.0)
    params, batch = random_task_params(config, still), some_batch(row_index=jnp.array([7, 3, 11, 4]))
    head = replace(still, dropout=0.4)
    calm = apply(config, head, params, batch)
    without_key = compiled(config, still, train=True)(params, batch, None)
    np.testing.assert_allclose(without_key, calm, atol=1e-5)
    whole = apply(config, head, params, batch, key=0)
    assert not np.isclose(whole, calm).all(axis=-1).any()
    halves = [jax.tree.map(lambda leaf, half=half: leaf[half], batch) for half in (slice(0, 2), slice(2, 4))]
    cut = [apply(config, head, params, half, key=0) for half in halves]
    np.testing.assert_allclose(np.concatenate(cut), whole, rtol=0, atol=1e-5)
    assert not np.allclose(apply(config, head, params, batch, key=1), whole)


def test_under_a_head_the_encoder_drops_what_it_drops_alone() -> None:
    config, head = encoder(0, hidden_dropout=0.3, attention_dropout=0.3), replace(HEADS["spans"], dropout=0.0)
    params, batch = random_task_params(config, head), some_batch()
    body, key = MaskedLm(head.encoder(config)), {"dropout": jax.random.key(0)}
    alone = jax.jit(lambda p, b: body.apply({"params": p}, b, train=True, rngs=key).hidden)(params, batch)
    last = params["head"]["classifier"]
    np.testing.assert_allclose(
        apply(config, head, params, batch, key=0), alone @ last["kernel"] + last["bias"], atol=1e-5
    )


@pytest.mark.parametrize("kind", ["sequence", "tokens"])
def test_in_bfloat16_the_logits_are_float32_and_close(kind: str) -> None:
    config, head = encoder(2), HEADS[kind]
    params = random_task_params(config, head)
    exact = apply(config, head, params, some_batch())
    rounded = apply(replace(config, dtype="bfloat16"), head, params, some_batch())
    assert rounded.dtype == np.float32 and not np.array_equal(rounded, rounded.astype(jnp.bfloat16).astype(np.float32))
    np.testing.assert_allclose(rounded, exact, atol=0.15)
    np.testing.assert_allclose(apply(config, head, layers_apart(params), some_batch()), exact, atol=1e-5)


# Folders


def test_a_task_folder_is_no_encoder_folder_and_the_other_way_round(tmp_path: Path) -> None:
    config, head = encoder(2), HEADS["tokens"]
    huggingface.save_task(tmp_path / "task", config, head, random_task_params(config, head))
    with pytest.raises(InputError, match="is a model for a task"):
        huggingface.load(tmp_path / "task")
    huggingface.save(tmp_path / "plain", config, trained(config))
    assert "architectures = ['BertForMaskedLM'], which is no task's model" in refusal(tmp_path / "plain")


def test_half_precision_and_a_sinusoidal_table(tmp_path: Path) -> None:
    config, head = encoder(0, positions="sinusoidal"), HEADS["sequence"]
    params = random_task_params(config, head)
    huggingface.save_task(tmp_path / "half", config, head, params, dtype="float16")
    found_config, _, result = huggingface.load_task(tmp_path / "half")
    assert found_config.positions == "sinusoidal" and "position" not in result["embeddings"]
    assert same_leaves(result, jax.tree.map(lambda leaf: leaf.astype(np.float16).astype(np.float32), params))


def test_a_pooler_that_no_head_reads_is_left_out(tmp_path: Path) -> None:
    config, head = encoder(2), HEADS["sequence"]
    huggingface.save_task(tmp_path / "old", config, head, random_task_params(config, head))
    edit_config(tmp_path / "old", architectures=["BertForTokenClassification"])
    found_config, _, result = huggingface.load_task(tmp_path / "old")
    assert not found_config.pooler and result.keys() == {"embeddings", "layers", "head"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": "REMOVE"}, "architectures = None, which is no task's model"),
        ({"architectures": ["DistilBertForSequenceClassification"]}, "or BertForQuestionAnswering"),
        ({"architectures": ["BertForMultipleChoice"]}, "BertForMultipleChoice"),
        ({"architectures": ["BertForQuestionAnswering"]}, "describes no head: Spans have 2 labels"),
        ({"model_type": "roberta"}, "not a BERT"),
        ({"problem_type": "multi_label_classification"}, "problem_type = 'multi_label_classification'"),
        ({"problem_type": "regression"}, "only regression with 1 label"),
        ({"id2label": "REMOVE"}, "classifier.weight is [3, 12] where config.json means [2, 12]"),
        ({"id2label": "REMOVE", "num_labels": "3"}, "num_labels = '3'"),
        ({"num_labels": 4}, "classifier.weight is [3, 12] where config.json means [4, 12]"),
        ({"id2label": {"1": "a", "2": "b", "3": "c"}}, "does not name the labels 0, 1 and so on"),
        ({"id2label": {}}, "does not name the labels 0, 1 and so on"),
        ({"id2label": {"0": "a", "1": "b", "01": "c"}}, "does not name the labels 0, 1 and so on"),
        ({"id2label": 0.1}, "does not name the labels 0, 1 and so on"),
        ({"id2label": ["a", "b", "c"]}, "does not name the labels 0, 1 and so on"),
        ({"id2label": {"0": "a", "1": "b", "2": "b"}, "label2id": None}, "as many different names"),
        ({"id2label": {"0": "a", "2": "b"}}, "does not name the labels 0, 1 and so on"),
        ({"id2label": {"0": "a", "00": "b"}}, "does not name the labels 0, 1 and so on"),
        ({"id2label": {"neg": "neg", "pos": "pos"}}, "does not name the labels 0, 1 and so on"),
        ({"id2label": {"0": "a", "1": None, "2": "c"}}, "does not name the labels 0, 1 and so on"),
        ({"id2label": {"0": "a", "1": "b"}, "num_labels": 3}, "num_labels = 3, but its id2label names 2"),
        ({"id2label": "REMOVE", "label2id": {"a": 0, "b": 1, "c": 2}, "num_labels": 3}, "only in label2id"),
        ({"classifier_dropout": "much"}, "classifier_dropout = 'much'"),
        ({"classifier_dropout": float("nan")}, "dropout must be in [0, 1)"),
    ],
)
def test_a_wrong_task_folder_is_refused(changes: dict, words: str, tmp_path: Path) -> None:
    config, head = encoder(2), HEADS["sequence"]
    huggingface.save_task(tmp_path / "model", config, head, random_task_params(config, head))
    edit_config(tmp_path / "model", **changes)
    message = refusal(tmp_path / "model")
    assert words in message and str(tmp_path) in message


def test_weights_that_are_not_the_heads_are_refused(tmp_path: Path) -> None:
    config, head = encoder(2), HEADS["sequence"]
    params = random_task_params(config, head)
    huggingface.save_task(tmp_path / "model", config, head, params)

    def spoil(weights: dict) -> dict:
        weights["qa_outputs.bias"] = weights.pop("classifier.bias")
        return {name: value for name, value in weights.items() if "pooler" not in name}

    edit_weights(tmp_path / "model", spoil)
    message = refusal(tmp_path / "model")
    assert "are not those of the BertForSequenceClassification" in message
    for problem in ("qa_outputs.bias is unexpected", "classifier.bias is missing", "pooler.dense.bias is missing"):
        assert problem in message

    with pytest.raises(InputError, match="mlm/bias is unexpected"):
        huggingface.save_task(tmp_path / "new", config, head, params | {"mlm": trained(config)["mlm"]})
    with pytest.raises(InputError, match=r"head/classifier/bias is \[3\] and should be \[4\]"):
        huggingface.save_task(tmp_path / "new", config, replace(head, labels=4), params)
    with pytest.raises(InputError, match="not an empty folder"):
        huggingface.save_task(tmp_path / "model", config, head, params)
    assert not (tmp_path / "new").exists()
