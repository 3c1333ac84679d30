"""The results of `distil-jax plan` as tables, a Markdown page and a plot."""

from __future__ import annotations

from pathlib import Path

from distil_jax.files import whole_file, write_whole
from distil_jax.machines.aot import Compiled, Job
from distil_jax.machines.flops import step_flops
from distil_jax.machines.roofline import ASSUMPTIONS, chip_of, roofline
from distil_jax.machines.workload import Workload
from distil_jax.reporting.markdown import table

Pairs = list[tuple[Job, Compiled]]
_GIB = 2**30


def name(job: Job) -> str:
    """The topology in the notation of `distil-jax plan`: "v5e:4x4", or "2*v5e:4x4" for two slices."""
    return f"{job.slices}*{job.topology}" if job.slices > 1 else job.topology


def memory(compiled: Compiled) -> str:
    """The memory that the step needs on a chip, and the chip's memory, in words."""
    return f"{compiled.peak / _GIB:.1f} GiB per chip, which has {chip_of(compiled).memory / _GIB:.0f}"


def single(workload: Workload, job: Job, compiled: Compiled) -> list[str]:
    """The table for one topology, with one line per quantity, and the assumptions."""
    train = workload.config.train
    rows = train.batch_rows // compiled.accumulation
    persistent = compiled.parameters + compiled.optimizer + compiled.teacher
    lines = [
        ("chips, hosts", f"{compiled.chips} x {compiled.kind}, {compiled.hosts}"),
        ("fits", f"{'yes' if compiled.fits else 'NO'}: {memory(compiled)}"),
        ("  student's parameters", _gib(compiled.parameters)),
        ("  optimiser", _gib(compiled.optimizer)),
        ("  teacher", _gib(compiled.teacher)),
        ("  temporaries and batch", _gib(compiled.peak - persistent)),
        ("batch", f"{train.batch_rows:,} rows of {workload.length}: {compiled.accumulation} micro-batches of {rows:,}"),
        ("attention", compiled.attention),
        ("FLOPs per position", f"{step_flops(workload.step, workload.length) / 1e6:,.1f} M by formula"),
    ]
    if not compiled.fits:
        return ["", *table((name(job), ""), lines), "", *_assumptions(workload)]
    bound, peak = roofline(compiled, job.slices), compiled.chips * chip_of(compiled).flops
    counted = compiled.flops * compiled.chips / _formula_flops(workload)
    lines += [
        ("FLOPs per step and chip", f"{compiled.flops / 1e12:,.2f} T, {counted:.3f} of the formula"),
        ("collectives per step and chip", _collectives(compiled)),
        ("compute, at peak rate", _seconds(bound.compute)),
        ("HBM, at peak rate", f"{_seconds(bound.memory)}, {compiled.hbm_bytes / 1e9:,.1f} GB"),
        ("links, at peak rate", _seconds(bound.links)),
        ("network between slices", _seconds(bound.network) if job.slices > 1 else "none"),
        ("step, at least", f"{_seconds(bound.seconds)}; the bottleneck is {bound.bottleneck}"),
        ("real tokens/s, at most", f"{_tokens_per_second(workload, bound.seconds):,.0f}"),
        ("share of peak FLOP/s, at most", f"{_formula_flops(workload) / (bound.seconds * peak):.0%}"),
        ("the run, at least", f"{_hours(workload, bound.seconds):,.3g} h for {_extent(workload)}"),
        ("compile time", f"{compiled.seconds:.0f} s"),
    ]
    return ["", *table((name(job), ""), lines), "", *_assumptions(workload)]


