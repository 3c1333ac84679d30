"""The results of `distil-jax compare` as Markdown, JSON, a plot, and a section of a model card."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from distil_jax.evaluation.tasks import HOW_TO_LEARN
from distil_jax.files import whole_file, write_whole
from distil_jax.reporting.markdown import mean_and_spread, table
from distil_jax.reporting.style import RUN_STYLES

LARGEST_CLASS = "largest class"  # the row of what one answer for every example scores
_LEGEND_CHARACTERS = 9.0  # that fit into an inch of the picture's width
# They enclose the section in a model card, so that it can be replaced.
_MARKS = ("<!-- distil-jax compare -->", "<!-- distil-jax compare: end -->")


@dataclass(frozen=True)
class Comparison:
    """The results of a comparison of a teacher, which is the first model, with its students.

    Attributes:
      scores: by task and model, the task's first metric for each seed, on the test examples if there are any;
        `LARGEST_CLASS` and baselines are among the models.
      metrics: by task, the name of that metric.
      examples: by task, the split that it was computed on: "test" or "dev".
      sizes: by model, "parameters" of the encoder, their "bytes" on disk, "latency" in seconds for one row, and
        "throughput" in tokens per second for batches of 32 rows.
      seeds: of the runs.
      length: tokens per row in the timings.
    """

    scores: dict[str, dict[str, list[float]]]
    metrics: dict[str, str]
    examples: dict[str, str]
    sizes: dict[str, dict[str, float]]
    seeds: tuple[int, ...]
    length: int

    def macro(self, name: str) -> list[float]:
        """A model's mean over tasks, for each seed; an empty list if it has no scores for one of the tasks."""
        scores = [by_model[name] for by_model in self.scores.values() if name in by_model]
        if len(scores) < len(self.scores):
            return []
        return [fmean(of_seed) for of_seed in zip(*scores, strict=True)]

    def kept(self, name: str) -> list[float]:
        """The share of the teacher's macro score that a model keeps, for each seed; empty if there is no such share."""
        macro, teacher = self.macro(name), self.macro(next(iter(self.sizes)))
        if not macro or not all(teacher) or not self._is_above(self.macro(LARGEST_CLASS)):
            return []
        # Seed by seed, because runs with the same seed see the same data in order.
        return [ours / theirs for ours, theirs in zip(macro, teacher, strict=True)]

    def unlearned(self) -> list[str]:
        """The tasks that the teacher does not do better than the largest class, by more than its spread over seeds."""
        return [task for task, scores in self.scores.items() if not self._is_above(scores.get(LARGEST_CLASS, []), task)]

    def _is_above(self, constant: list[float], task: str = "") -> bool:
        """Whether the teacher, on a task or over all, is above the constant's scores; True if there are none."""
        teacher = next(iter(self.sizes))
        scores = self.scores[task][teacher] if task else self.macro(teacher)
        spread = stdev(scores) if len(scores) > 1 else 0.0
        return not constant or fmean(scores) > fmean(constant) + spread

    @property
    def names(self) -> list[str]:
        """The names of all models and baselines that have scores, the teacher first."""
        return list(dict.fromkeys([*self.sizes, *(name for by_model in self.scores.values() for name in by_model)]))


def tables(comparison: Comparison) -> list[str]:
    """Two Markdown tables: scores and the share of the teacher's macro score that each model keeps; size and speed."""
    teacher, tasks = next(iter(comparison.sizes)), list(comparison.scores)
    rows = []
    for name in comparison.names:
        cells = [_percent(comparison.scores[task].get(name, [])) for task in tasks]
        rows.append([name, *cells, _percent(comparison.macro(name)), _percent(comparison.kept(name))])
    heads = [f"{task}, {comparison.metrics[task]}" for task in tasks]
    lines = table(["model", *heads, "macro", f"kept of {teacher}"], rows)
    spread = " ± standard deviation" if len(comparison.seeds) > 1 else ""
    splits = {f"{task}: {comparison.examples[task]}" for task in tasks}
    lines += [
        "",
        f"Mean{spread} over {len(comparison.seeds)} seed(s), in %. Split of the examples: {', '.join(sorted(splits))}.",
        "",
    ]
    if unlearned := comparison.unlearned():
        lines += [_why_unlearned(comparison, unlearned), ""]
    teacher_size = comparison.sizes[teacher]
    rows = [
        [
            name,
            f"{size['parameters']:,}",
            f"{size['bytes'] / 1e6:.1f} MB",
            f"{1e3 * size['latency']:.2f} ms",
            f"{size['throughput']:,.0f}",
            f"{teacher_size['latency'] / size['latency']:.2f}",
            f"{size['throughput'] / teacher_size['throughput']:.2f}",
        ]
        for name, size in comparison.sizes.items()
    ]
    head = ["encoder", "parameters", "size", f"1 x {comparison.length}", f"tokens/s, 32 x {comparison.length}"]
    return lines + table([*head, "speed-up at 1", "speed-up at 32"], rows)


