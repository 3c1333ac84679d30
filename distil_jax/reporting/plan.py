"""A plan as tables, a page and a picture."""

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
    """The topology as a person writes it."""
    return f"{job.slices}*{job.topology}" if job.slices > 1 else job.topology


def memory(compiled: Compiled) -> str:
    """The share of a chip's memory that it takes, in words."""
    return f"{compiled.peak / _GIB:.1f} GiB per chip, which has {chip_of(compiled).memory / _GIB:.0f}"


def single(workload: Workload, job: Job, compiled: Compiled) -> list[str]:
    """One topology, a line a number."""
    train = workload.config.train
    rows = train.batch_rows // compiled.accumulation
    named = compiled.parameters + compiled.optimizer + compiled.teacher
    lines = [
        ("chips, hosts", f"{compiled.chips} x {compiled.kind}, {compiled.hosts}"),
        ("fits", f"{'yes' if compiled.fits else 'NO'}: {memory(compiled)}"),
        ("  student's parameters", _gib(compiled.parameters)),
        ("  optimiser", _gib(compiled.optimizer)),
        ("  teacher", _gib(compiled.teacher)),
        ("  temporaries and batch", _gib(compiled.peak - named)),
        ("batch", f"{train.batch_rows:,} rows of {workload.length}: {compiled.accumulation} micro-batches of {rows:,}"),
        ("computed with", compiled.attention),
        ("FLOPs a position", f"{step_flops(workload.step, workload.length) / 1e6:,.1f} M by formula"),
    ]
    if not compiled.fits:
        return ["", *table((name(job), ""), lines), "", *_assumptions(workload)]
    bound, peak = roofline(compiled, job.slices), compiled.chips * chip_of(compiled).flops
    counted = compiled.flops * compiled.chips / _asked(workload)
    lines += [
        ("FLOPs a step and chip", f"{compiled.flops / 1e12:,.2f} T, {counted:.3f} of the formula"),
        ("exchanged a step and chip", _exchanged(compiled)),
        ("products, at their peak", _seconds(bound.products)),
        ("HBM, at its peak", f"{_seconds(bound.memory)}, {compiled.hbm_bytes / 1e9:,.1f} GB"),
        ("links, at their peak", _seconds(bound.links)),
        ("network between slices", _seconds(bound.network) if job.slices > 1 else "none"),
        ("step, at least", f"{_seconds(bound.seconds)}; the roof is {bound.roof}"),
        ("real tokens/s, at most", f"{_rate(workload, bound.seconds):,.0f}"),
        ("share of the peak, at most", f"{_asked(workload) / (bound.seconds * peak):.0%}"),
        ("the run, at least", _duration(workload, bound.seconds)),
        ("compiled in", f"{compiled.seconds:.0f} s"),
    ]
    return ["", *table((name(job), ""), lines), "", *_assumptions(workload)]


def sweep(workload: Workload, pairs: Pairs) -> list[str]:
    """Several topologies, a line each."""
    head = ("topology", "chips", "hosts", "micro-batches", "GiB per chip", "fits", "products", "HBM", "links")
    head = (*head, "network", "step >=", "roof", "tokens/s <=", "the run >=", "chip-hours >=")
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
            row += [_seconds(each) for each in (bound.products, bound.memory, bound.links, bound.network)]
            row += [_seconds(bound.seconds), bound.roof, f"{_rate(workload, bound.seconds):,.0f}"]
            row += [f"{hours:,.3g} h", f"{hours * compiled.chips:,.3g}"]
        rows.append(row + [""] * (len(head) - len(row)))
    return ["", *table(head, rows), "", *_assumptions(workload)]


def write(workload: Workload, pairs: Pairs, lines: list[str], folder: Path) -> Path:
    """Writes plan.md, and plan.png for several topologies; returns the page's path."""
    page = ["# Plan", *lines]
    if len(pairs) > 1:
        with whole_file(folder / "plan.png") as draft:
            _draw(workload, pairs, draft)
        page += ["", "![plan](plan.png)"]
    write_whole(folder / "plan.md", "\n".join(page) + "\n")
    return folder / "plan.md"


def _draw(workload: Workload, pairs: Pairs, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fitting = [(job, compiled, roofline(compiled, job.slices)) for job, compiled in pairs if compiled.fits]
    figure = Figure(figsize=(10, 1.6 + 0.4 * len(fitting)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    names = [f"{name(job)} ({compiled.chips})" for job, compiled, _ in fitting]
    colours = {"products": "#0072B2", "HBM": "#D55E00", "links": "#009E73", "network": "#CC79A7"}
    for axis, values, title in (
        (left, [_rate(workload, bound.seconds) / 1e6 for *_, bound in fitting], "million tokens/s, at most"),
        (right, [_hours(workload, bound.seconds) for *_, bound in fitting], f"{_what(workload)}: hours, at least"),
    ):
        bars = axis.barh(names, values, color=[colours[bound.roof] for *_, bound in fitting])
        axis.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.15)
    left.invert_yaxis()
    roofs = list(dict.fromkeys(bound.roof for *_, bound in fitting))
    handles = [left.barh([names[0]], [0], color=colours[roof]) for roof in roofs]
    figure.legend(
        handles, [f"the roof is {roof}" for roof in roofs], loc="outside lower center", ncols=4, frameon=False
    )
    figure.savefig(path, dpi=130)


def _assumptions(workload: Workload) -> list[str]:
    return ["Assumed:", "", *(f"- {sentence}" for sentence in (*ASSUMPTIONS, *workload.assumptions))]


def _asked(workload: Workload) -> float:
    """The FLOPs of a step, by formula."""
    return step_flops(workload.step, workload.length) * workload.config.train.batch_rows * workload.length


def _rate(workload: Workload, seconds: float) -> float:
    return workload.config.train.batch_rows * workload.row_tokens / seconds


def _what(workload: Workload) -> str:
    return f"{workload.steps:,} steps" if workload.steps else "a billion tokens"


def _hours(workload: Workload, seconds: float) -> float:
    steps = workload.steps or 1e9 / (workload.config.train.batch_rows * workload.row_tokens)
    return steps * seconds / 3600


def _duration(workload: Workload, seconds: float) -> str:
    return f"{_hours(workload, seconds):,.3g} h for {_what(workload)}"


def _exchanged(compiled: Compiled) -> str:
    kinds = (
        f"{number:.0f} {kind}, {compiled.exchanged[kind] / 1e6:,.1f} MB"
        for kind, number in compiled.collectives.items()
    )
    return "; ".join(kinds) or "nothing"


def _gib(number: float) -> str:
    return f"{number / _GIB:.2f} GiB"


def _seconds(number: float) -> str:
    return f"{number:.2f} s" if number >= 1 else f"{number * 1e3:.3g} ms"
