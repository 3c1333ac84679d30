"""The sections of a report, as blocks of a page, from the histories and configs of its runs."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from pathlib import Path

import tomli_w

from distil_jax.config.model import ModelConfig
from distil_jax.config.run import Config
from distil_jax.config.task import FinetuneConfig
from distil_jax.io.checkpoint import Checkpoints
from distil_jax.io.metrics import format_number
from distil_jax.io.names import short_name, source_name, without_places
from distil_jax.models.encoder import count_parameters
from distil_jax.reporting.history import PERCENT_METRICS, History, format_count, format_duration
from distil_jax.reporting.markdown import mean_and_spread
from distil_jax.reporting.page import Block, Code, Fold, Paragraph, Table
from distil_jax.reporting.task_scores import read_scores, score_notes, score_table
from distil_jax.schema import InputError, build, differences, to_dict

_LABELS = {
    "mlm": "MLM loss",
    "kl": "KL to the teacher",
    "agreement": "agreement with the teacher",
}
_EXCLUDED = "without evaluations and checkpoints"


def summary(folder: Path, history: History, config: Config | FinetuneConfig, *, lead: str) -> list[Block]:
    """What was trained, how many steps, how long, and the change of the main metrics, in one sentence.

    If the run is not finished, a second one has the share of the steps that are done and the time that is left.

    Args:
      folder: of the run.
      history: of the run.
      config: of the run.
      lead: text in bold before the sentence.
    """
    student, teacher = _describe_models(folder, config)
    steps, tokens = config.train.steps, history.tokens_per_step
    done = f"{history.steps:,}" + (f" of {steps:,}" if steps else "") + " steps"
    if history.steps and math.isfinite(tokens):
        of = f" of {format_count(steps * tokens)}" if history.steps < steps else ""
        done += f" (about {format_count(history.steps * tokens)}{of} tokens)"
    time = f" in {format_duration(history.seconds)}" if history.seconds else ""
    sentence = f"{student}, {teacher}: {done}{time}"
    if evaluations := history.evaluations:
        names = config.task.metric_names if isinstance(config, FinetuneConfig) else ("mlm", "agreement")
        changes = [f"{_label(name)} {_first_to_last(evaluations, name)}" for name in names if name in evaluations[-1]]
        sentence += f"; held out: {', '.join(changes)}" if changes else ""
    blocks: list[Block] = [Paragraph(f"{sentence}.", lead)]
    if history.steps < steps:
        remaining = "The time per step is not known yet"
        if history.throughputs:
            time = format_duration((steps - history.steps) * history.seconds_per_step)
            remaining = f"At the median time per step, the rest takes {time}, {_EXCLUDED}"
        blocks += [Paragraph(f"Not finished: {100 * history.steps / steps:.0f} % of the steps are done. {remaining}.")]
    return blocks


def _describe_models(folder: Path, config: Config | FinetuneConfig) -> tuple[str, str]:
    """The student and its teacher in words; with their sizes if the run has a checkpoint, whose metadata has them."""
    metadata = _metadata(folder)
    path = short_name(config.teacher.path)
    if isinstance(config, FinetuneConfig):
        teacher = f" with the logits of {path}" if config.loss.needs_teacher else ""
        return short_name(config.model.path), f"fine-tuned on {source_name(config.task.train)}{teacher}"
    training = "distilled from" if config.loss.needs_teacher else "trained without a teacher and compared with"
    student = f"A {config.student.num_layers}-layer student"
    teacher = f"{training} {path}" if path else "trained without a teacher"
    with contextlib.suppress(InputError, KeyError):  # no checkpoint, or one of another version
        student += f" of {_parameters(metadata['student'])} parameters"
        if path:
            teacher += f" ({metadata['teacher']['num_layers']} layers, {_parameters(metadata['teacher'])} parameters)"
    return student, teacher


def _parameters(model: dict) -> str:
    return format_count(count_parameters(build(ModelConfig, model)))


def _metadata(folder: Path) -> dict:
    """The metadata of the newest readable checkpoint; empty if there is none."""
    if not (folder / "checkpoints").is_dir():
        return {}
    with contextlib.closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        for step in reversed(checkpoints.steps()):
            with contextlib.suppress(InputError):
                return checkpoints.metadata(step)
    return {}


def held_out(histories: dict[str, History]) -> Block:
    """The first and the last evaluation: of one run in columns, with the change; of several runs in one column each.

    Another column has what they are read against, such as the teacher's own numbers.
    """
    evaluations = {name: history.evaluations for name, history in histories.items() if history.evaluations}
    if not evaluations:
        return Paragraph("No evaluation yet.")
    metrics = list(dict.fromkeys(name for lines in evaluations.values() for name in _metrics(lines[-1])))
    references = _references({name: histories[name] for name in evaluations})
    beside = {name: [_format(name, line[name]) if name in line else "" for _, line in references] for name in metrics}
    titles = [title for title, _ in references]
    if len(histories) > 1:
        rows = [
            [_label(name), *(_first_to_last(lines, name) for lines in evaluations.values()), *beside[name]]
            for name in metrics
        ]
        return Table(("metric, first → last", *evaluations, *titles), rows)
    (lines,) = evaluations.values()
    first, last = lines[0], lines[-1]
    rows = []
    for name in metrics:
        before, after = first.get(name, math.nan), last[name]
        cells = [_format(name, before)]
        if first["step"] != last["step"]:
            cells += [_format(name, after), _change(name, before, after)]
        rows.append([_label(name), *cells, *beside[name]])
    steps = [f"step {first['step']:,}"]
    if first["step"] != last["step"]:
        steps += [f"step {last['step']:,}", "change"]
    return Table(("metric", *steps, *titles), rows)


def _references(histories: dict[str, History]) -> list[tuple[str, dict]]:
    """Titles and lines of what runs are read against, each line once; with the run's name where runs differ in it."""
    lines = [(kind, run, line) for run, told in histories.items() for kind, line in told.references.items()]
    unique = [item for i, item in enumerate(lines) if item[2] not in [line for _, _, line in lines[:i]]]
    kinds = [kind for kind, _, _ in unique]
    return [(kind if kinds.count(kind) == 1 else f"{kind} of {run}", line) for kind, run, line in unique]


