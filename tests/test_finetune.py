"""Fine-tuning from the command line: what a run reaches, how it goes on, what it leaves, and what it refuses."""

import json
import os
import random
import re
import shutil
import signal

import jax
import numpy as np
import pytest
from conftest import PLACES, file_hashes, run_numbers, same_leaves

from distil_jax import cli
from distil_jax.config.load import load_task
from distil_jax.data.tokenizer import load_tokenizer
from distil_jax.evaluation.tasks import TaskEvaluator, nothing_learned
from distil_jax.io import huggingface
from distil_jax.io.metrics import MetricsWriter, read_metrics
from distil_jax.reporting import report
from distil_jax.runtime.run_folder import open_model
from distil_jax.workflows.finetune import compile_task

ANIMALS = ("cat", "dog", "bird", "fish", "horse", "mouse")
SEQUENCE = """
[task]
train = "{folder}/train.csv"
dev = "{folder}/dev.csv"
test = "{folder}/test.csv"
text = ["text"]
label_names = ["other", "cat"]
metrics = ["accuracy", "f1"]
"""
TOKENS = """
[task]
kind = "tokens"
train = "{folder}/tokens.jsonl"
text = ["words"]
label = "tags"
dev_share = 0.3
"""
SPANS = """
[task]
kind = "spans"
train = "{folder}/spans.jsonl"
text = ["question", "context"]
label = "answers"
dev_share = 0.3
max_length = 384
stride = 128
"""
QUICK = ("train.steps=4", "train.batch_rows=16", "train.tensorboard=false", "optimizer.learning_rate=1e-3")


