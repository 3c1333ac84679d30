"""Draws the curves of runs: one panel per metric, all together as a PNG and each as an SVG for the HTML page."""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distil_jax.files import whole_file
from distil_jax.io.metrics import REFERENCES, format_number
from distil_jax.reporting.history import PERCENT_METRICS, TASK_METRICS
from distil_jax.reporting.page import Curves, panel_spans, printable
from distil_jax.reporting.style import GRID, INK, MUTED, RUN_STYLES, VARIABLES
from distil_jax.schema import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Panel:
    kind: str  # of the lines in metrics.jsonl that hold the metric
    metric: str
    title: str


PANELS = (
    Panel("held_out", "agreement", "held-out: agreement with the teacher"),
    Panel("held_out", "mlm", "held-out: MLM loss"),
    Panel("held_out", "kl", "held-out: KL to the teacher at T = 1"),
    Panel("held_out", "accuracy", "held-out: accuracy"),
    *(Panel("held_out", name, f"held-out: {name}") for name in TASK_METRICS if name != "accuracy"),
    Panel("held_out", "loss", "held-out: loss on the labels"),
    Panel("train", "task", "training: loss on the labels"),
    Panel("train", "soft", "training: distance to the teacher's logits"),
    Panel("train", "mlm", "training: MLM cross entropy"),
    Panel("train", "kl", "training: KL to the teacher (T² included)"),
    Panel("train", "cosine", "training: 1 − cos of hidden states"),
    Panel("train", "mse", "training: squared difference of logits"),
    Panel("train", "tokens_per_second", "training: tokens per second"),
)
_COLUMNS, _WIDTH, _HEIGHT = 3, 4.2, 2.9  # columns of panels in the PNG, and a panel's width and height in inches
_LEFT, _MARGIN = 0.13, 0.01  # of a panel in HTML, as shares of its width: room for labels, and the least around them
_TICKS = (1, 2, 2.5, 5, 10)
_MOST_POINTS = 1200  # of one curve
_SETTINGS = {
    "font.size": 10,
    "text.parse_math": False,  # the name of a run may be $x$
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-9, 9),  # whole numbers: a power of ten above the axis would move the title out
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "svg.fonttype": "none",  # keep text as text, which is sharp, small and searchable
    "svg.hashsalt": "distil-jax",  # equal data gives equal files
}


def draw_curves(metrics: dict[str, list[dict]], path: Path) -> Curves:
    """Draws every metric that at least one run has.

    Args:
      metrics: the lines of metrics.jsonl by name of run.
      path: of the PNG to write.

    Returns:
      The block for a page.

    Raises:
      InputError: no run has any of the metrics yet.
    """
    import matplotlib

    shown = [panel for panel in PANELS if any(_points(lines, panel) for lines in metrics.values())]
    require(bool(shown), "There are no metrics to draw yet: wait for the first evaluation of the run.")
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a run's name may have letters that the font lacks
        _png(metrics, shown, path)
        svgs = tuple(_svg(metrics, panel) for panel in shown)
    legend = tuple((_line_sample(i), name) for i, name in enumerate(metrics)) if len(metrics) > 1 else ()
    return Curves(path.name, svgs, legend)


