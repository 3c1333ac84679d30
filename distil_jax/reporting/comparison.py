"""The results of `distil-jax compare` as Markdown, JSON, a picture, and a section of a model card."""

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
from distil_jax.reporting.style import RUNS

_MARKS = ("<!-- distil-jax compare -->", "<!-- distil-jax compare: end -->")


@dataclass(frozen=True)
class Comparison:
    """The results of a comparison.

    Attributes:
      scores: by task and model, one a seed: the task's first metric, on test examples where there are such.
      metrics: by task.
      examples: by task, which were judged: "test" or "dev".
      sizes: by model, "parameters" of the encoder, "bytes" of them on disk, "latency" in seconds of one row and
        "throughput" in tokens a second of 32.
      seeds: of the runs.
      length: tokens a row of the timings.
    """

    scores: dict[str, dict[str, list[float]]]
    metrics: dict[str, str]
    examples: dict[str, str]
    sizes: dict[str, dict[str, float]]
    seeds: tuple[int, ...]
    length: int

    def macro(self, name: str) -> list[float]:
        """The mean over tasks, one a seed; none where a task has no score of this model."""
        scores = [each[name] for each in self.scores.values() if name in each]
        return [fmean(of_seed) for of_seed in zip(*scores, strict=True)] if len(scores) == len(self.scores) else []

    @property
    def names(self) -> list[str]:
        """Everything that has a score, the teacher first."""
        return list(dict.fromkeys([*self.sizes, *(name for each in self.scores.values() for name in each)]))


def tables(comparison: Comparison) -> list[str]:
    """The paper's tables, as Markdown: scores with what is kept of the first model's, then size and speed."""
    teacher, tasks = next(iter(comparison.sizes)), list(comparison.scores)
    whole = comparison.macro(teacher)
    rows = []
    for name in comparison.names:
        macro = comparison.macro(name)
        # Seed by seed, because both models had the same data and order with it.
        kept = [ours / theirs for ours, theirs in zip(macro, whole, strict=True)] if macro and all(whole) else []
        cells = [_percent(comparison.scores[task].get(name, [])) for task in tasks]
        rows.append([name, *cells, _percent(macro), _percent(kept)])
    heads = [f"{task}, {comparison.metrics[task]}" for task in tasks]
    lines = table(["model", *heads, "macro", f"kept of {teacher}"], rows)
    spread = " ± standard deviation" if len(comparison.seeds) > 1 else ""
    judged = {f"{task}: {comparison.examples[task]}" for task in tasks}
    lines += [
        "",
        f"Mean{spread} over {len(comparison.seeds)} seed(s), in %; examples judged: {', '.join(sorted(judged))}.",
        "",
    ]
    first = comparison.sizes[teacher]
    rows = [
        [
            name,
            f"{size['parameters']:,}",
            f"{size['bytes'] / 1e6:.1f} MB",
            f"{1e3 * size['latency']:.2f} ms",
            f"{size['throughput']:,.0f}",
            f"{first['latency'] / size['latency']:.2f}",
            f"{size['throughput'] / first['throughput']:.2f}",
        ]
        for name, size in comparison.sizes.items()
    ]
    head = ["encoder", "parameters", "size", f"1 x {comparison.length}", f"tokens/s, 32 x {comparison.length}"]
    return lines + table([*head, "faster at 1", "faster at 32"], rows)


def _percent(values: Sequence[float]) -> str:
    return mean_and_spread([100 * value for value in values], 1) or "-"


def write(comparison: Comparison, lines: Sequence[str], output: Path) -> None:
    """Writes compare.md, compare.json and compare.png."""
    teacher = next(iter(comparison.sizes))
    macro = {name: comparison.macro(name) for name in comparison.names}
    values: dict[str, Any] = {**vars(comparison), "macro": macro}
    write_whole(output / "compare.json", json.dumps(values, indent=1) + "\n")
    with whole_file(output / "compare.png") as draft:
        _draw(comparison, draft)
    page = [f"# What students keep of {teacher}", "", *lines, "", "![scores and speed](compare.png)", ""]
    write_whole(output / "compare.md", "\n".join(page))


def into_card(card: Path, lines: Sequence[str]) -> None:
    """Puts the tables at the end of a model's card, in the place of those of an earlier comparison."""
    begin, end = _MARKS
    text = card.read_text(encoding="utf-8")
    text = re.sub(f"\n*{re.escape(begin)}.*?{re.escape(end)}\n*", "\n", text, flags=re.DOTALL).rstrip()
    write_whole(card, "\n".join([text, "", begin, "## Compared", "", *lines, end, ""]))


def _draw(comparison: Comparison, path: Path) -> None:
    """Scores of each task with their spread, and what is kept beside how fast it is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = [light for light, _, _ in RUNS]
    names, teacher = comparison.names, next(iter(comparison.sizes))
    columns = {**comparison.scores, "macro": {name: comparison.macro(name) for name in names if comparison.macro(name)}}
    figure = Figure(figsize=(3.5 + 1.1 * len(columns) + 4.5, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.1 * len(columns) + 2, 4))
    for place, (colour, name) in enumerate(zip(colours * len(names), names, strict=False)):
        shift = (place - (len(names) - 1) / 2) * 0.7 / len(names)
        points = [(x + shift, each[name]) for x, each in enumerate(columns.values()) if name in each]
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
