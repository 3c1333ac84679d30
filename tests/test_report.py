"""The two pages and the picture of a run: they show the metrics of metrics.jsonl, and predictions for masked words."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import tomllib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import PLACES, file_hashes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from distil_jax import cli
from distil_jax.config.load import load
from distil_jax.config.run import Config
from distil_jax.data.tokenizer import load_tokenizer
from distil_jax.evaluation.fill_mask import fill_mask
from distil_jax.io.metrics import format_number, read_metrics
from distil_jax.reporting import masked_words, report
from distil_jax.reporting.curves import PANELS, draw_curves
from distil_jax.reporting.history import format_count, format_duration, history
from distil_jax.reporting.markdown import table
from distil_jax.reporting.masked_words import held_out_examples
from distil_jax.reporting.page import Code, Curves, Fold, Heading, Paragraph, Table, panel_spans, to_html, to_markdown
from distil_jax.runtime.run_folder import open_model
from distil_jax.schema import build

WIDTH, HEIGHT = 546, 377  # pixels of a panel in the picture


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures that were saved: the picture, and then a panel of it each."""
    seen, save = [], Figure.savefig

    def savefig(figure, *rest, **more):
        seen.append(figure)
        save(figure, *rest, **more)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return seen


@pytest.fixture
def without_curves(monkeypatch) -> None:
    """matplotlib takes a second or two, and most of a page is not drawn."""
    monkeypatch.setattr(report, "draw_curves", lambda metrics, path: Curves(path.name))


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
    if line["kind"] == "teacher":
        return {}
    return {name: number for name, number in line.items() if name not in ("kl", "cosine", "agreement")}


def panels(figure: Figure) -> dict[str, list]:
    """What is drawn, by title."""
    return {axis.get_title("left"): axis.get_lines() for axis in figure.axes if axis.axison}


def curves_of(lines: list) -> list:
    """The curves of a panel, without the dashed lines that they are read against."""
    return [line for line in lines if not line.get_label().startswith("_")]


def pixels(picture: Path) -> tuple[int, int]:
    height, width, _ = imread(picture).shape
    return width, height


def test_the_page_of_one_run(run, figures, capsys):
    before = file_hashes(run)
    assert cli.main(["report", str(run)]) == 0
    shown = capsys.readouterr().out
    assert str(run / "report.md") in shown and shown.startswith("Drawing the curves ...\nAsking the models for masked")
    after = file_hashes(run)
    assert (
        after.keys() - before.keys() == {"report.md", "report.html", "curves.png"} and before.items() <= after.items()
    )
    page = (run / "report.md").read_text()
    lines = read_metrics(run)
    for line in lines:
        if line["kind"] == "held_out":
            assert all(f"{line[name]:.4f}" in page for name in ("mlm", "kl", "agreement", "accuracy", "perplexity"))
    assert "![curves](curves.png)" in page
    rates = sorted(line["tokens_per_second"] for line in lines if "tokens_per_second" in line)
    assert f" {rates[len(rates) // 2]:,.0f} |" in page and f" {rates[-1]:,.0f} |" in page
    (settings,) = re.findall(r"```toml\n(.*?)```", page, re.S)
    written = load(run / "config.toml")  # with the paths of this machine, which a page does not show
    shown = replace(written, data=replace(written.data, path="rows"), teacher=replace(written.teacher, path="teacher"))
    assert build(Config, tomllib.loads(settings)) == shown
    for shared in (page, (run / "report.html").read_text()):
        assert not re.search(PLACES, shared)


