"""The sections of a report on a run's metrics, as blocks of a page."""

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
from distil_jax.models.encoder import count_parameters
from distil_jax.reporting.history import SHARES, History, count, duration, short
from distil_jax.reporting.markdown import mean_and_spread
from distil_jax.reporting.page import Block, Code, Fold, Paragraph, Table
from distil_jax.schema import InputError, build, differences, to_dict

_MEASURES = {
    "mlm": "MLM loss",
    "kl": "KL to the teacher",
    "agreement": "agreement with the teacher",
}
_WITHOUT = "without evaluations and checkpoints"


def summary(folder: Path, history: History, config: Config | FinetuneConfig, *, lead: str) -> list[Block]:
    """One sentence: what was trained, how far it came, what it took and what it was good for; and what is left."""
    student, teacher = _models(folder, config)
    steps, tokens = config.train.steps, history.tokens_per_step
    done = f"{history.done:,}" + (f" of {steps:,}" if steps else "") + " steps"
    if history.done and math.isfinite(tokens):
        of = f" of {count(steps * tokens)}" if history.done < steps else ""
        done += f" (about {count(history.done * tokens)}{of} tokens)"
    took = f" in {duration(history.seconds)}" if history.seconds else ""
    sentence = f"{student}, {teacher}: {done}{took}"
    if evaluations := history.evaluations:
        names = config.task.metric_names if isinstance(config, FinetuneConfig) else ("mlm", "agreement")
        judged = [f"{_name(name)} {_from_to(evaluations, name)}" for name in names if name in evaluations[-1]]
        sentence += f"; held out: {', '.join(judged)}" if judged else ""
    blocks: list[Block] = [Paragraph(f"{sentence}.", lead)]
    if history.done < steps:
        left = duration((steps - history.done) * history.seconds_per_step)
        pace = f"The others take {left} at the median pace, {_WITHOUT}" if history.rates else "There is no pace yet"
        blocks += [Paragraph(f"Not finished: {100 * history.done / steps:.0f} % of the steps are done. {pace}.")]
    return blocks


def _models(folder: Path, config: Config | FinetuneConfig) -> tuple[str, str]:
    """The student and its teacher in words: with sizes once there is a checkpoint, which says them."""
    facts = _facts(folder)
    path = config.teacher.path
    if isinstance(config, FinetuneConfig):
        taught = f" with the logits of {path}" if config.loss.needs_teacher else ""
        return config.model.path, f"fine-tuned on {config.task.train}{taught}"
    learnt = "distilled from" if config.loss.needs_teacher else "trained without a teacher and compared with"
    student = f"A {config.student.num_layers}-layer student"
    teacher = f"{learnt} {path}" if path else "trained without a teacher"
    with contextlib.suppress(InputError, KeyError):  # no checkpoint, or one of another version
        student += f" of {_parameters(facts['student'])} parameters"
        if path:
            teacher += f" ({facts['teacher']['num_layers']} layers, {_parameters(facts['teacher'])} parameters)"
    return student, teacher


def _parameters(model: dict) -> str:
    return count(count_parameters(build(ModelConfig, model)))


def _facts(folder: Path) -> dict:
    """The metadata of the newest readable checkpoint; empty without one."""
    if not (folder / "checkpoints").is_dir():
        return {}
    with contextlib.closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        for step in reversed(checkpoints.steps()):
            with contextlib.suppress(InputError):
                return checkpoints.metadata(step)
    return {}


def held_out(histories: dict[str, History]) -> Block:
    """First and last evaluation, and what changed: of one run in columns, of several in a column each."""
    evaluations = {name: history.evaluations for name, history in histories.items() if history.evaluations}
    if not evaluations:
        return Paragraph("No evaluation yet.")
    measures = list(dict.fromkeys(name for lines in evaluations.values() for name in _measures(lines[-1])))
    if len(histories) > 1:
        rows = [[_name(name), *(_from_to(lines, name) for lines in evaluations.values())] for name in measures]
        return Table(("measure, first → last", *evaluations), rows)
    ((first, *_, last),) = ([lines[0], *lines] for lines in evaluations.values())
    rows = []
    for name in measures:
        before, after = first.get(name, math.nan), last[name]
        rows.append([_name(name), _number(name, before), _number(name, after), _change(name, before, after)])
    if first["step"] == last["step"]:
        return Table(("measure", f"step {first['step']:,}"), [row[:2] for row in rows])
    return Table(("measure", f"step {first['step']:,}", f"step {last['step']:,}", "change"), rows)


