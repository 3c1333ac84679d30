"""The curves of runs: one panel a number, all in one PNG and each as an SVG for a page."""

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
from distil_jax.reporting.history import JUDGES, SHARES, short
from distil_jax.reporting.page import Curves, visible
from distil_jax.reporting.style import GRID, INK, MUTED, RUNS, VARIABLES
from distil_jax.schema import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Panel:
    kind: str  # of the lines of metrics.jsonl
    number: str
    title: str


PANELS = (
    Panel("held_out", "agreement", "held-out: agreement with the teacher"),
    Panel("held_out", "mlm", "held-out: MLM loss"),
    Panel("held_out", "kl", "held-out: KL to the teacher at T = 1"),
    Panel("held_out", "accuracy", "held-out: accuracy"),
    *(Panel("held_out", name, f"held-out: {name}") for name in JUDGES if name != "accuracy"),
    Panel("held_out", "loss", "held-out: loss on the labels"),
    Panel("train", "task", "training: loss on the labels"),
    Panel("train", "soft", "training: distance to the teacher's logits"),
    Panel("train", "mlm", "training: MLM cross entropy"),
    Panel("train", "kl", "training: KL to the teacher (T² included)"),
    Panel("train", "cosine", "training: 1 − cos of hidden states"),
    Panel("train", "mse", "training: squared difference of logits"),
    Panel("train", "tokens_per_second", "training: tokens per second"),
)
_COLUMNS, _WIDTH, _HEIGHT = 3, 4.2, 2.9  # panels beside each other in the PNG, and the inches of one
_TICKS = (1, 2, 2.5, 5, 10)
_MOST = 1200  # points of a curve
_SETTINGS = {
    "font.size": 10,
    "text.parse_math": False,  # a run may be called $x$
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.formatter.useoffset": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "svg.fonttype": "none",  # text stays text: sharp, small and found by a search
    "svg.hashsalt": "distil-jax",  # equal data gives an equal file
}


def draw_curves(metrics: dict[str, list[dict]], path: Path) -> Curves:
    """Draws every number that some run has, writes the PNG to `path` and returns the block for a page.

    Raises:
      InputError: no number yet.
    """
    import matplotlib

    shown = [panel for panel in PANELS if any(_points(lines, panel) for lines in metrics.values())]
    require(bool(shown), "There is no number to draw yet: let the run go on to its first evaluation.")
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a run's name in letters that the font lacks
        _png(metrics, shown, path)
        svgs = tuple(_svg(metrics, panel) for panel in shown)
    legend = [(_swatch(i), name) for i, name in enumerate(metrics)] if len(metrics) > 1 else []
    return Curves(path.name, svgs, tuple(legend))


