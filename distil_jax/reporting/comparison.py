"""The results of `distil-jax compare` as Markdown, JSON, a plot, and a section of a model card."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from distil_jax.files import whole_file, write_whole
from distil_jax.reporting.markdown import mean_and_spread, table
from distil_jax.reporting.style import RUN_STYLES

# They enclose the section in a model card, so that it can be replaced.
_MARKS = ("<!-- distil-jax compare -->", "<!-- distil-jax compare: end -->")


@dataclass(frozen=True)
class Comparison:
    """The results of a comparison of a teacher, which is the first model, with its students.

    Attributes:
      scores: by task and model, the task's first metric for each seed, on the test examples if there are any.
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

    @property
    def names(self) -> list[str]:
        """The names of all models and baselines that have scores, the teacher first."""
        return list(dict.fromkeys([*self.sizes, *(name for by_model in self.scores.values() for name in by_model)]))


def tables(comparison: Comparison) -> list[str]:
    """Two Markdown tables: scores and the share of the teacher's macro score that each model keeps; size and speed."""
    teacher, tasks = next(iter(comparison.sizes)), list(comparison.scores)
    teacher_macro = comparison.macro(teacher)
    rows = []
    for name in comparison.names:
        macro = comparison.macro(name)
        kept = []
        if macro and all(teacher_macro):  # seed by seed, because runs with the same seed see the same data in order
            kept = [ours / theirs for ours, theirs in zip(macro, teacher_macro, strict=True)]
        cells = [_percent(comparison.scores[task].get(name, [])) for task in tasks]
        rows.append([name, *cells, _percent(macro), _percent(kept)])
    heads = [f"{task}, {comparison.metrics[task]}" for task in tasks]
    lines = table(["model", *heads, "macro", f"kept of {teacher}"], rows)
    spread = " ± standard deviation" if len(comparison.seeds) > 1 else ""
    splits = {f"{task}: {comparison.examples[task]}" for task in tasks}
    lines += [
        "",
        f"Mean{spread} over {len(comparison.seeds)} seed(s), in %. Split of the examples: {', '.join(sorted(splits))}.",
        "",
    ]
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


def _percent(values: Sequence[float]) -> str:
    return mean_and_spread([100 * value for value in values], 1) or "-"


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

    colours = [light for light, _, _ in RUN_STYLES]
    names, teacher = comparison.names, next(iter(comparison.sizes))
    columns = {**comparison.scores, "macro": {name: comparison.macro(name) for name in names if comparison.macro(name)}}
    figure = Figure(figsize=(3.5 + 1.1 * len(columns) + 4.5, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.1 * len(columns) + 2, 4))
    for i, (colour, name) in enumerate(zip(colours * len(names), names, strict=False)):
        shift = (i - (len(names) - 1) / 2) * 0.7 / len(names)  # points of one task are side by side
        points = [(x + shift, by_model[name]) for x, by_model in enumerate(columns.values()) if name in by_model]
        left.errorbar(
            [x for x, _ in points],
            [100 * fmean(values) for _, values in points],
            yerr=[100 * stdev(values) if len(values) > 1 else 0 for _, values in points],
            fmt="o",
            color=colour,
            label=name,
            capsize=3,
        )
        if name in comparison.sizes and comparison.macro(name) and all(comparison.macro(teacher)):
            kept = 100 * fmean(comparison.macro(name)) / fmean(comparison.macro(teacher))
            speed = comparison.sizes[teacher]["latency"] / comparison.sizes[name]["latency"]
            right.plot(speed, kept, "o", color=colour, markersize=9)
            right.annotate(name, (speed, kept), xytext=(6, 6), textcoords="offset points", fontsize=9)
    left.set_xticks(range(len(columns)), list(columns))
    left.set_ylabel("score, %")
    right.set_xlabel(f"times as fast as {teacher}, one row")
    right.set_ylabel(f"macro score kept of {teacher}, %")
    right.margins(0.25)
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(names), 4), frameon=False
    )
    figure.savefig(path, dpi=130)