def _png(metrics: dict[str, list[dict]], shown: Sequence[Panel], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = math.ceil(len(shown) / _COLUMNS)
    figure = Figure(figsize=(_WIDTH * min(_COLUMNS, len(shown)), _HEIGHT * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    tracks, end, spans = figure.add_gridspec(rows, 6), 0, panel_spans(len(shown))
    for panel, span in zip(shown, spans, strict=True):
        row, column = divmod(end, 6)
        _draw(figure.add_subplot(tracks[row, column : column + span]), metrics, panel)
        end += span
    if len(metrics) > 1:
        _legend(figure, list(metrics))
    with whole_file(path) as draft:
        figure.savefig(draft, dpi=130)


def _legend(figure: Figure, names: list[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=f"run {i}", **_line_style(i)) for i in range(len(names))]
    legend = figure.legend(handles=handles, loc="outside upper left", ncols=min(3, len(names)), frameon=False)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(printable(name))  # as the label of a line, a name that begins with _ would be left out


def _svg(metrics: dict[str, list[dict]], panel: Panel) -> str:
    """One panel as an SVG to put into HTML: coloured by the page's CSS variables, without style sheet or metadata."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.8, 2.75))
    # The position is fixed, so that the axes of all panels line up, unless the labels need more room.
    axis = figure.add_axes((_LEFT, 0.17, 0.97 - _LEFT, 0.70))
    _draw(axis, metrics, panel)
    beyond = _MARGIN - axis.yaxis.get_tightbbox(FigureCanvasAgg(figure).get_renderer()).x0 / figure.bbox.width
    if beyond > 0:
        axis.set_position((_LEFT + beyond, 0.17, 0.97 - _LEFT - beyond, 0.70))
    file = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    svg = file.getvalue()
    view_box = re.search(r'viewBox="[\d. ]+"', svg)[0]
    body = svg[svg.index(">", svg.index("<svg")) + 1 :].strip()
    body = re.sub(r"<style.*?</style>", "", body, count=1, flags=re.DOTALL)  # it would apply to the whole page
    # Ids must be unique in the page, but panels may use the same id for different clip paths or markers.
    prefix = f"{panel.kind}-{panel.metric}-"
    body = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}", body)
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var(--{variable})")
    return f'<svg {view_box} role="img" aria-label="{html.escape(panel.title)}">\n{body}'


def _line_sample(run: int) -> str:
    """The line of a run (by its index) as an SVG for the legend."""
    style_number = run % len(RUN_STYLES)
    dashes = " ".join(f"{1.8 * length:g}" for length in RUN_STYLES[style_number][2])
    style = f"stroke: var(--run-{style_number}); stroke-width: 3; stroke-dasharray: {dashes or 'none'}"
    return f'<svg viewBox="0 0 36 8" aria-hidden="true"><line x1="0" x2="36" y1="4" y2="4" style="{style}"/></svg>'


def _line_style(run: int, points: int = 0) -> dict:
    """matplotlib's arguments for the line of a run (by its index) with so many points."""
    colour, _, dashes = RUN_STYLES[run % len(RUN_STYLES)]
    return {"color": colour, "linestyle": (0, dashes) if dashes else "-", "linewidth": 1.8 if points < 200 else 1.2}


def _draw(axis: Axes, metrics: dict[str, list[dict]], panel: Panel) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    values = []
    for run, (name, lines) in enumerate(metrics.items()):
        if points := _points(lines, panel):
            marked = len(points) == 1 or (panel.kind == "held_out" and len(points) <= 25)
            style = _line_style(run, len(points)) | ({"marker": "o", "markersize": 4} if marked else {})
            axis.plot(*zip(*_downsampled(points), strict=True), label=name, **style)
            values += [value for _, value in points if math.isfinite(value)]
            for step in resumed_after(lines):
                axis.axvline(
                    step, color=_line_style(run)["color"], linestyle=":", linewidth=1, gid=f"resumed-{run}-{step}"
                )
    references = _draw_references(axis, metrics, panel)
    axis.set_title(panel.title, loc="left", fontsize=10, pad=9)
    axis.set_xlabel("step", color=MUTED, fontsize=9, labelpad=1)
    axis.tick_params(labelsize=9, length=0)
    last = max(line["step"] for lines in metrics.values() for line in lines)  # of all kinds, so all panels share it
    axis.set_xlim(-0.03 * last, 1.03 * last or 1)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=_TICKS))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.yaxis.set_major_locator(MaxNLocator(5, steps=_TICKS))
    if panel.metric == "tokens_per_second":
        axis.yaxis.set_major_formatter(EngFormatter(sep=""))
    in_percent = panel.metric in PERCENT_METRICS
    from_zero = panel.metric == "tokens_per_second"
    _set_limits(axis, values, references, cut_outliers=not in_percent, from_zero=from_zero)
    if in_percent:
        _label_in_percent(axis)


def _label_in_percent(axis: Axes) -> None:
    """Labels the y axis in percent, with as few decimals as tell its ticks exactly."""
    from matplotlib.ticker import PercentFormatter

    ticks = 100 * np.asarray(axis.get_yticks())
    decimals = next(n for n in range(10) if n == 9 or np.allclose(ticks, np.round(ticks, n), rtol=0, atol=1e-9))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=decimals, symbol=" %"))


