"""What a run is worth and what leaves the house: one set of numbers everywhere, and folders that PyTorch opens."""

from __future__ import annotations

import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import LENGTH, PLACES, file_hashes, random_params, same_leaves
from huggingface_hub import ModelCard

from distil_jax import cli
from distil_jax.config.load import load
from distil_jax.config.model import ModelConfig
from distil_jax.config.run import EMBEDDED_TEACHER
from distil_jax.data import loader
from distil_jax.data.loader import open_rows
from distil_jax.data.manifest import read_manifest
from distil_jax.data.prepare import PrepareConfig, prepare
from distil_jax.data.tokenizer import fingerprint, load_tokenizer
from distil_jax.evaluation.fill_mask import fill_mask
from distil_jax.evaluation.held_out import evaluate
from distil_jax.io import huggingface
from distil_jax.io.metrics import MetricSums, read_metrics
from distil_jax.io.names import short_name, source_name, without_places
from distil_jax.models.encoder import MaskedLm, count_parameters
from distil_jax.objective.vocabulary import logits
from distil_jax.reporting.card import model_card
from distil_jax.runtime.assemble import assemble
from distil_jax.runtime.run_folder import Model, open_model
from distil_jax.schema import InputError
from distil_jax.structs import Batch, Mean
from distil_jax.workflows.export import export
from distil_jax.workflows.train import compile_run

TEXTS = ["the cat hunts the [MASK] in the garden.", "the [MASK] hears the wolf in the house. the dog sees the bear."]


@pytest.fixture(scope="session")
def exported(finished_run, workshop) -> Path:
    """The finished run's student as a model folder."""
    assert cli.main(["export", str(finished_run), str(workshop / "exported")]) == 0
    return workshop / "exported"


@pytest.fixture(scope="session")
def of_the_run(finished_run) -> dict[str, float]:
    """The metrics of the last evaluation of the run."""
    last = [line for line in read_metrics(finished_run) if line["kind"] == "held_out"][-1]
    return {name: number for name, number in last.items() if name not in ("step", "kind")}


def printed(text: str) -> dict[str, float]:
    """The numbers that `distil-jax eval` printed, by name."""
    return {name: float(number.replace(",", "")) for name, number in re.findall(r"^  (\w+) +([\d.,]+)$", text, re.M)}


# eval


def test_eval_of_a_run_gives_the_numbers_of_its_end(finished_run, of_the_run, capsys):
    before = file_hashes(finished_run)
    assert cli.main(["eval", str(finished_run)]) == 0
    captured = capsys.readouterr()
    assert captured.err == f"Compiling the evaluation for rows of {LENGTH} tokens ...\n"
    shown = printed(captured.out)
    assert shown.pop("parameters") == count_parameters(open_model(finished_run).config)
    assert shown.keys() == of_the_run.keys()
    assert shown == pytest.approx(of_the_run, rel=1e-5, abs=6e-5)  # four digits are printed
    assert file_hashes(finished_run) == before, "reading a run changes nothing in it"


def test_eval_of_a_model_folder_gives_the_same(exported, workshop, of_the_run, capsys):
    asked = ["eval", str(exported), "--data", str(workshop / "rows")]
    assert cli.main([*asked, "--teacher", str(workshop / "teacher")]) == 0
    shown = printed(capsys.readouterr().out)
    assert {name: shown[name] for name in of_the_run} == pytest.approx(of_the_run, rel=1e-5, abs=6e-5)
    assert cli.main(asked) == 0
    alone = printed(capsys.readouterr().out)
    assert alone == {name: number for name, number in shown.items() if name not in ("kl", "agreement")}


def test_eval_can_be_short_and_of_an_older_step(finished_run, workshop, of_the_run):
    model, rows = open_model(finished_run, 10), workshop / "rows"
    assert model.step == 10 and open_model(finished_run).step == 12
    teacher = open_model(workshop / "teacher")
    fewer = read_manifest(rows).held_out.rows - 2
    whole, few = (evaluate(model, rows, teacher=teacher, limit=limit) for limit in (0, fewer))
    assert len({whole["kl"], few["kl"], of_the_run["kl"]}) == 3
    assert evaluate(model, rows, teacher=teacher, limit=10**6) == whole


