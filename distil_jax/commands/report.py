"""`distil-jax report`: what a run did, as report.md and curves.png beside its numbers."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import tomli_w

from distil_jax.commands.markdown import table
from distil_jax.commands.run_folder import is_run
from distil_jax.config import load
from distil_jax.io.metrics import read_metrics
from distil_jax.schema import InputError, require, to_dict

_TERMS = {
    "kl": "KL to the teacher (T² included)",
    "mlm": "MLM cross entropy",
    "cosine": "1 − cos of hidden states",
    "mse": "squared difference of logits",
}
_JUDGES = {"mlm": "MLM loss", "kl": "KL to the teacher at T = 1", "agreement": "agreement with the teacher"}
# One colour a run, told apart in grey and by colour-blind eyes too (Okabe and Ito, 2008).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `distil-jax report`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders; the report is written into the first")


def run(arguments: argparse.Namespace) -> None:
    """Writes the report and says where."""
    runs = {Path(folder).resolve().name: Path(folder) for folder in arguments.runs}
    if len(runs) < len(arguments.runs):
        raise InputError("Two of the runs have the same folder name, so a report could not tell them apart.")
    print(f"Wrote {write_report(runs, Path(arguments.runs[0]))}.")


def write_report(runs: dict[str, Path], output: Path, *, title: str = "", head: Sequence[str] = ()) -> Path:
    """Writes `curves.png` and `report.md` into `output`, and returns the latter's path.

    Args:
      runs: run folders by the name they are shown under.
      output: a folder.
      title: of the page.
      head: lines of Markdown that stand before the curves.

    Raises:
      InputError: a folder that is no run, or has no numbers yet.
    """
    metrics = {}
    for name, folder in runs.items():
        metrics[name] = read_metrics(folder) if is_run(folder) else []
        if not metrics[name]:
            raise InputError(f"{folder} is not a run with numbers in it: name what `distil-jax train` wrote.")
    draw_curves(metrics, output / "curves.png")
    lines = [f"# {title or ', '.join(runs)}", "", *head, "", "## Curves", "", "![curves](curves.png)", ""]
    for name, folder in runs.items():
        lines += [f"## {name}", "", *_evaluations(metrics[name]), "", *_throughput(metrics[name]), ""]
        if skipped := [f"{line['step']:,}" for line in metrics[name] if line["kind"] == "skipped"]:
            lines += [f"Updates left out, because a number was not finite: at the steps {', '.join(skipped)}.", ""]
        settings = tomli_w.dumps(to_dict(load(folder / "config.toml")))
        lines += ["<details><summary>configuration</summary>", "", f"```toml\n{settings}```", "", "</details>", ""]
    path = output / "report.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def draw_curves(metrics: dict[str, list[dict]], path: Path) -> None:
    """One panel a number: held-out judgements above, the terms of the training loss below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    def has(kind: str, number: str) -> bool:
        return any(line["kind"] == kind and number in line for lines in metrics.values() for line in lines)

    panels = [
        [("held_out", name, title) for name, title in _JUDGES.items() if has("held_out", name)],
        [("train", name, title) for name, title in _TERMS.items() if has("train", name)],
    ]
    columns = max(map(len, panels))
    require(columns > 0, "There is no number to draw yet: let the run go on to its first evaluation.")
    figure = Figure(figsize=(4.2 * columns, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, columns, squeeze=False)
    for row, shown in zip(axes, panels, strict=True):
        for axis in row[len(shown) :]:
            axis.set_axis_off()
        for axis, (kind, number, title) in zip(row, shown, strict=False):
            for colour, (name, lines) in zip(_COLOURS * len(metrics), metrics.items(), strict=False):
                found = [line for line in lines if line["kind"] == kind and number in line]
                if points := [(line["step"], _drawable(line[number])) for line in found]:
                    marker = "o" if kind == "held_out" else ""
                    axis.plot(*zip(*points, strict=True), marker=marker, markersize=4, color=colour, label=name)
            axis.set_title(f"{'held-out' if kind == 'held_out' else 'training'}: {title}", fontsize=10)
            axis.set_xlabel("step")
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
            if number == "agreement":
                axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=130)


def _drawable(number: float) -> float:
    """What no float32 can be is damage, and matplotlib has no axis for it."""
    return number if abs(number) < 3.5e38 else math.nan


def _evaluations(lines: list[dict]) -> list[str]:
    found = [line for line in lines if line["kind"] == "held_out"]
    if not found:
        return ["No evaluation yet."]
    names = [name for name in found[-1] if name not in ("step", "kind")]
    rows = [[f"{line['step']:,}", *(f"{line.get(name, math.nan):.4f}" for name in names)] for line in found]
    return table(["step", *names], rows)


def _throughput(lines: list[dict]) -> list[str]:
    timed = [line for line in lines if "tokens_per_second" in line]
    if not timed:
        return ["No throughput yet."]
    rates = sorted(line["tokens_per_second"] for line in timed)
    return [f"Throughput while training, median of {len(rates)} readings: {rates[len(rates) // 2]:,.0f} tokens/s."]
