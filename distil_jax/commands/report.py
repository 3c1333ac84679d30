"""`distil-jax report`: what a run did, as report.md, report.html and curves.png beside its numbers."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import tomli_w

from distil_jax.commands.curves import draw_curves
from distil_jax.commands.examples import check_texts, examples
from distil_jax.commands.history import History, count, duration, history
from distil_jax.commands.page import Block, Code, Fold, Heading, Paragraph, Table, to_html, to_markdown
from distil_jax.commands.run_folder import is_run
from distil_jax.config import Config, ModelConfig, load
from distil_jax.io.checkpoint import Checkpoints
from distil_jax.io.metrics import read_metrics
from distil_jax.models.encoder import count_parameters
from distil_jax.schema import InputError, build, to_dict

_MEASURES = {
    "mlm": "MLM loss",
    "kl": "KL to the teacher",
    "agreement": "agreement with the teacher",
}
_SHARES = ("accuracy", "agreement")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `distil-jax report`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders; the report is written into the first")
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="'A [MASK] B'",
        help="a sentence whose gap teacher and student fill (repeatable; default: sentences of the held-out rows)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Writes the report and says where."""
    runs = {Path(folder).resolve().name: Path(folder) for folder in arguments.runs}
    if len(runs) < len(arguments.runs):
        raise InputError("Two of the runs have the same folder name, so a report could not tell them apart.")
    # The run may still be going: its accelerators are its own. And a report fetches nothing.
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    written = write_report(runs, Path(arguments.runs[0]), texts=arguments.text)
    print(f"Wrote {written} and, to open in a browser, {written.with_suffix('.html')}.")


def write_report(
    runs: dict[str, Path],
    output: Path,
    *,
    title: str = "",
    head: Sequence[Block] = (),
    gaps: Sequence[Block] | None = None,
    texts: Sequence[str] = (),
) -> Path:
    """Writes `curves.png`, `report.md` and `report.html` into `output`, and returns the path of report.md.

    Args:
      runs: run folders by the name they are shown under.
      output: a folder.
      title: of the page.
      head: stands before the curves.
      gaps: what models put in gaps; None: `examples` of the first run.
      texts: for these; none: sentences of the held-out rows.

    Raises:
      InputError: a folder that is no run, or has no numbers yet; a text without exactly one gap.
    """
    metrics = {}
    for name, folder in runs.items():
        metrics[name] = read_metrics(folder) if is_run(folder) else []
        if not metrics[name]:
            raise InputError(f"{folder} is not a run with numbers in it: name what `distil-jax train` wrote.")
    first = next(iter(runs.values()))
    check_texts(first, texts)
    histories = {name: history(lines) for name, lines in metrics.items()}
    configs = {name: load(folder / "config.toml") for name, folder in runs.items()}
    title = title or ", ".join(runs)
    curves = draw_curves(metrics, output / "curves.png")
    blocks = [Heading(title, 1)]
    for name, folder in runs.items():
        blocks += _summary(folder, histories[name], configs[name], lead=f"{name}:" if len(runs) > 1 else "")
    blocks += [*head, Heading("Held-out text"), _held_out(histories), Heading("Curves"), curves]
    blocks += [Heading("Throughput"), *_throughput(histories), Heading("Words in gaps")]
    blocks += examples(first, texts) if gaps is None else gaps
    for name in runs:
        blocks += [Heading(name), *_details(histories[name], configs[name])]
    (output / "report.html").write_text(to_html(title, blocks), encoding="utf-8")
    path = output / "report.md"
    path.write_text(to_markdown(blocks), encoding="utf-8")
    return path


def _summary(folder: Path, told: History, config: Config, *, lead: str) -> list[Block]:
    student, teacher = _models(folder, config)
    steps, tokens = config.train.steps, told.tokens_per_step
    done = f"{told.done:,}" + (f" of {steps:,}" if steps else "") + " steps"
    if told.done and math.isfinite(tokens):
        of = f" of {count(steps * tokens)}" if told.done < steps else ""
        done += f" (about {count(told.done * tokens)}{of} tokens)"
    took = f" in {duration(told.seconds)}" if told.seconds else ""
    sentence = f"{student}{teacher}: {done}{took}"
    if changes := _changes(told.evaluations, ("mlm", "agreement")):
        sentence += f"; on held-out text {', '.join(changes)}"
    blocks = [Paragraph(f"{sentence}.", lead)]
    if told.done < steps:
        left = duration((steps - told.done) * told.seconds_per_step)
        remains = f"At the median pace the others take {left}" if told.rates else "There is no pace to go by yet"
        blocks += [Paragraph(f"Not finished: {told.done / steps:.0%} of the steps are done. {remains}, {_WITHOUT}.")]
    return blocks


_WITHOUT = "without evaluations and checkpoints"


