"""`distil-jax compare`: what students keep of their teacher on tasks, and what they save."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax

from distil_jax.config.run import check_seeds
from distil_jax.config.task import FinetuneConfig, load_task
from distil_jax.evaluation.baseline import baseline_scores
from distil_jax.evaluation.speed import encoder_seconds
from distil_jax.models.encoder import count_parameters
from distil_jax.reporting.comparison import Comparison, into_card, tables, write
from distil_jax.runtime import processes
from distil_jax.runtime.program import keep_compiled
from distil_jax.runtime.run_folder import Model, open_model
from distil_jax.schema import InputError, at_home, place, quoted, require
from distil_jax.workflows.finetune import finetune

_LENGTH = 128  # tokens a row of the timings, or as many positions as the smallest model has
_BASELINE = "TF-IDF + linear"
_DISTILLED = " + its logits"


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
        "--distil",
        nargs="*",
        metavar="NAME",
        help="these students (default: all) also learn from the logits of the fine-tuned teacher, in runs of their own",
    )
    parser.add_argument(
        "--baseline",
        action="store_true",
        help="a linear model of TF-IDF beside them, where a task has texts and labels",
    )
    parser.add_argument("--cards", action="store_true", help="put the tables into README.md of the model folders named")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override a config key of every run; [loss] and [teacher], of the runs with a teacher",
    )


def run(arguments: argparse.Namespace) -> None:
    """Compares, and prints the tables; started again, it goes on where it was."""
    output, models = place(arguments.output), _named(arguments.models)
    with processes.one_voice():
        found = compare(
            models,
            arguments.tasks,
            seeds=tuple(arguments.seeds),
            output=output,
            overrides=arguments.set,
            distil=list(models)[1:] if arguments.distil == [] else arguments.distil or (),
            baseline=arguments.baseline,
        )
        lines = tables(found)
        print("\n".join(["", *lines]))
        if processes.is_first():
            write(found, lines, output)
            cards = [place(path) / "README.md" for path in models.values() if arguments.cards]
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
    distil: Sequence[str] = (),
    baseline: bool = False,
) -> Comparison:
    """Fine-tunes every model on every task with every seed, and measures the encoders.

    Args:
      models: paths by name; the first is the teacher.
      tasks: names or TOML files.
      seeds: one run each.
      output: gets TASK/MODEL/SEED, run folders; those that are finished are not run again.
      overrides: of every run's configuration.
      distil: names of models that are also fine-tuned with the fine-tuned teacher of the same seed.
      baseline: adds a linear model of TF-IDF.

    Raises:
      InputError: a model or a task that cannot be used; runs that were finished before stay.
    """
    _check(models, tasks, seeds, overrides, distil)
    require(output.is_dir() or not output.exists(), f"{output} is a file: name a folder for the runs.")
    teacher, names = next(iter(models)), {Path(task).stem: task for task in tasks}
    opened = {name: open_model(path) for name, path in models.items()}
    plain = [override for override in overrides if not _of_a_teacher(override)]
    start = quoted("model.path", models[teacher])
    configs = {name: load_task(task, [start, *plain]) for name, task in names.items()}
    keep_compiled(next(iter(configs.values())).compute, output)
    scores: dict[str, dict[str, list[float]]] = {}
    for task, config in configs.items():
        linear = {}
        if baseline and config.task.kind in ("sequence", "regression"):  # first: what it refuses, it refuses at once
            print(f"\n== {task}: {_BASELINE}", flush=True)
            linear[_BASELINE] = [baseline_scores(config.task)[config.task.judges[0]]] * len(seeds)
        scores[task] = {}
        for name, path in models.items():
            of_task = replace(config, model=replace(config.model, path=str(path)))
            scores[task][name] = [_score(of_task, seed, output / task / name / str(seed)) for seed in seeds]
        for name in distil:
            found = []
            for seed in seeds:
                path = output / task / teacher / str(seed) / "model"
                paths = [quoted("model.path", models[name]), quoted("teacher.path", path)]
                of_task = load_task(names[task], [*paths, *overrides])
                found.append(_score(of_task, seed, output / task / f"{name}-distilled" / str(seed)))
            scores[task][name + _DISTILLED] = found
        scores[task] |= linear
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


def _check(
    models: dict[str, str],
    tasks: Sequence[str],
    seeds: tuple[int, ...],
    overrides: Sequence[str],
    distil: Sequence[str],
) -> None:
    """Refuses what could not be told apart, or would be ignored."""
    check_seeds(*seeds)
    require(len(set(seeds)) == len(seeds) > 0, f"Each seed may be named once, but they are {seeds}.")
    same = len({Path(task).stem for task in tasks}) < len(tasks)
    require(not same, "Two of the tasks have the same name, so a table could not tell them apart.")
    _, *students = models
    for name in distil:
        require(name in students, f"--distil names {name}, but the students are {', '.join(students) or 'none'}.")
        taken = f"{name}-distilled"
        require(taken not in models, f"{taken} is where {name} learns from the teacher: give that model another name.")
    for override in overrides:
        key = override.partition("=")[0].strip()
        ours = key in ("seed", "model.path", "teacher.path")
        require(not ours, f"compare sets {key} of every run itself: leave it out of --set.")
        require(distil or not _of_a_teacher(override), f"{key} is of students with a teacher: add --distil.")


def _of_a_teacher(override: str) -> bool:
    return override.strip().startswith(("loss.", "teacher."))


def _named(models: Sequence[str]) -> dict[str, str]:
    """Paths by the names that the tables have; a name is a folder, too."""
    named = {}
    for model in models:
        name, separator, path = model.partition("=")
        name, path = (name, path) if separator else (place(model).resolve().name, model)
        if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
            raise InputError(f"{name!r} cannot name a model: write NAME=PATH, with letters, digits, - and . in NAME.")
        if name in named:
            raise InputError(f"Two models are called {name}: write NAME=PATH to tell them apart.")
        named[name] = at_home(path)
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