def test_the_curves_show_the_numbers(run, figures, tmp_path):
    run = shortened(run, tmp_path / "without checkpoints", lambda line: line)
    assert cli.main(["report", str(run)]) == 0
    drawn = panels(figures[0])
    assert [title.partition(":")[0] for title in drawn] == ["held-out"] * 4 + ["training"] * 4
    assert pixels(run / "curves.png") == (3 * WIDTH, 3 * HEIGHT)
    lines = read_metrics(run)
    shown = [("held_out", name) for name in ("agreement", "mlm", "kl", "accuracy")]
    shown += [("train", name) for name in ("mlm", "kl", "cosine", "tokens_per_second")]
    (teacher,) = [line for line in lines if line["kind"] == "teacher"]
    for panel, (kind, number) in zip(drawn.values(), shown, strict=True):
        (curve,) = curves_of(panel)
        dashed = [line.get_ydata() for line in panel if line is not curve]
        assert dashed == ([[teacher[number]] * 2] if kind == "held_out" and number in teacher else [])
        points = [(line["step"], line[number]) for line in lines if line["kind"] == kind and number in line]
        assert list(zip(*curve.get_data(), strict=True)) == points
    assert [list(panels(figure)) for figure in figures[1:]] == [[title] for title in drawn], "the same in HTML"


def test_the_page_of_two_runs(run, figures, tmp_path):
    other = shortened(run, tmp_path / "without teacher", without_teacher)
    before = file_hashes(other)
    assert cli.main(["report", str(run), str(other)]) == 0
    assert file_hashes(other) == before, "the report is written into the first"
    page = (run / "report.md").read_text()
    assert "## with teacher\n" in page and "## without teacher\n" in page
    drawn = panels(figures[0])
    drawn = {title: curves_of(lines) for title, lines in drawn.items()}
    counts = {title: len(curves) for title, curves in drawn.items()}
    assert sorted(counts.values()) == [1] * 4 + [2] * 4  # both have an MLM loss, one has a teacher
    assert all(result == 2 for title, result in counts.items() if "MLM" in title)
    colours = {curve.get_label(): curve.get_color() for curves in drawn.values() for curve in curves}
    assert colours.keys() == {"with teacher", "without teacher"} and len(set(colours.values())) == 2
    (legend,) = figures[0].legends
    assert {text.get_text() for text in legend.get_texts()} == colours.keys()


def test_a_run_without_a_teacher_has_fewer_panels(run, figures, tmp_path):
    alone = shortened(run, tmp_path / "alone", without_teacher)
    assert cli.main(["report", str(alone)]) == 0
    assert pixels(alone / "curves.png") == (3 * WIDTH, 2 * HEIGHT) and len(panels(figures[0])) == 4
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
    assert len(panels(figures[0])) == {0: 4, 1: 7, 3: 8}[last]
    assert f"{last} of 12 steps" in page and f"Not finished: {100 * last / 12:.0f} % of the steps" in page
    assert ("The time per step is not known yet" in page) == (last < 2)
    assert "No examples: the run has no checkpoint yet." in page
    assert imread(short / "curves.png").std() > 0


def test_updates_that_were_left_out_are_told(run, without_curves, tmp_path):
    short = shortened(run, tmp_path / "short", lambda line: line)
    assert "skipped" not in (cli.main(["report", str(short)]) or (short / "report.md").read_text())
    with (short / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 7, "kind": "skipped", "loss": null, "rows": [3, 5]}\n')
    assert cli.main(["report", str(short)]) == 0
    assert "because the loss or a gradient was not finite, at the steps 7." in (short / "report.md").read_text()


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
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:5]))  # one of each kind
    sound, lines = path.read_bytes(), read_metrics(run)
    for length in range(len(sound)):
        path.write_bytes(sound[:length])
        whole = sound[: length + 1].count(b"\n")  # the last line may lack its end
        assert repr(read_metrics(run)) == repr(lines[:whole])