def _why_unlearned(comparison: Comparison, tasks: Sequence[str]) -> str:
    """A sentence about tasks on which the teacher is no better than the largest class, and what follows from it."""
    teacher = next(iter(comparison.sizes))
    spread = " by more than its standard deviation over the seeds" if len(comparison.seeds) > 1 else ""
    share = "" if comparison.kept(teacher) else ", so there is nothing that a student could keep a share of (–)"
    return (
        f"{teacher} does not beat the largest class (one answer for every example){spread} on {', '.join(tasks)}: "
        f"nothing shows that it learned anything there{share}. {HOW_TO_LEARN}"
    )


def _percent(values: Sequence[float]) -> str:
    return mean_and_spread([100 * value for value in values], 1) or "–"


def write(comparison: Comparison, lines: Sequence[str], output: Path) -> None:
    """Writes compare.md, compare.json and compare.png.

    Args:
      comparison: the results.
      lines: its tables.
      output: an existing folder.
    """
    teacher = next(iter(comparison.sizes))
    macro = {name: comparison.macro(name) for name in comparison.names}
    values: dict[str, Any] = {**vars(comparison), "macro": macro}
    write_whole(output / "compare.json", json.dumps(values, indent=1) + "\n")
    with whole_file(output / "compare.png") as draft:
        _draw(comparison, draft)
    page = [f"# {teacher} and its students", "", *lines, "", "![scores and speed](compare.png)", ""]
    write_whole(output / "compare.md", "\n".join(page))


def add_to_card(card: Path, lines: Sequence[str]) -> None:
    """Adds the tables at the end of a model's card. They replace those of an earlier comparison."""
    begin, end = _MARKS
    text = card.read_text(encoding="utf-8")
    text = re.sub(f"\n*{re.escape(begin)}.*?{re.escape(end)}\n*", "\n", text, flags=re.DOTALL).rstrip()
    write_whole(card, "\n".join([text, "", begin, "## Comparison", "", *lines, end, ""]))


def _draw(comparison: Comparison, path: Path) -> None:
    """Draws the scores of each task with their standard deviation, and the share of the macro score against speed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    colours = [light for light, _, _ in RUN_STYLES]
    names, teacher = comparison.names, next(iter(comparison.sizes))
    columns = dict(comparison.scores)
    if len(columns) > 1:
        columns["macro"] = {name: comparison.macro(name) for name in names if comparison.macro(name)}
    figure = Figure(figsize=(3.5 + 1.1 * len(columns) + 4.5, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.1 * len(columns) + 2, 4))
    handles = []
    for i, (colour, name) in enumerate(zip(colours * len(names), names, strict=False)):
        shift = (i - (len(names) - 1) / 2) * 0.7 / len(names)  # points of one task are side by side
        points = [(x + shift, by_model[name]) for x, by_model in enumerate(columns.values()) if name in by_model]
        left.plot([x for x, _ in points], [100 * fmean(values) for _, values in points], "o", color=colour)
        handles.append(
            Line2D([], [], color=colour, marker="o", linestyle="", label=f"{name}{' (teacher)' if not i else ''}")
        )
        for x, values in points:
            if len(values) > 1:
                left.errorbar(x, 100 * fmean(values), yerr=100 * stdev(values), color=colour, capsize=3)
        if name in comparison.sizes and comparison.kept(name):
            kept = 100 * fmean(comparison.macro(name)) / fmean(comparison.macro(teacher))
            speed = comparison.sizes[teacher]["latency"] / comparison.sizes[name]["latency"]
            right.plot(speed, kept, "o", color=colour, markersize=9)
    left.set_xticks(range(len(columns)), list(columns))
    left.set_ylabel("score, %")
    # The teacher's name may be longer than an axis.
    right.set_xlabel("times as fast as the teacher, one row")
    right.set_ylabel("of the teacher's score, %" if len(comparison.scores) == 1 else "of the teacher's macro score, %")
    _widen(right.set_xlim, [line.get_xdata()[0] for line in right.get_lines()], least=0.5)
    _widen(right.set_ylim, [line.get_ydata()[0] for line in right.get_lines()], least=5)
    _widen(left.set_ylim, left.dataLim.intervaly.tolist(), least=5, most=100)
    left.set_xlim(-0.5, len(columns) - 0.5)
    if not comparison.kept(teacher):
        sentence = "the teacher has no score\nto keep a share of"
        right.text(0.5, 0.5, sentence, transform=right.transAxes, ha="center", va="center")
        right.set(xticks=[], yticks=[])
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    fitting = int(_LEGEND_CHARACTERS * figure.get_figwidth() / (max(map(len, names)) + 15))
    columns_of_legend = max(1, min(len(names), 4, fitting))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns_of_legend, frameon=False)
    figure.savefig(path, dpi=130)


def _widen(set_limits: Callable[[float, float], Any], values: Sequence[float], *, least: float, most: float = math.inf):
    """Sets the limits of an axis around its values, at least so far apart and little above the most they can be."""
    if not values:
        return
    low, high = min(values), max(values)
    room = max(high - low, least)
    set_limits(low - 0.25 * room, min(high + 0.25 * room, max(most, high) + 0.05 * room))