def by_seed(configs: dict[str, Config | FinetuneConfig]) -> dict[str, list[str]]:
    """The names of runs that differ in their seed alone, together under the first one's, which loses its seed."""
    together: dict[str, list[str]] = {}
    for name, config in configs.items():
        for names in together.values():
            other = configs[names[0]]
            new = type(config) is type(other) and config.seed not in {configs[each].seed for each in names}
            if new and not differences(replace(config, seed=other.seed), other):
                names.append(name)
                break
        else:
            together[name] = [name]
    plain = {
        name: name.removesuffix(f"-{configs[name].seed}") if len(same) > 1 else name for name, same in together.items()
    }
    if len(set(plain.values())) < len(plain):
        return together
    return {plain[name]: names for name, names in together.items()}


def over_seeds(histories: dict[str, list[History]]) -> Block:
    """A line for each configuration: the last held-out metrics, mean and standard deviation over its runs."""
    judged = {name: [history for history in same if history.evaluations] for name, same in histories.items()}
    measures = list(
        dict.fromkeys(n for same in judged.values() for history in same for n in _measures(history.evaluations[-1]))
    )
    rows = []
    for name, same in judged.items():
        cells = [
            _spread(measure, [history.evaluations[-1].get(measure, math.nan) for history in same])
            for measure in measures
        ]
        seconds = [history.step_seconds for history in same]
        rows.append([name, f"{len(same)}", f"{same[0].done:,}" if same else "", *cells, _spread("seconds", seconds)])
    return Table(("runs with several seeds", "seeds", "steps", *map(_name, measures), "training, s"), rows)


def _spread(measure: str, values: list[float]) -> str:
    if measure in SHARES:
        return mean_and_spread([100 * value for value in values], 1, "\u00a0%")
    return mean_and_spread(values, 0 if measure == "seconds" else 3)


def _from_to(lines: list[dict], name: str) -> str:
    values = [_number(name, line[name]) for line in (lines[0], *lines[-1:]) if name in line]
    return " → ".join(dict.fromkeys(values))


def _measures(line: dict) -> list[str]:
    return [name for name in line if name not in ("step", "kind")]


def _name(measure: str) -> str:
    return _MEASURES.get(measure, measure)


def _number(measure: str, number: float) -> str:
    return f"{100 * number:.1f}\u00a0%" if measure in SHARES else short(number)


def _change(measure: str, before: float, after: float) -> str:
    if math.isnan(after - before):
        return ""
    sign, size = "−" if after < before else "+", abs(after - before)
    return f"{sign}{100 * size:.1f}\u00a0points" if measure in SHARES else f"{sign}{short(size, 3)}"


def throughput(histories: dict[str, History]) -> list[Block]:
    """How fast the steps were, and what else took time, as far as the metrics show."""
    if not any(history.rates for history in histories.values()):
        return [Paragraph("No throughput yet.")]
    head = ("run", "tokens/s, median", "slowest", "fastest", "time a step", "compilation", "all steps", "not in steps")
    rows = []
    for name, history in histories.items():
        if history.rates:
            rates = [f"{rate:,.0f}" for rate in (history.rate, history.rates[0], history.rates[-1])]
            times = [
                f"{history.seconds_per_step:.3g} s",
                duration(history.compile_seconds),
                duration(history.step_seconds),
            ]
            share = history.compile_seconds / history.seconds if history.seconds else math.nan
            rows.append([name, *rates, *times, f"{100 * share:.0f} %"])
    readings = max(len(history.rates) for history in histories.values())
    note = (
        f"Median of {readings:,} readings while training. Compilation is the first step after each start; the last "
        f"column is its share of the time {_WITHOUT}, whose time is not recorded."
    )
    return [Table(head, rows), Paragraph(note)]


def details(history: History, config: Config | FinetuneConfig) -> list[Block]:
    """The updates left out, every evaluation, and the configuration."""
    blocks: list[Block] = []
    if history.skipped:
        steps = ", ".join(f"{step:,}" for step in history.skipped)
        blocks.append(Paragraph(f"Updates left out, because a number was not finite: at the steps {steps}."))
    if history.evaluations:
        names = _measures(history.evaluations[-1])
        rows = [
            [f"{line['step']:,}", *(f"{line.get(name, math.nan):.4f}" for name in names)]
            for line in history.evaluations
        ]
        blocks.append(Fold("all evaluations", [Table(("step", *names), rows)]))
    blocks.append(Fold("configuration", [Code("toml", tomli_w.dumps(to_dict(config)))]))
    return blocks