def test_some_held_out_rows_stand_for_all_of_them_whatever_their_sources(tmp_path, monkeypatch):
    """Rows stand in the order of their sources; here the model knows the words of the first one alone."""
    draw = random.Random(0)
    sources = {"animals": ["cat", "dog", "bird", "fish", "horse"], "tools": ["saw", "axe", "drill", "hammer", "wrench"]}
    for name, words in sources.items():
        lines = "\n".join(" ".join(draw.choices(words, k=14)) for _ in range(1000))
        (tmp_path / f"{name}.txt").write_text(lines + "\n")
    texts = tuple(str(tmp_path / f"{name}.txt") for name in sources)
    manifest = prepare(
        PrepareConfig(texts, train_vocabulary=80, sequence_length=16, held_out=0.3, document="line"), tmp_path / "rows"
    )
    config = ModelConfig(manifest.vocab_size, 1, 8, 2, 8, 16, token_types=0)
    params = jax.tree.map(np.zeros_like, random_params(config, 0))
    tokenizer = load_tokenizer(tmp_path / "rows" / "tokenizer")
    params["mlm"]["bias"][tokenizer.convert_tokens_to_ids(sources["animals"])] = 4.0
    model = Model(config, params, tmp_path / "rows" / "tokenizer")
    table = open_rows(tmp_path / "rows", "held_out")
    second = np.isin(table.input_ids, tokenizer.convert_tokens_to_ids(sources["tools"])).any(axis=1)
    monkeypatch.setattr("distil_jax.evaluation.held_out._BATCH_TOKENS", 16 * 16)  # less to compute
    assert not second[:100].any() and 0.4 < second.mean() < 0.6
    whole, few = (evaluate(model, tmp_path / "rows", limit=limit)["mlm"] for limit in (0, 100))
    monkeypatch.setattr(loader, "evaluation_rows", lambda rows, limit: np.arange(limit))
    first = evaluate(model, tmp_path / "rows", limit=100)["mlm"]
    # The rows differ by their source alone: the deviation of a row is that between two values, the first one `first`.
    deviation = (whole - first) * np.sqrt((1 - second.mean()) / second.mean())
    standard_error = deviation / np.sqrt(100)
    assert abs(few - whole) < 2 * standard_error
    assert abs(first - whole) > 8 * standard_error


def test_train_and_eval_judge_by_the_same_masks_whatever_the_training_masks(finished_run, workshop):
    parts = assemble(load(workshop / "run.toml", ["masking.mask=0.2", "masking.random=0", "masking.rate=0.3"]))
    program = compile_run(parts)
    state = program.first_state()
    evaluated = program.evaluator.evaluate(state)
    model = Model(parts.step.student, jax.device_get(state.params), parts.tokenizer)
    teacher = open_model(workshop / "teacher")
    assert evaluated == pytest.approx(evaluate(model, workshop / "rows", teacher=teacher), rel=1e-5)
    # The run with other masks, which begins with the same student, says the same of it.
    untrained = read_metrics(finished_run)[0]
    assert evaluated == pytest.approx({name: untrained[name] for name in evaluated}, rel=1e-5)


def test_sums_lose_nothing_however_many_batches_there_are(monkeypatch):
    fetched, sums, batches = [], MetricSums(), 200
    monkeypatch.setattr(jax, "device_get", lambda tree: fetched.append(tree) or tree)
    sums.add({"mlm": Mean(np.float32(2**26), np.float32(2**26))})
    for number in range(batches):
        sums.add({"mlm": Mean(np.float32(9), np.float32(3))})  # a float32 of 2**26 does not grow by 3
        assert 0 <= number + 2 - len(fetched) <= 20, "some batches late, and not at the end"
    expected = (2**26 + 9 * batches) / (2**26 + 3 * batches)
    assert sums.means() == {"mlm": pytest.approx(expected, rel=1e-12)}


def test_eval_refuses_what_it_cannot_judge(finished_run, exported, workshop, tmp_path, capsys):
    student = open_model(exported)
    body = {name: tree for name, tree in student.params.items() if name != "mlm"}
    huggingface.save(tmp_path / "bare", replace(student.config, mlm_head=False), body, tokenizer=exported)
    short = replace(student.config, max_positions=16)
    huggingface.save(tmp_path / "short", short, random_params(short, 1), tokenizer=exported)
    data = ["--data", str(workshop / "rows")]
    for arguments, words in (
        ([str(exported)], ["--data"]),
        ([str(tmp_path / "bare"), *data], ["no MLM head"]),
        ([str(tmp_path / "short"), *data], ["24", "16", "positions"]),
        ([str(exported), *data, "--teacher", str(tmp_path / "short")], ["24", "16", "positions"]),
        ([str(finished_run), "--step", "7"], ["10", "12", "7"]),
    ):
        assert cli.main(["eval", *arguments]) == 2, arguments
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and all(word in message for word in words), message


