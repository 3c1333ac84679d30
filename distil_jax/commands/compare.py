"""`distil-jax compare`: what students keep of their teacher on tasks, and what they save."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import jax

from distil_jax.commands import processes
from distil_jax.commands.baseline import baseline_scores
from distil_jax.commands.finetune import finetune
from distil_jax.commands.markdown import mean_and_spread, table
from distil_jax.commands.report.style import RUNS
from distil_jax.commands.run_folder import Model, open_model
from distil_jax.commands.speed import encoder_seconds
from distil_jax.models.encoder import count_parameters
from distil_jax.schema import InputError, require
from distil_jax.task_config import FinetuneConfig, load_task

_LENGTH = 128  # tokens a row of the timings, or as many positions as the smallest model has
_BASELINE = "TF-IDF + linear"
_DISTILLED = " + its logits"
_MARKS = ("<!-- distil-jax compare -->", "<!-- distil-jax compare: end -->")


@dataclass(frozen=True)
class Comparison:
    """What was found.

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
        found = [each[name] for each in self.scores.values() if name in each]
        return [fmean(of_seed) for of_seed in zip(*found, strict=True)] if len(found) == len(self.scores) else []

    @property
    def names(self) -> list[str]:
        """Everything that has a score, the teacher first."""
        return list(dict.fromkeys([*self.sizes, *(name for each in self.scores.values() for name in each)]))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `distil-jax compare`."""
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="the teacher, then students: model folders, run folders or hub ids, each as PATH or NAME=PATH",
    )
    parser.add_argument("--tasks", nargs="+", required=True, help="names in configs/tasks, or TOML files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the runs (default: 0 1 2)")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="gets the runs, compare.md, .json and .png")
    parser.add_argument(
        "--distil", action="store_true", help="students also learn from the logits of the fine-tuned teacher"
    )
    parser.add_argument(
        "--baseline",
        action="store_true",
        help="a linear model of TF-IDF beside them, where a task has texts and labels",
    )
    parser.add_argument("--cards", action="store_true", help="put the tables into README.md of the model folders named")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="override a config key of every run"
    )


def run(arguments: argparse.Namespace) -> None:
    """Compares, and prints the tables; started again, it goes on where it was."""
    output, models = Path(arguments.output), _named(arguments.models)
    with processes.one_voice():
        found = compare(
            models,
            arguments.tasks,
            seeds=tuple(arguments.seeds),
            output=output,
            overrides=arguments.set,
            distil=arguments.distil,
            baseline=arguments.baseline,
        )
        lines = tables(found)
        print("\n".join(["", *lines]))
        if processes.is_first():
            write(found, lines, output)
            cards = [Path(path) / "README.md" for path in models.values() if arguments.cards]
            for card in filter(Path.is_file, cards):
                into_card(card, lines)
        print(f"\nWrote {output / 'compare.md'}, {output / 'compare.json'} and {output / 'compare.png'}.")


def compare(
    models: dict[str, str],
    tasks: Sequence[str],
    *,
    seeds: tuple[int, ...],
    output: Path,
    overrides: Sequence[str] = (),
    distil: bool = False,
    baseline: bool = False,
) -> Comparison:
    """Fine-tunes every model on every task with every seed, and measures the encoders.

    Args:
      models: paths by name; the first is the teacher.
      tasks: names or TOML files.
      seeds: one run each.
      output: gets TASK/MODEL/SEED, run folders; those that are finished are not run again.
      overrides: of every run's configuration.
      distil: every other model is also fine-tuned with the fine-tuned teacher of the same seed.
      baseline: adds a linear model of TF-IDF.

    Raises:
      InputError: a model or a task that cannot be used; runs that were finished before stay.
    """
    require(len(set(seeds)) == len(seeds) > 0, f"Each seed may be named once, but they are {seeds}.")
    names = {Path(task).stem: task for task in tasks}
    require(len(names) == len(tasks), "Two of the tasks have the same name, so a table could not tell them apart.")
    opened = {name: open_model(path) for name, path in models.items()}
    teacher = next(iter(models))
    configs = {name: load_task(task, [f"model.path={models[teacher]}", *overrides]) for name, task in names.items()}
    scores: dict[str, dict[str, list[float]]] = {}
    for task, config in configs.items():
        scores[task] = {}
        for name, path in models.items():
            of_task = replace(config, model=replace(config.model, path=str(path)))
            scores[task][name] = [_score(of_task, seed, output / task / name / str(seed)) for seed in seeds]
        for name in [each for each in models if distil and each != teacher]:
            found = []
            for seed in seeds:
                path = output / task / teacher / str(seed) / "model"
                of_task = load_task(names[task], [f"model.path={models[name]}", f"teacher.path={path}", *overrides])
                found.append(_score(of_task, seed, output / task / f"{name}-distilled" / str(seed)))
            scores[task][name + _DISTILLED] = found
        if baseline and config.task.kind in ("sequence", "regression"):
            scores[task][_BASELINE] = [baseline_scores(config.task)[config.task.judges[0]]] * len(seeds)
        jax.clear_caches()  # the programs of a task serve no other one, and hold memory
    length = min(_LENGTH, *(model.config.max_positions for model in opened.values()))
    return Comparison(
        scores=scores,
        metrics={task: config.task.judges[0] for task, config in configs.items()},
        examples={task: "test" if config.task.test else "dev" for task, config in configs.items()},
        sizes=_sizes(opened, length),
        seeds=seeds,
        length=length,
    )


def _named(models: Sequence[str]) -> dict[str, str]:
    """Paths by the names that the tables have; a name is a folder, too."""
    named = {}
    for model in models:
        name, separator, path = model.partition("=")
        name, path = (name, path) if separator else (Path(model).resolve().name, model)
        if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
            raise InputError(f"{name!r} cannot name a model: write NAME=PATH, with letters, digits, - and . in NAME.")
        if name in named:
            raise InputError(f"Two models are called {name}: write NAME=PATH to tell them apart.")
        named[name] = path
    return named


def _score(config: FinetuneConfig, seed: int, folder: Path) -> float:
    print(f"\n== {folder}", flush=True)
    found = finetune(replace(config, seed=seed), folder)
    return found.get("test", found["dev"])[config.task.judges[0]]


def _sizes(models: dict[str, Model], length: int) -> dict[str, dict[str, float]]:
    one = encoder_seconds(models, rows=1, length=length)
    many = encoder_seconds(models, rows=32, length=length)
    sizes = {}
    for name, model in models.items():
        parameters = count_parameters(replace(model.config, mlm_head=False, pooler=False))
        sizes[name] = {
            "parameters": parameters,
            "bytes": 4 * parameters,
            "latency": one[name],
            "throughput": 32 * length / many[name],
        }
    return sizes


def tables(found: Comparison) -> list[str]:
    """The paper's tables, as Markdown: scores with what is kept of the first model's, then size and speed."""
    teacher, tasks = next(iter(found.sizes)), list(found.scores)
    whole = found.macro(teacher)
    rows = []
    for name in found.names:
        macro = found.macro(name)
        # Seed by seed, because both models had the same data and order with it.
        kept = [ours / theirs for ours, theirs in zip(macro, whole, strict=True)] if macro and all(whole) else []
        cells = [_percent(found.scores[task].get(name, [])) for task in tasks]
        rows.append([name, *cells, _percent(macro), _percent(kept)])
    heads = [f"{task}, {found.metrics[task]}" for task in tasks]
    lines = table(["model", *heads, "macro", f"kept of {teacher}"], rows)
    spread = " ± standard deviation" if len(found.seeds) > 1 else ""
    judged = {f"{task}: {found.examples[task]}" for task in tasks}
    lines += [
        "",
        f"Mean{spread} over {len(found.seeds)} seed(s), in %; examples judged: {', '.join(sorted(judged))}.",
        "",
    ]
    first = found.sizes[teacher]
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
        for name, size in found.sizes.items()
    ]
    head = ["encoder", "parameters", "size", f"1 x {found.length}", f"tokens/s, 32 x {found.length}"]
    return lines + table([*head, "faster at 1", "faster at 32"], rows)


def _percent(values: Sequence[float]) -> str:
    return mean_and_spread([100 * value for value in values], 1) or "-"


def write(found: Comparison, lines: Sequence[str], output: Path) -> None:
    """Writes compare.md, compare.json and compare.png."""
    teacher = next(iter(found.sizes))
    macro = {name: found.macro(name) for name in found.names}
    values: dict[str, Any] = {**vars(found), "macro": macro}
    (output / "compare.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    _draw(found, output / "compare.png")
    page = [f"# What students keep of {teacher}", "", *lines, "", "![scores and speed](compare.png)", ""]
    (output / "compare.md").write_text("\n".join(page), encoding="utf-8")


def into_card(card: Path, lines: Sequence[str]) -> None:
    """Puts the tables at the end of a model's card, in the place of those of an earlier comparison."""
    begin, end = _MARKS
    text = card.read_text(encoding="utf-8")
    text = re.sub(f"\n*{re.escape(begin)}.*?{re.escape(end)}\n*", "\n", text, flags=re.DOTALL).rstrip()
    card.write_text("\n".join([text, "", begin, "## Compared", "", *lines, end, ""]), encoding="utf-8")


def _draw(found: Comparison, path: Path) -> None:
    """Scores of each task with their spread, and what is kept beside how fast it is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = [light for light, _, _ in RUNS]
    names, teacher = found.names, next(iter(found.sizes))
    columns = {**found.scores, "macro": {name: found.macro(name) for name in names if found.macro(name)}}
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
        if name in found.sizes and found.macro(name) and all(found.macro(teacher)):
            kept = 100 * fmean(found.macro(name)) / fmean(found.macro(teacher))
            speed = found.sizes[teacher]["latency"] / found.sizes[name]["latency"]
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