def test_a_number_that_is_missing_is_no_number(run, without_curves, tmp_path):
    run = shortened(run, tmp_path / "without checkpoints", lambda line: line)
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    first = next(line for line in lines if line["kind"] == "held_out")
    del first["perplexity"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cli.main(["report", str(run)]) == 0
    assert "nan" in (run / "report.md").read_text()


def test_numbers_that_cannot_be_drawn(run, capsys, tmp_path):
    run = shortened(run, tmp_path / "without checkpoints", lambda line: line)
    path = run / "metrics.jsonl"
    lines = [{"step": step, "kind": "train", "kl": number} for step, number in enumerate([1e308, -1e308, None, 2, 3])]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cli.main(["report", str(run)]) == 0
    path.write_text(json.dumps({"step": 1, "kind": "skipped", "rows": [1]}) + "\n")
    assert cli.main(["report", str(run)]) == 2
    assert "no metrics to draw yet" in capsys.readouterr().err


def test_what_is_no_run_is_refused(run, workshop, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    started = tmp_path / "begun"
    started.mkdir()
    shutil.copy(run / "config.toml", started)
    shutil.copytree(run / "tokenizer", started / "tokenizer")
    (tmp_path / "elsewhere").mkdir()
    twin = shutil.copytree(run, tmp_path / "elsewhere" / run.name)
    before = file_hashes(tmp_path)
    for folders in ([workshop / "teacher"], [tmp_path / "none"], [tmp_path / "empty"], [started], [run, twin]):
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
    lines = table(["sentence", "word", "n"], [["a", "b", "1"]], text_columns=2)
    assert lines[1] == "|----------|------|--:|" and lines[2] == "| a        | b    | 1 |"


class Reader(HTMLParser):
    """Reads a page and notices what does not belong together; `text` is what a person sees."""

    VOID = ("meta",)

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.seen, self.attributes, self.text = [], [], [], ""
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


@pytest.fixture(scope="module")
def reported(finished_run, tmp_path_factory) -> Path:
    """A finished run with its report; not to be written into."""
    run = shutil.copytree(finished_run, tmp_path_factory.mktemp("reported") / "run")
    assert cli.main(["report", str(run)]) == 0
    return run


def table_under(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table after a heading of the Markdown, without its head."""
    after = page.partition(f"## {heading}\n")[2].splitlines()
    rows = [line for line in after if line.startswith("|")]
    rows = rows[: next((i for i, line in enumerate(after[after.index(rows[0]) :]) if not line.startswith("|")))]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows[2:]]


def test_both_pages_say_the_same(reported):
    reader = Reader((reported / "report.html").read_text())
    seen = " ".join(reader.text.split())
    page = re.sub(r"\\([^\w\s])", r"\1", (reported / "report.md").read_text())
    page = page.replace("![curves](curves.png)", "").replace("```toml", "").replace("```", "")
    rest = html.unescape(re.sub(r"</?(details|summary)>", " ", page))
    for piece in re.split(r"\||\n|\*\*", rest):
        if words := " ".join(piece.lstrip("#").split()).strip("- :"):
            assert words in seen.replace("- ", ""), words
    assert reader.seen.count("svg") == 8 and reader.seen.count("table") == 4
    for heading in ("Held out", "Curves", "Throughput", "Masked words", "Details"):
        assert f"## {heading}\n" in (reported / "report.md").read_text()


def test_the_page_asks_for_nothing_from_anywhere(reported):
    page = (reported / "report.html").read_text()
    reader = Reader(page)
    assert page.startswith("<!doctype html>") and "prefers-color-scheme: dark" in page and "@media print" in page
    assert "://" not in page and "@import" not in page
    assert not {"script", "link", "iframe", "img", "object", "base"} & set(reader.seen)
    names = {name for name, _ in reader.attributes}
    assert not any(name.startswith("on") or name in ("src", "href") for name in names)
    assert all(value.startswith("#") for name, value in reader.attributes if name == "xlink:href")
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", page))
    ids = [value for name, value in reader.attributes if name == "id"]
    assert len(ids) == len(set(ids)), "the panels share one document"
    assert "default-src 'none'" in html.unescape(page)


def test_the_first_and_the_last_numbers_and_what_the_run_was(reported):
    page, lines = (reported / "report.md").read_text(), read_metrics(reported)
    first, *_, last = [line for line in lines if line["kind"] == "held_out"]
    rows = {name: cells for name, *cells in table_under(page, "Held out")}
    (teacher,) = [line for line in lines if line["kind"] == "teacher"]
    assert rows["MLM loss"][3:] == [f"{teacher['mlm']:.4g}"] and rows["perplexity"][3:] == [
        f"{teacher['perplexity']:.4g}"
    ]
    assert rows["MLM loss"][:2] == [f"{line['mlm']:.4g}" for line in (first, last)]
    before, after = (100 * line["agreement"] for line in (first, last))
    change = f"{after - before:+.1f} points".replace("-", "−")
    result = [cell.replace("\u00a0", " ") for cell in rows["agreement with the teacher"]]
    assert result == [f"{before:.1f} %", f"{after:.1f} %", change, ""], "a teacher does not agree with itself"
    student = open_model(reported)
    name = Path(student.run_config.teacher.path).name
    sentence = page.splitlines()[2].replace("\u00a0", " ")
    assert (
        sentence.startswith("A 2-layer student of 20,200 parameters, distilled from ") and f"from {name} (" in sentence
    )
    assert "(4 layers, 35,300 parameters): 12 of 12 steps (about" in sentence and "Not finished" not in page
    judged = f"MLM loss {first['mlm']:.4g} → {last['mlm']:.4g}, agreement with the teacher"
    assert sentence.endswith(f"; held out: {judged} {before:.1f} % → {after:.1f} %.")


def test_examples_are_those_of_the_models_and_the_mark_is_right(reported, workshop):
    student, teacher = open_model(reported), open_model(workshop / "teacher")
    examples = held_out_examples(workshop / "rows", reported / "tokenizer")
    assert (
        examples == held_out_examples(workshop / "rows", reported / "tokenizer")
        and len(examples) == len(dict(examples)) == 6
    )
    answers = [fill_mask(model, [text for text, _ in examples]) for model in (teacher, student)]
    rows = table_under((reported / "report.md").read_text(), "Masked words")
    agree = 0
    for (text, word), theirs, ours, cells in zip(examples, *answers, rows, strict=True):
        shown = [
            "\u00a0· ".join(f"{choice}\u00a0{100 * probability:.0f}\u00a0%" for choice, probability in choices)
            for choices in (theirs, ours)
        ]
        same = theirs[0][0] == ours[0][0]
        agree += same
        assert cells == [text, word, *shown, "✓" if same else "–"]
    assert f"agree (✓) in {agree} of 6 sentences" in (reported / "report.md").read_text()


def test_masked_words_are_whole_words_of_the_held_out_text(workshop):
    rows = workshop / "rows"
    tokenizer = load_tokenizer(rows / "tokenizer")
    ids = np.load(rows / "held_out" / "input_ids.npy")
    held_out = {" ".join(tokenizer.decode(row, skip_special_tokens=True).split()) for row in ids.astype(np.int64)}
    for text, word in held_out_examples(rows, rows / "tokenizer"):
        assert text.count("[MASK]") == 1 and word.isalpha()
        assert any(text.replace("[MASK]", word) in row for row in held_out), text


def test_own_sentences(run, without_curves, monkeypatch):
    monkeypatch.setattr(masked_words, "fill_mask", lambda model, texts: [[("|<i>", 0.5)]] * len(texts))
    text = "the dog [MASK] the <b>cat</b> | and *more*."
    assert cli.main(["report", str(run), "--text", text, "--text", "a [MASK] in the house."]) == 0
    rows = table_under((run / "report.md").read_text(), "Masked words")
    shown = "\\|\\<i>\u00a050\u00a0%"
    assert [row[1:] for row in rows] == [[shown, shown, "✓"]] * 2, "and no masked word"
    page = (run / "report.html").read_text()
    assert html.escape(text) in page and text in Reader(page).text and "<i>" not in page and "<b>" not in page


@pytest.mark.parametrize("text", ["no gap", "two [MASK] [MASK]"])
def test_a_sentence_without_one_gap_is_refused(run, capsys, text):
    before = file_hashes(run)
    assert cli.main(["report", str(run), "--text", text]) == 2
    assert "needs exactly one [MASK]" in capsys.readouterr().err and file_hashes(run) == before


@pytest.mark.parametrize("what", ["teacher", "rows", "changed", "checkpoint"])
def test_what_has_gone_is_told_in_one_line(run, workshop, tmp_path, without_curves, what):
    config = (run / "config.toml").read_text()
    if what == "checkpoint":
        for file in (run / "checkpoints").rglob("manifest.json"):
            file.write_text("{")
    elif what == "changed":
        other = shutil.copytree(workshop / "teacher", tmp_path / "other")
        tensors = (other / "model.safetensors").read_bytes()
        (other / "model.safetensors").write_bytes(tensors[:-1] + bytes([tensors[-1] ^ 1]))
        (run / "config.toml").write_text(config.replace(str(workshop / "teacher"), str(other)))
    else:
        (run / "config.toml").write_text(config.replace(str(workshop / what), str(tmp_path / "gone")))
    assert cli.main(["report", str(run)]) == 0
    page = (run / "report.md").read_text()
    (reason,) = [line for line in page.splitlines() if line.startswith("No examples: ")]
    expected = {"teacher": "gone", "rows": "gone", "changed": "another teacher", "checkpoint": "damaged"}[what]
    assert expected in reason and reason.endswith(".") and "## Curves" in page
    assert not re.search(PLACES, page)
    assert reason.removeprefix("No examples: ")[:40] in Reader((run / "report.html").read_text()).text


HOSTILE = "</title><script>alert(1)</script> | [x](javascript:a) $x$ `_*\x1b[2J\n# up"


def test_names_may_hold_anything(run, tmp_path, figures):
    hostile = shortened(run, tmp_path / HOSTILE.replace("/", "∕"), lambda line: line)
    other = shortened(run, tmp_path / "_$", lambda line: line)
    assert cli.main(["report", str(hostile), str(other)]) == 0
    (legend,) = figures[0].legends
    assert [text.get_text()[:2] for text in legend.get_texts()] == ["<∕", "_$"]
    for page in ((hostile / "report.md").read_text(), (hostile / "report.html").read_text()):
        assert "<script" not in page.replace("\\<", "") and "\x1b" not in page and "\n# up" not in page
    assert "](javascript" not in (hostile / "report.md").read_text()
    assert "script" not in Reader((hostile / "report.html").read_text()).seen


def test_blocks_are_escaped_in_both():
    text = "<img src=x onerror=a> & | __init__ snake_case \x00 \ud800 ](http:x)"
    blocks = [Heading(text), Paragraph(text, text), Table(("a", "b"), [[text, text]]), Code("", f"```\n{text}\n")]
    blocks = [*blocks, Fold(text, blocks)]
    page = to_html(text, blocks)
    assert "<img" not in page and "\x00" not in page and page.encode()
    assert Reader(page).text.count("<img src=x onerror=a> & | __init__ snake_case") == 14
    lines = to_markdown(blocks).splitlines()
    assert lines[0] == r"## \<img src=x onerror=a> & \| \_\_init\_\_ snake_case \\x00 \\ud800 ]\(http:x)"
    assert {line.count("|") - line.count(r"\|") for line in lines if line.startswith("| ")} == {3}
    assert lines.count("````") == 4, "a fence longer than any in the text"


def test_the_first_loss_does_not_flatten_the_rest(tmp_path, figures):
    numbers = [900.0, *(3 + 2 / step for step in range(1, 100))]
    lines = [{"step": step, "kind": "train", "mlm": number} for step, number in enumerate(numbers)]
    draw_curves({"run": lines}, tmp_path / "curves.png")
    (axis,) = figures[0].axes
    bottom, top = axis.get_ylim()
    assert bottom < 3.02 and 3.5 < top < 6 and [text.get_text() for text in axis.texts] == ["up to 900"]
    draw_curves({"run": lines[1:4]}, tmp_path / "curves.png")
    (axis,) = figures[2].axes
    assert axis.get_ylim()[0] < 3.6 and axis.get_ylim()[1] > 5 and not axis.texts, "of a few numbers all are shown"


def texts(figure: Figure) -> dict[str, tuple[float, float, float, float]]:
    """Every text that a figure shows, with its edges as shares of the figure: left, bottom, right, top."""
    canvas, (width, height) = FigureCanvasAgg(figure), figure.bbox.size
    canvas.draw()
    shown = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    for axis in figure.axes:  # matplotlib makes ticks beyond the limits too, and does not draw them
        for one, limits in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
            beyond = [tick for tick in one.get_major_ticks() if not limits[0] <= tick.get_loc() <= limits[1]]
            shown = [text for text in shown if not any(text in (tick.label1, tick.label2) for tick in beyond)]
    boxes = {text.get_text(): text.get_window_extent(canvas.get_renderer()) for text in shown}
    return {name: (box.x0 / width, box.y0 / height, box.x1 / width, box.y1 / height) for name, box in boxes.items()}


RANGES = [
    (0.17, 0.19),
    (0.991, 0.9999),
    (0.99991, 0.99999),
    (0.0, 1.0),
    (1e-7, 3e-7),
    (12_345.0, 23_456.0),
    (-0.2, 7e5),
]


@pytest.mark.parametrize("low, high", RANGES)
def test_no_label_of_a_curve_is_cut(tmp_path, figures, low, high):
    names = ["mlm"] if high > 1 else ["agreement", "mlm"]  # in percent, and not
    lines = [
        {"step": step, "kind": "held_out", **dict.fromkeys(names, value)}
        for step, value in ((0, low), (500_000, high), (1_000_000, (low + high) / 2))
    ]
    draw_curves({"run": lines}, tmp_path / "curves.png")
    for figure in figures:
        for text, edges in texts(figure).items():
            assert min(edges) >= 0 and max(edges) <= 1, (text, edges)


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.172, 0.191, ["17.5 %", "18.0 %", "18.5 %", "19.0 %"]),
        (0.12, 0.93, ["20 %", "40 %", "60 %", "80 %"]),
        (0.9991, 0.9999, ["99.92 %", "99.94 %", "99.96 %", "99.98 %"]),
    ],
)
def test_percent_axes_have_the_decimals_that_they_need(tmp_path, figures, low, high, labels):
    lines = [{"step": step, "kind": "held_out", "accuracy": value} for step, value in ((0, low), (9, high))]
    draw_curves({"run": lines}, tmp_path / "curves.png")
    for figure in figures:
        assert [text for text in texts(figure) if "%" in text] == labels


@pytest.mark.parametrize("count", range(1, len(PANELS) + 1))
def test_every_row_of_panels_is_full(count):
    spans, row = panel_spans(count), 0
    assert len(spans) == count
    for span in spans:
        row = (row + span) % 6 if row + span <= 6 else pytest.fail("a panel would go over the edge")
    assert row == 0 and (min(spans) > 1)


def test_where_a_run_was_resumed_is_marked_and_explained(run, reported, figures, tmp_path):
    assert "resumed" not in (reported / "report.md").read_text() + (reported / "report.html").read_text()

    def again(line: dict) -> dict:  # the process began again with step 7
        if line["kind"] == "train" and line["step"] == 7:
            line = {
                name: number for name, number in line.items() if "per_second" not in name and "per_step" not in name
            }
            line["compile_seconds"] = 3.0
        if line["kind"] == "train" and line["step"] == 9:
            line["compile_seconds"] = 2.0  # for another length of text, which is no start
        return line

    resumed = shortened(run, tmp_path / "once", again)
    assert cli.main(["report", str(resumed)]) == 0
    for curves in panels(figures[0]).values():
        marks = [curve for curve in curves if str(curve.get_gid()).startswith("resumed")]
        assert [list(mark.get_xdata()) for mark in marks] == [[6, 6]]
    assert "marks where a run was resumed" in (resumed / "report.md").read_text()


def test_a_table_that_goes_on_beyond_a_phone_has_a_shadow_at_its_edge(reported):
    page = (reported / "report.html").read_text()
    tables = page.count("<table")
    assert page.count('<div class="wide"><table') == tables == 4
    (rule,) = re.findall(r"\.wide \{(.*?)\}", page.partition("@media print")[0], re.S)
    assert "overflow-x: auto" in rule and rule.count("local") == 2 and rule.count("scroll") == 2
    assert page.count("--shadow: ") == 2, "in the light and in the dark"


def test_one_measurement_is_one(run, without_curves, tmp_path):
    short = shortened(run, tmp_path / "short", lambda line: line if line["step"] <= 2 else {})
    assert cli.main(["report", str(short)]) == 0
    assert "The speed was measured once while training." in (short / "report.md").read_text()


@pytest.mark.parametrize(
    ("number", "shown"),
    [(-1.659e-9, "0"), (0.0, "0"), (4e-6, "4e-06"), (-0.25, "-0.25"), (36_000.4, "36,000"), (math.nan, "nan")],
)
def test_what_rounding_leaves_of_zero_is_zero(number, shown):
    assert format_number(number) == shown


def test_a_long_run_is_drawn_by_its_means(tmp_path, figures):
    lines = [{"step": step, "kind": "train", "mlm": float(step % 4)} for step in range(10_000)]
    draw_curves({"run": lines}, tmp_path / "curves.png")
    for figure in figures:
        (curve,) = figure.axes[0].get_lines()
        steps, numbers = curve.get_data()
        assert len(steps) <= 1200 and 0 < steps[0] < 10 and steps[-1] > 9990 and abs(np.mean(numbers) - 1.5) < 0.01


def test_what_the_lines_add_up_to():
    lines = [
        {"step": 0, "kind": "held_out", "mlm": 4.0},
        {"step": 1, "kind": "train", "compile_seconds": 30.0, "tokens_per_step": 90.0},
        {"step": 11, "kind": "train", "seconds_per_step": 2.0, "tokens_per_second": 50.0, "tokens_per_step": 110.0},
        {"step": 21, "kind": "train", "seconds_per_step": 1.0, "tokens_per_second": 100.0, "tokens_per_step": 100.0},
        {"step": 22, "kind": "skipped", "loss": float("nan")},
    ]
    told = history(lines)
    assert (told.steps, told.skipped, told.throughput, told.tokens_per_step) == (22, [22], 100.0, 100.0)
    assert (told.step_seconds, told.compile_seconds, told.seconds) == (30.0, 30.0, 60.0)
    printed = {0.04: "0.0 s", 9.0: "9.0 s", 61: "1 min 01 s", 7260: "2 h 01 min", 90_000: "1 d 1 h"}
    assert {seconds: format_duration(seconds) for seconds in printed} == printed
    assert {format_duration(seconds) for seconds in (float("nan"), float("inf"), -1.0)} == {"an unknown time"}
    assert [format_count(n) for n in (997_893, 1_619_328, 2.5e9)] == ["998,000", "1.62 million", "2.5 billion"]


def test_runs_that_differ_in_their_seed_alone_are_one_line(finished_run, tmp_path):
    for name, seed, more in (("mine-3", 3, 0.0), ("mine-4", 4, 0.5), ("other", 4, 0.0)):
        run = shutil.copytree(finished_run, tmp_path / name)
        text = (run / "config.toml").read_text().replace("seed = 3", f"seed = {seed}", 1)
        if name == "other":
            text = text.replace("temperature = 2.0", "temperature = 3.0")
        (run / "config.toml").write_text(text)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            line.update({"mlm": line["mlm"] + more} if line["kind"] == "held_out" else {})
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = ("mine-3", "mine-4", "other")
    runs = [str(tmp_path / name) for name in names]
    assert cli.main(["report", *runs, "--output", str(tmp_path / "new" / "out")]) == 0
    page = (tmp_path / "new" / "out" / "report.md").read_text()
    mine, other, teacher = table_under(page, "Held out")
    of_teacher = next(line["mlm"] for line in read_metrics(finished_run) if line["kind"] == "teacher")
    assert teacher[:4] == ["teacher", "", "", f"{of_teacher:.3f}"]
    mlm = [line["mlm"] for line in read_metrics(finished_run) if line["kind"] == "held_out"][-1]
    assert mine[:4] == ["mine", "2", "12", f"{mlm + 0.25:.3f} ± 0.354"] and other[:4] == [
        "other",
        "1",
        "12",
        f"{mlm:.3f}",
    ]
    assert cli.main(["report", *runs, "--output", str(tmp_path / "other" / "config.toml")]) == 2