# export


def test_the_export_is_the_checkpoint(exported, finished_run, workshop):
    config, params = huggingface.load(exported)
    student = open_model(finished_run)
    assert same_leaves(params, student.params)
    assert (config.num_layers, config.token_types, config.vocab_size) == (2, 0, student.config.vocab_size)
    assert fingerprint(exported) == fingerprint(workshop / "rows" / "tokenizer")


def test_transformers_opens_the_export_and_computes_the_same(exported):
    torch = pytest.importorskip("torch", reason="PyTorch is optional")
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    theirs, told = AutoModelForMaskedLM.from_pretrained(exported, output_loading_info=True)
    assert {name: list(result) for name, result in told.items() if result} == {}
    assert type(theirs).__name__ == "DistilBertForMaskedLM"
    assert theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    encoded = AutoTokenizer.from_pretrained(exported)(TEXTS, padding=True, return_tensors="np")
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    assert mask.min() == 0, "one text is padded"
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()
    ours = open_model(exported)
    output = jax.jit(MaskedLm(ours.config).apply)({"params": ours.params}, Batch.from_padded(ids, mask, ids))
    result = logits(output.features, output.head)[..., : ours.config.vocab_size]
    np.testing.assert_allclose(result[mask == 1], expected[mask == 1], atol=1e-4)


@pytest.mark.parametrize("limit", [8, 512, int(1e30), None, "no file"])
def test_the_exported_tokenizer_promises_no_more_than_the_model_takes(workshop, exported, tmp_path, limit):
    source, positions = (
        shutil.copytree(workshop / "teacher", tmp_path / "source"),
        open_model(exported).config.max_positions,
    )
    path = source / "tokenizer_config.json"
    values = json.loads(path.read_text()) | {"model_max_length": limit, "name_or_path": str(source)}
    path.write_text(json.dumps(values))
    if limit == "no file":
        path.unlink()
    assert cli.main(["export", str(source), str(tmp_path / "model")]) == 0
    assert load_tokenizer(tmp_path / "model").model_max_length == (8 if limit == 8 else positions)
    assert fingerprint(tmp_path / "model") == fingerprint(source)
    assert all(str(tmp_path).encode() not in file.read_bytes() for file in (tmp_path / "model").iterdir())


def test_pytorch_runs_a_long_text_through_what_was_exported(workshop, exported, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is optional")
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    longer = shutil.copytree(exported, tmp_path / "longer")
    config = json.loads((longer / "tokenizer_config.json").read_text())
    (longer / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 512}))
    assert cli.main(["export", str(longer), str(tmp_path / "model")]) == 0
    encoded = AutoTokenizer.from_pretrained(tmp_path / "model")("the cat " * 99, truncation=True, return_tensors="pt")
    assert encoded["input_ids"].shape == (1, open_model(exported).config.max_positions)
    with torch.no_grad():
        AutoModelForMaskedLM.from_pretrained(tmp_path / "model")(**encoded)


def test_the_card_holds_the_real_numbers(exported, finished_run, workshop, of_the_run):
    text = (exported / "README.md").read_text()
    baseline = read_metrics(finished_run)[0]
    for name, number in of_the_run.items():
        assert f"{number:.4f}" in text and f"{baseline[name]:.4f}" in text, name
    student, teacher = open_model(finished_run), open_model(workshop / "teacher")
    for model in (student, teacher):
        assert f"{count_parameters(model.config):,}" in text
    told = ("12 of 12", "16 rows of 24", "kl 5, mlm 2, cosine 1", "temperature 2", "0.003", "text.txt", "`teacher`")
    assert [words for words in told if words not in text] == []
    front = text.split("---\n")[1]
    assert "library_name: transformers" in front and "pipeline_tag: fill-mask" in front