def _png(metrics: dict[str, list[dict]], shown: Sequence[Panel], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(_WIDTH * columns, _HEIGHT * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes, shown, strict=False):
        _draw(axis, metrics, panel)
    if len(metrics) > 1:
        _legend(figure, list(metrics))
    with whole_file(path) as draft:
        figure.savefig(draft, dpi=130)


def _legend(figure: Figure, names: list[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=f"run {i}", **_line(i)) for i in range(len(names))]
    legend = figure.legend(handles=handles, loc="outside upper left", ncols=min(3, len(names)), frameon=False)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(visible(name))  # set here, where a name that begins with _ is not left out


def _svg(metrics: dict[str, list[dict]], panel: Panel) -> str:
    """One panel, in the colours of the page, and without anything that HTML does not need or a policy forbids."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.8, 2.75))
    # Fixed, so that the axes of all panels stand in line.
    _draw(figure.add_axes((0.13, 0.17, 0.84, 0.70)), metrics, panel)
    text = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    svg = text.getvalue()
    size = re.search(r'viewBox="[\d. ]+"', svg)[0]
    inside = svg[svg.index(">", svg.index("<svg")) + 1 :].strip()
    inside = re.sub(r"<style.*?</style>", "", inside, count=1, flags=re.DOTALL)  # it would hold for the whole page
    # Ids are those of one document: the same clip path or marker may stand in another panel with another meaning.
    own = f"{panel.kind}-{panel.number}-"
    inside = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{own}", inside)
    for colour, variable in VARIABLES.items():
        inside = inside.replace(colour, f"var(--{variable})")
    return f'<svg {size} role="img" aria-label="{html.escape(panel.title)}">\n{inside}'


def _swatch(place: int) -> str:
    dashes = " ".join(f"{1.8 * length:g}" for length in RUNS[place % len(RUNS)][2])
    style = f"stroke: var(--run-{place % len(RUNS)}); stroke-width: 3; stroke-dasharray: {dashes or 'none'}"
    return f'<svg viewBox="0 0 36 8" aria-hidden="true"><line x1="0" x2="36" y1="4" y2="4" style="{style}"/></svg>'


def _line(place: int, points: int = 0) -> dict:
    colour, _, dashes = RUNS[place % len(RUNS)]
    return {"color": colour, "linestyle": (0, dashes) if dashes else "-", "linewidth": 1.8 if points < 200 else 1.2}


def _draw(axis: Axes, metrics: dict[str, list[dict]], panel: Panel) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

    drawn = []
    for place, (name, lines) in enumerate(metrics.items()):
        if points := _points(lines, panel):
            marked = len(points) == 1 or (panel.kind == "held_out" and len(points) <= 25)
            style = _line(place, len(points)) | ({"marker": "o", "markersize": 4} if marked else {})
            axis.plot(*zip(*_thinned(points), strict=True), label=name, **style)
            drawn += [number for _, number in points if math.isfinite(number)]
    axis.set_title(panel.title, loc="left", fontsize=10, pad=9)
    axis.set_xlabel("step", color=MUTED, fontsize=9, labelpad=1)
    axis.tick_params(labelsize=9, length=0)
    last = max(line["step"] for lines in metrics.values() for line in lines)  # the same for all panels
    axis.set_xlim(-0.03 * last, 1.03 * last or 1)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=_TICKS))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.yaxis.set_major_locator(MaxNLocator(5, steps=_TICKS))
    if panel.number in SHARES:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    if panel.number == "tokens_per_second":
        axis.yaxis.set_major_formatter(EngFormatter(sep=""))
    _limit(axis, drawn, share=panel.number in SHARES, from_zero=panel.number == "tokens_per_second")


def _limit(axis: Axes, values: list[float], *, share: bool, from_zero: bool) -> None:
    """Limits that a few numbers far from all others, as the first losses are, do not decide; and says what they cut.

    What lies further outside the middle 90 % than these are wide is cut off.
    """
    if not values or max(values) == min(values):
        return
    low, high = np.quantile(np.asarray(values, np.float64), [0.05, 0.95])
    room = high - low
    bottom, top = min(values), max(values)
    if room > 0 and not share:
        bottom, top = max(bottom, low - room), min(top, high + room)
    bottom = min(0.0, bottom) if from_zero else bottom
    pad = 0.06 * (top - bottom)
    axis.set_ylim(bottom if from_zero and bottom == 0 else bottom - pad, top + pad)
    place = {"transform": axis.transAxes, "ha": "right", "fontsize": 8.5, "color": MUTED}
    if max(values) > top:
        axis.text(0.98, 0.97, f"up to {short(max(values), 3)}", va="top", **place)
    if min(values) < bottom:
        axis.text(0.98, 0.03, f"down to {short(min(values), 3)}", va="bottom", **place)


def _points(lines: list[dict], panel: Panel) -> list[tuple[float, float]]:
    points = [line for line in lines if line["kind"] == panel.kind and panel.number in line]
    return [(line["step"], _drawable(line[panel.number])) for line in points]


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points, or the means of so many neighbours each where a screen could not show them all."""
    size = math.ceil(len(points) / _MOST)
    if size == 1:
        return points
    return [tuple(np.mean(points[i : i + size], axis=0).tolist()) for i in range(0, len(points), size)]


def _drawable(number: float) -> float:
    """The value, or NaN beyond float32, which only damage can hold and matplotlib cannot draw."""
    return number if abs(number) < 3.5e38 else math.nan
