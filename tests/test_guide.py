"""The README's way from a folder of text and a BERT to a compared student, command by command, on a small scale."""

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import LENGTH, PLACES
from test_finetune import QUICK, tasks  # noqa: F401 - a fixture

from distil_jax import cli

README = (Path(__file__).parents[1] / "README.md").read_text()
SMALLER = {
    "prepare": ["--sequence-length", str(LENGTH), "--held-out", "0.2", "--document", "line", "--min-tokens", "5"],
    "train": ["--set", "train.epochs=0", "--set", "student.num_layers=2", "--set", "train.eval_rows=8"],
    "compare": ["--seeds", "0"],
}


def test_the_guide(workshop, tasks, tmp_path, monkeypatch, capsys):  # noqa: F811
    guide = README.partition("## Distil your own BERT\n")[2].partition("\n## ")[0]
    block = re.search(r"\n((?:    .+\n)+)", guide)[1]
    commands = re.findall(r"^    distil-jax (.+)$", block, re.MULTILINE)
    assert [line.split()[0] for line in commands] == ["prepare", "train", "export", "finetune", "compare"]
    monkeypatch.chdir(tmp_path)
    (task,) = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    Path("my_task.toml").write_text(task)
    Path("train.csv").write_text((tasks / "train.csv").read_text())
    quick = [word for setting in QUICK for word in ("--set", setting)]
    for line in commands:
        line = line.replace("TEXT...", str(workshop / "text.txt")).replace("MY_BERT", str(workshop / "teacher"))
        verb, *words = shlex.split(line)
        words += SMALLER.get(verb, []) + (quick if verb in ("train", "finetune", "compare") else [])
        assert cli.main([verb, *words]) == 0, (line, capsys.readouterr().err)
    page, result = Path("compared/compare.md").read_text(), json.loads(Path("compared/compare.json").read_text())
    assert not re.search(PLACES, page + Path("my_student/README.md").read_text())  # with the comparison in the card
    scores = result["scores"]["my_task"]
    folders = {"teacher": "teacher", "my_student": "my_student", "my_student + its logits": "my_student-distilled"}
    assert (
        list(scores) == [*folders, "TF-IDF + linear", "largest class"] and scores["TF-IDF + linear"][0] > 0.85
    )  # one word decides
    for name, folder in folders.items():
        run = json.loads((Path("compared/my_task") / folder / "0" / "scores.json").read_text())
        assert scores[name] == [run["dev"]["accuracy"]]
        line = next(line for line in page.splitlines() if line.startswith(f"| {name} "))
        assert f" {100 * scores[name][0]:.1f} |" in line
    assert result["sizes"]["my_student"]["parameters"] < result["sizes"]["teacher"]["parameters"]
    assert Path("compared/compare.png").stat().st_size > 10_000
    pytest.importorskip("torch")
    from transformers import pipeline

    (answer,) = pipeline("text-classification", model="tuned/model")("the cat sees the dog")
    assert answer["label"] in ("cat", "other")