def test_the_head_of_the_card_says_what_is_known_and_no_more(exported, workshop, tmp_path, capsys):
    card = ModelCard.load(exported / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "fill-mask",
        "base_model": "teacher",
        "tags": ["distil_jax", "distillation"],
    }
    assert card.text.strip().startswith("# A 2-layer student of teacher\n"), "not the name of the run's folder"
    # The licence is the user's to give; written again, the model keeps it.
    given = ["--license", "mit", "--language", "en", "--language", "de"]
    assert cli.main(["export", str(exported), str(tmp_path / "licensed"), *given]) == 0
    assert f"hf upload YOUR_NAME/MODEL {tmp_path / 'licensed'}\n" in capsys.readouterr().out
    assert cli.main(["export", str(tmp_path / "licensed"), str(tmp_path / "again")]) == 0
    for name in ("licensed", "again"):
        data = ModelCard.load(tmp_path / name / "README.md").data
        assert (data.license, data.language, data.base_model) == ("mit", ["en", "de"], "teacher")
    (tmp_path / "again" / "README.md").write_text("---\ntags: [\n---\n")
    assert cli.main(["export", str(tmp_path / "again"), str(tmp_path / "third")]) == 2
    assert "begins with lines that are not a card's" in capsys.readouterr().err


def test_nothing_that_is_exported_names_a_place_of_this_machine(exported):
    for file in exported.iterdir():
        assert not re.search(PLACES.encode(), file.read_bytes()), file


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("google-bert/bert-base-cased", "google-bert/bert-base-cased"),
        ("bert-base-uncased", "bert-base-uncased"),
        ("/home/me/tuned/model", "tuned"),
        ("compared/sst2/my_bert/0/model", "my_bert"),
        ("../my_bert/", "my_bert"),
        ("./my_bert", "my_bert"),
        ("/model", "model"),
        ("/data/2024", "2024"),
        (str(EMBEDDED_TEACHER), "distil_jax-teacher"),
        ("", ""),
    ],
)
def test_models_have_names_without_places(path, name):
    assert short_name(path) == name


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("docstrings", "docstrings"),
        ("hub:nyu-mll/glue:sst2:train", "hub:nyu-mll/glue:sst2:train"),
        ("hub:/home/me/texts::train", "hub:texts::train"),
        ("/home/me/texts/*.txt", "*.txt"),
        ("docstrings/a.txt", "a.txt"),
    ],
)
def test_sources_have_names_without_places(source, name):
    assert source_name(source) == name
    if source != "docstrings/a.txt":  # a relative path says nothing of this machine
        assert without_places({"sources": [source]}) == {"sources": [name]}


def test_a_local_folder_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "models" / "bert").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert short_name("models/bert") == "bert"


def test_what_the_text_lost_travels_into_the_card(finished_run, workshop):
    model = open_model(finished_run)
    data = model.metadata["data"]
    assert data["counts"] == read_manifest(workshop / "rows").counts
    lost = {"cut_sequences": 1001, "dropped_short": 1002, "dropped_unknown": 1003, "invalid_lines": 1004}
    lost |= {"left_out_files": 1005, "empty_files": 1006, "empty_records": 1007, "unnamed_fields": 1008}
    for counts, shown in ((lost, True), (dict.fromkeys(lost, 0), False), ({}, False)):
        text = model_card(replace(model, metadata=model.metadata | {"data": data | {"counts": counts}}))
        assert [f"1,00{number} " in text for number in range(1, 9)] == [shown] * 8
    older = {name: value for name, value in data.items() if name != "counts"}
    assert "Of the text" not in model_card(replace(model, metadata=model.metadata | {"data": older}))


def test_an_older_step_is_exported_with_its_own_numbers(finished_run, tmp_path, capsys):
    assert cli.main(["export", str(finished_run), str(tmp_path / "older"), "--step", "10"]) == 0
    _, params = huggingface.load(tmp_path / "older")
    assert same_leaves(params, open_model(finished_run, 10).params)
    assert not same_leaves(params, open_model(finished_run).params)
    text = (tmp_path / "older" / "README.md").read_text()
    lines = {line["step"]: line for line in read_metrics(finished_run) if line["kind"] == "held_out"}
    assert "10 of 12" in text
    assert f"{lines[10]['mlm']:.4f}" in text and f"{lines[12]['mlm']:.4f}" not in text
    (teacher,) = [line for line in read_metrics(finished_run) if line["kind"] == "teacher"]
    row = next(line for line in text.splitlines() if line.startswith("| teacher |"))
    assert f" {teacher['mlm']:.4f} |" in row and f" {teacher['accuracy']:.4f} |" in row and row.count("|") == 7
    assert cli.main(["export", str(finished_run), str(tmp_path / "none"), "--step", "7"]) == 2
    assert not (tmp_path / "none").exists()
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "10" in message and "12" in message