def _draw_references(axis: Axes, metrics: dict[str, list[dict]], panel: Panel) -> list[float]:
    """Draws dashed lines at what evaluations are read against, each value once, and returns the values."""
    if panel.kind != "held_out":
        return []
    drawn: dict[tuple[str, float], int] = {}  # kind and value -> the first run that has them
    for run, lines in enumerate(metrics.values()):
        for line in lines:
            if line["kind"] in REFERENCES and math.isfinite(_drawable(line.get(panel.metric, math.nan))):
                drawn.setdefault((line["kind"], line[panel.metric]), run)
    for (kind, value), run in drawn.items():
        colour = MUTED if len(drawn) == 1 else RUN_STYLES[run % len(RUN_STYLES)][0]
        axis.axhline(value, color=colour, linestyle=(0, (4, 3)), linewidth=1.2, label=f"_{kind}", zorder=1)
        place = {"xytext": (0, 2), "textcoords": "offset points", "ha": "right", "va": "bottom"}
        axis.annotate(
            REFERENCES[kind], (0.98, value), xycoords=axis.get_yaxis_transform(), fontsize=8.5, color=colour, **place
        )
    return [value for _, value in drawn]


def _set_limits(
    axis: Axes, values: list[float], references: list[float], *, cut_outliers: bool, from_zero: bool
) -> None:
    """Sets the limits of the y axis.

    Args:
      axis: of a panel.
      values: all finite values of its curves.
      references: values that are always shown.
      cut_outliers: leave out values that are further from the middle 90 % than the width of these, as the first losses
        of a run often are. A note in the panel gives the largest or smallest of them.
      from_zero: start the axis at 0.
    """
    if not values or max(values + references) == min(values + references):
        return
    low, high = np.quantile(np.asarray(values, np.float64), [0.05, 0.95])
    width = high - low
    bottom, top = min(values), max(values)
    if width > 0 and cut_outliers:
        bottom, top = max(bottom, low - width), min(top, high + width)
    bottom, top = min([bottom, *references]), max([top, *references])
    bottom = min(0.0, bottom) if from_zero else bottom
    margin = 0.06 * (top - bottom)
    axis.set_ylim(bottom if from_zero and bottom == 0 else bottom - margin, top + margin)
    style = {"transform": axis.transAxes, "ha": "right", "fontsize": 8.5, "color": MUTED}
    if max(values) > top:
        axis.text(0.98, 0.97, f"up to {format_number(max(values), 3)}", va="top", **style)
    if min(values) < bottom:
        axis.text(0.98, 0.03, f"down to {format_number(min(values), 3)}", va="bottom", **style)


def _points(lines: list[dict], panel: Panel) -> list[tuple[float, float]]:
    """The step and the value of every line that has the panel's metric."""
    lines = [line for line in lines if line["kind"] == panel.kind and panel.metric in line]
    return [(line["step"], _drawable(line[panel.metric])) for line in lines]


def resumed_after(lines: list[dict]) -> list[int]:
    """The steps after which a run was resumed: the first step after a start has a line of its own, without a speed."""
    starts = [line["step"] for line in lines if "compile_seconds" in line and "seconds_per_step" not in line]
    return [step - 1 for step in starts if step > 1]


def _downsampled(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points, or if there are more than a screen can show, the means of groups of neighbours."""
    size = math.ceil(len(points) / _MOST_POINTS)
    if size == 1:
        return points
    return [tuple(np.mean(points[i : i + size], axis=0).tolist()) for i in range(0, len(points), size)]


def _drawable(value: float) -> float:
    """The value, or NaN if it exceeds float32: only a damaged file has such values, and matplotlib cannot draw them."""
    return value if abs(value) < 3.5e38 else math.nan
