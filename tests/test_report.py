"""The page and the picture of a run: they show what metrics.jsonl says, and of no other folder anything."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
from conftest import file_hashes
from matplotlib.figure import Figure
from matplotlib.image import imread

from distil_jax import cli
from distil_jax.commands.markdown import table
from distil_jax.config import Config, load
from distil_jax.io.metrics import read_metrics
from distil_jax.schema import build

WIDTH, HEIGHT = 546, 832  # pixels of a panel's column, and of the page


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures that were saved."""
    seen, save = [], Figure.savefig

    def savefig(figure, *rest, **more):
        seen.append(figure)
        save(figure, *rest, **more)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return seen


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    return shutil.copytree(finished_run, tmp_path / "with teacher")


def shortened(run: Path, target: Path, keep) -> Path:
    """A run with only those lines of metrics.jsonl."""
    target.mkdir()
    shutil.copy(run / "config.toml", target)
    shutil.copytree(run / "tokenizer", target / "tokenizer")
    kept = [keep(line) for line in read_metrics(run) if keep(line)]
    (target / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    return target


def without_teacher(line: dict) -> dict:
    return {name: number for name, number in line.items() if name not in ("kl", "cosine", "agreement")}


def panels(figure: Figure) -> dict[str, list]:
    """What is drawn, by title."""
    return {axis.get_title(): axis.get_lines() for axis in figure.axes if axis.axison}


def pixels(picture: Path) -> tuple[int, int]:
    height, width, _ = imread(picture).shape
    return width, height


def test_the_page_of_one_run(run, figures, capsys):
    before = file_hashes(run)
    assert cli.main(["report", str(run)]) == 0
    assert str(run / "report.md") in capsys.readouterr().out
    after = file_hashes(run)
    assert after.keys() - before.keys() == {"report.md", "curves.png"} and before.items() <= after.items()
    page = (run / "report.md").read_text()
    lines = read_metrics(run)
    for line in lines:
        if line["kind"] == "held_out":
            assert all(f"{line[name]:.4f}" in page for name in ("mlm", "kl", "agreement", "accuracy", "perplexity"))
    assert "![curves](curves.png)" in page
    rates = sorted(line["tokens_per_second"] for line in lines if "tokens_per_second" in line)
    assert f"{rates[len(rates) // 2]:,.0f} tokens/s" in page
    (settings,) = re.findall(r"```toml\n(.*?)```", page, re.S)
    assert build(Config, tomllib.loads(settings)) == load(run / "config.toml")


def test_the_curves_show_the_numbers(run, figures):
    assert cli.main(["report", str(run)]) == 0
    drawn = panels(figures[0])
    assert [title.partition(":")[0] for title in drawn] == ["held-out"] * 3 + ["training"] * 3
    assert pixels(run / "curves.png") == (3 * WIDTH, HEIGHT)
    lines = read_metrics(run)
    shown = [("held_out", name) for name in ("mlm", "kl", "agreement")]
    shown += [("train", name) for name in ("kl", "mlm", "cosine")]
    for (curve,), (kind, number) in zip(drawn.values(), shown, strict=True):
        points = [(line["step"], line[number]) for line in lines if line["kind"] == kind]
        assert list(zip(*curve.get_data(), strict=True)) == points


def test_the_page_of_two_runs(run, figures, tmp_path):
    other = shortened(run, tmp_path / "without teacher", without_teacher)
    before = file_hashes(other)
    assert cli.main(["report", str(run), str(other)]) == 0
    assert file_hashes(other) == before, "the report is written into the first"
    page = (run / "report.md").read_text()
    assert "## with teacher\n" in page and "## without teacher\n" in page
    drawn = panels(figures[0])
    counts = {title: len(curves) for title, curves in drawn.items()}
    assert sorted(counts.values()) == [1, 1, 1, 1, 2, 2]  # both have an MLM loss, one has a teacher
    assert all(count == 2 for title, count in counts.items() if "MLM" in title)
    colours = {curve.get_label(): curve.get_color() for curves in drawn.values() for curve in curves}
    assert colours.keys() == {"with teacher", "without teacher"} and len(set(colours.values())) == 2
    (legend,) = figures[0].legends
    assert {text.get_text() for text in legend.get_texts()} == colours.keys()
    assert pixels(run / "curves.png") == (3 * WIDTH, HEIGHT)


def test_a_run_without_a_teacher_has_fewer_panels(run, figures, tmp_path):
    alone = shortened(run, tmp_path / "alone", without_teacher)
    assert cli.main(["report", str(alone)]) == 0
    assert pixels(alone / "curves.png") == (WIDTH, HEIGHT) and len(panels(figures[0])) == 2
    assert "agreement" not in (alone / "report.md").read_text()


@pytest.mark.parametrize("last", [0, 1, 3])
def test_an_unfinished_run_has_a_page_too(run, figures, tmp_path, last):
    """Only the untrained baseline, the first step, or a few; and the line that was being written is left out."""
    short = shortened(run, tmp_path / "short", lambda line: line if line["step"] <= last else {})
    with (short / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 4, "ki')
    assert cli.main(["report", str(short)]) == 0
    page = (short / "report.md").read_text()
    assert ("No throughput yet" in page) == (last < 2)
    assert len(panels(figures[0])) == (3 if last == 0 else 6)
    assert imread(short / "curves.png").std() > 0


def test_updates_that_were_left_out_are_told(run, figures, tmp_path):
    short = shortened(run, tmp_path / "short", lambda line: line)
    assert "left out" not in (cli.main(["report", str(short)]) or (short / "report.md").read_text())
    with (short / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 7, "kind": "skipped", "loss": null, "rows": [3, 5]}\n')
    assert cli.main(["report", str(short)]) == 0
    assert "a number was not finite: at the steps 7." in (short / "report.md").read_text()


@pytest.mark.parametrize(
    "line",
    [
        b"[]",
        b"{",
        b"\xff",
        b"[" * 100_000,
        b"9" * 5_000,
        b'{"kind": "train"}',
        b'{"step": -1, "kind": "train"}',
        b'{"step": 1, "kind": "train", "kl": "low"}',
        b'{"step": 1, "kind": "train", "kl": 1' + b"0" * 400 + b"}",
        b'{"step": 1, "kind": "train", "\\ud800": 1}',
    ],
    ids=range(10),
)
def test_a_damaged_line_is_named(run, capsys, line):
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:3], line, *lines[3:], b""]))
    assert cli.main(["report", str(run)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"distil-jax: Line 4 of {path} is damaged (") and message.count("\n") == 1


def test_wherever_the_file_was_cut_off_the_lines_before_are_read(run):
    path = run / "metrics.jsonl"
    sound, lines = path.read_bytes(), read_metrics(run)
    for length in range(len(sound)):
        path.write_bytes(sound[:length])
        whole = sound[: length + 1].count(b"\n")  # the last line may lack its end
        assert repr(read_metrics(run)) == repr(lines[:whole])


def test_a_number_that_is_missing_is_no_number(run, figures):
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    first = next(line for line in lines if line["kind"] == "held_out")
    del first["perplexity"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cli.main(["report", str(run)]) == 0
    assert "nan" in (run / "report.md").read_text()


def test_numbers_that_cannot_be_drawn(run, capsys):
    path = run / "metrics.jsonl"
    lines = [{"step": step, "kind": "train", "kl": number} for step, number in enumerate([1e308, -1e308, None, 2, 3])]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cli.main(["report", str(run)]) == 0
    path.write_text(json.dumps({"step": 1, "kind": "skipped", "rows": [1]}) + "\n")
    assert cli.main(["report", str(run)]) == 2
    assert "no number to draw yet" in capsys.readouterr().err


def test_what_is_no_run_is_refused(run, workshop, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(run / "config.toml", begun)
    shutil.copytree(run / "tokenizer", begun / "tokenizer")
    (tmp_path / "elsewhere").mkdir()
    twin = shutil.copytree(run, tmp_path / "elsewhere" / run.name)
    before = file_hashes(tmp_path)
    for folders in ([workshop / "teacher"], [tmp_path / "none"], [tmp_path / "empty"], [begun], [run, twin]):
        assert cli.main(["report", *map(str, folders)]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and "Traceback" not in message
    assert file_hashes(tmp_path) == before


def test_tables_line_up():
    head, rows = ["model", "loss", "tokens/s"], [["a", "3.123", "12"], ["the longest name", "10.1", "1,234,567"]]
    lines = table(head, rows)
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    bars = [[place for place, letter in enumerate(line) if letter == "|"] for line in lines]
    assert all(places == bars[0] for places in bars) and len(bars[0]) == 4
    assert [cell.strip() for cell in lines[3].strip("|").split("|")] == rows[1]
    assert re.fullmatch(r"\|-+\|-+:\|-+:\|", lines[1])  # Markdown: numbers to the right
    assert lines[2].startswith("| a  ") and lines[2].endswith(" 12 |")