def test_half_precision_on_disk(exported, finished_run, tmp_path):
    assert cli.main(["export", str(finished_run), str(tmp_path / "half"), "--dtype", "float16"]) == 0
    _, params = huggingface.load(tmp_path / "half")
    rounded = jax.tree.map(lambda leaf: leaf.astype(np.float16).astype(np.float32), open_model(finished_run).params)
    assert same_leaves(params, rounded)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path / "half", exported)]
    assert sizes[0] < 0.6 * sizes[1]


def test_a_model_folder_can_be_written_anew(workshop, exported, tmp_path):
    for source in (workshop / "teacher", exported):
        target = tmp_path / source.name
        assert cli.main(["export", str(source), str(target)]) == 0
        assert (target / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
        assert huggingface.load(target)[0] == huggingface.load(source)[0]
        assert f"{count_parameters(huggingface.load(source)[0]):,}" in (target / "README.md").read_text()


def test_nothing_is_overwritten(finished_run, tmp_path, capsys):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    before = file_hashes(tmp_path)
    for target in (tmp_path / "used", tmp_path / "file"):
        assert cli.main(["export", str(finished_run), str(target)]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and str(target) in message
    assert file_hashes(tmp_path) == before


def test_a_run_can_be_exported_when_its_data_and_teacher_are_gone(finished_run, exported, workshop, tmp_path):
    away = {name: workshop / f"away {name}" for name in ("rows", "teacher")}
    for name, path in away.items():
        (workshop / name).rename(path)
    try:
        export(open_model(finished_run), tmp_path / "student")
    finally:
        for name, path in away.items():
            path.rename(workshop / name)
    assert file_hashes(tmp_path / "student") == file_hashes(exported)


def test_a_run_without_a_checkpoint_is_named(finished_run, tmp_path, capsys):
    run = shutil.copytree(finished_run, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    before = file_hashes(run)
    for arguments in (["eval", str(run)], ["export", str(run), str(tmp_path / "student")]):
        assert cli.main(arguments) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and str(run) in message and "checkpoint" in message
    assert file_hashes(run) == before and not (tmp_path / "student").exists()


# Gaps


def test_gaps_are_filled_alike_whichever_side_the_tokenizer_pads(exported, tmp_path):
    left = shutil.copytree(exported, tmp_path / "left")
    values = json.loads((left / "tokenizer_config.json").read_text())
    (left / "tokenizer_config.json").write_text(json.dumps(values | {"padding_side": "left"}))
    assert load_tokenizer(left).padding_side == "left"
    assert fill_mask(open_model(left), TEXTS) == fill_mask(open_model(exported), TEXTS)


def test_gaps_are_filled_with_the_likeliest_words(exported):
    model, tokenizer = open_model(exported), load_tokenizer(exported)
    result = fill_mask(model, TEXTS, best=5)
    assert [len(answers) for answers in result] == [5, 5]
    known = {tokenizer.decode([number]) for number in range(len(tokenizer))}
    for answers in result:
        words, probabilities = zip(*answers, strict=True)
        assert list(probabilities) == sorted(probabilities, reverse=True)
        assert probabilities[-1] > 0 and sum(probabilities) <= 1 + 1e-6
        assert len(set(words)) == 5 and set(words) <= known
    # Alone or beside a longer text: padding says nothing.
    (alone,) = fill_mask(model, TEXTS[:1], best=5)
    assert [word for word, _ in alone] == [word for word, _ in result[0]]
    assert [p for _, p in alone] == pytest.approx([p for _, p in result[0]], rel=1e-4)


def test_gaps_are_those_of_pytorch(exported):
    torch = pytest.importorskip("torch", reason="PyTorch is optional")
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported)
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        scores = AutoModelForMaskedLM.from_pretrained(exported)(input_ids=ids).logits
    likeliest = torch.softmax(scores[0, (ids[0] == tokenizer.mask_token_id).nonzero()[0, 0]], -1).topk(3)
    (result,) = fill_mask(open_model(exported), TEXTS[:1])
    assert [word for word, _ in result] == [tokenizer.decode([number]) for number in likeliest.indices.tolist()]
    assert [p for _, p in result] == pytest.approx(likeliest.values.tolist(), rel=1e-4)


@pytest.mark.parametrize("text", ["the cat.", "the [MASK] and the [MASK].", "the cat " * 20 + "[MASK]."])
def test_texts_without_one_gap_are_refused(exported, text):
    with pytest.raises(InputError, match="exactly one"):
        fill_mask(open_model(exported), [text])
