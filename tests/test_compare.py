"""The tables of a comparison; that they say what real runs reached is seen in test_guide.py."""

import pytest
from matplotlib.figure import Figure
from test_report import texts

from distil_jax import cli
from distil_jax.reporting import comparison


def test_macro_and_what_is_kept():
    sizes = {"big": {"parameters": 10, "bytes": 40, "latency": 2.0, "throughput": 5.0}}
    sizes["small"] = sizes["big"] | {"latency": 1.0, "throughput": 15.0}
    scores = {
        "a": {"big": [0.8, 0.9], "small": [0.6, 0.9]},
        "b": {"big": [0.4, 0.5], "small": [0.3, 0.5], "odd": [1, 1]},
    }
    result = comparison.Comparison(scores, {"a": "f1", "b": "accuracy"}, {"a": "dev", "b": "test"}, sizes, (0, 1), 16)
    assert result.macro("big") == pytest.approx([0.6, 0.7]) and result.macro("odd") == []
    lines = comparison.tables(result)
    small = next(line for line in lines if line.startswith("| small"))
    assert "75.0 ± 21.2" in small and "87.5 ± 17.7" in small  # 0.45 / 0.6 and 0.7 / 0.7
    assert next(line for line in lines if line.startswith("| odd")).split("|")[2].strip() == "–"
    assert [line for line in lines if line.startswith("| small")][1].split("|")[-3:-1] == [
        "          2.00 ",
        "           3.00 ",
    ]


@pytest.mark.parametrize(
    ("teacher", "kept", "named"),
    [
        ({"a": [0.5, 0.5], "b": [0.6, 0.6]}, False, ["a", "b"]),  # the constant's own score
        ({"a": [0.5, 0.8], "b": [0.6, 0.7]}, False, ["a", "b"]),  # above it, but by less than the seeds differ
        ({"a": [0.5, 0.5], "b": [0.8, 0.9]}, True, ["a"]),
        ({"a": [0.8, 0.9], "b": [0.8, 0.9]}, True, []),
    ],
)
def test_nothing_is_kept_of_a_teacher_that_learned_nothing(tmp_path, teacher, kept, named):
    sizes = {name: {"parameters": 10, "bytes": 40, "latency": 2.0, "throughput": 5.0} for name in ("big", "small")}
    constant = {"a": 0.5, "b": 0.6}
    scores = {
        task: {"big": values, "small": [0.5, 0.6], "largest class": [constant[task]] * 2}
        for task, values in teacher.items()
    }
    metrics = dict.fromkeys(scores, "accuracy")
    result = comparison.Comparison(scores, metrics, dict.fromkeys(scores, "dev"), sizes, (0, 1), 16)
    lines = comparison.tables(result)
    for name in ("big", "small", "largest class"):
        line = next(line for line in lines if line.startswith(f"| {name} "))
        assert (line.split("|")[-2].strip() == "–") != kept
    sentences = [line for line in lines if "does not beat the largest class" in line]
    assert len(sentences) == bool(named)
    if named:
        assert f" on {', '.join(named)}: " in sentences[0] and "optimizer.learning_rate" in sentences[0]
        assert ("(–)" in sentences[0]) != kept
    comparison.write(result, lines, tmp_path)  # the picture has no share to draw either


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("tasks", [("sst2",), ("sst2", "rte", "mnli")])
def test_the_picture_holds_all_its_words(tmp_path, monkeypatch, seeds, tasks):
    """Names as long as on the hub, and scores near 100 %."""
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *rest, **more: figures.append(figure) or save(figure, *rest))
    names = (
        "google-bert/bert-base-uncased-finetuned",
        "a-rather-long-name-of-a-student",
        "a-rather-long-name + logits",
    )
    sizes = {
        name: {"parameters": 10, "bytes": 40, "latency": 2.0 - 0.5 * i, "throughput": 5.0}
        for i, name in enumerate(names[:2])
    }
    scores = {task: dict.fromkeys(names, [1.0, 0.98, 0.99][:seeds]) for task in tasks}
    every = dict.fromkeys(tasks, "accuracy"), dict.fromkeys(tasks, "test")
    comparison.write(comparison.Comparison(scores, *every, sizes, tuple(range(seeds)), 16), [], tmp_path)
    (figure,) = figures
    shown, (legend,) = texts(figure), figure.legends
    assert all(min(edges) >= 0 and max(edges) <= 1 for edges in shown.values()), shown
    assert [text.get_text() for text in legend.get_texts()] == [f"{names[0]} (teacher)", *names[1:]]
    assert ("macro" in shown) == (len(tasks) > 1)
    left, right = figure.axes
    assert len(left.containers) == (0 if seeds == 1 else len(names) * len(left.get_xticks())), (
        "bars only where there is spread"
    )
    assert left.get_ylim()[1] <= 100.5 and left.get_ylim()[0] > 90
    assert 97 < right.get_ylim()[0] < 100 < right.get_ylim()[1] < 103
    for axis in figure.axes:
        box = axis.get_window_extent()
        drawn = [axis.transData.transform(line.get_xydata()) for line in axis.get_lines()]
        assert all(box.contains(*point) for points in drawn for point in points)


def test_a_card_holds_the_newest_tables_once(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("# Mine\n\nText.\n")
    comparison.add_to_card(card, ["| old |"])
    comparison.add_to_card(card, ["| new |"])
    text = card.read_text()
    assert text.startswith("# Mine\n\nText.\n") and text.count("## Comparison") == 1
    assert "| new |" in text and "old" not in text


def test_names_are_told_apart(capsys, tmp_path):
    for models, message in ((("a/x", "b/x"), "Two models"), (("../=y", "z"), "cannot name")):
        assert cli.main(["compare", *models, "--tasks", "sst2", "--output", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--distil", "a"], "--distil names a, but the students are b, b-distilled."),
        (["--distil"], "b-distilled is the folder of b with a teacher"),
        (["--set", "seed=1"], "compare sets seed of every run itself"),
        (["--set", "loss.soft=0.9"], "loss.soft needs students with a teacher: add --distil."),
        (["--seeds", "0", "-1"], "A seed must be from 0 to 4,294,967,295, not -1."),
        (["--seeds", "1", "1"], "Each seed may be named once"),
    ],
)
def test_what_would_be_ignored_or_mistaken_is_refused(capsys, tmp_path, words, message):
    models = ["a=distil_jax/teacher", "b=distil_jax/teacher", "b-distilled=distil_jax/teacher"]
    assert cli.main(["compare", *models, "--tasks", "sst2", "--output", str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err