def sweep(workload: Workload, pairs: Pairs) -> list[str]:
    """The table for several topologies, with one line for each, and the assumptions."""
    head = ("topology", "chips", "hosts", "micro-batches", "GiB per chip", "fits", "compute", "HBM", "links")
    head = (*head, "network", "step >=", "bottleneck", "tokens/s <=", "the run >=", "chip-hours >=")
    rows = []
    for job, compiled in pairs:
        row = [name(job), f"{compiled.chips}", f"{compiled.hosts}", f"{compiled.accumulation}"]
        row += [
            f"{compiled.peak / _GIB:.1f} of {chip_of(compiled).memory / _GIB:.0f}",
            "yes" if compiled.fits else "NO",
        ]
        if compiled.fits:
            bound = roofline(compiled, job.slices)
            hours = _hours(workload, bound.seconds)
            row += [_seconds(time) for time in (bound.compute, bound.memory, bound.links, bound.network)]
            row += [_seconds(bound.seconds), bound.bottleneck, f"{_tokens_per_second(workload, bound.seconds):,.0f}"]
            row += [f"{hours:,.3g} h", f"{hours * compiled.chips:,.3g}"]
        rows.append(row + [""] * (len(head) - len(row)))
    return ["", *table(head, rows), "", *_assumptions(workload)]


def write(workload: Workload, pairs: Pairs, lines: list[str], folder: Path) -> Path:
    """Writes plan.md, and plan.png if there are several topologies.

    Args:
      workload: the run.
      pairs: each job with its compiled step.
      lines: the tables, as `single` or `sweep` returns them.
      folder: an existing folder.

    Returns:
      The path of plan.md.
    """
    page = ["# Plan", *lines]
    if len(pairs) > 1:
        with whole_file(folder / "plan.png") as draft:
            _draw(workload, pairs, draft)
        page += ["", "![plan](plan.png)"]
    write_whole(folder / "plan.md", "\n".join(page) + "\n")
    return folder / "plan.md"


def _draw(workload: Workload, pairs: Pairs, path: Path) -> None:
    """Draws bars of throughput and of the run's hours for every topology that fits."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fitting = [(job, compiled, roofline(compiled, job.slices)) for job, compiled in pairs if compiled.fits]
    figure = Figure(figsize=(10, 1.6 + 0.4 * len(fitting)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    names = [f"{name(job)} ({compiled.chips})" for job, compiled, _ in fitting]
    colours = {"compute": "#0072B2", "HBM": "#D55E00", "links": "#009E73", "network": "#CC79A7"}
    for axis, values, title in (
        (
            left,
            [_tokens_per_second(workload, bound.seconds) / 1e6 for *_, bound in fitting],
            "million tokens/s, at most",
        ),
        (right, [_hours(workload, bound.seconds) for *_, bound in fitting], f"{_extent(workload)}: hours, at least"),
    ):
        bars = axis.barh(names, values, color=[colours[bound.bottleneck] for *_, bound in fitting])
        axis.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.15)
    left.invert_yaxis()
    bottlenecks = list(dict.fromkeys(bound.bottleneck for *_, bound in fitting))
    handles = [left.barh([names[0]], [0], color=colours[bottleneck]) for bottleneck in bottlenecks]
    labels = [f"the bottleneck is {bottleneck}" for bottleneck in bottlenecks]
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)


def _assumptions(workload: Workload) -> list[str]:
    return ["Assumptions:", "", *(f"- {sentence}" for sentence in (*ASSUMPTIONS, *workload.assumptions))]


def _formula_flops(workload: Workload) -> float:
    """FLOPs of a step on all chips, by formula."""
    return step_flops(workload.step, workload.length) * workload.config.train.batch_rows * workload.length


def _tokens_per_second(workload: Workload, seconds: float) -> float:
    return workload.config.train.batch_rows * workload.row_tokens / seconds


def _extent(workload: Workload) -> str:
    """What the hours are given for."""
    return f"{workload.steps:,} steps" if workload.steps else "a billion tokens"


def _hours(workload: Workload, seconds: float) -> float:
    """Hours of the run, or of a billion tokens if its length is unknown.

    Args:
      workload: the run.
      seconds: of one step.
    """
    steps = workload.steps or 1e9 / (workload.config.train.batch_rows * workload.row_tokens)
    return steps * seconds / 3600


def _collectives(compiled: Compiled) -> str:
    kinds = (
        f"{count:.0f} {kind}, {compiled.collective_bytes[kind] / 1e6:,.1f} MB"
        for kind, count in compiled.collective_counts.items()
    )
    return "; ".join(kinds) or "none"


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f} GiB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