def best_checkpoint(folder: Path, *, lead: str) -> list[Block]:
    """The scores of a fine-tuning run's best checkpoint, beside the largest class; nothing before they are written.

    Args:
      folder: of the run.
      lead: text in bold before the table.
    """
    scores = read_scores(folder)
    if scores is None:
        return []
    head, rows = score_table(scores)
    sentence = f"The best checkpoint, that of step {scores['step']:,}, on all examples:"
    return [Paragraph(sentence, lead), Table(tuple(head), rows), *map(Paragraph, score_notes(scores))]


def by_seed(configs: dict[str, Config | FinetuneConfig]) -> dict[str, list[str]]:
    """Groups runs that differ only in their seed.

    Args:
      configs: by name of run.

    Returns:
      The names of the runs in each group. A group has the name of its first run. If it has several runs, the seed is
      removed from the end of that name, unless two groups would then have the same name.
    """
    groups: dict[str, list[str]] = {}
    for name, config in configs.items():
        for group in groups.values():
            other = configs[group[0]]
            new = type(config) is type(other) and config.seed not in {configs[member].seed for member in group}
            if new and not differences(replace(config, seed=other.seed), other):
                group.append(name)
                break
        else:
            groups[name] = [name]
    names = {
        name: name.removesuffix(f"-{configs[name].seed}") if len(group) > 1 else name for name, group in groups.items()
    }
    if len(set(names.values())) < len(names):
        return groups
    return {names[name]: group for name, group in groups.items()}