@pytest.fixture(scope="session")
def tasks(workshop, tmp_path_factory):
    """A folder with three small tasks in the words of the workshop's tokenizer."""
    folder, draw = tmp_path_factory.mktemp("tasks"), random.Random(0)
    for name, count in (("train", 160), ("dev", 40), ("test", 40)):
        lines = ["text,label"]
        for _ in range(count):
            first, second = draw.sample(ANIMALS, 2)
            lines.append(f"the {first} sees the {second},{'cat' if 'cat' in (first, second) else 'other'}")
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    tokens, spans = [], []
    for number in range(60):
        first, second = draw.sample(ANIMALS, 2)
        words = ["the", first, "sees", "the", second]
        tokens.append({"words": words, "tags": ["B-ANIMAL" if word in ANIMALS else "O" for word in words]})
        context = f"{number} the {first} sees the {second}."
        answer = {"text": [second], "answer_start": [context.index(second, context.index("sees"))]}
        spans.append({"question": "who?", "context": context, "answers": answer})
    for name, records in (("tokens", tokens), ("spans", spans)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, text in (("sequence", SEQUENCE), ("tokens", TOKENS), ("spans", SPANS)):
        (folder / f"{name}.toml").write_text(text.format(folder=folder))
    return folder


def finetune(model, task, output, *settings, teacher=None):
    words = ["finetune", str(model), "--task", str(task), "--output", str(output)]
    words += ["--teacher", str(teacher)] if teacher else []
    return cli.main([*words, *(word for setting in settings for word in ("--set", setting))])


LONG = ("train.epochs=6", "train.batch_rows=16", "train.tensorboard=false", "optimizer.learning_rate=3e-3")


@pytest.fixture(scope="session")
def finished(workshop, tasks):
    run = tasks / "finished"
    assert finetune(workshop / "teacher", tasks / "sequence.toml", run, *LONG) == 0
    return run


def test_a_task_is_learnt_and_the_best_checkpoint_is_what_remains(finished, tasks):
    held_out = [line for line in read_metrics(finished) if line["kind"] == "held_out"]
    assert [line["step"] for line in held_out] == [0, *range(10, 61, 10)]  # once an epoch
    best = max(line["accuracy"] for line in held_out[1:])
    assert best > 0.9 > held_out[0]["accuracy"]
    model = open_model(finished)
    assert model.step == next(line["step"] for line in held_out[1:] if line["accuracy"] == best)
    scores = json.loads((finished / "scores.json").read_text())
    assert scores["step"] == model.step and scores["dev"]["accuracy"] == pytest.approx(best)
    assert scores["test"]["accuracy"] > 0.9 and set(scores["test"]) == {"accuracy", "f1", "loss"}
    _, head, params = huggingface.load_task(finished / "model")
    assert head.names == ("other", "cat") and same_leaves(params, model.params)
    kept = {file.name for file in (finished / "tokenizer").iterdir()}
    assert "tokenizer.json" in kept and "model.safetensors" not in kept  # the model it started from is not kept with it
    card = (finished / "model" / "README.md").read_text()
    assert (
        not re.search(PLACES, card) and "base_model: teacher\n" in card and "# teacher fine-tuned on train.csv" in card
    )
    assert f"{scores['test']['f1']:.4f}" in card and "text-classification" in card and "160 examples" in card
    lines = [line.split(",") for line in (tasks / "train.csv").read_text().splitlines()[1:]]
    assert f"- train: {len(lines) - len({*map(tuple, lines)}):,} with the same text as an earlier one" in card


def test_other_cadences_of_saving_deliver_the_same_model(finished, workshop, tasks, tmp_path, capsys):
    """Of the evaluations of the finished run, every tenth step, the best is of none that is due here."""
    run, chosen = tmp_path / "run", open_model(finished)
    assert chosen.step % 7 and chosen.step < 60
    assert finetune(workshop / "teacher", tasks / "sequence.toml", run, *LONG, "train.checkpoint_every=7") == 0
    assert open_model(run).step == chosen.step
    one, other = (huggingface.load_task(folder / "model")[2] for folder in (run, finished))
    assert same_leaves(one, other)
    # A model that is written is not given the numbers of another checkpoint, where its own is lost.
    shutil.rmtree(run / "checkpoints" / str(chosen.step))
    before = file_hashes(run / "model")
    capsys.readouterr()
    assert finetune(workshop / "teacher", tasks / "sequence.toml", run, *LONG, "train.checkpoint_every=7") == 2
    assert f"is the checkpoint of step {chosen.step}" in capsys.readouterr().err
    assert file_hashes(run / "model") == before
    # Nor is it left unsaid, where none is written yet, that an evaluation was better than what is left.
    shutil.rmtree(run / "model")
    lines = [line | ({"accuracy": 2.0} if line["step"] == 20 else {}) for line in read_metrics(run)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert finetune(workshop / "teacher", tasks / "sequence.toml", run, *LONG, "train.checkpoint_every=7") == 0
    assert "Step 20 was better" in capsys.readouterr().out


def test_eval_judges_a_run_and_its_folder_as_the_run_did(finished, tasks, tmp_path, capsys):
    result = json.loads((finished / "scores.json").read_text())
    printed = []
    for split in ("dev", "test"):
        of_model = ", ".join(f"{name} {result[split][name]:.4f}" for name in ("accuracy", "f1", "loss"))
        of_class = ", ".join(f"{name} {result['largest_class'][split][name]:.4f}" for name in ("accuracy", "f1"))
        printed += [f"{split}: {of_model}", f"{split}, largest class (other): {of_class}"]
    turned = (tasks / "sequence.toml").read_text().replace('label_names = ["other", "cat"]', "")
    (tmp_path / "unnamed.toml").write_text(turned)  # found in another order than the model has them
    for model, task in ((finished, tasks / "sequence.toml"), (finished / "model", tmp_path / "unnamed.toml")):
        assert cli.main(["eval", str(model), "--task", str(task)]) == 0
        dev, test, *numbers = capsys.readouterr().out.splitlines()
        assert (
            numbers == printed
            and "cat " in dev
            and re.fullmatch(r"test: .*; \d+ with the same text as a training example", test)
        )


def test_the_largest_class_is_beside_every_score(finished, tasks):
    """Counted in the files: the class is that of the training examples, and it is scored on the others."""
    labels = {
        name: [line.rpartition(",")[2] for line in (tasks / f"{name}.csv").read_text().splitlines()[1:]]
        for name in ("train", "dev", "test")
    }
    assert labels["train"].count("other") > labels["train"].count("cat")
    share = {split: np.mean([label == "other" for label in labels[split]]) for split in ("dev", "test")}
    scores = json.loads((finished / "scores.json").read_text())
    expected = {split: {"accuracy": pytest.approx(share[split]), "f1": 0.0} for split in share}
    assert scores["largest_class"] == expected and scores["constant"] == "other" and scores["only_prediction"] is None
    (line,) = [line for line in read_metrics(finished) if line["kind"] == "largest_class"]
    assert line == {"step": 0, "kind": "largest_class", **expected["dev"]}
    card = (finished / "model" / "README.md").read_text()
    for split, of_class in share.items():
        assert re.search(rf"\| {split}, largest class +\| +{of_class:.4f} \| +0.0000 \| ", card)
    assert "learned nothing" not in card


def test_a_model_with_one_answer_for_everything_is_said_to_have_learned_nothing(finished, tasks, tmp_path, capsys):
    from safetensors.numpy import load_file, save_file

    model = shutil.copytree(finished / "model", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["classifier.bias"] = np.array([0, 1000], np.float32)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert cli.main(["eval", str(model), "--task", str(tasks / "sequence.toml")]) == 0
    sentence = capsys.readouterr().out.splitlines()[-1]
    assert sentence.startswith('Every prediction is "cat", so the model learned nothing. ')
    assert "optimizer.learning_rate" in sentence and "train.epochs" in sentence
    # With a few other answers among them it is no better.
    scores = {"dev": {"accuracy": 0.5, "f1": 0.9}, "test": {"accuracy": 0.4, "f1": 0.9}}
    of_class = {"dev": {"accuracy": 0.5, "f1": 0.0}, "test": {"accuracy": 0.4, "f1": 0.0}}
    assert nothing_learned(scores, of_class, None).startswith("By its accuracy the model is no better than one answer")
    assert nothing_learned(scores | {"test": {"accuracy": 0.6, "f1": 0.0}}, of_class, None) == ""
    # Where every label is the same, one answer is right.
    (tmp_path / "cats.csv").write_text("text,label\n" + "the cat sees the dog,cat\n" * 3)
    cats = (tasks / "sequence.toml").read_text()
    for split in ("dev", "test"):
        cats = cats.replace(str(tasks / f"{split}.csv"), str(tmp_path / "cats.csv"))
    (tmp_path / "cats.toml").write_text(cats)
    assert cli.main(["eval", str(model), "--task", str(tmp_path / "cats.toml")]) == 0
    assert "learned nothing" not in capsys.readouterr().out


def test_its_report_has_the_scores_on_the_test_examples(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw_curves", lambda metrics, path: report.Heading(""))  # matplotlib takes a second
    assert cli.main(["report", str(finished), "--output", str(tmp_path / "out")]) == 0
    scores = json.loads((finished / "scores.json").read_text())
    shown = (tmp_path / "out" / "report.md").read_text().replace("\u00a0", " ")
    assert f"The best checkpoint, that of step {scores['step']}" in shown
    assert re.search(rf"\| test +\| +{scores['test']['accuracy']:.4f} \| +{scores['test']['f1']:.4f} \| ", shown)
    assert re.search(rf"\| test, largest class +\| +{scores['largest_class']['test']['accuracy']:.4f} ", shown)


def test_eval_refuses_another_task_and_what_has_none(finished, tasks, workshop, tmp_path, capsys):
    other = (tasks / "sequence.toml").read_text().replace('["other", "cat"]', '["cat", "other"]')
    (tmp_path / "other.toml").write_text(other)
    for words, printed in (
        ([finished / "model", "--task", tmp_path / "other.toml"], "was fine-tuned on another task"),
        ([finished, "--task", tasks / "tokens.toml"], "was fine-tuned on another task"),
        ([workshop / "teacher", "--task", tasks / "sequence.toml"], "has no head for a task"),
        ([finished, "--task", tasks / "sequence.toml", "--data", "rows"], "leave them out"),
        ([finished], "--task"),
    ):
        assert cli.main(["eval", *map(str, words)]) == 2
        message = capsys.readouterr().err
        assert printed in message and message.count("\n") == 1


def test_a_model_for_a_task_cannot_teach_words(finished, workshop, tmp_path, capsys):
    words = ["train", "distilbert_base_uncased", "--set", f"teacher.path={finished / 'model'}"]
    words += ["--set", f"data.path={workshop / 'rows'}", "--output", str(tmp_path / "run")]
    assert cli.main(words) == 2
    assert "is a model for a task, without the MLM head" in capsys.readouterr().err


def test_the_model_answers_in_a_pipeline_as_it_was_judged(finished, tasks):
    pytest.importorskip("torch")
    from transformers import pipeline

    lines = [line.split(",") for line in (tasks / "test.csv").read_text().splitlines()[1:]]
    classify = pipeline("text-classification", model=str(finished / "model"))
    right = [classify(text)[0]["label"] == label for text, label in lines]
    assert np.mean(right) == pytest.approx(json.loads((finished / "scores.json").read_text())["test"]["accuracy"])


def test_a_run_that_was_stopped_ends_as_the_unbroken_one(finished, workshop, tasks, tmp_path, monkeypatch, capsys):
    write, run = MetricsWriter.write, tmp_path / "run"

    def write_and_stop(self, at, kind, numbers):
        write(self, at, kind, numbers)
        if (at, kind) == (30, "held_out"):
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", write_and_stop)
        assert finetune(workshop / "teacher", tasks / "sequence.toml", run, *LONG) == 75
    shown = capsys.readouterr().out
    assert "MLM" not in shown and shown.count("Compiling the step for rows of") == 1
    assert shown.index("Compiling the evaluation for rows of") < shown.index("step      0  held-out")
    signal.signal(signal.SIGTERM, before)
    assert not (run / "model").exists()
    assert finetune(workshop / "teacher", tasks / "sequence.toml", run, *LONG) == 0
    assert "going on after step 3" in capsys.readouterr().out
    assert same_leaves(open_model(run).params, open_model(finished).params)
    kept = [[line for line in run_numbers(folder) if line["kind"] == "held_out"] for folder in (run, finished)]
    assert kept[0] == kept[1]
    # Once more, and nothing is trained or judged again.
    with monkeypatch.context() as patch:
        patch.setattr(TaskEvaluator, "_predict", None)
        assert finetune(workshop / "teacher", tasks / "sequence.toml", run, *LONG) == 0
    printed = capsys.readouterr().out
    assert "nothing is left to train" in printed and "test, largest class (other): accuracy" in printed
    # Other test examples are judged, whether in another file or in the same one.
    test, result = tmp_path / "test.csv", []
    for label in ("cat", "other"):
        test.write_text(f"text,label\nthe cat sees the dog,{label}\n")
        assert finetune(workshop / "teacher", tasks / "sequence.toml", run, *LONG, f"task.test={test}") == 0
        result.append(json.loads((run / "scores.json").read_text())["test"]["accuracy"])
        card = (run / "model" / "README.md").read_text()
        assert re.search(rf"\| test +\| +{result[-1]:.4f} \|", card)
    assert sorted(result) == [0, 1]
    # Other examples are another run.
    (tmp_path / "other.csv").write_text("text,label\n" + "the cat,cat\nthe dog,other\n" * 80)
    assert finetune(workshop / "teacher", tasks / "sequence.toml", run, *LONG, f"task.train={tmp_path}/other.csv") == 2
    assert "other examples" in capsys.readouterr().err


def test_patience_ends_a_run_that_gets_no_better(workshop, tasks, tmp_path, capsys):
    settings = (
        *QUICK[1:3],
        "optimizer.learning_rate=1e-12",
        "train.epochs=9",
        "train.eval_every=2",
        "train.patience=2",
    )
    for printed in ("the run ends after step 6", "nothing is left to train"):  # the untrained one cannot be had
        assert finetune(workshop / "teacher", tasks / "sequence.toml", tmp_path / "run", *settings) == 0
        assert printed in capsys.readouterr().out
    assert open_model(tmp_path / "run").step == 2


@pytest.mark.parametrize("kind", ["tokens", "spans"])
def test_tokens_and_spans(workshop, finished_run, tasks, tmp_path, kind, capsys):
    """A student without token types, from the run that trained it, and then with a teacher that has them."""
    names = {"tokens": {"entity_f1", "loss"}, "spans": {"span_f1", "loss"}}
    constants = {
        "tokens": r"largest class \(O\): entity_f1 0\.0000$",
        "spans": r"most frequent answer \(\w+\): span_f1",
    }
    task = tasks / f"{kind}.toml"
    assert finetune(workshop / "teacher", task, tmp_path / "teacher", *QUICK) == 0
    assert finetune(finished_run, task, tmp_path / "student", *QUICK, teacher=tmp_path / "teacher" / "model") == 0
    printed = capsys.readouterr().out
    begins = {"tokens": r"^train: B-ANIMAL \d+, O \d+", "spans": r"^train: (\d+) questions in \1 rows"}[kind]
    assert re.search(rf"^dev, {constants[kind]}", printed, re.MULTILINE)
    assert "soft" in printed and re.search(begins, printed, re.MULTILINE) and "\ndev: " in printed
    scores = json.loads((tmp_path / "student" / "scores.json").read_text())
    assert set(scores["dev"]) == names[kind] and all(np.isfinite(number) for number in scores["dev"].values())
    _, head, params = huggingface.load_task(tmp_path / "student" / "model")
    assert head.kind == kind and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert "DistilBert" in json.loads((tmp_path / "student" / "model" / "config.json").read_text())["architectures"][0]


def refusals(workshop, tasks):
    teacher, sequence = workshop / "teacher", tasks / "sequence.toml"
    yield (teacher, sequence), {"teacher": teacher}, "has no head"
    yield (teacher, tasks / "tokens.toml"), {"teacher": tasks / "finished" / "model"}, "was fine-tuned on another task"
    yield (teacher, "no_such_task"), {}, "sst2"
    yield (tasks, sequence), {}, "config.json"
    yield (teacher, sequence, "task.train=absent.csv"), {}, "absent.csv"
    yield (teacher, sequence, "task.label=kind"), {}, "label"
    yield (teacher, sequence, "loss.soft=1"), {}, "teacher.path"
    yield (teacher, sequence, "task.metrics=['span_f1']"), {}, "span_f1"
    yield (teacher, sequence, "train.batch_rows=12"), {}, "train.batch_rows"
    yield (teacher, tasks / "three.toml"), {}, '"f1" needs two labels, and this task has 3'
    yield (tasks / "more_tokens", sequence), {}, "resize the model's embedding"


def test_what_cannot_be_is_one_sentence_and_writes_nothing(finished, workshop, tasks, tmp_path, capsys):
    (tasks / "three.csv").write_text("text,label\n" + "the cat,a\nthe dog,b\nthe bird,c\n" * 9)
    (tasks / "three.toml").write_text(
        f'[task]\ntrain = "{tasks}/three.csv"\ndev = "{tasks}/three.csv"\nmetrics = ["f1"]\n'
    )
    shutil.copytree(workshop / "teacher", tasks / "more_tokens")
    tokenizer = load_tokenizer(workshop / "teacher")
    tokenizer.add_tokens(["zyzzyva", "zyzzyvas"])
    tokenizer.save_pretrained(tasks / "more_tokens")
    for number, (words, options, printed) in enumerate(refusals(workshop, tasks)):
        output = tmp_path / str(number)
        assert finetune(*words[:2], output, *words[2:], **options) == 2, printed
        message = capsys.readouterr().err
        assert printed in message and message.count("\n") == 1
        assert not output.exists()


def test_a_teacher_and_a_model_may_have_one_tokenizer_in_two_forms(finished, workshop, tasks, tmp_path, capsys):
    vocabulary = load_tokenizer(workshop / "teacher").get_vocab()
    words = sorted(vocabulary, key=vocabulary.get)
    for name, lines in (("same", words), ("turned", [*words[:5], *words[:4:-1]])):
        folder = shutil.copytree(finished / "model", tmp_path / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).unlink()
        (folder / "vocab.txt").write_text("\n".join(lines))
    named = [f'model.path="{workshop}/teacher"', "loss.soft=0.5", "loss.task=0.5"]
    program, *_ = compile_task(load_task(tasks / "sequence.toml", [*named, f'teacher.path="{tmp_path}/same"']))
    assert program.step_config.teacher is not None
    assert finetune(workshop / "teacher", tasks / "sequence.toml", tmp_path / "run", teacher=tmp_path / "turned") == 2
    assert "different tokenizers" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_runs_of_both_commands_are_told_apart(finished, finished_run, workshop, tasks, tmp_path, capsys):
    assert finetune(workshop / "teacher", tasks / "sequence.toml", finished_run, *QUICK) == 2
    assert "another command" in capsys.readouterr().err
    assert cli.main(["train", str(workshop / "run.toml"), "--output", str(finished)]) == 2
    assert "another command" in capsys.readouterr().err
    assert cli.main(["eval", str(finished), "--data", str(workshop / "rows")]) == 2
    assert "--task" in capsys.readouterr().err
    assert cli.main(["export", str(finished), str(tmp_path / "again")]) == 0
    assert same_leaves(huggingface.load_task(tmp_path / "again")[2], huggingface.load_task(finished / "model")[2])


def test_its_report_shows_the_tasks_own_numbers(finished):
    assert cli.main(["report", str(finished)]) == 0
    page, drawn = (finished / "report.md").read_text(), (finished / "report.html").read_text()
    assert not re.search(PLACES, page + drawn) and "teacher, fine-tuned on train.csv" in page
    held_out = [line for line in read_metrics(finished) if line["kind"] == "held_out"]
    first, last = (f"{100 * line['accuracy']:.1f} %" for line in (held_out[0], held_out[-1]))
    assert f"accuracy {first} → {last}" in page.replace("\u00a0", " ") and "Masked words" not in page
    for title in ("held-out: accuracy", "held-out: f1", "training: loss on the labels"):
        assert title in drawn
    assert "| largest class |" in page and drawn.count(">largest class</text>") == 2, "in both held-out panels"
    scores = json.loads((finished / "scores.json").read_text())
    for split in ("dev", "test"):
        of_class = scores["largest_class"][split]["accuracy"]
        assert re.search(rf"\| {split} +\| +{scores[split]['accuracy']:.4f} \|", page)
        assert re.search(rf"\| {split}, largest class +\| +{of_class:.4f} \|", page)