def _models(folder: Path, config: Config) -> tuple[str, str]:
    """The student and its teacher in words: with sizes once there is a checkpoint, which says them."""
    facts = _facts(folder)
    path = config.teacher.path
    learnt = " distilled from" if config.loss.needs_teacher else ", trained without its judge,"
    layers = f"{config.student.num_layers}-layer student"
    student, teacher = f"A {layers}", f"{learnt} {path}" if path else " without a teacher"
    if facts:
        student += f" of {_parameters(facts['student'])} parameters"
        if path and facts.get("teacher"):
            teacher += f" ({facts['teacher']['num_layers']} layers, {_parameters(facts['teacher'])} parameters)"
    return student, teacher


def _parameters(model: dict) -> str:
    return count(count_parameters(build(ModelConfig, model)))


def _facts(folder: Path) -> dict:
    """What was saved beside the newest checkpoint that can be read; nothing where there is none."""
    if not (folder / "checkpoints").is_dir():
        return {}
    with contextlib.closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        for step in reversed(checkpoints.steps()):
            with contextlib.suppress(InputError):
                return checkpoints.facts(step)
    return {}


def _held_out(histories: dict[str, History]) -> Block:
    """First and last evaluation of each run, and what lies between."""
    found = {name: told.evaluations for name, told in histories.items() if told.evaluations}
    if not found:
        return Paragraph("No evaluation yet.")
    rows = []
    for name, evaluations in found.items():
        first, last = evaluations[0], evaluations[-1]
        for measure in _measures(last):
            before, after = first.get(measure, math.nan), last[measure]
            change = [_number(measure, after), _change(measure, before, after)] if len(evaluations) > 1 else ["", ""]
            rows.append([name, _MEASURES.get(measure, measure), _number(measure, before), *change])
    head = ("run", "measure", "first", "last", "change")
    if len(found) == 1:
        (evaluations,) = found.values()
        steps = [f"step {line['step']:,}" for line in (evaluations[0], evaluations[-1])]
        head, rows = ("measure", steps[0], steps[1] if len(evaluations) > 1 else "later", "change"), [r[1:] for r in rows]
    return Table(head, rows, texts=len(head) - 3)


def _changes(evaluations: list[dict], measures: Sequence[str]) -> list[str]:
    if not evaluations:
        return []
    first, last = evaluations[0], evaluations[-1]
    words = []
    for measure in measures:
        if measure in first and measure in last:
            to = f" → {_number(measure, last[measure])}" if len(evaluations) > 1 else ""
            words.append(f"{_MEASURES[measure]} {_number(measure, first[measure])}{to}")
    return words


def _measures(line: dict) -> list[str]:
    return [name for name in line if name not in ("step", "kind")]


def _number(measure: str, number: float) -> str:
    return f"{100 * number:.1f} %" if measure in _SHARES else f"{number:.4g}"


def _change(measure: str, before: float, after: float) -> str:
    difference = f"{100 * (after - before):+.1f} points" if measure in _SHARES else f"{after - before:+.3g}"
    return difference.replace("-", "−")


def _throughput(histories: dict[str, History]) -> list[Block]:
    if not any(told.rates for told in histories.values()):
        return [Paragraph("No throughput yet.")]
    head = ("run", "tokens/s, median", "slowest", "fastest", "time a step", "compilation", "all steps", "not in steps")
    rows = []
    for name, told in histories.items():
        if told.rates:
            rates = [f"{rate:,.0f}" for rate in (told.rate, told.rates[0], told.rates[-1])]
            times = [f"{told.seconds_per_step:.3g} s", duration(told.compile_seconds), duration(told.step_seconds)]
            share = told.compile_seconds / told.seconds if told.seconds else math.nan
            rows.append([name, *rates, *times, f"{share:.0%}"])
    readings = max(len(told.rates) for told in histories.values())
    note = (
        f"Median of {readings} readings while training. Compilation is the first step after each start; the last column "
        f"is its share of the time, {_WITHOUT}, whose time is not recorded."
    )
    return [Table(head, rows), Paragraph(note)]


def _details(told: History, config: Config) -> list[Block]:
    blocks: list[Block] = []
    if told.skipped:
        steps = ", ".join(f"{step:,}" for step in told.skipped)
        blocks.append(Paragraph(f"Updates left out, because a number was not finite: at the steps {steps}."))
    if told.evaluations:
        names = _measures(told.evaluations[-1])
        rows = [
            [f"{line['step']:,}", *(f"{line.get(name, math.nan):.4f}" for name in names)] for line in told.evaluations
        ]
        blocks.append(Fold("all evaluations", [Table(("step", *names), rows)]))
    blocks.append(Fold("configuration", [Code("toml", tomli_w.dumps(to_dict(config)))]))
    return blocks