def over_seeds(histories: dict[str, list[History]]) -> Block:
    """A table with one line per group of runs: mean and standard deviation of their last held-out metrics.

    Args:
      histories: of the runs in each group, as `by_seed` groups them.
    """
    evaluated = {name: [history for history in group if history.evaluations] for name, group in histories.items()}
    last_lines = {name: [history.evaluations[-1] for history in group] for name, group in evaluated.items()}
    metrics = list(
        dict.fromkeys(metric for lines in last_lines.values() for line in lines for metric in _metrics(line))
    )
    rows = []
    for name, group in evaluated.items():
        cells = [_format_mean(metric, [line.get(metric, math.nan) for line in last_lines[name]]) for metric in metrics]
        seconds = mean_and_spread([history.step_seconds for history in group], 0)
        rows.append([name, f"{len(group)}", f"{group[0].steps:,}" if group else "", *cells, seconds])
    for title, line in _references({name: group[0] for name, group in evaluated.items() if group}):
        cells = [_format_mean(metric, [line[metric]] if metric in line else []) for metric in metrics]
        rows.append([title, "", "", *cells, ""])
    return Table(("run", "seeds", "steps", *map(_label, metrics), "training, s"), rows)


def _format_mean(metric: str, values: list[float]) -> str:
    if metric in PERCENT_METRICS:
        return mean_and_spread([100 * value for value in values], 1, "\u00a0%")
    return mean_and_spread(values, 3)


def _first_to_last(lines: list[dict], metric: str) -> str:
    values = [_format(metric, line[metric]) for line in (lines[0], lines[-1]) if metric in line]
    return " → ".join(dict.fromkeys(values))


def _metrics(line: dict) -> list[str]:
    """The names of the metrics in a line of metrics.jsonl."""
    return [name for name in line if name not in ("step", "kind")]


def _label(metric: str) -> str:
    return _LABELS.get(metric, metric)


def _format(metric: str, value: float) -> str:
    return f"{100 * value:.1f}\u00a0%" if metric in PERCENT_METRICS else format_number(value)


def _change(metric: str, before: float, after: float) -> str:
    if math.isnan(after - before):
        return ""
    sign, size = "−" if after < before else "+", abs(after - before)
    return f"{sign}{100 * size:.1f}\u00a0points" if metric in PERCENT_METRICS else f"{sign}{format_number(size, 3)}"


def throughput(histories: dict[str, History]) -> list[Block]:
    """A table of throughput, time per step and compilation, with one line per run."""
    if not any(history.throughputs for history in histories.values()):
        return [Paragraph("No throughput yet.")]
    head = (
        "run",
        "tokens/s, median",
        "slowest",
        "fastest",
        "time per step",
        "compilation",
        "steps",
        "compilation, share",
    )
    rows = []
    for name, history in histories.items():
        if history.throughputs:
            slowest, fastest = history.throughputs[0], history.throughputs[-1]
            rates = [f"{rate:,.0f}" for rate in (history.throughput, slowest, fastest)]
            times = [
                f"{history.seconds_per_step:.3g} s",
                format_duration(history.compile_seconds),
                format_duration(history.step_seconds),
            ]
            share = history.compile_seconds / history.seconds if history.seconds else math.nan
            rows.append([name, *rates, *times, f"{100 * share:.0f} %"])
    measurements = max(len(history.throughputs) for history in histories.values())
    measured = (
        f"The median is over {measurements:,} measurements" if measurements > 1 else "The speed was measured once"
    )
    note = (
        f"{measured} while training. Compilation is the time of the first step after each start, and of compiling for "
        f"further lengths of text; the last column is its share of the total {_EXCLUDED}, whose time is not recorded."
    )
    return [Table(head, rows), Paragraph(note)]


def details(history: History, config: Config | FinetuneConfig) -> list[Block]:
    """A run's skipped updates, all its evaluations, and its configuration."""
    blocks: list[Block] = []
    if history.skipped:
        steps = ", ".join(f"{step:,}" for step in history.skipped)
        blocks.append(
            Paragraph(f"Updates were skipped because the loss or a gradient was not finite, at the steps {steps}.")
        )
    if history.evaluations:
        names = _metrics(history.evaluations[-1])
        rows = [
            [f"{line['step']:,}", *(f"{line.get(name, math.nan):z.4f}" for name in names)]
            for line in history.evaluations
        ]
        blocks.append(Fold("all evaluations", [Table(("step", *names), rows)]))
    blocks.append(Fold("configuration", [Code("toml", tomli_w.dumps(without_places(to_dict(config))))]))
    return blocks
