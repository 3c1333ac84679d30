"""The comparison of a teacher and its students: tables, files and cards say what the runs reached."""

import json
from statistics import fmean, stdev

import pytest
from test_finetune import QUICK, tasks  # noqa: F401 - a fixture

from distil_jax import cli
from distil_jax.commands import compare as command

SETTINGS = [word for setting in QUICK for word in ("--set", setting)]


@pytest.fixture(scope="module")
def compared(workshop, finished_run, tasks, tmp_path_factory):  # noqa: F811
    output = tmp_path_factory.mktemp("compared")
    words = ["compare", f"teacher={workshop / 'teacher'}", f"student={finished_run}", "--seeds", "0", "1"]
    words += ["--tasks", str(tasks / "sequence.toml"), "--output", str(output), "--distil", "--baseline", *SETTINGS]
    assert cli.main(words) == 0
    return output, words


def test_the_tables_say_what_the_runs_reached(compared):
    output, _ = compared
    found = json.loads((output / "compare.json").read_text())
    page = (output / "compare.md").read_text()
    scores = found["scores"]["sequence"]
    assert list(scores) == ["teacher", "student", "student + its logits", "TF-IDF + linear"]
    for name, folder in (("teacher", "teacher"), ("student", "student"), ("student + its logits", "student-distilled")):
        for seed, score in enumerate(scores[name]):
            run = json.loads((output / "sequence" / folder / str(seed) / "scores.json").read_text())
            assert score == run["test"]["accuracy"]
        line = next(line for line in page.splitlines() if line.startswith(f"| {name} "))
        assert f"{100 * fmean(scores[name]):.1f} ± {100 * stdev(scores[name]):.1f}" in line
    assert scores["TF-IDF + linear"][0] == scores["TF-IDF + linear"][1] > 0.85  # one word decides
    assert found["sizes"]["student"]["parameters"] < found["sizes"]["teacher"]["parameters"]
    assert (output / "compare.png").stat().st_size > 10_000


def test_a_second_call_trains_nothing_and_finds_the_same(compared, capsys):
    output, words = compared
    before = json.loads((output / "compare.json").read_text())
    assert cli.main(words) == 0
    assert capsys.readouterr().out.count("nothing is left to train") == 6
    assert json.loads((output / "compare.json").read_text())["scores"] == before["scores"]


def test_macro_and_what_is_kept():
    sizes = {"big": {"parameters": 10, "bytes": 40, "latency": 2.0, "throughput": 5.0}}
    sizes["small"] = sizes["big"] | {"latency": 1.0, "throughput": 15.0}
    scores = {
        "a": {"big": [0.8, 0.9], "small": [0.6, 0.9]},
        "b": {"big": [0.4, 0.5], "small": [0.3, 0.5], "odd": [1, 1]},
    }
    found = command.Comparison(scores, {"a": "f1", "b": "accuracy"}, {"a": "dev", "b": "test"}, sizes, (0, 1), 16)
    assert found.macro("big") == pytest.approx([0.6, 0.7]) and found.macro("odd") == []
    lines = command.tables(found)
    small = next(line for line in lines if line.startswith("| small"))
    assert "75.0 ± 21.2" in small and "87.5 ± 17.7" in small  # 0.45 / 0.6 and 0.7 / 0.7
    assert next(line for line in lines if line.startswith("| odd")).split("|")[2].strip() == "-"
    assert [line for line in lines if line.startswith("| small")][1].split("|")[-3:-1] == [
        "        2.00 ",
        "         3.00 ",
    ]


def test_a_card_holds_the_newest_tables_once(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("# Mine\n\nText.\n")
    command.into_card(card, ["| old |"])
    command.into_card(card, ["| new |"])
    text = card.read_text()
    assert text.startswith("# Mine\n\nText.\n") and text.count("## Compared") == 1
    assert "| new |" in text and "old" not in text


def test_names_are_told_apart(capsys, tmp_path):
    for models, said in ((("a/x", "b/x"), "Two models"), (("../=y", "z"), "cannot name")):
        assert cli.main(["compare", *models, "--tasks", "sst2", "--output", str(tmp_path / "out")]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "out").exists()
